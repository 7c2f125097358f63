"""Elementwise operators: a yes or no for each entry (heaviside), and what is made of it.

With F the distribution function that a regularizer stands for on the binary simplex of (x, 0), and eps its strength:

    heaviside(x) = F(x/eps)                    (1) on the binary simplex
    relu(x)      = eps * integral of F         (2) on the binary simplex; its gradient is heaviside(x)
    round, floor, ceil                         a sum of steps: floor(x) = sum over the integers k of F((x - k)/eps)

Entropy and BinaryEntropy: F is the logistic function. Quadratic: F(z) = clip((z + 1)/2, 0, 1). Laplace: that law's.
Perturbed: the mean of the hard function f under noise, E f(x + eps Z); of maximum, noise on both.
NaN stays in its entry; infinities are taken to their limits; every operator is O(number of entries).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._axes import check_tensor, concrete, tensor_like, wide_dtype
from ._regularizer import Mixing, Regularizer
from .kernels.torch import FAR
from .polytopes import Simplex
from .polytopes._dual import clipped
from .polytopes._fused import attach
from .polytopes.base import check_role
from .regularizers import BinaryEntropy, Entropy, Laplace, Quadratic
from .smoothing import Problem, SmoothingLike, as_smoothing
from .stochastic import Perturbed

FOURIER_FROM = 0.25  # logistic steps: from this eps on a Fourier series converges faster than the sum of the steps


class _Entries:
    """The entries of x in the wide dtype, each a row of its own: infinities 0 until :meth:`finish`."""

    def __init__(self, x: Tensor) -> None:
        x = check_tensor(x)
        self.dtype, self.shape = x.dtype, x.shape
        self.given = x.to(wide_dtype(x.device))
        self.finite = self.given.isfinite()
        self.x = torch.where(self.finite, self.given, 0)

    def eps(self, reg: Regularizer | Perturbed) -> Tensor:
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing needs inputs that compete; here each entry stands alone, give a number")
        eps = torch.as_tensor(reg.eps, dtype=self.x.dtype, device=self.x.device)
        try:
            return eps.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"eps of shape {tuple(eps.shape)} does not broadcast to x of shape {tuple(self.shape)}"
            ) from None

    def mean(self, p: Perturbed, f: Callable[[Tensor], Tensor]) -> Tensor:
        """E f(x + eps Z) for each entry."""
        noisy = p.average(self.x.unsqueeze(-1), lambda v: f(v.squeeze(-1)).unsqueeze(-1), self.eps(p).unsqueeze(-1))
        return noisy.squeeze(-1)

    def finish(self, y: Tensor, at_infinity: Callable[[Tensor], Tensor]) -> Tensor:
        """y, with the limits at infinity, and NaN where x is NaN."""
        limit = torch.where(self.given.isnan(), self.given, at_infinity(self.given))
        return torch.where(self.finite, y, limit)


Formula = Callable[[Tensor, Any, type[Regularizer]], Tensor]


def _elementwise(
    x: Tensor, name: str, smoothing: SmoothingLike, hard: Callable[[Tensor], Tensor], soft: Formula,
    slope: Formula | None = None,
) -> Tensor:  # fmt: skip
    """``soft(x, eps, family)`` for a regularizer, with the limits of ``hard`` at infinities; ``hard(x)`` for Hard.

    ``slope`` is the derivative of ``soft`` in x, where plain code has one.
    """
    x = check_tensor(x)

    def plain(v: Tensor, reg: Regularizer) -> Tensor:
        entries = _Entries(v)
        y = soft(entries.x, entries.eps(reg) * type(reg).pair_scale, type(reg).on_box())
        return entries.finish(y, lambda v: hard(v.detach())).to(v.dtype)

    def softened(reg: Regularizer) -> Tensor:
        check_role(reg, "step", name)
        fast = slope is not None and isinstance(reg.eps, (int, float)) and x.numel() > 0 and _untransformed(x)
        return _differentiated(x, reg, hard, soft, slope, plain) if fast and slope is not None else plain(x, reg)

    def sampled(p: Perturbed) -> Tensor:
        entries = _Entries(x)
        return entries.finish(entries.mean(p, hard), lambda v: hard(v.detach()))

    problem = Problem(lambda: hard(x.to(wide_dtype(x.device))), softened, None, sampled)
    return as_smoothing(smoothing, Entropy, 0.1).solve(problem).to(x.dtype)


def _untransformed(x: Tensor) -> bool:
    return concrete(x) and torch.autograd.forward_ad._current_level < 0


def _differentiated(
    x: Tensor, reg: Regularizer, hard: Callable[[Tensor], Tensor], soft: Formula, slope: Formula,
    plain: Callable[[Tensor, Regularizer], Tensor],
) -> Tensor:  # fmt: skip
    """Value and slope of each entry at once, outside of the graph: a fraction of the small operations."""
    needed = x.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        v = x.detach().to(wide_dtype(x.device))
        finite = v.isfinite()
        whole = bool(finite.all())
        inner = v if whole else torch.where(finite, v, 0)
        strength, family = float(reg.eps) * type(reg).pair_scale, type(reg).on_box()  # type: ignore[arg-type]
        y = soft(inner, strength, family)
        if not whole:
            y = torch.where(finite, y, torch.where(v.isnan(), v, hard(v)))
        y = y.to(x.dtype)
        if not needed:
            return y
        d = slope(inner, strength, family)
        if not whole:
            d = torch.where(finite, d, torch.where(v.isnan(), v, 0))
    return attach(x, y, (d,), _Slopes, lambda v: plain(v, reg))


class _Slopes:
    """The backward pass of a map whose slopes are known."""

    @staticmethod
    def backward(x: Tensor, state: tuple[Tensor, ...], g: Tensor) -> Tensor:
        # where nothing moves, not even the NaN of a cotangent counts: 0 times inf in a branch that is not taken
        return torch.where(state[0] == 0, 0, state[0] * g).to(x.dtype)


def _step(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    """F(x/eps) with eps in the scale of the hypercube."""
    shape = torch.ones_like(x)
    return clipped(family, family.phi, _z(x, eps, family), shape, 1.0)


def _step_slope(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    return clipped(family, family.dphi, _z(x, eps, family), torch.ones_like(x), 0.0) / eps


def _ramp_slope(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    tail = family.phi(_z(torch.where(x < 0, x, -x), eps, family), torch.ones_like(x))
    return torch.where(x < 0, tail, 1 - tail)


def _ramp(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    """eps times the integral of F up to x/eps: max(x, 0) and a rest that is even in x: no digit of x is lost."""
    return torch.where(x < 0, 0, x) + _rest(x, eps, family)


def _rest(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    """What the ramp has beyond max(x, 0), even in x: added to the larger of two numbers it costs no digit."""
    return eps * family.psi(_z(torch.where(x < 0, x, -x), eps, family), torch.ones_like(x))


def _z(x: Tensor, eps: Any, family: type[Regularizer]) -> Tensor:
    return (x / eps).clamp(FAR, -FAR) + family.vertex(torch.ones_like(x))


# --- one step --------------------------------------------------------------------------------------------------------


def heaviside(x: Tensor, values: Tensor | float | None = None, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft step: F(x/eps), the argmax over the binary simplex of (x, 0); 1/2 at 0.

    Args:
        x: any shape.
        values: what ``Hard()`` answers at x = 0, 1/2 by default; without meaning for a soft step.
        smoothing: a number eps, in the unit of x, means Entropy(eps): sigmoid(x/eps). Also Quadratic:
            clip((x/eps + 1)/2, 0, 1), BinaryEntropy (as Entropy), Laplace, Perturbed: E heaviside(x + eps Z), Hard.
            A tensor eps broadcasts to x.

    Returns: values in [0, 1], shaped like x. Raises: ValueError for a smoothing that has no step.
    Source: Blondel, Roulet 2024, chapter 5.

    Example:
        >>> so.heaviside(torch.tensor([-1.0, 0.0, 0.5]), smoothing=so.Quadratic(1.0))
        tensor([0.0000, 0.5000, 0.7500])
    """
    at_zero = 0.5 if values is None else values

    def hard(v: Tensor) -> Tensor:
        step = torch.where(v == 0, tensor_like(at_zero, v), (v.sign() + 1) / 2)  # torch.heaviside has no derivative
        return torch.where(v.isnan(), v, step)

    return _elementwise(x, "heaviside", smoothing, hard, _step, _step_slope)


def sign(x: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft sign: 2 heaviside(x) - 1; Entropy: tanh(x/2 eps). See :func:`heaviside`.

    Example:
        >>> so.sign(torch.tensor([-1.0, 0.0, 0.5]), smoothing=so.Quadratic(1.0))
        tensor([-1.0000,  0.0000,  0.5000])
    """
    twice = lambda v, e, f: 2 * _step_slope(v, e, f)  # noqa: E731
    return _elementwise(x, "sign", smoothing, torch.sign, lambda v, e, f: 2 * _step(v, e, f) - 1, twice)


def relu(x: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft relu: the maximum over the binary simplex of (x, 0); at least relu(x), its gradient is ``heaviside``.

    Entropy: eps softplus(x/eps). Quadratic: 0, (x + eps)^2 / 4 eps, x (sparseplus). Arguments as :func:`heaviside`.

    Example:
        >>> so.relu(torch.tensor([-1.0, 0.0, 1.0]), smoothing=so.Quadratic(1.0))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return _elementwise(x, "relu", smoothing, torch.relu, _ramp, _ramp_slope)


def abs(x: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft absolute value: the maximum over the binary simplex of (x, -x), at least |x|.

    Entropy: eps log(2 cosh(x/eps)). Quadratic: x^2/eps + eps/4 for |x| <= eps/2. Arguments as :func:`heaviside`.

    Example:
        >>> so.abs(torch.tensor([-1.0, 0.0, 0.25]), smoothing=so.Quadratic(1.0))
        tensor([1.0000, 0.2500, 0.3125])
    """
    slope = lambda v, e, f: 2 * _ramp_slope(2 * v, e, f) - 1  # noqa: E731
    return _elementwise(x, "abs", smoothing, torch.abs, lambda v, e, f: _ramp(2 * v, e, f) - v, slope)


def maximum(x: Tensor, other: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft elementwise maximum: other + relu(x - other), the maximum over the binary simplex of (x, other).

    Both broadcast; otherwise as :func:`relu`. For Tsallis see :func:`max`.

    Example:
        >>> so.maximum(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]), smoothing=so.Quadratic(1.0))
        tensor([0.2500, 2.0000])
    """
    x, other = torch.broadcast_tensors(check_tensor(x), check_tensor(other, "other"))
    a, b = _Entries(x), _Entries(other)
    hard = torch.maximum(a.given, b.given)

    def soft(reg: Regularizer) -> Tensor:
        check_role(reg, "step", "maximum")
        gap = torch.where(a.finite & b.finite, a.x - b.x, 0)
        y = torch.where(gap < 0, b.x, a.x) + _rest(gap, a.eps(reg) * type(reg).pair_scale, type(reg).on_box())
        return torch.where(a.finite & b.finite, y, hard)

    def sampled(p: Perturbed) -> Tensor:
        pair = torch.stack([torch.where(a.finite & b.finite, v, 0) for v in (a.x, b.x)], -1)
        y = p.maximum(pair, Simplex().maximize, a.eps(p).unsqueeze(-1)).squeeze(-1)
        return torch.where(a.finite & b.finite, y, hard)

    y = as_smoothing(smoothing, Entropy, 0.1).solve(Problem(lambda: hard, soft, None, sampled))
    return y.to(torch.promote_types(x.dtype, other.dtype))


def minimum(x: Tensor, other: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft elementwise minimum: ``-maximum(-x, -other)``. See :func:`maximum`.

    Example:
        >>> so.minimum(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]), smoothing=so.Quadratic(1.0))
        tensor([-0.2500,  1.0000])
    """
    return -maximum(-check_tensor(x), -check_tensor(other, "other"), smoothing=smoothing)


def clamp(
    x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None, *, smoothing: SmoothingLike = 0.1
) -> Tensor:
    """Soft clamp: min + relu(x - min) - relu(x - max); monotone, and within [min, max] where min <= max.

    ``min`` and ``max`` are numbers or tensors with gradient, broadcastable to x; at least one is needed.
    Otherwise as :func:`relu`.

    Example:
        >>> so.clamp(torch.tensor([-2.0, 0.5, 2.0]), 0.0, 1.0, smoothing=so.Quadratic(0.5))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if min is None and max is None:
        raise ValueError("clamp needs min, max or both")
    entries = _Entries(x)
    low, high = (None if m is None else tensor_like(m, entries.x).expand(x.shape) for m in (min, max))
    hard = torch.clamp(entries.given, low, high)

    def soft(reg: Regularizer) -> Tensor:
        check_role(reg, "step", "clamp")
        eps, family, v = entries.eps(reg) * type(reg).pair_scale, type(reg).on_box(), entries.x
        y, rest = (v, 0.0) if low is None else (torch.where(v < low, low, v), _rest(v - low, eps, family))
        if high is not None:
            y, rest = torch.where(y < high, y, high), rest - _rest(v - high, eps, family)
        return entries.finish(y + rest, lambda given: hard)

    def sampled(p: Perturbed) -> Tensor:
        return entries.finish(entries.mean(p, lambda v: torch.clamp(v, low, high)), lambda given: hard)

    return as_smoothing(smoothing, Entropy, 0.1).solve(Problem(lambda: hard, soft, None, sampled)).to(entries.dtype)


# --- many steps ------------------------------------------------------------------------------------------------------


def _floor_uniform(f: Tensor, eps: Tensor) -> Tensor:
    """E floor(f + eps U), U uniform on [-1, 1]: [R(f + eps) - R(f - eps)]/2 eps, R the integral of floor."""

    def integral(u: Tensor) -> Tensor:
        n = u.detach().floor()
        return u * n - n * (n + 1) / 2

    return (integral(f + eps) - integral(f - eps)) / (2 * eps)


def _floor_laplace(f: Tensor, eps: Tensor) -> Tensor:
    """The geometric sums of the Laplace tails on both sides, over a common denominator."""
    low = torch.expm1((2 * torch.where(f < 0.5, f, 0.5) - 1) / eps) * (-f / eps).exp()
    high = -torch.expm1((1 - 2 * torch.where(f < 0.5, 0.5, f)) / eps) * ((f - 1) / eps).exp()
    return -torch.where(f < 0.5, low, high) / (2 * torch.expm1(-1 / eps))


def _floor_logistic(f: Tensor, eps: Tensor) -> Tensor:
    """The sum of the nearest steps for small eps, its Fourier series for large: both to rounding."""
    if concrete(eps) and eps.numel():  # mostly one of them will do
        least, most = (float(v) for v in eps.detach().aminmax())
        if most < FOURIER_FROM:
            return _floor_steps(f, eps, math.ceil(37 * most) + 1)
        if least >= FOURIER_FROM:
            return _floor_series(f, eps)
    near, far = eps.clamp(max=FOURIER_FROM), eps.clamp(min=FOURIER_FROM)
    return torch.where(eps < FOURIER_FROM, _floor_steps(f, near, 11), _floor_series(f, far))


def _floor_steps(f: Tensor, eps: Tensor, count: int) -> Tensor:
    """``count`` steps on either side: from 37 eps on a step has no digit left to change."""
    steps = torch.zeros_like(f)
    for j in range(count):
        steps = steps + BinaryEntropy.phi((f - 1 - j) / eps, eps) - BinaryEntropy.phi(-(f + j) / eps, eps)
    return steps


def _floor_series(f: Tensor, eps: Tensor) -> Tensor:
    series = f - 0.5
    for m in range(1, 9):
        c = 2 * math.pi**2 * m * eps
        damping = 2 * c * (-c).exp() / -torch.expm1(-2 * c)
        series = series + damping * torch.sin(2 * math.pi * m * f) / (math.pi * m)
    return series


_FLOORS: dict[type[Regularizer], Callable[[Tensor, Tensor], Tensor]] = {
    Quadratic: _floor_uniform,
    Laplace: _floor_laplace,
    BinaryEntropy: _floor_logistic,
}


def _soft_floor(x: Tensor, eps: Tensor, family: type[Regularizer]) -> Tensor:
    whole = x.detach().floor()
    return whole + _FLOORS[family](x - whole, eps / family.pair_scale)


def floor(x: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft floor: the sum of soft steps at the integers, E floor(x + eps Z) for noise Z with distribution function F.

    Tends to floor as eps -> 0 (to k - 1/2 at an integer k, the mean of both sides) and to x - 1/2 as eps grows.
    Arguments as :func:`heaviside`; eps has the unit of x. Complexity: up to 22 evaluations an entry, for Entropy.

    Example:
        >>> so.floor(torch.tensor([0.5, 1.0, 2.75]), smoothing=so.Quadratic(0.5))
        tensor([0.0000, 0.5000, 2.2500])
    """
    return _elementwise(x, "floor", smoothing, torch.floor, _soft_floor)


def ceil(x: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft ceil: ``-floor(-x)``. See :func:`floor`.

    Example:
        >>> so.ceil(torch.tensor([0.5, 1.0, 2.75]), smoothing=so.Quadratic(0.5))
        tensor([1.0000, 1.5000, 3.2500])
    """
    return _elementwise(x, "ceil", smoothing, torch.ceil, lambda v, e, f: -_soft_floor(-v, e, f))


def round(x: Tensor, *, decimals: int = 0, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft rounding to the nearest integer, or to ``decimals``: ``floor(x + 1/2)``; tends to x as eps grows.

    Arguments as :func:`heaviside`; eps has the unit of x. ``Hard`` rounds halves to even, as torch does.

    Example:
        >>> so.round(torch.tensor([0.5, 0.8, 2.0]), smoothing=so.Quadratic(0.5))
        tensor([0.5000, 0.8000, 2.0000])
    """
    unit = 10.0**decimals

    def soft(v: Tensor, e: Tensor, f: type[Regularizer]) -> Tensor:
        return _soft_floor(v * unit + 0.5, e * unit, f) / unit

    return _elementwise(x, "round", smoothing, lambda v: torch.round(v, decimals=decimals), soft)
