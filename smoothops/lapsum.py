"""Ranks and sorts smoothed by the Laplace law (LapSum): not a programme over a polytope, but O(n) after the sort.

With F the distribution function of the Laplace law, x ascending and scale a,

    G(b) = sum_i F((b - x_i)/a),    rank: r_m = G(x_m) + 1/2,    sort: y_m = G^-1(m - 1/2).

The sums over all pairs come from two linear recurrences, from the left and from the right,

    B_m = 1 + exp((x_{m-1} - x_m)/a) B_{m-1},    A_m = 1 + exp((x_m - x_{m+1})/a) A_{m+1},

as G(x_m) = m - 1/2 + (A_m - B_m)/2; between two neighbours G is a sum of two exponentials with a closed inverse.
Source: Struski et al. 2025, "LapSum: one method to differentiate them all".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._axes import Rows
from ._opaque import as_rows, one_a_row, opaque
from ._regularizer import Mixing, Regularizer
from .polytopes._fused import order
from .polytopes._mixing import search_from

CHUNK = 32  # of the scan: that many steps on vectors of n/CHUNK, a level
LARGE = 20.0  # of the exponent, from where asinh is a logarithm to the last digit


def linear_scan(ratio: Tensor, value: Tensor) -> Tensor:
    """y_m = value_m + ratio_m y_{m-1} along the last dim, y_0 = value_0; O(n) work in CHUNK log n steps."""
    n = value.shape[-1]
    if n <= CHUNK:
        return _scan_columns(ratio, value)[0]
    chunks = -(-n // CHUNK)
    pad = chunks * CHUNK - n
    shape = (*value.shape[:-1], chunks, CHUNK)
    ratio = torch.nn.functional.pad(ratio.expand_as(value), (0, pad)).reshape(shape)
    value = torch.nn.functional.pad(value, (0, pad)).reshape(shape)
    local, product = _scan_columns(ratio, value)
    ends = linear_scan(product[..., -1], local[..., -1])  # of each chunk, with all before it
    before = torch.nn.functional.pad(ends[..., :-1], (1, 0)).unsqueeze(-1)
    return (local + product * before).reshape(*value.shape[:-2], chunks * CHUNK)[..., :n]


def _scan_columns(ratio: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of each row, column by column, and the running product of the ratios."""
    ys, products = [value[..., 0]], [ratio[..., 0]]
    for j in range(1, value.shape[-1]):
        ys.append(value[..., j] + ratio[..., j] * ys[-1])
        products.append(ratio[..., j] * products[-1])
    return torch.stack(ys, -1), torch.stack(products, -1)


class Ascending:
    """Rows x (..., n) in ascending order, of which the first m (..., 1) items count; a: (..., 1)."""

    def __init__(self, x: Tensor, a: Tensor, m: Tensor) -> None:
        self.x, self.a, self.m = x, a, m
        self.index = torch.arange(x.shape[-1], device=x.device)
        self.inside = self.index < m
        joined = self.inside[..., 1:]  # whether an item and the one before it both take part
        gap = torch.where(joined, (x[..., 1:] - x[..., :-1]) / a, 0)
        decay = torch.where(joined, (-gap).exp(), 0)
        edge = torch.zeros_like(x[..., :1])
        self.from_left, self.from_right = torch.cat([edge, decay], -1), torch.cat([decay, edge], -1)

    def left(self, v: Tensor) -> Tensor:
        """sum_{i <= m} v_i exp((x_i - x_m)/a) at each m."""
        return linear_scan(self.from_left, v)

    def right(self, v: Tensor) -> Tensor:
        """sum_{i >= m} v_i exp((x_m - x_i)/a) at each m."""
        return linear_scan(self.from_right.flip(-1), v.flip(-1)).flip(-1)

    def sums(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        one = self.inside.to(self.x.dtype)
        return self.right(one), self.left(one)

    def ranks(self) -> Tensor:
        a, b = self.sums()
        return self.index + 1 + (a - b) / 2

    def inverse(self, w: Tensor) -> Tensor:
        """G^-1(w) for w (..., any number) in (0, m)."""
        right, left = self.sums()
        at_items = self.index.to(self.x.dtype) + 0.5 + (right - left) / 2  # G(x_m), increasing
        known = torch.where(self.inside, at_items, torch.inf).detach().contiguous()
        place = torch.searchsorted(known, w.detach().expand(*known.shape[:-1], w.shape[-1]).contiguous(), right=True)
        last = (self.m - 1).clamp(min=0)
        low = torch.minimum((place - 1).clamp(min=0), last)  # the item below, by index
        high = torch.minimum(place, last)  # the item above

        def at(v: Tensor, i: Tensor) -> Tensor:
            return v.expand_as(self.x).gather(-1, i)

        s, t, b, a = at(self.x, low), at(self.x, high), at(left, low), at(right, high)
        before, after = place <= 0, place >= self.m
        middle = ~before & ~after
        # between two items: the difference of two exponentials is e = w - (number of items below)
        e = torch.where(middle, w - place, 0)
        gap = torch.where(middle, (t - s) / self.a, 0)
        b, a = torch.where(after | middle, b, 1), torch.where(before | middle, a, 1)
        lift = gap / 2 - (a * b).log() / 2
        large = lift > LARGE
        plain = torch.asinh(e * torch.where(large, 0, lift).exp())
        near = (s + t) / 2 + self.a * ((b / a).log() / 2 + plain)
        # far from one of the two, which then does not count; not by their middle, in which small distances are lost
        distance = (2 * torch.where(large & (e != 0), e.abs(), 0.5)).log()
        far = torch.where(e > 0, t + self.a * (distance - a.log()), s - self.a * (distance - b.log()))
        inner = torch.where(large & (e != 0), far, near)
        low_end = t + self.a * (2 * torch.where(before, w, 1) / a).log()
        high_end = s - self.a * (2 * torch.where(after, self.m - w, 1) / b).log()
        return torch.where(before, low_end, torch.where(after, high_end, inner))

    def values(self) -> Tensor:
        """The soft sort: y_m = G^-1(m - 1/2)."""
        w = torch.where(self.inside, self.index.to(self.x.dtype) + 0.5, 0.5)  # not float32, which int64 + 0.5 is
        return self.inverse(w)


@opaque("mixing_lapsum(Tensor x, Tensor m, float target) -> Tensor", lambda *args: one_a_row(*args))
def mixing_lapsum(x: Tensor, m: Tensor, target: float) -> Tensor:
    """The scale at which the weights exp(-|x_i - x_j|/a) around an item spread over ``target`` items, on average."""
    batch, (x, m) = as_rows(x, m)
    if x.numel() == 0:
        return x.new_ones(*batch, 1)
    inside = torch.arange(x.shape[-1], device=x.device) < m
    count = m.clamp(min=1)

    def measure(a: Tensor) -> tuple[Tensor, Tensor]:
        one, two = (sum(Ascending(x, s, m).sums()) - inside.to(x.dtype) for s in (a, a / 2))
        mix = torch.where(inside, one.square() / two.clamp(min=1e-300), 0).sum(-1, keepdim=True) / count
        return mix, mix * 1e3  # settles within a thousandth of an item

    spread = (x.gather(-1, (m - 1).clamp(min=0)) - x[:, :1]) / count
    scale = torch.where(spread > 0, spread, 1)
    goal = torch.minimum(torch.full_like(scale, target), 0.99 * count.to(x.dtype))
    return search_from(measure, scale, goal).reshape(*batch, 1)


class LapSum:
    """Ranks and sorts by the Laplace law, with the interface of ``polytopes.permutahedron.Sorted``.

    theta and w do not increase; absent items come last. The ranks are those of theta, the sorted values those of w.
    Infinite entries keep their hard ranks and values.
    """

    def __init__(self, theta: Tensor, w: Tensor, present: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.theta, self.w = torch.broadcast_tensors(theta, w)
        self.present = torch.ones_like(self.theta, dtype=torch.bool) if present is None else present

    @staticmethod
    def fused(rows: Rows, ranks: bool, descending: bool, reg: Regularizer, plain: Any) -> Tensor | None:
        if isinstance(reg.eps, Mixing):
            return None
        return order("lapsum", rows, ranks, descending, reg, plain)

    def _ascending(self, x: Tensor, a: Tensor | None = None) -> tuple[Ascending, Tensor, Tensor]:
        """The finite items of x in ascending order, where each item finds its answer there, and which are finite."""
        finite = self.present & x.isfinite()
        m = finite.sum(-1, keepdim=True)
        end = (self.present & (x == torch.inf)).sum(-1, keepdim=True) + m  # one past the last finite item
        index = (end - 1 - torch.arange(x.shape[-1], device=x.device)).clamp(0, x.shape[-1] - 1)
        # the same map takes the items to ascending order, counted from the last finite one, and back
        ascending = torch.where(finite, x, 0).gather(-1, index)
        return Ascending(ascending, torch.ones_like(ascending[..., :1]) if a is None else a, m), index, finite

    def _strength(self, x: Tensor, rows: Rows, reg: Regularizer) -> Tensor:
        if not isinstance(reg.eps, Mixing):
            return rows.parameter(reg.eps, "eps")
        ordered = self._ascending(x.detach())[0]
        return mixing_lapsum(ordered.x, ordered.m, reg.eps.inputs)

    def solve_strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._strength(self.w, rows, reg)

    def argmax_strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._strength(self.theta, rows, reg)

    def solve(self, rows: Rows, reg: Regularizer) -> Tensor:
        """The sorted values of w, largest first."""
        ordered, index, finite = self._ascending(self.w, self.solve_strength(rows, reg))
        return torch.where(finite, ordered.values().gather(-1, index), torch.where(self.present, self.w.detach(), 0))

    def argmax(self, rows: Rows, reg: Regularizer) -> Tensor:
        """The ranks of theta."""
        ordered, index, finite = self._ascending(self.theta, self.argmax_strength(rows, reg))
        below = (self.present & (self.theta == -torch.inf)).sum(-1, keepdim=True)
        m = self.present.sum(-1, keepdim=True)
        above = m - below - ordered.m
        extreme = torch.where(self.theta > 0, m - (above - 1) / 2, (below + 1) / 2)
        ranks = torch.where(finite, below + ordered.ranks().gather(-1, index), extreme)
        return torch.where(self.present, ranks, 0)
