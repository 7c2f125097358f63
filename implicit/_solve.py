"""A solve A(theta) x = b whose derivatives of every order are solves again, for any solver.

The derivative rule, once for all. With A x = b,

    A dx = db - (dA) x,      tangent:    x' = A^-1 (b' - A' x)
                             cotangent:  r = A'^-1 v,  b-bar = r,  theta-bar = -d/dtheta <r, A(theta) x>.

Both are made of products with A and of further solves by the same function, so derivatives of all orders follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operator import (
    LinearOperator,
    LinearReport,
    LinearSolver,
    as_operator,
    forward_levels,
    legacy_vmap_level,
    raise_unconverged,
    without_legacy_vmap,
)


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
            return pullback(lambda u: self.apply(u, *params), torch.zeros_like(v))(v)[0]

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


def pullback(f: Callable[..., Any], *primals: Tensor) -> Callable[[Any], tuple[Tensor, ...]]:
    """v -> v' df/dprimals at ``primals``, itself differentiable."""
    result: Any = torch.func.vjp(f, *primals)
    return result[1]


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
        return None, r, None, *pullback(lambda *p: system.apply(x, *p), *params)(-r)

    @staticmethod
    def jvp(ctx: Any, _system: Any, db: Tensor | None, _x0: Any, *dparams: Tensor | None) -> Tensor:
        if forward_levels() > 1:
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

            pull = pullback(product, *(params[i] for i in moved))
            push = pullback(pull, torch.zeros_like(x))
            rhs = rhs - push(tuple(dparams[i] for i in moved))[0]
        return solve(system, rhs, None, *params)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], system: System, b: Tensor, x0: Any, *params: Tensor) -> Any:
        return solve_batched(system, info.batch_size, in_dims[1:], b, x0, *params), 0


def solve_batched(
    system: System,
    size: int,
    dims: tuple[int | None, ...],
    b: Tensor,
    x0: Tensor | None,
    *params: Tensor,
    level: int | None = None,
) -> Tensor:
    """The solve with one more dimension of ``size`` systems, first in the result; ``dims`` says where it is in each."""

    def front(t: Tensor, d: int | None) -> Tensor:
        return t if d is None else t.movedim(d, 0)

    def spread(t: Tensor, d: int | None) -> Tensor:
        return t.expand(size, *t.shape) if d is None else t.movedim(d, 0)

    batched = system.batched(tuple(None if d is None else 0 for d in dims[2:]))
    x0 = None if x0 is None else spread(x0, dims[1])
    params = tuple(front(p, d) for p, d in zip(params, dims[2:], strict=True))
    return solve(batched, spread(b, dims[0]), x0, *params, level=level)


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
