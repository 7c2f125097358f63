"""Kernels that solve for the discrete structure of an answer: compiled for the CPU, plain torch for any device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from . import torch as reference


@functools.cache
def _compiled() -> ModuleType | None:
    """The numba kernels, or None where numba cannot be imported: then plain torch gives the same numbers."""
    try:
        return importlib.import_module(f"{__name__}.cpu")
    except ImportError:
        return None


def pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    """The fastest pool for where its arguments lie. See ``kernels.torch.pool``."""
    fast = _compiled() if theta.device.type == "cpu" else None
    return (fast or reference).pool(theta, w, weights, group, eps, rule)
