"""The permutahedron (an order) and the monotone cone, both solved by pooling adjacent violators."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._axes import Rows, check_tensor, concrete, row_sum
from .._regularizer import Mixing, Regularizer
from ..kernels.torch import LOGSUMEXP, MEAN
from ._dual import ABSENT, FINITE, Blocks
from ._fused import order
from ._mixing import mixing_pool
from .base import Polytope


class Sorted:
    """Rows theta and w sorted so that neither increases: where ranks and sorts meet the pooling.

    Infinite entries are ordinary extremes: equal ones are pooled among themselves, never with finite items, and carry
    no gradient. ``present`` (..., n), sorted the same way with absent items last, marks what takes part.
    """

    def __init__(self, theta: Tensor, w: Tensor, present: Tensor | None = None, weights: Tensor | None = None) -> None:
        theta, w = torch.broadcast_tensors(theta, w)
        finite_theta, finite_w = theta.isfinite(), w.isfinite()
        self.infinite_w, self.w_given = ~finite_w, w.detach()
        self.infinite_theta, self.theta_given = ~finite_theta, theta.detach()
        self.group = FINITE - _sign_of_infinity(theta) - 3 * _sign_of_infinity(w)
        self.present = present
        if present is not None:
            self.group = torch.where(present, self.group, ABSENT)
            finite_theta, finite_w = finite_theta & present, finite_w & present
        self.theta, self.w = torch.where(finite_theta, theta, 0), torch.where(finite_w, w, 0)
        self.weights = weights

    fused = staticmethod(partial(order, "order"))

    def strength(self, rows: Rows, reg: Regularizer, w: Tensor) -> Tensor:
        if not isinstance(reg.eps, Mixing):
            return rows.parameter(reg.eps, "eps")
        weights = torch.ones_like(self.theta) if self.weights is None else self.weights
        detached = [t.detach() for t in (self.theta, w, weights, self.group)]
        return mixing_pool(*detached, reg.pool_rule, reg.eps.inputs)

    def solve_strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self.strength(rows, reg, self.w)

    def argmax_strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self.strength(rows, reg, self.pooled_w(reg))

    def _blocks(self, rows: Rows, reg: Regularizer, w: Tensor) -> tuple[Blocks, Tensor]:
        eps = self.strength(rows, reg, w)
        return Blocks(self.theta, w, eps, reg.pool_rule, self.group, self.weights), eps

    def _finish(self, y: Tensor) -> Tensor:
        y = torch.where(self.infinite_w, self.w_given, y)
        return y if self.present is None else torch.where(self.present, y, 0)

    def solve(self, rows: Rows, reg: Regularizer) -> Tensor:
        """argmax over the permutahedron of w as ``reg`` pools it: log y, from w standing for log w, for Entropy."""
        blocks, eps = self._blocks(rows, reg, self.w)
        return self._finish(blocks.argmax(self.theta, self.w, eps))

    def argmax(self, rows: Rows, reg: Regularizer) -> Tensor:
        """argmax over the permutahedron of w."""
        w = self.pooled_w(reg)
        blocks, eps = self._blocks(rows, reg, w)
        return self._finish(reg.from_pool(blocks.argmax(self.theta, w, eps)))

    def pooled_w(self, reg: Regularizer) -> Tensor:
        """w as the pooling takes it, 1 in place of absent items so that it has a logarithm."""
        return reg.to_pool(self.w if self.present is None else torch.where(self.present, self.w, 1))

    def max(self, rows: Rows, reg: Regularizer) -> Tensor:
        w = self.pooled_w(reg)
        blocks, eps = self._blocks(rows, reg, w)
        share = blocks.max(self.theta, w, eps)
        share = torch.where(self.infinite_theta, self.theta_given * self.w, share)
        return row_sum(share)

    def ties(self, v: Tensor) -> Tensor:
        """The weighted mean of v over each run of equal theta: how hard ranks treat ties."""
        changes = (self.theta[..., 1:] != self.theta[..., :-1]) | (self.group[..., 1:] != self.group[..., :-1])
        opens = torch.cat([torch.ones_like(self.theta[..., :1], dtype=torch.bool), changes], -1)
        return self._finish(Blocks.given(opens, self.weights).centre(v)[1])


def _sign_of_infinity(v: Tensor) -> Tensor:
    """1 for inf, -1 for -inf, 0 for finite entries, as int8."""
    return (v == torch.inf).to(torch.int8) - (v == -torch.inf).to(torch.int8)


@dataclass(frozen=True, eq=False)
class Permutahedron(Polytope):
    """The convex hull of the permutations of w: the choice of an order.

    Args:
        w: (n,) or broadcastable to theta (..., n), with gradient; positive for Entropy.

    With rho = (1..n), argmax is the soft rank of theta. One sort, then pooling: O(n log n) time, O(n) memory.
    Source: Blondel, Teboul, Berthet, Djolonga 2020, "Fast differentiable sorting and ranking".

    Example:
        >>> so.Permutahedron(torch.arange(1.0, 4.0)).argmax(torch.tensor([2.9, 0.1, 1.2]), so.Quadratic(2.0))
        tensor([2.7500, 1.3500, 1.9000])
    """

    w: Tensor

    role = "permutahedron"

    def __post_init__(self) -> None:
        if check_tensor(self.w, "w").ndim == 0:
            raise ValueError("w must have at least one dimension: the values whose permutations are the vertices")

    def _values(self, rows: Rows) -> Tensor:
        if self.w.shape[-1] != rows.n:
            raise ValueError(f"theta has {rows.n} entries along its last dimension, but w has {self.w.shape[-1]}")
        w = rows.like(check_tensor(self.w, "w"), "w")
        return w.gather(-1, w.detach().argsort(dim=-1, descending=True, stable=True))

    def _sorted(self, rows: Rows) -> tuple[Sorted, Tensor]:
        order = rows.x.detach().argsort(dim=-1, descending=True, stable=True)
        return Sorted(rows.x.gather(-1, order), self._values(rows)), order

    def _hard(self, rows: Rows) -> Tensor:
        order = rows.x.detach().argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(rows.x).scatter(-1, order, self._values(rows).expand_as(order))

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        ordered, order = self._sorted(rows)
        return torch.zeros_like(rows.x).scatter(-1, order, ordered.argmax(rows, reg))

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._sorted(rows)[0].max(rows, reg)

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._sorted(rows)[0].argmax_strength(rows, reg)

    def check(self, reg: Regularizer) -> Regularizer:
        reg = super().check(reg)
        if reg.pool_rule == LOGSUMEXP and concrete(self.w) and not bool((self.w > 0).all()):
            raise ValueError(f"Entropy on Permutahedron needs w > 0, got a minimum of {self.w.min().item()}; shift w")
        return reg

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        rows = Rows(y)
        w = self._values(rows)
        slack = (w - rows.x.sort(-1, descending=True).values).cumsum(-1)
        scale = tol * max(1, rows.n) * w.abs().amax(-1).clamp(min=1)
        return (slack >= -scale.unsqueeze(-1)).all(-1) & (slack[..., -1].abs() <= scale)

    def vertices(self, n: int | None = None) -> Tensor:
        if self.w.ndim != 1:
            raise ValueError(f"vertices needs a single w of shape (n,), got {tuple(self.w.shape)}")
        rows = sorted(set(itertools.permutations(self.w.tolist())))
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), self.w.shape[0])

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        return family.omega(self._values(rows), shape).sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class OrderPolytope(Polytope):
    """The monotone cone {y : y_1 <= ... <= y_n} (>= if ``decreasing``): isotonic regression.

    argmax with Quadratic(eps) is the projection of theta/eps, O(n). The cone is unbounded: ``maximize`` gives its apex
    0 where the maximum is finite, else raises ValueError. Infinities in theta give NaN in that row.
    Source: Best, Chakravarti 1990, "Active set algorithms for isotonic regression".

    Example:
        >>> so.OrderPolytope().argmax(torch.tensor([1.0, 3.0, 2.0]), so.Quadratic(1.0))
        tensor([1.0000, 2.5000, 2.5000])
    """

    decreasing: bool = False

    role = "order"
    default_eps = 1.0
    bounded = False

    def project(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """argmin over the cone of sum weights (y - x)^2 for rows x (..., n)."""
        flip = (lambda v: v) if self.decreasing else (lambda v: v.flip(-1))
        v = flip(torch.where(x.isfinite().all(-1, keepdim=True), x, torch.nan))
        group = torch.full_like(v, FINITE, dtype=torch.int8)
        one = torch.ones_like(v[..., :1])
        blocks = Blocks(v, torch.zeros_like(v), one, MEAN, group, None if weights is None else flip(weights))
        return flip(blocks.centre(v)[1])

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        if isinstance(reg.eps, Mixing):
            raise ValueError(
                "Mixing has no meaning on the monotone cone, where eps only scales the answer; give a number"
            )
        return rows.parameter(reg.eps, "eps")

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self.project(rows.x) / self.strength(rows, reg)

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        # max <theta, y> - eps |y|^2 / 2 over a cone is |projection|^2 / 2 eps, whose gradient is y by Danskin
        return row_sum(self.project(rows.x).square()) / (2 * self.strength(rows, reg))

    def _hard(self, rows: Rows) -> Tensor:
        tails = rows.x.flip(-1).cumsum(-1) if not self.decreasing else rows.x.cumsum(-1)
        scale = 1e-9 * (1 + rows.x.abs().sum(-1))
        bounded = (tails <= scale.unsqueeze(-1)).all(-1) & (tails[..., -1:].abs().squeeze(-1) <= scale)
        if concrete(rows.x) and not bool(bounded.all()):
            raise ValueError("a linear function is unbounded over the monotone cone; use Quadratic(eps)")
        return torch.zeros_like(rows.x)

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        steps = y.diff(dim=-1)
        return ((-steps if self.decreasing else steps) >= -tol).all(-1)

    def vertices(self, n: int | None = None) -> Tensor:
        if n is None:
            raise ValueError("OrderPolytope does not know its dimension; call vertices(n)")
        return torch.zeros(1, n, dtype=torch.float64)

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        return torch.zeros_like(rows.x[..., :1])  # Omega = |y|^2 / 2: a cone has no vertex to shift to
