"""QPs whose Q is singular, linear programmes included: the proximal-point method.

    x <- argmin f(x) + delta |x - x_old|^2 / 2  over the same constraints

has a strictly convex problem at each step. As soon as its active rows are those of the answer, their linear system

    Q x + M_A' lam = -c,   M_A x = t_A

is solved as it stands. Where that is singular the solution or its derivative is not unique. Where there is no solution
the steps tend to a direction along which the objective falls for ever. Source: Rockafellar 1976.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._qp_status import INDEFINITE, INFEASIBLE, NOT_UNIQUE, SOLVED, STOPPED, UNBOUNDED

STEPS = 100
# relative size of the proximal term; of what counts as zero in a certificate
DELTA, ZERO = 1e-5, 1e-8


def kkt_matrix(H: Tensor, M: Tensor, active: Tensor) -> Tensor:
    """[[H, M_A'], [M_A, 0]], with the identity in the rows that are not active."""
    rows = torch.where(active.unsqueeze(-1), M, 0)
    rest = torch.diag_embed((~active).to(H.dtype))
    return torch.cat([torch.cat([H, rows.mT], -1), torch.cat([rows, rest], -1)], -2)


def solve_exactly(H: Tensor, c: Tensor, M: Tensor, t: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, lam, whether the system of the active rows is regular)."""
    K = kkt_matrix(H, M, active)
    # by rows and columns of like size, so that a small pivot means a dependent row
    size = K.abs().amax(-1)
    size = torch.where(size > 0, size, 1).sqrt()
    scaled = K / (size.unsqueeze(-1) * size.unsqueeze(-2))
    factor, pivots, _ = torch.linalg.lu_factor_ex(scaled)
    right = torch.cat([-c, torch.where(active, t, 0)], -1) / size
    z = torch.linalg.lu_solve(factor, pivots, right.unsqueeze(-1))
    z = z + torch.linalg.lu_solve(factor, pivots, right.unsqueeze(-1) - scaled @ z)
    diagonal = factor.diagonal(dim1=-2, dim2=-1).abs()
    regular = (diagonal > 1e-11).all(-1) & z.isfinite().all(-1).all(-1)
    z = z.squeeze(-1) / size
    return *z.split([H.shape[-1], M.shape[-2]], -1), regular


def certifies(H: Tensor, c: Tensor, M: Tensor, t: Tensor, free: int, d: Tensor) -> Tensor:
    """Whether the objective falls for ever along d, which no constraint ends."""
    length = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    d = d / torch.where(length > 0, length, 1)
    Hd = torch.linalg.vector_norm((H @ d.unsqueeze(-1)).squeeze(-1), dim=-1)
    falls = (c * d).sum(-1) < -ZERO * torch.linalg.vector_norm(c, dim=-1)
    along = (M @ d.unsqueeze(-1)).squeeze(-1)
    along = torch.cat([along[:, :free].abs(), torch.where(t.isfinite(), along, 0)[:, free:]], -1)
    open_ = (along <= ZERO * torch.linalg.vector_norm(M, dim=-1)).all(-1)
    return falls & open_ & (Hd <= ZERO * torch.linalg.matrix_norm(H)) & (length.squeeze(-1) > 0)


def solve_singular(
    Q: Tensor, c: Tensor, M: Tensor, t: Tensor, free: int, tol: float, max_iter: int, strict: Callable, check: Callable
) -> tuple[Tensor, ...]:
    """(x, lam, active, ray, residual, margin, status, iterations) of problems that all have their own data.

    ``strict`` solves strictly convex problems, ``check`` gives the residual.
    """
    n = c.shape[-1]
    H = (Q + Q.mT) / 2
    values = torch.linalg.eigvalsh(H)
    largest = values.abs().amax(-1)
    flawed = values[:, 0] < -1e3 * n * 2.0**-52 * largest
    length = torch.linalg.vector_norm(M, dim=-1)
    reach = torch.where((length > 0) & t.isfinite(), t.abs() / length, 0)
    reach = reach.amax(-1) if t.shape[-1] else torch.zeros_like(largest)
    reach = torch.where(reach > 0, reach, 1)
    delta = torch.maximum(DELTA * largest, 10 * DELTA * torch.linalg.vector_norm(c, dim=-1) / reach)
    delta = torch.where(delta > 0, delta, 1).unsqueeze(-1)
    noise = t.abs() + length * reach.unsqueeze(-1)
    convex = torch.where(flawed[:, None, None], 0, H) + torch.diag_embed(delta.expand_as(c))
    x = torch.zeros_like(c)
    status = torch.where(flawed, INDEFINITE, STOPPED)
    out: list[Tensor] = []
    for _ in range(STEPS):
        found, _ = strict(convex, c - delta * x, M, t, free, tol, max_iter)
        near, lam, active, ray, _, _, state, count, _ = found
        near = torch.where(near.isfinite(), near, x)
        exact, duals, regular = solve_exactly(H, c, M, t, active)
        exact, duals = (torch.where(regular.unsqueeze(-1), v, w) for v, w in ((exact, near), (duals, lam)))
        off, margin, *_ = check(H, c, M, t, noise, free, exact, duals, active)
        # a tiny dual may have either sign; a negative one belongs to a row that should not be active
        right = torch.arange(lam.shape[-1], device=lam.device) < free
        right = (right | (duals >= -tol * duals.abs().amax(-1, keepdim=True))).all(-1) if len(right) else regular | True
        solved = right & (off <= tol)
        verdict = torch.full_like(status, STOPPED)
        verdict = torch.where(certifies(H, c, M, t, free, near - x), UNBOUNDED, verdict)
        verdict = torch.where(solved, torch.where(regular, SOLVED, NOT_UNIQUE), verdict)
        verdict = torch.where(state == INFEASIBLE, INFEASIBLE, verdict)
        duals = torch.where(active, duals, 0)
        now = [exact, duals, active, ray, off, margin, torch.where(status == STOPPED, verdict, status), count]
        fresh = status == STOPPED
        out = [torch.where(fresh.reshape(-1, *[1] * (v.ndim - 1)), v, w) for v, w in zip(now, out or now, strict=True)]
        status = out[6]
        if not bool((status == STOPPED).any()):
            break
        x = near
    return tuple(out)
