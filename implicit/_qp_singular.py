"""QPs whose Q is singular, linear programmes included: the proximal-point method.

    x <- argmin f(x) + delta |x - x_old|^2 / 2  over the same constraints

has a strictly convex problem at each step. As soon as its active rows are those of the answer, their linear system

    Q x + M_A' lam = -c,   M_A x = t_A

is solved as it stands. Where that is singular the solution or its derivative is not unique. Where there is no solution
the steps tend to a direction along which the objective falls for ever. Source: Rockafellar 1976.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._qp_dual import positions
from ._qp_status import INDEFINITE, INFEASIBLE, NOT_UNIQUE, SOLVED, STOPPED, UNBOUNDED, Options

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
    n = c.shape[-1]
    index, on = positions(active)
    K = kkt_matrix(H, M.gather(1, index.unsqueeze(-1).expand(-1, -1, n)), on)
    # rows and columns of like size, so that a small pivot means a dependent row
    scale = K.abs().amax(-1) if n else K.sum(-1)
    scale = torch.where(scale > 0, scale, 1).sqrt()
    scaled = K / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    factor, pivots, _ = torch.linalg.lu_factor_ex(scaled)
    right = (torch.cat([-c, torch.where(on, t.gather(-1, index), 0)], -1) / scale).unsqueeze(-1)
    z = torch.linalg.lu_solve(factor, pivots, right)
    z = (z + torch.linalg.lu_solve(factor, pivots, right - scaled @ z)).squeeze(-1) / scale
    regular = (factor.diagonal(dim1=-2, dim2=-1).abs() > 1e-11).all(-1) & z.isfinite().all(-1)
    lam = torch.zeros_like(t).scatter(-1, index, torch.where(on, z[:, n:], 0))
    return z[:, :n], lam, regular


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
    Q: Tensor, c: Tensor, M: Tensor, t: Tensor, options: Options, strict: Any, check: Any
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
    whole = (H, c, M, t, noise, delta)
    status = torch.where(flawed, INDEFINITE, STOPPED)
    nan = torch.full_like(largest, torch.nan)
    none = torch.zeros_like(t, dtype=torch.bool)
    out = [c * torch.nan, torch.zeros_like(t), none.clone(), torch.zeros_like(t), nan, nan.clone(), status, status * 0]
    left = (~flawed).nonzero().squeeze(-1)
    x, last = torch.zeros_like(c), none
    for step in range(STEPS):
        if not len(left):
            break
        point = x[left], last[left] if step else None
        near, *found = proximal_step([v[left] for v in whole], *point, options, strict, check)
        for old, new in zip(out, found, strict=True):
            old[left] = new
        x[left], last[left] = near, found[2]
        left = left[found[6] == STOPPED]
    return tuple(out)


def proximal_step(
    data: list[Tensor], x: Tensor, last: Tensor | None, options: Options, strict: Any, check: Any
) -> list[Tensor]:
    """[next x, x, lam, active, ray, residual, margin, status, iterations]; ``last`` is what was active before."""
    H, c, M, t, noise, delta = data
    free, tol = options.free, options.tol
    found = strict(H + torch.diag_embed(delta.expand_as(c)), c - delta * x, M, t, options)
    near, lam, active, ray, _, _, state, count, _ = found
    near = torch.where(near.isfinite(), near, x)
    exact, duals, regular = near.clone(), lam.clone(), torch.ones_like(state, dtype=torch.bool)
    # the same rows once more would give the same answer
    fresh = torch.linalg.vector_norm(near - x, dim=-1) <= tol * torch.linalg.vector_norm(near, dim=-1)
    fresh = fresh | (active != last).any(-1) if last is not None else fresh | True
    new = fresh.nonzero().squeeze(-1)
    if len(new):
        point, multipliers, good = solve_exactly(H[new], c[new], M[new], t[new], active[new])
        good_ = good.unsqueeze(-1)
        exact[new], duals[new] = torch.where(good_, point, near[new]), torch.where(good_, multipliers, lam[new])
        regular[new] = good
    off, margin, *_ = check(H, c, M, t, noise, free, exact, duals, active)
    # a tiny dual may have either sign; a negative one belongs to a row that should not be active
    signs = duals[:, free:] >= -tol * duals.abs().sum(-1, keepdim=True)
    solved = signs.all(-1) & (off <= tol)
    status = torch.where(certifies(H, c, M, t, free, near - x), UNBOUNDED, STOPPED)
    status = torch.where(solved, torch.where(regular, SOLVED, NOT_UNIQUE), status)
    status = torch.where(state == INFEASIBLE, INFEASIBLE, status)
    return [near, exact, duals, active, ray, off, margin, status, count]
