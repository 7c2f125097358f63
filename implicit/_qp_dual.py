"""The dual of a strictly convex QP, whose constraints are rows Y' with S = Y'Y, on any device, batched.

    minimize lam' S lam / 2 - r' lam    over lam >= 0, the first ``free`` multipliers without sign.

The slack of the rows is w = S lam - r. A primal-dual active set finds the answer in a few steps where it is regular;
what is left goes to the dual method of Goldfarb and Idnani (1983), which ends after finitely many steps with linearly
independent active rows, or with a ray of multipliers that proves that no point is feasible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._qp_status import INFEASIBLE, SOLVED, STOPPED, Options

# rounding errors of a slack, in units of its largest term
ROUNDING = 1e3 * 2.0**-52
STEPS = 12


def positions(active: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the active rows of each problem first, as many as the problem with most of them has, and which
    of these are active."""
    size = int(active.sum(-1).max()) if len(active) else 0
    index = active.byte().argsort(dim=-1, descending=True, stable=True)[:, :size]
    return index, active.gather(-1, index)


class Block:
    """S on the active rows and columns of each problem, padded by the identity, and its Cholesky factor."""

    def __init__(self, S: Tensor, active: Tensor) -> None:
        rows, self.k = active.shape
        self.index, self.on = positions(active)
        size = self.index.shape[-1]
        each = torch.arange(rows, device=S.device).clamp(max=len(S) - 1)
        block = S[each[:, None, None], self.index.unsqueeze(-1), self.index.unsqueeze(-2)]
        both = self.on.unsqueeze(-1) & self.on.unsqueeze(-2)
        block = torch.where(both, block, torch.eye(size, dtype=S.dtype, device=S.device))
        self.factor, self.flaw = torch.linalg.cholesky_ex(block)

    def spread(self, v: Tensor) -> Tensor:
        """v of the active rows among all rows, zero elsewhere."""
        return v.new_zeros(len(v), self.k).scatter(-1, self.index, torch.where(self.on, v, 0))

    def solve(self, right: Tensor) -> Tensor:
        """S_AA^-1 right_A, zero elsewhere."""
        part = torch.where(self.on, right.gather(-1, self.index), 0)
        return self.spread(torch.cholesky_solve(part.unsqueeze(-1), self.factor).squeeze(-1))

    def pivots(self) -> Tensor:
        """Squared distances of the active rows from the span of those before, zero elsewhere."""
        return self.spread(self.factor.diagonal(dim1=-2, dim2=-1).square())


def product(S: Tensor, v: Tensor) -> Tensor:
    return (S @ v.unsqueeze(-1)).squeeze(-1)


class Dual:
    """The state of a batch of duals, all tensors (rows, k)."""

    def __init__(self, S: Tensor, r: Tensor, noise: Tensor, rank: int, options: Options) -> None:
        self.S, self.noise, self.rank, self.options, self.free = S, noise, rank, options, options.free
        self.diag = S.diagonal(dim1=-2, dim2=-1).expand_as(r)
        self.root = self.diag.sqrt()
        self.r = r
        self.sign_free = torch.arange(r.shape[-1], device=r.device) < self.free
        self.lam = torch.zeros_like(r)
        self.active = self.sign_free.expand_as(r).clone()
        self.ray = torch.zeros_like(r)
        self.status = torch.full(r.shape[:1], STOPPED, device=r.device)
        self.iterations = torch.zeros_like(self.status)

    def take(self, rows: Tensor) -> Dual:
        part = Dual(
            self.S if len(self.S) == 1 else self.S[rows], self.r[rows], self.noise[rows], self.rank, self.options
        )
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

    def newton(self) -> None:
        """Primal-dual active set, for those rows that it settles beyond doubt."""
        new = (self.r > ROUNDING * self.noise) | self.sign_free
        for _ in range(min(STEPS, self.options.max_iter)):
            active = new
            part = Block(self.S, active)
            lam = part.solve(self.r)
            w, error = self.slack(lam)
            lam = lam - part.solve(w)
            new = torch.where(active, lam * self.diag > error, w < -error) | self.sign_free
            self.iterations += 1
            if not bool((new != active).any()):
                break
        # an inactive row without slack may belong to another choice of active rows: the other method chooses
        vague = (~active & (w.abs() <= error)) | (active & (part.pivots() <= self.options.span * self.diag))
        fine = (new == active).all(-1) & (part.flaw == 0) & ~vague.any(-1) & (active.sum(-1) <= self.rank)
        self.lam, self.active = torch.where(active, lam, 0), active
        self.status = torch.where(fine, SOLVED, STOPPED)

    def goldfarb_idnani(self) -> None:
        """One row of the constraints at a time, the most violated one, keeping the multipliers' signs."""
        S, r, span = self.S, self.r, self.options.span
        loose = 10 * self.options.tol / ROUNDING  # of a slack, in units of its rounding error
        lam, active = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.bool)
        skipped = active.clone()
        each = torch.arange(len(r), device=r.device)
        full = S.expand(len(r), *S.shape[1:])
        done = torch.zeros_like(self.status, dtype=torch.bool)

        def direction(row: Tensor) -> tuple[Tensor, Tensor]:
            column = full[each, row]
            d = Block(S, active).solve(column)
            return d, column[each, row] - (d * column).sum(-1)

        part = Block(S, self.sign_free.expand_as(r))
        regular = (part.flaw == 0).unsqueeze(-1) & (part.pivots() > span * self.diag)
        if bool(regular[:, : self.free].all()):
            active[:, : self.free] = True
        for i in range(0 if bool(active[:, : self.free].all()) else self.free):
            active[:, i] = direction(torch.full_like(each, i))[1] > span * self.diag[:, i]
        lam = Block(S, active).solve(r)
        w, error = self.slack(lam)
        wrong = self.sign_free & (w.abs() > error * loose)
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
        for _ in range(self.options.max_iter + 1):
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
            flat = (gap <= span * self.diag[each, row]) | (active.sum(-1) >= self.rank)
            # where the row depends on the active ones a coefficient that is rounding must not block
            least = torch.where(flat, 10 * span * self.root[each, row], 0).unsqueeze(-1)
            ratio = torch.where(active & ~fixed & (d * self.root > least), lam / d, torch.inf)
            step, block = ratio.min(-1)
            whole = torch.where(flat, torch.inf, -slack / gap)
            enter = ~done & ~flat & (whole <= step)
            step = torch.minimum(step, whole)
            stuck = ~done & (step == torch.inf)
            harmless = stuck & (slack >= -error[each, row] * loose)
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
        part = Block(S, active)
        lam = part.solve(r)
        w, error = self.slack(lam)
        lam = lam - part.solve(w)
        self.active = active & (fixed | (lam * self.diag > error))
        self.lam = torch.where(self.active, lam, 0)


def solve_dual(
    S: Tensor, r: Tensor, noise: Tensor, rank: int, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lam, active, ray, status, iterations), from S: (rows or 1, k, k) and r: (rows, k).

    Args:
        noise: the magnitude of the terms of r; a row without bound has r = -inf, noise = inf.
        rank: how many rows can be independent, at most.
    """
    dual = Dual(S, r, noise, rank, options)
    dual.newton()
    rest = (dual.status != SOLVED).nonzero().squeeze(-1)
    if len(rest):
        part = dual.take(rest)
        part.goldfarb_idnani()
        dual.put(rest, part)
    return dual.lam, dual.active, dual.ray, dual.status, dual.iterations
