"""1 - the soft metric, for each ranking metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from .._reduction import check_reduction, reduce
from ..metrics._ranked import Gain, linear_gain, log2_discount
from ..smoothing import SmoothingLike


def _loss(
    metric: Callable[..., Tensor], scores: Tensor, labels: Tensor, where: Tensor | None, reduction: str, **given: Any
) -> Tensor:
    """1 - metric for each list, 0 for an empty one, which does not enter the mean."""
    check_reduction(reduction)
    value = metric(scores, labels, where=where, reduction="none", **given)
    if where is None and scores.shape[-1] > 0:
        return reduce(1 - value, reduction)
    present = torch.ones_like(scores, dtype=torch.bool) if where is None else where.expand(scores.shape)
    counted = present.any(-1)
    return reduce(torch.where(counted, 1 - value, 0), reduction, counted)


def ndcg(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft NDCG, in [0, 1]: 1 - sum_i gain_i discount(r_i)/ideal, r the soft ranks, times the soft top-k mask if k.

    Args:
        scores, labels, k, where, weights, gain, discount: as in :func:`metrics.ndcg`.
        smoothing: None is Quadratic(Mixing(3.0)), eps from each list, so that the gradient is usable at every length
            and scale of the scores; a number eps, in their unit, means Quadratic(eps). Hard has no gradient.
        reduction: "none", "mean" or "sum"; empty lists have loss 0 and do not enter the mean.

    Returns: the loss, 1 without gradient for a list without a gain above 0. As eps -> 0 it becomes 1 - the metric.
    Complexity: O(n log n) time, O(n) memory. Raises: as the metric.
    Source: Qin, Liu, Li 2010, with the soft ranks of Blondel, Teboul, Berthet, Djolonga 2020.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.losses.ndcg(scores, labels)
        tensor(0.1778)
    """
    given = {"k": k, "gain": gain, "discount": discount, "weights": weights, "smoothing": smoothing}
    return _loss(metrics.ndcg, scores, labels, where, reduction, **given)


def dcg(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None, gain: Gain = linear_gain, discount: Gain = log2_discount,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft DCG, unbounded below; see :func:`metrics.dcg`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.losses.dcg(scores, labels)
        tensor(-1.1633)
    """
    given = {"k": k, "gain": gain, "discount": discount, "weights": weights, "smoothing": smoothing}
    return _loss(metrics.dcg, scores, labels, where, reduction, **given)


def average_precision(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft average precision, in [0, 1]: two soft ranks, among the relevant items and among all, in O(n log n).

    See :func:`metrics.average_precision`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.average_precision(scores, labels)
        tensor(0.4025)
    """
    return _loss(metrics.average_precision, scores, labels, where, reduction, k=k, weights=weights, smoothing=smoothing)


def reciprocal_rank(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft reciprocal rank, in [0, 1]; see :func:`metrics.reciprocal_rank`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.reciprocal_rank(scores, labels)
        tensor(0.5623)
    """
    return _loss(metrics.reciprocal_rank, scores, labels, where, reduction, k=k, weights=weights, smoothing=smoothing)


def precision_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft precision at k, in [0, 1]; see :func:`metrics.precision_at_k`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.precision_at_k(scores, labels, k=2)
        tensor(0.4995)
    """
    return _loss(metrics.precision_at_k, scores, labels, where, reduction, k=k, weights=weights, smoothing=smoothing)


def recall_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft recall at k, in [0, 1]; see :func:`metrics.recall_at_k`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.recall_at_k(scores, labels, k=2)
        tensor(0.4995)
    """
    return _loss(metrics.recall_at_k, scores, labels, where, reduction, k=k, weights=weights, smoothing=smoothing)


def hit_rate_at_k(
    scores: Tensor, labels: Tensor, *, k: int | None = None, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft hit rate at k, in [0, 1]; see :func:`metrics.hit_rate_at_k`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.hit_rate_at_k(scores, labels, k=2)
        tensor(0.4283)
    """
    return _loss(metrics.hit_rate_at_k, scores, labels, where, reduction, k=k, weights=weights, smoothing=smoothing)


def spearman(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft Spearman correlation, in [0, 2]; see :func:`metrics.spearman`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.losses.spearman(scores, labels)
        tensor(0.7598)
    """
    return _loss(metrics.spearman, scores, labels, where, reduction, weights=weights, smoothing=smoothing)


def kendall(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft Kendall tau-b, in [0, 2]; see :func:`metrics.kendall`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.losses.kendall(scores, labels)
        tensor(0.8331)
    """
    return _loss(metrics.kendall, scores, labels, where, reduction, weights=weights, smoothing=smoothing)


def pairwise_accuracy(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft pairwise accuracy, in [0, 1]; see :func:`metrics.pairwise_accuracy`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0])
        >>> so.losses.pairwise_accuracy(scores, labels)
        tensor(0.4288)
    """
    return _loss(metrics.pairwise_accuracy, scores, labels, where, reduction, weights=weights, smoothing=smoothing)


def auc(
    scores: Tensor, labels: Tensor, *, where: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: SmoothingLike = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - soft area under the ROC curve, in [0, 1]; see :func:`metrics.auc`, and :func:`ndcg` for the smoothing.

    Example:
        >>> scores, labels = torch.tensor([0.3, 0.9, 0.1]), torch.tensor([1, 0, 1])
        >>> so.losses.auc(scores, labels)
        tensor(0.9984)
    """
    return _loss(metrics.auc, scores, labels, where, reduction, weights=weights, smoothing=smoothing)
