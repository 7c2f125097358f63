"""Weights of worlds: products of the probabilities of the decisions that led there.

A weight is a chain of decisions, so that two worlds which meet again find what they share: only the rest is multiplied,
and the two sides of one decision sum to 1 without arithmetic, from the last decision back. Worlds below 2^-53 are
dropped where that may be looked up; products of what is left stay far from the end of the range of float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._axes import concrete
from ..control._trees import lead

# a mass below this changes no digit of a mean of states of one size
ROUNDING = 2.0**-53
Mass = Tensor | float | None


class Factor:
    """The probability of one side of a decision; both sides share ``decision``."""

    __slots__ = ("_other", "_value", "decision", "dtype")

    def __init__(self, value: Tensor | None, dtype: torch.dtype, decision: object = None, other: Any = None) -> None:
        self._value, self.dtype, self.decision, self._other = value, dtype, decision, other

    @property
    def first(self) -> bool:
        """Whether it is the side of p, not that of 1 - p."""
        return self._other is None

    @property
    def value(self) -> Tensor:
        if self._value is None:  # where both sides meet again, nothing asks for it
            with torch.enable_grad():  # weights are not the program's, which may stand in torch.no_grad()
                self._value = 1 - self._other
        return self._value


class Weight:
    """The last decision of a world and the weight before it, None for the weight 1."""

    __slots__ = ("_since", "depth", "factor", "parent")

    def __init__(self, parent: Weight | None, factor: Factor) -> None:
        self.parent, self.factor = parent, factor
        self.depth: int = 1 if parent is None else parent.depth + 1
        self._since: tuple[Weight | None, Tensor] | None = None  # the product behind an ancestor


def factors(weight: Weight | None) -> list[Factor]:
    found = []
    while weight is not None:
        found.append(weight.factor)
        weight = weight.parent
    return found[::-1]


def grafted(weight: Weight | None, base: Weight | None, known: dict[int, Weight]) -> Weight | None:
    """``weight`` behind ``base``; weights that share decisions share them there."""
    chain = []
    while weight is not None and id(weight) not in known:
        chain.append(weight)
        weight = weight.parent
    if weight is not None:
        base = known[id(weight)]
    for node in reversed(chain):
        base = known[id(node)] = Weight(base, node.factor)
    return base


def sides(p: Tensor, dtype: torch.dtype) -> tuple[Factor, Factor]:
    """The two factors p and 1 - p of a decision."""
    decision = object()
    return Factor(p, dtype, decision), Factor(None, dtype, decision, p)


def meeting(weight: Weight | None) -> tuple[int, int] | None:
    """What a world shares with the other side of its last decision alone."""
    if weight is None or weight.factor.decision is None:
        return None
    return id(weight.parent), id(weight.factor.decision)


def twins(a: Weight | None, b: Weight | None) -> bool:
    """Whether a and b are the two sides of one decision."""
    found = meeting(a)
    return found is not None and found == meeting(b) and a.factor is not b.factor  # type: ignore[union-attr]


def times(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """a b, dims aligned at the front: a decision on a batch and one on its rows."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim != b.ndim:
        a, b = (lead(a, b, "condition"), b) if a.ndim < b.ndim else (a, lead(b, a, "condition"))
    return a * b


def product(weight: Weight | None, ancestor: Weight | None = None) -> Tensor | float:
    """The product of the factors behind an ancestor."""
    chain = []
    node = weight
    while node is not ancestor and node is not None and (node._since is None or node._since[0] is not ancestor):
        chain.append(node)
        node = node.parent
    total: Tensor | float = 1.0 if node is ancestor or node is None else node._since[1]  # type: ignore[index]
    with torch.enable_grad():
        for node in reversed(chain):
            total = node.factor.value if isinstance(total, float) else times(total, node.factor.value)
            node._since = ancestor, total  # type: ignore[assignment]
    return total


def carried(mass: Mass, factor: Tensor) -> Mass:
    """The detached mass of a world after a decision, None where it may not be looked up."""
    if mass is None or not concrete(factor):
        return None
    if factor.numel() == 1 and isinstance(mass, float):
        return mass * factor.item()
    return times(mass, factor.detach())


def heaviest(mass: Mass) -> float:
    """The largest mass of a row, 1 where it is unknown."""
    if mass is None:
        return 1.0
    return mass if isinstance(mass, float) else (float(mass.max()) if mass.numel() else 0.0)


def negligible(mass: Mass) -> bool:
    return mass is not None and heaviest(mass) < ROUNDING


def outlook(mass: Mass, p: Tensor) -> tuple[bool | None, tuple[Mass, Mass]]:
    """Which side of a decision is certain, if one is, and the masses of both."""
    if p.ndim == 0 and isinstance(mass, float) and concrete(p):
        chance = p.item()
        yes, no = chance, 1 - chance
        masses: tuple[Mass, Mass] = (mass * yes, mass * no)
    else:
        yes, no = (heaviest(carried(1.0, side)) for side in (p, 1 - p))
        masses = carried(mass, p), carried(mass, 1 - p)
    return (True if no < ROUNDING else False if yes < ROUNDING else None), masses


def absent(weight: Weight | None, mass: Mass) -> Tensor | None:
    """Which rows of a world have weight 0, None where there are none."""
    if weight is None or isinstance(mass, float):
        return None
    dead = torch.as_tensor(product(weight) if mass is None else mass) == 0
    return None if concrete(dead) and not bool(dead.any()) else dead


def common(weights: Sequence[Weight | None]) -> Weight | None:
    """What all share."""
    shared = weights[0]
    for weight in weights[1:]:
        while shared is not weight:
            if weight is None or (shared is not None and shared.depth > weight.depth):
                shared = shared.parent  # type: ignore[union-attr]
            else:
                weight = weight.parent
    return shared
