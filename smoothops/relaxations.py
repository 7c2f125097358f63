"""Relaxations of a sort: smoothings that are no programme over a polytope, but a matrix near the sorting permutation.

P_ij is the weight of item j at position i, position 0 being that of the smallest; each row sums to 1, and the soft sort
is P x. Here are the two whose rows are a softmax over a distance from position i to item j; ``sorting_network`` has the
one that is a product of soft swaps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._regularizer import check_positive
from .smoothing import Problem, Smoothing


@dataclass(frozen=True, eq=False)
class Relaxation(Smoothing):
    """A matrix P(x) near the permutation that sorts x. ``eps``: a number, or a positive tensor shaped as elsewhere.

    Both methods take rows x (..., n), all finite, eps (..., 1) and m, None or (..., 1): only the first m items of a row
    count, and only the first m positions are filled.
    """

    eps: float | Tensor

    def __post_init__(self) -> None:
        check_positive(self.eps, f"{type(self).__name__} eps", zero=not isinstance(self.eps, Tensor))

    def solve(self, problem: Problem) -> Tensor:
        if not isinstance(self.eps, Tensor) and self.eps == 0:
            return problem.hard()
        if problem.relaxed is None:
            raise ValueError(
                f"{type(self).__name__} softens sorts only (sort, argsort, topk, argtopk, kthvalue, median, quantile); "
                "here use so.Quadratic or so.Entropy"
            )
        return problem.relaxed(self)

    @abstractmethod
    def matrix(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        """P, (..., n positions, n items), ascending; rows and columns past m are 0."""

    @abstractmethod
    def values(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        """P x, the soft sort in ascending order; 0 past m."""


class RowSoftmax(Relaxation):
    """P_ij = softmax_j(-d_ij / eps) with a distance d >= 0 from position i to item j that is 0 at the i-th smallest."""

    @abstractmethod
    def _distances(self, s: Tensor, m: Tensor | None) -> Tensor:
        """d, (..., n positions, n items), for items s in ascending order; anything where one of the two is past m."""

    def matrix(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        order = _ascending_order(x, m)
        p = self._weights(x.gather(-1, order), eps, m)
        place = torch.zeros_like(order).scatter(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))
        return p.gather(-1, place.unsqueeze(-2).expand_as(p))

    def values(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        s = x.gather(-1, _ascending_order(x, m))
        # not a matrix product, which sums in an order that depends on the number of rows
        return (self._weights(s, eps, m) * s.unsqueeze(-2)).sum(-1)

    def _weights(self, s: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        """P for items s in ascending order."""
        d = self._distances(s, m)
        strength = eps.expand(s.shape).unsqueeze(-1)  # one a position: its gradient is summed row by row
        if m is None:
            return torch.softmax(-d / strength, -1)
        inside = torch.arange(s.shape[-1], device=s.device) < m
        item, position = inside.unsqueeze(-2), inside.unsqueeze(-1)
        logits = -torch.where(item & position, d, 0) / strength
        # a position past m keeps its items, so that no softmax is over nothing, and is dropped afterwards
        p = torch.softmax(torch.where(item | ~position, logits, -torch.inf), -1)
        return torch.where(position, p, 0)


@dataclass(frozen=True, eq=False)
class SoftSort(RowSoftmax):
    """P_ij = softmax_j(-|s_i - x_j| / eps), s = x in ascending order: row i weighs the items by their distance to s_i.

    For sort, argsort, topk, argtopk, kthvalue, median, quantile. P x is monotone and within [min x, max x], does not
    depend on the order of x, and follows shifts and scalings of (x, eps); its sum is not that of x, as columns of P do
    not sum to 1. At a tie the derivative of |.| is 0.

    Args:
        eps: strength, in the unit of x; a number (0 is Hard), or a positive tensor with gradient.

    Raises: ValueError for eps < 0. Complexity: O(n^2) time and memory, also for the values.
    Source: Prillo, Eisenschlos 2020, "SoftSort: a continuous relaxation for the argsort operator".

    Example:
        >>> so.sort(torch.tensor([5.0, 1.0, 2.0]), smoothing=so.SoftSort(1.0))
        tensor([1.3182, 1.8459, 4.7916])
    """

    def _distances(self, s: Tensor, m: Tensor | None) -> Tensor:
        return (s.unsqueeze(-1) - s.unsqueeze(-2)).abs()


@dataclass(frozen=True, eq=False)
class NeuralSort(RowSoftmax):
    """P_ij = softmax_j(((2i - n - 1) x_j - sum_k |x_j - x_k|) / eps), i = 1..n ascending.

    For sort, argsort, topk, argtopk, kthvalue, median, quantile. P x is monotone and within [min x, max x], does not
    depend on the order of x, and follows shifts and scalings of (x, eps); its sum is not that of x, as columns of P do
    not sum to 1. Equal items have equal weights and gradients: the derivative of |.| at 0 is 0.

    Args:
        eps: strength, in the unit of x; a number (0 is Hard), or a positive tensor with gradient. The j-th neighbour
            of an item is about j^2 gaps away, so that at the same eps fewer items mix than in SoftSort.

    Raises: ValueError for eps < 0. Complexity: O(n^2) time and memory, also for the values.
    Source: Grover, Wang, Zweig, Ermon 2019, "Stochastic optimization of sorting networks via continuous relaxations".

    Example:
        >>> so.sort(torch.tensor([5.0, 1.0, 2.0]), smoothing=so.NeuralSort(1.0))
        tensor([1.2691, 1.8459, 4.8486])
    """

    def _distances(self, s: Tensor, m: Tensor | None) -> Tensor:
        # Up to a constant of row i the logit of item k is -d_ik with, for k > i and gaps g_r = s_{r+1} - s_r,
        #   d_ik = sum_{i <= r < k} (2 (r - i) + 1) g_r,
        # and its mirror image for k < i. Every term is >= 0, so that nothing cancels, not beside an outlier either;
        # the sums of |s_j - s_k|, which are of the size of n max|s|, would lose the small gaps.
        n, known = s.shape[-1], s.detach()
        index = torch.arange(n, dtype=s.dtype, device=s.device)
        item, position = index, index.unsqueeze(-1)
        odd = (2 * (item - position) - 1).clamp(min=0)
        gaps = (known[..., 1:] - known[..., :-1]).clamp(max=torch.finfo(s.dtype).max)  # as 0 inf is NaN

        def above(gaps: Tensor) -> Tensor:
            return (odd * torch.nn.functional.pad(gaps, (1, 0)).unsqueeze(-2)).cumsum(-1)

        d = above(gaps) + above(gaps.flip(-1)).flip(-2, -1)
        # The derivative is that of the logit (2i - n - 1) s_j - sum_k |s_j - s_k|. With l_j items below s_j and r_j not
        # above it, sign(0) = 0 and a constant of the row left out, it is
        #   (2i - 1 - l_j - r_j) ds_j + sum_{k <= l_j} ds_k + sum_{k <= r_j} ds_k,
        # a linear function of u = 0, which carries the derivative of s.
        if m is not None:
            known = torch.where(item < m, known, torch.inf)
        known = known.contiguous()
        low, high = torch.searchsorted(known, known), torch.searchsorted(known, known, right=True)
        u = s - s.detach()
        sums = torch.nn.functional.pad(u.cumsum(-1), (1, 0))
        sums = sums.gather(-1, low) + sums.gather(-1, high)
        slope = 2 * position + 1 - (low + high).unsqueeze(-2)
        return d - (slope * u.unsqueeze(-2) + sums.unsqueeze(-2))


def _ascending_order(x: Tensor, m: Tensor | None) -> Tensor:
    """The stable permutation that puts the smallest first and items past m last."""
    known = x.detach()
    if m is not None:
        known = torch.where(torch.arange(x.shape[-1], device=x.device) < m, known, torch.inf)
    return known.argsort(dim=-1, stable=True)
