"""Comparisons as soft booleans: plain tensors in [0, 1], the probability that the hard comparison holds under noise.

With F the distribution function of the smoothing and eps its strength, gt(a, b) = F((a - b)/eps). An interval is one
joint event, a difference of two values of F, so that the cases of a partition sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from ._axes import check_number, check_tensor, concrete, floating_dtype, tensor_like, wide_dtype
from .elementwise import heaviside
from .regularizers import Entropy
from .smoothing import Hard, Problem, Smoothing, SmoothingLike, as_smoothing

Value = Tensor | float
Scale = tuple[Value, Value]


def gt(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a > b: F((a - b)/eps), 1/2 at a = b; the hard limit is ``torch.gt``, with 0 at a = b for ``Hard`` only.

    Args:
        a, b: tensors that broadcast, or one of them a number.
        scale: (s1, s2), standard deviations of two independent Gaussian quantities with means a and b: the
            probability Phi((a - b)/sqrt(s1^2 + s2^2)) that the first exceeds the second; in place of ``smoothing``.
        smoothing: a number eps, in the unit of a, means Entropy(eps), the logistic law; None: Entropy(0.1). Also
            Quadratic, BinaryEntropy, Laplace, Perturbed, StraightThrough, Hard.

    Returns: a soft boolean, in [0, 1], in the floating dtype that a and b promote to; NaN where a or b is NaN.
    Equal infinities are a tie. Raises: ValueError for scale with smoothing, or shapes that do not broadcast.
    Complexity: O(number of entries). Source: Petersen et al. 2021, "AlgoNet"; Blondel, Roulet 2024, chapter 5.

    Example:
        >>> so.gt(torch.tensor([0.0, 1.0, 2.0]), 1.0, smoothing=so.Quadratic(2.0))
        tensor([0.2500, 0.5000, 0.7500])
    """
    return _step(a, b, 0.0, scale, smoothing)


def ge(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a >= b: F((a - b)/eps), as :func:`gt`; ``Hard`` gives 1 at a = b.

    Example:
        >>> so.ge(torch.tensor([0.0, 1.0]), 1.0, smoothing=so.Hard())
        tensor([0., 1.])
    """
    return _step(a, b, 1.0, scale, smoothing)


def lt(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a < b: ``gt(b, a)``. See :func:`gt`.

    Example:
        >>> so.lt(torch.tensor([0.0, 1.0, 2.0]), 1.0, smoothing=so.Quadratic(2.0))
        tensor([0.7500, 0.5000, 0.2500])
    """
    return _step(b, a, 0.0, _reversed(scale), smoothing)


def le(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a <= b: ``ge(b, a)``. See :func:`gt`.

    Example:
        >>> so.le(torch.tensor([0.0, 1.0, 2.0]), 1.0, smoothing=so.Hard())
        tensor([1., 1., 0.])
    """
    return _step(b, a, 1.0, _reversed(scale), smoothing)


def eq(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a == b: 4 p (1 - p), p = gt(a, b), which is 1 at a = b. Arguments as :func:`gt`.

    Entropy: sech^2((a - b)/2 eps). Source: Petersen et al. 2021.

    Example:
        >>> so.eq(torch.tensor([0.0, 1.0]), 0.0, smoothing=1.0)
        tensor([1.0000, 0.7864])
    """
    gap, dtype = _gap(a, b)
    return _of_sides(gap, scale, smoothing, _coincidence).to(dtype)


def ne(a: Value, b: Value, *, scale: Scale | None = None, smoothing: SmoothingLike = None) -> Tensor:
    """Soft a != b: 1 - eq(a, b) = (2 p - 1)^2, without cancellation near a = b. See :func:`eq`.

    Example:
        >>> so.ne(torch.tensor([0.0, 1.0]), 0.0, smoothing=1.0)
        tensor([0.0000, 0.2136])
    """
    gap, dtype = _gap(a, b)
    return _of_sides(gap, scale, smoothing, lambda up, down: (up - down).square()).to(dtype)


def isclose(
    a: Value, b: Value, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False, *,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft |a - b| <= atol + rtol |b|: eq(max(|a - b| - atol - rtol |b|, 0), 0), 1 within the tolerance.

    ``Hard`` gives ``torch.isclose``. ``equal_nan``: two NaN count as close; otherwise as :func:`eq`.

    Example:
        >>> so.isclose(torch.tensor([1.0, 1.5]), 1.0, atol=0.25, smoothing=0.1)
        tensor([1.0000, 0.2804])
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, Real) or not value >= 0:
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    gap, dtype = _gap(a, b)
    size = tensor_like(b, gap).abs()
    margin = gap.abs() - atol - rtol * torch.where(size.isinf(), 0, size)
    excess = torch.where(gap.isinf(), torch.inf, margin.clamp(min=0))
    y = _of_sides(excess, None, smoothing, _coincidence)
    if equal_nan:
        y = torch.where(tensor_like(a, gap).isnan() & tensor_like(b, gap).isnan(), 1, y)
    return y.to(dtype)


def between(x: Tensor, low: Value, high: Value, *, smoothing: SmoothingLike = None) -> Tensor:
    """Soft low <= x <= high, one joint event: F((x - low)/eps) - F((x - high)/eps); 0 where low > high.

    lt(x, low) + between(x, low, high) + gt(x, high) is 1. The product of the two comparisons would take them for
    independent. Arguments as :func:`gt`; ``Hard`` includes both ends.

    Example:
        >>> so.between(torch.tensor([0.0, 2.0]), -1.0, 1.0, smoothing=1.0)
        tensor([0.4621, 0.2215])
    """
    dtype, wide = floating_dtype(x, low, high), check_tensor(x).to(wide_dtype(x.device))
    above, beyond = _gap(wide, low)[0], _gap(wide, high)[0]  # one cast: the gradients meet in the wide dtype
    return interval(above, beyond, 1.0, 0.0, smoothing).to(dtype)


def interval(above: Tensor, beyond: Tensor, at_low: float, at_high: float, smoothing: SmoothingLike) -> Tensor:
    """F(above/eps) - F(beyond/eps), 0 where above < beyond, without cancellation in the tails.

    ``at_low`` and ``at_high`` are the values of the two steps where their argument is 0 and they are hard.
    """
    above, beyond = torch.broadcast_tensors(above, beyond)
    flip = above.detach() + beyond.detach() > 0  # F(z) - F(y) = F(-y) - F(-z): the small ones lose no digits
    rise, fall = torch.where(flip, 1 - at_high, at_low), torch.where(flip, 1 - at_low, at_high)
    first, second = torch.where(flip, -beyond, above), torch.where(flip, -above, beyond)

    def soft(s: Smoothing) -> Tensor:
        return (heaviside(first, rise, smoothing=s) - heaviside(second, fall, smoothing=s)).clamp(min=0)

    return as_smoothing(smoothing, Entropy, 0.1).solve(Problem(lambda: soft(Hard()), soft))


# --- what the comparisons share --------------------------------------------------------------------------------------


def _given(smoothing: SmoothingLike) -> SmoothingLike:
    return 0.1 if smoothing is None else smoothing


def _reversed(scale: Scale | None) -> Scale | None:
    return scale[::-1] if isinstance(scale, tuple) else scale


def _gap(a: Value, b: Value) -> tuple[Tensor, torch.dtype]:
    """a - b in the wide dtype, 0 for equal infinities, and the dtype of the answer."""
    for name, v in (("a", a), ("b", b)):
        check_number(v, name) if not isinstance(v, Tensor) else check_tensor(v, name)
    device = next((v.device for v in (a, b) if isinstance(v, Tensor)), torch.device("cpu"))
    wide = torch.empty((), dtype=wide_dtype(device), device=device)
    x, y = (tensor_like(v, wide) for v in (a, b))
    try:
        x, y = torch.broadcast_tensors(x, y)
    except RuntimeError:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} do not broadcast") from None
    tied = (x == y) & x.isinf()
    return torch.where(tied, 0, x) - torch.where(tied, 0, y), floating_dtype(a, b)


def _step(a: Value, b: Value, at_tie: float, scale: Scale | None, smoothing: SmoothingLike) -> Tensor:
    gap, dtype = _gap(a, b)
    return _law(scale, smoothing)(gap, at_tie).to(dtype)


def _law(scale: Scale | None, smoothing: SmoothingLike) -> Callable[[Tensor, float], Tensor]:
    """The step, as a function of the gap and of its hard value at 0."""
    if scale is None:
        return lambda gap, at_tie: heaviside(gap, at_tie, smoothing=_given(smoothing))
    if smoothing is not None:
        raise ValueError("scale gives the law of the comparison by itself; pass scale or smoothing, not both")
    if not isinstance(scale, tuple) or len(scale) != 2:
        raise TypeError(f"scale must be a pair of standard deviations (s1, s2), got {scale!r}")
    for s in scale:
        check_number(s, "scale")
        if (not isinstance(s, Tensor) or concrete(s)) and not bool((torch.as_tensor(s) >= 0).all()):
            raise ValueError(f"scale must hold standard deviations >= 0, got {s}")

    def gaussian(gap: Tensor, at_tie: float) -> Tensor:
        variance = tensor_like(scale[0], gap).square() + tensor_like(scale[1], gap).square()
        if concrete(variance) and not bool((variance > 0).all()):
            raise ValueError("scale must be positive in one of its two parts; without noise use smoothing=so.Hard()")
        return torch.special.ndtr(gap / variance.sqrt())

    return gaussian


def _coincidence(up: Tensor, down: Tensor) -> Tensor:
    return 4 * up * down


def _of_sides(
    gap: Tensor, scale: Scale | None, smoothing: SmoothingLike, formula: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``formula`` of the two tails F(gap/eps) and F(-gap/eps), 1/2 each at a hard tie."""
    if scale is not None:
        law = _law(scale, smoothing)
        return formula(law(gap, 0.5), law(-gap, 0.5))

    def soft(s: Smoothing) -> Tensor:
        return formula(heaviside(gap, smoothing=s), heaviside(-gap, smoothing=s))

    def sampled(p: Smoothing) -> Tensor:
        up = heaviside(gap, smoothing=p)
        return formula(up, 1 - up)  # of the same noise

    bound = as_smoothing(smoothing, Entropy, 0.1)
    return bound.solve(Problem(lambda: soft(Hard()), soft, None, sampled))
