"""Smoothings inside modules: what is a tensor in them becomes a parameter or a buffer of the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..smoothing import Smoothing, SmoothingLike

Source = SmoothingLike | Callable[[], SmoothingLike]  # what a module takes: a smoothing, or what supplies one per call


class Held(nn.Module):
    """A smoothing whose tensors are registered, so that they move, save and train with the module; called, it is made
    anew from what they are then. (An object that merely held the tensors would keep the old ones after
    ``torch.func.functional_call``, ``to(device)`` or ``load_state_dict(assign=True)``.)"""

    def __init__(self, smoothing: Smoothing) -> None:
        super().__init__()
        self.family = type(smoothing)
        self.plain: dict[str, Any] = {}
        self.held: list[str] = []
        for field in dataclasses.fields(smoothing):  # type: ignore[arg-type]  # every smoothing is a dataclass
            value = getattr(smoothing, field.name)
            value = Held(value) if isinstance(value, Smoothing) and tensors(value) else value
            if isinstance(value, (Tensor, nn.Module)):
                register(self, field.name + "_", value)
                self.held.append(field.name)
            else:
                self.plain[field.name] = value

    def forward(self) -> Smoothing:
        found = {name: getattr(self, name + "_") for name in self.held}
        given = {name: value() if isinstance(value, Held) else value for name, value in found.items()}
        return self.family(**self.plain, **given)


def register(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """``value`` as parameter, buffer or submodule."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.requires_grad:
            raise ValueError(
                f"{name.rstrip('_')} requires a gradient but is no nn.Parameter, so that no optimizer would see it; "
                "pass nn.Parameter(...), or value.detach()"
            )
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def tensors(smoothing: Smoothing) -> bool:
    """Whether any parameter of the smoothing is a tensor."""
    values = [getattr(smoothing, field.name) for field in dataclasses.fields(smoothing)]  # type: ignore[arg-type]
    return any(isinstance(v, Tensor) or (isinstance(v, Smoothing) and tensors(v)) for v in values)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def held(smoothing: Source, owner: str) -> Any:
    """``smoothing`` as a module attribute: registered where it has tensors, left alone otherwise."""
    if isinstance(smoothing, Tensor):
        raise TypeError(
            f"{owner}: a tensor as smoothing would be neither saved nor trained; "
            "pass a number, so.Quadratic(tensor), or so.nn.LearnableEps(tensor)"
        )
    if isinstance(smoothing, Smoothing):
        return Held(smoothing) if tensors(smoothing) else smoothing
    if smoothing is None or is_number(smoothing) or (callable(smoothing) and not isinstance(smoothing, type)):
        return smoothing
    raise TypeError(
        f"{owner}: smoothing must be a number, a Smoothing such as so.Quadratic(0.1), or what supplies one when "
        f"called (so.nn.LearnableEps, so.nn.Anneal), got {getattr(smoothing, '__name__', type(smoothing).__name__)}"
    )


def current(smoothing: Any) -> SmoothingLike:
    """The smoothing of this call."""
    return smoothing if smoothing is None or isinstance(smoothing, (int, float, Smoothing)) else smoothing()


def written(smoothing: Any) -> str:
    """``smoothing`` as it would be written, for repr."""
    if not isinstance(smoothing, Smoothing):
        return repr(smoothing)
    values = {field.name: getattr(smoothing, field.name) for field in dataclasses.fields(smoothing)}  # type: ignore[arg-type]
    parts = [f"{name}={written(value)}" for name, value in values.items() if value is not None]
    return f"{type(smoothing).__name__}({', '.join(parts)})"
