"""What a smoothing is: a way to soften the linear programme argmax_{y in C} <theta, y>.

An operator states a :class:`Problem`, the hard programme beside its regularized form, and hands it to the smoothing,
which decides how the two are used. Operators therefore never ask which smoothing they were given.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor


class Problem:
    """A linear programme in ``theta``: ``hard()`` is its exact answer, ``soft(regularizer)`` its regularized one.

    Where it has them, ``relaxed(relaxation)`` is its answer by a matrix near the sorting permutation, and
    ``sampled(perturbed)`` the mean of the exact answers under noise.
    """

    def __init__(
        self, hard: Callable[[], Tensor], soft: Callable[[Any], Tensor],
        relaxed: Callable[[Any], Tensor] | None = None, sampled: Callable[[Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.hard, self.soft, self.relaxed, self.sampled = hard, soft, relaxed, sampled


class Smoothing(ABC):
    """How an operator is softened: frozen objects that hold only their parameters, passed as ``smoothing=``."""

    @abstractmethod
    def solve(self, problem: Problem) -> Tensor:
        """The answer of ``problem`` under this smoothing."""

    def bind(self, default: Callable[[Any], Smoothing]) -> Smoothing:
        """This smoothing with its bare numbers read as the operator's own regularizer."""
        return self


SmoothingLike = Smoothing | float | Tensor | None


@dataclass(frozen=True, eq=False)
class Hard(Smoothing):
    """No smoothing: y = argmax_{y in C} <theta, y>, as torch computes it, ties broken as torch breaks them.

    Ranks average ties. The gradient is torch's: zero for weights and ranks, the chosen entry's for values.

    Example:
        >>> so.rank(torch.tensor([2.0, 0.0, 2.0]), smoothing=so.Hard())
        tensor([2.5000, 1.0000, 2.5000])
    """

    def solve(self, problem: Problem) -> Tensor:
        return problem.hard()


def as_smoothing(smoothing: SmoothingLike, default: Callable[[Any], Smoothing], eps: Any) -> Smoothing:
    """The argument ``smoothing=`` of an operator as an object.

    A number or tensor is the strength of the operator's own regularizer ``default``, ``None`` means ``default(eps)``.
    """
    if smoothing is None:
        return default(eps)
    if isinstance(smoothing, Smoothing):
        return smoothing.bind(lambda e: as_smoothing(e, default, eps))
    if isinstance(smoothing, (Real, Tensor)) and not isinstance(smoothing, bool):
        return default(smoothing)
    raise TypeError(
        f"smoothing must be a Smoothing such as so.Quadratic(0.1), or a number, got {type(smoothing).__name__}"
    )


@dataclass(frozen=True, eq=False, init=False)
class StraightThrough(Smoothing):
    """Forward value of one smoothing, gradient of another: value(forward) + (soft - stop_gradient(soft)).

    Args:
        backward: the smoothing whose gradient is used; a number is the strength of the operator's own regularizer.
        forward: the smoothing whose value is used, exact to the bit in every autograd mode; ``Hard()`` by default.

    Source: Bengio, Leonard, Courville 2013, "Estimating or propagating gradients through stochastic neurons".

    Example:
        >>> x = torch.tensor([1.0, 3.0, 2.0])
        >>> so.argmax(x, smoothing=so.StraightThrough(so.Entropy(1.0)))
        tensor([0., 1., 0.])
    """

    backward: SmoothingLike
    forward: Smoothing | float | Tensor

    def __init__(self, backward: SmoothingLike, forward: SmoothingLike = None) -> None:
        object.__setattr__(self, "backward", backward)
        # not a default argument: torch.compile cannot trace an object that it has not seen made
        object.__setattr__(self, "forward", Hard() if forward is None else forward)

    def bind(self, default: Callable[[Any], Smoothing]) -> Smoothing:
        def bound(part: SmoothingLike) -> Smoothing:
            return part.bind(default) if isinstance(part, Smoothing) else default(part)

        return StraightThrough(bound(self.backward), bound(self.forward))

    def solve(self, problem: Problem) -> Tensor:
        if not (isinstance(self.backward, Smoothing) and isinstance(self.forward, Smoothing)):
            raise TypeError("StraightThrough with a bare number has no regularizer here; write so.Quadratic(number)")
        value, soft = self.forward.solve(problem).detach(), self.backward.solve(problem)
        # inf - inf is NaN where a sort keeps an infinity; such an entry has gradient 0 anyway
        return value + torch.where(soft.isinf(), 0, soft - soft.detach())


def straight_through(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with the forward value of ``Hard()`` and the gradient of the ``smoothing=`` that it is called with.

    ``fn`` is any operator, or any function with a keyword ``smoothing`` that it hands on to operators.

    Example:
        >>> hard_rank = so.straight_through(so.rank)
        >>> hard_rank(torch.tensor([0.3, 0.1, 0.2]), smoothing=1.0)
        tensor([3., 1., 2.])
    """

    @functools.wraps(fn)
    def wrapper(*args: Any, smoothing: SmoothingLike = None, **kwargs: Any) -> Any:
        return fn(*args, smoothing=StraightThrough(smoothing), **kwargs)

    return wrapper
