"""The soft boolean of a softened context: a probability that knows it stands for a yes or no.

A Tensor subclass, not a registry of tensors: the type lives as long as the value, follows it through autograd, vmap,
views, copies and pickling, and costs nothing to tensors of other types. Only what keeps the meaning keeps the type:
moving entries about and logic. Arithmetic gives plain numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import comparisons
from . import logic as _logic
from ._axes import tensor_like
from ._soft_values import (
    JOINING,
    PROPERTIES,
    STRUCTURAL,
    SoftValue,
    any_of,
    context,
    ordered,
    own_work,
    plain,
    rewrap,
    spelled,
)  # fmt: skip
from .selection import where as soft_where

# --- the type --------------------------------------------------------------------------------------------------------


class SoftBoolean(SoftValue):
    """P(A) for events A, in [0, 1], with the operations of a bool tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any_of((*args, *kwargs.values()), cls.before):
            return NotImplemented
        if not own_work():
            rule = RULES.get(func)
            if rule is not None:
                args, kwargs = ordered(func, args, kwargs)
                return rule(func, *args, **kwargs)
            _refuse_in_place(func, args)
            args, kwargs = _hard_where_stored(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def as_soft_boolean(p: Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return p.as_subclass(SoftBoolean)


def is_boolean(x: Any) -> bool:
    return isinstance(x, (SoftBoolean, bool)) or (isinstance(x, Tensor) and x.dtype == torch.bool)


def hard_boolean(p: Any, doing: str) -> Tensor:
    """p as a bool tensor, if every entry is 0 or 1."""
    p = plain(p).detach()
    if bool(p.isnan().any()):
        raise ValueError(f"{doing} needs a yes or no, but this soft boolean holds NaN, as what was compared does")
    between = ~((p == 0) | (p == 1))
    if bool(between.any()):
        open_ = p[between]
        example = float(open_[(open_ - 0.5).abs().argmin()])
        raise ValueError(
            f"{doing} needs a yes or no, but inside so.softened this is a soft boolean with values strictly between 0 "
            f"and 1, such as {example:.6g}. Use it as a weight (torch.where, masked_fill, & | ~, .float()); "
            "for an `if` use @so.soften. Values are 0 or 1 with smoothing=so.StraightThrough(...), and with "
            "so.Quadratic(eps) farther than eps from the boundary; keep=(...) leaves an operation hard"
        )
    return p == 1


# --- rules -----------------------------------------------------------------------------------------------------------

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def current_logic() -> _logic.Logic:
    innermost = context()
    return _logic.INDEPENDENT if innermost is None else innermost.logic


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(spelled(*names), function))
        return function

    return register


@rule(*STRUCTURAL, *JOINING)
def _structural(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Entries moved about; of a list with plain numbers in it, numbers."""
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    first = args[0] if args else next(iter(kwargs.values()))
    moved = first if isinstance(first, (list, tuple)) else [first]
    return rewrap(out, as_soft_boolean) if all(is_boolean(v) for v in moved) else out


for _property in PROPERTIES:
    RULES[_property] = _structural


@rule("__iter__")
def _iterate(func: Any, p: Any) -> Any:
    return iter([as_soft_boolean(v) for v in plain(p).unbind(0)])


@rule("__getitem__")
def _read(func: Any, x: Any, index: Any) -> Any:
    return rewrap(plain(x)[_hard_index(index)], as_soft_boolean if is_boolean(x) else _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _hard_index(index: Any) -> Any:
    if isinstance(index, SoftBoolean):
        return hard_boolean(index, "indexing by a mask")
    if type(index) in (list, tuple):
        return type(index)(_hard_index(i) for i in index)
    return index


@rule("__setitem__")
def _write(func: Any, x: Tensor, index: Any, value: Any) -> None:
    """``x[p] = value`` with one value is x <- p value + (1 - p) x."""
    one = not isinstance(value, Tensor) or value.ndim == 0
    if isinstance(index, SoftBoolean) and one and (x.is_floating_point() or isinstance(x, SoftBoolean)):
        mask = plain(index).reshape((*index.shape, *(1,) * (x.ndim - index.ndim)))
        value = _truth(value) if isinstance(x, SoftBoolean) else value
        plain(x).copy_(soft_where(mask, plain(value), plain(x)))
        return
    if isinstance(x, SoftBoolean):
        value = _truth(value)
    elif isinstance(value, SoftBoolean) and not x.is_floating_point():
        value = hard_boolean(value, "storing in a tensor of " + str(x.dtype))
    plain(x)[_hard_index(index)] = plain(value)


def _truth(value: Any) -> Any:
    """What is stored in a soft boolean: numbers are true where they are not 0, as in a bool tensor."""
    if is_boolean(value):
        return plain(value)
    if not isinstance(value, Tensor):
        return float(bool(value))
    if not value.is_floating_point():
        return value != 0
    innermost = context()
    if innermost is None:
        raise ValueError(f"a soft boolean takes another boolean, got {value.dtype}; write (y != 0)")
    return comparisons.ne(plain(value), 0, smoothing=innermost.smoothing)


@rule("copy_", "fill_")
def _store(func: Any, x: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, SoftBoolean):
        func(plain(x), _truth(value), *args, **kwargs)
        return x
    if not x.is_floating_point():
        value = hard_boolean(value, f"{func.__name__} into {x.dtype}")
    return func(x, plain(value), *args, **kwargs)


@rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _like(func: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
    """Another mask, as of a bool tensor."""
    made = func(plain(p), *plain(args), **{name: plain(v) for name, v in kwargs.items()})
    boolean = "full" not in func.__name__ or is_boolean(args[-1] if args else kwargs.get("fill_value"))
    return as_soft_boolean(made) if isinstance(p, SoftBoolean) and "dtype" not in kwargs and boolean else made


# --- logic -----------------------------------------------------------------------------------------------------------


def _pair(func: Any, p: Any, q: Any) -> tuple[Tensor, Tensor]:
    like = next(v for v in (p, q) if isinstance(v, SoftBoolean))
    out = []
    for v in (p, q):
        if isinstance(v, Tensor) and func.__name__.startswith("logical"):
            v = as_soft_boolean(tensor_like(_truth(v), like))
        if not is_boolean(v):
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            # not a TypeError: Python would take it for NotImplemented and lose the message
            raise ValueError(f"{func.__name__} of a soft boolean needs another boolean, got {kind}; write (y != 0)")
        out.append(tensor_like(plain(v), like))
    return out[0], out[1]


def _and(func: Any, p: Any, q: Any) -> Any:
    return as_soft_boolean(_logic.logical_and(*_pair(func, p, q), logic=current_logic()))


def _or(func: Any, p: Any, q: Any) -> Any:
    return as_soft_boolean(_logic.logical_or(*_pair(func, p, q), logic=current_logic()))


def _xor(func: Any, p: Any, q: Any) -> Any:
    return as_soft_boolean(_logic.logical_xor(*_pair(func, p, q), logic=current_logic()))


def _in_place(operation: Rule) -> Rule:
    def store(func: Any, p: Any, *rest: Any) -> Any:
        value = operation(func, p, *rest)
        if not isinstance(p, SoftBoolean):
            if func.__name__.startswith("__"):  # `mask &= soft` names a new tensor where a bool one cannot hold it
                return value
            value = hard_boolean(value, f"{func.__name__} on a bool tensor")
        plain(p).copy_(plain(value))
        return p

    return store


for _name, _operation in (("and", _and), ("or", _or), ("xor", _xor)):
    rule(f"__{_name}__", f"__r{_name}__", f"logical_{_name}", f"bitwise_{_name}")(_operation)
    rule(f"__i{_name}__", f"logical_{_name}_", f"bitwise_{_name}_")(_in_place(_operation))


def _of_two(operation: Rule) -> Rule:
    def calculate(func: Any, p: Any, q: Any, **kwargs: Any) -> Any:
        if kwargs or not (is_boolean(p) and is_boolean(q)):
            return func(plain(p), plain(q), **kwargs)
        return operation(func, p, q)

    return calculate


# of two bool tensors, torch's + is or and its * is and
rule("add", "__add__", "__radd__")(_of_two(_or))
rule("mul", "multiply", "__mul__", "__rmul__")(_of_two(_and))


@rule("__invert__", "logical_not", "bitwise_not")
def _not(func: Any, p: Any) -> Any:
    return as_soft_boolean(_logic.logical_not(plain(p)))


rule("logical_not_", "bitwise_not_")(_in_place(_not))


@rule("all")
def _all(func: Any, p: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim in ((), []):  # torch reduces nothing then
        return as_soft_boolean(plain(p).clone())
    return as_soft_boolean(_logic.all(plain(p), dim, keepdim, logic=current_logic()))


@rule("any")
def _any(func: Any, p: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim in ((), []):
        return as_soft_boolean(plain(p).clone())
    return as_soft_boolean(_logic.any(plain(p), dim, keepdim, logic=current_logic()))


@rule("amax", "amin", "max", "min")
def _extreme(func: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest of booleans is any, the smallest all; positions are those of the largest P(A)."""
    if isinstance((*args, p)[0], SoftBoolean) and args:  # max(p, q)
        return (_or if "max" in func.__name__ else _and)(func, p, *args)
    largest = "max" in func.__name__
    value = (_any if largest else _all)(func, p, *args, **kwargs)
    if func.__name__ in ("amax", "amin") or not (args or kwargs):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        indices = func(p, *args, **kwargs).indices
    return (torch.return_types.max if largest else torch.return_types.min)((value, indices))


@rule("__format__")
def _format(func: Any, p: Any, spec: str) -> str:
    return format(plain(p), spec)


@rule("sum", "cumsum", "nansum", "mean", "count_nonzero")
def _count(func: Any, p: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    """The expected count, a plain number with gradient."""
    if dtype is not None and dtype.is_floating_point:
        kwargs["dtype"] = dtype
    if func in tuple(spelled("count_nonzero")):
        func = Tensor.sum
    return func(plain(p), *args, **kwargs)


def _compare(holds: Callable[[Any, Any], Any]) -> Rule:
    """P(A op y) = P(A) [1 op y] + P(not A) [0 op y]; of two soft booleans by the same formula, then logic."""

    def compare(func: Any, p: Any, y: Any) -> Any:
        if isinstance(p, SoftBoolean) and isinstance(y, SoftBoolean):
            p, y = plain(p), plain(y)
            table = [[holds(a, b) for b in (0, 1)] for a in (0, 1)]
            both = _logic.logical_and(p, y, logic=current_logic())
            parts = [[1 - p - y + both, y - both], [p - both, both]]
            return as_soft_boolean(sum(parts[a][b] * float(table[a][b]) for a in (0, 1) for b in (0, 1)))
        if not all(isinstance(v, (Tensor, int, float)) for v in (p, y)):  # `p == None`
            return func(plain(p), plain(y))
        if isinstance(p, SoftBoolean):
            p, yes, no = plain(p), holds(1, y), holds(0, y)
        else:
            p, yes, no = plain(y), holds(p, 1), holds(p, 0)
        yes, no = (tensor_like(v, p) for v in (yes, no))
        return as_soft_boolean(p * yes + (1 - p) * no)

    return compare


COMPARISONS: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, ...]]] = {
    "gt": (operator.gt, ("gt", "greater", "__gt__")),
    "ge": (operator.ge, ("ge", "greater_equal", "__ge__")),
    "lt": (operator.lt, ("lt", "less", "__lt__")),
    "le": (operator.le, ("le", "less_equal", "__le__")),
    "eq": (operator.eq, ("eq", "__eq__")),
    "ne": (operator.ne, ("ne", "not_equal", "__ne__")),
}
for _holds, _names in COMPARISONS.values():
    rule(*_names)(_compare(_holds))


# --- out of the type -------------------------------------------------------------------------------------------------


@rule("__bool__", "is_nonzero", "__int__", "__index__", "item", "tolist", "numpy", "__array__")
def _decide(func: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
    name = {"__bool__": "bool(), as in `if`, `and`, `assert`,"}.get(func.__name__, func.__name__)
    return func(hard_boolean(p, name), *args, **kwargs)


@rule("to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long", "short", "byte", "char")
def _cast(func: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
    """Numbers of a floating dtype; an integer dtype would cut a probability to 0, so the dtype stays: its mean."""
    if not isinstance(p, SoftBoolean):  # x.type_as(p), x.to(p)
        return as_soft_boolean(func(_truth(p), *plain(args), **kwargs))
    # what torch would answer for a bool tensor that shares p's device
    like = func(torch.empty(0, dtype=torch.bool, device=p.device), *plain(args), **kwargs)
    if not isinstance(like, Tensor):
        return like
    kept = plain(p).to(like.device)
    if like.dtype == torch.bool:
        return as_soft_boolean(kept)
    return kept.to(like.dtype) if like.is_floating_point() or like.is_complex() else kept


_STORES = {"copy_", "fill_", "zero_", "__setitem__", "share_memory_", "retain_grad", "backward", "register_hook"}


def _refuse_in_place(func: Any, args: Any) -> None:
    name = getattr(func, "__name__", "")
    arithmetic = name.endswith("_") and not name.startswith("_") and name not in _STORES
    if args and isinstance(args[0], SoftBoolean) and arithmetic:
        raise TypeError(f"{name} would change a soft boolean in place, as torch refuses on a bool tensor; use .float()")


def _hard_where_stored(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A soft boolean written into integers or bools must be hard: 0.001 would be stored as True."""
    name = getattr(func, "__name__", "")
    if not (name.endswith("_") and args and isinstance(args[0], Tensor) and not args[0].is_floating_point()):
        return args, kwargs
    hard = lambda v: hard_boolean(v, f"{name} into {args[0].dtype}") if isinstance(v, SoftBoolean) else v  # noqa: E731
    return tuple(map(hard, args)), {k: hard(v) for k, v in kwargs.items()}
