"""The strength eps while a model trains: learned, or annealed by a schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..smoothing import Smoothing
from ._held import Held, is_number, tensors, written

Weight = Callable[[float], float]
SHAPES: dict[str, Weight] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}  # the weight of the start at the fraction t of the way, beside "geometric"


def with_eps(smoothing: Smoothing, eps: Any) -> Smoothing:
    given = {field.name: getattr(smoothing, field.name) for field in dataclasses.fields(smoothing)}  # type: ignore[arg-type]
    return type(smoothing)(**{**given, "eps": eps})


def strength_of(start: Any, owner: str) -> tuple[Any, Smoothing | None]:
    """The number or tensor eps in ``start``, and the smoothing around it, if there is one."""
    smoothing = start if isinstance(start, Smoothing) else None
    eps = getattr(smoothing, "eps", None) if smoothing is not None else start
    if not (is_number(eps) or isinstance(eps, Tensor)):
        raise TypeError(
            f"{owner} needs a number eps, or a smoothing with one such as so.Entropy(0.1), got "
            f"{written(start) if isinstance(start, Smoothing) else type(start).__name__}"
        )
    return eps, smoothing


class LearnableEps(nn.Module):
    """A smoothing whose strength is a parameter, eps = lowest + exp(log_eps); called, it returns the smoothing.

    Args:
        start: what to start from: a number or tensor eps > lowest (the operator's own regularizer), or a smoothing
            with an eps, such as ``so.Entropy(0.1)``. A tensor, one eps a head, say, has the shape that eps may have.
        lowest: a bound, >= 0, under which eps cannot fall.

    eps in the unit of the scores. A loss that rewards sharp answers drives it down: give ``lowest``, or a penalty.
    Raises: ValueError for eps <= lowest, TypeError for a smoothing without eps.

    Example:
        >>> soft = so.nn.Soften(so.argmax, so.nn.LearnableEps(so.Entropy(0.5)), dim=-1)
        >>> soft(torch.tensor([1.0, 2.0])).sum().backward()
        >>> soft.smoothing.eps
        tensor(0.5000, grad_fn=<AddBackward0>)
    """

    def __init__(self, start: Any, *, lowest: float = 0.0) -> None:
        super().__init__()
        eps, smoothing = strength_of(start, "LearnableEps")
        if not is_number(lowest) or not 0 <= lowest < math.inf:
            raise ValueError(f"lowest must be a finite number >= 0, got {lowest!r}")
        value = torch.as_tensor(eps, dtype=None if isinstance(eps, Tensor) else torch.get_default_dtype()).detach()
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        if not bool((value > lowest).all()):
            raise ValueError(f"eps must start above lowest = {lowest}, got {value.min().item()}")
        self.lowest = float(lowest)
        self.log_eps = nn.Parameter((value - lowest).log())
        rest = smoothing is not None and with_eps(smoothing, 1.0)  # what else it holds may be tensors too
        self.smoothing: Any = Held(rest) if rest and tensors(rest) else rest or None

    @property
    def eps(self) -> Tensor:
        """The strength now, with gradient."""
        return self.lowest + self.log_eps.exp()

    def forward(self) -> Smoothing | Tensor:
        if self.smoothing is None:
            return self.eps
        return with_eps(self.smoothing() if isinstance(self.smoothing, Held) else self.smoothing, self.eps)

    def extra_repr(self) -> str:
        eps = self.eps.detach()
        shown = f"{eps.item():.4g}" if eps.ndim == 0 else f"of shape {tuple(eps.shape)}"
        family = getattr(self.smoothing, "family", type(self.smoothing)).__name__
        return f"eps={shown}" if self.smoothing is None else f"{family}, eps={shown}"


class Anneal:
    """A schedule for eps from ``start`` to ``end`` in ``steps`` steps; called, it returns the smoothing of this step.

    Used as torch's learning-rate schedulers are: ``step()`` after each step of the optimizer, ``state_dict()`` and
    ``load_state_dict()`` to resume. Give the object to ``Soften`` and the other modules as their smoothing.

    Args:
        start: a number eps, or a smoothing with a number eps, such as ``so.Entropy(1.0)``.
        end: a number eps; 0 is the hard operator (not for "geometric"). It stays there after ``steps`` steps.
        steps: how many calls of ``step()`` lead from start to end, >= 1.
        shape: "geometric", "linear", "cosine", or a function from the fraction done, in [0, 1], to the weight of the
            start: eps = end + (start - end) weight.

    Inside torch.compile eps is a tensor, so that a step does not compile anew. Raises: ValueError, TypeError.

    Example:
        >>> schedule = so.nn.Anneal(so.Entropy(1.0), 0.01, steps=2)
        >>> for _ in range(3): print(round(schedule.eps, 4), end=" "); schedule.step()
        1.0 0.1 0.01
    """

    def __init__(self, start: Any, end: float, steps: int, shape: str | Weight = "geometric") -> None:
        eps, self.smoothing = strength_of(start, "Anneal")
        for name, value in (("start", eps), ("end", end)):
            if not is_number(value):
                raise TypeError(f"Anneal needs a number as {name}, got {type(value).__name__}")
            if not 0 <= value < math.inf:
                raise ValueError(f"Anneal {name} must be a finite number >= 0, got {value}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Anneal steps must be an int >= 1, got {steps!r}")
        if not callable(shape) and shape not in ("geometric", *SHAPES):
            raise ValueError(
                f"Anneal shape must be {', '.join(map(repr, ('geometric', *SHAPES)))} or a function, got {shape!r}"
            )
        if shape == "geometric" and not (eps > 0 and end > 0):
            raise ValueError(f'geometric annealing cannot pass 0, got {eps} to {end}; use shape="linear" or "cosine"')
        self.start, self.end, self.steps, self.shape = float(eps), float(end), steps, shape
        self.last_step = 0
        self._set()

    def _at(self, t: float) -> float:
        if t in (0.0, 1.0):  # the ends exactly, whatever rounding does
            return self.end if t else self.start
        if self.shape == "geometric":
            return math.exp((1 - t) * math.log(self.start) + t * math.log(self.end))
        weight = self.shape if callable(self.shape) else SHAPES[self.shape]
        eps = self.end + (self.start - self.end) * float(weight(t))
        if not 0 <= eps < math.inf:
            raise ValueError(f"the shape of Anneal leads to eps = {eps} at the fraction {t} of the way")
        return eps

    def _set(self) -> None:
        self._eps = self._at(min(self.last_step / self.steps, 1.0))
        self._tensor = torch.tensor(self._eps, dtype=torch.float64) if self._eps > 0 else None

    @property
    def eps(self) -> float:
        """The strength now."""
        return self._eps

    def step(self) -> None:
        """Goes one step on."""
        self.last_step += 1
        self._set()

    def __call__(self) -> Smoothing | float | Tensor:
        # inside torch.compile a number would be a constant of the compiled code, 0 should be one
        eps = self._tensor if torch.compiler.is_compiling() and self._tensor is not None else self._eps
        return eps if self.smoothing is None else with_eps(self.smoothing, eps)

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is; what it is, its constructor says."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict()`` was taken."""
        if not isinstance(state, dict) or set(state) != {"last_step"}:
            raise ValueError(f"not a state of Anneal, which has the one key 'last_step': {state!r}")
        self.last_step = int(state["last_step"])
        self._set()

    def __repr__(self) -> str:
        start = self.start if self.smoothing is None else written(self.smoothing)
        return f"Anneal({start}, {self.end}, steps={self.steps}, shape={self.shape!r}) at eps={self.eps:.4g}"
