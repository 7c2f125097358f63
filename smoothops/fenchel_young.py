"""Fenchel-Young losses: the loss that belongs to a soft argmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._axes import Rows, check_tensor, concrete, wide_dtype
from ._reduction import check_reduction, reduce
from ._regularizer import Mixing, Regularizer
from .polytopes import Polytope, Simplex
from .smoothing import Smoothing, SmoothingLike, as_smoothing
from .stochastic import Perturbed


class FenchelYoung(nn.Module):
    """The Fenchel-Young loss L(theta, y) = max(theta) + eps Omega(y) - <theta, y>, max and Omega those of a polytope C.

    Convex in theta, >= 0, and 0 iff y = argmax(theta); its gradient is argmax(theta) - y (Danskin: no solver is
    differentiated). Simplex: cross-entropy with Entropy(1), the sparsemax and entmax losses; Hard: the perceptron.

    Args:
        smoothing: Regularizer, number, Perturbed or Hard, as for the polytope. Mixing is chosen from theta. Perturbed
            has no known Omega: its loss is without Omega(y), a constant in theta.
        polytope: C. Simplex, CappedSimplex(k): top k; Hypercube: multilabel; Permutahedron(w): ranking.
        reduction: "none", "mean" or "sum" over the rows.

    Call with theta (..., n) and y in C, shaped like theta, or integer class indices (...) on the Simplex.
    Raises: ValueError for y outside of C. Complexity: one solve, O(n) or, for an order, O(n log n).
    Source: Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young losses"; Berthet et al. 2020 for Perturbed.

    Example:
        >>> loss = so.FenchelYoung(so.Entropy(1.0), so.Simplex())
        >>> loss(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        tensor(0.3133)
    """

    def __init__(self, smoothing: SmoothingLike, polytope: Polytope, reduction: str = "mean") -> None:
        super().__init__()
        if not isinstance(polytope, Polytope):
            raise TypeError(f"polytope must be one such as so.Simplex(), got {polytope!r}")
        self.smoothing = as_smoothing(smoothing, polytope.default, polytope.default_eps)
        self.polytope, self.reduction = polytope, check_reduction(reduction)
        if isinstance(self.smoothing, Regularizer):
            polytope.check(self.smoothing)

    def extra_repr(self) -> str:
        return f"{self.smoothing!r}, {self.polytope!r}, reduction={self.reduction!r}"

    def forward(self, theta: Tensor, y: Tensor) -> Tensor:
        theta = check_tensor(theta, "theta")
        if theta.ndim < len(self.polytope.event_dims):
            raise ValueError(
                f"theta must have at least {len(self.polytope.event_dims)} dimension(s), those of one y, got shape "
                f"{tuple(theta.shape)}"
            )
        # max and <theta, y> cancel: the difference is taken in the wide dtype
        wide = theta.to(wide_dtype(theta.device))
        target = self._target(wide, y)
        smoothing = self._fixed(wide)
        penalty = 0 if isinstance(smoothing, Perturbed) else self.polytope.penalty(target, smoothing)
        # a choice ruled out by -inf has y = 0, and 0 * inf is not a number
        finite = torch.where(wide.isinf() & (target == 0), 0, wide)
        loss = self.polytope.max(wide, smoothing) + penalty - (finite * target).sum(self.polytope.event_dims)
        return reduce(loss.to(theta.dtype), self.reduction)

    def _target(self, theta: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}; wrap it in torch.as_tensor")
        indices = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if isinstance(self.polytope, Simplex) and indices and y.shape == theta.shape[:-1]:
            return nn.functional.one_hot(y.long(), theta.shape[-1]).to(theta.dtype)
        if y.shape != theta.shape:
            also = f", or integer class indices {tuple(theta.shape[:-1])}" if isinstance(self.polytope, Simplex) else ""
            raise ValueError(f"y must have theta's shape {tuple(theta.shape)}{also}, got {tuple(y.shape)}")
        target = check_tensor(y, "y").to(theta.dtype)
        if concrete(target):
            # what rounds in y's own dtype, a softmax say, still counts as inside
            tol = 1e-6 if not y.is_floating_point() else max(1e-6, 4 * torch.finfo(y.dtype).eps)
            dims = len(self.polytope.event_dims)
            inside = self.polytope.contains(target, tol) | target.isnan().flatten(target.ndim - dims).any(-1)
            if not bool(inside.all()):
                raise ValueError(
                    f"y must lie in {self.polytope!r}, where the loss is >= 0; {int((~inside).sum())} of its "
                    f"{inside.numel()} rows do not"
                )
        return target

    def _fixed(self, theta: Tensor) -> Smoothing:
        """The smoothing with eps chosen from theta where it is ``Mixing``, so that max and Omega share it."""
        reg: Any = self.smoothing
        if not (isinstance(reg, Regularizer) and isinstance(reg.eps, Mixing)):
            return reg
        rows = Rows(theta.detach(), self.polytope.event_dims)
        return reg.at(rows.restore_parameter(self.polytope.strength(rows, reg)), reg.shape)
