"""Gates that send each input to k of n experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..operators import topk_mask
from ._held import Source, current, held, is_number, written


class GateStatistics(NamedTuple):
    """How a batch is spread over the experts.

    load: (experts,), the mean weight of each; they add up to k.
    active: the mean number of experts with weight > 0, no gradient.
    imbalance: the squared coefficient of variation of the load, 0 where all are equal; a penalty (Shazeer et al. 2017).
    """

    load: Tensor
    active: Tensor
    imbalance: Tensor


class TopKGate(nn.Module):
    """Gate of a sparse mixture of experts: y = topk_mask(W x + b, k), weights in [0, 1] that add up to exactly k.

    With Quadratic, few experts beyond k have weight, the others exactly 0, and the gradient reaches all those near the
    threshold; a hard top-k gate passes none to an expert that it did not choose.

    Args:
        in_features, experts: sizes of the input and of the output.
        k: how many experts' worth of weight an input gets, a number in [0, experts].
        smoothing: as of ``topk_mask``, in the unit of the scores, or ``LearnableEps``, ``Anneal``.
        bias: whether the scores have a bias.

    Shape: (..., in_features) to (..., experts). Complexity: that of a linear layer and O(experts) a row.
    Source: Martins, Kreutzer 2017 (budget constraints); Shazeer et al. 2017, "Outrageously large neural networks".

    Example:
        >>> weights = so.nn.TopKGate(16, experts=8, k=2)(torch.randn(5, 16))
        >>> torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.0))
    """

    def __init__(
        self, in_features: int, experts: int, k: float, *, smoothing: Source = 1.0, bias: bool = True,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not is_number(k) or not 0 <= k <= experts:
            raise ValueError(f"k must be a number between 0 and experts = {experts}, got {k!r}")
        self.in_features, self.experts, self.k = in_features, experts, k
        self.score = nn.Linear(in_features, experts, bias=bias, device=device, dtype=dtype)
        self.smoothing = held(smoothing, "TopKGate")

    def forward(self, x: Tensor) -> Tensor:
        return topk_mask(self.score(x), self.k, smoothing=current(self.smoothing))

    def statistics(self, weights: Tensor) -> GateStatistics:
        """How the weights (..., experts) that this gate gave spread over the experts."""
        if weights.shape[-1:] != (self.experts,) or weights.shape[:-1].numel() == 0:
            raise ValueError(f"weights must be (..., {self.experts}) and not empty, got {tuple(weights.shape)}")
        rows = weights.reshape(-1, self.experts)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        load = wide.mean(0)
        spread = load.var(correction=0) / load.mean().square().clamp(min=torch.finfo(load.dtype).tiny)
        return GateStatistics(load, (rows.detach() > 0).sum(-1).to(load.dtype).mean(), spread)

    def extra_repr(self) -> str:
        known = [] if isinstance(self.smoothing, nn.Module) else [f"smoothing={written(self.smoothing)}"]
        return ", ".join([f"k={self.k}", *known])
