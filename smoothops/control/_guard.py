"""Keeps the NaN of what is not taken out of every gradient.

Where a branch has weight 0 its output gets the cotangent 0, but 0 times the infinite slope of ``sqrt`` at a negative
number is NaN, and a NaN in one row spreads to every parameter that all rows share. So while a branch runs, each torch
function in it takes its inputs through an identity whose derivative is exact except that a NaN in an element of weight
0 becomes 0. Finite derivatives are untouched: a branch that mixes elements (a mean over the batch) stays exact.

Cutting the tensors at the entry alone, ``torch.where(w == 0, a.detach(), a)``, would lose that mixing, and could not
tell the rows apart in a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._axes import concrete


class _Identity(torch.autograd.Function):
    """t, whose derivative has no NaN where ``dead``; the derivative of that derivative has none either."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, dead: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (dead,) = ctx.saved_tensors
        return _identity(torch.where(dead & g.isnan(), 0, g), dead), None


class _ForwardIdentity(_Identity):
    """The same with a forward-mode rule, which torch.compile refuses and which does not go with views."""

    @staticmethod
    def forward(t: Tensor, dead: Tensor) -> Tensor:
        return t.clone()

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
    if not torch.compiler.is_compiling() and forward_mode():
        return _ForwardIdentity.apply(t, dead)
    return _Identity.apply(t, dead)


# linear functions, which make no NaN out of a 0, and functions that return no tensor; a view stays a view of its base
FREE = frozenset(
    {
        "__get__", "__set__", "__getitem__", "__setitem__", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__",
        "__isub__", "__neg__", "__len__", "__bool__", "__repr__", "__format__", "__hash__", "__eq__", "__ne__",
        "__lt__", "__le__", "__gt__", "__ge__", "add", "sub", "rsub", "subtract", "neg", "negative", "positive",
        "sum", "mean", "cumsum", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "split", "chunk",
        "unbind", "tensor_split", "view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "broadcast_to",
        "broadcast_tensors", "repeat", "repeat_interleave", "tile", "flatten", "unflatten", "ravel", "squeeze",
        "unsqueeze", "transpose", "swapaxes", "permute", "movedim", "moveaxis", "t", "flip", "roll", "narrow",
        "select", "index_select", "gather", "take", "take_along_dim", "diagonal", "diag", "unfold", "pad",
        "contiguous", "clone", "detach", "to", "type", "double", "float", "half", "bfloat16", "cpu", "cuda", "where",
        "masked_fill", "tril", "triu", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
        "randn_like", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty", "size", "stride", "dim",
        "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "is_contiguous", "eq", "ne", "lt", "le",
        "gt", "ge", "isnan", "isinf", "isfinite", "isclose", "equal", "allclose", "any", "all", "argmax", "argmin",
        "argsort", "floor", "ceil", "round", "sign", "item", "tolist", "numpy", "register_hook", "retain_grad",
        "requires_grad_", "backward", "grad", "data_ptr", "element_size",
    }
)  # fmt: skip


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
        if name in FREE or not args:
            return func(*args, **kwargs)
        # what a function writes to must stay itself
        # (slices: torch.compile cannot trace endswith here)
        writes = (name[-1:] == "_" and name[-2:] != "__") or name in ("__imul__", "__itruediv__", "__ipow__")
        kept = args[:1] if writes else ()
        kwargs = {key: value if key == "out" else self.clean(value) for key, value in kwargs.items()}
        return func(*kept, *(self.clean(a) for a in args[len(kept) :]), **kwargs)


def tracked(t: Tensor) -> bool:
    """Whether t may carry a derivative."""
    if torch.compiler.is_compiling() or t.requires_grad:
        return torch.is_grad_enabled()
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_mode()


def some(mask: Tensor) -> bool:
    """Whether any entry holds, True where that may not be looked up."""
    return not concrete(mask) or bool(mask.any())


def guarded(dead: Tensor) -> AbstractContextManager[Any]:
    """While this is entered, no NaN comes out of the derivatives of the elements that are ``dead``."""
    return Guard(dead) if some(dead) else nullcontext()
