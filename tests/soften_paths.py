"""The meaning of a softened program by brute force: Python itself runs once for every sequence of decisions.

Numbers that answer a comparison with the next bool of a script, and multiply the weight of the run by its probability.
What soften averages where paths meet is kept apart here, so both agree for programs that are linear behind the meeting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from soften_tools import EPS
from torch import Tensor

import smoothops as so


class Script:
    """The decisions of one run: those given, then True."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.at, self.weight = 0, 1.0

    def start(self) -> None:
        self.at, self.weight = 0, 1.0

    def decide(self, p: Tensor) -> bool:
        if self.at == len(self.taken):
            self.taken.append(True)
        answer = self.taken[self.at]
        self.at += 1
        self.weight = self.weight * float(p if answer else 1 - p)
        return answer

    def following(self) -> bool:
        """Whether there is another run: the last True becomes False."""
        while self.taken and not self.taken[-1]:
            self.taken.pop()
        if self.taken:
            self.taken[-1] = False
        return bool(self.taken)


class Number(float):
    """A float whose comparisons decide by the script."""

    script: Script

    def __new__(cls, value: float, script: Script) -> Number:
        self = super().__new__(cls, value)
        self.script = script
        return self

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    def __bool__(self) -> bool:
        return bool(self != 0.0)

    __hash__ = float.__hash__


def _comparison(name: str) -> Callable[[Number, Any], bool]:
    def compare(self: Number, other: Any) -> bool:
        p = getattr(so, name)(torch.tensor(float(self), dtype=torch.float64), float(other), smoothing=EPS)
        return self.script.decide(p)

    return compare


def _arithmetic(name: str) -> Callable[..., Any]:
    def operate(self: Number, *others: Any) -> Any:
        result = getattr(float, name)(float(self), *map(float, others))
        return Number(result, self.script) if isinstance(result, float) else result

    return operate


for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    setattr(Number, f"__{_name}__", _comparison(_name))
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow", "rpow"):
    setattr(Number, f"__{_name}__", _arithmetic(f"__{_name}__"))


def converted(x: Any, leaf: Callable[[float], Any], memo: dict[int, Any]) -> Any:
    """x with ``leaf`` of its floats; two names of one list stay two names of one list."""
    if isinstance(x, float):
        return leaf(x)
    if isinstance(x, tuple):
        return tuple(converted(item, leaf, memo) for item in x)
    if not isinstance(x, list | dict):
        return x
    if id(x) not in memo:
        memo[id(x)] = new = type(x)()
        if isinstance(x, dict):
            new.update((key, converted(item, leaf, memo)) for key, item in x.items())
        else:
            new.extend(converted(item, leaf, memo) for item in x)
    return memo[id(x)]


def leaves(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return [leaf for item in x.items() for leaf in leaves(item)]
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, (list, tuple)) else [x]


def paths(program: Callable[..., Any], args: tuple) -> list[tuple[float, Any]]:
    """Weight and value of each path."""
    script, found = Script(), []
    while True:
        script.start()
        result = program(*converted(args, lambda v: Number(v, script), {}))
        found.append((script.weight, copy.deepcopy(result)))
        if not script.following():
            return found


def readout(x: Any) -> float:
    """A weighted sum of the numbers in x."""
    return sum(float(v) / (i + 1) for i, v in enumerate(leaves(x)) if isinstance(v, float | int | Tensor))


def expected(program: Callable[..., Any], args: tuple) -> tuple[float, dict[str, float]]:
    """The mean of the readout over all paths, and the mass of each discrete outcome."""
    mean, masses = 0.0, {}
    for weight, value in paths(program, args):
        mean += weight * readout(value)
        masses[discrete(value)] = masses.get(discrete(value), 0.0) + weight
    return mean, masses


def discrete(x: Any) -> str:
    """What is no number, as text."""
    return repr([v if isinstance(v, int | str | None) else "number" for v in leaves(x)])


def found(program: Callable[..., Any], args: tuple) -> tuple[float, dict[str, float]]:
    """The same from the worlds of the softened program."""
    tensors = converted(args, lambda v: torch.tensor(v, dtype=torch.float64), {})
    mean, masses = 0.0, {}
    for weight, value in so.soften(smoothing=EPS)(program).worlds(*tensors):
        mean += float(weight) * readout(value)
        masses[discrete(value)] = masses.get(discrete(value), 0.0) + float(weight)
    return mean, masses
