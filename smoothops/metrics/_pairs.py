"""Sums over all pairs of the items of a list, in memory that grows with the list and not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._axes import row_sum

Values = tuple[Tensor, ...]
# term(items i (..., b, 1), items j (..., 1, n), shared (..., 1, 1)) -> tensors (..., b, n)
Term = Callable[[Values, Values, Values], Values]

BLOCK = 2**19  # pairs that are looked at together; shorter lists are done at once, in plain torch


def over_pairs(term: Term, items: Values, shared: Values = ()) -> Values:
    """y_i = sum_j term(items_i, items_j, shared) for each tensor that ``term`` returns, (..., n).

    items: tensors (..., n); shared: tensors (..., 1). Every tensor with a gradient must be among them. O(n^2) time. In
    eager mode O(n) memory, the backward pass included, which evaluates each block of pairs again; compiled
    code, transforms and second derivatives take O(n^2).
    """
    items = tuple(torch.broadcast_tensors(*items))
    n, lists = items[0].shape[-1], items[0].shape[:-1].numel()
    if n * n * lists <= BLOCK or not _eager():
        return _block(term, items, shared, 0, n)
    return _Blocked.apply(term, max(1, BLOCK // (n * lists)), len(items), *items, *shared)


def _eager() -> bool:
    """Whether an autograd.Function may be used: outside of compiled code, of every transform and of forward mode."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.autograd.forward_ad._current_level < 0


def _block(term: Term, items: Values, shared: Values, start: int, stop: int) -> Values:
    rows = tuple(v[..., start:stop].unsqueeze(-1) for v in items)
    found = term(rows, tuple(v.unsqueeze(-2) for v in items), tuple(v.unsqueeze(-1) for v in shared))
    return tuple(row_sum(v).squeeze(-1) for v in found)


class _Blocked(torch.autograd.Function):
    """The sums block by block; the backward pass makes the graph of one block at a time."""

    @staticmethod
    def forward(ctx: Any, term: Term, step: int, count: int, *tensors: Tensor) -> Values:
        ctx.save_for_backward(*tensors)
        ctx.term, ctx.step, ctx.count = term, step, count
        items, shared = tensors[:count], tensors[count:]
        n = items[0].shape[-1]
        sums: Values = ()
        for a in range(0, n, step):
            b = min(a + step, n)
            part = _block(term, items, shared, a, b)
            # written into one tensor: small ones kept from every block would fragment the heap, to O(n^2) memory
            sums = sums or tuple(p.new_empty(*p.shape[:-1], n) for p in part)
            for whole, p in zip(sums, part, strict=True):
                whole[..., a:b] = p
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        n, count = tensors[0].shape[-1], ctx.count
        if torch.is_grad_enabled():  # a second derivative is wanted: all pairs at once
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            sums = _block(ctx.term, tensors[:count], tensors[count:], 0, n)
            found = list(_gradient(sums, wanted, gradients, create_graph=True))
        else:
            copies = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
            wanted = [t for t in copies if t.requires_grad]
            found = [torch.zeros_like(t) for t in wanted]
            for a in range(0, n, ctx.step):
                b = min(a + ctx.step, n)
                with torch.enable_grad():
                    sums = _block(ctx.term, tuple(copies[:count]), tuple(copies[count:]), a, b)
                parts = _gradient(sums, wanted, [g[..., a:b] for g in gradients])
                found = [f + p for f, p in zip(found, parts, strict=True)]
        each = iter(found)
        return None, None, None, *(next(each) if need else None for need in needed)


def _gradient(sums: Values, wanted: list[Tensor], gradients: Any, create_graph: bool = False) -> Values:
    pairs = [(y, g) for y, g in zip(sums, gradients, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, materialize_grads=True
    )
    return tuple(found)
