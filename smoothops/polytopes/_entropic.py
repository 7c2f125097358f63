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

from .. import kernels
from ._kernel import CG_GOAL, COMPILED_DIRECT, Kernel, cg_steps, cut, even, massive, plain, scaled
from ._potentials import TransportInfo, centred, judged
from ._sinkhorn import Options, as_matrices, block_size, sinkhorn, transported

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
    rows = (a * u - a * _log(a) / 2).sum((-2, -1), keepdim=True)
    return rows + (b * v - b * _log(b) / 2).sum((-2, -1), keepdim=True)


def _log(mass: Tensor) -> Tensor:
    """log where there is mass; masses of 0 have no part in the derivatives of sum a log a, instead of infinite ones."""
    return torch.where(mass > 0, mass, 1).log()


def _strength_slope(gradient: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The part of a gradient in eps that comes through theta/eps."""
    return -(gradient * torch.where(gradient == 0, 0, x)).sum((-2, -1), keepdim=True) / eps


class _Plan(torch.autograd.Function):
    """P with its first derivatives in closed form; further orders through ``_plain_plan``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
        found = transported((x, eps, a, b, mass), options)
        ctx.goal = max(CG_GOAL, options[0] / 100)  # as exact as P is
        ctx.save_for_backward(x, eps, a, b, mass, found.plan, found.v)
        return found.plan

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, eps, a, b, mass, y, v), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(_plain_plan, ctx, g, v)
        dx, p, q = _adjoints(y, g, x, eps, a, b, mass, v, ctx.goal, any(ctx.needs_input_grad[2:4]))
        return _wanted(
            ctx, lambda: dx, lambda: _strength_slope(dx, x, eps), lambda: mass * p, lambda: mass * q,
            lambda: (y * g).sum((-2, -1), keepdim=True) / mass,
        )  # fmt: skip


def _adjoints(
    y: Tensor, g: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, v: Tensor, goal: float, full: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in theta, p and q for the cotangent g of y = P; with ``full``, p and q where masses are 0, too."""
    fast = kernels.compiled_sinkhorn() if plain(g) and y.numel() and y.dtype == torch.float64 else None
    if fast is not None:
        dx, p, q, done = fast.adjoint(y, g, eps, mass * a, mass * b, goal, cg_steps(y.shape[-1]), COMPILED_DIRECT)
        left = (~done).nonzero().squeeze(-1)
        if left.numel():
            part = _adjoint(goal, *(t[left] for t in (y, g, x, eps, a, b, mass, v)))
            for out, t in zip((dx, p, q), part, strict=True):
                out[left] = t
        if full and not massive(a, b):
            e, _ = scaled(_exponents(x, eps), a, b, v)
            p = (b * e * (g - q)).sum(-1, keepdim=True)
            q = (a * e * (g - p)).sum(-2, keepdim=True)
        return dx, p, q
    size = block_size(x)
    parts = [
        _adjoint(goal, *part) for part in zip(*(t.split(size) for t in (y, g, x, eps, a, b, mass, v)), strict=True)
    ]
    dx, p, q = (torch.cat(t) for t in zip(*parts, strict=True))
    return dx, p, q


def _adjoint(
    goal: float, y: Tensor, g: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = y.shape[-2:]
    if massive(a, b):
        weighted = y * g
        rows, columns = weighted.sum(-1, keepdim=True) / (mass * a), weighted.sum(-2, keepdim=True) / (mass * b)
        to_columns, to_rows = even(y / (mass * b)), even(y.mT / (mass * a.mT)).contiguous()
    else:
        e, _ = scaled(_exponents(x, eps), a, b, v)
        rows, columns = (b * e * g).sum(-1, keepdim=True), (a * e * g).sum(-2, keepdim=True)
        to_columns, to_rows = even(a * e), even((b * e).mT).contiguous()
    turned, columns = even(rows, columns=False).mT, even(columns, rows=False)
    q = Kernel(to_columns, to_rows, even(b, rows=False)).solve(columns - turned @ to_columns, goal)
    p, q = rows - cut((q @ to_rows).mT, n, 1), cut(q, 1, m)
    return (g - p - q) * y / eps, p, q


class _Value(torch.autograd.Function):
    """The maximum with its first derivatives (P, potentials), which cost nothing; others through ``_plain_value``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
        y, u, v, *_ = transported((x, eps, a, b, mass), options)
        value = _unit_value(a, b, u, v)
        ctx.save_for_backward(x, eps, a, b, mass, u, v, y, value)
        return eps * mass * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, eps, a, b, mass, u, v, y, value), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            return _again(_plain_value, ctx, g, v)
        dx, scale = y * g, eps * mass * g
        return _wanted(
            ctx, lambda: dx, lambda: _strength_slope(dx, x, eps) + mass * value * g,
            lambda: scale * (u - (_log(a) + (a > 0)) / 2), lambda: scale * (v - (_log(b) + (b > 0)) / 2),
            lambda: eps * value * g,
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
        return _plain_plan(x, eps, a, b, mass, _opaque(x, eps, a, b, options)[0])
    batch, given = as_matrices(x, eps, a, b, mass)
    return _Plan.apply(*given, options).reshape(batch + x.shape[-2:])


def value(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options) -> Tensor:
    """The maximum, (..., 1, 1)."""
    if _transformed():
        return _plain_value(x, eps, a, b, mass, _opaque(x, eps, a, b, options)[0])
    batch, given = as_matrices(x, eps, a, b, mass)
    return _Value.apply(*given, options).reshape(*batch, 1, 1)


def _opaque(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    given = (t.detach() for t in (x, eps, a, b))
    return sinkhorn(*given, *options)


def potentials(
    x: Tensor, eps: Tensor, a: Tensor, b: Tensor, mass: Tensor, options: Options
) -> tuple[Tensor, Tensor, TransportInfo]:
    """f and g with P = mass a mass b exp((theta - f - g)/eps), differentiable, and how the solver went."""
    v, report = _opaque(x, eps, a, b, options)
    z = _exponents(x, eps)
    if _transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (z, a, b, mass))):
        moved = _differentiable(z, a, b, v, STEPS)
        v = v + (moved - moved.detach())  # the numbers of the solver, converged or not
    e, u = scaled(z, a, b, v)
    u, v = centred(u, v, a, b)
    info = judged(mass * a * b * e, mass * a, mass * b, report)
    return eps * (u + mass.log() / 2), eps * (v + mass.log() / 2), info
