"""Calls from softened functions: builtins on soft numbers, other softened functions, and what is refused."""

from __future__ import annotations

import builtins
import logging
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from io import IOBase
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import elementwise
from .._axes import concrete
from ..operators import amax, argmax, sort
from .errors import cannot
from .frames import MUTABLE, holds_soft
from .names import MUTATORS
from .nested import handed, received
from .values import number, soft, wide
from .weights import ROUNDING, Factor, Weight

if TYPE_CHECKING:
    from .expressions import Expressions

Rule = Callable[["Expressions", tuple, dict], Any]
LEAVES = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__bool__"))
INTEGERS = frozenset(("long", "int", "short", "char", "byte", "bool"))
# of tensors, with nothing to look at
PLAIN_METHODS = frozenset(name for name in dir(Tensor) if name[0] != "_" and name[-1] != "_") - LEAVES - INTEGERS
HARD_MODULES = frozenset(("heapq", "_heapq", "bisect", "_bisect", "statistics"))
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
    owner = getattr(f, "__self__", None)
    if type(owner) is Tensor and f.__name__ in PLAIN_METHODS and not kwargs:
        return f(*args)
    if type(f) is partial:
        f, args, kwargs = f.func, (*f.args, *args), {**f.keywords, **kwargs}
        owner = getattr(f, "__self__", None)
    if type(f) is MethodType and hasattr(f.__func__, "_so_outcomes"):  # a softened class method
        f, args = f.__func__, (owner, *args)
    nested = getattr(f, "_so_outcomes", None)
    if nested is not None:
        shared = handed(args, kwargs)
        outcomes = () if run.replaying() else nested(run, args, kwargs, shared)
        return received(run, shared, *run.choose(outcomes))
    if owner is not None and not callable(owner) and type(owner).__name__ != "module":
        return method(run, owner, f, args, kwargs)
    rule = rule_of(f)
    if rule is not None:
        return rule(run, args, kwargs)
    if any(map(soft, args)) and f in ELEMENTARY:
        return ELEMENTARY[f](*tensors_of(args))
    return foreign(run, f, args, kwargs)


def rule_of(f: Any) -> Rule | None:
    try:
        return RULES.get(f)
    except TypeError:  # what cannot be hashed has no rule
        return None


def foreign(run: Expressions, f: Any, args: tuple, kwargs: dict) -> Any:
    """A call of what is not softened, where it does nothing that cannot be softened."""
    name, module = getattr(f, "__name__", ""), getattr(f, "__module__", None) or ""
    partial_weight = run.partial or run.frame._so_weight is not None
    if partial_weight and (f in EFFECTS or module in ("logging", "warnings")):
        raise cannot(f"{name} cannot be softened: this line has a weight below 1; move it out of soft branches")
    if module in HARD_MODULES and any(soft(x) or holds_soft(x) for x in args):
        raise cannot(
            f"{module.lstrip('_')}.{name}() compares tensors and would decide hard; write the comparisons as code"
        )
    writes = name[-1:] == "_" and name[-2:] != "__" and args and isinstance(args[0], Tensor)
    if writes or isinstance(kwargs.get("out"), Tensor) or kwargs.get("inplace") is True:
        raise cannot(f"{name}() changes a tensor in place; use what it returns without out=, inplace= or the last _")
    if isinstance(f, FunctionType) and any(isinstance(x, MUTABLE) for x in args):
        run.changed = run.changed or f.__code__.co_filename != torch_file(f)
    # builtins that are handed on, as in functools.reduce(max, xs)
    args = tuple(softened(run, x) if type(x) is BuiltinFunctionType else x for x in args)
    return f(*args, **kwargs)


def softened(run: Expressions, f: Any) -> Any:
    rule = rule_of(f)
    return f if rule is None else lambda *args, **kwargs: rule(run, args, kwargs)


def torch_file(f: Any) -> str:
    """The file of a function of torch, which changes no list that it is given."""
    return f.__code__.co_filename if (f.__module__ or "").partition(".")[0] in ("torch", "smoothops") else ""


def method(run: Expressions, owner: Any, f: Any, args: tuple, kwargs: dict) -> Any:
    name = f.__name__
    if isinstance(owner, Tensor):
        if name.endswith("_") and not name.endswith("__"):
            raise cannot(f".{name}() changes a tensor in place; write x = x.{name[:-1]}(...)")
        if name in INTEGERS and owner.is_floating_point():
            raise cannot(f".{name}() of a soft number: an integer is discrete and has no gradient; use so.round")
        if name in LEAVES and owner.is_floating_point():
            raise cannot(f".{name}() takes the number out of its gradient and of its world; use the tensor itself")
        return f(*args, **kwargs)
    if isinstance(owner, MUTABLE) and name in MUTATORS:
        run.owned(owner, f"{name}()")
        run.changed = True
        if name == "sort" and isinstance(owner, list):
            owner[:] = ordered(run, (owner,), kwargs)
            return None
    if isinstance(owner, list | tuple) and name in ("index", "count", "remove") and any(map(soft, (*owner, *args))):
        raise cannot(f".{name}() compares tensors, and its answer would be soft; write a loop with ==")
    if isinstance(owner, IOBase | logging.Logger) and (run.partial or run.frame._so_weight is not None):
        raise cannot(f".{name}() cannot be softened: this line has a weight below 1; move it out of soft branches")
    return f(*args, **kwargs)


# --- builtins ---------------------------------------------------------------------------------------------------------


def items_of(args: Sequence[Any]) -> list[Any]:
    return list(args[0]) if len(args) == 1 else list(args)


def extreme(plain: Callable[..., Any], sign: float) -> Rule:
    def rule(run: Expressions, args: tuple, kwargs: dict) -> Any:
        if len(args) == 1 and not isinstance(args[0], Tensor):
            args = (list(args[0]),)
        items = items_of(args) if args else []
        if kwargs.get("key") is not None and items:
            return chosen(run, plain, sign, items, kwargs["key"])
        if not any(map(soft, items)):
            refuse_tuples(plain.__name__, items)
            return plain(*args, **kwargs)
        columns = torch.broadcast_tensors(*tensors_of(items))
        return sign * amax(sign * torch.stack(columns, -1), -1, smoothing=run.smoothing)

    return rule


def chosen(run: Expressions, plain: Callable[..., Any], sign: float, items: list[Any], key: Any) -> Any:
    """The item of the largest key: each in a world of its own, by the weights of so.argmax."""
    keys = [call(run, key, (item,), {}) for item in items]
    if not any(map(soft, keys)):
        refuse_tuples(plain.__name__, keys)
        return items[plain(range(len(keys)), key=keys.__getitem__)]
    stacked = torch.stack(torch.broadcast_tensors(*tensors_of(keys)))
    if stacked.ndim != 1:
        raise cannot(
            f"{plain.__name__} with key= takes numbers as keys, got tensors of shape {tuple(stacked.shape[1:])}"
        )
    weights = argmax(sign * wide(stacked), 0, smoothing=run.smoothing).unbind(0)
    possible = [i for i, w in enumerate(weights) if not concrete(w) or w >= ROUNDING]
    if len(possible) == 1:
        return items[possible[0]]
    return run.choose([(Weight(None, Factor(weights[i], stacked.dtype)), items[i]) for i in possible])


def refuse_tuples(name: str, items: Sequence[Any]) -> None:
    if any(map(holds_soft, items)):
        raise cannot(
            f"{name}() of tuples that hold soft numbers would compare them hard; take the number alone, or for the "
            "item of the largest or smallest number max or min with key="
        )


def tensors_of(items: Sequence[Any]) -> list[Tensor]:
    found = [v for v in number(list(items)) if isinstance(v, Tensor)]
    dtype = reduce(torch.promote_types, (t.dtype for t in found))
    return [torch.as_tensor(v, dtype=dtype, device=found[0].device) for v in number(list(items))]


def ordered(run: Expressions, args: tuple, kwargs: dict) -> Any:
    items = list(args[0])
    key = kwargs.get("key")
    keys = items if key is None else [call(run, key, (item,), {}) for item in items]
    if not any(map(soft, keys)):
        refuse_tuples("sorted", keys)
        order = sorted(range(len(items)), key=keys.__getitem__, reverse=bool(kwargs.get("reverse", False)))
        return [items[i] for i in order]
    if key is not None:
        raise cannot("sorting by key= on tensors would move the items softly; use so.argsort and a soft index")
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


def compared(op: str) -> Rule:
    return lambda run, args, kwargs: run.compare(args[0], op, args[1])


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
    operator.not_: lambda run, args, kwargs: run.not_(*args),
    operator.truth: truths,
    operator.abs: absolute,
    sum: lambda run, args, kwargs: sum(number(items_of(args[:1])), *args[1:], **kwargs),
}
for _name, _op in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    RULES[getattr(operator, _name)] = compared(_op)
SOFTENED_BUILTINS = frozenset(("max", "min", "sorted", "any", "all", "abs", "round", "float", "int", "bool", "sum"))
