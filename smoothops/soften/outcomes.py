"""What comes of a statement or of a run: further weight, a returned value; and the books of loops and contexts."""

from __future__ import annotations

from types import CodeType
from typing import Any

from .errors import cannot
from .frames import MUTABLE, Frame
from .weights import Mass, Weight, carried, factors, grafted

GIVEN = "<given>"  # the variable of a nested call that holds what its caller handed over


def weigh(world: Frame, weight: Weight | None, mass: Mass, more: Weight | None, known: dict[int, Weight]) -> None:
    """A world of ``weight`` behind the further decisions ``more``."""
    for factor in factors(more):
        mass = carried(mass, factor.value)
    world._so_weight, world._so_mass = grafted(more, weight, known), mass


def result(world: Frame, value: Any) -> Frame:
    """What is kept of a world that returns."""
    given = world.__dict__.get(GIVEN)
    kept = {"value": value} if given is None else {"value": value, GIVEN: given}
    return Frame(kept, world._so_weight, world._so_mass)


def of_worlds(value: Any) -> bool:
    """Whether a value holds a lambda or generator expression of the program, which reads the present world."""
    code = getattr(value, "__code__", None) or getattr(value, "gi_code", None)
    if isinstance(code, CodeType):
        return "_w" in code.co_freevars
    if isinstance(value, (*MUTABLE, tuple)):
        return any(map(of_worlds, value.values() if isinstance(value, dict) else value))
    return False


class Loop:
    """Where the worlds of one loop went, and how far it is."""

    def __init__(self, mass: float) -> None:
        self.exits: list[Frame] = []
        self.breaks: list[Frame] = []
        self.continued: list[Frame] = []
        self.mass, self.position, self.counted, self.seen = mass, -1, 0, 0
        self.tested = False  # whether a condition on tensors decided on this iteration


class Context:
    """A context that may end a block only as the block ends."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.context.__exit__(kind, error, trace) and error is not None:
            raise cannot("a context that suppresses exceptions is a try, and an exception has no weight") from error
