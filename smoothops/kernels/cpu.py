"""Compiled CPU kernels (numba), same contract as ``kernels.torch``. Imported, and compiled, at their first use only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .torch import MEAN


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Compile without the GIL; keep the machine code on disk where some cache folder is writable."""
    if function is None:
        return lambda f: jit(f, **options)
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


@jit
def _pool_mean(theta, w, weights, group, eps, start):  # type: ignore[no-untyped-def]
    rows, n = theta.shape
    first = np.empty(n, np.int64)
    sa, sb, m = np.empty(n), np.empty(n), np.empty(n)
    for r in range(rows):
        e = eps[r]
        top = -1
        for j in range(n):
            # the open block [first, ...] with its sums of weight * (theta - a), weight * (w - b), weight
            f, xa, xb, xm = j, 0.0, 0.0, weights[r, j]
            g = group[r, j]
            while top >= 0:
                i = first[top]
                if group[r, i] != g:
                    break
                da, db = theta[r, i] - theta[r, f], w[r, i] - w[r, f]
                lhs = da + (sa[top] / m[top] - xa / xm)
                if not lhs < e * (db + (sb[top] / m[top] - xb / xm)):
                    break
                xa = sa[top] + (xa - xm * da)
                xb = sb[top] + (xb - xm * db)
                xm += m[top]
                f = i
                top -= 1
            top += 1
            first[top], sa[top], sb[top], m[top] = f, xa, xb, xm
        end = n
        for t in range(top, -1, -1):
            for j in range(first[t], end):
                start[r, j] = first[t]
            end = first[t]


@jit
def _pool_logsumexp(theta, w, weights, group, eps, start):  # type: ignore[no-untyped-def]
    rows, n = theta.shape
    first = np.empty(n, np.int64)
    sa, sb = np.empty(n), np.empty(n)
    for r in range(rows):
        e = eps[r]
        top = -1
        for j in range(n):
            # the open block with its sums of exp((theta - a)/eps) and exp(w - b), both >= 1
            f, xa, xb = j, 1.0, 1.0
            g = group[r, j]
            while top >= 0:
                i = first[top]
                if group[r, i] != g:
                    break
                da, db = theta[r, i] - theta[r, f], w[r, i] - w[r, f]
                if not da / e + math.log(sa[top] / xa) < db + math.log(sb[top] / xb):
                    break
                xa = sa[top] + xa * math.exp(-da / e)
                xb = sb[top] + xb * math.exp(-db)
                f = i
                top -= 1
            top += 1
            first[top], sa[top], sb[top] = f, xa, xb
        end = n
        for t in range(top, -1, -1):
            for j in range(first[t], end):
                start[r, j] = first[t]
            end = first[t]


def pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    """See ``kernels.torch.pool``; sequential, O(n) a row."""
    rows, n = theta.shape
    start = torch.empty(rows, n, dtype=torch.long)
    kernel = _pool_mean if rule == MEAN else _pool_logsumexp
    arrays = [np.ascontiguousarray(v.numpy()) for v in (theta, w, weights, group)]
    kernel(*arrays, eps.expand(rows, 1).reshape(rows).contiguous().numpy(), start.numpy())
    return start
