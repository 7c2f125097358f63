"""From one number a row to what a loss returns."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return reduction


def reduce(values: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """``values``, their sum or their mean; where ``counted`` is False a value is 0 and does not enter the mean."""
    check_reduction(reduction)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if counted is None:
        return values.mean()
    return values.sum() / torch.where(counted, torch.ones_like(values), 0).sum().clamp(min=1)
