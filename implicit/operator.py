"""Linear operators, what a linear solver is, and what it reports.

A batch of systems A x = b has vectors of shape (..., n): every sample, an entry of the leading dimensions, is a system
of its own. Nothing here mixes samples, so that a result never depends on which others are solved beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


class ConvergenceError(RuntimeError):
    """A solver did not reach its tolerance, or a system has no unique solution; the message names the samples.

    Example:
        >>> try:
        ...     implicit.fixed_point(lambda z: 2 * z + 1, torch.tensor(1.0), method=implicit.Picard(), max_iter=3)
        ... except implicit.ConvergenceError as error:
        ...     print(str(error)[:37])
        fixed_point (Picard) did not converge
    """


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over the last dimension, the same to the bit for a sample alone and in a batch.

    torch splits a long sum over its threads when it is the only one: pieces of fixed length keep the order fixed.
    """
    product, piece = a * b, 4096
    if product.shape[-1] <= 4 * piece:
        return product.sum(-1)
    product = torch.nn.functional.pad(product, (0, -product.shape[-1] % piece))
    return product.unflatten(-1, (-1, piece)).sum(-1).sum(-1)


def norm(a: Tensor) -> Tensor:
    return dot(a, a).sqrt()


def apply_matrix(matrix: Tensor, v: Tensor) -> Tensor:
    """A v for A: (..., n, n) and v: (..., n)."""
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def vjp(y: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """u' dy/dx from a graph that is kept; zeros where y does not depend on x.

    This is what torch.autograd.grad calls; its handling of other arguments would take longer than a small product.
    """
    (g,) = _engine_run_backward((y,), (u,), True, False, (x,), True, accumulate_grad=False)
    return torch.zeros_like(x) if g is None else g


def units(like: Tensor) -> Tensor:
    """The n unit vectors for every sample: (n, *like.shape)."""
    n = like.shape[-1]
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return eye.reshape(n, *(1,) * (like.ndim - 1), n).expand(n, *like.shape)


def signs(like: Tensor, seed: int = 0) -> Tensor:
    """A fixed pseudo-random vector of +1 and -1 for each sample: |A u| is then close to A's Frobenius norm."""
    return sign_row(like, seed)[0].expand(like.shape)


def sign_row(like: Tensor, seed: int = 0) -> Tensor:
    """The vector as a row (1, n). Hashed from the position, so that no random state is touched."""
    key = (like.shape[-1], like.dtype, like.device, seed)
    row = _ROWS.get(key)
    if row is None or torch.compiler.is_compiling():
        with torch.inference_mode(False):
            i = torch.arange(like.shape[-1], device=like.device) + 1 + 7919 * seed
            mixed = ((i * 2862933555777941757) >> 33) * 3202034522624059733
            row = (1 - 2 * ((mixed >> 40) & 1)).to(like.dtype).unsqueeze(0)
        # under a transform or a compiler the tensor belongs to that
        if not torch.compiler.is_compiling() and type(row) is Tensor and not is_wrapped(row):
            if len(_ROWS) > 64:
                _ROWS.clear()
            _ROWS[key] = row
    return row


_ROWS: dict[tuple[Any, ...], Tensor] = {}


class LinearOperator:
    """A square matrix A, or a batch of them, known by its products with vectors.

    Args:
        shape: (..., n, n), the batch and the size.
        matvec: v -> A v, both (..., n), linear in v.
        rmatvec: v -> A' v; by default the derivative of ``matvec`` gives it.
        dense: () -> A as a tensor (..., n, n); by default n products make it.
        dtype, device: of the vectors.

    Raises:
        ValueError: the shape is not that of square matrices.

    Example:
        >>> A = implicit.LinearOperator((3, 3), lambda v: 2 * v)
        >>> A.T.dense()
        tensor([[2., 0., 0.],
                [0., 2., 0.],
                [0., 0., 2.]])
    """

    explicit: bool = False  # whether dense() costs next to nothing

    def __init__(
        self,
        shape: tuple[int, ...],
        matvec: Callable[[Tensor], Tensor],
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        *,
        dense: Callable[[], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = torch.Size(shape)
        if len(self.shape) < 2 or self.shape[-1] != self.shape[-2]:
            raise ValueError(f"a linear operator is square, of shape (..., n, n), got {tuple(self.shape)}")
        self.matvec, self.dtype, self.device = matvec, dtype, torch.device(device)
        self._rmatvec, self._dense = rmatvec, dense
        self.explicit = dense is not None

    @classmethod
    def from_tensor(cls, matrix: Tensor) -> LinearOperator:
        """The operator of a tensor (..., n, n)."""
        if matrix.ndim < 2:
            raise ValueError(f"a matrix has shape (..., n, n), got {tuple(matrix.shape)}")
        return cls(
            matrix.shape,
            lambda v: apply_matrix(matrix, v),
            lambda v: apply_matrix(matrix.mT, v),
            dense=lambda: matrix,
            dtype=matrix.dtype,
            device=matrix.device,
        )

    @property
    def T(self) -> LinearOperator:
        transposed = LinearOperator(
            self.shape,
            self.rmatvec,
            self.matvec,
            dense=lambda: self.dense().mT,
            dtype=self.dtype,
            device=self.device,
        )
        transposed.explicit = self.explicit
        return transposed

    def rmatvec(self, v: Tensor) -> Tensor:
        """A' v, from the derivative of ``matvec`` where nothing better was given; its graph is built once."""
        if self._rmatvec is None:
            self._rmatvec = _pullback(self.matvec)
        return self._rmatvec(v)

    def dense(self) -> Tensor:
        """The matrix as a tensor (..., n, n)."""
        if self._dense is not None:
            return self._dense()
        eye = units(torch.empty(self.shape[:-1], dtype=self.dtype, device=self.device))
        return torch.func.vmap(self.matvec)(eye).movedim(0, -1) if len(eye) else eye.new_zeros(self.shape)

    def shifted(self, ridge: float) -> LinearOperator:
        """A + ridge I."""
        if ridge == 0:
            return self
        dense = self._dense

        def shifted_dense() -> Tensor:
            assert dense is not None
            return dense() + ridge * torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)

        return LinearOperator(
            self.shape,
            lambda v: self.matvec(v) + ridge * v,
            lambda v: self.rmatvec(v) + ridge * v,
            dense=None if dense is None else shifted_dense,
            dtype=self.dtype,
            device=self.device,
        )

    def __repr__(self) -> str:
        return f"LinearOperator(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _pullback(matvec: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """u -> A' u; the graph of one product is kept for the calls that follow."""
    graphs: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def pull(u: Tensor) -> Tensor:
        if u.shape not in graphs:
            with torch.inference_mode(False), torch.enable_grad():
                v = torch.zeros_like(u).requires_grad_()
                graphs[u.shape] = v, matvec(v)
        v, y = graphs[u.shape]
        if not y.requires_grad:
            raise ValueError("A v does not depend on v through torch operations; give LinearOperator its rmatvec=")
        with torch.inference_mode(False):
            return torch.autograd.grad(y, v, u.clone() if u.is_inference() else u, retain_graph=True)[0]

    return pull


class LinearReport:
    """How a solve went, for each sample (shape: the batch): ``residual`` is |b - A x| / |b|.

    Example:
        >>> op = implicit.LinearOperator((2, 2), lambda v: 2 * v)
        >>> implicit.CG().solve(op, torch.ones(2))[1].iterations
        tensor(1)
    """

    def __init__(
        self,
        converged: Tensor,
        iterations: Tensor,
        residual: Tensor | Callable[[], Tensor],
        reason: str = "did not converge",
    ) -> None:
        self.converged, self.iterations, self.reason, self._residual = converged, iterations, reason, residual

    @property
    def residual(self) -> Tensor:
        """Computed when first asked for, by solvers that do not need it themselves."""
        if not isinstance(self._residual, Tensor):
            self._residual = self._residual()
        return self._residual

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)}" for name in ("converged", "iterations", "residual"))
        return f"LinearReport({fields})"

    def check(self, what: str = "the linear solve") -> None:
        """Raise ConvergenceError with the samples that failed, if any did."""
        if bool(self.converged.all()):
            return
        bad = (~self.converged).reshape(-1).nonzero().squeeze(-1).tolist()
        worst = self.residual[~self.converged].nan_to_num(nan=float("inf")).max().item()
        count = f"{len(bad)} of {self.converged.numel()} samples ({_list(bad)})"
        named = "" if self.converged.ndim == 0 else f" in {count}"
        raise ConvergenceError(
            f"{what} {self.reason}{named}: relative residual {worst:.1e} after {int(self.iterations.max())} "
            "iterations. A singular system has no unique solution: use LstSq() for the one of least norm, or ridge=; "
            "for a slow iteration raise max_iter, loosen rtol, or give a preconditioner"
        )


def _list(items: list[int]) -> str:
    return ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")


class LinearSolver(ABC):
    """How A x = b is solved: frozen objects that hold only their parameters.

    ``solve`` works on numbers, without derivatives unless the class says otherwise, and reports rather than raises;
    ``T`` is the solver for A', whose result on ``op.T`` is the same as that of a solver made for A'.
    """

    @abstractmethod
    def solve(self, op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, LinearReport]:
        """x: (..., n) with A x = b for b: (..., n), starting from x0 where that helps."""

    @property
    def T(self) -> LinearSolver:
        return self


def check_system(op: LinearOperator, b: Tensor, x0: Tensor | None = None) -> None:
    if b.ndim == 0 or b.shape[-1] != op.shape[-1]:
        raise ValueError(f"A of shape {tuple(op.shape)} needs vectors (..., {op.shape[-1]}), got b {tuple(b.shape)}")
    if not b.is_floating_point():
        raise TypeError(f"b must be real and floating point, got {b.dtype}; convert it first")
    if b.dtype != op.dtype:
        raise TypeError(f"A is {op.dtype} and b is {b.dtype}: convert one to the other's dtype")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape {tuple(b.shape)} of b, got {tuple(x0.shape)}")


def as_operator(matrix: Any, like: Tensor) -> LinearOperator:
    """A tensor, callable or LinearOperator as an operator on vectors shaped like ``like``."""
    if isinstance(matrix, LinearOperator):
        return matrix
    if isinstance(matrix, Tensor):
        return LinearOperator.from_tensor(matrix)
    if callable(matrix):
        shape = (*like.shape, like.shape[-1])
        return LinearOperator(shape, matrix, dtype=like.dtype, device=like.device)
    raise TypeError(f"expected a tensor, a callable v -> A v, or a LinearOperator, got {type(matrix).__name__}")


# --- below the wrappers of torch.func and of the first vmap -----------------------------------------------------------


def is_wrapped(t: Tensor) -> bool:
    """Whether a transform of torch.func, or the first vmap, is at work on the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def unwrapped(t: Tensor) -> Tensor:
    """The numbers of a tensor, below grad, jvp and vmap; the dimensions of vmap come first."""
    for level in range(legacy_vmap_level(), 0, -1):
        if torch._C._functorch.is_legacy_batchedtensor(t):
            t = torch._remove_batch_dim(t, level, 1, 0)
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def legacy_vmap_level() -> int:
    """How deep we are in the vmap that torch.autograd.functional and gradcheck use."""
    if torch.compiler.is_compiling():
        return 0
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def without_legacy_vmap(level: int, *tensors: Any) -> tuple[int | None, tuple[int | None, ...], tuple[Any, ...]]:
    """(batch size or None, dims, tensors): the batch dimension of ``level``, where there is one, made visible."""
    batched = [t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors]
    if not any(batched):
        return None, (None,) * len(tensors), tensors
    plain = [torch._remove_batch_dim(t, level, 1, 0) if i else t for t, i in zip(tensors, batched, strict=True)]
    size = max(t.shape[0] for t, i in zip(plain, batched, strict=True) if i)
    return size, tuple(0 if i else None for i in batched), tuple(plain)


def forward_levels() -> int:
    """How many levels of forward mode are active; at least one under torch.compile, which does not tell."""
    if torch.compiler.is_compiling():
        return 1
    stack = torch._C._functorch.get_interpreter_stack() or []
    levels = sum(i.key() == torch._C._functorch.TransformType.Jvp for i in stack)
    return max(levels, int(torch.autograd.forward_ad._current_level >= 0))


def is_false(condition: Tensor) -> bool:
    """Whether the values at hand say no; unknown, hence False, where torch.compile or a fake tensor has none."""
    if torch.compiler.is_compiling():
        return False
    condition = unwrapped(condition)
    return type(condition) is Tensor and not condition.is_meta and not bool(condition.all())


def raise_unconverged(report: LinearReport) -> None:
    """Raise ConvergenceError unless every sample converged."""
    if is_false(report.converged):
        converged, iterations, residual = map(unwrapped, (report.converged, report.iterations, report.residual))
        LinearReport(converged, iterations, residual, report.reason).check()
