"""A doubly stochastic matrix near the permutation that sorts x, never formed: products with it cost O(n).

With G as in ``lapsum``, x ascending, b_0 = -inf, b_n = inf and G(b_k) = k in between,

    P_ki = F((b_k - x_i)/a) - F((b_{k-1} - x_i)/a)

is the share of item i that lies between the thresholds b_{k-1} and b_k. Columns sum to 1 as F runs from 0 to 1, rows as
G(b_k) - G(b_{k-1}) = 1. P x is monotone and keeps the sum, but is not the soft sort; P' (1, ..., n) is not the soft
rank.
Source: Struski et al. 2025, "LapSum: one method to differentiate them all".
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ._axes import Rows, check_tensor
from .lapsum import Ascending


def _cdf(z: Tensor) -> Tensor:
    """The distribution function of the Laplace law."""
    tail = torch.where(z < 0, z, -z).exp() / 2
    return torch.where(z < 0, tail, 1 - tail)


def _take(v: Tensor, index: Tensor) -> Tensor:
    """v (..., n) at index (..., m), the batch dims of both broadcast."""
    batch = torch.broadcast_shapes(v.shape[:-1], index.shape[:-1])
    return v.expand(*batch, v.shape[-1]).gather(-1, index.expand(*batch, index.shape[-1]))


def _cdf_sum(nodes: Ascending, v: Tensor, queries: Tensor, place: Tensor) -> Tensor:
    """sum_i v_i F((q - node_i)/a) at each query q, of which ``place`` nodes lie at or below."""
    v = torch.where(nodes.inside, v, 0)
    low, high = (place - 1).clamp(min=0), torch.minimum(place, (nodes.m - 1).clamp(min=0))
    has_low, has_high = place > 0, place < nodes.m
    down = torch.where(has_low, (queries - _take(nodes.x, low)) / nodes.a, 0)
    up = torch.where(has_high, (_take(nodes.x, high) - queries) / nodes.a, 0)
    below = _take(v.cumsum(-1), low) - (-down).exp() / 2 * _take(nodes.left(v), low)
    above = (-up).exp() / 2 * _take(nodes.right(v), high)
    return torch.where(has_low, below, 0) + torch.where(has_high, above, 0)


def _count_below(nodes: Ascending, queries: Tensor) -> Tensor:
    """How many nodes lie at or below each query."""
    known = torch.where(nodes.inside, nodes.x, torch.inf).detach().contiguous()
    return torch.searchsorted(known, queries.detach().contiguous(), right=True)


class SoftPermutation:
    """The operator P, (n positions) x (n items) for each row of x: ``P @ v``, ``P.T @ u``, ``P.dense()``.

    v is (n,), or (..., n, d) with the batch dims of x. Rows and columns of present items sum to 1; equal infinities
    share the positions at their end; absent items have zero columns, and the last positions zero rows.
    Differentiable in x, in the strength and in v. Made by :func:`soft_permutation`.
    """

    def __init__(self, rows: Rows, order: Tensor, present: Tensor | None, scale: Tensor, descending: bool) -> None:
        """``order`` puts the largest first and absent items last; ``present`` is in that order; scale: (..., 1)."""
        n = self.n = rows.n
        self.rows, self.transposed = rows, False
        x = rows.x.gather(-1, order)
        held = torch.ones_like(x, dtype=torch.bool) if present is None else present
        finite, top, bottom = held & x.isfinite(), held & (x == torch.inf), held & (x == -torch.inf)
        m, n_top, n_bottom = (t.sum(-1, keepdim=True) for t in (finite, top, bottom))
        index = torch.arange(n, device=x.device).expand(x.shape)
        back = (n_top + m - 1 - index).clamp(min=0)  # from largest first to ascending among the finite, and back
        kind = bottom.long() + 2 * finite + 3 * top  # 0 is absent
        # a dimension for the columns of a matrix v comes before the last one
        self.items = Ascending(*(t.unsqueeze(-2) for t in (torch.where(finite, x, 0).gather(-1, back), scale, m)))
        self.item_at = order.gather(-1, back).unsqueeze(-2)
        self.item_kind = torch.zeros_like(order).scatter(-1, order, kind).unsqueeze(-2)
        self.item_place = torch.zeros_like(order).scatter(-1, order, back).unsqueeze(-2)
        last = n_bottom + m + n_top - 1
        ascending = torch.where((index <= last) & descending, last - index, index)  # an involution
        kinds = (index < n_bottom) + 2 * ((index >= n_bottom) & (index < n_bottom + m)) + 3 * (index >= n_bottom + m)
        kinds = torch.where(index <= last, kinds, 0)
        self.position_kind = kinds.gather(-1, ascending).unsqueeze(-2)
        self.position_place = (ascending - n_bottom).clamp(0, max(n - 1, 0)).unsqueeze(-2)
        from_place = (index + n_bottom).clamp(max=max(n - 1, 0))
        self.position_at = ascending.gather(-1, from_place).unsqueeze(-2)
        # thresholds: G(b_k) = k + 1 for k = 0 .. m - 2
        between = (self.items.m - 1).clamp(min=0)
        level = torch.where(self.items.index < between, self.items.index.to(x.dtype) + 1, 0.5)
        self.thresholds = Ascending(self.items.inverse(level.expand_as(self.items.x)), self.items.a, between)

    @property
    def T(self) -> SoftPermutation:
        """The transposed operator, (n items) x (n positions)."""
        other = copy.copy(self)
        other.transposed = not self.transposed
        return other

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.batch, self.n, self.n))

    def _to_positions(self, v: Tensor) -> Tensor:
        ordered, b = torch.where(self.items.inside, _take(v, self.item_at), 0), self.thresholds
        inner = _cdf_sum(self.items, ordered, b.x, _count_below(self.items, b.x))
        total = ordered.sum(-1, keepdim=True)
        upper = torch.where(b.inside, inner, total)  # F(inf) = 1
        lower = torch.nn.functional.pad(upper[..., :-1], (1, 0))
        return _take(upper - lower, self.position_place)

    def _to_items(self, u: Tensor) -> Tensor:
        ordered, b = _take(u, self.position_at), self.thresholds
        steps = torch.where(b.inside, ordered - torch.nn.functional.pad(ordered[..., 1:], (0, 1)), 0)
        final = _take(ordered, (self.items.m - 1).clamp(min=0))
        # F(z) = 1 - F(-z)
        sums = steps.sum(-1, keepdim=True) - _cdf_sum(b, steps, self.items.x, _count_below(b, self.items.x))
        return _take(sums + final, self.item_place)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmul(v)

    def matmul(self, v: Tensor) -> Tensor:
        """``P @ v``; the form that torch.compile can trace, as it has no @ of an object with a tensor."""
        v = check_tensor(v, "v")
        axis = -1 if v.ndim == 1 else -2
        if v.ndim == 0 or v.shape[axis] != self.n:
            raise ValueError(f"v of shape {tuple(v.shape)} does not fit an operator of shape {tuple(self.shape)}")
        rows = v.to(self.rows.wide).reshape(1, -1) if v.ndim == 1 else v.to(self.rows.wide).transpose(-1, -2)
        source, target = self.item_kind, self.position_kind
        if self.transposed:
            source, target = target, source
        finite = torch.where(source == 2, rows, 0)
        y = self._to_items(finite) if self.transposed else self._to_positions(finite)
        y = torch.where(target == 2, y, 0)
        for kind in (1, 3):  # equal infinities: the mean of their entries
            held = source == kind
            mean = torch.where(held, rows, 0).sum(-1, keepdim=True) / held.sum(-1, keepdim=True).clamp(min=1)
            y = torch.where(target == kind, mean, y)
        y = (y + self.rows.poison.sum(-1, keepdim=True).unsqueeze(-2)).to(self.rows.dtype)
        return y.squeeze(-2) if v.ndim == 1 else y.transpose(-1, -2)

    def dense(self) -> Tensor:
        """P as a tensor (..., n, n): O(n^2) memory."""
        b = self.thresholds
        upper = _cdf((b.x.transpose(-1, -2) - self.items.x) / self.items.a)  # (..., n thresholds, n items), ascending
        upper = torch.where(b.inside.transpose(-1, -2), upper, 1)
        share = upper - torch.nn.functional.pad(upper[..., :-1, :], (0, 0, 1, 0))
        n = (*share.shape[:-2], self.n, self.n)
        share = share.gather(-2, self.position_place.transpose(-1, -2).expand(n)).gather(-1, self.item_place.expand(n))
        rows, columns = self.position_kind.transpose(-1, -2), self.item_kind
        equal = torch.where(rows == columns, 1.0, 0.0).to(share) / (rows == columns).sum(-1, keepdim=True).clamp(min=1)
        y = torch.where((rows == 2) & (columns == 2), share, torch.where((rows > 0) & (rows != 2), equal, 0))
        y = (y + self.rows.poison.sum(-1, keepdim=True).unsqueeze(-2)).to(self.rows.dtype)
        return y.transpose(-1, -2) if self.transposed else y

    def __repr__(self) -> str:
        return f"SoftPermutation(shape={tuple(self.shape)}, transposed={self.transposed})"
