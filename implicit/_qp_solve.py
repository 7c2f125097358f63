"""Numbers for a batch of dense QPs: solution, multipliers, active rows and how each problem ended.

    minimize x'Qx/2 + c'x  subject to  M x = t in the first ``free`` rows, M x <= t in the others.

With Q = LL', Y = L^-1 M', u = L^-1 c the multipliers solve the dual of ``_qp_dual`` with S = Y'Y and r = -Y'u - t, and
x = -L'^-1 (u + Y lam). The active rows alone decide: what is returned solves their linear system to rounding.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from ._qp_dual import solve_dual
from ._qp_status import DEPENDENT, INACCURATE, INDEFINITE, SOLVED


@dataclass(eq=False)
class Numbers:
    """What is known of each problem: every tensor has ``rows`` first, L and Y have 1 where all problems share them."""

    x: Tensor
    lam: Tensor
    active: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    margin: Tensor
    ray: Tensor
    L: Tensor
    Y: Tensor
    S: Tensor


def has_native(device: torch.device) -> bool:
    return device.type == "cpu" and importlib.util.find_spec("numba") is not None


def apply(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def lower_solve(L: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, v.unsqueeze(-1), upper=False).squeeze(-1)


def upper_solve(L: Tensor, v: Tensor) -> Tensor:
    """L'^-1 v"""
    return torch.linalg.solve_triangular(L.mT, v.unsqueeze(-1), upper=True).squeeze(-1)


def solve_numbers(
    Q: Tensor, c: Tensor, M: Tensor, t: Tensor, free: int, tol: float, max_iter: int, native: bool
) -> Numbers:
    """Q: (rows or 1, n, n), c: (rows, n), M: (rows or 1, k, n), t: (rows, k), in float64."""
    n, k = M.shape[-1], M.shape[-2]
    H = (Q + Q.mT) / 2
    L, flaw = torch.linalg.cholesky_ex(H)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    poor = (flaw > 0) | ~(pivots.square() > 8 * n * 2.0**-52 * H.diagonal(dim1=-2, dim2=-1).abs()).all(-1)
    Y = torch.linalg.solve_triangular(L, M.mT, upper=False)
    u = lower_solve(L, c)
    S = Y.mT @ Y
    inner = apply(Y.mT, u)
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    noise = t.abs() + S.diagonal(dim1=-2, dim2=-1).sqrt() * length
    lam, active, ray, status, iterations = solve_dual(
        S, -inner - t, noise, free, max_iter, 10 * tol, native, min(n, k) + 1
    )
    x = -upper_solve(L, u + apply(Y, lam))
    status = torch.where(poor, INDEFINITE, status)
    out = Numbers(x, lam, active, status, iterations, length, length, ray, L, Y, S)
    check(out, H, c, M, t, free, tol)
    return out


def check(out: Numbers, H: Tensor, c: Tensor, M: Tensor, t: Tensor, free: int, tol: float) -> None:
    """Fills in the residual of the optimality conditions, relative to their terms, and the margin."""
    Hx, Ml = apply(H, out.x), apply(M.mT, out.lam)
    stationary = (Hx + c + Ml).abs().amax(-1) if c.shape[-1] else c.sum(-1)
    size = (Hx.abs() + c.abs() + Ml.abs()).amax(-1) if c.shape[-1] else c.sum(-1)
    residual = torch.where(size > 0, stationary / size, stationary)
    margin = torch.full_like(residual, torch.inf)
    if M.shape[-2]:
        slack = t - apply(M, out.x)
        rows = torch.linalg.vector_norm(M, dim=-1) * torch.linalg.vector_norm(out.x, dim=-1, keepdim=True)
        scale = torch.where(t.isfinite(), t.abs(), 0) + rows
        off = torch.where(out.active, slack.abs(), (-slack).clamp(min=0))
        if free:
            off = torch.cat([slack[:, :free].abs(), off[:, free:]], -1)
        residual = torch.maximum(residual, torch.where(scale > 0, off / scale, off).amax(-1))
        if M.shape[-2] > free:
            margin = torch.where(out.active, out.lam, slack)[:, free:].abs().amin(-1)
    out.residual, out.margin = residual, margin
    fine = (out.status == SOLVED) | (out.status == DEPENDENT)
    out.status = torch.where(fine & ~(residual <= tol), INACCURATE, out.status)
