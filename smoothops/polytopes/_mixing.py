"""The strength at which an answer mixes a given number of inputs, found by search on log eps, one a row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from .._opaque import as_rows, one_a_row, opaque
from .._regularizer import FAMILIES
from ._dual import FINITE, Threshold

CLOSE = 1e-2  # of the target: among a million items its single steps are not worth the search
REACH = 0.4  # the first stride of log eps away from the guess
SAMPLE, TYPICAL = 64, 0.5  # the guess: so much of the median critical strength of so many neighbours
FARTHEST = 160.0  # on log eps, where no bounds are known

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _search(
    measure: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor, high: Tensor, first: Tensor, ends: Ends, target: Tensor,
) -> Tensor:  # fmt: skip
    """The smallest eps in [low, high] whose mixing reaches ``target``, found on log eps; rows are independent.

    ``measure(eps)`` gives the mixing, nondecreasing in eps, and a count that changes by 1 at each of its steps;
    ``ends`` what it gives at low and at high. From the guess ``first`` the strides double until the target lies
    between two measures; then regula falsi on log(mixing - 1), the kept end halved (Illinois), every fourth bisects.
    Strengths are taken in a power of two as unit, so that x in another such unit gives the same eps to the bit.
    """
    (mix_low, count_low), (mix_high, count_high) = ends
    unit = torch.ldexp(torch.ones_like(high), torch.frexp(high).exponent)
    low, high, first = ((v / unit).log() for v in (low, high, first))
    value_low, value_high = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
    found_low, found_high, went_up = (torch.zeros_like(low, dtype=torch.bool) for _ in range(3))
    for step in range(80):
        # with a single step left inside, its place need not be exact
        last = (count_low - count_high).abs() <= 1
        near = mix_high - mix_low <= CLOSE * target
        settled = (high - low < 1e-9) | (last & (high - low < 1e-2)) | near | (mix_low >= target)
        if bool(settled.all()):
            break
        both, stride = found_low & found_high, REACH * 2.0 ** (step - 1)
        guess = value_low / (value_low - value_high)
        blind = last | ~guess.isfinite() if step % 4 < 3 else torch.ones_like(last)
        inside = low + torch.where(blind, 0.5, guess.clamp(0.02, 0.98)) * (high - low)
        outside = torch.where(found_low, torch.minimum(low + stride, high), torch.maximum(high - stride, low))
        middle = torch.where(both, inside, outside) if step else torch.clamp(first, low, high)
        mix, count = measure(unit * middle.exp())
        enough = mix >= target
        value = ((mix - 1).clamp(min=0) / (target - 1)).log()
        again = both & (enough == went_up)
        up, down, went_up = ~settled & enough, ~settled & ~enough, enough
        value_low = torch.where(up & again, value_low / 2, value_low)
        value_high = torch.where(down & again, value_high / 2, value_high)
        found_low, found_high = found_low | down, found_high | up
        high, mix_high, count_high, value_high = (
            torch.where(up, new, old)
            for new, old in ((middle, high), (mix, mix_high), (count, count_high), (value, value_high))
        )
        low, mix_low, count_low, value_low = (
            torch.where(down, new, old)
            for new, old in ((middle, low), (mix, mix_low), (count, count_low), (value, value_low))
        )
    # several steps at one place, from equal gaps: move off the kink where they lie
    high = torch.where(high - low < 1e-8, high + 1e-3, high)
    return unit * torch.where(mix_low >= target, low, high).exp()


def search_from(measure: Callable[[Tensor], tuple[Tensor, Tensor]], first: Tensor, target: Tensor) -> Tensor:
    """:func:`_search` from a guess of eps alone."""
    far, one, most = math.exp(FARTHEST), torch.ones_like(first), torch.full_like(first, torch.inf)
    return _search(measure, first / far, first * far, first, ((one, one), (most, most)), target)


@opaque(
    "mixing_pool(Tensor theta, Tensor w, Tensor weights, Tensor group, int rule, float target) -> Tensor",
    lambda *args: one_a_row(*args),
)
def mixing_pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, rule: int, target: float) -> Tensor:
    batch, (theta, w, weights, group) = as_rows(theta, w, weights, group)
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
    high = (
        torch.cat([torch.where(usable, critical, 0), edge], -1).amax(-1, keepdim=True) * 3
    )  # not 2: no kink at the middle
    low, high = torch.where(none, 1, low), torch.where(none, 1, high)
    index = torch.arange(theta.shape[-1], device=theta.device)

    def measure(eps: Tensor) -> tuple[Tensor, Tensor]:
        start = kernels.pool(theta, w, weights, group, eps, rule)
        size = torch.zeros_like(theta).scatter_add_(-1, start, finite.to(theta.dtype))
        return size.square().sum(-1, keepdim=True) / m, ((start == index) & finite).sum(-1, keepdim=True)

    # below every critical strength nothing is pooled but ties, above all of them everything is
    tied = (finite[:, :-1] & finite[:, 1:] & ~usable).any(-1, keepdim=True)
    mix, count = torch.ones_like(low), m
    if bool(tied.any()):
        there = measure(low)
        mix, count = torch.where(tied, there[0], mix), torch.where(tied, there[1], count)
    ends = (mix, count), (m.to(low.dtype), torch.ones_like(m))
    # a first guess: somewhat below the median over a sample of the neighbours
    sample = torch.where(usable, critical, torch.inf)[:, :: max(1, critical.shape[-1] // SAMPLE)].sort(-1).values
    sample = torch.cat([sample, edge + torch.inf], -1)
    usual = sample.gather(-1, (sample.isfinite().sum(-1, keepdim=True) - 1).clamp(min=0) // 2)
    first = torch.where(usual.isfinite(), usual * TYPICAL, (low.log() / 2 + high.log() / 2).exp())
    goal = torch.minimum(torch.full_like(low, target), m.to(low.dtype))
    return _search(measure, low, high, first, ends, goal).reshape(*batch, 1)


@opaque(
    "mixing_threshold(Tensor x, Tensor present, Tensor k, Tensor shape, str family, bool clip, float target) -> Tensor",
    lambda *args: one_a_row(*args),
)
def mixing_threshold(
    x: Tensor, present: Tensor, k: Tensor, shape: Tensor, family: str, clip: bool, target: float
) -> Tensor:
    batch, (x, present, k, shape) = as_rows(x, present, k, shape)
    if x.numel() == 0:
        return x.new_ones(*batch, 1)
    reg = FAMILIES[family]
    linear = reg.newton_steps == 1
    # items far from the threshold are 0 or 1, exactly where phi is linear: look at a window around the k-th largest
    half = 4 * math.ceil(target) + (16 if linear else 256)
    active = present & x.isfinite()
    compiled = kernels.compiled_mixing(reg) if x.device.type == "cpu" else None
    if compiled is not None:
        above = (present & (x == torch.inf)).sum(-1, keepdim=True)
        cap = reg.cap(shape) if clip and not reg.bounded else torch.inf
        return compiled.mixing_threshold(
            torch.where(active, x, -torch.inf), active, (k - above).clamp(min=0), shape, family, cap, clip,
            reg.log_residual, linear, target, half,
        ).reshape(*batch, 1)  # fmt: skip
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
        mix = mix.clamp(min=1)  # none, or one that is just about to move
        return mix, mix if linear else mix * 1e3  # a smooth mixing settles within a thousandth of an input

    # a first scale: the gap around the threshold, else the range, else 1
    def at(i: Tensor) -> Tensor:
        return window.gather(-1, torch.minimum((i - skipped).clamp(min=0), m - 1))

    spread, whole = at(centre - 2) - at(centre + 1), at(skipped) - at(skipped + m)
    scale = torch.where(spread > 0, spread, torch.where(whole > 0, whole, 1))
    # where all or none are chosen there is no threshold to soften
    forced = (k <= skipped) | (k - skipped >= m)
    most = m.to(x.dtype) * (1 if linear else 0.99)
    goal = torch.where(forced, 0, torch.minimum(torch.full_like(scale, target), most))
    return torch.where(forced, scale, search_from(measure, scale, goal)).reshape(*batch, 1)
