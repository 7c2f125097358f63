"""Scored lists and a table of the ranking metrics, shared by the tests of metrics and losses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from oracles import normal
from torch import Tensor

import smoothops as so

Metric = Callable[..., Tensor]

# each metric, and those with a cut-off a second time
METRICS: dict[str, Metric] = {
    name: getattr(so.metrics, name)
    for name in (
        "dcg",
        "ndcg",
        "average_precision",
        "reciprocal_rank",
        "spearman",
        "kendall",
        "pairwise_accuracy",
        "auc",
    )
}
for _name in ("dcg", "ndcg", "average_precision", "reciprocal_rank", "precision_at_k", "recall_at_k", "hit_rate_at_k"):
    METRICS[f"{_name}, k=3"] = functools.partial(getattr(so.metrics, _name), k=3)
LOSSES: dict[str, Metric] = {}
for _key, _metric in METRICS.items():
    _name = _key.split(",")[0]
    _loss = getattr(so.losses, _name)
    LOSSES[_key] = functools.partial(_loss, k=3) if "k=3" in _key else _loss
CLASSIC: dict[str, Metric] = {
    name: getattr(so.losses, name)
    for name in (
        "list_net", "list_mle", "rank_net", "lambda_rank", "approx_ndcg", "pairwise_hinge", "soft_margin", "smooth_ap",
        "neural_ndcg",
    )
}  # fmt: skip
UNBOUNDED = {"dcg", "dcg, k=3"}
SIGNED = {"spearman", "kendall"}


def lists(batch: int, n: int, seed: int = 0, grades: int = 4) -> tuple[Tensor, Tensor]:
    """Scores without ties, and graded labels, each list with a relevant item and another (n > 1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, grades, (batch, n), generator=generator).double()
    if n > 1:
        labels[:, 0], labels[:, 1] = 1, 0
    return normal(batch, n, seed=seed + 1), labels
