"""Ranking metrics, hard by default and soft under any smoothing; higher is better.

``metric(scores, labels, *, k=None, where=None, weights=None, smoothing=Hard(), reduction="mean")`` on lists along the
last dimension. Each is written once, in terms of ranks; :mod:`smoothops.losses` has 1 - the soft metric.
"""

from ._agreement import auc, kendall, pairwise_accuracy, spearman
from ._ranked import (
    average_precision,
    dcg,
    exponential_gain,
    hit_rate_at_k,
    linear_gain,
    log2_discount,
    ndcg,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
)

__all__ = [
    "auc",
    "average_precision",
    "dcg",
    "exponential_gain",
    "hit_rate_at_k",
    "kendall",
    "linear_gain",
    "log2_discount",
    "ndcg",
    "pairwise_accuracy",
    "precision_at_k",
    "recall_at_k",
    "reciprocal_rank",
    "spearman",
]
