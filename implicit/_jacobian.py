"""The Jacobian of one evaluation, for each sample, and the linear solves with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.vmap import lazy_load_decompositions

from ._closure import raw, transforms
from .linear import LU, ConvergenceError, Direct, LinearOperator, LinearReport, LinearSolver
from .operator import legacy_vmap_level, norm, units, vjp, without_legacy_vmap

CHUNK = 2**13  # numbers that are pulled back at a time, where there is a batch
ON_FAIL = ("raise", "warn", "nan", "ignore")


def check_on_fail(on_fail: str) -> None:
    if on_fail not in ON_FAIL:
        raise ValueError(f"on_fail must be one of {', '.join(map(repr, ON_FAIL))}, got {on_fail!r}")


class Jacobian(LinearOperator):
    """J = dr/dz for each sample, from the graph of one evaluation."""

    def __init__(self, r: Tensor, z: Tensor, transposed: bool = False, cache: dict[str, Tensor] | None = None) -> None:
        self.r, self.z, self.transposed = r, z, transposed
        self.cache: dict[str, Tensor] = {} if cache is None else cache
        self.shape, self.dtype, self.device = torch.Size((*z.shape, z.shape[-1])), z.dtype, z.device
        # the base class would hold bound methods of this object, and only the garbage collector would free the graph
        self._rmatvec, self._dense, self.explicit = None, None, False

    def matvec(self, v: Tensor) -> Tensor:
        return self._vjp(v) if self.transposed else self._jvp(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._jvp(v) if self.transposed else self._vjp(v)

    @property
    def T(self) -> Jacobian:
        return Jacobian(self.r, self.z, not self.transposed, self.cache)

    def _each(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """``product`` for vectors with more leading dimensions than z has."""
        if v.ndim == self.z.ndim:
            return product(v)
        lead = v.shape[: v.ndim - self.z.ndim]
        if v.numel() == 0:
            return torch.zeros_like(v)
        flat = v.reshape(-1, *self.z.shape)
        # vmap repeats a batched matrix that F reads for every vector of a chunk
        few = max(1, CHUNK // self.z.numel()) if self.z.ndim > 1 else len(flat)
        try:
            if few >= len(flat):
                out = vectorized(product, flat)
            else:
                out = torch.cat([vectorized(product, part) for part in flat.split(few)])
        except RuntimeError:  # something in F has no vmap rule
            out = torch.stack([product(row) for row in flat])
        return out.reshape(*lead, *self.z.shape)

    def _vjp(self, u: Tensor) -> Tensor:
        return self._each(lambda x: vjp(self.r, self.z, x), u) if self.r.requires_grad else torch.zeros_like(u)

    def _jvp(self, v: Tensor) -> Tensor:
        # the derivative of the pullback in its cotangent
        if not self.r.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():
            w = torch.zeros_like(self.r, requires_grad=True)
            (g,) = torch.autograd.grad(self.r, self.z, w, create_graph=True, allow_unused=True)
        if g is None or not g.requires_grad:
            return torch.zeros_like(v)
        return self._each(lambda x: vjp(g, w, x), v)

    def dense(self) -> Tensor:
        if "J" not in self.cache:
            self.cache["J"] = self._vjp(units(self.z)).movedim(0, -2)
        return self.cache["J"].mT if self.transposed else self.cache["J"]

    def shifted(self, ridge: float) -> LinearOperator:
        if ridge == 0:
            return self
        eye = ridge * torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        shifted = super().shifted(ridge)
        shifted._dense = lambda: self.dense() + eye  # only direct solvers ask for it
        return shifted


def vectorized(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """torch.func.vmap of a function of one tensor, whose handling of pytrees would take longer than the product."""
    functorch = torch._C._functorch
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(len(rows), "error")
    try:
        out = product(functorch._add_batch_dim(rows, 0, level))
        return functorch._remove_batch_dim(out, level, len(rows), 0)
    finally:
        functorch._vmap_decrement_nesting()


class Solve(torch.autograd.Function):
    """Numbers through a linear solver that looks at them: under vmap it sees the vmapped dim as one more batch dim."""

    @staticmethod
    def forward(b: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return solve(b.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], b: Tensor, solve: Callable[[Tensor], Tensor]) -> Any:
        return solve_numbers(b.movedim(in_dims[0], 0), solve), 0


def solve_numbers(b: Tensor, solve: Callable[[Tensor], Tensor], level: int | None = None) -> Tensor:
    level = legacy_vmap_level() if level is None else level
    if level == 0:
        return Solve.apply(b, solve) if transforms() else solve(b.detach())
    size, _, (plain,) = without_legacy_vmap(level, b)
    assert plain is not None
    inner = solve_numbers(plain, solve, level - 1)
    return inner if size is None else torch._add_batch_dim(inner, 0, level)


@dataclass(eq=False)
class Adjoint:
    """How adjoint systems are solved, what happens when that fails, and where the report goes."""

    linear: LinearSolver
    on_fail: str = "raise"
    on_report: Callable[[LinearReport], None] | None = None

    def solve(self, op: LinearOperator, b: Tensor, *, transposed: bool) -> Tensor:
        """J^-1 b, or J'^-1 b, as numbers."""
        solver = self.linear.T if transposed else self.linear
        system = op.T if transposed else op

        def numbers(b: Tensor) -> Tensor:
            with torch.no_grad():
                x, report = solver.solve(system, b)
            if self.on_report is not None:
                self.on_report(report)
            if self.on_fail == "raise":
                report.check("the adjoint solve")
            elif self.on_fail != "ignore" and not bool(report.converged.all()):
                if self.on_fail == "warn":
                    try:
                        report.check("the adjoint solve")
                    except ConvergenceError as failure:
                        warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
                else:
                    x = torch.where(report.converged.unsqueeze(-1), x, torch.nan)
            return x.detach()

        return solve_numbers(b, numbers)


def jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """df/dz for each sample, (..., n, n)."""
    pull = torch.func.vjp(f, z)[1]
    return torch.func.vmap(lambda u: pull(u)[0])(units(z)).movedim(0, -2)


def direct(linear: LinearSolver) -> Direct:
    """The direct solver nearest to ``linear``."""
    return linear if isinstance(linear, Direct) else LU(getattr(linear, "ridge", 0.0))


def inverse(linear: LinearSolver, matrix: Tensor) -> Tensor:
    """What multiplies a right-hand side in the direct solver nearest to ``linear``."""
    linear = direct(linear)
    n = matrix.shape[-1]
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    shift = linear.ridge
    x, regular, reason = linear.solve_columns(matrix + shift * eye, eye.expand(matrix.shape))
    if not torch.compiler.is_compiling() and not bool(raw(regular).all()):
        raise ConvergenceError(f"the implicit derivative {reason}; LstSq() gives the one of least norm")
    return x.detach()


def distance(r: Tensor, slope: Tensor) -> Tensor:
    """A lower bound of the distance to a solution of the linearized equation, in the units of z; slope is J'r.

    If J d = -r then |r|^2 = -<J'r, d> <= |J'r| |d|.
    """
    size = norm(r)
    return torch.where(size == 0, 0, size * (size / norm(slope)))
