"""The dual of a strictly convex QP, whose constraints are rows Y' with S = Y'Y, on any device, batched.

    minimize lam' S lam / 2 - r' lam    over lam >= 0, the first ``free`` multipliers without sign.

The slack of the rows is w = S lam - r. A primal-dual active set finds the answer in a few steps where it is regular;
what is left goes to the dual method of Goldfarb and Idnani (1983), which ends after finitely many steps with linearly
independent active rows, or with a ray of multipliers that proves that no point is feasible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._qp_status import INFEASIBLE, SOLVED, STOPPED

# a row nearer than this (squared, relative) to the span of the active ones depends on them
SPAN = 1e-11
# rounding errors of a slack, in units of its largest term
ROUNDING = 1e3 * 2.0**-52
STEPS = 12


def masked(S: Tensor, active: Tensor) -> Tensor:
    """S on the active rows and columns, the identity elsewhere."""
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    return torch.where(both, S, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device))


def solve_masked(factor: Tensor, active: Tensor, right: Tensor) -> Tensor:
    """S_AA^-1 right_A, zero elsewhere, from the factor of :func:`masked`."""
    return torch.cholesky_solve(torch.where(active, right, 0).unsqueeze(-1), factor).squeeze(-1)


def product(S: Tensor, v: Tensor) -> Tensor:
    return (S @ v.unsqueeze(-1)).squeeze(-1)


class Dual:
    """The state of a batch of duals, all tensors (rows, k)."""

    def __init__(self, S: Tensor, r: Tensor, noise: Tensor, free: int, rank: int) -> None:
        self.S, self.noise, self.free, self.rank = S, noise, free, rank
        self.diag = S.diagonal(dim1=-2, dim2=-1).expand_as(r)
        self.root = self.diag.sqrt()
        self.r = r
        self.sign_free = torch.arange(r.shape[-1], device=r.device) < free
        self.lam = torch.zeros_like(r)
        self.active = self.sign_free.expand_as(r).clone()
        self.ray = torch.zeros_like(r)
        self.status = torch.full(r.shape[:1], STOPPED, device=r.device)
        self.iterations = torch.zeros_like(self.status)

    def take(self, rows: Tensor) -> Dual:
        part = Dual(self.S if len(self.S) == 1 else self.S[rows], self.r[rows], self.noise[rows], self.free, self.rank)
        part.iterations = self.iterations[rows]
        return part

    def put(self, rows: Tensor, part: Dual) -> None:
        for name in ("lam", "active", "ray", "status", "iterations"):
            getattr(self, name)[rows] = getattr(part, name)

    def slack(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """(w, its rounding error)."""
        right = torch.where(lam == 0, 0, self.r)
        size = (lam * right).sum(-1, keepdim=True).clamp(min=0).sqrt()
        return product(self.S, lam) - self.r, ROUNDING * (self.noise + self.root * size)

    def newton(self, max_iter: int) -> None:
        """Primal-dual active set, for those rows that it settles beyond doubt."""
        new = (self.r > ROUNDING * self.noise) | self.sign_free
        for _ in range(min(STEPS, max_iter)):
            active = new
            factor, info = torch.linalg.cholesky_ex(masked(self.S, active))
            lam = solve_masked(factor, active, self.r)
            w, error = self.slack(lam)
            lam = lam - solve_masked(factor, active, w)
            new = torch.where(active, lam * self.diag > error, w < -error) | self.sign_free
            self.iterations += 1
            if not bool((new != active).any()):
                break
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        # an inactive row without slack may belong to another choice of active rows: the other method chooses
        vague = (~active & (w.abs() <= error)) | (active & (pivots <= SPAN * self.diag))
        fine = (new == active).all(-1) & (info == 0) & ~vague.any(-1) & (active.sum(-1) <= self.rank)
        self.lam, self.active = torch.where(active, lam, 0), active
        self.status = torch.where(fine, SOLVED, STOPPED)

    def goldfarb_idnani(self, max_iter: int, tol: float) -> None:
        """One row of the constraints at a time, the most violated one, keeping the multipliers' signs."""
        S, r = self.S, self.r
        lam, active = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.bool)
        skipped = active.clone()
        each = torch.arange(len(r), device=r.device)
        full = S.expand(len(r), *S.shape[1:])
        done = torch.zeros_like(self.status, dtype=torch.bool)

        def direction(row: Tensor) -> tuple[Tensor, Tensor]:
            factor = torch.linalg.cholesky_ex(masked(S, active))[0]
            column = full[each, row]
            d = solve_masked(factor, active, column)
            return d, column[each, row] - (d * column).sum(-1)

        for i in range(self.free):
            active[:, i] = direction(torch.full_like(each, i))[1] > SPAN * self.diag[:, i]
        factor = torch.linalg.cholesky_ex(masked(S, active))[0]
        lam = solve_masked(factor, active, r)
        w, error = self.slack(lam)
        wrong = self.sign_free & (w.abs() > error * (tol / ROUNDING))
        if bool(wrong.any()):
            rows = wrong.any(-1)
            row = wrong.int().argmax(-1)
            sign = -w[each, row].sign()
            d, _ = direction(row)
            ray = (-sign.unsqueeze(-1) * d).index_put((each, row), sign)
            self.ray = torch.where(rows.unsqueeze(-1), ray, self.ray)
            done = done | rows
        self.status = torch.where(done, INFEASIBLE, STOPPED)
        fixed = self.sign_free
        chosen = torch.full_like(self.status, -1)
        slack = torch.zeros_like(r[:, 0])
        for _ in range(max_iter + 1):
            w, error = self.slack(torch.where(active | (lam > 0), lam, 0))
            worth = torch.where(active | skipped | fixed | (w >= -error), torch.inf, w / self.root)
            best = worth.argmin(-1)
            fresh = ~done & (chosen < 0)
            over = fresh & ~(worth[each, best] < torch.inf)
            self.status = torch.where(over, SOLVED, self.status)
            done = done | over
            if bool(done.all()):
                break
            self.iterations += ~done
            chosen = torch.where(fresh & ~over, best, chosen)
            row = chosen.clamp(min=0)
            slack = torch.where(fresh, w[each, row], slack)
            d, gap = direction(row)
            flat = (gap <= SPAN * self.diag[each, row]) | (active.sum(-1) >= self.rank)
            # where the row depends on the active ones a coefficient that is rounding must not block
            least = torch.where(flat, 10 * SPAN * self.root[each, row], 0).unsqueeze(-1)
            ratio = torch.where(active & ~fixed & (d * self.root > least), lam / d, torch.inf)
            step, block = ratio.min(-1)
            whole = torch.where(flat, torch.inf, -slack / gap)
            enter = ~done & ~flat & (whole <= step)
            step = torch.minimum(step, whole)
            stuck = ~done & (step == torch.inf)
            harmless = stuck & (slack >= -error[each, row] * (tol / ROUNDING))
            lost = stuck & ~harmless
            ray = (-d).index_put((each, row), torch.ones_like(slack))
            self.ray = torch.where(lost.unsqueeze(-1), ray, self.ray)
            self.status = torch.where(lost, INFEASIBLE, self.status)
            done = done | lost
            move = torch.where(done | stuck, 0, step)
            lam = lam - move.unsqueeze(-1) * d
            lam[each, row] += move
            lam[each, row] = torch.where(harmless, 0, lam[each, row])
            slack = slack + move * torch.where(flat, 0, gap)
            leave = ~done & ~enter & ~stuck
            lam[each, block] = torch.where(leave, 0, lam[each, block])
            active[each, block] &= ~leave
            active[each, row] |= enter
            skipped[each, row] |= harmless
            chosen = torch.where(enter | harmless, -1, chosen)
        factor = torch.linalg.cholesky_ex(masked(S, active))[0]
        lam = solve_masked(factor, active, r)
        w, error = self.slack(lam)
        lam = lam - solve_masked(factor, active, w)
        self.active = active & (fixed | (lam * self.diag > error))
        self.lam = torch.where(self.active, lam, 0)


def solve_dual(
    S: Tensor, r: Tensor, noise: Tensor, free: int, rank: int, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lam, active, ray, status, iterations), from S: (rows or 1, k, k) and r: (rows, k).

    Args:
        noise: the magnitude of the terms of r; a row without bound has r = -inf, noise = inf.
        rank: how many rows can be independent, at most.
        tol: violation, relative to noise, of a dependent row that makes a problem infeasible.
    """
    dual = Dual(S, r, noise, free, rank)
    dual.newton(max_iter)
    rest = (dual.status != SOLVED).nonzero().squeeze(-1)
    if len(rest):
        part = dual.take(rest)
        part.goldfarb_idnani(max_iter, tol)
        dual.put(rest, part)
    return dual.lam, dual.active, dual.ray, dual.status, dual.iterations
