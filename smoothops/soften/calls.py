"""Calls from softened functions: builtins on soft numbers, other softened functions, and what is refused."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import elementwise
from ..operators import amax, sort
from .errors import cannot
from .frames import MUTABLE
from .values import number, soft

if TYPE_CHECKING:
    from .expressions import Expressions

Rule = Callable[["Expressions", tuple, dict], Any]
MUTATORS = frozenset(
    (
        "append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "update", "setdefault", "popitem",
        "add", "discard", "appendleft", "popleft", "extendleft", "rotate",
    )
)  # fmt: skip
LEAVES = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__bool__"))
EFFECTS = (builtins.print, builtins.input, builtins.open, builtins.exec, builtins.eval)
ELEMENTARY = {
    getattr(math, name): getattr(torch, name)
    for name in (
        "sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "atan2", "hypot",
        "log1p", "expm1", "log2", "log10",
    )
} | {math.fabs: torch.abs, math.pow: torch.pow}  # fmt: skip


def call(run: Expressions, f: Any, args: tuple, kwargs: dict) -> Any:
    """f(*args, **kwargs) in the present world."""
    nested = getattr(f, "_so_outcomes", None)
    if nested is not None:
        return run.choose(nested(run, args, kwargs))
    owner = getattr(f, "__self__", None)
    if owner is not None and not callable(owner) and type(owner).__name__ != "module":
        return method(run, owner, f, args, kwargs)
    try:
        rule = RULES.get(f)
    except TypeError:  # what cannot be hashed has no rule
        rule = None
    if rule is not None:
        return rule(run, args, kwargs)
    if f in EFFECTS and (run.partial or run.frame._so_weight):
        raise cannot(f"{f.__name__} cannot be softened: this line has a weight below 1; move it out of soft branches")
    if f in ELEMENTARY and any(map(soft, args)):
        return ELEMENTARY[f](*tensors_of(args))
    return f(*args, **kwargs)


def method(run: Expressions, owner: Any, f: Any, args: tuple, kwargs: dict) -> Any:
    name = f.__name__
    if isinstance(owner, Tensor):
        if name.endswith("_") and not name.endswith("__"):
            raise cannot(f".{name}() changes a tensor in place; write x = x.{name[:-1]}(...)")
        if name in LEAVES and owner.is_floating_point():
            raise cannot(f".{name}() takes the number out of its gradient and of its world; use the tensor itself")
        return f(*args, **kwargs)
    if isinstance(owner, MUTABLE) and name in MUTATORS:
        run.changed = True
        if name == "sort" and isinstance(owner, list) and any(map(soft, owner)):
            owner[:] = ordered(run, (owner,), kwargs)
            return None
    if isinstance(owner, list | tuple) and name in ("index", "count", "remove") and any(map(soft, (*owner, *args))):
        raise cannot(f".{name}() compares tensors, and its answer would be soft; write a loop with ==")
    return f(*args, **kwargs)


# --- builtins ---------------------------------------------------------------------------------------------------------


def items_of(args: Sequence[Any]) -> list[Any]:
    return list(args[0]) if len(args) == 1 else list(args)


def extreme(plain: Callable[..., Any], sign: float) -> Rule:
    def rule(run: Expressions, args: tuple, kwargs: dict) -> Any:
        if len(args) == 1 and not isinstance(args[0], Tensor):
            args = (list(args[0]),)
        items = items_of(args) if args else []
        if not any(map(soft, items)):
            return plain(*args, **kwargs)
        if kwargs.get("key") is not None:
            raise cannot(f"{plain.__name__} with key= on tensors would return one of the items softly; use so.argmax")
        columns = torch.broadcast_tensors(*tensors_of(items))
        return sign * amax(sign * torch.stack(columns, -1), -1, smoothing=run.smoothing)

    return rule


def tensors_of(items: Sequence[Any]) -> list[Tensor]:
    found = [v for v in number(list(items)) if isinstance(v, Tensor)]
    dtype = reduce(torch.promote_types, (t.dtype for t in found))
    return [torch.as_tensor(v, dtype=dtype, device=found[0].device) for v in number(list(items))]


def ordered(run: Expressions, args: tuple, kwargs: dict) -> Any:
    items = list(args[0])
    if not any(map(soft, items)):
        return sorted(items, **kwargs)
    if kwargs.get("key") is not None:
        raise cannot("sorting tensors by key= would move the items softly; use so.argsort and a soft index")
    stacked = torch.stack(tensors_of(items))
    if stacked.ndim != 1:
        raise cannot(f"sorting takes numbers, got tensors of shape {tuple(stacked.shape[1:])}")
    return list(sort(stacked, 0, bool(kwargs.get("reverse", False)), smoothing=run.smoothing).unbind(0))


def quantified(name: str) -> Rule:
    def rule(run: Expressions, args: tuple, kwargs: dict) -> Any:
        items: list[Any] = []
        for item in args[0]:  # as far as Python goes: nothing behind what decides
            items.append(item)
            if not soft(item) and bool(item) is (name == "any"):
                break
        return getattr(run, name)([lambda item=item: item for item in items])

    return rule


def rounded(run: Expressions, args: tuple, kwargs: dict) -> Any:
    if not soft(args[0]):
        return round(*args, **kwargs)
    digits = args[1] if len(args) > 1 else kwargs.get("ndigits")
    return elementwise.round(number(args[0]), decimals=digits or 0, smoothing=run.smoothing)


def absolute(run: Expressions, args: tuple, kwargs: dict) -> Any:
    return elementwise.abs(number(args[0]), smoothing=run.smoothing) if soft(args[0]) else abs(*args)


def floats(run: Expressions, args: tuple, kwargs: dict) -> Any:
    return number(args[0]) if args and soft(args[0]) else float(*args)


def integers(run: Expressions, args: tuple, kwargs: dict) -> Any:
    if args and soft(args[0]):
        raise cannot("int() of a soft number: an integer is discrete and has no gradient; use round, or an int loop")
    return int(*args, **kwargs)


def truths(run: Expressions, args: tuple, kwargs: dict) -> Any:
    return run.truth(args[0]) if args else False


def stepped(plain: Callable[..., Any], ours: Callable[..., Tensor]) -> Rule:
    def rule(run: Expressions, args: tuple, kwargs: dict) -> Any:
        return ours(number(args[0]), smoothing=run.smoothing) if soft(args[0]) else plain(*args)

    return rule


RULES: dict[Any, Rule] = {
    max: extreme(max, 1.0),
    min: extreme(min, -1.0),
    sorted: ordered,
    any: quantified("any"),
    all: quantified("all"),
    abs: absolute,
    round: rounded,
    float: floats,
    int: integers,
    bool: truths,
    math.floor: stepped(math.floor, elementwise.floor),
    math.ceil: stepped(math.ceil, elementwise.ceil),
    sum: lambda run, args, kwargs: sum(number(items_of(args[:1])), *args[1:], **kwargs),
}
SOFTENED_BUILTINS = frozenset(("max", "min", "sorted", "any", "all", "abs", "round", "float", "int", "bool", "sum"))
