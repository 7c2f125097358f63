"""Linear solves with exact derivatives of every order: A(theta) x = b.

The derivative rule, once for all solvers. With A x = b,

    A dx = db - (dA) x,          so    tangent: x' = A^-1 (b' - A' x),
                                       cotangent of x, v:  r = A'^-1 v,  b-bar = r,  theta-bar = -d/dtheta <r, A(theta) x>.

Both are made of products with A and of further solves by the same function, so derivatives of all orders follow.
Direct solvers on a matrix need no rule: torch differentiates ``torch.linalg.solve`` in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .krylov import CG, GMRES, BiCGStab, Iterative, Neumann, NormalCG
from .operator import (
    ConvergenceError,
    LinearOperator,
    LinearReport,
    LinearSolver,
    as_operator,
    check_system,
    legacy_vmap_level,
    nested_forward,
    norm,
    signs,
    unwrapped,
    without_legacy_vmap,
)

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "Auto",
    "BiCGStab",
    "Cholesky",
    "ConvergenceError",
    "LinearOperator",
    "LinearReport",
    "LinearSolver",
    "LstSq",
    "Neumann",
    "NormalCG",
    "solve_parametric",
]


@dataclass(frozen=True, eq=False)
class Direct(LinearSolver):
    """What solvers of the dense matrix share: plain torch operations, differentiable as they stand.

    Args:
        ridge: solve (A + ridge I) x = b instead.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}")

    @property
    def direct(self) -> bool:
        return True

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        check_system(op, b, x0)
        matrix = op.shifted(self.ridge).dense()
        x, fine, reason = self.solve_columns(matrix, b.unsqueeze(-1))
        x = x.squeeze(-1)
        with torch.no_grad():
            error = norm((matrix @ x.unsqueeze(-1)).squeeze(-1) - b)
            residual = torch.where(error == 0, 0, error / norm(b))
            converged = fine & residual.isfinite()
        return x, LinearReport(converged, torch.ones_like(converged, dtype=torch.int64), residual, reason)

    def solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        """(x, regular, reason): A x = b for b: (..., n, k), which samples have a unique solution, and if not, why."""
        raise NotImplementedError


def regular(matrix: Tensor, info: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether A is regular to working precision, from its factorization.

    For a fixed random u the growth |A| |A^-1 u| / |u| is nearly the condition number; that of the right-hand side
    itself tells nothing where it is in the range of a singular A.
    """
    u = signs(matrix[..., 0])
    growth = norm(matrix.flatten(-2)) * norm(solve(u.unsqueeze(-1)).squeeze(-1)) / norm(u)
    return (info == 0) & ~(growth >= 0.1 / torch.finfo(matrix.dtype).eps) & growth.isfinite()


def _spread(factor: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(factor.shape[:-2], b.shape[:-2])
    return factor.expand(*batch, *factor.shape[-2:]), b.expand(*batch, *b.shape[-2:])


@dataclass(frozen=True, eq=False)
class LU(Direct):
    """Gaussian elimination of the dense matrix. A matrix singular to working precision is reported.

    Complexity: O(n^3) time, O(n^2) memory.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> linear_solve(A, torch.tensor([4.0, 3.0]), method=LU())
        tensor([3., 2.])
    """

    def solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        # not torch.linalg.solve: its forward derivative holds the factors constant, so that reverse or forward mode
        # over forward mode is silently wrong (torch 2.13)
        factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
        f = factor.detach()
        fine = regular(matrix.detach(), info, lambda u: torch.linalg.lu_solve(f, pivots, u))
        return torch.linalg.lu_solve(factor, pivots, b), fine, "found a singular matrix"


@dataclass(frozen=True, eq=False)
class Cholesky(Direct):
    """Cholesky factorization of a symmetric positive definite matrix, of which it reads the lower triangle.

    Raises:
        ValueError: the matrix is not symmetric.

    Complexity: O(n^3 / 3) time, O(n^2) memory.

    Example:
        >>> A = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([6.0, 5.0]), method=Cholesky())
        tensor([1., 1.])
    """

    def solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        gap = (matrix - matrix.mT).detach().abs().amax()
        bound = torch.finfo(b.dtype).eps ** 0.5 * matrix.detach().abs().amax()
        if is_false(gap <= bound):
            raise ValueError("Cholesky needs a symmetric matrix; use LU(), or symmetrize it: (A + A.mT) / 2")
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
        f = factor.detach()
        fine = regular(matrix.detach(), info, lambda u: torch.cholesky_solve(u, f))
        factor, b = _spread(factor, b)
        return torch.cholesky_solve(b, factor), fine, "found a matrix that is not positive definite"


@dataclass(frozen=True, eq=False)
class LstSq(Direct):
    """The least-squares solution of least norm, x = A^+ b, for any matrix, singular ones included.

    Args:
        rtol: singular values below rtol times the largest count as zero; ``None`` is n times machine epsilon.
        ridge: use (A + ridge I)^+ instead.

    The derivative is that of A^+ b at constant rank. The residual of the report is 0 only where b is in A's range.
    Complexity: O(n^3), about twenty times LU. Source: Golub, Pereyra 1973.

    Example:
        >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        >>> linear_solve(A, torch.tensor([2.0, 2.0], dtype=torch.float64), method=LstSq())
        tensor([1., 1.], dtype=torch.float64)
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must be in [0, 1), got {self.rtol}")

    def solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        rtol = matrix.shape[-1] * torch.finfo(matrix.dtype).eps if self.rtol is None else self.rtol
        x = torch.linalg.pinv(matrix, rtol=rtol) @ b
        return x, torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device), "has no finite solution"


@dataclass(frozen=True, eq=False)
class Auto(LinearSolver):
    """LU where the matrix is at hand or has at most ``dense`` rows; beyond that CG if A is symmetric, else GMRES.

    ``choose(op)`` says which. CG that meets an indefinite A fails, and GMRES goes on from where it stopped.

    Args:
        dense: number of unknowns up to which the matrix of a matrix-free operator is made.
        rtol, atol, max_iter, preconditioner, ridge: see ``CG``; the direct solver uses only ``ridge``.

    Example:
        >>> Auto().choose(LinearOperator((1000, 1000), lambda v: 3 * v))
        CG(rtol=None, atol=0.0, max_iter=None, preconditioner=None, ridge=0.0)
    """

    dense: int = 512
    rtol: float | None = None
    atol: float = 0.0
    max_iter: int | None = None
    preconditioner: Any = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        self._iterative(GMRES)

    def _iterative(self, kind: type[Iterative]) -> Iterative:
        return kind(self.rtol, self.atol, self.max_iter, self.preconditioner, self.ridge)

    def is_direct(self, op: LinearOperator) -> bool:
        return op.explicit or op.shape[-1] <= self.dense

    @property
    def T(self) -> LinearSolver:
        return replace(self, preconditioner=getattr(self._iterative(GMRES).T, "preconditioner", None))

    def choose(self, op: LinearOperator) -> LinearSolver:
        """The solver for ``op``; asking costs two products with it where it is large."""
        if self.is_direct(op):
            return LU(self.ridge)
        cg = self._iterative(CG)
        u = signs(torch.empty(op.shape[:-1], dtype=op.dtype, device=op.device))
        try:
            with torch.no_grad():
                cg._probe(op, u, op.matvec(u))
        except ValueError:
            return self._iterative(GMRES)
        return cg

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        check_system(op, b, x0)
        solver = self.choose(op)
        x, report = solver.solve(op, b, x0)
        if isinstance(solver, CG) and not bool(report.converged.all()):
            return self._iterative(GMRES).solve(op, b, x)
        return x, report


def is_false(condition: Tensor) -> bool:
    """Whether the values at hand say no; unknown, hence False, where torch.compile or a fake tensor has none."""
    if torch.compiler.is_compiling():
        return False
    condition = unwrapped(condition)
    return type(condition) is Tensor and not condition.is_meta and not bool(condition.all())


def raise_unconverged(report: LinearReport) -> None:
    """Raise ConvergenceError unless every sample converged."""
    if is_false(report.converged):
        plain = (unwrapped(t) for t in (report.converged, report.iterations, report.residual))
        LinearReport(*plain, report.reason).check()


# --- the implicit rule ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A(params) v = apply(v, *params), linear in v, and how it is solved."""

    apply: Callable[..., Tensor]
    solver: LinearSolver
    operator: Callable[..., LinearOperator] | None = None  # a faster form of A for the solver
    on_report: Callable[[LinearReport], None] = raise_unconverged
    original: System | None = None  # the system that this one is the transpose of

    @property
    def T(self) -> System:
        if self.original is not None:
            return self.original

        def transposed(v: Tensor, *params: Tensor) -> Tensor:
            _, pull = torch.func.vjp(lambda u: self.apply(u, *params), torch.zeros_like(v))
            return pull(v)[0]

        operator = self.operator
        fast = None if operator is None else lambda *params: operator(*params).T
        return System(transposed, self.solver.T, fast, self.on_report, self)

    def at(self, params: tuple[Tensor, ...], like: Tensor) -> LinearOperator:
        if self.operator is not None:
            return self.operator(*params)
        original = self.original
        if original is not None:
            return original.at(params, like).T
        return as_operator(lambda v: self.apply(v, *params), like)

    def batched(self, dims: tuple[int | None, ...]) -> System:
        """The system with one more leading dimension, for vmap."""
        if self.original is not None:
            return self.original.batched(dims).T
        apply = torch.func.vmap(self.apply, in_dims=(0, *dims))
        return System(apply, self.solver, None, self.on_report)


class Solve(torch.autograd.Function):
    """x = A(params)^-1 b. The rule at the head of this file."""

    @staticmethod
    def forward(system: System, b: Tensor, x0: Tensor | None, *params: Tensor) -> Tensor:
        params = tuple(p.detach() for p in params)
        x, report = system.solver.solve(system.at(params, b), b.detach(), x0)
        system.on_report(report)
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        system, _, _, *params = inputs
        ctx.system = system
        ctx.save_for_backward(output, *params)
        ctx.save_for_forward(output, *params)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        x, *params = ctx.saved_tensors
        system: System = ctx.system
        r = solve(system.T, v, None, *params)
        if not any(ctx.needs_input_grad[3:]):
            return None, r, None, *(None for _ in params)
        _, pull = torch.func.vjp(lambda *p: system.apply(x, *p), *params)
        return None, r, None, *pull(-r)

    @staticmethod
    def jvp(ctx: Any, _system: Any, db: Tensor | None, _x0: Any, *dparams: Tensor | None) -> Tensor:
        if nested_forward():
            raise NotImplementedError(
                "forward mode over forward mode is not exact through a matrix-free solve; "
                "use torch.func.hessian or jacfwd(jacrev(f)), or a direct solver such as LU()"
            )
        x, *params = ctx.saved_tensors
        system: System = ctx.system
        moved = [i for i, d in enumerate(dparams) if d is not None]
        rhs = torch.zeros_like(x) if db is None else db
        if moved:
            # (dA) x as the derivative in w of the pullback of p -> A(p) x: torch.func.jvp cannot run in here
            def product(*part: Tensor) -> Tensor:
                full = list(params)
                for i, p in zip(moved, part, strict=True):
                    full[i] = p
                return system.apply(x, *full)

            _, pull = torch.func.vjp(product, *(params[i] for i in moved))
            _, push = torch.func.vjp(lambda w: pull(w), torch.zeros_like(x))
            rhs = rhs - push(tuple(dparams[i] for i in moved))[0]
        return solve(system, rhs, None, *params)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], system: System, b: Tensor, x0: Any, *params: Tensor) -> Any:
        return solve_batched(system, info.batch_size, in_dims[1:], b, x0, *params), 0


def solve_batched(
    system: System, size: int, dims: tuple[int | None, ...], b: Tensor, x0: Tensor | None, *params: Tensor, level: int | None = None
) -> Tensor:
    """The solve with one more dimension of ``size`` systems, first in the result; ``dims`` says where it is in each."""
    front = [t if d is None else t.movedim(d, 0) for t, d in zip((b, x0, *params), dims, strict=True)]
    b, x0 = (t if t is None or d is not None else t.expand(size, *t.shape) for t, d in zip(front, dims[:2], strict=False))
    batched = system.batched(tuple(None if d is None else 0 for d in dims[2:]))
    return solve(batched, b, x0, *front[2:], level=level)


def solve(system: System, b: Tensor, x0: Tensor | None, *params: Tensor, level: int | None = None) -> Tensor:
    x0 = None if x0 is None else x0.detach()
    level = legacy_vmap_level() if level is None else level
    if level == 0:
        return Solve.apply(system, b, x0, *params)
    # torch.autograd.functional and gradcheck still use the first vmap, which knows nothing of a Function's vmap rule
    size, dims, tensors = without_legacy_vmap(level, b, x0, *params)
    if size is None:
        return solve(system, b, x0, *params, level=level - 1)
    x = solve_batched(system, size, dims, *tensors, level=level - 1)
    return torch._add_batch_dim(x, 0, level)


def solve_parametric(
    apply: Callable[..., Tensor],
    params: tuple[Tensor, ...],
    b: Tensor,
    solver: LinearSolver,
    *,
    x0: Tensor | None = None,
    operator: Callable[..., LinearOperator] | None = None,
    on_report: Callable[[LinearReport], None] = raise_unconverged,
) -> Tensor:
    """x with A(params) x = b, where A(params) v = apply(v, *params): exact derivatives in b and params.

    ``operator(*params)`` may give a faster form of A for the solver; ``on_report`` sees the report of every solve,
    those of the derivatives included, and raises where it should.
    """
    return solve(System(apply, solver, operator, on_report), b, x0, *params)
