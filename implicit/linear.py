"""Direct solvers, the automatic choice, and :func:`linear_solve`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._closure import Recorder, Substitute, check_recorded, eager
from ._solve import solve_parametric
from .krylov import CG, GMRES, BiCGStab, Iterative, Neumann, NormalCG, NotSymmetricError
from .operator import (
    ConvergenceError,
    LinearOperator,
    LinearReport,
    LinearSolver,
    apply_matrix,
    as_operator,
    check_system,
    forward_levels,
    is_false,
    is_wrapped,
    norm,
    raise_unconverged,
    sign_row,
    signs,
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
    "linear_solve",
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

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        check_system(op, b, x0)
        matrix = op.shifted(self.ridge).dense()
        x, fine, reason = self.solve_columns(matrix, b.unsqueeze(-1))
        x = x.squeeze(-1)
        numbers = x.detach()
        converged = fine & (torch.linalg.vector_norm(numbers, dim=-1) < torch.inf)

        def residual() -> Tensor:
            error = norm(apply_matrix(matrix.detach(), numbers) - b.detach())
            return torch.where(error == 0, 0, error / norm(b.detach()))

        return x, LinearReport(converged, torch.ones_like(converged, dtype=torch.int64), residual, reason)

    def solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        """(x, regular, reason): A x = b for b: (..., n, k), which samples have a unique solution, and if not, why."""
        if matrix.dtype not in (torch.float16, torch.bfloat16):
            return self._solve_columns(matrix, b)
        x, fine, reason = self._solve_columns(matrix.float(), b.float())  # LAPACK has no half precision
        return x.to(b.dtype), fine, reason

    @abstractmethod
    def _solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        """The same for a dtype that LAPACK has."""


def _regular(matrix: Tensor, info: Tensor, solution: Tensor) -> Tensor:
    """Whether A is regular to working precision, from the solution for :func:`sign_row`.

    For a fixed random u the growth |A| |A^-1 u| / |u| is nearly the condition number; that of the right-hand side
    itself tells nothing where it is in the range of a singular A.
    """
    matrix, solution = matrix.detach(), solution.detach()
    bound = 0.1 * matrix.shape[-1] ** 0.5 / torch.finfo(matrix.dtype).eps
    # NaN and infinity are not below the bound
    plain = eager() and type(solution) is Tensor and not is_wrapped(solution)  # fake tensors have no numbers
    if plain and matrix.ndim == 2 and matrix.device.type == "cpu":  # Python's are faster than tensors
        growth = torch.linalg.vector_norm(matrix).item() * torch.linalg.vector_norm(solution).item()
        return torch.tensor(info.item() == 0 and growth < bound)
    growth = torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(solution, dim=(-2, -1))
    return (info == 0) & (growth < bound)


@dataclass(frozen=True, eq=False)
class LU(Direct):
    """Gaussian elimination of the dense matrix. A matrix singular to working precision is reported.

    Complexity: O(n^3) time, O(n^2) memory.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> implicit.linear_solve(A, torch.tensor([4.0, 3.0]), method=implicit.LU())
        tensor([3., 2.])
    """

    def _solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        if matrix.shape[-1] == 0:
            return matrix @ b, torch.ones(matrix.shape[:-2], dtype=torch.bool, device=b.device), ""
        rows, u = b.mT, sign_row(matrix)
        if matrix.ndim > 2 or b.ndim > 2:
            batch = torch.broadcast_shapes(matrix.shape[:-2], b.shape[:-2])
            rows, u = (t.expand(*batch, *t.shape[-2:]) for t in (rows, u))
        both = torch.cat([rows, u], -2).mT  # by columns, as LAPACK wants it
        if forward_levels() == 0:
            x, info = torch.linalg.solve_ex(matrix, both)
        else:
            # The forward derivative of torch.linalg.solve holds its factors constant, so that reverse or forward mode
            # over it is silently wrong; torch.linalg.lu_solve is wrong where its arguments broadcast (torch 2.13).
            factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
            order = torch.lu_unpack(factor.detach(), pivots)[0]
            x = torch.linalg.solve_triangular(factor, order.mT @ both, upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(factor, x, upper=True)
        return x[..., :-1], _regular(matrix, info, x[..., -1:]), "found a singular matrix"


@dataclass(frozen=True, eq=False)
class Cholesky(Direct):
    """Cholesky factorization of a symmetric positive definite matrix, of which it reads the lower triangle.

    Raises:
        ValueError: the matrix is not symmetric.

    Complexity: O(n^3 / 3) time, O(n^2) memory.

    Example:
        >>> A = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
        >>> implicit.linear_solve(A, torch.tensor([6.0, 5.0]), method=implicit.Cholesky())
        tensor([1., 1.])
    """

    def _solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
        gap = (matrix - matrix.mT).detach().abs().amax()
        bound = torch.finfo(b.dtype).eps ** 0.5 * matrix.detach().abs().amax()
        if is_false(gap <= bound):
            raise ValueError("Cholesky needs a symmetric matrix; use LU(), or symmetrize it: (A + A.mT) / 2")
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
        x = torch.cholesky_solve(b, factor)
        fine = _regular(matrix, info, torch.cholesky_solve(sign_row(matrix).mT.expand(*matrix.shape[:-1], 1), factor))
        return x, fine, "found a matrix that is not positive definite"


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
        >>> implicit.linear_solve(A, torch.tensor([2.0, 2.0], dtype=torch.float64), method=implicit.LstSq())
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must be in [0, 1), got {self.rtol}")

    def _solve_columns(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
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
        >>> implicit.Auto().choose(implicit.LinearOperator((1000, 1000), lambda v: 3 * v))
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
        if self.preconditioner is None:
            return self
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
        except NotSymmetricError:
            return self._iterative(GMRES)
        return cg

    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        check_system(op, b, x0)
        if self.is_direct(op):
            return LU(self.ridge).solve(op, b, x0)
        try:
            x, report = self._iterative(CG).solve(op, b, x0)
        except NotSymmetricError:
            return self._iterative(GMRES).solve(op, b, x0)
        return (x, report) if bool(report.converged.all()) else self._iterative(GMRES).solve(op, b, x)


# --- the public solve -------------------------------------------------------------------------------------------------


def linear_solve(
    A: Tensor | Callable[[Tensor], Tensor] | LinearOperator,
    b: Tensor,
    *,
    method: LinearSolver = Auto(),
    x0: Tensor | None = None,
) -> Tensor:
    """x = A^-1 b, differentiable to every order in b and in all that A is made of.

    Args:
        A: a tensor (..., n, n), a linear function v -> A v of vectors (..., n), or a LinearOperator. Tensors that the
            function closes over get their gradients; iterative methods never form the matrix.
        b: a vector or, for a tensor A, also a matrix (..., n, k) of right-hand sides, told apart as in
            ``torch.linalg.solve``.
        method: ``Auto()``, ``LU()``, ``Cholesky()``, ``LstSq()``, ``CG()``, ``NormalCG()``, ``GMRES()``,
            ``BiCGStab()`` or ``Neumann()``.
        x0: where an iterative method starts; it never changes the derivative.

    Raises:
        ConvergenceError: a sample is singular or did not converge, here or in a derivative; the message names it.

    Example:
        >>> scale = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> x = implicit.linear_solve(lambda v: scale * v, torch.ones(2))
        >>> torch.autograd.grad(x.sum(), scale)[0]
        tensor([-0.2500, -0.0625])
    """
    if not isinstance(method, LinearSolver):
        raise TypeError(f"method must be a linear solver such as CG(), got {method!r}")
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, got {type(b).__name__}")
    if not isinstance(A, Tensor):
        op = as_operator(A, b)
        check_system(op, b, x0)
        return _solve_operator(op, b, method, x0)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, of shape (..., n, n), got {tuple(A.shape)}")
    vector = b.ndim == 1 or b.shape == A.shape[:-1]
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape {tuple(b.shape)} of b, got {tuple(x0.shape)}")
    check_system(LinearOperator(A.shape, torch.clone, dtype=A.dtype), b if vector else b.mT)
    if isinstance(method, Auto):
        method = LU(method.ridge)
    if isinstance(method, Direct):
        return _solve_direct(A, b, method, vector)
    if vector:
        batch = torch.broadcast_shapes(A.shape[:-1], b.shape)
        b, x0 = b.expand(batch), None if x0 is None else x0.expand(batch)
        return solve_parametric(
            lambda v, a: apply_matrix(a, v), (A,), b, method, x0=x0, operator=LinearOperator.from_tensor
        )
    # the columns of b are one more batch dimension
    shape = (*torch.broadcast_shapes(A.shape[:-2], b.shape[:-2]), *b.shape[-2:])
    b, x0 = b.expand(shape), None if x0 is None else x0.expand(shape)
    return solve_parametric(
        lambda v, a: apply_matrix(a.unsqueeze(-3), v),
        (A,),
        b.mT,
        method,
        x0=None if x0 is None else x0.mT,
        operator=lambda a: LinearOperator.from_tensor(a.unsqueeze(-3)),
    ).mT


def _solve_direct(A: Tensor, b: Tensor, method: Direct, vector: bool) -> Tensor:
    matrix = A + method.ridge * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) if method.ridge else A
    columns = b.unsqueeze(-1) if vector else b
    x, fine, reason = method.solve_columns(matrix, columns)
    if is_false(fine):
        with torch.no_grad():
            residual = norm((matrix @ x - columns).mT).amax(-1) / norm(columns.mT).amax(-1)
        raise_unconverged(LinearReport(fine, torch.ones_like(fine, dtype=torch.int64), residual, reason))
    return x.squeeze(-1) if vector else x


def _solve_operator(op: LinearOperator, b: Tensor, method: LinearSolver, x0: Tensor | None) -> Tensor:
    if isinstance(method, Auto) and method.is_direct(op):
        method = LU(method.ridge)
    if isinstance(method, Direct):
        matrix = op.dense()
        if matrix.shape[-2:] != op.shape[-2:]:
            raise ValueError(
                f"A must map vectors of {b.shape[-1]} numbers to as many, its matrix is {matrix.shape[-2:]}"
            )
        x, report = method.solve(LinearOperator.from_tensor(matrix), b)
        raise_unconverged(report)
        _check_linear(op, matrix, x)
        return x
    closed = closed_over(op.matvec, b)

    def apply(v: Tensor, *params: Tensor) -> Tensor:
        with Substitute(closed, params):
            return op.matvec(v)

    # with nothing closed over, the operator's own products are as good in every transform
    return solve_parametric(apply, tuple(closed), b, method, x0=x0, operator=None if closed else lambda: op)


def _check_linear(op: LinearOperator, matrix: Tensor, x: Tensor) -> None:
    """Raise where A x is not the product with A's columns."""
    with torch.no_grad():
        x, matrix = x.detach(), matrix.detach()
        gap = norm(op.matvec(x) - apply_matrix(matrix, x))
        bound = torch.finfo(x.dtype).eps ** 0.5 * (norm(matrix.flatten(-2)) * norm(x))
    if is_false(gap <= bound):
        raise ValueError("A is not linear: A(x) differs from the combination of its columns; A(0) must be 0")


def closed_over(f: Callable[[Tensor], Tensor], v: Tensor) -> list[Tensor]:
    """The floating-point tensors from outside that f(v) depends on and that may need a derivative."""
    with torch.enable_grad():
        probe = torch.ones_like(v)
        start = probe.requires_grad_().view_as(probe).grad_fn if eager() else None
        with Recorder([probe]) as recorder:
            y = f(probe)
    if y.shape != v.shape:
        raise ValueError(f"A must map vectors to vectors of the same shape, got {tuple(v.shape)} -> {tuple(y.shape)}")
    closed = [t for t, _ in recorder.outside.values() if t.is_floating_point() and _tracked(t)]
    if start is not None:
        check_recorded(y, start._sequence_nr(), [probe, *closed])
    return closed


def _tracked(t: Tensor) -> bool:
    return t.requires_grad or is_wrapped(t) or torch.autograd.forward_ad.unpack_dual(t).tangent is not None
