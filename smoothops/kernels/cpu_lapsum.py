"""Ranks and sorts by the Laplace law on the CPU (numba), O(n) after the argsort; the equations are in ``lapsum``.

Notation of a row: s ascending, A_m = sum_{i >= m} e^((s_m - s_i)/a) and B_m = sum_{i <= m} e^((s_i - s_m)/a).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_choice import column, matrix
from .cpu_math import exp, log
from .cpu_order import WORK
from .cpu_sort import INDEX, sorted_keys
from .threads import over_rows

LARGE = 20.0  # of the exponent, from where asinh is a logarithm to the last digit


@jit(fastmath={"contract"})
def _decays(s, a, decay):  # type: ignore[no-untyped-def]
    """decay_m = e^((s_m - s_{m+1})/a)."""
    above = s[1:]
    for i in range(above.shape[0]):
        decay[i] = exp((s[i] - above[i]) / a)


@jit
def _sums(decay, n, right, left):  # type: ignore[no-untyped-def]
    """A and B from the decays."""
    right[n - 1], left[0] = 1.0, 1.0
    for m in range(1, n):  # both in one loop: neither waits for the other
        i = n - 1 - m
        left[m], right[i] = 1 + decay[m - 1] * left[m - 1], 1 + decay[i] * right[i + 1]


@jit(fastmath={"contract"})
def _solve_between(a, n, low, high, below, above, place, y):  # type: ignore[no-untyped-def]
    """y_m from the neighbours (low, high) of its place, and B of the one, A of the other, in vector instructions."""
    for m in range(y.shape[0]):
        w = m + 0.5
        b, c, e = log(below[m]), log(above[m]), w - place[m]
        lift = (high[m] - low[m]) / a / 2 - (b + c) / 2
        fall = exp(-min(abs(lift), LARGE))
        v = abs(e) * fall if lift < 0 else abs(e) / fall
        # t = asinh(v) = log1p(u), from log(z) and what rounding took from z = 1 + u
        u = v + v * v / (1 + math.sqrt(1 + v * v))
        z = 1 + u
        t = log(z) + (u - (z - 1)) / z
        near = (low[m] + high[m]) / 2 + a * ((b - c) / 2 + (t if e > 0 else -t))
        # far from one of the two, which then does not count; not by their middle, in which small distances are lost
        d = log(2 * abs(e))
        far = high[m] + a * (d - c) if e > 0 else low[m] - a * (d - b)
        first, last = high[m] + a * (log(2 * w) - c), low[m] - a * (log(2 * (n - w)) - b)
        inner = near if lift < LARGE else far
        y[m] = first if place[m] == 0 else last if place[m] == n else inner


@jit
def _inverse(s, a, right, left, y, low, high, below, above, place):  # type: ignore[no-untyped-def]
    """y_m = G^-1(m + 1/2), m from 0; G and the levels both increase, so that one pointer finds all places."""
    n = s.shape[0]
    p = 0
    for m in range(n):
        while p < n and p + 0.5 + (right[p] - left[p]) / 2 <= m + 0.5:
            p += 1
        place[m] = p
        i, j = max(p - 1, 0), min(p, n - 1)
        low[m], high[m], below[m], above[m] = s[i], s[j], left[i], right[j]
    _solve_between(a, n, low, high, below, above, place, y)


@jit
def _load(x, perm, sign, s):  # type: ignore[no-untyped-def]
    for j in range(s.shape[0]):
        s[j] = sign * x[perm[j]]


@jit
def _forward(x, keys, eps, sign, ranks, descending, y, exact, perm, work, place):  # type: ignore[no-untyped-def]
    n = x.shape[1]
    s, decay, left = work[0], work[1], work[2]
    for r in range(x.shape[0]):
        for j in range(n):
            perm[r, j] = np.int32(keys[r, j] & INDEX)
        _load(x[r], perm[r], sign, s)
        _decays(s, eps[r], decay)
        right = keys[r].view(np.float64)  # no longer needed as keys
        _sums(decay, n, right, left)
        if ranks:
            for j in range(n):
                y[r, perm[r, j]] = j + 1 + (right[j] - left[j]) / 2
        else:
            _inverse(s, eps[r], right, left, exact[r], work[3], decay, work[4], work[5], place)
            for j in range(n):
                y[r, n - 1 - j if descending else j] = exact[r, j]


@jit
def _rank_row(a, given, decay, out):  # type: ignore[no-untyped-def]
    """out_m = sum_i e^(-|s_m - s_i|/a) (g_m - g_i) / 2a, by one sweep from each side."""
    n = given.shape[0]
    count, total = 0.0, 0.0
    for m in range(n):
        if m > 0:
            count, total = decay[m - 1] * (count + 1), decay[m - 1] * (total + given[m - 1])
        out[m] = count * given[m] - total
    count, total = 0.0, 0.0
    for m in range(n - 1, -1, -1):
        if m < n - 1:
            count, total = decay[m] * (count + 1), decay[m] * (total + given[m + 1])
        out[m] = (out[m] + (count * given[m] - total)) / (2 * a)


@jit(fastmath={"contract"})
def _shares(a, n, low, high, y, place, down, up):  # type: ignore[no-untyped-def]
    """e^(-|y_m - s_i|/a) for the items on both sides of y_m, 0 where there is none; low and high are the items."""
    for m in range(y.shape[0]):
        down[m] = exp((low[m] - y[m]) / a) if place[m] > 0 else 0.0
        up[m] = exp((y[m] - high[m]) / a) if place[m] < n else 0.0


@jit
def _sort_row(s, a, y, given, decay, work, place):  # type: ignore[no-untyped-def]
    """s_i becomes sum_m given_m softmax_i(-|y_m - s_i|/a): y_m hands its part to both sides, the items pass it on."""
    n = s.shape[0]
    right, left, down, up = work[2], work[3], work[4], work[5]
    _sums(decay, n, right, left)
    p = 0  # items at or below y_m
    for m in range(n):
        while p < n and s[p] <= y[m]:
            p += 1
        place[m] = p
        down[m], up[m] = s[max(p - 1, 0)], s[min(p, n - 1)]
    _shares(a, n, down, up, y, place, down, up)
    for m in range(n):
        p = place[m]
        given[m] /= down[m] * left[max(p - 1, 0)] + up[m] * right[min(p, n - 1)]
    out = s  # no longer needed
    out[:] = 0.0
    right[:] = 0.0
    for m in range(n):
        p = place[m]
        if p < n:
            out[p] += given[m] * up[m]
        if p > 0:
            right[p - 1] += given[m] * down[m]
    for m in range(1, n):
        i = n - 1 - m
        out[m] += decay[m - 1] * out[m - 1]
        right[i] += decay[i] * right[i + 1]
    for i in range(n):
        out[i] += right[i]


@jit
def _backward(x, g, eps, sign, ranks, descending, exact, perm, out):  # type: ignore[no-untyped-def]
    n = x.shape[1]
    work, place = np.empty((3 if ranks else 7, n)), np.empty(0 if ranks else n, np.int32)
    s, decay, given = work[0], work[1], work[-1]
    for r in range(x.shape[0]):
        _load(x[r], perm[r], sign, s)
        _decays(s, eps[r], decay)
        if ranks:
            base = np.float64(g[r, perm[r, 0]])
            for j in range(n):
                given[j] = g[r, perm[r, j]] - base
            _rank_row(eps[r], given, decay, s)
        else:
            for j in range(n):
                given[j] = g[r, n - 1 - j if descending else j]
            _sort_row(s, eps[r], exact[r], given, decay, work, place)
        for j in range(n):
            out[r, perm[r, j]] = sign * s[j]


class OrderJob:
    """One call of rank or sort on finite rows by the Laplace law; see ``polytopes._fused.Job``; eps is known."""

    def __init__(self, ranks: bool, descending: bool, rule: int, inputs: float | None, eps: float | Tensor) -> None:
        self.ranks, self.descending, self.given = ranks, descending, eps
        self.sign = -1.0 if ranks and descending else 1.0

    def strength(self) -> float | Tensor:
        return self.given

    keeps_answer = False

    def layout(self, shape: torch.Size) -> list[tuple[torch.Size, torch.dtype]]:
        exact = torch.Size([*shape[:-1], 0 if self.ranks else shape[-1]])
        return [(shape, torch.int32), (exact, torch.float64)]

    def resume(self, batch: torch.Size) -> None:
        self.eps = column(self.given, batch)

    def fit(self, x: Tensor) -> Tensor:
        return x.isfinite().all(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        n = x.shape[-1]
        self.resume(x.shape[:-1])
        y, perm = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int32)
        # a sort's gradient needs its values to full precision, beside a scale that may be tiny
        exact = torch.empty(self.layout(x.shape)[1][0], dtype=torch.float64)
        xs, ys, perms = matrix(x), matrix(y), matrix(perm)
        exacts = exact.view(len(xs), exact.shape[-1]).numpy()

        def task(begin: int, end: int) -> bool:
            step = min(max(WORK // n, 1), end - begin)
            keys, work = np.empty((step, n), np.uint64), np.empty((3 if self.ranks else 6, n))
            place = np.empty(0 if self.ranks else n, np.int32)
            for at in range(begin, end, step):
                rows = slice(at, min(at + step, end))
                some = keys[: rows.stop - at]
                if not sorted_keys(xs[rows], self.sign < 0, some, work[0].view(np.uint64)):
                    return False
                _forward(
                    xs[rows], some, self.eps[rows], self.sign, self.ranks, self.descending, ys[rows], exacts[rows],
                    perms[rows], work, place,
                )  # fmt: skip
            return True

        return (y, (perm, exact)) if all(over_rows(task, len(xs), 2 * x.numel())) else None

    def backward(self, x: Tensor, state: tuple[Tensor, ...], g: Tensor) -> Tensor:
        out, (perm, exact) = torch.empty_like(x), state
        arrays = [matrix(v) for v in (x, g, perm, out)]
        exacts = exact.view(len(arrays[0]), exact.shape[-1]).numpy()

        def task(begin: int, end: int) -> None:
            rows = slice(begin, end)
            xs, gs, perms, outs = (v[rows] for v in arrays)
            flags = self.sign, self.ranks, self.descending
            _backward(xs, gs, self.eps[rows], *flags, exacts[rows], perms, outs)

        over_rows(task, len(arrays[0]), 2 * x.numel())
        return out
