"""Sorting networks with soft compare-exchanges: a fixed sequence of swaps of two wires, each done in part.

With a on the lower and b on the upper wire and f a sigmoid, alpha = f((b - a)/eps), the two become

    min = alpha a + (1 - alpha) b,    max = (1 - alpha) a + alpha b.

The same map, doubly stochastic, applied to the rows of the identity gives the matrix. It is computed from the smaller,
the larger and the small weight w = f(-gap/eps), so that nothing cancels: min = low + w gap, max = high - w gap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._axes import spread
from .noises import Logistic
from .relaxations import Relaxation

# --- sigmoids --------------------------------------------------------------------------------------------------------


class Sigmoid(ABC):
    """f(v), rising from 0 to 1 with f(-v) = 1 - f(v): how much of a pair keeps its order at a gap v (in eps)."""

    @abstractmethod
    def tail(self, s: Tensor) -> Tensor:
        """f(-s) for s >= 0, accurate where it is small, with derivatives from the right at 0."""


Sigmoid.register(Logistic)


@dataclass(frozen=True, eq=False)
class Cauchy(Sigmoid):
    """f(v) = atan(v)/pi + 1/2. A compare-exchange is monotone in both inputs and errs by at most eps/pi.

    Source: Petersen, Borgelt, Kuehne, Deussen 2022, "Monotonic differentiable sorting networks".

    Example:
        >>> so.sort(torch.tensor([1.0, 0.0]), smoothing=so.SortingNetwork(0.5, so.Cauchy()))
        tensor([0.1476, 0.8524])
    """

    def tail(self, s: Tensor) -> Tensor:
        # atan(1/s) for large s; torch's atan2 would round differently in the tail of a vector
        far = s > 1
        angle = torch.atan(torch.where(far, 1 / torch.where(far, s, 1), s)) / math.pi
        return torch.where(far, angle, 0.5 - angle)


@dataclass(frozen=True, eq=False)
class Reciprocal(Sigmoid):
    """f(v) = (v/(2 + |v|) + 1)/2. A compare-exchange is monotone in both inputs and errs by at most eps.

    Source: Petersen, Borgelt, Kuehne, Deussen 2022, "Monotonic differentiable sorting networks".

    Example:
        >>> so.sort(torch.tensor([1.0, 0.0]), smoothing=so.SortingNetwork(0.5, so.Reciprocal()))
        tensor([0.2500, 0.7500])
    """

    def tail(self, s: Tensor) -> Tensor:
        return 1 / (2 + s)


@dataclass(frozen=True, eq=False)
class Optimal(Sigmoid):
    """f(v) = v + 1/2 for |v| <= 1/4, with tails 1/(16|v|) and 1 - 1/(16v): monotone with the least error, eps/16.

    Source: Petersen, Borgelt, Kuehne, Deussen 2022, "Monotonic differentiable sorting networks".

    Example:
        >>> so.sort(torch.tensor([1.0, 0.0]), smoothing=so.SortingNetwork(0.5, so.Optimal()))
        tensor([0.0312, 0.9688])
    """

    def tail(self, s: Tensor) -> Tensor:
        far = s > 0.25
        return torch.where(far, 1 / (16 * torch.where(far, s, 1)), 0.5 - s)


# --- networks --------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Wires start, start + 1, ... in ``blocks`` blocks of 2 ``width``: each in the first half meets one in the second.

    The partner is the one at the same place of the second half, counted from its end if ``mirrored``. Only rows with
    more than ``above`` items take part: a shorter network has no such layer.
    """

    start: int
    blocks: int
    width: int
    mirrored: bool
    above: int

    def upper(self, device: torch.device) -> Tensor:
        """The upper wire of each pair, (blocks, width, 1)."""
        wires = torch.arange(self.start, self.start + 2 * self.blocks * self.width, device=device)
        upper = wires.reshape(self.blocks, 2, self.width, 1).select(1, 1)
        return upper.flip(-2) if self.mirrored else upper


class Network(ABC):
    """Which wires are compared, and when; the smaller always leaves on the lower wire."""

    @abstractmethod
    def wires(self, n: int) -> int:
        """How many wires the layers for n items have: at least n; a comparison with a wire past n is left out."""

    @abstractmethod
    def layers(self, n: int) -> Iterator[Layer]:
        """The layers that sort n items, from first to last."""


@dataclass(frozen=True, eq=False)
class Bitonic(Network):
    """Batcher's bitonic network: log2 n (log2 n + 1)/2 layers, n rounded up to a power of two.

    In the form in which all comparisons point the same way and every merge starts with a mirrored layer: items past the
    end would be larger than all others and never move, so that their comparisons are left out.

    Source: Batcher 1968, "Sorting networks and their applications".

    Example:
        >>> so.sort(torch.tensor([3.0, 1.0, 2.0]), smoothing=so.SortingNetwork(0.1, kind=so.Bitonic()))
        tensor([1.0635, 2.0000, 2.9365])
    """

    def wires(self, n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()

    def layers(self, n: int) -> Iterator[Layer]:
        wires, half = self.wires(n), 1
        while half < n:  # sorted blocks of half become sorted blocks of twice that
            yield Layer(0, wires // (2 * half), half, half > 1, half)
            width = half // 2
            while width:
                yield Layer(0, wires // (2 * width), width, False, half)
                width //= 2
            half *= 2


@dataclass(frozen=True, eq=False)
class OddEven(Network):
    """Odd-even transposition: n layers that compare neighbours, even and odd pairs in turn.

    Source: Knuth 1973, "The art of computer programming", volume 3.

    Example:
        >>> so.sort(torch.tensor([3.0, 1.0, 2.0]), smoothing=so.SortingNetwork(0.1, kind=so.OddEven()))
        tensor([1.0635, 2.0000, 2.9365])
    """

    def wires(self, n: int) -> int:
        return n

    def layers(self, n: int) -> Iterator[Layer]:
        for step in range(n):
            start = step % 2
            if n - start > 1:
                yield Layer(start, (n - start) // 2, 1, False, step)


@dataclass(frozen=True, eq=False, init=False)
class SortingNetwork(Relaxation):
    """A sorting network whose compare-exchanges are soft: min = f((b - a)/eps) a + f((a - b)/eps) b.

    For sort, argsort, topk, argtopk, kthvalue, median, quantile. P is doubly stochastic, so P x keeps the sum and stays
    within [min x, max x]; it follows shifts and scalings of (x, eps). It depends on the order of x, and need not be
    monotone but in the limit eps -> 0.

    Args:
        eps: in the unit of x; a number (0 is Hard), or a positive tensor with gradient. diffsort's steepness is 1/eps.
        sigmoid: f, one of ``Logistic()``, ``Cauchy()`` (the default), ``Reciprocal()``, ``Optimal()``.
        kind: which wires are compared, ``Bitonic()`` (the default) or ``OddEven()``.

    Raises: ValueError for eps < 0. Complexity: O(n) a layer for values, never forming P; O(n^2) a layer for argsort.
    Source: Petersen, Borgelt, Kuehne, Deussen 2021, "Differentiable sorting networks for scalable sorting and ranking".

    Example:
        >>> so.sort(torch.tensor([5.0, 1.0, 2.0]), smoothing=so.SortingNetwork(0.1))
        tensor([1.0635, 2.0001, 4.9364])
    """

    sigmoid: Sigmoid | Logistic
    kind: Network

    def __init__(
        self, eps: float | Tensor, sigmoid: Sigmoid | Logistic | None = None, kind: Network | None = None
    ) -> None:
        object.__setattr__(self, "eps", eps)
        # not default arguments: torch.compile cannot trace an object that it has not seen made
        object.__setattr__(self, "sigmoid", Cauchy() if sigmoid is None else sigmoid)
        object.__setattr__(self, "kind", Bitonic() if kind is None else kind)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sigmoid, Sigmoid):
            raise TypeError(
                f"sigmoid must be one of Logistic(), Cauchy(), Reciprocal(), Optimal(), got {self.sigmoid!r}"
            )
        if not isinstance(self.kind, Network):
            raise TypeError(f"kind must be Bitonic() or OddEven(), got {self.kind!r}")

    def values(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        return self._run(x.unsqueeze(-1), eps, m).squeeze(-1)

    def matrix(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        n = x.shape[-1]
        identity = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape, n)
        return self._run(torch.cat([x.unsqueeze(-1), identity], -1), eps, m)[..., 1:]

    def _run(self, rows: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        """The network on rows (..., n, columns), ordered by their first column."""
        n = rows.shape[-2]
        spare = self.kind.wires(n) - n
        if m is not None:
            rows = torch.where((torch.arange(n, device=rows.device) < m).unsqueeze(-1), rows, 0)
        elif spare:
            m = torch.full((1,), n, device=rows.device)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, spare))
        for layer in self.kind.layers(n):
            rows = self._compare_exchange(rows, layer, eps, m)
        return rows.narrow(-2, 0, n)

    def _compare_exchange(self, rows: Tensor, layer: Layer, eps: Tensor, m: Tensor | None) -> Tensor:
        start, blocks, width, mirrored, above = layer
        *batch, wires, columns = rows.shape
        end = start + 2 * blocks * width
        a, b = rows[..., start:end, :].reshape(*batch, blocks, 2, width, columns).unbind(-3)
        if mirrored:
            b = b.flip(-2)
        swap = b[..., :1] < a[..., :1]
        present = None
        if m is not None:
            most = m.unsqueeze(-1).unsqueeze(-1)
            present = (layer.upper(rows.device) < most) & (most > above)
            swap = swap & present
        # not minimum and maximum, whose second derivatives at a tie are not those of the smooth function
        low, high = torch.where(swap, b, a), torch.where(swap, a, b)
        difference = high - low
        strength = spread(eps, blocks * width)
        strength = strength.expand(*strength.shape[:-1], blocks * width).reshape(*eps.shape[:-1], blocks, width, 1)
        gap = difference[..., :1] if present is None else torch.where(present, difference[..., :1], 0)
        weight = self.sigmoid.tail(gap / strength)
        if present is not None:
            weight = torch.where(present, weight, 0)
        moved = weight * difference
        low, high = low + moved, high - moved
        pairs = torch.stack([low, high.flip(-2) if mirrored else high], -3).reshape(*batch, end - start, columns)
        return torch.cat([rows[..., :start, :], pairs, rows[..., end:, :]], -2) if end - start < wires else pairs
