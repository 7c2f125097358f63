"""What the values of a softened context share: their type, who made a call, and how torch spells a function."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# --- the contexts of this thread -------------------------------------------------------------------------------------


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.entered: list[tuple[Any, int]] = []  # contexts, each with the checkpoints that it was entered in


CONTEXTS = _Contexts()


def context() -> Any:
    """The innermost softened context of this thread, or None."""
    return CONTEXTS.entered[-1][0] if CONTEXTS.entered else None


def checkpoints() -> int:
    """How many reentrant activation checkpoints this code runs in."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


# --- who calls -------------------------------------------------------------------------------------------------------

# these do their own work with torch's own operations, whatever the context of their caller
_OWN_WORK = (
    "smoothops", "implicit", "torch.optim", "torch.amp", "torch.testing", "torch.nn.init", "torch.nn.utils",
    "torch.autograd.gradcheck", "torch.distributions.constraints", "torch.distributions.distribution",
    "torch.distributions.utils", "torch._tensor_str", "torch._dynamo",
)  # fmt: skip
# these act in their caller's place
_SEEN_THROUGH = {
    "smoothops.softened", "smoothops._composites", "torch._tensor", "torch._jit_internal", "torch.functional",
    "torch.nn.functional", "torch.overrides", "torch.utils._contextlib", "torch.utils._device",
}  # fmt: skip


def own_work() -> bool:
    """Whether the code that calls torch works for its own ends: the first frame that is not a wrapper decides."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if frame.f_code.co_name == "_detect_is_causal_mask":  # a transformer asks itself about a hint
            return True
        if name not in _SEEN_THROUGH:
            return any(name == n or name.startswith(n + ".") for n in _OWN_WORK)
        frame = frame.f_back  # type: ignore[assignment]
    return False


def spelled(*names: str) -> Iterable[Any]:
    """Every function of torch with one of these names, as a __torch_function__ sees it."""
    for name in names:
        for owner in (torch, Tensor, torch.special, torch._C._nn, torch._C._VariableFunctions):
            if name.startswith("__") and owner is not Tensor:
                continue
            found = getattr(owner, name, None)
            if callable(found):
                yield found


# --- the type --------------------------------------------------------------------------------------------------------


class SoftValue(Tensor):
    """What a softened context makes: a tensor whose ``__torch_function__`` knows more than its numbers say."""

    before: tuple[type, ...] = ()  # the types whose rules come first

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(plain(self), memo).as_subclass(type(self))


def plain(x: Any) -> Any:
    """The numbers alone, through lists and tuples."""
    if isinstance(x, SoftValue):
        with torch._C.DisableTorchFunctionSubclass():
            return x.as_subclass(Tensor)
    if type(x) in (list, tuple):
        return type(x)(plain(v) for v in x)
    return x


def any_of(args: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether an argument is of these types; ``types`` names only the first one where the function is __eq__."""
    return any(isinstance(a, kinds) or (type(a) in (list, tuple) and any_of(a, kinds)) for a in args)


def ordered(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same call with ``input`` and ``other`` by position, and torch's names in place of numpy's."""
    if kwargs.get("out") is not None:
        raise TypeError(f"{func.__name__}(out=...) has no soft form; assign what it returns")
    kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items() if name != "out"}
    if func.__name__ == "where":  # it has names of its own
        return args, kwargs
    for place, name in enumerate(("input", "other")):
        if len(args) == place and name in kwargs:
            args = (*args, kwargs.pop(name))
    return args, kwargs


_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


# --- operations that only move entries about -------------------------------------------------------------------------

STRUCTURAL = (
    "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand",
    "expand_as", "broadcast_to", "broadcast_tensors", "repeat", "tile", "permute", "transpose", "swapaxes",
    "swapdims", "movedim", "moveaxis", "t", "clone", "detach", "contiguous", "select", "narrow", "unbind", "split",
    "chunk", "tensor_split", "diagonal", "flip", "fliplr", "flipud", "roll", "rot90", "unfold", "cpu", "cuda",
    "pin_memory", "atleast_1d", "atleast_2d", "atleast_3d", "requires_grad_", "detach_", "squeeze_", "unsqueeze_",
    "__reversed__", "alias", "positive",
)  # fmt: skip
JOINING = (
    "index_select", "gather", "take", "take_along_dim", "repeat_interleave", "cat", "concat", "concatenate",
    "stack", "hstack", "vstack", "dstack", "column_stack", "hsplit", "vsplit", "dsplit", "tril", "triu", "diag",
    "diag_embed", "pad", "constant_pad_nd",
)  # fmt: skip
PROPERTIES = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.data.__get__)  # type: ignore[attr-defined]


def rewrap(x: Any, wrap: Callable[[Tensor], Any]) -> Any:
    if isinstance(x, Tensor):
        return x if isinstance(x, SoftValue) else wrap(x)
    return type(x)(rewrap(v, wrap) for v in x) if type(x) in (list, tuple) else x
