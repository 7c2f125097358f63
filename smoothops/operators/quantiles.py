"""Order statistics: single entries of the soft sort, or values between two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._axes import Dim, Rows, check_number, check_tensor, concrete
from ..regularizers import Mixing, Quadratic
from ..smoothing import Problem, SmoothingLike, as_smoothing
from .order import Strength, in_sorted_order, sorting

_TORCHS = (torch.float32, torch.float64)
INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")


def _sorting(x: Tensor, dim: Dim, where: Tensor | None) -> tuple[Rows, Problem, Strength]:
    rows, problem, strength = sorting(check_tensor(x), dim, False, where)
    if rows.n == 0:
        raise IndexError(f"cannot take an order statistic along dim {dim!r} of size 0 of shape {tuple(x.shape)}")
    return rows, problem, strength


def _count(rows: Rows, y: Tensor) -> Tensor:
    """The number of present items, (..., 1)."""
    if rows.present is None:
        return torch.full_like(y[..., :1], rows.n)
    return rows.present.sum(-1, keepdim=True).to(y.dtype)


def _sorted_rows(x: Tensor, dim: Dim, where: Tensor | None, smoothing: SmoothingLike) -> tuple[Rows, Tensor, Tensor]:
    """The soft sort as rows, smallest first, and the number of present items (..., 1)."""
    rows, problem, _ = _sorting(x, dim, where)
    y = as_smoothing(smoothing, Quadratic, Mixing(3.0)).solve(problem)
    return rows, y, _count(rows, y)


def _at(y: Tensor, index: Tensor, m: Tensor) -> Tensor:
    """The entry of each row at ``index`` (..., 1), NaN where no item is present."""
    index = torch.minimum(index.clamp(min=0), (m - 1).clamp(min=0)).long().expand(*y.shape[:-1], index.shape[-1])
    return torch.where(m > 0, y.gather(-1, index), torch.nan)


def _place(rows: Rows, q: Tensor, m: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The item at or below each level, and the part of the way from there to the next one: (..., levels)."""
    if weights is None:
        place = q * (m - 1).clamp(min=0)
        low = place.detach().floor()
        return low, place - low
    # an item of weight w stands for w copies at the places from ``first`` to ``first + w - 1``
    if concrete(weights) and not bool((weights >= 1).all()):
        raise ValueError(
            f"weights count copies and must be >= 1, got a minimum of {weights.min().item()}; rescale them"
        )
    w = in_sorted_order(rows, rows.like(weights, "weights"))
    total = w.cumsum(-1)
    first = total - w
    place = q * (total[..., -1:] - 1).clamp(min=0)
    low = (torch.searchsorted(first.detach().contiguous(), place.detach().contiguous(), right=True) - 1).clamp(min=0)
    low = torch.minimum(low, (m - 1).clamp(min=0).long())
    return low.to(q), (place - first.gather(-1, low) - w.gather(-1, low) + 1).clamp(0, 1)


def kthvalue(
    x: Tensor, k: int, dim: int = -1, keepdim: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft k-th smallest value: entry k of the soft :func:`sort`, k from 1 to n.

    Args:
        x: (..., n, ...).
        k: an int in [1, n].
        where: bool mask; NaN where fewer than k items are present.
        smoothing: as in :func:`sort`; a number has the unit 1/x.

    Returns: values only, one a row; positions come from ``rank``. Raises: ValueError for k out of range.
    Complexity: O(n log n) time, O(n) memory.

    Example:
        >>> so.kthvalue(torch.tensor([5.0, 1.0, 2.0]), 2, smoothing=1.0)
        tensor(2.6667)
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    rows, y, m = _sorted_rows(x, dim, where, smoothing)
    if not 1 <= k <= rows.n:
        raise ValueError(f"k = {k} is out of range for dim {dim} of size {rows.n}; expected 1 <= k <= {rows.n}")
    value = y[..., k - 1 : k]
    return rows.reduced(torch.where(m >= k, value, torch.nan), keepdim)


def median(
    x: Tensor, dim: Dim = None, keepdim: bool = False, *, where: Tensor | None = None, smoothing: SmoothingLike = None
) -> Tensor:
    """Soft median: the lower one for even n, as torch; entry ceil(n/2) of the soft :func:`sort`.

    ``dim`` is one dimension, a tuple, or None for all entries. The other arguments are those of :func:`kthvalue`; an
    all-absent row gives NaN. For the mean of the two middle ones see :func:`quantile` with q = 0.5.

    Example:
        >>> so.median(torch.tensor([5.0, 1.0, 2.0]), smoothing=1.0)
        tensor(2.6667)
    """
    rows, y, m = _sorted_rows(x, dim, where, smoothing)
    return rows.reduced(_at(y, ((m - 1) / 2).floor(), m), keepdim)


def quantile(
    x: Tensor, q: float | Tensor, dim: Dim = None, keepdim: bool = False, *, interpolation: str = "linear",
    where: Tensor | None = None, weights: Tensor | None = None, smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft quantile: the soft :func:`sort` at position q (n - 1), interpolated between its neighbours.

    Args:
        x: (..., n, ...).
        q: in [0, 1]: a number, a 0-d tensor, or a 1-d tensor, whose dimension then comes first; with gradient (linear).
        dim: one dimension, a tuple, or None for all entries.
        interpolation: torch's: "linear", "lower", "higher", "midpoint" or "nearest".
        where: bool mask; the quantile is that of the present items, NaN where there is none.
        weights: >= 1, broadcastable to x, with gradient: how often each item counts; they follow the hard order.
        smoothing: as in :func:`sort`; a number has the unit 1/x.

    Raises: ValueError for q outside [0, 1] or another interpolation. Complexity: O(n log n) time, O(n) memory.

    Example:
        >>> so.quantile(torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0.25, 0.5]), smoothing=1.0)
        tensor([2.1667, 2.6667])
    """
    check_number(q, "q")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    levels = q if isinstance(q, Tensor) else torch.tensor(float(q), dtype=torch.float64)
    if levels.ndim > 1:
        raise ValueError(f"q must be a number, a 0-d or a 1-d tensor, got shape {tuple(levels.shape)}")
    if concrete(levels) and not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"q must lie in [0, 1], got {q}")
    rows, problem, _ = _sorting(x, dim, where)
    q_wide = levels.to(rows.wide).reshape(-1)

    def interpolated(y: Tensor) -> Tensor:
        m = _count(rows, y)
        low, part = _place(rows, q_wide, m, weights)
        between = (part.detach() > 0).to(y)
        fraction = {
            "linear": part,
            "lower": torch.zeros_like(part),
            "higher": between,
            "midpoint": between / 2,
            "nearest": (low + part).detach().round() - low,  # halves to even, as torch
        }[interpolation]
        below, above = _at(y, low, m), _at(y, low + between, m)
        # lerp's two forms: exact at both ends; and never inf - inf where both neighbours are the same infinity
        gap = torch.where(above == below, 0, above - below)
        value = torch.where(fraction < 0.5, below + fraction * gap, above - (1 - fraction) * gap)
        return torch.where(fraction == 0, below, torch.where(fraction == 1, above, value))

    def hard() -> Tensor:
        y = problem.hard()
        if where is not None or weights is not None or interpolation != "linear":
            return interpolated(y)
        # in x's own dtype and by lerp, to round as torch.quantile does
        own = rows.dtype if rows.dtype in _TORCHS else rows.wide
        m, place = _count(rows, y), (q_wide.to(own) * (rows.n - 1)).expand(*y.shape[:-1], -1)
        below, above = (_at(y, p.to(y), m).to(own) for p in (place.detach().floor(), place.detach().ceil()))
        same = above == below  # equal infinities too, whose difference is NaN
        value = torch.lerp(torch.where(same, 0, below), torch.where(same, 0, above), place - place.detach().floor())
        return torch.where(same, below, value).to(y)

    def of(part: Callable[[Any], Tensor] | None) -> Callable[[Any], Tensor]:
        assert part is not None  # a sort has every part
        return lambda s: interpolated(part(s))

    bound = as_smoothing(smoothing, Quadratic, Mixing(3.0))
    value = bound.solve(Problem(hard, of(problem.soft), of(problem.relaxed), of(problem.sampled)))
    answers = [rows.reduced(value[..., i : i + 1], keepdim) for i in range(value.shape[-1])]
    if not answers:  # no level: as torch, an answer for none of them
        one = rows.reduced(rows.x.new_zeros(*rows.x.shape[:-1], 1), keepdim)
        return one.new_empty(0, *one.shape)
    return torch.stack(answers) if levels.ndim else answers[0]
