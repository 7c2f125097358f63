"""Keeps the NaN of what is not taken out of every gradient.

Where a branch has weight 0 its output gets the cotangent 0, but 0 times the infinite slope of ``sqrt`` at a negative
number is NaN, and a NaN in one row spreads to every parameter that all rows share. So while a branch runs, each torch
function in it takes its inputs through an identity whose derivative is exact except that a NaN in an element of weight
0 becomes 0. Finite derivatives are untouched: a branch that mixes elements (a mean over the batch) stays exact.

- What is shared by rows in an elementwise function is expanded first: backward would sum NaN of different rows.
- A contraction (a matrix product, a normalization) multiplies cotangents with values, 0 times inf again: its graph is
  made from inputs whose infinite entries of weight 0 are 0, its value from the true ones.

Cutting the tensors at the entry alone, ``torch.where(w == 0, a.detach(), a)``, would lose that mixing, and could not
tell the rows apart in a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._axes import concrete
from .._blend import known_finite
from ._kinds import BOUNDED, CONTRACTIONS, ELEMENTWISE, FREE, SCALED


def _hooked(t: Tensor, dead: Tensor) -> Tensor:
    """t, whose derivative has no NaN where ``dead``; the derivative of that derivative has none either."""
    y = t.view_as(t)
    if y.requires_grad:
        y.register_hook(partial(_cleaned, dead))
    return y


def _cleaned(dead: Tensor, g: Tensor) -> Tensor:
    batched = torch._C._functorch.is_legacy_batchedtensor(g)  # of is_grads_batched
    if batched or not concrete(g) or math.isnan(g.detach().sum().item()):
        g = torch.where(dead & g.isnan(), 0, g)
    return _hooked(g, dead) if torch.is_grad_enabled() else g


class _TransformedIdentity(torch.autograd.Function):
    """The same in the form that torch.func and torch.compile take, which costs several times as much a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, dead: Tensor) -> Tensor:
        # not t alone: under vmap what all rows share must become one for each, or backward sums once too often
        return torch.where(dead, t, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (dead,) = ctx.saved_tensors
        return _identity(torch.where(dead & g.isnan(), 0, g), dead), None


class _ForwardIdentity(_TransformedIdentity):
    """The same with a forward-mode rule, which torch.compile refuses."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (dead,) = ctx.saved_tensors
        return _identity(torch.where(dead & tangent.isnan(), 0, tangent), dead)


def forward_mode() -> bool:
    """Whether a level of forward-mode AD is active."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)


def _identity(t: Tensor, dead: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _TransformedIdentity.apply(t, dead)
    if forward_mode():
        return _ForwardIdentity.apply(t, dead)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _TransformedIdentity.apply(t, dead)
    return _hooked(t, dead)


class Guard(TorchFunctionMode):
    """Hands every torch function its inputs through the identity."""

    def __init__(self, dead: Tensor) -> None:
        super().__init__()
        self.dead = dead
        self.fitted: dict[Any, Tensor] = {}

    def fit(self, shape: torch.Size) -> Tensor:
        """Which elements of a tensor belong to rows of weight 0: those that its leading dims name, or all or none."""
        if shape not in self.fitted:
            self.fitted[shape] = self._fit(shape)
        return self.fitted[shape]

    def _fit(self, shape: torch.Size) -> Tensor:
        dead, k = self.dead, self.dead.ndim
        if len(shape) < k or any(d not in (1, s) and s != 1 for d, s in zip(dead.shape, shape, strict=False)):
            return dead.all()
        for i in range(k):
            if shape[i] == 1:
                dead = dead.all(i, keepdim=True)
        return dead.reshape(dead.shape + (1,) * (len(shape) - k))

    def clean(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return _identity(item, self.fit(item.shape)) if item.is_floating_point() and tracked(item) else item
        if type(item) in (tuple, list):
            return type(item)(self.clean(i) for i in item)
        return item

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FREE or not args or not taping() or harmless(name, args):
            return func(*args, **kwargs)
        # what a function writes to must stay itself
        # (slices: torch.compile cannot trace endswith here)
        writes = (name[-1:] == "_" and name[-2:] != "__") or name in ("__imul__", "__itruediv__", "__ipow__")
        kept = args[:1] if writes else ()
        kwargs = {key: value if key == "out" else self.clean(value) for key, value in kwargs.items()}
        rest = args[len(kept) :]
        if name in ELEMENTWISE:
            rest = expanded(rest)
        args = (*kept, *(self.clean(a) for a in rest))
        if name in CONTRACTIONS:
            return self.contract(func, args, kwargs)
        return func(*args, **kwargs)

    def infinite(self, t: Tensor) -> Tensor | None:
        """Which entries of t are neither finite nor in a row that is taken, None where there are none."""
        found = self.fit(t.shape) & ~t.isfinite()
        return found if some(found) else None

    def contract(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        masks = [self.infinite(a) if isinstance(a, Tensor) and a.is_floating_point() else None for a in args]
        if all(mask is None for mask in masks):
            return func(*args, **kwargs)
        finite = [a if mask is None else torch.where(mask, 0, a) for a, mask in zip(args, masks, strict=True)]
        with torch.no_grad():
            true = func(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs).detach()
        return torch.where(true.isfinite(), func(*finite, **kwargs), true)


def harmless(name: str, args: tuple) -> bool:
    """Whether no NaN can come out of the derivative of a function of these inputs if none goes in."""
    if name in SCALED:
        return len(args) == 2 and isinstance(args[1], (int, float)) and args[1] != 0 and math.isfinite(args[1])
    return name in BOUNDED and isinstance(args[0], Tensor) and known_finite(args[0])


def expanded(args: tuple) -> tuple:
    """Tensors among the arguments of an elementwise function, brought to their common shape."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if len({t.shape for t in tensors}) < 2:
        return args
    # a 0-d tensor does not decide the dtype, and must not do so once it is wide
    decisive = [t for t in tensors if t.ndim and t.is_floating_point()]
    if decisive:
        dtype = decisive[0].dtype
        for t in decisive[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        tensors = [t if t.ndim or not t.is_floating_point() else t.to(dtype) for t in tensors]
    wide = iter(torch.broadcast_tensors(*tensors))
    return tuple(next(wide) if isinstance(a, Tensor) else a for a in args)


def transformed() -> bool:
    """Whether derivatives are taken by a transform, which tensors do not tell."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_mode()


def taping() -> bool:
    """Whether any tensor may carry a derivative."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and transformed())


def tracked(t: Tensor) -> bool:
    """Whether t may carry a derivative."""
    if torch.compiler.is_compiling() or t.requires_grad:
        return torch.is_grad_enabled()
    return transformed()


def some(mask: Tensor) -> bool:
    """Whether any entry holds, True where that may not be looked up."""
    return not concrete(mask) or bool(mask.any())


class Zeros:
    """Where a weight is 0 (None: nowhere), and whether that is anywhere, looked up once."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask, self.some = mask, mask is not None and some(mask)


def guarded(dead: Tensor | Zeros) -> AbstractContextManager[Any]:
    """While this is entered, no NaN comes out of the derivatives of the elements that are ``dead``."""
    zeros = dead if isinstance(dead, Zeros) else Zeros(dead)
    return nullcontext() if zeros.mask is None or not zeros.some else Guard(zeros.mask)
