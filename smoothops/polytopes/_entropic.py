"""Entropic transport as a function of z = theta/eps and the masses, with every derivative.

P = a b E, E = exp(z - u - v), by ``_sinkhorn``. Derivatives of the solved v by chord steps of value 0 (to the tolerance)
in plain torch,

    v <- v - J^-1 (1 - c(v, z, a, b)),    J fixed at the solution: each step is exact to one more order,

or, in eager mode and first order, by their closed form: for the cotangent V of P the adjoints (p, q) solve

    diag(a) p + P q = (P*V) 1,   P' p + diag(b) q = (P*V)' 1,   and   dz = P*(V - p - q),  da = p,  db = q.

The maximum <z, P> - sum P log P + (sum a log a + sum b log b)/2 is sum a u + sum b v - (sum a log a + sum b log b)/2,
stationary in v: one step gives it three orders, and none the first (Danskin).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solvers import Sinkhorn
from ._sinkhorn import Kernel, as_matrices, report, scaled, sinkhorn, solve

STEPS = 3


def _potentials(z: Tensor, a: Tensor, b: Tensor, tol: float, solver: Sinkhorn) -> Tensor:
    return sinkhorn(z.detach(), a.detach(), b.detach(), tol, solver.max_iter, solver.on_fail)


def _differentiable(z: Tensor, a: Tensor, b: Tensor, v: Tensor, steps: int) -> Tensor:
    kernel = Kernel(z.detach(), a.detach(), b.detach(), v.detach())
    factor = kernel.factor()
    for _ in range(steps):
        e, _ = scaled(z, a, b, v)
        v = v - kernel.solve(factor, 1 - a.mT @ e)
    return v


def plain_plan(z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """P / sum a in plain torch, for the solved v."""
    e, _ = scaled(z, a, b, _differentiable(z, a, b, v, STEPS))
    return a * b * e


def plain_value(z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The maximum (..., 1, 1) in plain torch, for the solved v."""
    v = _differentiable(z, a, b, v, 1)
    return _value(a, b, scaled(z, a, b, v)[1], v)


def _value(a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    rows = (a * u - torch.special.xlogy(a, a) / 2).sum((-2, -1), keepdim=True)
    return rows + (b * v - torch.special.xlogy(b, b) / 2).sum((-2, -1), keepdim=True)


class _Plan(torch.autograd.Function):
    """P with its first derivatives in closed form; further orders through ``plain_plan``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(z, a, b, v)
        e, _ = scaled(z, a, b, v)
        return a * b * e

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (z, a, b, v), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(plain_plan, ctx, g)
        kernel = Kernel(z, a, b, v)
        e = kernel.e
        rows = (e * g * b).sum(-1, keepdim=True)
        columns = (e * g * a).sum(-2, keepdim=True)
        q = kernel.solve(kernel.factor(), columns - (a * rows).mT @ e)
        p = rows - e @ (b * q).mT
        return _shaped((a * b * e * (g - p - q), p, q), (z, a, b), ctx.needs_input_grad)


class _Value(torch.autograd.Function):
    """The maximum with its first derivatives (P, potentials), which cost nothing; others through ``plain_value``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(z, a, b, v)
        return _value(a, b, scaled(z, a, b, v)[1], v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (z, a, b, v), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(plain_value, ctx, g)
        e, u = scaled(z, a, b, v)
        slopes = (a * b * e, u - (a.log() + 1) / 2, v - (b.log() + 1) / 2)
        return _shaped([g * s for s in slopes], (z, a, b), ctx.needs_input_grad)


def _shaped(found: Any, given: Any, needs: Any) -> tuple[Tensor | None, ...]:
    parts = (f.sum_to_size(x.shape) if n else None for f, x, n in zip(found, given, needs, strict=False))
    return *parts, None


def _again(plain: Any, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The same derivative through the plain path, which can be differentiated in turn."""
    z, a, b, v = ctx.saved_tensors
    wanted = [x for x, need in zip((z, a, b), ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(plain(z, a, b, v), wanted, g, create_graph=True))
    return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None


def _transformed() -> bool:
    """Whether compiled code, a transform or forward mode may ask for a derivative; they do not tell."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def plan(z: Tensor, a: Tensor, b: Tensor, tol: float, solver: Sinkhorn) -> Tensor:
    """P / sum a (..., n, m): z (..., n, m) without +inf, a (..., n, 1) and b (..., 1, m) that sum to 1."""
    v = _potentials(z, a, b, tol, solver)
    return plain_plan(z, a, b, v) if _transformed() else _Plan.apply(z, a, b, v)


def value(z: Tensor, a: Tensor, b: Tensor, tol: float, solver: Sinkhorn) -> Tensor:
    """The maximum / sum a, (..., 1, 1)."""
    v = _potentials(z, a, b, tol, solver)
    return plain_value(z, a, b, v) if _transformed() else _Value.apply(z, a, b, v)
