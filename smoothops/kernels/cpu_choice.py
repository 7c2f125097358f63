"""Soft choices of rows on the CPU (numba): the threshold, the answer and its gradient, in few passes over a row."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_softmax import ALL, NONE, SOLVED, largest_entry, softmax_row
from .cpu_threshold import (
    CHUNK,
    CODES,
    ENTROPY,
    FUSED,
    LAPLACE,
    LOGISTIC,
    QUADRATIC,
    SAMPLE,
    SUMS,
    TSALLIS,
    _edge,
    _phi_inverse,
    _point,
    nearest_entry,
    newton,
    solve_row,
    special,
)
from .threads import over_rows
from .torch import SLOPE_FLOOR

# --- phi without an edge: every item counts ---------------------------------------------------------------------------


@jit(inline="always")
def _answers(code, x, ref, eps, tau, shape, cap, y):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        y[i] = _point(code, (x[i] - ref) / eps - tau, shape, cap)[0]


@jit(inline="always")
def _slopes(code, x, ref, eps, tau, shape, cap, d):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        d[i] = _point(code, (x[i] - ref) / eps - tau, shape, cap)[1]


@jit(fastmath=FUSED)
def _answer(code, x, ref, eps, tau, shape, cap, y):  # type: ignore[no-untyped-def]
    # a constant code for each loop, so that it is compiled to vector instructions
    if code == ENTROPY:
        _answers(ENTROPY, x, ref, eps, tau, shape, cap, y)
    elif code == LOGISTIC:
        _answers(LOGISTIC, x, ref, eps, tau, shape, cap, y)
    else:
        _answers(LAPLACE, x, ref, eps, tau, shape, cap, y)


@jit(fastmath=FUSED)
def _slope(code, x, ref, eps, tau, shape, cap, d):  # type: ignore[no-untyped-def]
    if code == ENTROPY:
        _slopes(ENTROPY, x, ref, eps, tau, shape, cap, d)
    elif code == LOGISTIC:
        _slopes(LOGISTIC, x, ref, eps, tau, shape, cap, d)
    else:
        _slopes(LAPLACE, x, ref, eps, tau, shape, cap, d)


# --- phi with an edge: items below it have weight 0, and most of them are never looked at twice -----------------------


@jit
def _gather(x, cut, index):  # type: ignore[no-untyped-def]
    """The indices of the entries above ``cut``; how many those are, how many are above -inf, how many inf or nan."""
    count, items, unfit = 0, 0, 0
    for i in range(x.shape[0]):
        t = x[i]
        items += t > -math.inf
        unfit += not t < math.inf
        index[count] = i
        count += t > cut
    return count, items, unfit


@jit
def _cut_of_sample(code, x, eps, k, shape, cap, u, y, d):  # type: ignore[no-untyped-def]
    """A number that the threshold hardly lies below: the threshold of a sample for a few more items."""
    n = x.shape[0]
    m = min(n // 16, SAMPLE)
    expected = k * m / n
    more = expected + 3 * math.sqrt(expected) + 3
    if m < 32 or more > m / 2:
        return -math.inf
    ref = np.float64(x[n // (2 * m)])
    for i in range(m):
        u[i] = (x[(2 * i + 1) * n // (2 * m)] - ref) / eps
        if not abs(u[i]) < math.inf:
            return -math.inf
    tau = newton(code, u, m, m, more, 0.0, shape, cap, True, False, y, d)
    return ref + (tau + _edge(code, shape)) * eps


@jit
def _sparse_row(code, x, eps, k, shape, cap, several, index, u, y, d):  # type: ignore[no-untyped-def]
    """(ref, tau, count, items): the threshold, and the indices of all items that can have weight."""
    edge = _edge(code, shape)
    if several:
        cut = _cut_of_sample(code, x, eps, k, shape, cap, u, y, d)
    else:
        largest = np.float64(largest_entry(x))
        low = min(-_phi_inverse(code, k, shape), -_phi_inverse(code, k / x.shape[0], shape))
        cut = largest + (low + edge - 1e-6 * (1 + abs(low))) * eps
        if not cut < largest:
            cut = -math.inf
    while True:
        count, items, unfit = _gather(x, cut, index)
        if unfit:
            return 0.0, 0.0, 0, -1
        if k <= 0 or k >= items:
            return 0.0, 0.0, 0, items
        if several and cut > -math.inf and count <= k:
            cut = -math.inf
            continue
        ref = np.float64(x[index[count // 2]]) if several else largest
        tau = 0.0 if several else low
        for _ in range(3):
            for j in range(count):
                u[j] = (x[index[j]] - ref) / eps
            tau = newton(code, u, count, items, k, tau, shape, cap, several, False, y, d)
            if not several or (abs(tau) < 0.25 and not shape > 2):
                break
            # digits are lost where ref is far from the threshold, and where phi is infinitely steep there
            for j in range(count):
                u[j] = x[index[j]]
            near = nearest_entry(u[:count], ref, eps, tau)
            if near == ref:
                break
            tau, ref = tau - (near - ref) / eps, near
        if cut == -math.inf or not several or ref + (tau + edge) * eps > cut:
            return ref, tau, count, items
        cut = -math.inf


@jit
def _forward_sparse(code, x, eps, k, shape, cap, several, y, kind, ref, tau):  # type: ignore[no-untyped-def]
    """False where a row holds nan or inf."""
    n = x.shape[1]
    index, u, part, part_slope = np.empty(n + 1, np.int32), np.empty(n), np.empty(CHUNK), np.empty(CHUNK)
    for r in range(x.shape[0]):
        row, answer, own = x[r], y[r], special(code, shape[r])
        ref[r], tau[r], count, items = _sparse_row(
            own, row, eps[r], k[r], shape[r], cap[r], several, index, u, part, part_slope
        )  # fmt: skip
        if items < 0:
            return False
        kind[r] = SOLVED if 0 < k[r] < items else NONE if k[r] <= 0 else ALL
        answer[:] = 0.0
        if kind[r] == SOLVED:
            for j in range(count):
                i = index[j]
                answer[i] = _point(own, (row[i] - ref[r]) / eps[r] - tau[r], shape[r], cap[r])[0]
        elif kind[r] == ALL:
            for i in range(n):
                answer[i] = 1.0 if row[i] > -math.inf else 0.0
    return True


@jit
def _backward_sparse(code, x, y, g, eps, shape, cap, kind, ref, tau, out):  # type: ignore[no-untyped-def]
    """As :func:`_backward`, from the entries of y that are not 0."""
    n = x.shape[1]
    index, d = np.empty(n + 1, np.int32), np.empty(n)
    for r in range(x.shape[0]):
        row, weights, gradient, given, own = x[r], y[r], out[r], g[r], special(code, shape[r])
        gradient[:] = 0.0
        if kind[r] != SOLVED:
            continue
        count = 0
        for i in range(n):
            index[count] = i
            count += weights[i] != 0
        base, largest = 0.0, 0.0
        for j in range(count):
            i = index[j]
            d[j] = _point(own, (row[i] - ref[r]) / eps[r] - tau[r], shape[r], cap[r])[1]
            if d[j] > largest:
                largest, base = d[j], np.float64(given[i])
        total, slope = 0.0, 0.0
        for begin in range(0, count, CHUNK):
            part, part_slope = 0.0, 0.0
            for j in range(begin, min(begin + CHUNK, count)):
                if d[j] != 0:
                    part += d[j] * (given[index[j]] - base)
                    part_slope += d[j]
            total += part
            slope += part_slope
        if slope > SLOPE_FLOOR:
            shift = total / slope
            for j in range(count):
                i = index[j]
                if d[j] != 0:
                    gradient[i] = d[j] * ((given[i] - base) - shift) / eps[r]


# --- rows -------------------------------------------------------------------------------------------------------------


@jit
def _forward(code, x, eps, k, shape, cap, several, log_residual, y, kind, ref, tau):  # type: ignore[no-untyped-def]
    """False where a row holds nan or inf."""
    n = x.shape[1]
    v, u, part, part_slope = np.empty(n), np.empty(n), np.empty(CHUNK), np.empty(CHUNK)
    present = np.empty(0, np.bool_)  # no mask
    for r in range(x.shape[0]):
        if code == ENTROPY and not several:
            kind[r], ref[r], tau[r] = softmax_row(x[r], eps[r], v, y[r])
            if kind[r] < 0:
                return False
            continue
        ref[r], tau[r], items = solve_row(
            code, x[r], present, False, eps[r], k[r], shape[r], cap[r], several, log_residual, v, u, part, part_slope
        )  # fmt: skip
        if items < 0:
            return False
        kind[r] = SOLVED if 0 < k[r] < items else NONE if k[r] <= 0 else ALL
        if kind[r] == SOLVED:
            _answer(code, x[r], ref[r], eps[r], tau[r], shape[r], cap[r], y[r])
        elif kind[r] == NONE:
            y[r, :] = 0.0
        else:
            for i in range(n):
                y[r, i] = 1.0 if x[r, i] > -math.inf else 0.0
    return True


@jit(fastmath=SUMS)
def _dot(d, g, base):  # type: ignore[no-untyped-def]
    """Sums of d (g - base) and of d; an item of no weight carries none, also where g is infinite."""
    total, slope = 0.0, 0.0
    for i in range(d.shape[0]):
        total += d[i] * (g[i] - base) if d[i] != 0 else 0.0
        slope += d[i]
    return total, slope


@jit
def _backward(code, x, g, eps, shape, cap, kind, ref, tau, out):  # type: ignore[no-untyped-def]
    """out = d (g - <d, g>/S)/eps; g is taken relative to one that counts: a single one has gradient 0 exactly."""
    n = x.shape[1]
    d = np.empty(n)
    for r in range(x.shape[0]):
        if kind[r] != SOLVED:
            out[r, :] = 0.0
            continue
        _slope(code, x[r], ref[r], eps[r], tau[r], shape[r], cap[r], d)
        where = 0
        while where < n - 1 and d[where] == 0:
            where += 1
        base = np.float64(g[r, where])
        total, slope = 0.0, 0.0
        for begin in range(0, n, CHUNK):
            end = min(begin + CHUNK, n)
            part, part_slope = _dot(d[begin:end], g[r, begin:end], base)
            total += part
            slope += part_slope
        usable = slope > SLOPE_FLOOR
        shift, scale = total / slope if usable else 0.0, 1 / eps[r] if usable else 0.0
        row, gradient = g[r], out[r]
        for i in range(n):
            gradient[i] = d[i] * ((row[i] - base) - shift) * scale if d[i] != 0 else 0.0


class ChoiceJob:
    """One call of a soft choice on rows; see ``polytopes._fused.Job``.

    family: the name of a regularizer; several: clipped at 1, for k items; cap: where the clip takes hold. eps, k,
    shape: numbers or (..., 1).
    """

    def __init__(
        self, family: str, several: bool, log_residual: bool, eps: float | Tensor, k: float | Tensor,
        shape: float | Tensor, cap: float | Tensor,
    ) -> None:  # fmt: skip
        self.code, self.several, self.log_residual = CODES[family], several, log_residual
        self.sparse = self.code == QUADRATIC or self.code >= TSALLIS
        self.given, self.columns = eps, (eps, k, shape, cap)

    def strength(self) -> float | Tensor:
        return self.given

    @property
    def keeps_answer(self) -> bool:
        return self.sparse

    def layout(self, shape: torch.Size) -> list[tuple[torch.Size, torch.dtype]]:
        return [(shape[:-1], dtype) for dtype in (torch.int8, torch.float64, torch.float64)]

    def resume(self, batch: torch.Size) -> None:
        self.eps, self.k, self.shape, self.cap = (column(v, batch) for v in self.columns)

    def fit(self, x: Tensor) -> Tensor:
        return (x < torch.inf).all(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        batch = x.shape[:-1]
        self.resume(batch)
        y, kind = torch.empty_like(x), torch.empty(batch, dtype=torch.int8)
        ref, tau = (torch.empty(batch, dtype=torch.float64) for _ in range(2))
        xs, ys = matrix(x), matrix(y)
        found = [v.view(-1).numpy() for v in (kind, ref, tau)]

        def task(begin: int, end: int) -> bool:
            some = slice(begin, end)
            parameters = (v[some] for v in (self.eps, self.k, self.shape, self.cap))
            state = ys[some], *(v[some] for v in found)
            if self.sparse:
                return _forward_sparse(self.code, xs[some], *parameters, self.several, *state)
            return _forward(self.code, xs[some], *parameters, self.several, self.log_residual, *state)

        if not all(over_rows(task, len(xs), 2 * x.numel())):
            return None
        return y, (kind, ref, tau, y) if self.keeps_answer else (kind, ref, tau)

    def backward(self, x: Tensor, state: tuple[Tensor, ...], g: Tensor) -> Tensor:
        out = torch.empty_like(x)
        xs, gs, outs = (matrix(v) for v in (x, g, out))
        known = [self.eps, self.shape, self.cap, *(v.view(-1).numpy() for v in state[:3])]
        ys = matrix(state[3]) if self.sparse else xs

        def task(begin: int, end: int) -> None:
            some = slice(begin, end)
            values = xs[some], ys[some], gs[some], *(v[some] for v in known), outs[some]
            if self.sparse:
                _backward_sparse(self.code, *values)
            else:
                _backward(self.code, values[0], *values[2:])

        over_rows(task, len(xs), x.numel())
        return out


def column(v: float | Tensor, batch: torch.Size) -> np.ndarray:
    """A number, or a tensor that broadcasts to (*batch, 1), as one number a row."""
    if not isinstance(v, Tensor):
        return np.full(batch.numel(), v, dtype=np.float64)
    return v.detach().to(torch.float64).expand(*batch, 1).reshape(-1).numpy()


def matrix(v: Tensor) -> np.ndarray:
    """Contiguous v (..., n) as (rows, n), without copying."""
    return v.detach().view(-1, v.shape[-1]).numpy()
