"""Choices by soft booleans: where, masked_fill, and what reads or writes at the places that a mask names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._axes import tensor_like
from ._soft_boolean import SoftBoolean, as_soft_boolean, hard_boolean, is_boolean, rule
from ._soft_values import plain
from .selection import where as soft_where


@rule("where")
def _where(func: Any, *args: Any, **kwargs: Any) -> Any:
    condition, x, y = where_arguments(func, *args, **kwargs)
    if x is None:
        return torch.where(hard_boolean(condition, "torch.where(condition), which lists positions,"))
    booleans = is_boolean(x) and is_boolean(y)
    c, x, y = plain(condition), plain(x), plain(y)
    if not isinstance(condition, SoftBoolean):
        if booleans:
            like = next(v for v in (x, y) if isinstance(v, Tensor) and v.is_floating_point())
            x, y = (tensor_like(v, like) for v in (x, y))
        out = torch.where(c, x, y)
    else:
        if booleans:
            x, y = (tensor_like(v, c) for v in (x, y))
        out = soft_where(c, x, y)
    return as_soft_boolean(out) if booleans else out


def where_arguments(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """(condition, x, y) of torch.where or x.where(condition, y); x and y are None where only the condition is given."""
    names = ("self", "condition", "other") if func is Tensor.where else ("condition", "self", "other")
    kwargs = {"self" if name == "input" else name: value for name, value in kwargs.items()}
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given["condition"], given.get("self"), given.get("other")


@rule("masked_fill")
def _masked_fill(func: Any, x: Any, mask: Any, value: Any) -> Any:
    return _where(torch.where, mask, value, x)


@rule("masked_fill_")
def _masked_fill_(func: Any, x: Any, mask: Any, value: Any) -> Any:
    if not x.is_floating_point():
        mask = hard_boolean(mask, f"masked_fill_ on a tensor of {x.dtype}")
        return x.masked_fill_(mask, value)
    plain(x).copy_(plain(_where(torch.where, mask, value, x)))
    return x


@rule("nonzero", "argwhere", "masked_select", "masked_scatter", "masked_scatter_", "index_put", "index_put_")
def _positions(func: Any, *args: Any, **kwargs: Any) -> Any:
    hard = lambda v: hard_boolean(v, func.__name__) if isinstance(v, SoftBoolean) else v  # noqa: E731
    deep = lambda v: type(v)(map(hard, v)) if type(v) in (list, tuple) else hard(v)  # noqa: E731
    return func(*map(deep, args), **{k: deep(v) for k, v in kwargs.items()})
