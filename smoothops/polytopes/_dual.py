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

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .._axes import wide_dtype
from .._regularizer import FAMILIES, Regularizer
from ..kernels.torch import FAR, LOGSUMEXP, MEAN
from ..kernels.torch import threshold as threshold_kernel

FINITE, ABSENT = 4, 15  # the groups of ordinary and of absent items; 0..8 are infinities of theta and w
SLOPE_FLOOR = 1e-150  # a flatter sum has no usable derivative: 1/S^2 must not overflow


LIBRARY = torch.library.Library("smoothops", "DEF")


def opaque(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator that torch.compile and vmap carry as one node, without derivative.

    Not torch.library.custom_op, whose first call imports the compiler (a second).
    All tensor arguments must have the same number of dims and broadcast; ``fake`` gives the outputs' shapes.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = signature.split("(")[0]
        LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.smoothops, name).default
        torch.library.register_fake(f"smoothops::{name}", fake, lib=LIBRARY)
        outputs = signature.count("Tensor") - signature.split("->")[0].count("Tensor")
        torch.library.register_vmap(f"smoothops::{name}", _batched(operator, outputs), lib=LIBRARY)
        return operator

    return register


def _batched(operator: Any, outputs: int) -> Callable[..., Any]:
    """The vmap rule of an operator whose tensors all have the same number of dims and broadcast."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        moved = [
            a if not isinstance(a, Tensor) else a.unsqueeze(0) if d is None else a.movedim(d, 0)
            for a, d in zip(args, in_dims, strict=True)
        ]
        return operator(*moved), 0 if outputs == 1 else (0,) * outputs

    return rule


def _batch(*args: Any) -> torch.Size:
    """The batch dims of the tensors among ``args``, broadcast."""
    # not torch.broadcast_shapes, whose first call imports sympy
    heads = (t[..., :1] if t.shape[-1] else t.new_empty(*t.shape[:-1], 1) for t in args if isinstance(t, Tensor))
    return torch.broadcast_tensors(*heads)[0].shape[:-1]


def _one_a_row(*args: Any) -> Tensor:
    return args[0].new_empty(*_batch(*args), 1)


def _rows(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n) or (..., 1) as (rows, n) or (rows, 1) with their batch dims broadcast."""
    batch = _batch(*tensors)
    return batch, [t.expand(*batch, t.shape[-1]).reshape(batch.numel(), t.shape[-1]) for t in tensors]


# --- threshold -------------------------------------------------------------------------------------------------------


@opaque(
    "threshold(Tensor x, Tensor active, Tensor eps, Tensor k, Tensor shape, str family, bool clip) -> (Tensor, Tensor)",
    lambda *args: (_one_a_row(*args), _one_a_row(*args)),
)
def _threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, shape: Tensor, family: str, clip: bool
) -> tuple[Tensor, Tensor]:
    reg = FAMILIES[family]
    if x.numel() == 0:
        empty = _one_a_row(x, active, eps, k, shape).zero_()
        return empty, empty.clone()
    uniform = k.numel() == 1
    batch, (x, active, eps, shape, k_rows) = _rows(x, active, eps, shape, k)
    ref, tau = threshold_kernel(
        x, active, eps, k.reshape(1, 1) if uniform else k_rows,
        lambda z: reg.phi(z, shape), lambda z: reg.dphi(z, shape), lambda y: reg.phi_inverse(y, shape),
        reg.cap(shape) if clip and not reg.bounded else None, clip, reg.log_residual,
    )  # fmt: skip
    return ref.reshape(*batch, 1).clone(), tau.reshape(*batch, 1).clone()


def clipped(reg: type[Regularizer], f: Callable, z: Tensor, shape: Tensor, above: Tensor | float) -> Tensor:
    """``f(z)`` below the upper bound y = 1, and ``above`` from there on."""
    if reg.bounded:
        return f(z, shape)
    inside = z < reg.cap(shape)
    return torch.where(inside, f(torch.where(inside, z, reg.cap(shape)), shape), above)


class Threshold:
    """phi(u - tau) with sum k, and its maximum, over rows that may hold infinities and absent items.

    x: (..., n); eps, shape, k: (..., 1); present: (..., n) or None. ``clip`` bounds y by 1. -inf has weight 0; +inf
    takes weight 1 each, or all of k in equal parts where there are more than k of them.
    """

    def __init__(
        self, family: type[Regularizer], x: Tensor, eps: Tensor, shape: Tensor, k: Tensor, present: Tensor | None,
        clip: bool,
    ) -> None:  # fmt: skip
        self.family, self.eps, self.shape, self.clip = family, eps, shape, clip
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
        self.x = torch.where(active & finite & ~crowded & ~self.forced, x, 0)
        self.raw = torch.where(self.forced & full & finite, x, 0)
        detached = [t.detach() for t in (self.x, active, eps, self.k, shape)]
        self.ref, self.tau = _threshold(*detached, self.family.__name__, clip)
        self.u = torch.where(active, (self.x - self.ref) / eps, FAR)

    def _apply(self, f: Callable, z: Tensor, above: Tensor | float) -> Tensor:
        return clipped(self.family, f, z, self.shape, above) if self.clip else f(z, self.shape)

    def slopes(self) -> Tensor:
        """d = phi'(u - tau), up to a factor the row of the Jacobian that belongs to tau."""
        return torch.where(self.forced, 0, self._apply(self.family.dphi, self.u - self.tau, 0.0))

    def _differentiable_tau(self) -> Tensor:
        tau, level = self.tau, None
        for _ in range(self.family.newton_steps):
            z = self.u - tau
            total = self._apply(self.family.phi, z, 1.0).sum(-1, keepdim=True)
            slope = self._apply(self.family.dphi, z, 0.0).sum(-1, keepdim=True)
            # the derivative of the residual sum phi - k, at value 0
            level = (total - self.k).detach() if level is None else level
            usable = slope > SLOPE_FLOOR
            tau = tau + torch.where(usable, (total - self.k - level) / torch.where(usable, slope, 1), 0)
        return tau

    def argmax(self) -> Tensor:
        if not self.clip and self.family.closed_form:
            y = self.family.simplex_argmax(self.u)
        else:
            y = self._apply(self.family.phi, self.u - self._differentiable_tau(), 1.0)
        return torch.where(self.forced, self.forced_y, y) + self.top

    def max(self) -> Tensor:
        """eps (sum psi(u - tau) + k tau + k omega(1)) + k ref: by duality its derivative is y."""
        if not self.clip and self.family.closed_form:
            value = self.eps * self.family.simplex_max(self.u) + self.ref
        else:
            tau = self._differentiable_tau()
            z, vertex = self.u - tau, self.family.vertex(self.shape)
            psi = self._apply(self.family.psi, z, z - vertex)
            dual = psi.sum(-1, keepdim=True) + self.k * (tau + vertex)
            value = self.eps * dual + self.k * self.ref
        value = torch.where(self.forced, self.raw.sum(-1, keepdim=True), value)
        value = torch.where(self.has_top, torch.inf, value)
        return torch.where(self.empty, -torch.inf, value)


# --- pooling ---------------------------------------------------------------------------------------------------------


@opaque(
    "pool(Tensor theta, Tensor w, Tensor weights, Tensor group, Tensor eps, int rule) -> Tensor",
    lambda theta, *args: theta.new_empty(*_batch(theta, *args), theta.shape[-1], dtype=torch.long),
)
def _pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    n = max(t.shape[-1] for t in (theta, w))
    batch, (*rows, eps) = _rows(theta, w, weights, group, eps)
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
        self.weights = torch.ones_like(theta) if weights is None else weights
        given = [t.detach() for t in (theta, w, self.weights, group, eps)]
        self.start, self.rule = _pool(*given, rule), rule
        self.mass = self.sum(self.weights)

    @classmethod
    def given(cls, opens: Tensor, weights: Tensor | None = None) -> Blocks:
        """Blocks that begin where the bool tensor ``opens`` (..., n) is True."""
        blocks = cls.__new__(cls)
        index = torch.arange(opens.shape[-1], device=opens.device)
        blocks.weights = torch.ones(opens.shape, dtype=wide_dtype(opens.device), device=opens.device)
        blocks.weights = blocks.weights if weights is None else weights
        blocks.start, blocks.rule = torch.where(opens, index, 0).cummax(-1).values, MEAN
        blocks.mass = blocks.sum(blocks.weights)
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
        mean = self.sum(self.weights * v) / self.mass
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
        count = self.sum(torch.ones_like(self.mass)).long()
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


# --- strength chosen by mixing ---------------------------------------------------------------------------------------


def _search(measure: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, target: Tensor) -> Tensor:
    """The smallest eps, within a bracket in log eps, whose mixing reaches ``target``; rows are independent.

    ``measure(eps)`` gives the mixing, nondecreasing in eps, and a count that changes by 1 at each of its steps.
    """
    (mix_low, count_low), (mix_high, count_high) = measure(low.exp()), measure(high.exp())
    for step in range(80):
        # with a single step left inside, its place need not be exact
        last = (count_low - count_high).abs() <= 1
        settled = (high - low < 1e-9) | (last & (high - low < 1e-2)) | (mix_low >= target)
        if bool(settled.all()):
            break
        # interpolate log mixing, and bisect every third time
        guess = (target / mix_low).log() / (mix_high / mix_low).log()
        blind = last | ~guess.isfinite() if step % 3 else torch.ones_like(last)
        fraction = torch.where(blind, 0.5, guess.clamp(0.02, 0.98))
        middle = low + fraction * (high - low)
        mix, count = measure(middle.exp())
        enough = mix >= target
        up, down = ~settled & enough, ~settled & ~enough
        high, mix_high, count_high = (
            torch.where(up, new, old) for new, old in ((middle, high), (mix, mix_high), (count, count_high))
        )
        low, mix_low, count_low = (
            torch.where(down, new, old) for new, old in ((middle, low), (mix, mix_low), (count, count_low))
        )
    return torch.where(mix_low >= target, low, high).exp()


@opaque(
    "mixing_pool(Tensor theta, Tensor w, Tensor weights, Tensor group, int rule, float target) -> Tensor",
    lambda *args: _one_a_row(*args),
)
def mixing_pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, rule: int, target: float) -> Tensor:
    batch, (theta, w, weights, group) = _rows(theta, w, weights, group)
    if theta.numel() == 0:
        return theta.new_ones(*batch, 1)
    finite = group == FINITE
    m = finite.sum(-1, keepdim=True).clamp(min=1)
    gap_theta, gap_w = theta[:, :-1] - theta[:, 1:], w[:, :-1] - w[:, 1:]
    critical = gap_theta / gap_w  # of two neighbours; a block that holds all of them is pooled at the largest one
    usable = (gap_theta > 0) & (gap_w > 0) & finite[:, :-1] & finite[:, 1:]
    none = ~usable.any(-1, keepdim=True)
    edge = torch.zeros_like(theta[:, :1])  # so that a row of one item has an entry to reduce over
    low = torch.cat([torch.where(usable, critical, torch.inf), edge + torch.inf], -1).amin(-1, keepdim=True) / 2
    high = torch.cat([torch.where(usable, critical, 0), edge], -1).amax(-1, keepdim=True) * 2
    index = torch.arange(theta.shape[-1], device=theta.device)

    def measure(eps: Tensor) -> tuple[Tensor, Tensor]:
        start = kernels.pool(theta, w, weights, group, eps, rule)
        size = torch.zeros_like(theta).scatter_add_(-1, start, finite.to(theta.dtype))
        return size.square().sum(-1, keepdim=True) / m, (start == index).sum(-1, keepdim=True)

    low, high = torch.where(none, 1, low), torch.where(none, 1, high)
    goal = torch.minimum(torch.full_like(low, target), m.to(low.dtype))
    return _search(measure, low.log(), high.log(), goal).reshape(*batch, 1)


@opaque(
    "mixing_threshold(Tensor x, Tensor present, Tensor k, Tensor shape, str family, bool clip, float target) -> Tensor",
    lambda *args: _one_a_row(*args),
)
def mixing_threshold(
    x: Tensor, present: Tensor, k: Tensor, shape: Tensor, family: str, clip: bool, target: float
) -> Tensor:
    batch, (x, present, k, shape) = _rows(x, present, k, shape)
    if x.numel() == 0:
        return x.new_ones(*batch, 1)
    reg = FAMILIES[family]
    linear = reg.newton_steps == 1
    # items far from the threshold are 0 or 1, exactly where phi is linear: look at a window around the k-th largest
    half = 4 * math.ceil(target) + (16 if linear else 256)
    active = present & x.isfinite()
    ordered = torch.where(active, x, -torch.inf).sort(-1, descending=True).values
    n_active = active.sum(-1, keepdim=True)
    k = (k - (present & (x == torch.inf)).sum(-1, keepdim=True)).clamp(min=0)
    centre = k.round().long()
    skipped = (centre - half).clamp(min=0)
    index = skipped + torch.arange(min(2 * half, x.shape[-1]), device=x.device)
    inside = index < n_active
    window = torch.where(inside, ordered.gather(-1, index.clamp(max=x.shape[-1] - 1)), 0)
    m = inside.sum(-1, keepdim=True).clamp(min=1)

    def measure(eps: Tensor) -> tuple[Tensor, Tensor]:
        d = Threshold(reg, window, eps, shape, k - skipped, inside, clip).slopes()
        d = d / d.amax(-1, keepdim=True).clamp(min=1e-300)
        mix = d.sum(-1, keepdim=True).square() / d.square().sum(-1, keepdim=True).clamp(min=1e-300)
        return mix, mix if linear else mix * 1e3  # a smooth mixing settles within a thousandth of an input

    # a first scale: the gap around the threshold, else the range, else 1
    def at(i: Tensor) -> Tensor:
        return window.gather(-1, torch.minimum((i - skipped).clamp(min=0), m - 1))

    spread, whole = at(centre - 2) - at(centre + 1), at(skipped) - at(skipped + m)
    scale = torch.where(spread > 0, spread, torch.where(whole > 0, whole, 1))
    goal = torch.minimum(torch.full_like(scale, target), m if linear else 0.99 * m)
    low, high = scale.log(), scale.log()
    for _ in range(40):
        small, large = measure(low.exp())[0] < goal, measure(high.exp())[0] >= goal
        if bool((small & large).all()):
            break
        low, high = torch.where(small, low, low - 4), torch.where(large, high, high + 4)
    return _search(measure, low, high, goal).reshape(*batch, 1)
