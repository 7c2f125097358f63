"""Solutions of canonical programmes: numbers from a compiled solver, made exact and judged here, and their derivatives.

The optimality conditions of min x'Px/2 + q'x, s = b - Ax in K, in z = (x, y) are

    F(z) = (Px + A'y + q, C(s, y)) = 0,     J = [[P, A'], [-C_s A, C_y]],

C the complementarity of ``_program_cones``. Newton steps on them take a solver's answer to rounding, and the implicit
function theorem on them gives every derivative.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._closure import eager
from ._jacobian import Jacobian
from ._program_cones import Cones
from ._program_factors import SINGULAR, Factors, Pattern
from ._program_form import Form
from ._program_solvers import ConeSolver
from .adjoint import attach
from .linear import ConvergenceError, LinearOperator, LinearReport, LinearSolver, LstSq
from .operator import apply_matrix

POLISH = 12
UNKNOWN = "NaN or inf in the data"
LIBRARY = torch.library.Library("implicit", "FRAGMENT")


@dataclass(frozen=True, eq=False)
class Known(LinearSolver):
    """The solver of a Jacobian, or of its transpose, which is factorized where a derivative is first asked for."""

    factors: Callable[[], Factors]

    @property
    def T(self) -> LinearSolver:
        return self

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        assert isinstance(op, Jacobian)
        x = self.factors().solve(b, op.transposed)
        fine = torch.ones(x.shape[:-1], dtype=torch.bool)  # NaN belongs to the samples that have no solution
        return x, LinearReport(fine, torch.ones_like(fine, dtype=torch.int64), torch.zeros_like(x[..., 0]), "")


@dataclass(eq=False)
class Numbers:
    """z = (x, y) for each sample, zero where ``good`` is not, and what solves with J there."""

    z: Tensor
    good: Tensor
    factors: Callable[[], Factors]


class Core:
    """Programmes over one product of cones, with n unknowns each, and how they are solved."""

    made: ClassVar[weakref.WeakValueDictionary[int, Core]] = weakref.WeakValueDictionary()
    count: ClassVar[Any] = itertools.count()

    def __init__(self, form: Form, solver: ConeSolver, tol: float | None, on_fail: str) -> None:
        self.n, self.dims, self.solver, self.on_fail = form.n, form.dims, solver, on_fail
        self.cones = Cones.of(form.dims, solver.pairs)
        self.pattern = Pattern(*form.pattern(), self.cones.full())
        self.tol = self.cones.tolerance if tol is None else tol
        self.register()

    def register(self) -> None:
        self.key = next(self.count)
        self.made[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register()

    # --- the conditions -----------------------------------------------------------------------------------------------

    def residual(
        self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor, cases: list[Tensor | None]
    ) -> Tensor:  # fmt: skip
        x, y = z[..., : self.n], z[..., self.n :]
        slope = apply_matrix(P, x) + apply_matrix(A.mT, y) + q
        return torch.cat([slope, self.cones.complement(b - apply_matrix(A, x), y, cases)], -1)

    def factors(self, z: Tensor, P: Tensor, A: Tensor, b: Tensor, good: Tensor | None = None) -> Factors:
        """What solves with J at each z (batch, n + m); with 0 for the samples that are not good."""
        x, y = z[..., : self.n], z[..., self.n :]
        s = b - apply_matrix(A, x)
        slopes = self.cones.slopes(s, y, self.cones.cases(s, y))
        matrices = self.pattern.matrices(P, A, slopes)
        return Factors([m if good is None or good[i] else None for i, m in enumerate(matrices)])

    def cases(self, z: Tensor, A: Tensor, b: Tensor) -> list[Tensor | None]:
        x, y = z[..., : self.n], z[..., self.n :]
        return self.cones.cases(b - apply_matrix(A, x), y)

    def error(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """The largest of the relative violations of s in K, of y in K*, of stationarity, and of the gap: (batch, 3)."""
        x, y = z[..., : self.n], z[..., self.n :]
        Ax, Px, Ay = apply_matrix(A, x), apply_matrix(P, x), apply_matrix(A.mT, y)
        s, slope = b - Ax, Px + Ay + q
        top = lambda *parts: torch.stack([_top(p) for p in parts]).amax(0)  # noqa: E731
        primal = self.cones.primal_violation(s) / (1 + top(b.expand_as(s), Ax)) if s.shape[-1] else _top(s)
        dual = self.cones.dual_violation(y) / (1 + _top(y)) if s.shape[-1] else _top(s)
        dual = torch.maximum(dual, _top(slope) / (1 + top(q.expand_as(slope), Px, Ay)))
        quadratic, linear, bound = (x * Px).sum(-1), (q * x).sum(-1), (b * y).sum(-1)
        gap = (quadratic + linear + bound).abs() / (1 + torch.minimum((quadratic / 2 + linear).abs(), bound.abs()))
        return torch.stack([primal, dual, gap], -1).nan_to_num(torch.inf, torch.inf, torch.inf)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def numbers(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Numbers:
        """Solutions for (batch, ...) data without derivative. Raises or warns as ``on_fail`` says."""
        P, q, A, b = (t.detach() for t in (P, q, A, b))
        batch = torch.broadcast_shapes(P.shape[:-2], q.shape[:-1], A.shape[:-2], b.shape[:-1])
        known = all(bool(t.isfinite().all()) for t in (P, q, A, b))
        P, q, A, b = (
            t.expand(*batch, *t.shape[t.ndim - d :]).reshape(-1, *t.shape[t.ndim - d :])
            for t, d in ((P, 2), (q, 1), (A, 2), (b, 1))
        )
        words, rows = [], []
        for data in zip(P, q, A, b, strict=True):
            finite = known or all(bool(t.isfinite().all()) for t in data)
            x, y, word = self._one(*data) if finite else (q.new_zeros(self.n), b.new_zeros(self.cones.size), UNKNOWN)
            words.append(word)
            rows.append(torch.cat([x, y]))
        z = torch.stack(rows) if rows else torch.zeros(0, self.n + self.cones.size, dtype=torch.float64)
        usable = z.isfinite().all(-1) & (z.abs().amax(-1) < 1e150 if z.shape[-1] else True)
        z = torch.where(usable.unsqueeze(-1), z, 0)
        z = self.polish(z, P, q, A, b)
        errors = self.error(z, P, q, A, b)
        given = usable & torch.tensor([w != UNKNOWN for w in words], dtype=torch.bool)
        good = given & (errors <= self.tol).all(-1)
        if not bool(good.all()):
            self.fail(good, errors, words)
        z = torch.where(good.unsqueeze(-1), z, 0)
        made = functools.cache(lambda: self.factors(z, P, A, b, good))
        return Numbers(z.reshape(*batch, z.shape[-1]), good.reshape(batch), made)

    def _one(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        x, y, word = self.solver.solve(P.numpy(), q.numpy(), A.numpy(), b.numpy(), self.dims)
        return torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64), word

    def polish(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """Newton steps for as long as they help; J is factorized anew where steps with the last one are slow."""
        start, first, cases = z, self.error(z, P, q, A, b).amax(-1), self.cases(z, A, b)
        F = self.residual(z, P, q, A, b, cases)
        size, factors = _top(F), Factors([None] * len(z))
        done, stale = torch.zeros(len(z), dtype=torch.bool), torch.ones(len(z), dtype=torch.bool)
        for _ in range(POLISH):
            if bool(stale.any()):
                factors.replace(stale, self.factors(z[stale], P[stale], A[stale], b[stale]))
            trial = z - factors.solve(F, False)
            F_trial = self.residual(trial, P, q, A, b, cases)
            size_trial = _top(F_trial).nan_to_num(torch.inf)
            better = (size_trial < 0.5 * size) & ~done
            done |= ~better & (stale | (size <= 1e-13 * (1 + _top(z))))
            stale = ((size_trial > 1e-2 * size) | ~better) & ~done
            z, F = torch.where(better.unsqueeze(-1), trial, z), torch.where(better.unsqueeze(-1), F_trial, F)
            size = torch.where(better, size_trial, size)
            if bool(done.all()):
                break
        # steps that led out of the cones came from too far away
        kept = self.error(z, P, q, A, b).amax(-1) <= torch.clamp(first, min=self.tol)
        return torch.where(kept.unsqueeze(-1), z, start)

    def fail(self, good: Tensor, errors: Tensor, words: list[str]) -> None:
        if self.on_fail not in ("raise", "warn"):
            return
        bad = (~good).nonzero().squeeze(-1).tolist()
        i = bad[0]
        primal, dual, gap = errors[i].tolist()
        where = "" if len(words) == 1 else f" in samples {bad[:8]}"
        message = (
            f"the programme was not solved{where}: primal residual {primal:.1e}, dual residual {dual:.1e}, gap "
            f"{gap:.1e}, tolerance {self.tol:.1e}; {type(self.solver).__name__} says {words[i]!r}. {advice(words[i])}"
        )
        if self.on_fail == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    # --- derivatives --------------------------------------------------------------------------------------------------

    def solution(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """x, differentiable; zeros, or NaN in value and gradient as ``on_fail`` says, where there is no solution."""
        linear: LinearSolver = LstSq(rtol=SINGULAR)
        if eager():
            found = self.numbers(P, q, A, b)
            z, good, linear = found.z, found.good, Known(found.factors)
        else:
            z, good = torch.ops.implicit.solve_program(P.detach(), q.detach(), A.detach(), b.detach(), self.key)
        cases = self.cases(z, A.detach(), b.detach())
        if z.numel() == 0:
            return z[..., : self.n] + 0 * (q.sum() + b.sum())
        z = attach(z, self.residual, P, q, A, b, cases, batch_dims=1, linear=linear, check=False)
        if self.on_fail == "ignore":
            return z[..., : self.n]
        # not torch.where: the gradient of a sample that failed must be NaN too
        return z[..., : self.n] * torch.where(good, 1.0, torch.nan).to(z).unsqueeze(-1)


def _top(v: Tensor) -> Tensor:
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def advice(word: str) -> str:
    low = word.lower()
    if "nan" in low:
        return "Remove NaN and inf from the parameters."
    if "primalinfeasible" in low or low.startswith("infeasible"):
        return "The constraints contradict each other: relax one."
    if "dualinfeasible" in low or low.startswith("unbounded"):
        return "The objective is unbounded: add a constraint or a quadratic term."
    return "Rescale the problem so that its numbers are near 1, give the solver more steps, or raise tol."


def _solve(P: Tensor, q: Tensor, A: Tensor, b: Tensor, key: int) -> tuple[Tensor, Tensor]:
    found = Core.made[key].numbers(P, q, A, b)
    return found.z, found.good


def _fake(P: Tensor, q: Tensor, A: Tensor, b: Tensor, key: int) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_tensors(*(t[..., 0] * 0 for t in (P.sum(-1), q, A.sum(-1), b)))[0]
    return q.new_empty(*lead.shape, q.shape[-1] + b.shape[-1]), q.new_empty(lead.shape, dtype=torch.bool)


def _vmapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    moved = [a.unsqueeze(0) if d is None else a.movedim(d, 0) for a, d in zip(args[:4], in_dims[:4], strict=True)]
    return torch.ops.implicit.solve_program(*moved, args[4]), (0, 0)


LIBRARY.define("solve_program(Tensor P, Tensor q, Tensor A, Tensor b, int key) -> (Tensor, Tensor)")
LIBRARY.impl("solve_program", _solve, "CompositeExplicitAutograd")
torch.library.register_fake("implicit::solve_program", _fake, lib=LIBRARY)
torch.library.register_vmap("implicit::solve_program", _vmapped, lib=LIBRARY)
