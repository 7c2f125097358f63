"""Derivatives of the solution of a QP: those of the linear system of its active rows, which do not change nearby.

    Q x + M_A' lam_A = -c,   M_A x = t_A,   the other multipliers zero.

With (p, q) the solution of the same system for the cotangents (x-bar, lam-bar) on the right,

    c-bar = -p,   Q-bar = -(p x' + x p')/2,   t-bar = q,   M-bar = -(q x' + lam p')   on the active rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._closure import eager
from ._qp_dual import masked, solve_masked
from ._qp_solve import Numbers, apply, lower_solve, upper_solve
from .linear import LU
from .operator import is_wrapped


def stack_rows(Q: Tensor, c: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> Any:
    """(M, t): equalities first."""
    matrices, bounds = [M for M in (A, G) if M is not None], [t for t in (b, h) if t is not None]
    if not matrices:
        return Q.new_zeros(0, Q.shape[-1]), Q.new_zeros(0)
    if len(matrices) == 1:
        return matrices[0], bounds[0]
    return join(*matrices, 2), join(*bounds, 1)


def join(first: Tensor, second: Tensor, event: int) -> Tensor:
    """Concatenates along the first event dim, after broadcasting the batch dims."""
    if first.ndim > event or second.ndim > event:
        batch = torch.broadcast_shapes(first.shape[:-event], second.shape[:-event])
        first, second = first.expand(*batch, *first.shape[-event:]), second.expand(*batch, *second.shape[-event:])
    return torch.cat([first, second], -event)


def solve_active(
    Q: Tensor, c: Tensor, M: Tensor, t: Tensor, x: Tensor, lam: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """x and lam, known as numbers, as functions of Q, c, M, t, by differentiable operations alone."""
    n, k = M.shape[-1], M.shape[-2]
    batch = active.shape[:-1]
    H = ((Q + Q.mT) / 2).expand(*batch, n, n)
    rows = torch.where(active.unsqueeze(-1), M, 0)
    rest = torch.diag_embed((~active).to(H.dtype))
    K = torch.cat([torch.cat([H, rows.mT], -1), torch.cat([rows, rest], -1)], -2)
    right = torch.cat([-c.expand(*batch, n), torch.where(active, t, 0)], -1)
    z = LU().solve_columns(K, right.unsqueeze(-1))[0].squeeze(-1)
    moved_x, moved_lam = z.split([n, k], -1)
    return x + (moved_x - moved_x.detach()), lam + (moved_lam - moved_lam.detach())


def sum_to(v: Tensor, shape: torch.Size, batch: torch.Size, event: int) -> Tensor:
    """(rows, *event) summed to the shape of an argument that may be shared by some of the problems."""
    v = v.reshape(*batch, *v.shape[-event:])
    return v if v.shape == shape else v.sum_to_size(shape)


class Attached(torch.autograd.Function):
    """(x, lam) as a function of Q, c, A, b, G, h: the closed form, from the factors of the solver."""

    @staticmethod
    def forward(ctx: Any, numbers: Numbers, batch: torch.Size, free: int, *data: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.batch, ctx.free = numbers, batch, free
        ctx.save_for_backward(*data)
        dtype = next(t.dtype for t in data if t is not None)
        return shaped(numbers, batch, free, dtype)

    @staticmethod
    def backward(ctx: Any, gx: Tensor | None, ge: Tensor | None, gi: Tensor | None) -> tuple[Any, ...]:
        data, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        given = [g for g in (gx, ge, gi) if g is not None]
        if not given:
            return (None,) * (3 + len(data))
        plain = eager() and not any(is_wrapped(g) for g in given)
        grads = closed_form if plain and not torch.is_grad_enabled() else again
        return None, None, None, *grads(ctx, data, needed, gx, ge, gi)


def shaped(numbers: Numbers, batch: torch.Size, free: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the duals of the equalities and those of the inequalities, in the batch's shape."""
    x, lam = numbers.x.to(dtype), numbers.lam.to(dtype)
    x, lam = x.reshape(*batch, x.shape[-1]), lam.reshape(*batch, lam.shape[-1])
    return x.clone(), lam[..., :free].clone(), lam[..., free:].clone()


def again(ctx: Any, data: Any, needed: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    """The same by differentiable operations: for derivatives of derivatives, and under vmap."""
    with torch.enable_grad():
        views = [t.view_as(t) if t is not None else None for t in data]
        numbers, batch, free = ctx.numbers, ctx.batch, ctx.free
        k = numbers.lam.shape[-1]
        x, lam, active = (v.reshape(*batch, -1 if v.shape[-1] else 0) for v in (numbers.x, numbers.lam, numbers.active))
        found = differentiate(views, x, lam, active, free, k)
        pairs = [(y, g) for y, g in zip(found, cotangents, strict=True) if g is not None and y.requires_grad]
        inputs = [v for v, need in zip(views, needed, strict=True) if need]
        outs, gs = [y for y, _ in pairs], [g for _, g in pairs]
        grads = iter(torch.autograd.grad(outs, inputs, gs, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(grads) if need else None for need in needed]


def differentiate(
    data: Any, x: Tensor, lam: Tensor, active: Tensor, free: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as functions of Q, c, A, b, G, h by :func:`solve_active`; x, lam, active have the batch's shape."""
    dtype = data[0].dtype
    Q, c, A, b, G, h = (t if t is None else t.to(x.dtype) for t in data)
    M, t = stack_rows(Q, c, A, b, G, h)
    x, lam = solve_active(Q, c, M, t, x, lam, active)
    return x.to(dtype), lam[..., :free].to(dtype), lam[..., free:].to(dtype)


def closed_form(ctx: Any, data: Any, needed: Any, gx: Any, ge: Any, gi: Any) -> list[Tensor | None]:
    """The rule at the head of this file."""
    numbers, batch, free = ctx.numbers, ctx.batch, ctx.free
    x, lam, active = numbers.x, numbers.lam, numbers.active
    flat_x = torch.zeros_like(x) if gx is None else gx.reshape(x.shape).to(x.dtype)
    k = lam.shape[-1]
    if ge is None and gi is None:
        flat_lam = None
    else:
        parts = [
            x.new_zeros(len(x), size) if g is None else g.reshape(len(x), size).to(x.dtype)
            for g, size in ((ge, free), (gi, k - free))
        ]
        flat_lam = torch.cat(parts, -1)
    t = lower_solve(numbers.L, flat_x)
    right = apply(numbers.Y.mT, t)
    if flat_lam is not None:
        right = right - flat_lam
    factor = torch.linalg.cholesky_ex(masked(numbers.S, active))[0]
    q = solve_masked(factor, active, right)
    p = upper_solve(numbers.L, t - apply(numbers.Y, q))
    out: list[Tensor | None] = [None] * 6
    for i, part in ((2, slice(0, free)), (4, slice(free, None))):
        if data[i] is not None and needed[i]:
            v = torch.stack([q[:, part], lam[:, part]], -1) @ torch.stack([x, p], -2)
            out[i] = sum_to(v.neg_(), data[i].shape, batch, 2).to(data[i].dtype)
        if data[i + 1] is not None and needed[i + 1]:
            out[i + 1] = sum_to(q[:, part], data[i + 1].shape, batch, 1).to(data[i + 1].dtype)
    if needed[0]:
        v = torch.stack([p, x], -1) @ torch.stack([x, p], -2)
        out[0] = sum_to(v.mul_(-0.5), data[0].shape, batch, 2).to(data[0].dtype)
    if needed[1]:
        out[1] = sum_to(p.neg(), data[1].shape, batch, 1).to(data[1].dtype)
    return out
