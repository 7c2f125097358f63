"""Iterative linear solvers: CG, NormalCG, GMRES, BiCGStab, Neumann.

Each class is one cycle: from a residual r it finds a correction d with A d ~ r. :meth:`Iterative.solve` repeats cycles
on the true residual b - A x, so a recursion that drifts from the truth, or that broke down, never reports success.
A sample that is done takes steps of length exactly zero: its bits do not depend on how long the others need.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .operator import LinearOperator, LinearReport, LinearSolver, as_operator, check_system, dot, norm, signs

Product = Callable[[Tensor], Tensor]


class NotSymmetricError(ValueError):
    """CG was given an operator that is not symmetric."""


def _ratio(a: Tensor, b: Tensor, active: Tensor) -> Tensor:
    """a / b for the active samples where it exists, else 0: a step of length zero, never NaN."""
    q = a / b
    return torch.where(active & q.isfinite(), q, 0).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Iterative(LinearSolver):
    """What iterative solvers share.

    Args:
        rtol, atol: a sample is done when |b - A x| <= max(rtol |b|, atol), or at 8 eps |A|_F |x|, below which rounding
            leaves nothing to gain; ``rtol=None`` is 1e-11 in float64 and 1e-5 below.
        max_iter: iterations of a sample; ``None`` is max(10 n, 1000).
        preconditioner: M ~ A^-1, a tensor (..., n, n), a callable v -> M v or a LinearOperator; transposed for A'.
        ridge: solve (A + ridge I) x = b instead.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int | None = None
    preconditioner: Any = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "ridge"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.max_iter is not None and self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")

    @property
    def T(self) -> LinearSolver:
        m = self.preconditioner
        if m is None:
            return self
        if isinstance(m, LinearOperator):
            return replace(self, preconditioner=m.T)
        return replace(self, preconditioner=m.mT if isinstance(m, Tensor) else Transposed(m))

    @abstractmethod
    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """(d, iterations of each sample): a correction with |r - A d| <= tol, or as near as the cycle came."""

    def _probe(self, op: LinearOperator, u: Tensor, au: Tensor) -> None:
        """Refuse an operator that the method is not made for."""

    def _preconditioner(self, b: Tensor) -> Product:
        if self.preconditioner is None:
            return lambda v: v
        m = self.preconditioner
        while isinstance(m, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(m):
            if torch._C._functorch.is_batchedtensor(m):
                raise ValueError("a preconditioner cannot be computed under vmap: make it outside, or as a callable")
            m = torch._C._functorch.get_unwrapped(m)
        return as_operator(m, b).matvec

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        check_system(op, b, x0)
        with torch.no_grad():
            return self._solve(op.shifted(self.ridge), b.detach(), None if x0 is None else x0.detach())

    def _solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, LinearReport]:
        rtol = (1e-11 if b.dtype == torch.float64 else 1e-5) if self.rtol is None else self.rtol
        left = max(10 * b.shape[-1], 1000) if self.max_iter is None else self.max_iter
        eps, size, m = torch.finfo(b.dtype).eps, norm(b), self._preconditioner(b)
        u = signs(b)
        au = op.matvec(u)
        self._probe(op, u, au)
        tol, scale = (rtol * size).clamp(min=self.atol), 8 * eps * norm(au)
        x, r = (torch.zeros_like(b), b) if x0 is None else (x0, b - op.matvec(x0))
        error, moving = norm(r), torch.ones_like(size, dtype=torch.bool)
        iterations = torch.zeros_like(size, dtype=torch.int64)
        while left > 0:
            # an active sample has tol < |r|; any other gets an infinite tolerance, so that its cycle has no steps
            active = moving & ~(error <= torch.maximum(tol, scale * norm(x)))
            if not bool(active.any()):
                break
            d, taken = self._cycle(op, m, r, torch.where(active, tol, torch.inf), left)
            new_r = b - op.matvec(x + d)
            new_error = norm(new_r)
            better = active & (new_error < error)
            moving = active & (new_error < 0.99 * error)
            x, r = torch.where(better.unsqueeze(-1), x + d, x), torch.where(better.unsqueeze(-1), new_r, r)
            error = torch.where(better, new_error, error)
            iterations = iterations + torch.where(active, taken, 0)
            left -= max(int(taken.max()), 1)
        converged = error <= torch.maximum(tol, scale * norm(x))
        return x, LinearReport(converged, iterations, torch.where(error == 0, 0, error / size))


@dataclass(frozen=True)
class Transposed:
    """The transpose of a linear callable, by its derivative."""

    matvec: Product

    def __call__(self, v: Tensor) -> Tensor:
        return as_operator(self.matvec, v).rmatvec(v)


@dataclass(frozen=True, eq=False)
class CG(Iterative):
    """Conjugate gradients for a symmetric, definite A; one product with A an iteration.

    An operator that fails u'A v = v'A u on one random pair is refused. The preconditioner must be symmetric too.

    Raises:
        ValueError: A is not symmetric.

    Complexity: O(sqrt(cond(A))) products with A. Source: Hestenes, Stiefel 1952.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> implicit.linear_solve(A, torch.tensor([6.0, 7.0], dtype=torch.float64), method=implicit.CG())
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    def _probe(self, op: LinearOperator, u: Tensor, au: Tensor) -> None:
        v = signs(u, seed=1) * torch.linspace(1, 2, u.shape[-1], dtype=u.dtype, device=u.device)
        av = op.matvec(v)
        gap = (dot(v, au) - dot(u, av)).abs()
        bound = torch.finfo(u.dtype).eps ** 0.5 * (norm(v) * norm(au) + norm(u) * norm(av))
        if bool((gap > bound).any()):
            raise NotSymmetricError(
                f"CG needs a symmetric operator, but |u'A v - v'A u| = {gap.max().item():.1e} for a random u, v; "
                "use GMRES(), BiCGStab() or NormalCG()"
            )

    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        if r.ndim == 1:
            return self._single(op, m, r.clone(), tol.item(), limit)
        d, p, rz = torch.zeros_like(r), torch.zeros_like(r), torch.ones_like(tol)
        active = norm(r) > tol
        taken = torch.zeros_like(tol, dtype=torch.int64)
        for _ in range(limit):
            z = m(r)
            rz_new = dot(r, z)
            p = z + _ratio(rz_new, rz, active) * p
            rz, q = rz_new, op.matvec(p)
            step = _ratio(rz, dot(p, q), active)
            d, r = torch.addcmul(d, step, p), torch.addcmul(r, step, q, value=-1)
            taken += active
            active = active & (norm(r) > tol) & (step.squeeze(-1) != 0)
            if not bool(active.any()):
                break
        return d, taken

    def _single(self, op: LinearOperator, m: Product, r: Tensor, tol: float, limit: int) -> tuple[Tensor, Tensor]:
        """The cycle for one vector, with numbers of Python: a few operations on short vectors is all that it costs."""
        d, p, rz, taken, size = torch.zeros_like(r), torch.zeros_like(r), 1.0, 0, torch.dot(r, r).item() ** 0.5
        while taken < limit and size > tol:
            z = m(r)
            rz_new = size**2 if self.preconditioner is None else torch.dot(r, z).item()
            p.mul_(rz_new / rz).add_(z)
            q = op.matvec(p)
            rz, bend = rz_new, torch.dot(p, q).item()
            taken += 1
            if rz == 0 or bend == 0 or not math.isfinite(rz / bend):
                break
            d.add_(p, alpha=rz / bend)
            r.sub_(q, alpha=rz / bend)
            size = torch.dot(r, r).item() ** 0.5
        return d, torch.tensor(taken)


@dataclass(frozen=True, eq=False)
class NormalCG(Iterative):
    """Conjugate gradients on the normal equations A'A x = A'b, for any nonsingular A; two products an iteration.

    From x0 = 0 a consistent singular system gets its solution of least norm. The preconditioner is one for A'A.

    Complexity: O(cond(A)) products with A and A'. Source: Hestenes, Stiefel 1952; Bjorck 1996, "CGLS".

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
        >>> implicit.linear_solve(A, torch.ones(2, dtype=torch.float64), method=implicit.NormalCG())
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        d, p, sz = torch.zeros_like(r), torch.zeros_like(r), torch.ones_like(tol)
        active = norm(r) > tol
        taken = torch.zeros_like(tol, dtype=torch.int64)
        for _ in range(limit):
            s = op.rmatvec(r)
            z = m(s)
            sz_new = dot(s, z)
            p = z + _ratio(sz_new, sz, active) * p
            sz, q = sz_new, op.matvec(p)
            step = _ratio(sz, dot(q, q), active)
            d, r = torch.addcmul(d, step, p), torch.addcmul(r, step, q, value=-1)
            taken += active
            active = active & (norm(r) > tol) & (step.squeeze(-1) != 0)
            if not bool(active.any()):
                break
        return d, taken


@dataclass(frozen=True, eq=False)
class BiCGStab(Iterative):
    """Stabilized biconjugate gradients for any A, in constant memory; two products with A an iteration.

    Source: van der Vorst 1992, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG".

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> implicit.linear_solve(A, torch.tensor([4.0, 6.0], dtype=torch.float64), method=implicit.BiCGStab())
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        d, shadow, p, v = torch.zeros_like(r), r, torch.zeros_like(r), torch.zeros_like(r)
        rho, alpha, omega = torch.ones_like(tol), torch.ones_like(tol), torch.ones_like(tol)
        active = norm(r) > tol
        taken = torch.zeros_like(tol, dtype=torch.int64)
        for _ in range(limit):
            rho_new = dot(shadow, r)
            p = r + _ratio(rho_new * alpha, rho * omega, active) * (p - omega.unsqueeze(-1) * v)
            rho, p_hat = rho_new, m(p)
            v = op.matvec(p_hat)
            step = _ratio(rho, dot(shadow, v), active)
            s = torch.addcmul(r, step, v, value=-1)
            s_hat = m(s)
            t = op.matvec(s_hat)
            smooth = _ratio(dot(t, s), dot(t, t), active)
            d = d + step * p_hat + smooth * s_hat
            r = torch.addcmul(s, smooth, t, value=-1)
            alpha, omega = step.squeeze(-1), smooth.squeeze(-1)
            taken += active
            active = active & (norm(r) > tol) & (alpha != 0) & (omega != 0)
            if not bool(active.any()):
                break
        return d, taken


@dataclass(frozen=True, eq=False)
class GMRES(Iterative):
    """Generalized minimal residuals for any A, restarted; one product with A an iteration, right preconditioning.

    Args:
        restart: vectors kept, the memory; more of them converge in fewer iterations.

    Complexity: O(n restart) memory and work beside each product. Source: Saad, Schultz 1986.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> implicit.linear_solve(A, torch.tensor([2.0, -1.0], dtype=torch.float64), method=implicit.GMRES())
        tensor([1., 2.], dtype=torch.float64)
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"restart must be at least 1, got {self.restart}")

    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        steps, size = min(self.restart, limit, r.shape[-1]), norm(r)
        basis = [r * _ratio(torch.ones_like(size), size, size > 0)]
        triangle = torch.eye(steps, dtype=r.dtype, device=r.device).repeat(*size.shape, 1, 1)
        rhs = torch.zeros(*size.shape, steps, dtype=r.dtype, device=r.device)
        rotations: list[tuple[Tensor, Tensor]] = []
        active, left = size > tol, size
        taken = torch.zeros_like(tol, dtype=torch.int64)
        for k in range(steps):
            w = op.matvec(m(basis[k]))
            before, column = norm(w), torch.zeros(*size.shape, k + 1, dtype=r.dtype, device=r.device)
            kept = torch.stack(basis, -2)
            for _ in range(2):  # once loses orthogonality to rounding, twice is enough (Kahan, Parlett)
                h = dot(kept, w.unsqueeze(-2))
                w = w - (h.unsqueeze(-1) * kept).sum(-2)
                column = column + h
            below = norm(w)
            below = torch.where(below > 1e-14 * before if r.dtype == torch.float64 else below > 1e-6 * before, below, 0)
            h_list = list(column.unbind(-1))
            for i, (c, s) in enumerate(rotations):
                h_list[i], h_list[i + 1] = c * h_list[i] + s * h_list[i + 1], c * h_list[i + 1] - s * h_list[i]
            radius = torch.hypot(h_list[k], below)
            # radius 0: A is singular on the space so far, and the sample stops where it is
            active = active & (radius > 0)
            c, s = _ratio(h_list[k], radius, active).squeeze(-1), _ratio(below, radius, active).squeeze(-1)
            rotations.append((c, s))
            h_list[k] = radius
            # a sample that is done keeps the unit column and a right-hand side of 0: its coefficient here is 0
            triangle[..., : k + 1, k] = torch.where(
                active.unsqueeze(-1), torch.stack(h_list, -1), triangle[..., : k + 1, k]
            )
            rhs[..., k] = torch.where(active, c * left, 0)
            left = torch.where(active, -s * left, left)
            taken += active
            active = active & (left.abs() > tol)
            if k + 1 == steps or not bool(active.any()):
                break
            basis.append(w * _ratio(torch.ones_like(below), below, below > 0))
        used = len(rotations)
        y = torch.linalg.solve_triangular(triangle[..., :used, :used], rhs[..., :used].unsqueeze(-1), upper=True)
        return m((y * torch.stack(basis, -2)).sum(-2)), taken


@dataclass(frozen=True, eq=False)
class Neumann(Iterative):
    """The series x = sum_k (I - M A)^k M b, M the preconditioner or I: for A near the identity, as I - df/dz.

    Complexity: O(1 / (1 - |I - A|)) products with A.

    Example:
        >>> A = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
        >>> implicit.linear_solve(A, torch.tensor([2.0, 2.0], dtype=torch.float64), method=implicit.Neumann())
        tensor([1., 2.], dtype=torch.float64)
    """

    def _cycle(self, op: LinearOperator, m: Product, r: Tensor, tol: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        d, size = torch.zeros_like(r), norm(r)
        active = size > tol
        taken = torch.zeros_like(tol, dtype=torch.int64)
        for _ in range(limit):
            step = torch.where(active.unsqueeze(-1), m(r), 0)
            d, r = d + step, r - op.matvec(step)
            taken += active
            active = active & (norm(r) > tol) & (norm(r) < 1e8 * size)
            if not bool(active.any()):
                break
        return d, taken
