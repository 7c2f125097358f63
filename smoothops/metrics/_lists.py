"""Scored lists: what every ranking metric asks of them, hard or soft.

A metric is one formula in terms of ranks, places and pairs; the smoothing decides what these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._axes import Rows, check_tensor, concrete, lazy, row_sum
from .._reduction import check_reduction, reduce
from .._regularizer import Mixing, Regularizer
from ..operators import mixing_eps, rank, topk_mask
from ..operators.order import descending_order
from ..polytopes._dual import Blocks
from ..regularizers import Quadratic
from ..smoothing import Hard, Problem, Smoothing, SmoothingLike, as_smoothing

Discount = Callable[[Tensor], Tensor]


class Lists:
    """Scores, labels, weights and the mask ``present``, all (..., n), in the wide dtype; absent items have 0 in each.

    ``smoothing`` is Hard or a regularizer: how the scores are put in order.
    """

    def __init__(self, scores: Tensor, labels: Tensor, where: Tensor | None, weights: Tensor | None) -> None:
        scores, labels = check_tensor(scores, "scores"), check_tensor(labels, "labels")
        if scores.ndim == 0 or labels.shape != scores.shape:
            raise ValueError(
                "scores and labels must have the same shape (..., list), got "
                f"{tuple(scores.shape)} and {tuple(labels.shape)}"
            )
        self.rows = Rows(scores, -1, where)
        self.dtype, self.n, self.mask = scores.dtype, scores.shape[-1], self.rows.present
        # what only NaN and absent items need is left out where it can be seen that there are none
        self.clean = concrete(scores) and not bool(self.rows.bad.any())
        self.scores = self.kept(self.rows.given.to(self.rows.wide)) if self.clean else self.rows.x
        self.labels = self.kept(self.rows.like(labels, "labels"))
        self.heavy = None if weights is None else self._weights(weights)
        self.smoothing: Smoothing = Hard()

    def _weights(self, weights: Tensor) -> Tensor:
        """Positive weights (..., n), 1 for absent items."""
        values = torch.where(self.present, self.rows.like(weights, "weights"), 1)
        if concrete(values) and not bool((values > 0).all()):
            raise ValueError(
                f"weights must be positive where an item is present, got {values.min().item()}; leave items out by "
                "where="
            )
        return values

    def kept(self, v: Tensor) -> Tensor:
        """v (..., n), 0 for absent items."""
        return v if self.mask is None else torch.where(self.mask, v, 0)

    def weighed(self, v: Tensor) -> Tensor:
        """v (..., n) times the weights, 0 for absent items."""
        return self.kept(v if self.heavy is None else self.heavy * v)

    @lazy
    def present(self) -> Tensor:
        return torch.ones_like(self.scores, dtype=torch.bool) if self.mask is None else self.mask

    @lazy
    def weights(self) -> Tensor:
        return self.weighed(torch.ones_like(self.scores))

    @lazy
    def relevant(self) -> Tensor:
        return self.labels > 0

    @lazy
    def size(self) -> Tensor:
        """The number of present items, (...)."""
        return total(self.present.to(self.rows.wide))

    # --- from a formula to a metric -----------------------------------------------------------------------------------

    def at(self, scores: Tensor) -> Lists:
        """The same lists with other scores (samples, ..., n)."""
        other = self.under(self.smoothing)
        for name in ("mask", "labels", "heavy"):
            given = getattr(self, name)
            setattr(other, name, given if given is None else given.expand_as(scores))
        other.scores = other.kept(scores)
        return other

    def under(self, smoothing: Smoothing) -> Lists:
        other = Lists.__new__(Lists)
        other.__dict__.update({name: v for name, v in vars(self).items() if not name.startswith("_made")})
        other.smoothing = smoothing
        return other

    def evaluate(self, formula: Callable[[Lists], Tensor], smoothing: SmoothingLike, reduction: str) -> Tensor:
        """``formula`` (...), reduced: an empty list has the value 0 and does not enter the mean.

        Perturbed averages the hard formula over noise; StraightThrough takes its value and a soft one's gradient.
        """
        check_reduction(reduction)

        def sampled(p: Any) -> Tensor:
            theta, eps = self.rows.lowered(), self.rows.parameter(p.eps, "eps")
            value = p.average(theta, lambda v: formula(self.at(v)).unsqueeze(-1), eps)
            return value.squeeze(-1)

        def soft(smoothing: Any) -> Tensor:
            chosen = isinstance(getattr(smoothing, "eps", None), Mixing)
            return formula((self._scale_free() if chosen else self).under(smoothing))

        if self.n == 0:
            value = self.scores.sum(-1)
        else:
            bound = as_smoothing(smoothing, Quadratic, Mixing(3.0))
            value = bound.solve(Problem(lambda: formula(self.under(Hard())), soft, None, sampled))
        return self.result(value, reduction)

    def result(self, value: Tensor, reduction: str) -> Tensor:
        """``value`` (...), 0 for empty lists, reduced, in the dtype of the scores."""
        if not self.clean:
            value = self.rows.poisoned_value(value.unsqueeze(-1)).squeeze(-1)
        if self.mask is None and self.n > 0:
            return reduce(value.to(self.dtype), reduction)
        counted = self.size > 0
        return reduce(torch.where(counted, value, 0).to(self.dtype), reduction, counted)

    def _scale_free(self) -> Lists:
        """The same scores, with a gradient that does not change their spread.

        ``Mixing`` chooses an eps that grows with the spread of the scores, so that the value does not depend on it. A
        gradient at fixed eps has a part along it all the same, which would shrink (or stretch) the scores without end:
        it is taken out, u (u'g)/|u|^2 with u the direction in which the scores differ.
        """
        x, scores = self.scores.detach(), self.scores
        if self.mask is None and concrete(x) and bool(x.isfinite().all()):
            around = x - total(x, keepdim=True) / self.n
        else:
            finite = x.isfinite() if self.mask is None else x.isfinite() & self.mask
            x, scores = torch.where(finite, x, 0), torch.where(finite, scores, 0)
            mean = divide(total(x, keepdim=True), total(finite.to(x.dtype), keepdim=True))
            around = torch.where(finite, x - mean, 0)
        share = around / total(around.square(), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        along = total(share * scores, keepdim=True)
        other = self.under(self.smoothing)
        other.scores = self.scores - around * (along - along.detach())
        return other

    # --- the order of the scores --------------------------------------------------------------------------------------

    @lazy
    def hard(self) -> bool:
        return isinstance(self.smoothing, Hard)

    @lazy
    def fixed(self) -> Smoothing:
        """The smoothing with its strength, where that is ``Mixing``, chosen once, from the ranks in the whole list."""
        reg: Any = self.smoothing
        if not (isinstance(reg, Regularizer) and isinstance(reg.eps, Mixing)):
            return reg
        given = {} if self.heavy is None else {"weights": self.heavy}
        eps = mixing_eps(rank, self.scores.detach(), reg.eps.inputs, smoothing=reg, where=self.mask, **given)
        return reg.at(eps, reg.shape)

    def ranks(
        self, among: Tensor | None = None, *, descending: bool = True, weighted: bool = False, fixed: bool = False
    ) -> Tensor:
        """Ranks (..., n) among the items marked by ``among``, or all; equal scores share the mean; 0 for the others.

        ``weighted``: mid-ranks of the cumulative weights. ``fixed``: under :attr:`fixed`.
        """
        where, weights = self.mask if among is None else among, self.heavy if weighted else None
        smoothing = self.fixed if fixed else self.smoothing
        return rank(self.scores, -1, descending, weights=weights, where=where, smoothing=smoothing)

    def first(self, among: Tensor) -> Tensor:
        """Weights (..., n), summing to 1, that choose the best of the items marked by ``among``; 0 if none is."""
        return topk_mask(self.scores, 1, where=among, smoothing=self.smoothing)

    def _runs(self, among: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Blocks]:
        """The order of the marked items, best first, the others last, and its runs of equal scores, weighted."""
        order, _ = descending_order(Rows(self.scores, -1, among))
        there = among.gather(-1, order)
        x = self.scores.detach().gather(-1, order)
        changes = (x[..., 1:] != x[..., :-1]) | (there[..., 1:] != there[..., :-1])
        weights = None if weights is None else weights.gather(-1, order)
        return order, Blocks.given(torch.cat([torch.ones_like(there[..., :1]), changes], -1), weights)

    def ranks_of_labels(self) -> Tensor:
        """Hard ascending mid-ranks (..., n) of the labels, equal ones sharing their mean, with gradient in weights."""
        order, runs = self.at(self.labels)._runs(self.present, self.heavy)
        weights = self.weights.gather(-1, order)
        ranks = total(weights, keepdim=True) - weights.cumsum(-1) + weights / 2 + 0.5
        ranks = torch.zeros_like(ranks).scatter(-1, order, runs.centre(ranks)[1])
        return self.kept(torch.where(self.labels.isnan(), torch.nan, ranks))

    def places(self, discount: Discount | None, k: int | None) -> Tensor:
        """discount(rank) 1[rank <= k] (..., n), 0 for absent items.

        Hard: equal scores share the mean over the places that they take. Soft: the discount at the soft rank, times the
        soft top-k mask.
        """
        cut = self.n if k is None else min(k, self.n)
        if self.hard:
            order, runs = self._runs(self.present)
            place = torch.arange(1, self.n + 1, dtype=self.scores.dtype, device=self.scores.device)
            value = torch.where(place <= cut, torch.ones_like(place) if discount is None else discount(place), 0)
            shared = runs.centre(value.expand(order.shape))[1]
            return torch.where(self.present, torch.zeros_like(self.scores).scatter(-1, order, shared), 0)
        if discount is None:
            weight = self.present.to(self.scores.dtype)
        else:
            ranks = self.ranks()
            weight = self.kept(discount(ranks if self.mask is None else torch.where(self.mask, ranks, 1)))
        if cut < self.n or discount is None:
            weight = weight * topk_mask(self.scores, cut, where=self.mask, smoothing=self.smoothing)
        return weight

    def at_or_above(self, among: Tensor) -> Tensor:
        """The weight of the items marked by ``among`` that score as high as each of them, or higher; 1 for the others.

        Hard: equal scores count in full, each has the rank of the last. Soft: the soft weighted rank.
        """
        tied = self.weights
        if self.hard:
            order, runs = self._runs(among)
            tied = runs.sum(torch.where(among, self.weights, 0).gather(-1, order))
            tied = torch.zeros_like(tied).scatter(-1, order, tied)
        # the mid-rank of a run of weight t that begins above the weight w is w + t/2 + 1/2
        return torch.where(among, self.ranks(among, weighted=True, fixed=True) + (tied - 1) / 2, 1)


def total(v: Tensor, keepdim: bool = False) -> Tensor:
    """The sum over a list, which does not depend on the number of lists."""
    return row_sum(v) if keepdim else row_sum(v).squeeze(-1)


def root(v: Tensor) -> Tensor:
    """The square root, 0 at 0 with gradient 0."""
    return torch.where(v > 0, torch.where(v > 0, v, 1).sqrt(), 0)


def divide(a: Tensor, b: Tensor, otherwise: float = 0.0) -> Tensor:
    """a/b, and ``otherwise`` where b is 0, with finite gradients."""
    usable = b != 0
    return torch.where(usable, a / torch.where(usable, b, 1), otherwise)


def check_k(k: int | None) -> None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k must be an int, or None for the whole list, got {k!r}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, or None for the whole list, got {k}")
