"""Entropic transport as a function of theta, eps and the masses, with every derivative.

P = mass a b E, E = exp(theta/eps - u - v), a and b of sum 1. Derivatives of the solved v by chord steps of value 0 (to
the tolerance) in plain torch,

    v <- v - J^-1 (1 - c(v, theta, eps, a, b)),    J fixed at the solution: each step is exact to one more order,

or, in eager mode and first order, by their closed form: for the cotangent V of P/mass the adjoints (p, q) solve

    diag(a) p + P q = (P*V) 1,   P' p + diag(b) q = (P*V)' 1;   dtheta = P*(V - p - q)/eps,  da = p,  db = q.

The maximum is eps mass (sum a u + sum b v - (sum a log a + sum b log b)/2), stationary in v: one step gives it three
orders of derivatives, and none the first (Danskin).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._kernel import CG_GOAL, Kernel, cut, even, massive, plain, scaled
from ._sinkhorn import Options, as_matrices, block_size, blocks, sinkhorn

STEPS = 3


def _exponents(x: Tensor, eps: Tensor) -> Tensor:
    """theta/eps, in whose derivatives a forbidden pair has no part."""
    allowed = x > -torch.inf
    return torch.where(allowed, torch.where(allowed, x, 0) / eps, -torch.inf)


def _differentiable(z: Tensor, a: Tensor, b: Tensor, v: Tensor, steps: int) -> Tensor:
    zd, ad, bd, vd = (t.detach() for t in (z, a, b, v))
    e, _ = scaled(zd, ad, bd, vd)
    kernel = Kernel(ad * e, (bd * e).mT.contiguous(), bd)
    for _ in range(steps):
        e, _ = scaled(z, a, b, v)
        v = v - kernel.solve(1 - a.mT @ e)
    return v


def _plain_plan(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, v: Tensor) -> Tensor:
    z = _exponents(x, eps)
    e, _ = scaled(z, a, b, _differentiable(z, a, b, v, STEPS))
    return mass * a * b * e


def _plain_value(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, v: Tensor) -> Tensor:
    z = _exponents(x, eps)
    v = _differentiable(z, a, b, v, 1)
    return eps * mass * _unit_value(a, b, scaled(z, a, b, v)[1], v)


def _unit_value(a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    rows = (a * u - torch.special.xlogy(a, a) / 2).sum((-2, -1), keepdim=True)
    return rows + (b * v - torch.special.xlogy(b, b) / 2).sum((-2, -1), keepdim=True)


def _strength_slope(gradient: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The part of a gradient in eps that comes through theta/eps."""
    return -(gradient * torch.where(gradient == 0, 0, x)).sum((-2, -1), keepdim=True) / eps


class _Plan(torch.autograd.Function):
    """P with its first derivatives in closed form; further orders through ``_plain_plan``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
        y, v, kernels = torch.empty_like(x, memory_format=torch.contiguous_format), [], []
        ctx.massive, ctx.size = massive(a, b), block_size(x)
        ctx.goal = max(CG_GOAL, options[0] / 100)  # as exact as P is
        weights = (mass * b).split(ctx.size)
        for part, weight, found in zip(y.split(ctx.size), weights, blocks([x, eps, a, b], options), strict=True):
            torch.mul(cut(found.to_columns, *x.shape[-2:]), weight, out=part)
            v.append(found.v)
            if not ctx.massive:  # else the kernel follows from P
                kernels += [found.to_columns, found.to_rows]
        ctx.save_for_backward(x, eps, a, b, mass, y, cut(torch.cat(v), 1, x.shape[-1]), *kernels)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, eps, a, b, mass, y, v, *kernels), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(_plain_plan, ctx, g, v)
        split = list(zip(*(t.split(ctx.size) for t in (y, g, a, b, mass)), strict=True))
        known: list[Any] = list(zip(kernels[::2], kernels[1::2], strict=True)) or [None] * len(split)
        parts = [_adjoint(*part, kernel=k, goal=ctx.goal) for part, k in zip(split, known, strict=True)]
        p, q = (torch.cat(t) for t in zip(*parts, strict=True))
        if plain(g):
            dx = torch.empty_like(y)
            for i in (slice(first, first + ctx.size) for first in range(0, len(y), ctx.size)):
                torch.sub(g[i], p[i], out=dx[i]).sub_(q[i]).mul_(y[i]).div_(eps[i])
        else:
            dx = (g - p - q) * y / eps
        return _wanted(
            ctx, lambda: dx, lambda: _strength_slope(dx, x, eps), lambda: mass * p, lambda: mass * q,
            lambda: (y * g).sum((-2, -1), keepdim=True) / mass,
        )  # fmt: skip


def _adjoint(
    y: Tensor, g: Tensor, a: Tensor, b: Tensor, mass: Tensor, *, kernel: tuple[Tensor, Tensor] | None, goal: float
) -> tuple[Tensor, Tensor]:
    """p and q for the cotangent g of P = y; ``kernel`` where masses of 0 keep it from being read off P."""
    n, m = y.shape[-2:]
    if kernel is None:
        weighted = y * g
        rows, columns = weighted.sum(-1, keepdim=True) / (mass * a), weighted.sum(-2, keepdim=True) / (mass * b)
        kernel = even(y / (mass * b)), even(y.mT / (mass * a.mT)).contiguous()
    else:
        rows = (cut(kernel[1], m, n).mT * g).sum(-1, keepdim=True)
        columns = (cut(kernel[0], n, m) * g).sum(-2, keepdim=True)
    to_columns, to_rows = kernel
    turned, columns = even(rows, columns=False).mT, even(columns, rows=False)
    q = Kernel(to_columns, to_rows, even(b, rows=False)).solve(columns - turned @ to_columns, goal)
    p, q = rows - cut((q @ to_rows).mT, n, 1), cut(q, 1, m)
    return p, q


class _Value(torch.autograd.Function):
    """The maximum with its first derivatives (P, potentials), which cost nothing; others through ``_plain_value``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
        n, m = x.shape[-2:]
        y, potentials = torch.empty_like(x, memory_format=torch.contiguous_format), []
        weights = b.split(block_size(x))
        for part, weight, found in zip(y.split(block_size(x)), weights, blocks([x, eps, a, b], options), strict=True):
            torch.mul(cut(found.to_columns, n, m), weight, out=part)
            potentials.append((found.u, found.v))
        u, v = (torch.cat(t) for t in zip(*potentials, strict=True))
        u, v = cut(u, n, 1), cut(v, 1, m)
        value = _unit_value(a, b, u, v)
        ctx.save_for_backward(x, eps, a, b, mass, u, v, y, value)
        return eps * mass * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, eps, a, b, mass, u, v, y, value), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(_plain_value, ctx, g, v)
        dx, scale = y * (mass * g), eps * mass * g
        return _wanted(
            ctx, lambda: dx, lambda: _strength_slope(dx, x, eps) + mass * value * g,
            lambda: scale * (u - (a.log() + 1) / 2), lambda: scale * (v - (b.log() + 1) / 2), lambda: eps * value * g,
        )  # fmt: skip


def _wanted(ctx: Any, *found: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for."""
    needs = ctx.needs_input_grad
    return *(f() if need else None for f, need in zip(found, needs, strict=False)), None


def _again(path: Any, ctx: Any, g: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """The same derivative through the plain path, which can be differentiated in turn."""
    given, needs = ctx.saved_tensors[:5], ctx.needs_input_grad
    wanted = [x for x, need in zip(given, needs, strict=False) if need]
    found = iter(torch.autograd.grad(path(*given, v), wanted, g, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def _transformed() -> bool:
    """Whether compiled code, a transform or forward mode may ask for a derivative; they do not tell."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def plan(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
    """P (..., n, m): x (..., n, m) without +inf, eps and mass (..., 1, 1), a (..., n, 1) and b (..., 1, m)."""
    if _transformed():
        return _plain_plan(x, eps, a, b, mass, _opaque(x, eps, a, b, options))
    batch, given = as_matrices(x, eps, a, b, mass)
    return _Plan.apply(*given, options).reshape(batch + x.shape[-2:])


def value(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
    """The maximum, (..., 1, 1)."""
    if _transformed():
        return _plain_value(x, eps, a, b, mass, _opaque(x, eps, a, b, options))
    batch, given = as_matrices(x, eps, a, b, mass)
    return _Value.apply(*given, options).reshape(*batch, 1, 1)


def _opaque(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, options: Options) -> Tensor:
    given = (t.detach() for t in (x, eps, a, b))
    return sinkhorn(*given, *options)
