"""Numbers for a batch of dense QPs: solution, multipliers, active rows and how each problem ended.

    minimize x'Qx/2 + c'x  subject to  M x = t in the first ``free`` rows, M x <= t in the others.

With Q = LL', Y = L^-1 M', u = L^-1 c the multipliers solve the dual of ``_qp_dual`` with S = Y'Y and r = -Y'u - t, and
x = -L'^-1 (u + Y lam). The active rows alone decide: what is returned solves their linear system to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._qp_dual import Block, solve_dual
from ._qp_singular import solve_singular
from ._qp_status import INACCURATE, INDEFINITE, INFEASIBLE, NOT_FINITE, SOLVED, Options

# relative residual above which a solution is refined
FINE = 1e-14
OTHER_SPANS = 1e-10, 1e-14
FIELDS = ("x", "lam", "active", "ray", "residual", "margin", "status", "iterations", "converged")


@dataclass(eq=False)
class Numbers:
    """What is known of each problem: every tensor has ``rows`` first; L, Y, S have 1 where all problems share them."""

    x: Tensor
    lam: Tensor
    active: Tensor
    ray: Tensor
    residual: Tensor
    margin: Tensor
    status: Tensor
    iterations: Tensor
    converged: Tensor
    L: Tensor
    Y: Tensor
    S: Tensor
    failed: int
    singular: bool = False  # L is of no use in some of them

    def outcome(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in FIELDS)


@functools.cache
def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def native(device: torch.device) -> bool:
    """Whether the compiled path is taken, which needs the CPU."""
    return device.type == "cpu" and has_numba()


def apply(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def lower_solve(L: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, v.unsqueeze(-1), upper=False).squeeze(-1)


def upper_solve(L: Tensor, v: Tensor) -> Tensor:
    """L'^-1 v"""
    return torch.linalg.solve_triangular(L.mT, v.unsqueeze(-1), upper=True).squeeze(-1)


def solve_numbers(Q: Tensor, c: Tensor, M: Tensor, t: Tensor, options: Options) -> Numbers:
    """Q: (rows or 1, n, n), c: (rows, n), M: (rows or 1, k, n), t: (rows, k), in float64."""
    numbers = solve_strict(Q, c, M, t, options)
    if numbers.failed:
        explain(numbers, Q, c, M, t, options)
    return numbers


def solve_strict(Q: Tensor, c: Tensor, M: Tensor, t: Tensor, options: Options) -> Numbers:
    """Strictly convex problems; the others are INDEFINITE."""
    L, flaw = torch.linalg.cholesky_ex((Q + Q.mT).mul_(0.5))
    Y = torch.linalg.solve_triangular(L, M.mT, upper=False)
    S = Y.mT @ Y
    if native(Q.device):
        from . import _qp_native_kkt

        found, failed = _qp_native_kkt.finish(Q, c, M, t, L, flaw, Y, S, options)
    else:
        found, failed = finish(Q, c, M, t, L, flaw, Y, S, options)
    fields: dict[str, Any] = dict(zip(FIELDS, found, strict=True))
    return Numbers(**fields, L=L, Y=Y, S=S, failed=failed)


def explain(numbers: Numbers, Q: Tensor, c: Tensor, M: Tensor, t: Tensor, options: Options) -> None:
    """Solves what failed by other means where there are any, and tells bad data from other failures."""

    def rows_where(mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        rows = mask.nonzero().squeeze(-1)
        take = lambda v: v[rows] if len(v) > 1 else v.expand(len(rows), *v.shape[1:])  # noqa: E731
        return rows, (take(Q), take(c), take(M), take(t))

    def write(rows: Tensor, found: tuple[Tensor, ...]) -> None:
        for name, v in zip(FIELDS, found, strict=False):
            getattr(numbers, name)[rows] = v

    whole = lambda v: v.isfinite().reshape(len(v), -1).all(-1)  # noqa: E731
    finite = whole(Q) & whole(c) & whole(M) & ~(t.isnan() | (t == -torch.inf)).any(-1)
    singular = finite & (numbers.status == INDEFINITE)
    rows, part = rows_where(singular)
    if len(rows):
        write(rows, solve_singular(*part, options, lambda *args: solve_strict(*args).outcome(), check))
        numbers.singular = True
    # where nearly dependent rows were told from dependent ones wrongly, the other choice may do
    for span in OTHER_SPANS:
        rows, part = rows_where(finite & ~singular & doubtful(numbers, M, t))
        if len(rows):
            write(rows, solve_strict(*part, options._replace(span=span)).outcome())
    numbers.status = torch.where(doubtful(numbers, M, t), INACCURATE, numbers.status)
    numbers.status = torch.where(finite, numbers.status, NOT_FINITE)
    numbers.converged = numbers.status == SOLVED
    numbers.failed = int((~numbers.converged).sum())


def doubtful(numbers: Numbers, M: Tensor, t: Tensor) -> Tensor:
    """Which problems have inaccurate solutions, or are infeasible without proof."""
    ray = numbers.ray
    size = (ray.abs() * torch.linalg.vector_norm(M, dim=-1)).sum(-1)
    proof = (apply(M.mT, ray).abs() <= 1e-9 * size.unsqueeze(-1)).all(-1)
    proof = proof & (torch.where(ray == 0, 0, ray * t).sum(-1) < 0)
    return (numbers.status == INACCURATE) | ((numbers.status == INFEASIBLE) & ~proof)


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
    """The same as ``_qp_native_kkt.finish``, on any device."""
    n = c.shape[-1]
    size = Q.diagonal(dim1=-2, dim2=-1).abs()
    poor = (flaw > 0) | ~(L.diagonal(dim1=-2, dim2=-1).square() > 8 * n * 2.0**-52 * size).all(-1)
    u = lower_solve(L, c)
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    noise = t.abs() + S.diagonal(dim1=-2, dim2=-1).sqrt() * length
    lam, active, ray, status, iterations = solve_dual(S, -apply(Y.mT, u) - t, noise, n, options)
    x = -upper_solve(L, u + apply(Y, lam))
    H = (Q + Q.mT) / 2
    off, margin, gx, gl = check(H, c, M, t, noise, options.free, x, lam, active)
    fine = (status == SOLVED) & ~poor
    for _ in range(3):
        rough = fine & (off > FINE)
        if not bool(rough.any()):
            break
        p, q = adjoint(L, Y, S, active, gx, gl)
        new_x, new_lam = x + p, lam + q
        new = check(H, c, M, t, noise, options.free, new_x, new_lam, active)
        better = rough & (new[0] < off)
        x = torch.where(better.unsqueeze(-1), new_x, x)
        lam = torch.where(better.unsqueeze(-1), new_lam, lam)
        off, margin, gx, gl = (
            torch.where(better.reshape(-1, *[1] * (b.ndim - 1)), b, a)
            for a, b in zip((off, margin, gx, gl), new, strict=True)
        )
    status = torch.where(fine & ~(off <= options.tol), INACCURATE, status)
    status = torch.where(poor, INDEFINITE, status)
    converged = status == SOLVED
    return (x, lam, active, ray, off, margin, status, iterations, converged), int((~converged).sum())


def check(
    H: Tensor, c: Tensor, M: Tensor, t: Tensor, noise: Tensor, free: int, x: Tensor, lam: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual of the optimality conditions relative to their terms, margin, what is missing in them: gx, gl)."""
    Hx, Ml = apply(H, x), apply(M.mT, lam)
    gx = -Hx - c - Ml
    size = (Hx.abs() + c.abs() + apply(M.mT.abs(), lam.abs())).amax(-1) if c.shape[-1] else c.sum(-1)
    worst = gx.abs().amax(-1) if c.shape[-1] else c.sum(-1)
    residual = torch.where(size > 0, worst / size, worst)
    margin = torch.full_like(residual, torch.inf)
    slack = t - apply(M, x)
    if M.shape[-2]:
        rows = torch.linalg.vector_norm(M, dim=-1) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = noise + rows
        equal = active | (torch.arange(t.shape[-1], device=t.device) < free)
        off = torch.where(equal, slack.abs(), (-slack).clamp(min=0))
        residual = torch.maximum(residual, torch.where((scale > 0) & (off > 0), off / scale, off).amax(-1))
        if M.shape[-2] > free:
            margin = torch.where(active, lam, slack.abs())[:, free:].amin(-1)
    return residual, margin, gx, slack


def adjoint(L: Tensor, Y: Tensor, S: Tensor, active: Tensor, gx: Tensor, gl: Tensor | None) -> tuple[Tensor, Tensor]:
    """p, q with H p + M_A' q = gx, M_A p = gl, and q zero in the other rows."""
    t = lower_solve(L, gx)
    right = apply(Y.mT, t)
    q = Block(S, active).solve(right if gl is None else right - gl)
    return upper_solve(L, t - apply(Y, q)), q
