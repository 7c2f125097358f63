"""Functions of torch that decide inside C++, out of sight of any context, written out in operations that it replaces.

They run inside the context, which replaces what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F


def _reduced(loss: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    return _stored(torch.where(input > threshold, input, value), input, inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    return torch.where((input > lambd) | (input < -lambd), input, 0.0)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    if min_val > max_val:
        raise ValueError(f"min_val must be at most max_val, got {min_val} and {max_val}")
    return _stored(torch.clamp(input, min_val, max_val), input, inplace)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return hardtanh(input, min_val, max_val, True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    return hardtanh(input, 0.0, 6.0, inplace)


def hinge_embedding_loss(
    input: Tensor, target: Tensor, margin: float = 1.0, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    with torch._C.DisableTorchFunction():  # labels are data
        apart, near = target != 1, target != -1
    loss = torch.where(apart, torch.clamp(margin - input, min=0), 0.0) + torch.where(near, input, 0.0)
    return _reduced(loss, size_average, reduce, reduction)


def margin_ranking_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    if not input1.ndim == input2.ndim == target.ndim:
        raise RuntimeError(
            f"input1, input2 and target must have as many dims, got {input1.ndim}, {input2.ndim} and {target.ndim}"
        )
    return _reduced(torch.clamp(-target * (input1 - input2) + margin, min=0), size_average, reduce, reduction)


def _stored(value: Tensor, input: Tensor, inplace: bool) -> Tensor:
    return input.copy_(value) if inplace else value


COMPOSITES: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    F.threshold: ("threshold", threshold),
    torch.threshold: ("threshold", threshold),
    torch.threshold_: ("threshold", lambda x, t, v: threshold(x, t, v, True)),
    torch.hardshrink: ("hardshrink", hardshrink),
    Tensor.hardshrink: ("hardshrink", hardshrink),
    F.hardtanh: ("hardtanh", hardtanh),
    torch._C._nn.hardtanh: ("hardtanh", hardtanh),
    torch._C._nn.hardtanh_: ("hardtanh", hardtanh_),
    F.relu6: ("relu6", relu6),
    F.hinge_embedding_loss: ("hinge_embedding_loss", hinge_embedding_loss),
    F.margin_ranking_loss: ("margin_ranking_loss", margin_ranking_loss),
}
