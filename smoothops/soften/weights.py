"""Weights of worlds: products of the probabilities of the decisions that led there.

A weight is a tuple of factors, so that two worlds which meet again find what they share: only the rest is multiplied,
and the two sides of one decision sum to 1 without arithmetic. Worlds below 2^-53 are dropped where that may be looked
up; products of what is left stay far from the end of the range of float64, so that logarithms would add no digit.
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
    def value(self) -> Tensor:
        if self._value is None:  # where both sides meet again, nothing asks for it
            self._value = 1 - self._other
        return self._value


Weight = tuple[Factor, ...]


def sides(p: Tensor, dtype: torch.dtype) -> tuple[Factor, Factor]:
    """The two factors p and 1 - p of a decision."""
    decision = object()
    return Factor(p, dtype, decision), Factor(None, dtype, decision, p)


def twins(a: Weight, b: Weight) -> bool:
    """Whether a and b are the two sides of one decision."""
    if not a or len(a) != len(b) or a[-1].decision is None or a[-1].decision is not b[-1].decision:
        return False
    return a[-1] is not b[-1] and a[:-1] == b[:-1]


def times(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """a b, dims aligned at the front: a decision on a batch and one on its rows."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim != b.ndim:
        a, b = (lead(a, b, "condition"), b) if a.ndim < b.ndim else (a, lead(b, a, "condition"))
    return a * b


def product(weight: Weight) -> Tensor | float:
    total: Tensor | float = 1.0
    for factor in weight:
        total = factor.value if isinstance(total, float) else times(total, factor.value)
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


def absent(weight: Weight, mass: Mass) -> Tensor | None:
    """Which rows of a world have weight 0, None where there are none."""
    if not weight or isinstance(mass, float):
        return None
    dead = torch.as_tensor(product(weight) if mass is None else mass) == 0
    return None if concrete(dead) and not bool(dead.any()) else dead


def common(weights: Sequence[Weight]) -> int:
    """The number of leading factors that all share."""
    shared, first = 0, weights[0]
    for column in zip(*weights, strict=False):
        if any(factor is not first[shared] for factor in column):
            break
        shared += 1
    return shared
