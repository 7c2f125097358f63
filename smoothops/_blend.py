"""The mean of two values under a soft decision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._axes import concrete


def known_finite(t: Tensor) -> bool:
    """Whether all numbers of t are finite, False where that may not be looked up, or tangents are not known to be."""
    if not concrete(t) or torch.autograd.forward_ad._current_level >= 0:
        return False
    return math.isfinite(t.detach().sum().item())  # of a sum that overflows it is not known either


def blend(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """p x + (1 - p) y in one dtype, exact at both ends; what has weight 0 contributes 0, also when it is inf or nan.

    The derivative in p is x - y where that is finite; elsewhere it is 0 at both ends.
    """
    mean = torch.lerp(y, x, p)  # which is the formula below where all is finite
    if known_finite(mean):
        return mean
    # no tangent of what is absent: 0 times an infinite one is NaN
    x, y = torch.where(p == 0, x.detach(), x), torch.where(p == 1, y.detach(), y)
    finite = (x - y).detach().isfinite()
    gap = torch.where(finite, x - y, 0)
    value = torch.where(p < 0.5, y + p * gap, x - (1 - p) * gap)
    # infinities of positive weight, and gaps that overflow: inf - inf above would make NaN of a mean that is not
    split = ~finite & (p != 0) & (p != 1)
    mean = p * torch.where(split, x, 0) + (1 - p) * torch.where(split, y, 0)
    return torch.where(split, mean, value)
