"""The classic surrogates of learning to rank, as their papers define them, on masked lists.

All take finite ``scores`` and ``labels`` (..., list), ``where`` (bool mask of the present items), ``weights``
(positive, one an item) and ``reduction``; empty lists have loss 0 and do not enter the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._axes import check_number
from ..metrics._lists import Lists, check_k, divide, total
from ..metrics._pairs import Values, over_pairs
from ..metrics._ranked import Gain, gains_of, ideal_dcg, linear_gain, log2_discount
from ..operators import argsort
from ..relaxations import NeuralSort


def _positive(value: float, name: str) -> float:
    check_number(value, name)
    if isinstance(value, Tensor) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return value


# --- the whole list at once -------------------------------------------------------------------------------------------


def _masked(v: Tensor, lists: Lists) -> Tensor:
    """v with no mass on absent items; an empty list, which no one reads, keeps its zeros."""
    return torch.where(lists.present | (lists.size == 0).unsqueeze(-1), v, -torch.inf)


def list_net(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """ListNet: the cross-entropy -sum_i w_i p_i log q_i of p = softmax(labels) and q = softmax(scores).

    Without weights it is at least the entropy of p, where q = p. Complexity: O(n).
    Source: Cao, Qin, Liu, Tsai, Li 2007, "Learning to rank: from pairwise approach to listwise approach".

    Example:
        >>> so.losses.list_net(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(1.1634)
    """
    lists = Lists(scores, labels, where, weights)
    target = torch.softmax(_masked(lists.labels, lists), -1)
    log_q = torch.log_softmax(_masked(lists.scores, lists), -1)
    return lists.result(-total(lists.weights * target * torch.where(lists.present, log_q, 0)), reduction)


def list_mle(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """ListMLE: -log of the Plackett-Luce likelihood of the order by label, sum_i w_i (lse(s_i, ..., s_n) - s_i).

    Items of equal label stand in the order given. Complexity: O(n log n).
    Source: Xia, Liu, Wang, Zhang, Li 2008, "Listwise approach to learning to rank: theory and algorithm".

    Example:
        >>> so.losses.list_mle(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(1.6633)
    """
    lists = Lists(scores, labels, where, weights)
    by_label = torch.where(lists.present, lists.labels, -torch.inf)
    order = by_label.argsort(dim=-1, descending=True, stable=True)
    s = lists.scores.gather(-1, order)
    there = lists.present.gather(-1, order)
    # finite, so that the gradient is: e^FAR is 0 beside any score
    tail = torch.where(there, s, _FAR).flip(-1).logcumsumexp(-1).flip(-1)
    loss = torch.where(there, tail - s, 0)
    return lists.result(total(lists.weights.gather(-1, order) * loss), reduction)


_FAR = -1e300


# --- item by item -----------------------------------------------------------------------------------------------------


def soft_margin(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Soft margin: the weighted mean over the items of log(1 + exp(-y_i s_i)), y_i = 1 if label_i > 0, else -1.

    Pointwise, ``torch.nn.SoftMarginLoss`` on masked lists: the logistic loss of each item. Complexity: O(n).

    Example:
        >>> so.losses.soft_margin(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.5466)
    """
    lists = Lists(scores, labels, where, weights)
    loss = nn.functional.softplus(torch.where(lists.relevant, -lists.scores, lists.scores))
    return lists.result(divide(total(lists.weights * loss), total(lists.weights)), reduction)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairwise(lists: Lists, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted mean of loss(s_i - s_j) over the pairs with label_i > label_j, 0 where there is none."""

    def term(i: Values, j: Values, shared: Values) -> Values:
        w = i[2] * j[2] * (i[1] > j[1])
        return w * loss(i[0] - j[0]), w

    found, pairs = over_pairs(term, (lists.scores, lists.labels, lists.weights))
    return divide(total(found), total(pairs))


def _logistic(gap: Tensor) -> Tensor:
    return nn.functional.softplus(-gap)


def rank_net(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None, weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """RankNet: the mean of log(1 + exp(-(s_i - s_j))) over the pairs with label_i > label_j, by weight w_i w_j.

    0 where there is no such pair. Complexity: O(n^2) time, in blocks, O(n) memory.
    Source: Burges et al. 2005, "Learning to rank using gradient descent".

    Example:
        >>> so.losses.rank_net(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.6689)
    """
    lists = Lists(scores, labels, where, weights)
    return lists.result(_pairwise(lists, _logistic), reduction)


def pairwise_hinge(
    scores: Tensor, labels: Tensor, *, margin: float = 1.0, where: Tensor | None = None, weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Ranking SVM: the mean of max(0, margin - (s_i - s_j)) over the pairs with label_i > label_j, by weight w_i w_j.

    0 where there is no such pair. Complexity: O(n^2) time, in blocks, O(n) memory.
    Source: Herbrich, Graepel, Obermayer 1999; Joachims 2002, "Optimizing search engines using clickthrough data".

    Example:
        >>> so.losses.pairwise_hinge(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.8667)
    """
    lists = Lists(scores, labels, where, weights)
    return lists.result(_pairwise(lists, lambda gap: (_positive(margin, "margin") - gap).relu()), reduction)


def lambda_rank(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """LambdaRank: the sum over the pairs with label_i > label_j of |change of NDCG| log(1 + exp(-(s_i - s_j))).

    The change is that of swapping the two items, (gain_i - gain_j)(d_i - d_j)/ideal with d the discount at the hard
    rank, 0 above k; it carries no gradient. Weights multiply the gains. Complexity: O(n^2) time, O(n) memory.
    Source: Burges, Ragno, Le 2006; Wang et al. 2018, "The LambdaLoss framework", which gives it as a loss.

    Example:
        >>> so.losses.lambda_rank(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.2756)
    """
    check_k(k)
    lists = Lists(scores, labels, where, weights)
    gains = gains_of(lists, gain).detach()
    places = lists.places(discount, k).detach()

    def term(i: Values, j: Values, shared: Values) -> Values:
        change = ((i[2] - j[2]) * (i[3] - j[3])).abs()
        both = i[4] * j[4] * (i[1] > j[1])
        return (both * change * _logistic(i[0] - j[0]),)

    present = lists.present.to(lists.scores.dtype)
    (found,) = over_pairs(term, (lists.scores, lists.labels, gains, places, present))
    return lists.result(divide(total(found), ideal_dcg(gains, discount, k)), reduction)


# --- ranks from all pairs ---------------------------------------------------------------------------------------------


def _sigmoid_ranks(lists: Lists, temperature: float, among: Tensor | None = None) -> Values:
    """1 + sum_{j != i} sigmoid((s_j - s_i)/temperature) over the present items, and over those of ``among``."""
    marks = (lists.present, lists.present if among is None else among)

    def term(i: Values, j: Values, shared: Values) -> Values:
        above = torch.sigmoid((j[0] - i[0]) / temperature)
        return above * j[1], above * j[2]

    ranks = over_pairs(term, (lists.scores, *(m.to(lists.scores.dtype) for m in marks)))
    # the item itself counts 1/2 in the sum
    return tuple(torch.where(m, r + 0.5, 1) for m, r in zip(marks, ranks, strict=True))


def approx_ndcg(
    scores: Tensor, labels: Tensor, *, temperature: float = 0.1, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """ApproxNDCG: 1 - NDCG at the ranks r_i = 1 + sum_{j != i} sigmoid((s_j - s_i)/temperature), in [0, 1].

    The temperature has the unit of the scores; :func:`ndcg` is the same idea with soft ranks in O(n log n) and a
    strength that adapts. Weights multiply the gains. Complexity: O(n^2) time, in blocks, O(n) memory.
    Source: Qin, Liu, Li 2010, "A general approximation framework for direct optimization of IR measures".

    Example:
        >>> so.losses.approx_ndcg(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.1572)
    """
    lists = Lists(scores, labels, where, weights)
    gains = gains_of(lists, gain)
    ranks, _ = _sigmoid_ranks(lists, _positive(temperature, "temperature"))
    return lists.result(1 - divide(total(gains * discount(ranks)), ideal_dcg(gains, discount, None)), reduction)


def smooth_ap(
    scores: Tensor, labels: Tensor, *, temperature: float = 0.01, where: Tensor | None = None,
    weights: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Smooth-AP: 1 - the mean over the relevant items (label > 0) of rank among the relevant/rank, in [0, 1].

    Ranks as in :func:`approx_ndcg`; the mean is by weight. :func:`average_precision` is the same idea with soft ranks
    in O(n log n). Complexity: O(n^2) time, in blocks, O(n) memory.
    Source: Brown, Xie, Kalogeiton, Zisserman 2020, "Smooth-AP: smoothing the path towards large-scale image retrieval".

    Example:
        >>> so.losses.smooth_ap(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1]))
        tensor(0.4167)
    """
    lists = Lists(scores, labels, where, weights)
    every, among = _sigmoid_ranks(lists, _positive(temperature, "temperature"), lists.relevant)
    relevance = lists.weights * lists.relevant
    return lists.result(1 - divide(total(relevance * among / every), total(relevance)), reduction)


def neural_ndcg(
    scores: Tensor, labels: Tensor, *, k: int | None = None, temperature: float = 1.0, sinkhorn: int = 50,
    where: Tensor | None = None, weights: Tensor | None = None, gain: Gain = linear_gain,
    discount: Gain = log2_discount, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """NeuralNDCG: 1 - sum_j discount(j) (P gain)_j/ideal, P the descending NeuralSort matrix, at most 1.

    ``sinkhorn`` rounds of scaling columns, then rows, to sum 1 make P almost doubly stochastic; as far as it is,
    the loss is >= 0. Weights multiply the gains. Complexity: O(n^2) time and memory, times the rounds.
    Source: Pobrotyn, Bialobrzeski 2021, "NeuralNDCG: direct optimisation of a ranking metric".

    Example:
        >>> so.losses.neural_ndcg(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.1702)
    """
    check_k(k)
    if isinstance(sinkhorn, bool) or not isinstance(sinkhorn, int) or sinkhorn < 0:
        raise ValueError(f"sinkhorn must be a number of rounds >= 0, got {sinkhorn!r}")
    lists = Lists(scores, labels, where, weights)
    if lists.n == 0:
        return lists.result(total(lists.scores), reduction)
    gains = gains_of(lists, gain)
    neural = NeuralSort(_positive(temperature, "temperature"))
    p = argsort(lists.scores, descending=True, where=lists.present, smoothing=neural)
    for _ in range(sinkhorn):
        for dim in (-2, -1):
            p = divide(p, p.sum(dim, keepdim=True))
    placed = (p @ gains.unsqueeze(-1)).squeeze(-1)
    place = torch.arange(1, lists.n + 1, dtype=gains.dtype, device=gains.device)
    value = discount(place) if k is None else torch.where(place <= k, discount(place), 0)
    return lists.result(1 - divide(total(placed * value), ideal_dcg(gains, discount, k)), reduction)
