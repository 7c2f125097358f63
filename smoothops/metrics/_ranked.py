"""Metrics of a ranked list: how far up its relevant items stand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..smoothing import Hard, SmoothingLike
from ._lists import Lists, check_k, divide, total

Gain = Callable[[Tensor], Tensor]


def linear_gain(labels: Tensor) -> Tensor:
    """The gain of a graded label, the label itself: of Jarvelin and Kekalainen 2002, and of scikit-learn.

    Example:
        >>> so.metrics.linear_gain(torch.tensor([0.0, 1.0, 3.0]))
        tensor([0., 1., 3.])
    """
    return labels


def exponential_gain(labels: Tensor) -> Tensor:
    """The gain 2^label - 1 of a graded label: of Burges et al. 2005.

    Example:
        >>> so.metrics.exponential_gain(torch.tensor([0.0, 1.0, 3.0]))
        tensor([0., 1., 7.])
    """
    return torch.exp2(labels) - 1


def log2_discount(ranks: Tensor) -> Tensor:
    """The discount 1/log2(1 + rank) of a place.

    Example:
        >>> so.metrics.log2_discount(torch.tensor([1.0, 3.0]))
        tensor([1.0000, 0.5000])
    """
    return 1 / torch.log2(1 + ranks)


def gains_of(lists: Lists, gain: Gain) -> Tensor:
    return lists.weighed(gain(lists.labels))


def ideal_dcg(gains: Tensor, discount: Callable[[Tensor], Tensor], k: int | None) -> Tensor:
    """The DCG (...) of the best order: the largest gain first."""
    place = torch.arange(1, gains.shape[-1] + 1, dtype=gains.dtype, device=gains.device)
    value = discount(place) if k is None else torch.where(place <= k, discount(place), 0)
    return total(gains.sort(-1, descending=True).values * value)


def dcg(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Discounted cumulative gain: sum_i w_i gain(label_i) discount(rank_i) 1[rank_i <= k], rank 1 the highest score.

    Args:
        scores, labels: (..., list); labels graded, >= 0.
        k: cut-off, None for the whole list.
        where: bool mask of the present items. weights: positive, one an item; they multiply its gain.
        gain, discount: functions of the labels and of ranks, which may be fractional; discount convex and decreasing.
        smoothing: of the ranks and of the cut-off. A number eps, in the unit of the scores, means Quadratic(eps).

    Returns: reduced over the lists; empty lists have 0 and do not enter the mean. Equal scores share the mean discount
    of their places (soft: the discount of their mean rank). Complexity: O(n log n) time, O(n) memory.
    Raises: ValueError for shapes, k or weights out of range. Source: Jarvelin, Kekalainen 2002.

    Example:
        >>> so.metrics.dcg(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(2.2619)
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    gains = gains_of(lists, gain)
    return lists.evaluate(lambda o: total(gains * o.places(discount, k)), smoothing, reduction)


def ndcg(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount,
    smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Normalized discounted cumulative gain: :func:`dcg` over that of the best order, in [0, 1].

    Arguments as in :func:`dcg`. Without a gain above 0 in a list it is 0. Equal to scikit-learn's ``ndcg_score``.
    Complexity: O(n log n) time, O(n) memory. Source: Jarvelin, Kekalainen 2002; Qin et al. 2010 for the discount at a
    smoothed rank.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.metrics.ndcg(scores, labels), so.metrics.ndcg(scores, labels, smoothing=1.0)
        (tensor(0.8597), tensor(0.7448))
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    gains = gains_of(lists, gain)
    ideal = ideal_dcg(gains, discount, k)
    return lists.evaluate(lambda o: divide(total(gains * o.places(discount, k)), ideal), smoothing, reduction)


def precision_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Precision at k: sum_i w_i 1[label_i > 0] 1[rank_i <= k] / k; weights multiply the relevance.

    A list shorter than k is divided by its own length. Equal scores share the places that remain up to k.
    Other arguments as in :func:`dcg`; soft, it is <relevance, topk_mask>/k. Complexity: O(n log n).

    Example:
        >>> so.metrics.precision_at_k(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]), k=2)
        tensor(0.5000)
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    relevance = lists.weighed(lists.relevant.to(lists.scores.dtype))
    shown = lists.size if k is None else lists.size.clamp(max=k)
    return lists.evaluate(lambda o: divide(total(relevance * o.places(None, k)), shown), smoothing, reduction)


def recall_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Recall at k: the share of the relevant items (label > 0), by weight, that have rank <= k; 0 if there are none.

    Equal scores share the places that remain up to k. Other arguments as in :func:`dcg`; soft, it is
    <relevance, topk_mask>/sum(relevance). Complexity: O(n log n).

    Example:
        >>> so.metrics.recall_at_k(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]), k=2)
        tensor(0.5000)
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    relevance = lists.weighed(lists.relevant.to(lists.scores.dtype))
    return lists.evaluate(
        lambda o: divide(total(relevance * o.places(None, k)), total(relevance)), smoothing, reduction
    )


def hit_rate_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Hit rate at k: whether the best relevant item (label > 0) has rank <= k; 0 if there is none.

    Times its weight, if there are weights. Soft: <p, topk_mask>, p the soft choice of the best relevant item. Equal
    scores share the places that remain up to k. Other arguments as in :func:`dcg`. Complexity: O(n log n).

    Example:
        >>> so.metrics.hit_rate_at_k(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]), k=2)
        tensor(1.)
    """
    return _best(scores, labels, k, where, weights, None, smoothing, reduction)


def reciprocal_rank(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Reciprocal rank of the best relevant item (label > 0), 0 if there is none or its rank is above k; in [0, 1].

    Times its weight, if there are weights. Soft: sum_i p_i/rank_i, p the soft choice of the best relevant item. Equal
    scores share the mean of 1/rank over their places. Other arguments as in :func:`dcg`. Complexity: O(n log n).

    Example:
        >>> so.metrics.reciprocal_rank(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]))
        tensor(0.5000)
    """
    return _best(scores, labels, k, where, weights, torch.reciprocal, smoothing, reduction)


def _best(
    scores: Tensor, labels: Tensor, k: int | None, where: Tensor | None, weights: Tensor | None,
    discount: Gain | None, smoothing: SmoothingLike, reduction: str,
) -> Tensor:  # fmt: skip
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    return lists.evaluate(
        lambda o: total(o.weights * o.first(o.relevant) * o.places(discount, k)), smoothing, reduction
    )


def average_precision(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, smoothing: SmoothingLike = Hard(), reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Average precision: the mean over the relevant items (label > 0) of rank among the relevant / rank; 0 if none.

    k: items below rank k count 0, and the sum is divided by min(k, number of relevant items), by weight.
    weights: an item of integer weight counts as so many copies, as scikit-learn's sample_weight. Equal scores count
    all as high as the last of them: equal to ``average_precision_score``. Soft: two soft ranks with one eps.
    Other arguments as in :func:`dcg`. Complexity: O(n log n). Source: Brown et al. 2020, "Smooth-AP".

    Example:
        >>> so.metrics.average_precision(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]))
        tensor(0.5833)
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    relevance = lists.weighed(lists.relevant.to(lists.scores.dtype))

    def formula(o: Lists) -> Tensor:
        precision = o.at_or_above(o.relevant) / o.at_or_above(o.present)
        if k is None:
            return divide(total(relevance * precision), total(relevance))
        most = total(relevance.sort(-1, descending=True).values[..., :k])
        return divide(total(relevance * precision * o.places(None, k)), most)

    return lists.evaluate(formula, smoothing, reduction)
