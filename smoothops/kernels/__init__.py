"""Kernels that solve for the discrete structure of an answer: compiled for the CPU, plain torch for any device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from . import torch as reference


@functools.cache
def _compiled(name: str) -> ModuleType | None:
    """A module of numba kernels, or None where numba cannot be imported: then plain torch gives the same numbers."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None


def compiled_order(name: str) -> Any:
    """The module of compiled orders, "order" or "lapsum", or None."""
    return _compiled(f"cpu_{name}")


def compiled_choice(family: Any) -> Any:
    """The module of compiled choices, or None where there is none for ``family``."""
    return _compiled("cpu_choice") if compiled_threshold(family) is not None else None


def compiled_sinkhorn() -> Any:
    """The module of compiled sweeps, or None."""
    return _compiled("cpu_sinkhorn")


def pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    """The fastest pool for where its arguments lie. See ``kernels.torch.pool``."""
    fast = _compiled("cpu") if theta.device.type == "cpu" else None
    return (fast or reference).pool(theta, w, weights, group, eps, rule)


def compiled_threshold(family: Any) -> Any:
    """The module of compiled threshold kernels, or None where there is none for ``family``."""
    fast = _compiled("cpu_threshold")
    return fast if fast is not None and family.__name__ in fast.CODES else None


def compiled_mixing(family: Any) -> Any:
    """The module that finds strengths of threshold answers, or None where there is none for ``family``."""
    return _compiled("cpu_mixing") if compiled_threshold(family) is not None else None


def threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, shape: Tensor, family: Any, cap: Any, ordered: bool
) -> tuple[Tensor, Tensor]:
    """The fastest threshold search for where its arguments lie. See ``kernels.torch.threshold``.

    ``family`` supplies the scalar functions; one that has no compiled twin runs in plain torch.
    """
    fast = compiled_threshold(family) if x.device.type == "cpu" else None
    if fast is not None:
        return fast.threshold(x, active, eps, k, shape, family.__name__, cap, ordered, family.log_residual)
    return reference.threshold(
        x, active, eps, k, lambda z: family.phi(z, shape), lambda z: family.dphi(z, shape),
        lambda y: family.phi_inverse(y, shape), cap, ordered, family.log_residual,
    )  # fmt: skip
