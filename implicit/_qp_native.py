"""The dual of one QP by compiled code (numba, imported at its first use): Goldfarb and Idnani's method, 1983."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from ._qp_status import INFEASIBLE, SOLVED, STOPPED

# sums in any order, so that they are done in vector registers; infinities and NaN keep their meaning
SUMS = {"reassoc", "nsz", "contract"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL; keep the machine code on disk where some cache folder is writable."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": SUMS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(**options)(function)


@jit
def forward(L, q, v):  # type: ignore[no-untyped-def]
    """v <- L^-1 v in place, for the leading q unknowns."""
    for i in range(q):
        total = v[i]
        for j in range(i):
            total -= L[i, j] * v[j]
        v[i] = total / L[i, i]


@jit
def backward(L, q, v):  # type: ignore[no-untyped-def]
    """v <- L^-T v in place."""
    for i in range(q - 1, -1, -1):
        v[i] /= L[i, i]
        for j in range(i):
            v[j] -= L[i, j] * v[i]


@jit
def _remove(L, q, j):  # type: ignore[no-untyped-def]
    """L of the matrix without row and column j: the rows below move up, and rotations make them triangular again."""
    for i in range(j, q - 1):
        for t in range(i + 2):
            L[i, t] = L[i + 1, t]
    for i in range(j, q - 1):
        a, b = L[i, i], L[i, i + 1]
        h = np.sqrt(a * a + b * b)
        cos, sin = a / h, b / h
        for t in range(i, q - 1):
            a, b = L[t, i], L[t, i + 1]
            L[t, i] = cos * a + sin * b
            L[t, i + 1] = cos * b - sin * a


@jit
def _extend(S, L, q, order, row, v):  # type: ignore[no-untyped-def]
    """v = L^-1 S[order, row]; the squared distance of ``row`` from the span of the active rows."""
    total = S[row, row]
    for i in range(q):
        v[i] = S[row, order[i]]
    forward(L, q, v)
    for i in range(q):
        total -= v[i] * v[i]
    return total


@jit
def _slack(S, r, lam, order, q, w):  # type: ignore[no-untyped-def]
    """w = S lam - r; returns lam' S lam, from the active rows."""
    for j in range(len(r)):
        w[j] = -r[j]
    for i in range(q):
        a = order[i]
        f = lam[a]
        for j in range(len(r)):
            w[j] += f * S[a, j]
    total = 0.0
    for i in range(q):
        total += lam[order[i]] * r[order[i]]
    return max(total, 0.0)


@jit
def _solve_active(S, L, q, order, right, v):  # type: ignore[no-untyped-def]
    for i in range(q):
        v[i] = right[order[i]]
    forward(L, q, v)
    backward(L, q, v)


@jit
def solve_dual(S, r, noise, free, max_iter, dependent, tol, lam, active, ray, L, order, v, w):  # type: ignore[no-untyped-def]
    """See ``_qp_dual``; writes lam, active and ray, returns (status, iterations). L, order, v, w are work space."""
    k = len(r)
    eps = 2.0**-52
    q = 0
    for row in range(free):
        gap = _extend(S, L, q, order, row, v)
        if q < len(L) - 1 and gap > dependent * S[row, row]:
            for i in range(q):
                L[q, i] = v[i]
            L[q, q] = np.sqrt(gap)
            order[q] = row
            q += 1
    fixed = q
    _solve_active(S, L, q, order, r, v)
    for i in range(q):
        lam[order[i]] = v[i]
    size = np.sqrt(_slack(S, r, lam, order, q, w))
    for row in range(free):
        if abs(w[row]) > tol * (noise[row] + np.sqrt(S[row, row]) * size):
            _extend(S, L, q, order, row, v)
            backward(L, q, v)
            sign = -1.0 if w[row] > 0 else 1.0
            ray[row] = sign
            for i in range(q):
                ray[order[i]] = -sign * v[i]
            return INFEASIBLE, 0
    for i in range(q):
        active[order[i]] = True
    iterations = 0
    while True:
        best, row = 0.0, -1
        for j in range(free, k):
            if not active[j] and w[j] < 0.0:
                root = np.sqrt(S[j, j])
                if w[j] < -1e3 * eps * (noise[j] + root * size):
                    worth = w[j] / root if root > 0.0 else -np.inf
                    if worth < best:
                        best, row = worth, j
        if row < 0:
            break
        slack = w[row]
        while True:
            iterations += 1
            if iterations > max_iter:
                return STOPPED, max_iter
            gap = _extend(S, L, q, order, row, v)
            flat = q == len(L) - 1 or not gap > dependent * S[row, row]
            if not flat:
                for i in range(q):
                    L[q, i] = v[i]
            backward(L, q, v)
            step, block = np.inf, -1
            least = 10 * dependent * np.sqrt(S[row, row]) if flat else 0.0
            for i in range(fixed, q):
                if v[i] * np.sqrt(S[order[i], order[i]]) > least and lam[order[i]] < step * v[i]:
                    step, block = lam[order[i]] / v[i], i
            if flat and block < 0:
                if slack >= -tol * (noise[row] + np.sqrt(S[row, row]) * size):
                    # as good as satisfied by the others
                    lam[row] = 0.0
                    active[row] = True
                    break
                ray[row] = 1.0
                for i in range(q):
                    ray[order[i]] = -v[i]
                return INFEASIBLE, iterations
            if not flat and -slack <= step * gap:
                step, block = -slack / gap, -1
            lam[row] += step
            for i in range(q):
                lam[order[i]] -= step * v[i]
            if block < 0:
                L[q, q] = np.sqrt(gap)
                order[q] = row
                active[row] = True
                q += 1
                break
            slack += step * max(gap, 0.0)
            gone = order[block]
            lam[gone] = 0.0
            active[gone] = False
            _remove(L, q, block)
            for i in range(block, q - 1):
                order[i] = order[i + 1]
            q -= 1
        size = np.sqrt(_slack(S, r, lam, order, q, w))
    # the multipliers once more from the final factor, with one step of refinement; those that are zero leave
    _solve_active(S, L, q, order, r, v)
    for j in range(k):
        lam[j] = 0.0
        active[j] = False
    for i in range(q):
        lam[order[i]] = v[i]
    size = np.sqrt(_slack(S, r, lam, order, q, w))
    _solve_active(S, L, q, order, w, v)
    for i in range(q):
        j = order[i]
        lam[j] -= v[i]
        root = np.sqrt(S[j, j])
        active[j] = i < fixed or lam[j] * S[j, j] > 1e3 * eps * (noise[j] + root * size)
        if not active[j]:
            lam[j] = 0.0
    return SOLVED, iterations
