"""Whether a call can meet a tensor at all; one that cannot runs as it was written."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

from .frames import MUTABLE

NUMBERS = (int, float, bool, str, type(None), bytes, complex, range)
KINDS = frozenset(NUMBERS)
MISSING = object()


def plain(x: Any) -> bool:
    """Whether x consists of Python's own numbers, strings and containers."""
    if isinstance(x, NUMBERS):
        return True
    if isinstance(x, dict):
        return all(map(plain, x)) and all(map(plain, x.values()))
    if not isinstance(x, (*MUTABLE, tuple)):
        return False
    return KINDS.issuperset(map(type, x)) or all(map(plain, x))


def names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


class Purity:
    """What a function reads besides its arguments: looked up at each call, since globals change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        code: types.CodeType = function.__code__
        self.globals: dict[str, Any] = function.__globals__
        self.defaults = (function.__defaults__, function.__kwdefaults__)
        self.cells = function.__closure__ or ()
        self.free = code.co_freevars
        self.names = names(code)  # attributes among them: a global of that name counts too, which is safe
        self.imports = any(name in self.names for name in ("torch", "import_module", "__import__"))

    def containers(self) -> list[tuple[str, Any]]:
        """Lists, dicts and sets among what the function reads, with their names."""
        found = [(name, self.globals.get(name)) for name in self.names]
        for name, cell in zip(self.free, self.cells, strict=True):
            try:
                found.append((name, cell.cell_contents))
            except ValueError:
                continue
        return [(name, value) for name, value in found if isinstance(value, MUTABLE)]

    def holds(self, arguments: Any, known: tuple[Purity, ...] = ()) -> bool:
        if self.imports or not plain(arguments) or not plain(self.defaults):
            return False
        found = [self.globals.get(name, MISSING) for name in self.names]
        try:
            found += [cell.cell_contents for cell in self.cells]
        except ValueError:  # a variable of the outer function that is not bound yet
            return False
        known = (*known, self)
        for value in found:
            if not (value is MISSING or value is math or plain(value)):
                other = getattr(value, "_purity", None)  # another softened function, or this one
                if not isinstance(other, Purity) or not (other in known or other.holds((), known)):
                    return False
        return True
