"""Whether a call can meet a tensor at all; one that cannot runs as it was written."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

from .frames import MUTABLE

NUMBERS = (int, float, bool, str, type(None), bytes, complex, range)
MISSING = object()


def plain(x: Any) -> bool:
    """Whether x consists of Python's own numbers, strings and containers."""
    if isinstance(x, NUMBERS):
        return True
    if isinstance(x, dict):
        return all(map(plain, x.values()))
    return isinstance(x, (*MUTABLE, tuple)) and all(map(plain, x))


class Purity:
    """What a function reads besides its arguments: looked up at each call, since globals change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        code: types.CodeType = function.__code__
        self.globals: dict[str, Any] = function.__globals__
        self.defaults = (function.__defaults__, function.__kwdefaults__)
        self.cells = function.__closure__ or ()
        self.names = set(code.co_names)  # attributes among them: a global of that name counts too, which is safe
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self.names |= set(inner.co_names)
        self.imports = any(name in self.names for name in ("torch", "import_module", "__import__"))

    def holds(self, arguments: Any) -> bool:
        if self.imports or not plain(arguments) or not plain(self.defaults):
            return False
        found = [self.globals.get(name, MISSING) for name in self.names]
        found += [cell.cell_contents for cell in self.cells]
        return all(value is MISSING or value is math or plain(value) for value in found)
