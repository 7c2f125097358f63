"""How contestants are timed: in turns in one run; a number is the median of the ratios of neighbouring calls."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLOW = 10.0  # seconds: what takes longer than this once is not measured again
Run = Callable[[Tensor], Tensor]


def optional(name: str) -> Any:
    """Another library, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


@dataclass(frozen=True)
class Contestant:
    """``run`` forward and backward; ``bar`` is the multiple of the baseline to stay below, for each shape."""

    library: Any
    name: str
    run: Run
    bar: Callable[[tuple[int, int]], float | None] = lambda shape: None

    @property
    def label(self) -> str:
        return f"{self.library.__name__}: {self.name}"


@dataclass(frozen=True)
class Table:
    """``baseline`` is timed forward only unless ``both``; a shape is rows x entries."""

    title: str
    baseline: Run
    contestants: list[Contestant]
    shapes: list[tuple[int, int]]
    both: bool = False
    dtype: torch.dtype = torch.float32


def forward_backward(run: Run, x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    cotangent = torch.randn_like(run(x))
    return lambda: torch.autograd.grad(run(x), x, cotangent)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def race(table: Table, shape: tuple[int, int], budget: float) -> tuple[float, dict[str, float]]:
    """Seconds of the baseline, and each contestant's median multiple of it."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=table.dtype)
    hard = forward_backward(table.baseline, x) if table.both else (lambda: table.baseline(x))
    calls = {c.label: forward_backward(c.run, x) for c in table.contestants if c.library is not None}
    for call in (hard, *calls.values()):  # compiles, fills caches
        call()
    gc.collect()
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while len(base) < 5 or (time.perf_counter() < end and len(base) < 300):
        turn = []
        for name, call in calls.items():
            if ratios[name] and ratios[name][-1] * base[-1] > SLOW:
                continue
            hard()  # the caches are its own
            turn.append(seconds(hard))
            call()
            ratios[name].append(seconds(call) / turn[-1])
        base.append(statistics.median(turn))
    return statistics.median(base), {name: statistics.median(r) for name, r in ratios.items()}
