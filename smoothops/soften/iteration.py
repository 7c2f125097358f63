"""What a loop goes through: lists and dicts as they are in each world, also where the body changes them.

A view is read by position, so that worlds at one line of one loop are at one position of it. Those that hold containers
are tuples, which fork, merge and change with the world; what cannot change is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .frames import Fixed, frozen


class Opaque:
    """An iterator, read once, as far as a world has come."""

    __slots__ = ("items", "iterator")

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.items = iterator, []  # type: ignore[var-annotated]

    def has(self, i: int) -> bool:
        while len(self.items) <= i:
            try:
                self.items.append(next(self.iterator))
            except StopIteration:
                return False
        return True


class Enumerated(NamedTuple):
    items: Any
    start: Any


class Zipped(NamedTuple):
    parts: tuple[Any, ...]
    strict: bool


class Reversed(NamedTuple):
    items: Any
    length: int


class Entries(NamedTuple):
    """Of a dict; ``kind``: keys, values or items."""

    keys: tuple[Any, ...]
    entries: dict[Any, Any]
    kind: str


VIEWS = (Fixed, Opaque, Enumerated, Zipped, Reversed, Entries)


def view(x: Any, live: bool) -> Any:
    """x as a loop reads it; ``live``: whether the function writes to items of tensors."""
    if isinstance(x, (range, str, list, deque, *VIEWS)):
        return x
    if isinstance(x, Tensor):
        return x if live and x.ndim else Fixed(x, tuple(x.unbind(0)) if x.ndim else tuple(x))
    if isinstance(x, tuple):
        return Fixed(x, x) if frozen(x) else x
    if isinstance(x, dict) and type(x).__iter__ is dict.__iter__:
        return Entries(tuple(x), x, "keys")
    return Fixed(x, tuple(x)) if isinstance(x, set | frozenset) else Opaque(iter(x))


def has(x: Any, i: int) -> bool:
    """Whether a view goes on at position i."""
    kind = type(x)
    if kind is range or kind is list:
        return i < len(x)
    if kind is Fixed:
        return i < len(x.items)
    if kind is Opaque:
        return x.has(i)
    if kind is Enumerated:
        return has(x.items, i)
    if kind is Zipped:
        found = [has(part, i) for part in x.parts]
        if x.strict and any(found) and not all(found):
            raise ValueError(f"zip() argument {found.index(False) + 1} is shorter than the others")
        return bool(found) and all(found)
    if kind is Reversed:
        return i < x.length and x.length - 1 - i < len(x.items)
    if kind is Entries:
        if len(x.entries) != len(x.keys):
            raise RuntimeError("dictionary changed size during iteration")
        return i < len(x.keys)
    return i < len(x)


def at(x: Any, i: int) -> Any:
    """The item of a view at position i."""
    kind = type(x)
    if kind is range or kind is list:
        return x[i]
    if kind is Fixed or kind is Opaque:
        return x.items[i]
    if kind is Enumerated:
        return x.start + i, at(x.items, i)
    if kind is Zipped:
        return tuple(at(part, i) for part in x.parts)
    if kind is Reversed:
        return x.items[x.length - 1 - i]
    if kind is Entries:
        key = x.keys[i]
        return key if x.kind == "keys" else x.entries[key] if x.kind == "values" else (key, x.entries[key])
    return x[i]
