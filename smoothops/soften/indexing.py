"""Reading and writing at positions: lists change in their world, tensors are replaced by changed copies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import cannot
from .frames import MUTABLE, Frame, rebind, tensors
from .values import SoftBool, soft

IN_PLACE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "+": (operator.iadd, operator.add),
    "-": (operator.isub, operator.sub),
    "*": (operator.imul, operator.mul),
    "/": (operator.itruediv, operator.truediv),
    "//": (operator.ifloordiv, operator.floordiv),
    "%": (operator.imod, operator.mod),
    "**": (operator.ipow, operator.pow),
    "@": (operator.imatmul, operator.matmul),
    "&": (operator.iand, operator.and_),
    "|": (operator.ior, operator.or_),
    "^": (operator.ixor, operator.xor),
    "<<": (operator.ilshift, operator.lshift),
    ">>": (operator.irshift, operator.rshift),
}


def item_of(x: Any, index: Any) -> Any:
    """x[index]; for a soft index, weights over the positions, the mean of the items."""
    if type(index) is int or not soft(index):
        return x[index]
    weights = soft_index(x, index)
    if isinstance(x, Tensor):
        return torch.tensordot(weights.to(x.dtype) if x.is_floating_point() else weights, x.to(weights.dtype), 1)
    if not all(soft(v) or isinstance(v, float | int) for v in x):
        raise cannot("a soft index averages, and this list holds more than numbers")
    return sum((w * v for w, v in zip(weights.unbind(0), x, strict=True)), start=torch.zeros_like(weights[0]))


def soft_index(x: Any, index: Any) -> Tensor:
    if isinstance(index, SoftBool):
        raise cannot("a mask that depends on a tensor selects a soft number of items; multiply by it instead")
    if not isinstance(x, Tensor | list | tuple) or index.ndim != 1 or len(index) != len(x):
        size = f"{len(x)} items" if hasattr(x, "__len__") else type(x).__name__
        raise cannot(
            f"an index of dtype {str(index.dtype).removeprefix('torch.')} and shape {tuple(index.shape)} into {size}; "
            "a soft index holds one weight for each item (as so.argmax gives it), another index is an int"
        )
    return index


def assign(frame: Frame, value: Any, root: Any, path: Sequence[Any]) -> None:
    """root[path[0]][path[1]]... = value."""
    x = root
    for depth, index in enumerate(path):
        if isinstance(x, Tensor):
            rebind(frame, x, written(x, path[depth:], value), "this assignment")
            return
        if depth < len(path) - 1:
            x = item_of(x, index)
    index = path[-1]
    if not isinstance(x, MUTABLE) or isinstance(x, set):
        raise cannot(f"assignment to an item of a {type(x).__name__}, which cannot be copied; use a list or dict")
    if soft(index):
        weights = soft_index(x, index)
        for i, w in enumerate(weights.unbind(0)):
            x[i] = x[i] + w * (value - x[i])
    else:
        x[index] = value


def written(x: Tensor, path: Sequence[Any], value: Any) -> Tensor:
    """x with the items at path[0], [path[1], ...] replaced, as a new tensor."""
    if len(path) > 1:
        value = written(item_of(x, path[0]), path[1:], value)
    index = path[0]
    if isinstance(value, SoftBool):
        value = value.number
    if (soft(value) or isinstance(value, float)) and not x.is_floating_point():
        raise cannot(f"a floating-point value is written to a tensor of dtype {x.dtype}; convert the tensor first")
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if soft(index):
        weights = soft_index(x, index).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x + weights * (value - x)
    if type(index) is int and x.ndim:
        at = torch.tensor([index % len(x) if -len(x) <= index < len(x) else index], device=x.device)
        return x.index_copy(0, at, value.expand(x.shape[1:]).unsqueeze(0))
    positions = torch.arange(x.numel(), device=x.device).reshape(x.shape)[index]
    values = value.expand(positions.shape).reshape(-1)
    return x.reshape(-1).index_copy(0, positions.reshape(-1), values).reshape(x.shape)


def updated(frame: Frame, op: str, x: Any, value: Any) -> Any:
    """The new value of ``x op= value``; a vector changes for all of its names, as in torch, a number does not."""
    in_place, plain = IN_PLACE[op]
    if not isinstance(x, Tensor | SoftBool):
        if not isinstance(x, MUTABLE) and hasattr(x, f"__{in_place.__name__}__"):
            raise cannot(
                f"'{op}=' would change a {type(x).__name__} for all worlds, since it cannot be copied; write "
                f"x = x {op} ..., or use a tensor or list"
            )
        return in_place(x, value) if isinstance(x, MUTABLE) else plain(x, value)
    new = plain(x, value)
    if isinstance(x, Tensor) and x.ndim and isinstance(new, Tensor):
        if new.shape != x.shape:
            raise cannot(f"'{op}=' would change the shape {tuple(x.shape)} to {tuple(new.shape)}")
        if any(t is x for t in tensors(frame.__dict__, set())):
            rebind(frame, x, new, f"'{op}='")
    return new
