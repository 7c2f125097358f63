"""Entropic transport of one matrix after the other (numba): sweeps, and the adjoint of the plan.

A matrix is read once a sweep: the product of a row with the scaling of the columns gives that of the row, which at once
adds to the sums of the columns.
What takes long or is out of the ordinary is left to ``polytopes._sinkhorn``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_coupling import EPSILON, TINY, VECTORS, algebra_room, column_sums, linear, through
from .cpu_math import exp
from .threads import over_rows

SAME = 1 + 1e-9  # parts that hardly meet: Newton's steps must move them far before the error shows it
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
def _finish(k, a, b, mass, t, top, u, v):  # type: ignore[no-untyped-def]
    """K becomes the plan, of exact rows, and the potentials take in the scalings."""
    n, m = k.shape
    for i in range(n):
        row = k[i]
        total = 0.0
        for j in range(m):
            total += row[j] * t[j]
        u[i] = top[i] + (math.log(total) if total > 0 else 0.0)
        s = mass * a[i] / max(total, TINY)
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
def _newton(k, a, b, t, inexact, most, trust, v, kept, work):  # type: ignore[no-untyped-def]
    """A Newton step from ``kept`` to v; False where its linear system takes more than ``most`` products."""
    columns, r, q, u, algebra = work
    _finish(k, a, b, 1.0, t, u, u, v)
    kept[:] = v
    column_sums(k, columns)
    r[:] = columns - b
    if not linear(k, a, b, columns, r, inexact, most, q, algebra):
        return False
    length = trust / max(np.abs(q).max(), trust)
    for j in range(b.shape[0]):
        v[j] += length * q[j]
        t[j] = b[j]
    return True


@jit
def _one(x, eps, a, b, mass, sigma, bound, max_iter, rules, y, u, v, work):  # type: ignore[no-untyped-def]
    """The plan in y and the potentials of one matrix: (error, steps, temperature reached, whether it is finished)."""
    factor, coarse, near, patience, drift, inexact, most, trust = rules
    top, t, sums, kept, algebra = work
    t[:] = b
    steps, error, last = 0, math.inf, math.inf
    fresh, newton = True, False  # whether K is to be made anew, and whether sweeps are slow
    while steps < max_iter:
        if fresh:
            _start(x, a, b, 1 / (eps * sigma), v, t, y, top, sums)
        else:
            through(y, t, a, True, sums)
        fresh = False
        steps += 1
        before, error = error, _distance(b, t, sums)
        if newton and not error < before * SAME:
            v[:], t[:] = kept, b
            error, last, fresh, newton = before, math.inf, True, False
            continue
        low, high = math.inf, 0.0
        for j in range(b.shape[0]):
            if b[j] > 0:
                t[j] = b[j] / max(sums[j], TINY)
                low, high = min(low, t[j] / b[j]), max(high, t[j] / b[j])
        target = coarse if sigma > 1 else bound
        if error < target:
            if sigma == 1:
                break
            cooler = max(sigma / factor, 1.0)
            _absorb(b, t, v, sigma / cooler)
            sigma, error, last, fresh, newton = cooler, math.inf, math.inf, True, False
            continue
        if not (low > 1 / drift and high < drift):
            _absorb(b, t, v, 1.0)
            fresh = True
        if steps % LOOK == 0:
            if error < near:
                rate = math.log(error / last) / LOOK
                newton = newton or math.log(target / error) / min(rate, -1e-9) > patience
            last = error
        if newton:
            if fresh:
                _start(x, a, b, 1 / (eps * sigma), v, t, y, top, sums)
            if not _newton(y, a, b, t, inexact, most, trust, v, kept, algebra):
                return error, steps, sigma, False
            fresh = True
    if fresh or sigma > 1:  # out of steps: the plan of these potentials
        _absorb(b, t, v, sigma)
        _start(x, a, b, 1 / eps, v, t, y, top, sums)
        error = _distance(b, t, sums)
    _finish(y, a, b, mass, t, top, u, v)
    return error, steps, sigma, True


@jit
def _solve(x, eps, a, b, mass, tol, max_iter, anneal, span_at, unresolved, direct, rules, found):  # type: ignore[no-untyped-def]
    y, u, v, error, bound, sigma, steps, done = found
    n, m = x.shape[1:]
    newton = np.empty(m), np.empty(m), np.empty(m), np.zeros(n), algebra_room(m, direct)
    work = np.empty(n), np.empty(m), np.empty(m), np.empty(m), newton
    for r in range(x.shape[0]):
        v[r] = 0.0
        span = _span(x[r], a[r], b[r], 1 / eps[r])
        if not anneal:
            span = min(span, span_at)
        rounding = EPSILON * (1 + span)
        bound[r] = max(tol, 2 * rounding)
        if 0 < rounding < unresolved:
            error[r], steps[r], sigma[r], done[r] = _one(
                x[r], eps[r], a[r], b[r], mass[r], max(span / span_at, 1.0), bound[r], max_iter, rules,
                y[r], u[r], v[r], work,
            )  # fmt: skip
        else:  # too wide, or no pair that counts
            error[r], steps[r], sigma[r], done[r] = math.inf, 0, 0.0, False


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
    x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, tol: float, max_iter: int, anneal: bool,
    span: float, unresolved: float, direct: int, rules: tuple[float, ...],
) -> Solution:  # fmt: skip
    """For theta (rows, n, m), eps and mass (rows, 1, 1), a (rows, n, 1) and b (rows, 1, m)."""
    rows, n, m = x.shape
    y, u, v = (torch.empty(rows, *s, dtype=x.dtype) for s in ((n, m), (n, 1), (1, m)))
    error, bound, sigma, steps = torch.empty(4, rows, dtype=x.dtype).unbind()
    done = torch.empty(rows, dtype=torch.bool)
    shaped = (x, (n, m)), (eps, ()), (a, (n,)), (b, (m,)), (mass, ())
    given = [p.reshape(rows, *shape).contiguous().numpy() for p, shape in shaped]
    out = [p.numpy() for p in (y, u.squeeze(-1), v.squeeze(-2), error, bound, sigma, steps, done)]

    def task(begin: int, end: int) -> None:
        parts = slice(begin, end)
        x, eps, a, b, mass = (p[parts] for p in given)
        found = tuple(p[parts] for p in out)
        _solve(x, eps, a, b, mass, tol, max_iter, anneal, span, unresolved, direct, rules, found)

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
def _adjoints(y, g, eps, a, b, goal, most, direct, out, p, q, done):  # type: ignore[no-untyped-def]
    n, m = y.shape[1:]
    r, c, columns, algebra = np.empty(n), np.empty(m), np.empty(m), algebra_room(m, direct)
    for k in range(y.shape[0]):
        _right_side(y[k], g[k], a[k], r, c, columns)
        done[k] = linear(y[k], a[k], b[k], columns, c, goal, most, q[k], algebra)
        if done[k]:
            _gradient(y[k], g[k], a[k], eps[k], r, p[k], q[k], out[k])


def adjoint(
    y: Tensor, g: Tensor, eps: Tensor, a: Tensor, b: Tensor, goal: float, most: int, direct: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient in theta for the cotangent g of y = P, p (rows, n, 1) and q (rows, 1, m); where they were found.

    eps (rows, 1, 1); a (rows, n, 1) and b (rows, 1, m), the sums of y. See :func:`linear`.
    """
    rows, n, m = y.shape
    p, q, out = (torch.empty(rows, *s, dtype=y.dtype) for s in ((n, 1), (1, m), (n, m)))
    done = torch.empty(rows, dtype=torch.bool)
    given = [t.contiguous().numpy() for t in (y, g, eps.reshape(rows), a.reshape(rows, n), b.reshape(rows, m))]
    found = [t.numpy() for t in (out, p.squeeze(-1), q.squeeze(-2), done)]

    def task(begin: int, end: int) -> None:
        i = slice(begin, end)
        _adjoints(*(t[i] for t in given), goal, most, direct, *(t[i] for t in found))

    over_rows(task, rows, 20 * y.numel())
    return out, p, q, done
