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
from ._qp_singular import kkt_matrix
from ._qp_solve import Numbers, adjoint, native
from .linear import LU
from .operator import is_wrapped


def stack_rows(Q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> Any:
    """(M, t): equalities first."""
    if A is None and G is None:
        return Q.new_zeros(0, Q.shape[-1]), Q.new_zeros(0)
    if A is None or G is None:
        return (A, b) if G is None else (G, h)
    return join(A, G, 2), join(b, h, 1)  # type: ignore[arg-type]


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
    K = kkt_matrix(((Q + Q.mT) / 2).expand(*batch, n, n), M, active)
    right = torch.cat([-c.expand(*batch, n), torch.where(active, t, 0)], -1)
    z = LU().solve_columns(K, right.unsqueeze(-1))[0].squeeze(-1)
    moved_x, moved_lam = z.split([n, k], -1)
    return x + (moved_x - moved_x.detach()), lam + (moved_lam - moved_lam.detach())


def sum_to(v: Tensor, like: Tensor, batch: torch.Size, event: int) -> Tensor:
    """(rows, *event) summed to an argument that may be shared by some of the problems."""
    v = v.reshape(*batch, *v.shape[-event:])
    return (v if v.shape == like.shape else v.sum_to_size(like.shape)).to(like.dtype)


class ActiveSet(torch.autograd.Function):
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
        numbers = ctx.numbers
        plain = eager() and not any(is_wrapped(g) for g in given)
        grads = closed_form if plain and not numbers.singular and not torch.is_grad_enabled() else again
        return None, None, None, *grads(ctx, data, needed, gx, ge, gi)


def shaped(numbers: Numbers, batch: torch.Size, free: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the duals of the equalities and those of the inequalities, in the batch's shape."""
    # copies: what the user does to them in place must not reach the backward
    x, lam = numbers.x, numbers.lam
    if len(batch) != 1:
        x, lam = x.reshape(*batch, x.shape[-1]), lam.reshape(*batch, lam.shape[-1])
    x = x.to(dtype, copy=True)
    if free:
        return x, lam[..., :free].to(dtype, copy=True), lam[..., free:].to(dtype, copy=True)
    return x, x.new_empty((*batch, 0)), lam.to(dtype, copy=True)


def again(ctx: Any, data: Any, needed: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    """The same by differentiable operations: for derivatives of derivatives, and under vmap."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) if t is not None else None for t in data]
        numbers, batch, free = ctx.numbers, ctx.batch, ctx.free
        k = numbers.lam.shape[-1]
        x, lam, active = (v.reshape(*batch, -1 if v.shape[-1] else 0) for v in (numbers.x, numbers.lam, numbers.active))
        found = differentiate(views, x, lam, active, free, k)
        pairs = [(y, g) for y, g in zip(found, cotangents, strict=True) if g is not None and y.requires_grad]
        inputs = [v for v, need in zip(views, needed, strict=True) if need and v is not None]
        outs, gs = [y for y, _ in pairs], [g for _, g in pairs]
        grads = iter(torch.autograd.grad(outs, inputs, gs, create_graph=higher, allow_unused=True))
    return [next(grads) if need else None for need in needed]


def differentiate(
    data: Any, x: Tensor, lam: Tensor, active: Tensor, free: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as functions of Q, c, A, b, G, h by :func:`solve_active`; x, lam, active have the batch's shape."""
    dtype = data[0].dtype
    wide: list[Any] = [t if t is None else t.to(x.dtype) for t in data]
    Q, c, *rest = wide
    M, t = stack_rows(Q, *rest)
    x, lam = solve_active(Q, c, M, t, x, lam, active)
    return x.to(dtype), lam[..., :free].to(dtype), lam[..., free:].to(dtype)


def closed_form(ctx: Any, data: Any, needed: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    """The rule at the head of this file."""
    numbers, batch, free = ctx.numbers, ctx.batch, ctx.free
    x, lam = numbers.x, numbers.lam
    rows, k = lam.shape
    gx, ge, gi = (None if g is None else g.detach().reshape(rows, g.shape[-1]).to(x.dtype) for g in cotangents)
    if gx is None:
        gx = torch.zeros_like(x)
    if ge is None and gi is None:
        gl = x.new_zeros(1, k)
    else:
        zeros = lambda size: x.new_zeros(rows, size)  # noqa: E731
        gl = torch.cat([zeros(free) if ge is None else ge, zeros(k - free) if gi is None else gi], -1)
    # matrices that all problems have their own of; else the sum over the problems is a product
    own = [needed[0] and data[0].shape[:-2] == batch]
    own.append(any(data[i] is not None and needed[i] and data[i].shape[:-2] == batch for i in (2, 4)))
    factors = numbers.L, numbers.Y, numbers.S, numbers.active
    if native(x.device):
        from . import _qp_native_kkt

        p, q, dQ, dM = _qp_native_kkt.adjoint(*factors, x, lam, gx, gl, own)
    else:
        p, q = adjoint(*factors, gx, gl)
        dQ = pair(-0.5, p, x, x, p) if own[0] else p
        dM = pair(-1.0, q, x, lam, p) if own[1] else q
    out: list[Tensor | None] = [None] * 6
    if needed[0]:
        out[0] = fit(dQ, own[0], -0.5, (p, x, x, p), data[0], batch)
    if needed[1]:
        out[1] = sum_to(p.neg(), data[1], batch, 1)
    for i, part in ((2, slice(0, free)), (4, slice(free, None))):
        if data[i] is not None and needed[i]:
            mine = dM[:, part] if data[i].shape[:-2] == batch else None
            out[i] = fit(mine, mine is not None, -1.0, (q[:, part], x, lam[:, part], p), data[i], batch)
        if data[i] is not None and needed[i + 1]:
            out[i + 1] = sum_to(q[:, part], data[i + 1], batch, 1)
    return out


def pair(f: float, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """f (a x' + b y') of each row."""
    return torch.stack([f * a, f * b], -1) @ torch.stack([x, y], -2)


def fit(matrix: Tensor | None, own: bool, f: float, vectors: tuple, like: Tensor, batch: torch.Size) -> Tensor:
    """The gradient of a matrix: ``matrix`` if each problem has its own, else the sum of f (a x' + b y')."""
    if own:
        return matrix.reshape(like.shape).to(like.dtype)  # type: ignore[union-attr]
    a, x, b, y = vectors
    if like.ndim == 2 or like.shape[:-2].numel() == 1:
        return ((a.mT @ x + b.mT @ y) * f).reshape(like.shape).to(like.dtype)
    return sum_to(pair(f, a, x, b, y), like, batch, 2)
