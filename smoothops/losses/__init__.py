"""Ranking losses: 1 - each metric of :mod:`smoothops.metrics`, soft, and the classic surrogates.

``loss(scores, labels, *, where=None, weights=None, reduction="mean")`` on lists along the last dimension; the soft
metrics also take ``smoothing=`` and, where there is a cut-off, ``k=``. :class:`RankingLoss` makes a module of each.
"""

from ._classic import (
    approx_ndcg,
    lambda_rank,
    list_mle,
    list_net,
    neural_ndcg,
    pairwise_hinge,
    rank_net,
    smooth_ap,
    soft_margin,
)
from ._module import RankingLoss
from ._soft import (
    auc,
    average_precision,
    dcg,
    hit_rate_at_k,
    kendall,
    ndcg,
    pairwise_accuracy,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
    spearman,
)

__all__ = [
    "RankingLoss",
    "approx_ndcg",
    "auc",
    "average_precision",
    "dcg",
    "hit_rate_at_k",
    "kendall",
    "lambda_rank",
    "list_mle",
    "list_net",
    "ndcg",
    "neural_ndcg",
    "pairwise_accuracy",
    "pairwise_hinge",
    "precision_at_k",
    "rank_net",
    "recall_at_k",
    "reciprocal_rank",
    "smooth_ap",
    "soft_margin",
    "spearman",
]
