"""Which states of a loop are kept for its backward pass; the others are computed again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

# a stretch [start, stop) of a loop whose first state is kept, and how it is reversed: None means taped as a whole
Part = tuple[int, int, "Checkpoint | None"]


class Checkpoint(ABC):
    """A schedule of kept states: :class:`Sqrt` or :class:`Binomial`."""

    @abstractmethod
    def parts(self, start: int, stop: int) -> list[Part]:
        """[start, stop) cut into stretches, left to right; backward takes them from right to left."""


@dataclass(frozen=True)
class Sqrt(Checkpoint):
    """Keeps every ceil(sqrt T)-th state of T steps: at most 2 sqrt(T) + 2 states at once, each step computed twice.

    Args: none. Pass it as ``checkpoint=`` to ``fori_loop``, ``scan`` or ``while_loop``.

    Source: Chen, Xu, Zhang, Guestrin 2016, "Training deep nets with sublinear memory cost".

    Example:
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> y = so.fori_loop(0, 100, lambda i, s: s.sin(), x, checkpoint=so.Sqrt())
        >>> torch.autograd.grad(y, x)[0]
        tensor(0.0328)
    """

    def parts(self, start: int, stop: int) -> list[Part]:
        stride = max(1, math.isqrt(max(stop - start - 1, 0)) + 1)
        return [(a, min(a + stride, stop), None) for a in range(start, stop, stride)]


@dataclass(frozen=True)
class Binomial(Checkpoint):
    """Keeps at most ``slots`` states, the initial one included; optimal in the number of steps computed again.

    With T <= C(slots + t, slots) steps, no step is computed more than t times beside the taped run that backward takes,
    together t T - C(slots + t, t - 1) times, the optimum: t = 5 for T = 1024 and 8 slots. (The last step is computed
    once more, and the state where it starts is kept on the tape.) With one slot every step starts from the first state.

    Args:
        slots: a positive int.

    Raises: ValueError for fewer than one slot.
    Source: Griewank, Walther 2000, "Algorithm 799: revolve".

    Example:
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> y = so.fori_loop(0, 100, lambda i, s: s.sin(), x, checkpoint=so.Binomial(4))
        >>> torch.autograd.grad(y, x)[0]
        tensor(0.0328)
    """

    slots: int

    def __post_init__(self) -> None:
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < 1:
            raise ValueError(f"Binomial needs at least one slot, for the initial state; got {self.slots!r}")

    def parts(self, start: int, stop: int) -> list[Part]:
        found: list[Part] = []
        slots = self.slots
        while stop - start > 1 and slots > 1:
            middle = start + advance(stop - start, slots)
            found.append((start, middle, Binomial(slots) if middle - start > 1 else None))
            start, slots = middle, slots - 1
        if stop - start > 1:
            found.append((start, stop - 1, Again()))
        if start < stop:  # the tape begins where the run arrives
            found.append((stop - 1, stop, None))
        return found


@dataclass(frozen=True)
class Again(Checkpoint):
    """Only the first state is kept: each step is reached from it anew."""

    def parts(self, start: int, stop: int) -> list[Part]:
        raise NotImplementedError("reversed step by step")


def advance(steps: int, slots: int) -> int:
    """How far to go before the next state is kept: the largest such that both sides are as cheap as can be."""
    t = 1
    while math.comb(slots + t, slots) < steps:
        t += 1
    return max(1, min(math.comb(slots + t - 1, slots), steps - math.comb(max(slots + t - 2, 0), slots - 1)))
