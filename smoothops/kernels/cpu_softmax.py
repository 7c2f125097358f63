"""The soft choice of one item by Entropy on the CPU (numba): its threshold is a logarithm of a sum."""

from __future__ import annotations

import math

import numpy as np

from .cpu import jit
from .cpu_threshold import CHUNK, ENTROPY, FUSED, SUMS, _point

SOLVED, NONE, ALL = range(3)  # what a row is: has a threshold, or all of its items have weight 0, or 1


@jit
def largest_entry(x):  # type: ignore[no-untyped-def]
    """The largest entry; nan is passed over. Four at a time, which do not wait for each other."""
    n = x.shape[0]
    a = b = c = d = -math.inf
    for i in range(0, n - 3, 4):
        a, b = x[i] if x[i] > a else a, x[i + 1] if x[i + 1] > b else b
        c, d = x[i + 2] if x[i + 2] > c else c, x[i + 3] if x[i + 3] > d else d
    for i in range(n - n % 4, n):
        a = x[i] if x[i] > a else a
    return max(max(a, b), max(c, d))


@jit(fastmath=FUSED)
def _exponentials(x, ref, eps, y):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        y[i] = _point(ENTROPY, (x[i] - ref) / eps, 1.0, math.inf)[0]


@jit(fastmath=SUMS)
def _sum(v):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(v.shape[0]):
        total += v[i]
    return total


@jit(fastmath=FUSED)
def _scaled(v, factor, y):  # type: ignore[no-untyped-def]
    for i in range(v.shape[0]):
        y[i] = v[i] * factor


@jit
def softmax_row(x, eps, v, y):  # type: ignore[no-untyped-def]
    """(kind, ref, tau) and the answer y; kind -1 where a row holds nan or inf."""
    n, ref, total = x.shape[0], np.float64(largest_entry(x)), 0.0
    if ref == -math.inf:
        for i in range(n):
            if x[i] != x[i]:
                return -1, 0.0, 0.0
        y[:] = 0.0
        return NONE, 0.0, 0.0
    if ref == math.inf:
        return -1, 0.0, 0.0
    _exponentials(x, ref, eps, v)
    for begin in range(0, n, CHUNK):
        total += _sum(v[begin : min(begin + CHUNK, n)])
    if total != total:
        return -1, 0.0, 0.0
    _scaled(v, 1 / total, y)
    return SOLVED, ref, math.log(total)
