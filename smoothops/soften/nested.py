"""Calls between softened functions: lists and tensors that are handed over change for the caller too, as in Python.

A call runs on copies, once for all worlds that it splits into. What became of the copies in the world of an outcome is
written back to the caller's own containers, and what is returned refers to those where it refers to the copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .frames import MUTABLE, rebind

if TYPE_CHECKING:
    from .expressions import Expressions


def handed(args: tuple, kwargs: dict) -> list[Any]:
    """The containers and tensors that arguments hold, in the order of a walk."""
    found: list[Any] = []
    seen: set[int] = set()

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            if x.ndim and id(x) not in seen:
                seen.add(id(x))
                found.append(x)
        elif isinstance(x, (*MUTABLE, tuple)):
            if isinstance(x, tuple):
                pass
            elif id(x) in seen:
                return
            else:
                seen.add(id(x))
                found.append(x)
            for item in x.values() if isinstance(x, dict) else x:
                walk(item)

    for value in (*args, *kwargs.values()):
        walk(value)
    return found


def received(run: Expressions, shared: Sequence[Any], value: Any, given: Sequence[Any]) -> Any:
    """The value of a call, behind which the caller's ``shared`` are as the copies ``given``."""
    own = {id(copy): x for copy, x in zip(given, shared, strict=True) if not isinstance(x, Tensor)}

    def translated(x: Any) -> Any:
        if id(x) in own:
            return own[id(x)]
        if isinstance(x, tuple):
            items = [translated(item) for item in x]
            if all(a is b for a, b in zip(items, x, strict=True)):
                return x
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, list | deque | dict):
            own[id(x)] = x  # a container of the call's own, whose items may be the caller's
            for key, item in list(x.items() if isinstance(x, dict) else enumerate(x)):
                x[key] = translated(item)
        return x

    for copy, x in zip(given, shared, strict=True):
        if isinstance(x, Tensor):
            if copy is not x:
                run.changed = True
                rebind(run.frame, x, copy, "the call")
        elif update(x, copy, translated):
            run.changed = True
    return translated(value)


def update(x: Any, copy: Any, translated: Any) -> bool:
    """Makes x what the copy is; whether that changed it."""
    if isinstance(x, dict):
        entries = [(key, translated(item)) for key, item in copy.items()]
        if len(entries) == len(x) and all(a is b and v is x[b] for (a, v), b in zip(entries, x, strict=True)):
            return False
        x.clear()
        x.update(entries)
        return True
    if isinstance(x, set):
        if x == copy:
            return False
        x.clear()
        x.update(copy)
        return True
    items = [translated(item) for item in copy]
    if len(items) == len(x) and all(a is b for a, b in zip(items, x, strict=True)):
        return False
    if isinstance(x, deque):
        x.clear()
        x.extend(items)
    else:
        x[:] = bytearray(items) if isinstance(x, bytearray) else items
    return True
