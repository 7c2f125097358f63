"""Worlds that agree in their discrete state become one: floats and tensors are averaged by weight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import reduce
from numbers import Number
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .._axes import concrete
from ..control._guard import forward_mode
from ..control._trees import add, lead, mix
from .frames import MUTABLE, Form, Frame, scalar
from .values import SoftBool, numpy_bool, real, soft
from .weights import Factor, Mass, Weight, common, heaviest, meeting, product, times, twins

first = itemgetter(0)


def of_numbers(values: Sequence[Any], p: Tensor) -> Tensor | None:
    """The mean of two finite numbers of one dtype, outside of transforms and forward mode; None for anything else."""
    x, y = values
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.ndim or y.ndim or forward_mode():
        return None
    dtype = x.dtype
    if dtype != y.dtype or dtype not in (torch.float64, torch.float32) or not concrete(x) or not concrete(y):
        return None
    if not (math.isfinite(x.item()) and math.isfinite(y.item())):
        return None
    if dtype == p.dtype:
        return torch.lerp(y, x, p)
    return torch.lerp(y.to(p.dtype), x.to(p.dtype), p).to(dtype)


def is_one(total: Tensor) -> bool:
    if not concrete(total):
        return False
    return abs(total.item() - 1) <= 2.0**-50 if total.ndim == 0 else bool(((total - 1).abs() <= 2.0**-50).all())


class Mean:
    """The weighted mean over the worlds with these weights."""

    def __init__(self, weights: Sequence[Weight | None]) -> None:
        self.dtype = next(weight.factor.dtype for weight in weights if weight is not None)
        self.p: Tensor | None = None
        self._parts: list[Tensor] = []
        if len(weights) == 2 and twins(*weights):
            self.weight, self.p = weights[0].parent, weights[0].factor.value  # type: ignore[union-attr]
            return
        shared = common(weights)
        parts = [torch.as_tensor(product(weight, shared)) for weight in weights]
        wide = max(parts, key=lambda part: part.ndim)
        parts = [lead(part, wide, "condition") for part in parts]
        with torch.enable_grad():
            self.masses, self.total = parts, reduce(torch.add, parts)
        self.weight = shared
        # all of the mass that forked there: a factor 1, also in its derivatives
        if not is_one(self.total):
            self.weight = Weight(shared, Factor(self.total, self.dtype))

    def parts(self) -> list[Tensor]:
        """The weights, which sum to 1; where there is nothing to average they are not needed."""
        if not self._parts:
            safe = torch.where(self.total == 0, 1, self.total)
            self._parts = [part / safe for part in self.masses]
        return self._parts

    def __call__(self, values: Sequence[Any]) -> Tensor:
        if self.p is not None and not self.p.ndim:
            number = of_numbers(values, self.p)
            if number is not None:
                return number
        found = [v for v in values if isinstance(v, Tensor)]
        floating = [t.dtype for t in found if t.is_floating_point()]
        dtype = reduce(torch.promote_types, floating) if floating else self.dtype
        device = found[0].device if found else (self.total if self.p is None else self.p).device
        leaves = [v.to(dtype) if isinstance(v, Tensor) else scalar(v, dtype, device) for v in values]
        if self.p is not None:
            x, y = torch.broadcast_tensors(*leaves)
            return mix(lead(self.p, x, "a condition"), x, y)
        leaves = list(torch.broadcast_tensors(*leaves))
        total: Tensor | None = None
        for part, leaf in zip(self.parts(), leaves, strict=True):
            total = add(total, part, leaf, "a condition")
        assert total is not None
        return total.to(dtype)


def blend(values: Sequence[Any], mean: Mean, memo: dict[tuple[int, ...], Any]) -> Any:
    """The mean of one variable over worlds of equal form."""
    first = values[0]
    if all(v is first for v in values):
        return first
    if any(soft(v) or real(v) for v in values):
        return numbers(values, mean, memo)
    if not isinstance(first, (*MUTABLE, tuple)):
        if (isinstance(first, Number | Tensor) or numpy_bool(first)) and any(
            type(v) is not type(first) or v is not first for v in values
        ):
            return first if same(values) else mean(values)
        return first
    key = tuple(map(id, values))
    if key in memo:
        return memo[key]
    if isinstance(first, tuple):
        items = [blend(column, mean, memo) for column in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    memo[key] = first  # the containers of the first world hold the answer
    if isinstance(first, dict):
        for name in first:
            first[name] = blend([v[name] for v in values], mean, memo)
    elif isinstance(first, list | deque):
        for i in range(len(first)):
            first[i] = blend([v[i] for v in values], mean, memo)
    return first


def same(values: Sequence[Any]) -> bool:
    if isinstance(values[0], Tensor):
        return all(isinstance(v, Tensor) and torch.equal(v, values[0]) for v in values)
    return all(v == values[0] for v in values)


def numbers(values: Sequence[Any], mean: Mean, memo: dict[tuple[int, ...], Any]) -> Any:
    if not any(soft(v) for v in values) and all(v == values[0] for v in values):
        return values[0]
    key = tuple(id(v) for v in values)
    if key not in memo:
        if all(isinstance(v, SoftBool) for v in values):
            p = mean([v.p for v in values])
            memo[key] = SoftBool(p, values[0].dtype)
        else:
            memo[key] = mean([v.number if isinstance(v, SoftBool) else v for v in values])
    return memo[key]


def fits(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return shape == other or not shape or not other


def merged(worlds: Sequence[Frame], *, aliases: bool, integers: bool = False) -> list[Frame]:
    """The worlds, in which those of one form are one."""
    if len(worlds) < 2:
        return list(worlds)
    groups: dict[Any, list[tuple[list[tuple[int, ...]], list[Frame]]]] = {}
    for world in worlds:
        form = Form(aliases=aliases, integers=integers)
        # names too: worlds that differ in what is bound are different
        key = tuple((name, form.of(value)) for name, value in sorted(world.__dict__.items(), key=first))
        for shapes, group in groups.setdefault(key, []):
            if all(map(fits, form.shapes, shapes)):
                shapes[:] = [a or b for a, b in zip(form.shapes, shapes, strict=True)]
                group.append(world)
                break
        else:
            groups[key].append((form.shapes, [world]))
    return [unite(group) for groups_ in groups.values() for _, group in groups_]


def unite(group: list[Frame]) -> Frame:
    """One world of several: those that are two sides of one decision first, and so on back."""
    waiting: dict[Any, Frame] = {}
    alone: list[Frame] = []
    for world in group:
        key = meeting(world._so_weight)
        while key in waiting and twins(world._so_weight, waiting[key]._so_weight):
            other = waiting.pop(key)
            first_side = world._so_weight.factor.first  # type: ignore[union-attr]
            world = mean_of([world, other] if first_side else [other, world])
            key = meeting(world._so_weight)
        if key is None or key in waiting:
            alone.append(world)
        else:
            waiting[key] = world
    rest = [*waiting.values(), *alone]
    return rest[0] if len(rest) == 1 else mean_of(rest)


def mean_of(group: list[Frame]) -> Frame:
    mean = Mean([world._so_weight for world in group])
    memo: dict[tuple[int, ...], Any] = {}
    variables = {name: blend([w.__dict__[name] for w in group], mean, memo) for name in group[0].__dict__}
    return Frame(variables, mean.weight, total_mass([world._so_mass for world in group]))


def total_mass(masses: Sequence[Mass]) -> Mass:
    known = [mass for mass in masses if mass is not None]
    if len(known) < len(masses):
        return None
    if all(isinstance(mass, float) for mass in known):
        return float(sum(heaviest(mass) for mass in known))
    wide = max((torch.as_tensor(mass) for mass in known), key=lambda mass: mass.ndim)
    return reduce(torch.add, (torch.as_tensor(times(mass, torch.ones_like(wide))) for mass in known))
