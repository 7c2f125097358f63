"""The state of one world: its local variables, copied where it forks, and walks through what they hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .._axes import concrete
from .errors import cannot
from .values import SoftBool, numpy_bool, real, soft
from .weights import Mass, Weight

MUTABLE = (list, dict, set, deque, bytearray)
ATOMS = (int, float, bool, str, type(None), Tensor, SoftBool, range, bytes, complex)


KINDS = frozenset(ATOMS)


class Fixed:
    """Items that cannot change, and what they were read from."""

    __slots__ = ("items", "source")

    def __init__(self, source: Any, items: tuple[Any, ...]) -> None:
        self.source, self.items = source, items


FORK = object()  # in the memo of a copy for a second world


class Spent:
    """In place of an iterator that two worlds would have to share: who reads it would move it for both."""

    def __init__(self, name: str) -> None:
        self._so_name = name

    def __getattr__(self, name: str) -> Any:
        raise self._so_error()

    def __iter__(self) -> Any:
        raise self._so_error()

    def __len__(self) -> int:
        raise self._so_error()

    def __getitem__(self, index: Any) -> Any:
        raise self._so_error()

    def _so_error(self) -> Exception:
        return cannot(
            f"a {self._so_name} from before a soft branch is read behind it, and an iterator cannot be copied for two "
            "worlds; make a list of it"
        )


class Frame:
    """Local variables as attributes, beside the weight of the world that they belong to."""

    __slots__ = ("__dict__", "_so_mass", "_so_script", "_so_weight")

    def __init__(self, variables: dict[str, Any], weight: Weight | None = None, mass: Mass = 1.0) -> None:
        self.__dict__ = variables
        self._so_weight, self._so_mass = weight, mass
        self._so_script: tuple[Any, ...] = ()  # the outcomes of choices that the statement made before the fork

    def __getattr__(self, name: str) -> Any:
        raise UnboundLocalError(
            f"cannot access local variable '{name}' where it is not associated with a value (a variable that only some "
            "of the soft paths bind is unbound where they meet)"
        )

    def _so_fork(self, memo: dict[Any, Any] | None = None) -> Frame:
        """A copy that shares nothing that can change; aliases stay aliases."""
        memo = {} if memo is None else memo
        memo[FORK] = True
        variables = {k: copied(v, memo) for k, v in self.__dict__.items()}
        for name, value in variables.items():
            if type(value) is Spent:
                self.__dict__[name] = value
        return Frame(variables, self._so_weight, self._so_mass)


def copied(x: Any, memo: dict[int, Any]) -> Any:
    """x with its containers copied; tensors are shared, since none is ever changed in place."""
    if isinstance(x, ATOMS):
        return x
    kind = type(x)
    if kind is Spent:
        return x
    if id(x) in memo:
        return memo[id(x)]
    if kind is list:
        new: list[Any] = []
        memo[id(x)] = new
        if KINDS.issuperset(map(type, x)):
            new += x
            return new
        new.extend(item if isinstance(item, ATOMS) else copied(item, memo) for item in x)
        return new
    if isinstance(x, dict):
        memo[id(x)] = entries = x.copy()
        for key, item in x.items():
            entries[key] = copied(item, memo)
        return entries
    if isinstance(x, tuple):
        items = [copied(item, memo) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x
        return kind(*items) if hasattr(x, "_fields") else kind(items)
    if isinstance(x, list | deque):
        memo[id(x)] = more = x.copy()
        for i, item in enumerate(x):
            more[i] = copied(item, memo)
        return more
    if isinstance(x, set | bytearray):
        memo[id(x)] = x.copy()
        return memo[id(x)]
    return Spent(kind.__name__) if FORK in memo and hasattr(kind, "__next__") else x


def frozen(x: Any) -> bool:
    """Whether nothing in x can change."""
    if isinstance(x, tuple):
        return all(frozen(item) for item in x)
    return not isinstance(x, MUTABLE)


def inside(x: Any, container: Any, seen: set[int]) -> bool:
    """Whether a container holds x, at any depth."""
    if id(container) in seen or not isinstance(container, (*MUTABLE, tuple)):
        return False
    seen.add(id(container))
    items = container.values() if isinstance(container, dict) else container
    return any(item is x or inside(x, item, seen) for item in items)


def holds_soft(x: Any) -> bool:
    """Whether a container has a soft number in it."""
    if isinstance(x, dict):
        return any(soft(v) or holds_soft(v) for item in x.items() for v in item)
    return isinstance(x, (*MUTABLE, tuple, frozenset)) and any(soft(v) or holds_soft(v) for v in x)


class Form:
    """What must agree for worlds to merge: structure, aliases and discrete values; and the shapes of the soft ones."""

    def __init__(self, *, aliases: bool, integers: bool = False) -> None:
        self.aliases, self.integers = aliases, integers
        self.shapes: list[tuple[int, ...]] = []
        self.seen: dict[int, int] = {}

    def of(self, x: Any) -> Any:
        kind = type(x)
        if kind is float or (self.integers and kind in (int, bool)):
            self.shapes.append(())
            return "number"
        if isinstance(x, Tensor):
            return self.tensor(x)
        if kind is int or kind is bool or kind is str or x is None or kind is bytes or kind is complex:
            return (kind, x)
        if kind is SoftBool:
            self.shapes.append(tuple(x.p.shape))
            return "number" if self.integers else "boolean"
        if kind is range:
            return (kind, x.start, x.stop, x.step)
        if isinstance(x, tuple):
            return (kind, *(self.of(item) for item in x))
        if isinstance(x, MUTABLE):
            if id(x) in self.seen:
                return ("alias", self.seen[id(x)])
            self.seen[id(x)] = len(self.seen)
            return self.container(x)
        if kind is Fixed:
            return (kind, id(x.source))
        if real(x):
            self.shapes.append(())
            return "number"
        if isinstance(x, Number) or numpy_bool(x):
            if self.integers and not isinstance(x, complex):
                self.shapes.append(())
                return "number"
            return (kind, x)
        return (kind, x) if isinstance(x, frozenset | str) else (kind, id(x))

    def tensor(self, x: Tensor) -> Any:
        if x.is_floating_point():
            self.shapes.append(tuple(x.shape))
            if self.aliases and x.ndim:
                return ("number", self.seen.setdefault(id(x), len(self.seen)))
            return "number"
        if self.integers and x.numel() == 1:
            self.shapes.append(())
            return "number"
        if not concrete(x):
            return ("tensor", id(x))
        return ("tensor", x.dtype, tuple(x.shape), tuple(x.reshape(-1).tolist()))

    def container(self, x: Any) -> Any:
        kind = type(x)
        if isinstance(x, dict):
            return (kind, *((key, self.of(item)) for key, item in x.items()))
        if isinstance(x, set):
            return (kind, frozenset(x))
        return (kind, bytes(x)) if isinstance(x, bytearray) else (kind, *(self.of(item) for item in x))


def tensors(x: Any, seen: set[int]) -> list[Tensor]:
    """All tensors that x holds."""
    if isinstance(x, Tensor):
        return [x]
    if not isinstance(x, (*MUTABLE, tuple)) or id(x) in seen:
        return []
    seen.add(id(x))
    items = x.values() if isinstance(x, dict) else x
    return [t for item in items for t in tensors(item, seen)]


def replaced(x: Any, old: Tensor, new: Tensor, memo: set[int]) -> Any:
    """x, in which every reference to ``old`` has become one to ``new``; its lists and dicts stay themselves."""
    if x is old:
        return new
    if isinstance(x, tuple):
        items = [replaced(item, old, new, memo) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, list | deque | dict) and id(x) not in memo:
        memo.add(id(x))
        for key, item in list(x.items() if isinstance(x, dict) else enumerate(x)):
            x[key] = replaced(item, old, new, memo)
    return x


def rebind(frame: Frame, old: Tensor, new: Tensor, name: str) -> None:
    """Writes ``new`` wherever the world holds ``old``: a change in place, as its aliases see it."""
    held = [t for t in tensors(frame.__dict__, set()) if t is not old and t.ndim]
    if any(shares_memory(t, old) for t in held):
        raise cannot(
            f"{name} writes to a tensor that another variable is a view of; take a copy of the view with .clone(), or "
            "write through one name, as in a[i, j] = value"
        )
    if not any(t is old for t in tensors(frame.__dict__, set())):
        raise cannot(f"{name} writes to a tensor that is no local variable; pass it as an argument and return it")
    memo: set[int] = set()
    for key, value in list(frame.__dict__.items()):
        frame.__dict__[key] = replaced(value, old, new, memo)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    base = a if a._base is None else a._base
    if base is (b if b._base is None else b._base):
        return True
    try:  # also what .detach() and .data share
        return bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]
    except RuntimeError:  # tensors of transforms have no memory of their own
        return False


def mapped(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """x with ``leaf`` of all that is no container."""
    if isinstance(x, tuple):
        items = [mapped(item, leaf) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if type(x) is dict:
        return {key: mapped(item, leaf) for key, item in x.items()}
    return [mapped(item, leaf) for item in x] if type(x) is list else leaf(x)


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), float(value), dtype=dtype, device=device)
