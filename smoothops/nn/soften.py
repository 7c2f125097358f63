"""Any operator as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ._held import Source, current, held, register, written


class Soften(nn.Module):
    """The module ``x -> fn(x, smoothing=..., **fixed)`` around any soft operator, loss or method of a polytope.

    Args:
        fn: a function with a parameter ``smoothing``, such as ``so.rank`` or ``so.Birkhoff().argmax``.
        smoothing: a number, a Smoothing, or what supplies one at each call, ``LearnableEps`` or ``Anneal``; None: fn's
            default. Tensors in it become parameters and buffers.
        **fixed: keyword arguments of fn. A tensor among them becomes a buffer, an ``nn.Parameter`` a parameter.

    forward takes the other arguments of fn and returns what fn returns.
    Raises: TypeError where fn has no such parameter, ValueError for a tensor that needs a gradient and is no Parameter.

    Example:
        >>> ranks = so.nn.Soften(so.rank, so.Quadratic(0.5), dim=-1)
        >>> ranks(torch.tensor([0.2, 0.1, 0.9]))
        tensor([1.6000, 1.4000, 3.0000])
    """

    def __init__(self, fn: Callable[..., Any], smoothing: Source = None, **fixed: Any) -> None:
        super().__init__()
        check_function(fn, fixed)
        self.fn, self.smoothing = fn, held(smoothing, "Soften")
        self.fixed: dict[str, Any] = {}
        self.registered: list[str] = []
        for name, value in fixed.items():
            if isinstance(value, (Tensor, nn.Module)):
                if hasattr(self, name):
                    raise ValueError(f"an nn.Module has an attribute {name!r} of its own; bind it in a function")
                register(self, name, value)
                self.registered.append(name)
            else:
                self.fixed[name] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**self.fixed, **{name: getattr(self, name) for name in self.registered}, **kwargs}
        if self.smoothing is not None and "smoothing" not in kwargs:
            given["smoothing"] = current(self.smoothing)
        return self.fn(*args, **given)

    def extra_repr(self) -> str:
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        known = [] if isinstance(self.smoothing, (nn.Module, type(None))) else [f"smoothing={written(self.smoothing)}"]
        return ", ".join([name, *known, *(f"{key}={value!r}" for key, value in self.fixed.items())])


def check_function(fn: Any, fixed: dict[str, Any]) -> None:
    if not callable(fn):
        raise TypeError(f"Soften takes a function such as so.rank, got {type(fn).__name__}")
    try:
        known = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # built-in functions have no signature
        known = {}  # type: ignore[assignment]
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    name = getattr(fn, "__name__", type(fn).__name__)
    if "smoothing" not in known and not anything:
        raise TypeError(f"{name} has no parameter smoothing; Soften takes functions such as so.rank that have one")
    for key in fixed:
        if key not in known and not anything:
            raise TypeError(f"{name} has no parameter {key!r}; it has {', '.join(known)}")
