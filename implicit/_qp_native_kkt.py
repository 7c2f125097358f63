"""A batch of QPs and their derivatives by compiled code: the contracts of ``_qp_solve.finish`` and ``_qp_kkt.adjoint``.

Rows of U = L' and of Y' are what is read, so that every inner loop runs along memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._qp_native import backward, forward, jit, solve_dual
from ._qp_status import INACCURATE, INDEFINITE, NOT_FINITE, SOLVED, Options


@jit
def _lower(U, v):  # type: ignore[no-untyped-def]
    """v <- U'^-1 v"""
    n = len(v)
    for j in range(n):
        v[j] /= U[j, j]
        for i in range(j + 1, n):
            v[i] -= U[j, i] * v[j]


@jit
def _upper(U, v):  # type: ignore[no-untyped-def]
    """v <- U^-1 v"""
    n = len(v)
    for i in range(n - 1, -1, -1):
        total = v[i]
        for j in range(i + 1, n):
            total -= U[i, j] * v[j]
        v[i] = total / U[i, i]


@jit
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@jit
def _add(out, f, a):  # type: ignore[no-untyped-def]
    for i in range(len(a)):
        out[i] += f * a[i]


@jit
def _factor(S, order, q, L):  # type: ignore[no-untyped-def]
    """The Cholesky factor of S on the rows ``order[:q]``."""
    for i in range(q):
        for j in range(i + 1):
            total = S[order[i], order[j]]
            for t in range(j):
                total -= L[i, t] * L[j, t]
            L[i, j] = np.sqrt(total) if i == j else total / L[j, j]


@jit
def _kkt(U, Y, S, order, q, L, gx, gl, p, w, v):  # type: ignore[no-untyped-def]
    """p and w with H p + M_A' w = gx, M_A p = gl: w in the active rows ``order[:q]``, whose S has the factor L."""
    for i in range(len(p)):
        p[i] = gx[i]
    _lower(U, p)
    for i in range(q):
        v[i] = _dot(Y[order[i]], p) - gl[order[i]]
    forward(L, q, v)
    backward(L, q, v)
    for i in range(q):
        w[order[i]] = v[i]
        _add(p, -v[i], Y[order[i]])
    _upper(U, p)


@jit
def _residual(Q, c, M, t, noise, free, x, lam, active, gx, gl, w):  # type: ignore[no-untyped-def]
    """(residual, margin) of the optimality conditions; gx, gl get what is missing in them."""
    n, k = len(x), len(t)
    length = np.sqrt(_dot(x, x))
    off, margin = 0.0, np.inf
    for i in range(n):
        gx[i] = 0.0
        w[i] = abs(c[i])
    for i in range(n):
        gx[i] += 0.5 * _dot(Q[i], x)
        _add(gx, 0.5 * x[i], Q[i])
    for i in range(n):
        w[i] += abs(gx[i])
        gx[i] = -gx[i] - c[i]
    for j in range(k):
        row = M[j]
        slack = t[j] - _dot(row, x)
        gl[j] = slack
        gap = abs(slack) if j < free or active[j] else max(-slack, 0.0)
        if not gap <= 0.0:
            scale = noise[j] + length * np.sqrt(_dot(row, row))
            gap = gap / scale if scale > 0.0 else gap
            if gap > off or np.isnan(gap):
                off = gap
        if j >= free:
            margin = min(margin, lam[j] if active[j] else abs(slack))
        if active[j]:
            f = lam[j]
            for i in range(n):
                gx[i] -= f * row[i]
                w[i] += abs(f * row[i])
    size, worst = 0.0, 0.0
    for i in range(n):
        size = max(size, w[i])
        if abs(gx[i]) > worst or np.isnan(gx[i]):
            worst = abs(gx[i])
    worst = worst / size if size > 0.0 else worst
    return (worst if worst > off or np.isnan(worst) else off), margin


@jit
def _solve(  # type: ignore[no-untyped-def]
    Q,
    c,
    M,
    t,
    U,
    flaw,
    Y,
    S,
    free,
    max_iter,
    dependent,
    tol,
    x,
    lam,
    active,
    ray,
    residual,
    margins,
    status,
    iterations,
    converged,
):
    k, n = M.shape[1], M.shape[2]
    limit = min(n, k) + 1
    L, order, v = np.empty((limit, limit)), np.empty(limit, np.int64), np.empty(limit)
    r, noise, w, gl = np.empty(k), np.empty(k), np.empty(max(n, k)), np.empty(k)
    u, gx, dx, dl = np.empty(n), np.empty(n), np.empty(n), np.empty(k)
    failed = 0
    for row in range(len(c)):
        Qi, Mi = Q[row if len(Q) > 1 else 0], M[row if len(M) > 1 else 0]
        shared = row if len(U) > 1 else 0
        Ui, Yi, Si = U[shared], Y[row if len(Y) > 1 else 0], S[row if len(S) > 1 else 0]
        xi, li = x[row], lam[row]
        poor = flaw[shared] > 0
        for i in range(n):
            u[i] = c[row, i]
            poor = poor or not Ui[i, i] * Ui[i, i] > 8 * n * 2.0**-52 * abs(Qi[i, i])
        bad = False
        for j in range(k):
            bad = bad or not np.isfinite(Si[j, j]) or not t[row, j] > -np.inf
        for i in range(n):
            bad = bad or not np.isfinite(u[i])
        if poor or bad:
            status[row], iterations[row], converged[row] = INDEFINITE if poor else NOT_FINITE, 0, False
            residual[row], margins[row] = np.nan, np.nan
            xi[:] = np.nan
            failed += 1
            continue
        _lower(Ui, u)
        length = np.sqrt(_dot(u, u))
        for j in range(k):
            r[j] = -_dot(Yi[j], u) - t[row, j]
            noise[j] = abs(t[row, j]) + np.sqrt(Si[j, j]) * length
        state, count = solve_dual(
            Si, r, noise, free, max_iter, dependent, 10 * tol, li, active[row], ray[row], L, order, v, w
        )
        for i in range(n):
            xi[i] = -u[i]
        q = 0
        for j in range(k):
            if active[row, j]:
                order[q] = j
                q += 1
                _add(xi, -li[j], Yi[j])
        _upper(Ui, xi)
        off, margin = _residual(Qi, c[row], Mi, t[row], noise, free, xi, li, active[row], gx, gl, w)
        if state == SOLVED:
            for attempt in range(3):
                if off <= 1e-14:
                    break
                if attempt == 0:
                    _factor(Si, order, q, L)
                _kkt(Ui, Yi, Si, order, q, L, gx, gl, dx, dl, v)
                for i in range(n):
                    u[i] = xi[i]
                    xi[i] += dx[i]
                for j in range(q):
                    r[order[j]] = li[order[j]]
                    li[order[j]] += dl[order[j]]
                new, spread = _residual(Qi, c[row], Mi, t[row], noise, free, xi, li, active[row], gx, gl, w)
                if not new < off:
                    for i in range(n):
                        xi[i] = u[i]
                    for j in range(q):
                        li[order[j]] = r[order[j]]
                    break
                off, margin = new, spread
            if not off <= tol:
                state = INACCURATE
        fine = state == SOLVED
        failed += not fine
        status[row], iterations[row], converged[row] = state, count, fine
        residual[row], margins[row] = off, margin
    return failed


def finish(
    Q: Tensor,
    c: Tensor,
    M: Tensor,
    t: Tensor,
    L: Tensor,
    flaw: Tensor,
    Y: Tensor,
    S: Tensor,
    options: Options,
) -> tuple[tuple[Tensor, ...], int]:
    """((x, lam, active, ray, residual, margin, status, iterations, converged), how many failed)."""
    (rows, n), k = c.shape, t.shape[-1]
    x, lam, ray, residual = np.empty((rows, n)), np.zeros((rows, k)), np.zeros((rows, k)), np.empty(rows)
    margin, status, iterations = np.empty(rows), np.empty(rows, np.int64), np.empty(rows, np.int64)
    out = (x, lam, np.zeros((rows, k), np.bool_), ray, residual, margin, status, iterations, np.empty(rows, np.bool_))
    failed = _solve(
        *[v.contiguous().numpy() for v in (Q, c, M, t, L.mT, flaw, Y.mT, S)],
        options.free,
        options.max_iter,
        options.span,
        options.tol,
        *out,
    )
    return tuple([torch.from_numpy(v) for v in out]), failed


@jit
def _outer(out, f, a, x, b, y):  # type: ignore[no-untyped-def]
    """out <- f (a x' + b y')"""
    for i in range(len(a)):
        row, fa, fb = out[i], f * a[i], f * b[i]
        if fa == 0.0 and fb == 0.0:
            row[:] = 0.0
        else:
            for j in range(len(x)):
                row[j] = fa * x[j] + fb * y[j]


@jit
def _adjoint(U, Y, S, active, x, lam, gx, gl, p, w, dQ, dM):  # type: ignore[no-untyped-def]
    n, k = x.shape[1], lam.shape[1]
    limit = min(n, k) + 1
    L, order, v = np.empty((limit, limit)), np.empty(limit, np.int64), np.empty(limit)
    for row in range(len(x)):
        Ui, Yi, Si = U[row if len(U) > 1 else 0], Y[row if len(Y) > 1 else 0], S[row if len(S) > 1 else 0]
        q = 0
        for j in range(k):
            w[row, j] = 0.0
            if active[row, j] and q < limit:
                order[q] = j
                q += 1
        _factor(Si, order, q, L)
        _kkt(Ui, Yi, Si, order, q, L, gx[row], gl[row if len(gl) > 1 else 0], p[row], w[row], v)
        if len(dM):
            _outer(dM[row], -1.0, w[row], x[row], lam[row], p[row])
        if len(dQ):
            _outer(dQ[row], -0.5, p[row], x[row], x[row], p[row])


def adjoint(
    L: Tensor, Y: Tensor, S: Tensor, active: Tensor, x: Tensor, lam: Tensor, gx: Tensor, gl: Tensor, full: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, Q-bar, M-bar): the last two of every problem where ``full`` says so, else empty."""
    (rows, n), k = x.shape, lam.shape[-1]
    dQ, dM = np.empty((rows if full[0] else 0, n, n)), np.empty((rows if full[1] else 0, k, n))
    out = (np.empty((rows, n)), np.empty((rows, k)), dQ, dM)
    _adjoint(*[v.contiguous().numpy() for v in (L.mT, Y.mT, S, active, x, lam, gx, gl)], *out)
    return tuple([torch.from_numpy(v) for v in out])  # type: ignore[return-value]
