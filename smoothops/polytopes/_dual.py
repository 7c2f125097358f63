"""The heart of the library: threshold search, pooling, and the derivative that they share.

For a separable Omega, each soft operator is one or many copies of the same problem: find tau with

    sum_i phi(u_i - tau) = k,    u = theta/eps,    y_i = phi(u_i - tau),

over a whole row (simplex, capped simplex) or over each block of pooled neighbours (permutahedron, monotone cone).

1. Structure: tau or the blocks, found without gradient by an opaque operator that torch.compile and vmap can carry.
2. Value: y recomputed from theta and that structure in plain torch operations, which give every derivative:
   tau <- tau + (r - stop(r))/S with r = sum phi(u - tau) and S = sum phi'(u - tau). The step is 0 in value, and its
   derivative is the implicit function theorem's d tau = (<d, du> - dk)/S, hence dy = (diag d - d d'/S) du. One such
   Newton step is exact to first order, two to third (to any order where phi'' = 0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from .._axes import row_sum, spread, wide_dtype
from .._opaque import as_rows, batch_shape, one_a_row, opaque
from .._regularizer import FAMILIES, Regularizer
from ..kernels.torch import FAR, LOGSUMEXP, MEAN, SLOPE_FLOOR

FINITE, ABSENT = 4, 15  # the groups of ordinary and of absent items; 0..8 are infinities of theta and w


# --- threshold -------------------------------------------------------------------------------------------------------


@opaque(
    "threshold(Tensor x, Tensor active, Tensor eps, Tensor k, Tensor shape, str family, bool clip) -> (Tensor, Tensor)",
    lambda *args: (one_a_row(*args), one_a_row(*args)),
)
def _threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, shape: Tensor, family: str, clip: bool
) -> tuple[Tensor, Tensor]:
    reg = FAMILIES[family]
    if x.numel() == 0:
        empty = one_a_row(x, active, eps, k, shape).zero_()
        return empty, empty.clone()
    uniform = k.numel() == 1
    batch, (x, active, eps, shape, k_rows) = as_rows(x, active, eps, shape, k)
    cap = reg.cap(shape) if clip and not reg.bounded else None
    ref, tau = kernels.threshold(x, active, eps, k.reshape(1, 1) if uniform else k_rows, shape, reg, cap, clip)
    return ref.reshape(*batch, 1).clone(), tau.reshape(*batch, 1).clone()


def clipped(reg: type[Regularizer], f: Callable, z: Tensor, shape: Tensor, above: Tensor | float) -> Tensor:
    """``f(z)`` below the upper bound y = 1, and ``above`` from there on."""
    if reg.bounded:
        return f(z, shape)
    inside = z < reg.cap(shape)
    return torch.where(inside, f(torch.where(inside, z, reg.cap(shape)), shape), above)


class Dual:
    """The solved dual of rows u (..., n): tau (..., 1) with sum_i phi(u_i - tau) = k, and what follows from it.

    ``shape`` is the parameter of phi, (..., 1); ``clip`` bounds phi by 1.
    """

    def __init__(self, family: type[Regularizer], shape: Tensor, clip: bool, tau: Tensor, n: int) -> None:
        self.family, self.clip, self.tau = family, clip, tau
        self.shape, self.wide_shape = shape, spread(shape, n)

    def _apply(self, f: Callable, z: Tensor, above: Tensor | float) -> Tensor:
        return clipped(self.family, f, z, self.wide_shape, above) if self.clip else f(z, self.wide_shape)

    def phi(self, z: Tensor) -> Tensor:
        return self._apply(self.family.phi, z, 1.0)

    def dphi(self, z: Tensor) -> Tensor:
        return self._apply(self.family.dphi, z, 0.0)

    def differentiable_tau(self, u: Tensor, k: Tensor) -> Tensor:
        """tau with its derivatives in u, k and shape: Newton steps of value 0."""
        tau, level = self.tau, None
        for _ in range(self.family.newton_steps):
            z = u - spread(tau, u.shape[-1])
            total, slope = row_sum(self.phi(z)), row_sum(self.dphi(z))
            # the derivative of the residual sum phi - k, at value 0
            level = (total - k).detach() if level is None else level
            usable = slope > SLOPE_FLOOR
            tau = tau + torch.where(usable, (total - k - level) / torch.where(usable, slope, 1), 0)
        return tau

    def answer(self, u: Tensor, k: Tensor) -> Tensor:
        """phi(u - tau), with all derivatives in plain torch."""
        return self.phi(u - spread(self.differentiable_tau(u, k), u.shape[-1]))

    def cap(self) -> Tensor:
        """Where the bound takes hold, (..., 1); inf where phi has none or needs none."""
        cap = self.family.cap(self.shape) if self.clip and not self.family.bounded else torch.inf
        return torch.as_tensor(cap, dtype=self.tau.dtype).expand(self.tau.shape)

    def value(self, u: Tensor, k: Tensor) -> Tensor:
        """sum psi(u - tau) + k tau + k omega(1): by duality its derivative in u is phi(u - tau)."""
        tau, vertex = self.differentiable_tau(u, k), self.family.vertex(self.shape)
        z = u - spread(tau, u.shape[-1])
        # sum phi is k to rounding only, which a small slope would magnify: its part of the derivative is left out
        rest = (k - row_sum(self.phi(z))).detach()
        return row_sum(self._apply(self.family.psi, z, z - vertex)) + k * (tau + vertex) - rest * (tau - tau.detach())


class Threshold:
    """phi(x/eps - tau) with sum k, and its maximum, over rows that may hold infinities and absent items.

    x: (..., n); eps, shape, k: (..., 1); present: (..., n) or None. ``clip`` bounds y by 1. -inf has weight 0; +inf
    takes weight 1 each, or all of k in equal parts where there are more than k of them.
    """

    def __init__(
        self, family: type[Regularizer], x: Tensor, eps: Tensor, shape: Tensor, k: Tensor, present: Tensor | None,
        clip: bool,
    ) -> None:  # fmt: skip
        self.family, self.eps = family, eps
        top, finite = x == torch.inf, x.isfinite()
        if present is not None:
            top, finite = top & present, finite & present
        n_top = top.sum(-1, keepdim=True)
        crowded, wanted = (n_top > 0) & (n_top >= k), k > 0
        self.top = top & ~crowded
        active = torch.where(crowded, top, finite)
        k = torch.where(crowded, k, k - n_top)
        n_active = active.sum(-1, keepdim=True)
        full = k >= n_active
        self.forced = full | (k <= 0)  # no threshold: every active item has weight 1, or 0
        self.forced_y = (active & full).to(x.dtype)
        self.empty = (n_active == 0) & (n_top == 0)
        self.has_top = (n_top > 0) & wanted
        active = active | self.forced
        self.k = torch.where(self.forced, 0.5, k)
        x_active = torch.where(active & finite & ~crowded & ~self.forced, x, 0)
        self.raw = torch.where(self.forced & full & finite, x, 0)
        self.closed = family.closed_form and not clip
        if self.closed:
            self.ref = torch.where(active, x_active, -torch.inf).detach().amax(-1, keepdim=True)
            tau = self.ref  # not used
        else:
            detached = [t.detach() for t in (x_active, active, eps, self.k, shape)]
            self.ref, tau = _threshold(*detached, family.__name__, clip)
        self.u = torch.where(active, (x_active - self.ref) / spread(eps, x.shape[-1]), FAR)
        self.dual = Dual(family, shape, clip, tau, x.shape[-1])

    def slopes(self) -> Tensor:
        """d = phi'(u - tau), up to a factor the row of the Jacobian that belongs to tau."""
        d = self.family.simplex_argmax(self.u) if self.closed else self.dual.dphi(self.u - self.dual.tau)
        return torch.where(self.forced, 0, d)

    def argmax(self) -> Tensor:
        y = self.family.simplex_argmax(self.u) if self.closed else self.dual.answer(self.u, self.k)
        return torch.where(self.forced, self.forced_y, y) + self.top

    def max(self) -> Tensor:
        """The maximum in the unit of x; the derivative is y."""
        if self.closed:
            value = self.eps * self.family.simplex_max(self.u) + self.ref
        else:
            value = self.eps * self.dual.value(self.u, self.k) + self.k * self.ref
        value = torch.where(self.forced, row_sum(self.raw), value)
        value = torch.where(self.has_top, torch.inf, value)
        return torch.where(self.empty, -torch.inf, value)


# --- pooling ---------------------------------------------------------------------------------------------------------


@opaque(
    "pool(Tensor theta, Tensor w, Tensor weights, Tensor group, Tensor eps, int rule) -> Tensor",
    lambda theta, *args: theta.new_empty(*batch_shape(theta, *args), theta.shape[-1], dtype=torch.long),
)
def _pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    n = max(t.shape[-1] for t in (theta, w))
    batch, (*rows, eps) = as_rows(theta, w, weights, group, eps)
    theta, w, weights, group = (r.expand(batch.numel(), n) for r in rows)
    return kernels.pool(theta, w, weights, group, eps, rule).reshape(*batch, n)


class Blocks:
    """The blocks in which a row, sorted so that theta and w do not increase, is pooled.

    theta, w, weights, group: (..., n); eps: (..., 1); all of the same number of dims. Only neighbours of the same
    group are pooled. weights=None means 1 each.
    """

    def __init__(
        self, theta: Tensor, w: Tensor, eps: Tensor, rule: int, group: Tensor, weights: Tensor | None = None
    ) -> None:
        self.weights = weights
        ones = torch.ones_like(theta) if weights is None else weights
        given = [t.detach() for t in (theta, w, ones, group, eps)]
        self.start, self.rule = _pool(*given, rule), rule
        self.mass = self.sum(ones)

    @classmethod
    def given(cls, opens: Tensor, weights: Tensor | None = None) -> Blocks:
        """Blocks that begin where the bool tensor ``opens`` (..., n) is True."""
        blocks = cls.__new__(cls)
        index = torch.arange(opens.shape[-1], device=opens.device)
        ones = torch.ones(opens.shape, dtype=wide_dtype(opens.device), device=opens.device)
        blocks.weights = weights
        blocks.start, blocks.rule = torch.where(opens, index, 0).cummax(-1).values, MEAN
        blocks.mass = blocks.sum(ones if weights is None else weights)
        return blocks

    def sum(self, v: Tensor) -> Tensor:
        """The sum over each item's block, at each item."""
        v = v.expand(self.start.shape)
        return torch.zeros_like(v).scatter_add(-1, self.start, v).gather(-1, self.start)

    def _first(self, v: Tensor) -> Tensor:
        """The entry of each item's block that comes first, without gradient: what sums are taken relative to."""
        return v.detach().expand(self.start.shape).gather(-1, self.start)

    def centre(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(v - mean, mean) over each block, weighted; exact for a constant block."""
        shift = self._first(v)
        v = v - shift
        mean = self.sum(v if self.weights is None else self.weights * v) / self.mass
        return v - mean, shift + mean

    def normalize(self, v: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
        """(log softmax, eps log sum exp) of v/eps over each block, shifted by the largest entry of a sorted block."""
        shift = self._first(v)
        v = (v - shift) / eps
        lse = self.sum(v.exp()).log()
        return v - lse, shift + eps * lse

    def argmax(self, theta: Tensor, w: Tensor, eps: Tensor) -> Tensor:
        """The answer on each block; LOGSUMEXP takes log w and gives log y."""
        if self.rule == LOGSUMEXP:
            return self.normalize(w, 1.0)[1] + self.normalize(theta, eps)[0]
        y = self.centre(theta)[0] / eps + self.centre(w)[1]
        # rounding may leave the range of w; the clip is kept out of the gradient, which it would zero
        count = (self.mass if self.weights is None else self.sum(torch.ones_like(self.mass))).long()
        low = w.detach().expand(count.shape).gather(-1, self.start + count - 1)
        return y + (y.detach().clamp(low, self._first(w)) - y.detach())

    def max(self, theta: Tensor, w: Tensor, eps: Tensor) -> Tensor:
        """Each item's share of max_y <theta, y> - eps Omega(y), a closed form on a block, without cancellation.

        Quadratic: (theta - m)^2 / 2 eps + m w + eps (w - mean w)^2 / 2, m the block mean of theta.
        Entropy: w (eps lse(theta/eps) - eps lse(log w) + eps log w).
        """
        if self.rule == LOGSUMEXP:
            return w.exp() * (self.normalize(theta, eps)[1] + eps * self.normalize(w, 1.0)[0])
        spread, mean = self.centre(theta)
        return spread.square() / (2 * eps) + mean * w + eps * self.centre(w)[0].square() / 2
