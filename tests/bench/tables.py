"""What is timed against what, and the multiples that smoothops is to stay below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import smoothops as so
from tests.bench.contest import Contestant, Run, Table, optional

torchsort, entmax, softtorch = (optional(name) for name in ("torchsort", "entmax", "softtorch"))
ROWS = [(128, 100), (1000, 100), (128, 1000), (1024, 1024), (1, 100_000), (1, 1_000_000)]


def softly(operator: str, softness: float, **options: Any) -> Run:
    return lambda x: getattr(softtorch, operator)(x, -1, softness=softness, standardize=False, **options)


def softly_ordered(operator: str, eps: Callable[[int], float], **options: Any) -> Run:
    """softtorch scales the positions to [0, 1]: eps(n - 1) is the softness that matches ours."""

    def run(x: Tensor) -> Tensor:
        found = softly(operator, eps(x.shape[-1] - 1), method="fast_soft_sort", mode="c0", **options)(x)
        return found if isinstance(found, Tensor) else found.values

    return run


def tenth(x: Tensor) -> int:
    return x.shape[-1] // 10


def of_sort(shape: tuple[int, int]) -> float:
    return 1.0 if shape[1] <= 100 else 0.5 if shape == (128, 1000) else 0.4


def at_most(multiple: float) -> Callable[[tuple[int, int]], float]:
    return lambda shape: multiple


def masks(k: Callable[[Tensor], int], bar: float) -> list[Contestant]:
    def mask(name: str, regularizer: Callable[[float], Any]) -> Contestant:
        run = lambda x: so.topk_mask(x, k(x), smoothing=regularizer(0.1))  # noqa: E731
        return Contestant(so, f"topk_mask, {name}(0.1)", run, at_most(bar))

    return [
        mask("Quadratic", so.Quadratic),
        mask("BinaryEntropy", so.BinaryEntropy),
        mask("Laplace", so.Laplace),
        Contestant(so, "topk_mask, eps from the data", lambda x: so.topk_mask(x, k(x))),
        Contestant(entmax, "budget_bisect", lambda x: entmax.budget_bisect(x / 0.1, k(x), -1)),
    ]


ORDERS = [
    Contestant(so, "rank, Quadratic(0.1)", lambda x: so.rank(x, smoothing=0.1), of_sort),
    Contestant(torchsort, "soft_rank, l2", lambda x: torchsort.soft_rank(x, "l2", 0.1)),
    Contestant(softtorch, "rank, fast_soft_sort", softly_ordered("rank", lambda m: 0.1 * m, descending=False)),
    Contestant(so, "rank, Entropy(0.1)", lambda x: so.rank(x, smoothing=so.Entropy(0.1)), at_most(1.0)),
    Contestant(torchsort, "soft_rank, kl", lambda x: torchsort.soft_rank(x, "kl", 0.1)),
    Contestant(so, "rank, Laplace(0.1)", lambda x: so.rank(x, smoothing=so.Laplace(0.1)), at_most(1.0)),
    Contestant(so, "rank, eps from the data", so.rank),
    Contestant(so, "sort, Quadratic(1)", lambda x: so.sort(x, smoothing=1.0), of_sort),
    Contestant(torchsort, "soft_sort, l2", lambda x: torchsort.soft_sort(x, "l2", 1.0)),
    Contestant(softtorch, "sort, fast_soft_sort", softly_ordered("sort", lambda m: 1 / m, return_indices=False)),
    Contestant(so, "sort, Entropy(1)", lambda x: so.sort(x, smoothing=so.Entropy(1.0)), at_most(1.0)),
    Contestant(torchsort, "soft_sort, kl", lambda x: torchsort.soft_sort(x, "kl", 1.0)),
    Contestant(so, "sort, Laplace(0.1)", lambda x: so.sort(x, smoothing=so.Laplace(0.1)), at_most(1.0)),
    Contestant(so, "sort, eps from the data", so.sort),
]
CHOICES = [
    Contestant(so, "argmax, Entropy(1)", lambda x: so.argmax(x, -1, smoothing=1.0)),
    Contestant(so, "sparsemax", so.sparsemax, at_most(4.0)),
    Contestant(entmax, "sparsemax", lambda x: entmax.sparsemax(x, -1)),
    Contestant(so, "entmax, alpha 1.5", so.entmax, at_most(4.0)),
    Contestant(entmax, "entmax15", lambda x: entmax.entmax15(x, -1)),
    Contestant(so, "entmax, alpha 4/3", lambda x: so.entmax(x, 4 / 3), at_most(4.0)),
    Contestant(so, "entmax, alpha 1.25", lambda x: so.entmax(x, 1.25), at_most(4.0)),
    Contestant(entmax, "entmax_bisect, alpha 1.25", lambda x: entmax.entmax_bisect(x, 1.25, -1)),
]
DOUBLE = [
    Contestant(so, "rank, Quadratic(0.1)", lambda x: so.rank(x, smoothing=0.1), at_most(1.0)),
    Contestant(so, "sort, Quadratic(1)", lambda x: so.sort(x, smoothing=1.0), at_most(1.0)),
]


def sort(x: Tensor) -> Tensor:
    return torch.sort(x, -1).values


WIDE = [(128, 1000), (32, 32_000), (1, 1_000_000), (1, 10_000_000)]
TABLES = [
    Table("torch.sort", sort, ORDERS, ROWS),
    Table("torch.sort in float64", sort, DOUBLE, ROWS, dtype=torch.float64),
    Table(
        "torch.softmax, forward and backward", lambda x: torch.softmax(x, -1), CHOICES,
        [(128, 1000), (1024, 1024), (32, 32_000)], both=True,
    ),
    Table("torch.topk, k = n/10", lambda x: torch.topk(x, tenth(x), -1).values, masks(tenth, 1.0), WIDE),
    Table("torch.topk, k = 64", lambda x: torch.topk(x, 64, -1).values, masks(lambda x: 64, 1.0), WIDE),
]  # fmt: skip
QUICK = [Table(t.title, t.baseline, t.contestants, [s for s in t.shapes if s[0] * s[1] <= 128_000], t.both, t.dtype)
         for t in TABLES]  # fmt: skip
