"""Branches: both are run, their results are mixed by soft weights, and what has weight 0 leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._axes import concrete
from ._guard import guarded
from ._trees import check_same, describe, flatten, lead, number, result_dtype, unflatten, weight, work_dtype


def check_callable(fn: object, name: str) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be a function, got {type(fn).__name__}")


def check_range(p: Tensor, name: str) -> None:
    if concrete(p) and bool(((p < 0) | (p > 1)).any()):
        low, high = (v.item() for v in p.detach().aminmax())
        raise ValueError(f"{name} has values in [{low:.4g}, {high:.4g}], expected [0, 1]; use so.heaviside or so.gt")


def name_of(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def common(trees: Sequence[Any], names: Sequence[str], like: Tensor) -> tuple[list[list[Tensor]], Any]:
    """The leaves of the results as tensors, numbers in the dtype of the tensors that they stand beside."""
    for tree, name in zip(trees[1:], names[1:], strict=True):
        check_same(tree, trees[0], name, f"{names[0]} returned", numbers=True)
    spec = flatten(trees[0])[1]
    rows = [flatten(tree)[0] for tree in trees]
    columns = []
    for column in zip(*rows, strict=True):
        pattern = next((leaf for leaf in column if isinstance(leaf, Tensor)), None)
        if pattern is None and not number(column[0]):
            raise TypeError(f"{names[0]} returned {describe(column[0])}; results must consist of tensors and numbers")
        dtype = like.dtype if pattern is None else result_dtype(pattern)
        device = like.device if pattern is None else pattern.device
        columns.append(
            [leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=dtype, device=device) for leaf in column]
        )
    return columns, spec


def mix(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """p x + (1 - p) y, exact at both ends; what has weight 0 contributes 0, also when it is inf or nan."""
    dtype, work = result_dtype(x), work_dtype(x, p)
    p, x, y = p.to(work), x.to(work), y.to(work)
    # no tangent of what is absent: 0 times an infinite one is NaN
    x, y = torch.where(p == 0, x.detach(), x), torch.where(p == 1, y.detach(), y)
    finite = x.isfinite() & y.isfinite()
    gap = torch.where(finite, x - y, 0)
    value = torch.where(p < 0.5, y + p * gap, x - (1 - p) * gap)
    # infinities of positive weight: inf - inf above would make NaN of a mean that is inf
    infinite = ~finite & (p != 0) & (p != 1)
    mean = p * torch.where(infinite, x, 0) + (1 - p) * torch.where(infinite, y, 0)
    return torch.where(infinite, mean, value).to(dtype)


def cond(p: Tensor | float, true_fn: Callable[..., Any], false_fn: Callable[..., Any], *args: Any, prune: bool = False) -> Any:
    p = weight(p, "p")
    check_range(p, "p")
    check_callable(true_fn, "true_fn")
    check_callable(false_fn, "false_fn")
    results = []
    for fn, w in ((true_fn, p), (false_fn, 1 - p)):
        with guarded((w == 0).detach()):
            results.append(fn(*args))
    columns, spec = common(results, ["true_fn", "false_fn"], p)
    return unflatten([mix(lead(p, x, "p"), x, y) for x, y in columns], spec)
