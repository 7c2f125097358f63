"""Soft orders of the finite items of a row, set into the order of all: infinities at the ends, absent items last."""

from __future__ import annotations

import torch
from torch import Tensor

from .._axes import Rows, concrete, lazy
from ..relaxations import Relaxation
from ..stochastic import Perturbed


class Placed:
    """The sort of rows by a :class:`Relaxation`, or with noise on the positions: values (..., n), matrix (..., n, n).

    -inf come first and +inf after the finite items, or the other way round if ``descending``; equal infinities share
    their positions. Absent items are last, and 0.
    """

    def __init__(self, rows: Rows, descending: bool) -> None:
        self.rows, self.descending = rows, descending
        x, present = rows.x, rows.present
        self.finite = x.isfinite() if present is None else x.isfinite() & present
        self.all_finite = concrete(x) and bool(self.finite.all())
        self.index = torch.arange(rows.n, device=x.device)

    def _end(self, infinity: float) -> Tensor:
        """Which items are ``infinity``, and present."""
        found = self.rows.x == infinity
        return found if self.rows.present is None else found & self.rows.present

    @lazy
    def _place(self) -> tuple[Tensor, Tensor, Tensor]:
        """The ascending position of each output, counted from the first finite one; the finite items, and all."""
        low, high = (self._end(e).sum(-1, keepdim=True) for e in (-torch.inf, torch.inf))
        m = self.finite.sum(-1, keepdim=True)
        count = m + low + high
        place = torch.where(self.index < count, count - 1 - self.index, self.index) if self.descending else self.index
        return place - low, m, count

    @lazy
    def _order(self) -> Tensor:
        """The permutation that puts the finite items first, otherwise as they come."""
        return (~self.finite).to(torch.int8).argsort(dim=-1, stable=True)

    def _items(self) -> tuple[Tensor, Tensor | None]:
        """The finite items first, and their number; None for all."""
        if self.all_finite:
            return self.rows.x, None
        return torch.where(self.finite, self.rows.x, 0).gather(-1, self._order), self._place[1]

    def values(self, r: Relaxation) -> Tensor:
        x, m = self._items()
        return self._spread(r.values(x, self.rows.parameter(r.eps, "eps"), m))

    def _spread(self, y: Tensor) -> Tensor:
        """y, the finite values in ascending order, at their places."""
        if self.all_finite:
            return y.flip(-1) if self.descending else y
        place, m, count = self._place
        inside = (place >= 0) & (place < m)
        y = torch.where(inside, y.gather(-1, place.clamp(0, max(self.rows.n - 1, 0)).expand_as(y)), 0)
        end = torch.where(place < 0, -torch.inf, torch.inf)
        return torch.where(inside | (self.index >= count), y, end)

    def matrix(self, r: Relaxation) -> Tensor:
        x, m = self._items()
        p = r.matrix(x, self.rows.parameter(r.eps, "eps"), m)
        if self.all_finite:
            return p.flip(-2) if self.descending else p
        place, m, count = (t.unsqueeze(-1) for t in self._place)
        column = torch.zeros_like(self._order).scatter(-1, self._order, self.index.expand_as(self._order))
        p = p.gather(-1, column.unsqueeze(-2).expand_as(p))
        p = p.gather(-2, place.clamp(0, max(self.rows.n - 1, 0)).expand_as(p))
        inside = (place >= 0) & (place < m)
        ends = ((place < 0, -torch.inf), ((place >= m) & (self.index.unsqueeze(-1) < count), torch.inf))
        p = torch.where(inside & self.finite.unsqueeze(-2), p, 0)
        for at_end, infinity in ends:
            share = self._end(infinity).to(p)
            share = (share / share.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-2)
            p = torch.where(at_end, share, p)
        return p

    def mean_values(self, p: Perturbed) -> Tensor:
        """E of the sorted values, arranged as positions with noise rank them: theta = (1, ..., m)."""
        x, m = self._items()
        known = x.detach() if m is None else torch.where(self.index < m, x.detach(), torch.inf)
        s = x.gather(-1, known.argsort(dim=-1, stable=True))
        theta = (self.index + 1).to(s).expand_as(s)
        if m is not None:
            theta = torch.where(self.index < m, theta, torch.inf)  # stays behind: no noise moves it

        def arranged(v: Tensor) -> Tensor:
            return s.expand_as(v).gather(-1, v.argsort(dim=-1, stable=True).argsort(dim=-1))

        return self._spread(p.average(theta, arranged, self.rows.parameter(p.eps, "eps")))
