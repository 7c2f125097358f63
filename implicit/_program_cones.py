"""Cones K of a programme min x'Px/2 + q'x, s = b - Ax in K: membership, and complementarity as smooth equations.

At a solution s in K, y in K* and <s, y> = 0. Near it the last is as many smooth equations C(s, y) = 0 as s has
entries: the Jordan product s o y for the symmetric cones (nonsingular at strict complementarity: Alizadeh, Haeberly,
Overton 1998), and for the others "s on the surface, y along its normal", or whichever face the two lie on.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def outside(*parts: Tensor) -> Tensor:
    """The largest part, 0 if none is positive: (..., k) each -> (...)."""
    return torch.stack([p.amax(-1) if p.shape[-1] else p.new_zeros(p.shape[:-1]) for p in parts]).amax(0).clamp(min=0)


class Zero:
    """s = 0."""

    def __init__(self, size: int) -> None:
        self.size = size

    def case(self, s: Tensor, y: Tensor) -> Tensor | None:
        return None

    def complement(self, s: Tensor, y: Tensor, case: Tensor | None) -> Tensor:
        return s

    def slopes(self, s: Tensor, y: Tensor, case: Tensor | None) -> tuple[Tensor, Tensor]:
        """dC/ds and dC/dy as the blocks on their diagonals, (..., blocks, d, d)."""
        return torch.ones_like(s)[..., None, None], torch.zeros_like(s)[..., None, None]

    def primal_violation(self, s: Tensor) -> Tensor:
        return outside(s.abs())

    def dual_violation(self, y: Tensor) -> Tensor:
        return y.new_zeros(y.shape[:-1])


class NonNeg(Zero):
    """s >= 0."""

    def complement(self, s: Tensor, y: Tensor, case: Tensor | None) -> Tensor:
        return s * y

    def slopes(self, s: Tensor, y: Tensor, case: Tensor | None) -> tuple[Tensor, Tensor]:
        return y[..., None, None], s[..., None, None]

    def primal_violation(self, s: Tensor) -> Tensor:
        return outside(-s)

    def dual_violation(self, y: Tensor) -> Tensor:
        return self.primal_violation(y)


class SecondOrder(NonNeg):
    """s_0 >= |s_1|, ``count`` of them, one after the other."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim * count)
        self.dim, self.count = dim, count

    def split(self, v: Tensor) -> Tensor:
        return v.reshape(*v.shape[:-1], self.count, self.dim)

    def complement(self, s: Tensor, y: Tensor, case: Tensor | None) -> Tensor:
        s, y = self.split(s), self.split(y)
        head = (s * y).sum(-1, keepdim=True)
        tail = s[..., :1] * y[..., 1:] + y[..., :1] * s[..., 1:]
        return torch.cat([head, tail], -1).flatten(-2)

    def _arrow(self, v: Tensor) -> Tensor:
        v = self.split(v)
        arrow = v[..., :1, None] * torch.eye(self.dim, dtype=v.dtype)
        arrow[..., 0, :] = v
        arrow[..., :, 0] = v
        return arrow

    def slopes(self, s: Tensor, y: Tensor, case: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._arrow(y), self._arrow(s)

    def primal_violation(self, s: Tensor) -> Tensor:
        s = self.split(s)
        return outside(s[..., 1:].norm(dim=-1) - s[..., 0])


class Semidefinite(NonNeg):
    """A positive semidefinite matrix as the triangle ``pairs`` of its entries, those off the diagonal times sqrt 2."""

    def __init__(self, n: int, pairs: list[tuple[int, int]]) -> None:
        super().__init__(len(pairs))
        self.n = n
        self.rows, self.cols = (torch.tensor(list(side), dtype=torch.long) for side in zip(*pairs, strict=True))
        at = torch.empty(n, n, dtype=torch.long)
        at[self.rows, self.cols] = at[self.cols, self.rows] = torch.arange(len(pairs))
        self.at = at.flatten()
        self.root = torch.where(self.rows == self.cols, 1.0, torch.tensor(2.0, dtype=torch.float64).sqrt())

    def matrix(self, v: Tensor) -> Tensor:
        return (v / self.root).index_select(-1, self.at).unflatten(-1, (self.n, self.n))

    def vector(self, m: Tensor) -> Tensor:
        return m[..., self.rows, self.cols] * self.root

    def complement(self, s: Tensor, y: Tensor, case: Tensor | None) -> Tensor:
        product = self.matrix(s) @ self.matrix(y)
        return self.vector((product + product.mT) / 2)

    def slopes(self, s: Tensor, y: Tensor, case: Tensor | None) -> tuple[Tensor, Tensor]:
        units = torch.eye(self.size, dtype=s.dtype)
        return tuple(self.complement(units, v.unsqueeze(-2), None).mT.unsqueeze(-3) for v in (y, s))  # type: ignore[return-value]

    def primal_violation(self, s: Tensor) -> Tensor:
        return outside(-torch.linalg.eigvalsh(self.matrix(s))[..., :1])


class Triples(Zero, ABC):
    """Cones in three dimensions, one after the other, by the face on which s and y lie.

    The choices are: y = 0; s = 0; both on the curved surfaces; and the flat faces named by ``faces``, each the three
    coordinates (0..2 of s, 3..5 of y) that vanish there. ``case`` is the choice with the smallest residual.
    """

    faces: tuple[tuple[int, int, int], ...] = ()

    def split(self, v: Tensor) -> Tensor:
        return v.reshape(*v.shape[:-1], -1, 3)

    @abstractmethod
    def surface(self, s: Tensor, y: Tensor) -> Tensor:
        """Three equations that hold where both lie on the curved surfaces."""

    @abstractmethod
    def surface_slopes(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Their derivatives in s and in y."""

    @abstractmethod
    def curved(self, s: Tensor) -> Tensor:
        """Whether the surface is smooth near s."""

    def _flat(self, v: Tensor, side: int) -> list[Tensor]:
        """What the choices other than the surface ask to vanish, as maps (3, 3) of s (side 0) or of y (side 1)."""
        maps = [((3, 4, 5)), ((0, 1, 2)), *self.faces]
        out = []
        for rows in maps:
            m = torch.zeros(3, 3, dtype=v.dtype)
            for i, r in enumerate(rows):
                if r // 3 == side:
                    m[i, r % 3] = 1.0
            out.append(m)
        return out

    def case(self, s: Tensor, y: Tensor) -> Tensor | None:
        s, y = self.split(s), self.split(y)
        # each choice in units of s and y, so that their sizes compare
        s_hat = s / s.abs().amax(-1, keepdim=True).clamp(min=1e-300)
        y_hat = y / y.abs().amax(-1, keepdim=True).clamp(min=1e-300)
        scale_s, scale_y = 1 + s.abs().amax(-1, keepdim=True), 1 + y.abs().amax(-1, keepdim=True)
        flat = [
            (s / scale_s @ a.T + y / scale_y @ b.T).abs().amax(-1)
            for a, b in zip(self._flat(s, 0), self._flat(s, 1), strict=True)
        ]
        smooth = self.curved(s)
        safe = torch.where(smooth.unsqueeze(-1), s_hat, torch.ones_like(s))
        surface = torch.where(smooth, self.surface(safe, y_hat).abs().amax(-1), torch.inf)
        return torch.stack([surface, *flat]).argmin(0)

    def complement(self, s: Tensor, y: Tensor, case: Tensor | None) -> Tensor:
        assert case is not None
        s, y = self.split(s), self.split(y)
        on = (case == 0).unsqueeze(-1)
        out = torch.where(on, self.surface(torch.where(on, s, 1.0), y), 0.0)
        for k, (a, b) in enumerate(zip(self._flat(s, 0), self._flat(s, 1), strict=True), 1):
            out = torch.where((case == k).unsqueeze(-1), s @ a.T + y @ b.T, out)
        return out.flatten(-2)

    def slopes(self, s: Tensor, y: Tensor, case: Tensor | None) -> tuple[Tensor, Tensor]:
        assert case is not None
        s, y = self.split(s), self.split(y)
        on = (case == 0).unsqueeze(-1)
        by_s, by_y = self.surface_slopes(torch.where(on, s, 1.0), y)
        for k, (a, b) in enumerate(zip(self._flat(s, 0), self._flat(s, 1), strict=True), 1):
            here = (case == k)[..., None, None]
            by_s, by_y = torch.where(here, a, by_s), torch.where(here, b, by_y)
        return by_s, by_y


class Exponential(Triples):
    """s_1 exp(s_0 / s_1) <= s_2, s_1 > 0, and its closure {s_0 <= 0, s_1 = 0, s_2 >= 0}."""

    faces = ((1, 3, 5),)

    def curved(self, s: Tensor) -> Tensor:
        return (s[..., 1] > 0) & (s[..., 2] > 0)

    def surface(self, s: Tensor, y: Tensor) -> Tensor:
        log = s[..., 2].log() - s[..., 1].log()
        return torch.stack(
            [
                s[..., 0] - s[..., 1] * log,
                y[..., 1] - y[..., 0] * (1 - log),
                y[..., 2] * s[..., 2] + y[..., 0] * s[..., 1],
            ],
            -1,
        )

    def surface_slopes(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        (_, b, c), (u, _, w) = s.unbind(-1), y.unbind(-1)
        log, one, zero = c.log() - b.log(), torch.ones_like(b), torch.zeros_like(b)
        by_s = [[one, 1 - log, -b / c], [zero, -u / b, u / c], [zero, u, w]]
        by_y = [[zero, zero, zero], [log - 1, one, zero], [b, zero, c]]
        return stacked(by_s), stacked(by_y)

    def primal_violation(self, s: Tensor) -> Tensor:
        a, b, c = self.split(s).unbind(-1)
        safe_b, safe_c = b.clamp(min=1e-300), c.clamp(min=1e-300)
        by_log = torch.where((b > 0) & (c > 0), a - b * (safe_c.log() - safe_b.log()), torch.inf)
        by_exp = torch.where(b > 0, safe_b * (a / safe_b).clamp(max=700).exp() - c, torch.inf)
        flat = torch.stack([a, b.abs(), -c]).amax(0)
        return outside(torch.minimum(torch.minimum(by_log, by_exp), flat))

    def dual_violation(self, y: Tensor) -> Tensor:
        # K* = {u < 0, -u exp(v/u - 1) <= w}, closed by {u = 0, v >= 0, w >= 0}: (u, v, w) in K* iff (u - v, -u, w) in K
        u, v, w = self.split(y).unbind(-1)
        return self.primal_violation(torch.stack([u - v, -u, w], -1).flatten(-2))


class Power(Triples):
    """s_0^a s_1^(1-a) >= |s_2|, s_0, s_1 >= 0, one exponent a for each."""

    faces = ((0, 2, 4), (1, 2, 3))

    def __init__(self, exponents: list[float]) -> None:
        super().__init__(3 * len(exponents))
        self.a = torch.tensor(exponents, dtype=torch.float64)

    def curved(self, s: Tensor) -> Tensor:
        return (s[..., 0] > 0) & (s[..., 1] > 0) & (s[..., 2] != 0)

    def surface(self, s: Tensor, y: Tensor) -> Tensor:
        a, (s0, s1, s2), (u, v, w) = self.a, s.unbind(-1), y.unbind(-1)
        level = s0.pow(a) * s1.pow(1 - a) - s2 * s2.detach().sign()
        return torch.stack([level, u * s0 * (1 - a) - v * s1 * a, u * s0 + a * w * s2], -1)

    def surface_slopes(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, (s0, s1, s2), (u, v, w) = self.a, s.unbind(-1), y.unbind(-1)
        level, zero = s0.pow(a) * s1.pow(1 - a), torch.zeros_like(s0)
        by_s = [[a * level / s0, (1 - a) * level / s1, -s2.sign()], [u * (1 - a), -v * a, zero], [u, zero, a * w]]
        by_y = [[zero, zero, zero], [s0 * (1 - a), -s1 * a, zero], [s0, zero, a * s2]]
        return stacked(by_s), stacked(by_y)

    def _violation(self, s0: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
        level = s0.clamp(min=0).pow(self.a) * s1.clamp(min=0).pow(1 - self.a)
        return outside(s2.abs() - level, -s0, -s1)

    def primal_violation(self, s: Tensor) -> Tensor:
        return self._violation(*self.split(s).unbind(-1))

    def dual_violation(self, y: Tensor) -> Tensor:
        u, v, w = self.split(y).unbind(-1)
        return self._violation(u / self.a, v / (1 - self.a), w)


def stacked(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@dataclass(frozen=True, eq=False)
class Cones:
    """The product of cones in the order of the rows of A, with the slice of the rows of each."""

    parts: tuple[tuple[Any, slice], ...]
    size: int
    tolerance: float  # what a solver reaches
    polyhedral: bool

    @classmethod
    def of(cls, dims: Any, pairs: Any) -> Cones:
        """From cvxpy's sizes; ``pairs(n)`` is the order in which a solver lists the triangle of an n x n matrix."""
        cones: list[Any] = [Zero(dims.zero), NonNeg(dims.nonneg)]
        cones += [SecondOrder(dim, len(list(run))) for dim, run in itertools.groupby(dims.soc)]
        cones += [Semidefinite(n, pairs(n)) for n in dims.psd]
        cones += [Exponential(3 * dims.exp)] if dims.exp else []
        cones += [Power(list(dims.p3d))] if dims.p3d else []
        ends = list(itertools.accumulate((c.size for c in cones), initial=0))
        parts = tuple((c, slice(i, j)) for c, i, j in zip(cones, ends, ends[1:], strict=False) if c.size)
        curved = bool(dims.exp or dims.p3d)
        return cls(parts, ends[-1], 1e-6 if curved else 1e-8, not (curved or dims.soc or dims.psd))

    def cases(self, s: Tensor, y: Tensor) -> list[Tensor | None]:
        return [cone.case(s[..., at], y[..., at]) for cone, at in self.parts]

    def complement(self, s: Tensor, y: Tensor, cases: list[Tensor | None]) -> Tensor:
        parts = [c.complement(s[..., at], y[..., at], case) for (c, at), case in zip(self.parts, cases, strict=True)]
        return torch.cat(parts, -1) if parts else s

    def slopes(self, s: Tensor, y: Tensor, cases: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """dC/ds and dC/dy as blocks, for each cone."""
        pairs = zip(self.parts, cases, strict=True)
        return [cone.slopes(s[..., at], y[..., at], case) for (cone, at), case in pairs]

    def full(self) -> list[tuple[Tensor, Tensor]]:
        """Ones where the blocks of ``slopes`` may be other than zero."""
        ones = torch.ones(1, self.size, dtype=torch.float64)
        found = self.slopes(ones, ones, [torch.zeros(1, c.size // 3) for c, _ in self.parts])
        return [
            (torch.ones_like(u), torch.zeros_like(v) if type(cone) is Zero else torch.ones_like(v))
            for (u, v), (cone, _) in zip(found, self.parts, strict=True)
        ]

    def primal_violation(self, s: Tensor) -> Tensor:
        return outside(*(c.primal_violation(s[..., at]).unsqueeze(-1) for c, at in self.parts), 0 * s[..., :1])

    def dual_violation(self, y: Tensor) -> Tensor:
        return outside(*(c.dual_violation(y[..., at]).unsqueeze(-1) for c, at in self.parts), 0 * y[..., :1])
