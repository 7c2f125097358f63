"""Expressions of one world: comparisons, logic and conditional expressions, soft on what is soft, else Python's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import comparisons
from .._axes import floating_dtype
from ..control._guard import guarded
from ..logic import logical_and, logical_or
from ..smoothing import SmoothingLike
from .calls import call
from .errors import cannot
from .frames import MUTABLE, Form, Frame, frozen, holds_soft, inside
from .indexing import assign, item_of, updated
from .merging import Mean, blend, fits
from .values import SoftBool, logistic, soft, truth, widened
from .weights import Weight, sides

PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "is": operator.is_,
    "is not": operator.is_not,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}
SOFT = {
    "<": comparisons.lt,
    "<=": comparisons.le,
    ">": comparisons.gt,
    ">=": comparisons.ge,
    "==": comparisons.eq,
    "!=": comparisons.ne,
}
RISING, FALLING = ("<", "<="), (">", ">=")
Thunk = Callable[[], Any]


class Expressions:
    """What expressions of the program call; ``frame`` is the world that they are of."""

    smoothing: SmoothingLike
    eps: float | None  # of the logistic law, where it is that
    frame: Frame
    depth: int
    partial: bool  # whether the calling world has a weight below 1
    changed: bool
    outside: list[tuple[str, Any]]  # containers of objects and of the module, with their names
    compared: dict[Any, tuple[Any, Any, SoftBool]]

    def replaying(self) -> bool:
        raise NotImplementedError

    def choose(self, outcomes: Sequence[tuple[Weight | None, Any]]) -> Any:
        raise NotImplementedError

    # --- truth --------------------------------------------------------------------------------------------------------

    def compare(self, left: Any, op: Any, right: Any, *rest: Any) -> Any:
        """left op right, and a chain ``rest`` of operators and delayed operands."""
        if not rest:
            kinds = type(left), type(right)
            return PLAIN[op](left, right) if kinds in NUMBERS else self.pair(left, op, right)
        if soft(right):
            first = self.pair(left, op, right)
            if first is False or (isinstance(first, SoftBool) and first.certain(False)):
                return first
            last = self.maybe(rest[1], first)
            between = self.between(left, op, right, rest[0], last)
            if between is not None:
                more = (lambda: self.compare(last, rest[2], rest[3](), *rest[4:]),) if len(rest) > 2 else ()
                return self.and_(between, *more)
            rest = (rest[0], lambda: last, *rest[2:])
        return self.and_(self.pair(left, op, right), lambda: self.compare(right, rest[0], rest[1](), *rest[2:]))

    def pair(self, a: Any, op: str, b: Any) -> Any:
        if op in ("in", "not in"):
            found = self.contains(a, b)
            return found if op == "in" else self.not_(found)
        if op in ("is", "is not"):
            return PLAIN[op](a, b)
        if isinstance(a, SoftBool) or isinstance(b, SoftBool):
            a, b = self.boolean(a, b, op), self.boolean(b, a, op)
            return self.equal(a, b) if op == "==" else self.not_(self.equal(a, b))
        if op in ("==", "!=") and isinstance(a, list | tuple) and isinstance(b, list | tuple):
            same = type(a) is type(b) and len(a) == len(b)
            equal = same and self.all(lambda i=i: self.pair(a[i], "==", b[i]) for i in range(len(a)))
            return equal if op == "==" else self.not_(equal)
        if not (soft(a) or soft(b)):
            if holds_soft(a) or holds_soft(b):
                raise cannot(
                    f"'{op}' of a {type(a).__name__} and a {type(b).__name__} that hold soft numbers; {ONE_BY_ONE}"
                )
            return PLAIN[op](a, b)
        if not all(isinstance(x, Tensor | float | int) for x in (a, b)):
            if op in ("==", "!="):
                return op == "!="  # a number and what is none
            raise cannot(f"'{op}' between {type(a).__name__} and {type(b).__name__}")
        # worlds that share both sides share the answer; the entry keeps them alive, so that an id stays theirs
        key = op, *(id(x) if isinstance(x, Tensor) else float(x) for x in (a, b))
        if key not in self.compared:
            p = logistic(a, b, op, self.eps)
            if p is None:
                p = SOFT[op](*widened(a, b), smoothing=self.smoothing)
            self.compared[key] = a, b, SoftBool(p, floating_dtype(a, b))
        return self.compared[key][2]

    def between(self, a: Any, op: str, x: Any, next_op: str, b: Any) -> Any:
        """An interval a < x < b, which is one joint event; None where the chain is no interval of numbers."""
        if op in FALLING and next_op in FALLING:
            return self.between(b, FLIPPED[next_op], x, FLIPPED[op], a)
        numbers = all(isinstance(v, Tensor | float | int) for v in (a, x, b))
        if op not in RISING or next_op not in RISING or not numbers or not any(map(soft, (a, x, b))):
            return None
        low, mid, high = widened(a, x, b)
        ends = float(op == "<="), float(next_op == "<")
        return SoftBool(comparisons.interval(mid - low, mid - high, *ends, self.smoothing), floating_dtype(a, x, b))

    def boolean(self, x: Any, other: Any, op: str) -> Any:
        if op not in ("==", "!=") or not isinstance(x, SoftBool | bool):
            raise cannot(f"'{op}' of a soft boolean and {type(x if isinstance(other, SoftBool) else other).__name__}")
        return x

    def equal(self, a: Any, b: Any) -> Any:
        if not isinstance(a, SoftBool):
            a, b = b, a
        if not isinstance(b, SoftBool):
            return a if b else self.not_(a)
        return SoftBool(a.p * b.p + (1 - a.p) * (1 - b.p), a.dtype)

    def contains(self, x: Any, items: Any) -> Any:
        if isinstance(items, Tensor):
            items = items.reshape(-1).unbind(0)
        if isinstance(items, list | tuple) and (soft(x) or any(map(soft, items))):
            return self.any(lambda item=item: self.pair(x, "==", item) for item in items)
        if soft(x):
            raise cannot(f"a soft number cannot be looked up in a {type(items).__name__}; use a list")
        return x in items

    def truth(self, x: Any) -> Any:
        return truth(x, self.smoothing)

    def not_(self, x: Any) -> Any:
        x = self.truth(x)
        return SoftBool(1 - x.p, x.dtype) if isinstance(x, SoftBool) else not x

    def and_(self, x: Any, *rest: Thunk) -> Any:
        return self.chain(x, rest, False, logical_and)

    def or_(self, x: Any, *rest: Thunk) -> Any:
        return self.chain(x, rest, True, logical_or)

    def chain(self, x: Any, rest: Sequence[Thunk], end: bool, joined: Callable[..., Tensor]) -> Any:
        """``and`` ends at what is False, ``or`` at what is True; what follows runs only if its weight is not 0."""
        for thunk in rest:
            value = self.truth(x)
            if value is end or (isinstance(value, SoftBool) and value.certain(end)):
                return x
            if not isinstance(value, SoftBool) or value.certain(not end):
                x = thunk()
                continue
            other = self.truth(self.maybe(thunk, self.not_(value) if end else value))
            if isinstance(other, SoftBool):
                x = SoftBool(joined(value.p, other.p), value.dtype)
            else:
                x = other if other is end else value
        return x

    def operand(self, end: bool, x: Any, *rest: Thunk) -> Any:
        """The value of ``and`` (end: False) or ``or`` (True), which is one of the operands."""
        for thunk in rest:
            value = self.truth(x)
            if not isinstance(value, SoftBool) or value.certain(end) or value.certain(not end):
                if bool(value) is end:
                    return x
                x = thunk()
                continue
            other = self.maybe(thunk, self.not_(value) if end else value)
            if isinstance(x, SoftBool) and isinstance(other, SoftBool):
                x = SoftBool((logical_or if end else logical_and)(x.p, other.p), x.dtype)
                continue
            kept = end if isinstance(x, SoftBool) else x  # what x is where the chain ends with it
            x = self.either(value, *((kept, other) if end else (other, kept)))
        return x

    def maybe(self, thunk: Thunk, condition: SoftBool) -> Any:
        """What runs under a soft condition inside of an expression."""
        kept = self.partial, self.changed
        self.partial, self.changed = True, False
        dead = condition.p == 0
        with guarded(dead) if dead.ndim else nullcontext():
            value = thunk()
        if self.changed:
            raise cannot("a variable is changed in a part of an expression that runs softly; write an if statement")
        self.partial, self.changed = kept
        if dead.ndim and isinstance(value, SoftBool) and value.p.shape == dead.shape:
            return SoftBool(torch.where(dead, 0, value.p), value.dtype)  # NaN times 0 is NaN
        return value

    def all(self, thunks: Any) -> Any:
        return self.truth(self.and_(True, *thunks))

    def any(self, thunks: Any) -> Any:
        return self.truth(self.or_(False, *thunks))

    def test(self, x: Any) -> bool:
        """The filter of a comprehension, which decides on a length."""
        value = self.truth(x)
        if isinstance(value, SoftBool):
            if value.certain(True) or value.certain(False):
                return value.certain(True)
            raise cannot(
                "the filter of a comprehension depends on a tensor, so its length would be soft; write a loop, or add "
                "the conditions up, as in sum(x > t for x in xs)"
            )
        return bool(value)

    def require(self, x: Any) -> bool:
        """The condition of an assert."""
        value = self.truth(x)
        if isinstance(value, SoftBool) and not (value.certain(True) or value.certain(False)):
            raise cannot("assert on a tensor cannot be softened: an exception has no weight; remove it")
        return bool(value)

    def ifexp(self, condition: Any, yes: Thunk, no: Thunk) -> Any:
        """yes() if condition else no()."""
        value = self.truth(condition)
        if not isinstance(value, SoftBool):
            return yes() if value else no()
        if value.certain(True) or value.certain(False):
            return yes() if value.certain(True) else no()
        return self.either(value, self.maybe(yes, value), self.maybe(no, self.not_(value)))

    def either(self, condition: SoftBool, yes: Any, no: Any) -> Any:
        """The mean of two numbers or tuples of numbers; of other values one, each in a world of its own."""
        weights = [Weight(None, side) for side in sides(condition.p, condition.dtype)]
        forms = [Form(aliases=False), Form(aliases=False)]
        same = forms[0].of(yes) == forms[1].of(no) and all(map(fits, forms[0].shapes, forms[1].shapes))
        if same and frozen(yes) and frozen(no):  # two lists are two objects, also where they hold the same
            return blend([yes, no], Mean(weights), {})
        return self.choose([(weights[0], yes), (weights[1], no)])

    # --- the rest -----------------------------------------------------------------------------------------------------

    def call(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, f, args, kwargs)

    def attribute(self, x: Any, name: str) -> Any:
        """x.name, in a function that changes containers: what an object holds is not the world's own."""
        value = getattr(x, name)
        if isinstance(value, MUTABLE) and not isinstance(x, tuple):
            self.outside.append((f".{name}", value))
        return value

    def owned(self, x: Any, what: str) -> None:
        """Refuses to change a container that lives outside of the worlds."""
        for name, container in self.outside:
            if container is x or inside(x, container, set()):
                raise cannot(
                    f"{what} changes {name}, which is no local variable; make a copy of it first, as in list(...), or "
                    "pass it as an argument and return it"
                )

    def getitem(self, x: Any, index: Any) -> Any:
        return item_of(x, index)

    def setitem(self, value: Any, root: Any, *path: Any) -> None:
        self.changed = True
        if self.outside and path and isinstance(root, MUTABLE):
            x = root
            for index in path[:-1]:
                x = item_of(x, index)
            self.owned(x, "the assignment")
        assign(self.frame, value, root, path)

    def update(self, op: str, x: Any, value: Any) -> Any:
        """The new value of ``x op= value``."""
        self.changed = True
        if self.outside and isinstance(x, MUTABLE):
            self.owned(x, f"'{op}='")
        return updated(self.frame, op, x, value)

    def let(self, name: str, value: Any) -> Any:
        self.changed = True
        self.frame.__dict__[name] = value
        return value


ONE_BY_ONE = "compare the numbers one by one"
NUMBERS = {(a, b) for a in (int, float, bool) for b in (int, float, bool)} | {(str, str)}
FLIPPED = {">": "<", ">=": "<="}
