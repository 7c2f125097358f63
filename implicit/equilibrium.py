"""Deep equilibrium models: a layer whose output is a fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ._loop import Method
from .adjoint import Gradient, Implicit
from .fixed_point import Anderson, fixed_point
from .iterate import Common
from .linear import Auto, LinearSolver


class Equilibrium(nn.Module):
    """The layer z = f(z, *inputs), differentiated implicitly in the inputs and in the parameters of f.

    Args:
        f: the map; a module is registered, so that its parameters are the layer's. Shapes: those of z.
        method, rtol, atol, max_iter, linear, grad, on_fail, has_aux, info: see ``fixed_point``.
        batch_dims: leading dims that number samples, 1 by default.

    The gradient is the same in train() and eval(), but for what f does differently. Buffers (BatchNorm) and random
    numbers (dropout) change once per call; all steps of one call see the same random numbers.
    Memory: one evaluation of f, whatever the number of steps. Source: Bai, Kolter, Koltun 2019.

    Example:
        >>> layer = implicit.Equilibrium(lambda z, x: torch.tanh(0.5 * z + x))
        >>> layer(torch.tensor([[0.3]]))
        tensor([[0.5008]])
    """

    def __init__(
        self,
        f: Callable[..., Any],
        method: Method = Anderson(),
        *,
        rtol: float | None = None,
        atol: float | None = None,
        max_iter: int | None = None,
        linear: LinearSolver = Auto(),
        grad: Gradient = Implicit(),
        on_fail: str = "raise",
        batch_dims: int = 1,
        has_aux: bool = False,
        info: bool = False,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"f must be a map z, *inputs -> z, got {type(f).__name__}")
        Common(linear, grad, rtol, atol, max_iter, on_fail, batch_dims, has_aux, info)
        self.f, self.method = f, method
        self.options: dict[str, Any] = {
            "rtol": rtol,
            "atol": atol,
            "max_iter": max_iter,
            "linear": linear,
            "grad": grad,
            "on_fail": on_fail,
            "batch_dims": batch_dims,
            "has_aux": has_aux,
            "info": info,
        }

    def forward(self, *inputs: Any, z0: Any = None) -> Any:
        """The fixed point from ``z0``, by default zeros like the first input."""
        if z0 is None:
            if not inputs:
                raise ValueError("without inputs the shape of z is unknown: pass z0=")
            z0 = tree_map(torch.zeros_like, inputs[0])
        return fixed_point(self.f, z0, *inputs, method=self.method, **self.options)

    def extra_repr(self) -> str:
        return f"method={self.method!r}, grad={self.options['grad']!r}, batch_dims={self.options['batch_dims']}"
