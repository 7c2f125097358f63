"""Entropic transport of one matrix after the other (numba): sweeps, and the adjoint of the plan.

A matrix is read once a sweep: the product of a row with the scaling of the columns gives that of the row, which at once
adds to the sums of the columns. Sums are reassociated, so that they run in vectors; infinities keep their meaning.
What takes long or is out of the ordinary is left to ``polytopes._sinkhorn``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_math import exp
from .threads import over_rows

VECTORS = {"reassoc", "contract"}
TINY = 2.2250738585072014e-308
LOOK = 5  # sweeps between two guesses of how many are left


@jit(fastmath=VECTORS)
def _span(x, a, b, unit):  # type: ignore[no-untyped-def]
    """The range of the exponents that count; nan where there are none."""
    low, high = math.inf, -math.inf
    for i in range(x.shape[0]):
        if a[i] > 0:
            row = x[i]
            for j in range(x.shape[1]):
                counts = b[j] > 0 and row[j] > -math.inf
                low = min(low, row[j] if counts else math.inf)
                high = max(high, row[j] if counts else -math.inf)
    return (high - low) * unit


@jit(fastmath=VECTORS)
def _start(x, a, b, unit, v, t, k, top, sums):  # type: ignore[no-untyped-def]
    """K = exp(x unit - top - v), and a first sweep: ``sums`` of the columns after the rows are scaled."""
    n, m = x.shape
    sums[:] = 0.0
    for i in range(n):
        given, row = x[i], k[i]
        high = -math.inf
        for j in range(m):
            z = given[j] * unit - v[j] if b[j] > 0 else -math.inf
            row[j] = z
            high = max(high, z)
        high = high if high > -math.inf else 0.0
        top[i] = high
        total = 0.0
        for j in range(m):
            e = exp(row[j] - high)
            row[j] = e
            total += e * t[j]
        s = a[i] / max(total, TINY)
        for j in range(m):
            sums[j] += s * row[j]


@jit(fastmath=VECTORS)
def _sweep(k, a, t, sums):  # type: ignore[no-untyped-def]
    n, m = k.shape
    sums[:] = 0.0
    for i in range(n):
        row = k[i]
        total = 0.0
        for j in range(m):
            total += row[j] * t[j]
        s = a[i] / max(total, TINY)
        for j in range(m):
            sums[j] += s * row[j]


@jit(fastmath=VECTORS)
def _finish(k, a, b, t, top, u, v):  # type: ignore[no-untyped-def]
    """K becomes the plan, of exact rows, and the potentials take in the scalings."""
    n, m = k.shape
    for i in range(n):
        row = k[i]
        total = 0.0
        for j in range(m):
            total += row[j] * t[j]
        u[i] = top[i] + (math.log(total) if total > 0 else 0.0)
        s = a[i] / max(total, TINY)
        for j in range(m):
            row[j] *= s * t[j]
    for j in range(m):
        if b[j] > 0:
            v[j] -= math.log(t[j] / b[j])


@jit(fastmath=VECTORS)
def _distance(b, t, sums):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(b.shape[0]):
        total += abs(b[j] - t[j] * sums[j])
    return total


@jit
def _absorb(b, t, v, ratio):  # type: ignore[no-untyped-def]
    for j in range(b.shape[0]):
        if b[j] > 0:
            v[j] = (v[j] - math.log(t[j] / b[j])) * ratio
        t[j] = b[j]


@jit
def _solve(x, eps, a, b, tol, limits, rules, y, u, v, error, bound, sigma, steps, done):  # type: ignore[no-untyped-def]
    """For x (rows, n, m). ``limits``: max_iter, anneal; ``rules``: the constants of ``polytopes._sinkhorn``."""
    max_iter, anneal = limits
    span_at, factor, coarse, near, patience, drift, unresolved = rules
    n, m = x.shape[1:]
    top, t, sums = np.empty(n), np.empty(m), np.empty(m)
    for r in range(x.shape[0]):
        done[r], steps[r], error[r], v[r] = False, 0, math.inf, 0.0
        span = _span(x[r], a[r], b[r], 1 / eps[r])
        if not anneal:
            span = min(span, span_at)
        rounding = 2.220446049250313e-16 * (1 + span)
        bound[r] = max(tol, 2 * rounding)
        sigma[r] = max(span / span_at, 1.0)
        if not 0 < rounding < unresolved:  # too wide, or no pair that counts
            sigma[r] = 0.0
            continue
        t[:] = b[r]
        fresh, last, slow = True, math.inf, False
        while steps[r] < max_iter and not slow:
            if fresh:
                _start(x[r], a[r], b[r], 1 / (eps[r] * sigma[r]), v[r], t, y[r], top, sums)
            else:
                _sweep(y[r], a[r], t, sums)
            fresh = False
            steps[r] += 1
            error[r] = _distance(b[r], t, sums)
            low, high = math.inf, 0.0
            for j in range(m):
                if b[r, j] > 0:
                    t[j] = b[r, j] / max(sums[j], TINY)
                    low, high = min(low, t[j] / b[r, j]), max(high, t[j] / b[r, j])
            target = coarse if sigma[r] > 1 else bound[r]
            if error[r] < target:
                if sigma[r] == 1:
                    break
                cooler = max(sigma[r] / factor, 1.0)
                _absorb(b[r], t, v[r], sigma[r] / cooler)
                sigma[r], error[r], last, fresh = cooler, math.inf, math.inf, True
            elif not (low > 1 / drift and high < drift):
                _absorb(b[r], t, v[r], 1.0)
                fresh = True
            if steps[r] % LOOK == 0:
                if not fresh and error[r] < near:
                    rate = math.log(error[r] / last) / LOOK
                    slow = math.log(target / error[r]) / min(rate, -1e-9) > patience
                last = error[r]
        if slow:
            _absorb(b[r], t, v[r], 1.0)
            continue
        if fresh:  # out of steps
            _start(x[r], a[r], b[r], 1 / (eps[r] * sigma[r]), v[r], t, y[r], top, sums)
        _finish(y[r], a[r], b[r], t, top, u[r], v[r])
        done[r] = True


class Solution(NamedTuple):
    """What the sweeps have found for each matrix, and where they stopped."""

    plan: Tensor
    u: Tensor
    v: Tensor
    error: Tensor
    bound: Tensor
    sweeps: Tensor
    sigma: Tensor
    done: Tensor


def solve(
    x: Tensor, eps: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, anneal: bool, rules: tuple[float, ...]
) -> Solution:  # fmt: skip
    """For theta (rows, n, m), eps (rows, 1, 1), a (rows, n, 1) and b (rows, 1, m)."""
    rows, n, m = x.shape
    y, u, v = torch.empty_like(x), torch.empty(rows, n, 1, dtype=x.dtype), torch.empty(rows, 1, m, dtype=x.dtype)
    error, bound, sigma, steps = torch.empty(4, rows, dtype=x.dtype).unbind()
    done = torch.empty(rows, dtype=torch.bool)
    given = [p.reshape(rows, *s).contiguous().numpy() for p, s in ((x, (n, m)), (eps, ()), (a, (n,)), (b, (m,)))]
    out = [p.numpy() for p in (y, u.squeeze(-1), v.squeeze(-2), error, bound, sigma, steps, done)]

    def task(begin: int, end: int) -> None:
        parts = slice(begin, end)
        _solve(*(p[parts] for p in given), tol, (max_iter, anneal), rules, *(p[parts] for p in out))

    over_rows(task, rows, 20 * x.numel())
    return Solution(y, u, v, error, bound, steps, sigma, done)


# --- the adjoint ------------------------------------------------------------------------------------------------------


@jit(fastmath=VECTORS)
def _right_side(y, g, a, r, c, columns):  # type: ignore[no-untyped-def]
    """r = (P*G) 1, c = (P*G)' 1 - P' diag(1/a) r, and the sums of the columns of P."""
    n, m = y.shape
    c[:], columns[:] = 0.0, 0.0
    for i in range(n):
        p, w = y[i], g[i]
        total = 0.0
        for j in range(m):
            total += p[j] * w[j]
        r[i] = total
        mean = total / a[i] if a[i] > 0 else 0.0
        for j in range(m):
            c[j] += p[j] * (w[j] - mean)
            columns[j] += p[j]


@jit(fastmath=VECTORS)
def _image(y, a, columns, p, out):  # type: ignore[no-untyped-def]
    """(diag(columns) - P' diag(1/a) P) p"""
    n, m = y.shape
    for j in range(m):
        out[j] = columns[j] * p[j]
    for i in range(n):
        row = y[i]
        total = 0.0
        for j in range(m):
            total += row[j] * p[j]
        mean = total / a[i] if a[i] > 0 else 0.0
        for j in range(m):
            out[j] -= mean * row[j]


@jit(fastmath=VECTORS)
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@jit(fastmath=VECTORS)
def _conjugate_gradients(y, a, columns, r, goal, most, q, p, image):  # type: ignore[no-untyped-def]
    """q with (diag(columns) - P' diag(1/a) P) q = r, of which r is the residual; whether the goal was reached."""
    m = y.shape[1]
    shift = r.sum() / max(columns.sum(), TINY)  # rounding: what no q can reach
    for j in range(m):
        r[j] -= shift * columns[j]
        q[j] = 0.0
        p[j] = r[j] / columns[j] if columns[j] > 0 else 0.0
    square = _dot(r, p)
    least = square * goal * goal
    for _ in range(most):
        if not square > least:
            return True
        _image(y, a, columns, p, image)
        curve = _dot(p, image)
        if not curve > 0:
            return False
        length = square / curve
        before, square = square, 0.0
        for j in range(m):
            q[j] += length * p[j]
            r[j] -= length * image[j]
            square += r[j] * r[j] / columns[j] if columns[j] > 0 else 0.0
        ratio = square / before
        for j in range(m):
            p[j] = ratio * p[j] + (r[j] / columns[j] if columns[j] > 0 else 0.0)
    return not square > least


@jit(fastmath=VECTORS)
def _gradient(y, g, a, eps, r, p, q, out):  # type: ignore[no-untyped-def]
    """p, and the gradient P * (G - p - q) / eps."""
    n, m = y.shape
    unit = 1 / eps
    for i in range(n):
        row, w, o = y[i], g[i], out[i]
        total = 0.0
        for j in range(m):
            total += row[j] * q[j]
        p[i] = (r[i] - total) / a[i] if a[i] > 0 else 0.0
        for j in range(m):
            o[j] = row[j] * (w[j] - p[i] - q[j]) * unit


@jit
def _adjoints(y, g, eps, a, goal, most, p, q, out, done):  # type: ignore[no-untyped-def]
    n, m = y.shape[1:]
    r, c, columns, way, image = np.empty(n), np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    for k in range(y.shape[0]):
        _right_side(y[k], g[k], a[k], r, c, columns)
        done[k] = _conjugate_gradients(y[k], a[k], columns, c, goal, most, q[k], way, image)
        if done[k]:
            _gradient(y[k], g[k], a[k], eps[k], r, p[k], q[k], out[k])


def adjoint(
    y: Tensor, g: Tensor, eps: Tensor, a: Tensor, goal: float, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient in theta for the cotangent g of y = P, p (rows, n, 1) and q (rows, 1, m); where they were found.

    eps (rows, 1, 1); a (rows, n, 1), the sums of the rows. At most ``most`` steps, to a residual of ``goal``, relative.
    """
    rows, n, m = y.shape
    p, q, out = torch.empty(rows, n, 1, dtype=y.dtype), torch.empty(rows, 1, m, dtype=y.dtype), torch.empty_like(y)
    done = torch.empty(rows, dtype=torch.bool)
    given = [t.contiguous().numpy() for t in (y, g, eps.reshape(rows), a.reshape(rows, n))]
    found = [t.numpy() for t in (p.squeeze(-1), q.squeeze(-2), out, done)]

    def task(begin: int, end: int) -> None:
        i = slice(begin, end)
        _adjoints(*(t[i] for t in given), goal, most, *(t[i] for t in found))

    over_rows(task, rows, 20 * y.numel())
    return out, p, q, done
