"""The nn.Module form of every loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class RankingLoss(nn.Module):
    """A ranking loss or metric as a module: ``RankingLoss(loss, **options)(scores, labels, where=..., weights=...)``.

    Args:
        loss: a function of :mod:`smoothops.losses` or :mod:`smoothops.metrics`, or any with the same arguments.
        options: its keyword arguments but ``where`` and ``weights``, which belong to the lists. A smoothing that is an
            nn.Module or holds a parameter is the caller's to register.

    Raises: TypeError for an option that the loss does not have, at once.

    Example:
        >>> loss = so.losses.RankingLoss(so.losses.ndcg, k=10)
        >>> loss
        RankingLoss(ndcg, k=10)
        >>> loss(torch.tensor([0.3, 0.9, 0.1]), torch.tensor([2, 1, 0]))
        tensor(0.1778)
    """

    def __init__(self, loss: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a function such as so.losses.ndcg, got {loss!r}")
        known = set(inspect.signature(loss).parameters) - {"scores", "labels", "where", "weights"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"{_name(loss)} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        self.loss, self.options = loss, options

    def extra_repr(self) -> str:
        return ", ".join([_name(self.loss), *(f"{name}={value!r}" for name, value in self.options.items())])

    def forward(
        self, scores: Tensor, labels: Tensor, where: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        return self.loss(scores, labels, where=where, weights=weights, **self.options)


def _name(loss: Callable[..., Tensor]) -> str:
    return getattr(loss, "__name__", repr(loss))
