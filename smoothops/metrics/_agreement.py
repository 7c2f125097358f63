"""Metrics of agreement: whether two items stand in the same order by score as by label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._regularizer import Regularizer
from ..elementwise import sign
from ..smoothing import Hard, SmoothingLike
from ._lists import Lists, divide, root, total
from ._pairs import Values, over_pairs


def spearman(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Spearman's rank correlation: Pearson's correlation of the ranks of the scores and of the labels, in [-1, 1].

    Args:
        scores, labels: (..., list); the ranks of the labels are hard, equal ones share their mean rank.
        where: bool mask of the present items.
        weights: positive; an item of integer weight counts as so many copies.
        smoothing: of the ranks of the scores. A number eps, in the unit of the scores, means Quadratic(eps).

    Returns: reduced over the lists; 0 where all scores or all labels are equal; empty lists have 0 and do not enter
    the mean. Equal to scipy's ``spearmanr``. Complexity: O(n log n) time, O(n) memory.
    Raises: ValueError for shapes or weights out of range. Source: Blondel, Teboul, Berthet, Djolonga 2020.

    Example:
        >>> so.metrics.spearman(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.5000)
    """
    lists = Lists(scores, labels, where, weights)
    middle = (total(lists.weights, keepdim=True) + 1) / 2
    known = lists.ranks_of_labels() - middle

    def formula(o: Lists) -> Tensor:
        found = o.ranks(descending=False, weighted=True) - middle
        both, of_known = total(o.weights * found * known), total(o.weights * known.square())
        of_found = total(o.weights * found.square())
        # equal scores have no correlation; this scale gives them the value 0, and a finite gradient that parts them
        of_found = torch.where(of_found == 0, of_known, of_found)
        return divide(both, root(of_found) * root(of_known))

    return lists.evaluate(formula, smoothing, reduction)


def auc(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Area under the ROC curve: the share of the pairs of a relevant item (label > 0) and another that are in order.

    From ranks (Mann-Whitney): (sum of w rank over the relevant - W (W + 1)/2)/(W V), W and V the weight of the relevant
    items and of the others; in [0, 1]. Equal scores count 1/2; 1/2 where W or V is 0. Arguments as in :func:`spearman`.
    Equal to scikit-learn's ``roc_auc_score``. Complexity: O(n log n) time, O(n) memory.

    Example:
        >>> so.metrics.auc(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 0]))
        tensor(0.5000)
    """
    lists = Lists(scores, labels, where, weights)
    positive = lists.weights * lists.relevant
    w, v = total(positive), total(lists.weights * ~lists.relevant)

    def formula(o: Lists) -> Tensor:
        # relative to the least rank sum before adding up, which would cancel
        least = (w + 1).unsqueeze(-1) / 2
        return divide(total(positive * (o.ranks(descending=False, weighted=True) - least)), w * v, 0.5)

    return lists.evaluate(formula, smoothing, reduction)


def kendall(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Kendall's tau-b: sum_ij w_ij S_ij L_ij / sqrt(sum_ij w_ij S_ij^2 sum_ij w_ij L_ij^2), in [-1, 1].

    S_ij = sign(score_i - score_j), L_ij = sign(label_i - label_j), w_ij = w_i w_j. Soft: S is the soft sign, its eps in
    the unit of the scores (None: that of the soft ranks). Takes Quadratic, Entropy, Laplace, BinaryEntropy, Perturbed.
    0 where all scores or all labels are equal. Arguments as in :func:`spearman`; equal to scipy's ``kendalltau``.
    Complexity: O(n^2) time, O(n) memory (second derivatives, transforms and compiled code O(n^2)).

    Example:
        >>> so.metrics.kendall(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.3333)
    """
    lists = Lists(scores, labels, where, weights)

    def formula(o: Lists) -> Tensor:
        step = _Step(o)

        def term(i: Values, j: Values, shared: Values) -> Values:
            w, s = i[2] * j[2], step(i[0], j[0], shared)
            t = torch.sign(i[1] - j[1])
            return w * s * t, w * s.square(), w * t.square()

        both, of_s, of_l = (total(v) for v in over_pairs(term, (o.scores, o.labels, o.weights), step.shared))
        of_s = torch.where(of_s == 0, of_l, of_s)  # as in spearman
        return divide(both, root(of_s) * root(of_l))

    return lists.evaluate(formula, smoothing, reduction)


def pairwise_accuracy(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Pairwise accuracy: the share of the pairs with label_i > label_j, by weight w_i w_j, with score_i > score_j.

    Equal scores count 1/2; 1/2 where all labels are equal. For two labels it is :func:`auc`. Smoothing and complexity
    as in :func:`kendall`, arguments as in :func:`spearman`.

    Example:
        >>> so.metrics.pairwise_accuracy(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.6667)
    """
    lists = Lists(scores, labels, where, weights)

    def formula(o: Lists) -> Tensor:
        step = _Step(o)

        def term(i: Values, j: Values, shared: Values) -> Values:
            w = i[2] * j[2] * (i[1] > j[1])
            return w * step(i[0], j[0], shared), w

        agree, pairs = (total(v) for v in over_pairs(term, (o.scores, o.labels, o.weights), step.shared))
        return (1 + divide(agree, pairs)) / 2

    return lists.evaluate(formula, smoothing, reduction)


class _Step:
    """The sign of a difference of scores under the smoothing of the lists."""

    def __init__(self, lists: Lists) -> None:
        self.smoothing: Any = lists.fixed
        soft = isinstance(self.smoothing, Regularizer)
        self.shared: Values = (lists.rows.parameter(self.smoothing.eps, "eps"),) if soft else ()

    def __call__(self, a: Tensor, b: Tensor, shared: Values) -> Tensor:
        gap = a - b
        gap = torch.where(gap.isnan(), 0, gap)  # equal infinities
        soft = self.smoothing.at(shared[0], self.smoothing.shape) if shared else self.smoothing
        return sign(gap, smoothing=soft)
