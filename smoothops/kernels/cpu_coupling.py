"""Linear algebra of one transport plan after the other (numba): products that read it once, and its linear system.

Sums are reassociated, so that they run in vectors; infinities keep their meaning.
"""

from __future__ import annotations

import math

import numpy as np

from .cpu import jit

VECTORS = {"reassoc", "contract"}
TINY, EPSILON = np.finfo(np.float64).tiny, np.finfo(np.float64).eps


@jit(inline="always")
def _weight(total, a, scaling):  # type: ignore[no-untyped-def]
    if scaling:
        return a / max(total, TINY)
    return total / a if a > 0 else 0.0


@jit(fastmath=VECTORS)
def through(k, p, a, scaling, out):  # type: ignore[no-untyped-def]
    """K' w for w = a / K p with ``scaling``, a sweep, else w = K p / a; four rows at a time, each read once."""
    n, m = k.shape
    out[:] = 0.0
    for i in range(0, n - 3, 4):
        k0, k1, k2, k3 = k[i], k[i + 1], k[i + 2], k[i + 3]
        w0, w1, w2, w3 = 0.0, 0.0, 0.0, 0.0
        for j in range(m):
            w0 += k0[j] * p[j]
            w1 += k1[j] * p[j]
            w2 += k2[j] * p[j]
            w3 += k3[j] * p[j]
        w0, w1 = _weight(w0, a[i], scaling), _weight(w1, a[i + 1], scaling)
        w2, w3 = _weight(w2, a[i + 2], scaling), _weight(w3, a[i + 3], scaling)
        for j in range(m):
            out[j] += (w0 * k0[j] + w1 * k1[j]) + (w2 * k2[j] + w3 * k3[j])
    for i in range(n - n % 4, n):
        row = k[i]
        w0 = 0.0
        for j in range(m):
            w0 += row[j] * p[j]
        w0 = _weight(w0, a[i], scaling)
        for j in range(m):
            out[j] += w0 * row[j]


@jit(fastmath=VECTORS)
def column_sums(k, sums):  # type: ignore[no-untyped-def]
    sums[:] = 0.0
    for i in range(k.shape[0]):
        row = k[i]
        for j in range(k.shape[1]):
            sums[j] += row[j]


@jit(fastmath=VECTORS)
def _image(y, a, columns, p, out):  # type: ignore[no-untyped-def]
    """(diag(columns) - P' diag(1/a) P) p"""
    through(y, p, a, False, out)
    for j in range(y.shape[1]):
        out[j] = columns[j] * p[j] - out[j]


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
def _factor(y, a, b, columns, s):  # type: ignore[no-untyped-def]
    """The Cholesky factor of diag(columns) - P' diag(1/a) P, scaled by 1/sqrt(b), with 1 for its eigenvalue 0."""
    n, m = y.shape
    ridge, mass = 8 * m * EPSILON, b.sum()
    s[:] = 0.0
    for i in range(n):
        row = y[i]
        for j in range(m):
            w = row[j] / a[i] if a[i] > 0 else 0.0
            if w != 0:
                lower = s[j]
                for k in range(j + 1):
                    lower[k] -= w * row[k]
    for j in range(m):
        for k in range(j + 1):
            root = math.sqrt(b[j] * b[k])
            s[j, k] = s[j, k] / root + root / mass if root > 0 else 0.0
        s[j, j] = s[j, j] + columns[j] / b[j] + ridge if b[j] > 0 else 1.0
    for j in range(m):
        for k in range(j + 1):
            lower, upper, total = s[j], s[k], 0.0
            for i in range(k):
                total += lower[i] * upper[i]
            rest = s[j, k] - total
            s[j, k] = rest / s[k, k] if k < j else math.sqrt(max(rest, ridge))


@jit(fastmath=VECTORS)
def _refine(s, b, r, q, x):  # type: ignore[no-untyped-def]
    """q takes in the solution for the residual r."""
    m = s.shape[0]
    for j in range(m):
        row, total = s[j], 0.0
        for i in range(j):
            total += row[i] * x[i]
        x[j] = ((r[j] / math.sqrt(b[j]) if b[j] > 0 else 0.0) - total) / s[j, j]
    for j in range(m - 1, -1, -1):
        row = s[j]
        x[j] /= s[j, j]
        for i in range(j):
            x[i] -= row[i] * x[j]
    for j in range(m):
        q[j] += x[j] / math.sqrt(b[j]) if b[j] > 0 else 0.0


@jit
def linear(y, a, b, columns, r, goal, most, q, algebra):  # type: ignore[no-untyped-def]
    """q with (diag(columns) - P' diag(1/a) P) q = r, to a residual of ``goal``, relative; False where it costs much."""
    p, image, rest, s = algebra
    rest[:] = r
    if _conjugate_gradients(y, a, columns, rest, goal, most, q, p, image):
        return True
    if not s.shape[0]:
        return False
    _factor(y, a, b, columns, s)
    q[:] = 0.0
    rest[:] = r
    for _ in range(3):
        _refine(s, b, rest, q, p)
        _image(y, a, columns, q, image)
        rest[:] = r - image
    return True


@jit
def algebra_room(m, direct):  # type: ignore[no-untyped-def]
    """Room for :func:`linear`, which factors matrices up to the size ``direct``."""
    size = m if m <= direct else 0
    return np.empty(m), np.empty(m), np.empty(m), np.empty((size, size))
