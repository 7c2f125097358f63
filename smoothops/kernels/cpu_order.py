"""Soft ranks and sorts of finite rows on the CPU (numba): sorting, pooling, the answer, and its gradient.

The same numbers as ``polytopes.permutahedron.Sorted`` gives through ``kernels.pool``: the same comparisons in float64
decide what is pooled, and the answer is written a block at a time. Notation, for the j-th largest item of a row:

    s_j its value, rho_j = n - j its position; rank: theta = s, w = rho; sort: theta = rho, w = s.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_choice import column, matrix
from .cpu_search import SAMPLE, TYPICAL, accept, propose, start, state, strength
from .cpu_sort import INDEX, sorted_keys
from .threads import over_rows
from .torch import MEAN

WORK = 1 << 15  # items whose keys stay in the cache between the sort and the pooling


@jit
def _pool_mean(s, e, ranks, first, sums, means):  # type: ignore[no-untyped-def]
    """Blocks of one row, as in ``cpu._pool_mean``; the means of rho need no sums. Returns the number of blocks.

    Block t begins at first[t]; means[t] is the mean of s - s[first[t]] over it.
    """
    top = -1
    for j in range(s.shape[0]):
        f, total, size, mean = j, 0.0, 1.0, 0.0
        while top >= 0:
            i = first[top]
            ds, count = s[i] - s[f], float(f - i)
            gap_s, gap_rho = ds + (means[top] - mean), count + ((size - 1) / 2 - (count - 1) / 2)
            if not (gap_s < e * gap_rho if ranks else gap_rho < e * gap_s):
                break
            total = sums[top] + (total - size * ds)
            size += count
            mean = total / size
            f = i
            top -= 1
        top += 1
        first[top], sums[top], means[top] = f, total, mean
    return top + 1


@jit
def _pool_logsumexp(theta, w, e, first, sums, others):  # type: ignore[no-untyped-def]
    """Blocks of one row, as in ``cpu._pool_logsumexp``: sums of exp((theta - a)/e) and exp(w - b) from its first."""
    top = -1
    for j in range(theta.shape[0]):
        f, xa, xb = j, 1.0, 1.0
        while top >= 0:
            i = first[top]
            da, db = theta[i] - theta[f], w[i] - w[f]
            if not da / e + math.log(sums[top] / xa) < db + math.log(others[top] / xb):
                break
            xa = sums[top] + xa * math.exp(-da / e)
            xb = others[top] + xb * math.exp(-db)
            f = i
            top -= 1
        top += 1
        first[top], sums[top], others[top] = f, xa, xb
    return top + 1


@jit
def _pool(s, e, ranks, mean_rule, rho, log_rho, first, sums, others):  # type: ignore[no-untyped-def]
    if mean_rule:
        return _pool_mean(s, e, ranks, first, sums, others)
    if ranks:
        return _pool_logsumexp(s, log_rho, e, first, sums, others)
    return _pool_logsumexp(rho, s, e, first, sums, others)


@jit
def _measure(s, e, ranks, mean_rule, rho, log_rho, first, sums, others):  # type: ignore[no-untyped-def]
    """The size of a block, averaged over the items, and the number of blocks."""
    blocks = _pool(s, e, ranks, mean_rule, rho, log_rho, first, sums, others)
    squares, end = 0.0, s.shape[0]
    for t in range(blocks - 1, -1, -1):
        squares += float(end - first[t]) ** 2
        end = first[t]
    return squares / s.shape[0], float(blocks)


@jit
def _mixing(s, inputs, ranks, mean_rule, rho, log_rho, first, sums, others):  # type: ignore[no-untyped-def]
    """The eps at which a block holds ``inputs`` items, averaged over the items: ``polytopes._mixing.mixing_pool``."""
    n = s.shape[0]
    low, high, tied = math.inf, 0.0, False
    stride, taken, sample = max(1, (n - 1) // SAMPLE), 0, np.empty(2 * SAMPLE)
    for j in range(n - 1):
        gap_s, gap_rho = s[j] - s[j + 1], 1.0 if mean_rule or not ranks else log_rho[j] - log_rho[j + 1]
        if gap_s > 0:
            critical = gap_s / gap_rho if ranks else gap_rho / gap_s
            low, high = min(low, critical), max(high, critical)
            if j % stride == 0:
                sample[taken] = critical
                taken += 1
        else:
            tied = True
    none = high == 0.0
    low, high = 1.0 if none else low / 2, 1.0 if none else high * 3
    goal = min(inputs, float(n))
    few, most = 1.0, float(n)  # nothing is pooled at low but ties, everything at high
    if tied:
        few, most = _measure(s, low, ranks, mean_rule, rho, log_rho, first, sums, others)
    search = state()
    unit = start(search, low, high, few, float(n), most, 1.0)
    if taken > 0:
        guess = math.log(np.sort(sample[:taken])[(taken - 1) // 2] * TYPICAL / unit)
    else:
        guess = math.log(math.exp(math.log(low) / 2 + math.log(high) / 2) / unit)
    for step in range(80):
        if propose(search, goal, step, guess):
            break
        e = unit * math.exp(search[0][2])
        mix, count = _measure(s, e, ranks, mean_rule, rho, log_rho, first, sums, others)
        accept(search, goal, mix, count)
    return strength(search, goal, unit)


@jit
def _forward(  # type: ignore[no-untyped-def]
    x, keys, eps, inputs, backward, sign, ranks, mean_rule, descending, y, perm, s, first, means, rho, log_rho
):
    rows, n = x.shape
    for r in range(rows):
        for j in range(n):
            i = np.int32(keys[r, n - 1 - j if backward else j] & INDEX)
            perm[r, j] = i
            s[j] = sign * x[r, i]
        sums = keys[r].view(np.float64)  # no longer needed as keys
        if inputs > 0:
            eps[r] = _mixing(s, inputs, ranks, mean_rule, rho, log_rho, first, sums, means)
        e = eps[r]
        blocks = _pool(s, e, ranks, mean_rule, rho, log_rho, first, sums, means)
        end = n
        for t in range(blocks - 1, -1, -1):
            f = first[t]
            alone = end - f == 1
            high, low = float(n - f), float(n - end + 1)
            middle = (high + low) / 2
            if ranks:
                share = middle * (end - f) / sums[t]
                for j in range(f, end):
                    if alone:
                        v = high
                    elif mean_rule:
                        v = min(max(((s[j] - s[f]) - means[t]) / e + middle, low), high)
                    else:
                        v = share * math.exp((s[j] - s[f]) / e)
                    y[r, perm[r, j]] = v
            else:
                lse = 0.0 if mean_rule else s[f] + math.log(means[t]) - math.log(sums[t])
                for j in range(f, end):
                    if alone:
                        v = s[j]
                    elif mean_rule:
                        v = min(max(s[f] + means[t] + (float(n - j) - middle) / e, s[end - 1]), s[f])
                    else:
                        v = lse + float(f - j) / e
                    y[r, j if descending else n - 1 - j] = v
            perm[r, f] = ~perm[r, f]  # marks where a block begins
            end = f


@jit
def _backward(x, y, g, eps, perm, sign, ranks, mean_rule, descending, out, work):  # type: ignore[no-untyped-def]
    """The Jacobian product: ranks: (g - mean g)/eps, r (g - <p, g>)/eps; sorts: mean g, softmax(s) sum g; a block."""
    rows, n = x.shape
    for r in range(rows):
        scale = sign / eps[r]
        begin = 0
        while begin < n:
            p = ~perm[r, begin]
            # not float(), which keeps float32
            base = np.float64(g[r, p] if ranks else g[r, begin if descending else n - 1 - begin])
            end = begin + 1
            total, weight = 0.0, 1.0
            if ranks and mean_rule:
                while end < n and perm[r, end] >= 0:
                    work[end] = g[r, perm[r, end]] - base
                    total += work[end]
                    end += 1
                mean = total / (end - begin)
                out[r, p] = -mean * scale if end - begin > 1 else 0.0
                for j in range(begin + 1, end):
                    out[r, perm[r, j]] = (work[j] - mean) * scale
            elif ranks:
                weight = np.float64(y[r, p])
                while end < n and perm[r, end] >= 0:
                    i = perm[r, end]
                    work[end] = g[r, i] - base
                    total += y[r, i] * work[end]
                    weight += y[r, i]
                    end += 1
                mean = total / weight
                out[r, p] = -y[r, p] * mean * scale if end - begin > 1 else 0.0
                for j in range(begin + 1, end):
                    i = perm[r, j]
                    out[r, i] = y[r, i] * (work[j] - mean) * scale
            else:
                high = np.float64(x[r, p])
                while end < n and perm[r, end] >= 0:
                    total += g[r, end if descending else n - 1 - end] - base
                    if not mean_rule:
                        work[end] = math.exp(x[r, perm[r, end]] - high)
                        weight += work[end]
                    end += 1
                size = end - begin
                if mean_rule:
                    mean = base + total / size
                    out[r, p] = mean
                    for j in range(begin + 1, end):
                        out[r, perm[r, j]] = mean
                else:
                    share = (base * size + total) / weight
                    out[r, p] = share
                    for j in range(begin + 1, end):
                        out[r, perm[r, j]] = share * work[j]
            begin = end


class OrderJob:
    """One call of rank or sort on finite rows: ``forward``, then ``backward``; see ``polytopes._fused.Job``.

    ranks: else sort; rule: how blocks are summed up; descending: the order of the answer. eps: a number, (..., 1), or
    None for the strength at which an answer mixes ``inputs`` items.
    """

    def __init__(
        self, ranks: bool, descending: bool, rule: int, inputs: float | None, eps: float | Tensor | None
    ) -> None:
        self.ranks, self.descending, self.mean_rule = ranks, descending, rule == MEAN
        self.given, self.inputs = eps, 0.0 if inputs is None else inputs
        self.sign = -1.0 if ranks and descending else 1.0
        # the largest theta first, its ties in order; an ascending sort is the flip of a stable ascending order
        self.flip = not descending if ranks else descending
        self.reverse = not ranks and not descending

    def strength(self) -> float | Tensor:
        """eps of the call that was done: a number or (..., 1)."""
        return self.given if isinstance(self.given, float) else torch.from_numpy(self.eps).view(*self.batch, 1)

    def layout(self, shape: torch.Size) -> list[tuple[torch.Size, torch.dtype]]:
        return [(shape, torch.int32)]

    @property
    def keeps_answer(self) -> bool:
        return self.ranks and not self.mean_rule

    def resume(self, batch: torch.Size) -> None:
        self.batch = batch
        self.eps = column(0.0 if self.given is None else self.given, batch)

    def fit(self, x: Tensor) -> Tensor:
        return x.isfinite().all(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        self.resume(x.shape[:-1])
        y, perm = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int32)
        arrays = matrix(x), self.eps, matrix(y), matrix(perm)
        done = over_rows(lambda begin, end: self._forward(*arrays, begin, end), len(arrays[0]), x.numel())
        if not all(done):
            return None
        return y, (perm, y) if self.keeps_answer else (perm,)

    def _forward(self, x: np.ndarray, eps: np.ndarray, y: np.ndarray, perm: np.ndarray, begin: int, end: int) -> bool:
        """Fills rows begin..end; False where x is not finite there."""
        n = x.shape[1]
        step = min(max(WORK // n, 1), end - begin)
        keys, scratch = np.empty((step, n), np.uint64), np.empty(n, np.uint64)
        first, means = np.empty(n, np.int32), np.empty(n)
        rho = log_rho = means  # not used
        if not self.mean_rule:
            rho = np.arange(n, 0, -1, dtype=np.float64)
            rho = log_rho = np.log(rho, out=rho) if self.ranks else rho
        for at in range(begin, end, step):
            rows = slice(at, min(at + step, end))
            some = keys[: rows.stop - at]
            if not sorted_keys(x[rows], self.flip, some, scratch):
                return False
            _forward(
                x[rows], some, eps[rows], self.inputs, self.reverse, self.sign, self.ranks, self.mean_rule,
                self.descending, y[rows], perm[rows], scratch.view(np.float64), first, means, rho, log_rho,
            )  # fmt: skip
        return True

    def backward(self, x: Tensor, state: tuple[Tensor, ...], g: Tensor) -> Tensor:
        out = torch.empty_like(x)
        perm, y = state[0], state[-1] if len(state) > 1 else g
        arrays = [*(matrix(v) for v in (x, y, g, perm, out)), self.eps]

        def task(begin: int, end: int) -> None:
            rows = slice(begin, end)
            xs, ys, gs, perms, outs, eps = (a[rows] for a in arrays)
            flags = self.sign, self.ranks, self.mean_rule, self.descending
            _backward(xs, ys, gs, eps, perms, *flags, outs, np.empty(x.shape[-1]))

        over_rows(task, len(arrays[0]), x.numel())
        return out
