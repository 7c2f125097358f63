"""Orders: rank, sort and top-k values over the permutahedron, isotonic regression over the monotone cone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._axes import Dim, Rows, check_tensor, lazy, normalize_dims, single_dim
from .._regularizer import FAMILIES, Mixing, Regularizer, check_positive
from ..lapsum import LapSum
from ..polytopes import OrderPolytope, Permutahedron
from ..polytopes._traced import ANSWERS
from ..polytopes.base import check_role
from ..polytopes.permutahedron import Sorted
from ..regularizers import Quadratic
from ..relaxations import Relaxation
from ..smoothing import Problem, SmoothingLike, as_smoothing
from ..stochastic import Perturbed
from ._matched import Matched
from ._placed import Placed

Strength = Callable[[Regularizer], Tensor]
Solver = type[Sorted] | type[LapSum]

# what computes a soft order, by the role that the regularizer plays in it
_SOLVERS: dict[str, Solver] = {Permutahedron.role: Sorted, "cdf": LapSum}


def _solver(reg: Regularizer, name: str) -> Solver:
    return _SOLVERS[check_role(reg, _SOLVERS, name)]


# --- an order: the permutahedron -------------------------------------------------------------------------------------


def sort(
    x: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, *, where: Tensor | None = None,
    fill: float = torch.nan, smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft sort: y = argmax <rho, y> - eps Omega(y) over the permutahedron of x, rho = (1, ..., n).

    Args:
        x: (..., n, ...).
        descending: largest first, the flip of ascending.
        stable: accepted; ties are always differentiated along the stable order.
        where: bool mask; the present items come sorted, then ``fill`` in place of the absent ones.
        smoothing: a number eps, in the unit 1/x, means Quadratic(eps): equal to torch.sort iff all gaps are <= 1/eps.
            None: Quadratic(Mixing(3.0)), eps from the data. Entropy: log argmax over the permutahedron of e^x; with
            solver=Sinkhorn(): P x, P the soft :func:`argsort` on Birkhoff's polytope, eps in the unit of x.
            Laplace(eps), eps in the unit of x: the inverse of a sum of Laplace laws. SoftSort, NeuralSort and
            SortingNetwork, eps in the unit of x. Perturbed: noise on rho, eps in positions. Or Hard.

    Returns: values, a tensor like torch.msort. Quadratic keeps the sum; infinities stay exact and carry no gradient.
    Raises: ValueError for a smoothing that does not sort. Complexity: O(n log n) time, O(n) memory.
    Source: Blondel, Teboul, Berthet, Djolonga 2020, "Fast differentiable sorting and ranking".

    Example:
        >>> so.sort(torch.tensor([5.0, 1.0, 2.0]), smoothing=1.0)
        tensor([1.6667, 2.6667, 3.6667])
    """
    rows, problem, _ = sorting(x, single_dim(dim), descending, where)
    y = as_smoothing(smoothing, Quadratic, Mixing(3.0)).solve(problem)
    if rows.present is not None:
        m = rows.present.sum(-1, keepdim=True)
        y = torch.where(torch.arange(rows.n, device=y.device) < m, y, fill)
    return rows.restore(y)


class _Sorting:
    """The sort of rows as a programme in theta = rho over the permutahedron of x."""

    def __init__(self, rows: Rows, descending: bool) -> None:
        self.rows, self.descending = rows, descending

    @lazy
    def _ordered(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rho, w, present), none of them increasing."""
        order, present = descending_order(self.rows, stable_ascending=not self.descending)
        return positions(self.rows, present), self.rows.x.gather(-1, order), present

    def _arranged(self, y: Tensor) -> Tensor:
        return self.rows.poisoned(y if self.descending else ascending(y, self._ordered[2]))

    def hard(self) -> Tensor:
        return self._arranged(self._ordered[1])

    def plain(self, reg: Regularizer) -> Tensor:
        if reg.solver is not None:
            return self.relaxed(Matched(reg))
        return self._arranged(_solver(reg, "sort")(*self._ordered).solve(self.rows, reg))

    def soft(self, reg: Regularizer) -> Tensor:
        if reg.solver is not None:
            return self.plain(reg)
        again = lambda x, r: _Sorting(Rows(x), self.descending).plain(r)  # noqa: E731
        y = _solver(reg, "sort").fused(self.rows, False, self.descending, reg, again)
        return self.plain(reg) if y is None else y

    def relaxed(self, r: Relaxation) -> Tensor:
        return self.rows.poisoned(Placed(self.rows, self.descending).values(r))

    def sampled(self, p: Perturbed) -> Tensor:
        return self.rows.poisoned(Placed(self.rows, self.descending).mean_values(p))

    def strength(self, reg: Regularizer) -> Tensor:
        return _solver(reg, "sort")(*self._ordered).solve_strength(self.rows, reg)


def sorting(x: Tensor, dim: Dim, descending: bool, where: Tensor | None) -> tuple[Rows, Problem, Strength]:
    """The sort of x: answers (..., n), in x's dtype or a wider one."""
    rows = Rows(x, dim, where)
    problem = _Sorting(rows, descending)
    return rows, Problem(problem.hard, problem.soft, problem.relaxed, problem.sampled), problem.strength


def rank(
    x: Tensor, dim: int = -1, descending: bool = False, *, weights: Tensor | None = None, where: Tensor | None = None,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft ranks: y = argmax <x, y> - eps Omega(y) over the permutahedron of (1, ..., n).

    Args:
        x: (..., n, ...).
        descending: the largest has rank 1: ``rank(-x)``.
        weights: positive, broadcastable to x; an integer weight counts as so many copies (Quadratic, Perturbed, Hard).
        where: bool mask; the ranks run over the present items, absent ones have rank 0.
        smoothing: a number eps, in the unit of x, means Quadratic(eps): equal to hard ranks iff all gaps are >= eps.
            None: Quadratic(Mixing(3.0)), eps from the data. Also Entropy (with solver=Sinkhorn(): P' rho, P the soft
            :func:`argsort` on Birkhoff's polytope), Laplace, Perturbed, Hard (ties averaged).

    Returns: ranks in [1, n], the smallest 1 unless descending; they sum to n (n + 1)/2. Infinities are extremes.
    Raises: ValueError for a smoothing that does not rank, or weights <= 0. Complexity: O(n log n) time, O(n) memory.
    Source: Blondel, Teboul, Berthet, Djolonga 2020, "Fast differentiable sorting and ranking".

    Example:
        >>> so.rank(torch.tensor([5.0, 1.0, 2.0]), smoothing=2.0)
        tensor([3.0000, 1.2500, 1.7500])
    """
    rows, problem, _ = _ranking(x, dim, descending, weights, where)
    return rows.restore(as_smoothing(smoothing, Quadratic, Mixing(3.0)).solve(problem))


class _Ranking:
    """The ranks of rows as a programme in theta = x, or -x if descending, over the permutahedron of the positions."""

    def __init__(self, rows: Rows, descending: bool, weights: Tensor | None) -> None:
        self.rows, self.descending, self.weights = rows, descending, weights

    @lazy
    def _order(self) -> tuple[Tensor, Tensor | None]:
        return descending_order(self.rows, negated=self.descending)

    @lazy
    def _ordered(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(theta, rho, present, weights), theta and rho not increasing."""
        order, present = self._order
        theta = self.rows.x.gather(-1, order)
        w = None if self.weights is None else self.rows.like(self.weights, "weights").expand_as(order).gather(-1, order)
        return -theta if self.descending else theta, positions(self.rows, present, w), present, w

    def _back(self, y: Tensor) -> Tensor:
        return self.rows.poisoned(torch.zeros_like(self.rows.x).scatter(-1, self._order[0], y))

    def hard(self) -> Tensor:
        return self._back(Sorted(*self._ordered).ties(self._ordered[1]).detach())

    def sampled(self, p: Perturbed) -> Tensor:
        def ranks(v: Tensor) -> Tensor:
            return _Ranking(self.rows.at(v), self.descending, self.weights).hard()

        return self.rows.poisoned(p.average(self.rows.lowered(), ranks, self.rows.parameter(p.eps, "eps")))

    def plain(self, reg: Regularizer) -> Tensor:
        if reg.solver is not None:
            return self._matched(reg)
        return self._back(_solver(reg, "rank")(*self._ordered).argmax(self.rows, reg))

    def _matched(self, reg: Regularizer) -> Tensor:
        """P' rho, P the soft argsort over Birkhoff's polytope."""
        matrix = Placed(self.rows, self.descending).matrix(Matched(reg))
        place = torch.arange(1, self.rows.n + 1, dtype=matrix.dtype, device=matrix.device)
        return self.rows.poisoned((place.unsqueeze(-1) * matrix).sum(-2))

    def soft(self, reg: Regularizer) -> Tensor:
        solver = _solver(reg, "rank")
        if self.weights is not None:
            if not isinstance(reg, Quadratic):
                raise ValueError(f"weights in rank need Quadratic, Perturbed or Hard, got {type(reg).__name__}")
            return self.plain(reg)
        if reg.solver is not None:
            return self.plain(reg)
        again = lambda x, r: _Ranking(Rows(x), self.descending, None).plain(r)  # noqa: E731
        y = solver.fused(self.rows, True, self.descending, reg, again)
        return self.plain(reg) if y is None else y

    def strength(self, reg: Regularizer) -> Tensor:
        return _solver(reg, "rank")(*self._ordered).argmax_strength(self.rows, reg)


def _answer(
    x: Tensor, eps: Any, k: Any, alpha: Any, name: str, ranks: str, descending: str, family: str, inputs: str
) -> Tensor:
    reg = FAMILIES[family].make(Mixing(float(inputs)) if eps is None else eps, alpha)
    return (rank if ranks == "1" else sort)(x, -1, descending == "1", smoothing=reg)


ANSWERS["order"] = _answer


def _ranking(
    x: Tensor, dim: int, descending: bool, weights: Tensor | None, where: Tensor | None
) -> tuple[Rows, Problem, Strength]:
    """The ranks of x: answers (..., n), in x's dtype or a wider one."""
    rows = Rows(x, single_dim(dim), where)
    if weights is not None:
        check_positive(weights, "weights", zero=False)
    problem = _Ranking(rows, descending, weights)
    return rows, Problem(problem.hard, problem.soft, None, problem.sampled), problem.strength


def topk(
    x: Tensor, k: int | Tensor, dim: int = -1, largest: bool = True, sorted: bool = True, *,
    where: Tensor | None = None, fill: float = torch.nan, smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft top-k values: the first k of the soft :func:`sort`, largest first.

    Args:
        x: (..., n, ...).
        k: how many, an int in [0, n]; or an integer tensor, 0-d or of size 1 along ``dim``: one k a row.
        largest: False for the k smallest, smallest first.
        sorted: accepted; the values are always sorted.
        where, fill: bool mask, and the value in place of missing items where a row has fewer (or asks for fewer).
        smoothing: as in :func:`sort`; a number has the unit 1/x.

    Returns: values (..., k, ...), the largest k of all rows. For weights over the items see :func:`topk_mask`.
    Raises: ValueError for k out of range. Complexity: O(n log n) time, O(n) memory.

    Example:
        >>> so.topk(torch.tensor([5.0, 1.0, 2.0]), 2, smoothing=1.0)
        tensor([3.6667, 2.6667])
    """
    x = check_tensor(x)
    most = check_count(x, k, dim)
    values = sort(x, dim, largest, where=where, fill=fill, smoothing=smoothing)
    if x.ndim == 0:
        return values.reshape(1)[:most].reshape(() if most else (0,))
    values = values.narrow(dim, 0, most)
    if isinstance(k, Tensor):
        shape = [1] * x.ndim
        shape[dim] = most
        place = torch.arange(most, device=x.device).reshape(shape)
        values = torch.where(place < k, values, fill)
    return values


def check_count(x: Tensor, k: int | Tensor, dim: int) -> int:
    """The largest of the counts k, checked against the size of ``dim``."""
    (axis,) = normalize_dims(single_dim(dim), x.ndim) or (0,)
    n = x.shape[axis] if x.ndim else 1
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"k must be an integer tensor, got dtype {k.dtype}; for fractional k see topk_mask")
        fits = k.ndim == 0 or (k.ndim == x.ndim and k.shape[axis] == 1)
        if not fits or any(k.shape[d] not in (1, x.shape[d]) for d in range(k.ndim)):
            raise ValueError(f"k of shape {tuple(k.shape)} does not fit x of shape {tuple(x.shape)} along dim {dim}")
        low, high = (int(k.min()), int(k.max())) if k.numel() else (0, 0)
    elif isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int or an integer tensor, got {k!r}; for fractional k see topk_mask")
    else:
        low = high = k
    if not 0 <= low <= high <= n:
        raise ValueError(
            f"k = {low if low < 0 else high} is out of range for dim {dim} of size {n}; expected 0 <= k <= {n}"
        )
    return high


def isotonic(x: Tensor, dim: int = -1, decreasing: bool = False, *, weights: Tensor | None = None) -> Tensor:
    """Isotonic regression: argmin sum_i weights_i (y_i - x_i)^2 over y_1 <= ... <= y_n (>= if ``decreasing``).

    Args:
        x: (..., n, ...).
        weights: positive, broadcastable to x, with gradient; 1 by default.

    Returns: the fit, shaped like x. NaN or an infinity in a row gives NaN in that row.
    Raises: ValueError for weights <= 0. Complexity: O(n). Source: Best, Chakravarti 1990.

    Example:
        >>> so.isotonic(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    rows = Rows(x, single_dim(dim))
    w = None
    if weights is not None:
        check_positive(weights, "weights", zero=False)
        w = rows.like(weights, "weights")
    return rows.restore(rows.poisoned(OrderPolytope(decreasing).project(rows.x, w)))


def descending_order(rows: Rows, stable_ascending: bool = False, negated: bool = False) -> tuple[Tensor, Tensor | None]:
    """The permutation that puts the largest (of -x if negated) first and absent items last, and ``present`` so."""
    x = -rows.x.detach() if negated else rows.x.detach()
    if stable_ascending:  # the flip of a stable ascending order, so that ties end up in order once flipped back
        order = x.argsort(dim=-1, stable=True).flip(-1)
    else:
        order = x.argsort(dim=-1, descending=True, stable=True)
    if rows.present is None:
        return order, None
    absent = (~rows.present).gather(-1, order)
    order = order.gather(-1, absent.to(torch.int8).argsort(dim=-1, stable=True))
    return order, rows.present.gather(-1, order)


def in_sorted_order(rows: Rows, v: Tensor) -> Tensor:
    """v (..., n), one number an item, in the stable ascending order of the rows; absent items are last, and 0."""
    order, present = descending_order(rows, stable_ascending=True)
    v = v.gather(-1, order)
    return ascending(v if present is None else torch.where(present, v, 0), present)


def ascending(y: Tensor, present: Tensor | None) -> Tensor:
    """Rows with the largest first and absent items last, turned to the smallest first and absent items last."""
    if present is None:
        return y.flip(-1)
    m = present.sum(-1, keepdim=True)
    index = torch.arange(y.shape[-1], device=y.device)
    return y.gather(-1, torch.where(index < m, m - 1 - index, index))


def positions(rows: Rows, present: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """rho = (m, ..., 1) for the m present items, largest first; mid-ranks of the cumulative weight if weighted."""
    if weights is not None:
        weights = weights if present is None else torch.where(present, weights, 0)
        return weights.sum(-1, keepdim=True) - weights.cumsum(-1) + weights / 2 + 0.5
    rho = torch.arange(rows.n, 0, -1, dtype=rows.wide, device=rows.device)
    if present is None:
        return rho.expand_as(rows.x)
    return (rho - (rows.n - present.sum(-1, keepdim=True))).clamp(min=0)
