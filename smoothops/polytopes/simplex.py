"""The simplex (one item), the capped simplex (k items) and the hypercube (yes or no for each item)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._axes import Rows, check_number, concrete
from .._regularizer import FAMILIES, Mixing, Regularizer
from ..kernels.torch import FAR
from ..regularizers import Entropy
from ._dual import Threshold, clipped
from ._fused import choice, log_sum_exp, softmax
from ._mixing import mixing_threshold
from ._traced import ANSWERS
from .base import Polytope

LONG = 128  # items from which on a compiled softmax is worth loading numba for: what gains most are long rows


def _need_n(n: int | None, name: str) -> int:
    if n is None:
        raise ValueError(f"{name} does not know its dimension; call vertices(n)")
    return n


@dataclass(frozen=True, eq=False)
class CappedSimplex(Polytope):
    """{y in [0, 1]^n : sum y = k}: choices of k items; k may be fractional, and a tensor with gradient.

    Args:
        k: 0 <= k <= n; a number, a 0-d tensor, or a tensor of theta's dims with size 1 along the last.

    y_i = phi((theta_i - tau)/eps) with tau such that the sum is k; O(n) a Newton step. Raises ValueError for k out of
    range. Source: Blondel, Martins, Niculae 2020; Sander et al. 2023; Struski et al. 2025.

    Example:
        >>> so.CappedSimplex(2).argmax(torch.tensor([1.0, 0.3, -0.2, 0.8]), so.Quadratic(1.0))
        tensor([0.9667, 0.2667, 0.0000, 0.7667])
    """

    k: Any = 1

    role = "capped"
    clip = True

    def __post_init__(self) -> None:
        check_number(self.k, "k")
        if not isinstance(self.k, Tensor) and not 0 <= self.k < math.inf:
            raise ValueError(f"k must be a number of items >= 0, got {self.k}")

    def _k(self, rows: Rows) -> Tensor:
        if not isinstance(self.k, Tensor):
            if self.k > rows.n:
                raise ValueError(f"k = {self.k} items cannot be chosen out of {rows.n}; k must lie in [0, {rows.n}]")
        elif concrete(self.k) and not bool(((self.k >= 0) & (self.k <= rows.n)).all()):
            raise ValueError(
                f"k must lie in [0, {rows.n}], got values in [{self.k.min().item()}, {self.k.max().item()}]"
            )
        return rows.parameter(self.k, "k")

    def _eligible(self, rows: Rows) -> Tensor:
        eligible = rows.x > -torch.inf
        return eligible if rows.present is None else eligible & rows.present

    def _hard(self, rows: Rows) -> Tensor:
        k = self._k(rows)
        eligible = self._eligible(rows)
        lowered = torch.where(eligible, rows.x, -torch.inf).detach()
        if isinstance(self.k, Tensor):
            order = lowered.argsort(dim=-1, descending=True, stable=True)
        else:
            order = lowered.topk(math.ceil(self.k), -1).indices
        take = (k.detach() - torch.arange(order.shape[-1], device=order.device)).clamp(0, 1)
        take = take.expand(*order.shape).to(rows.wide)
        return torch.zeros_like(lowered).scatter(-1, order, take) * eligible

    def _threshold(self, rows: Rows, reg: Regularizer) -> Threshold:
        k, shape = self._k(rows), rows.parameter(reg.shape, "alpha")
        return Threshold(type(reg), rows.x, self.strength(rows, reg), shape, k, rows.present, self.clip)

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        if not isinstance(reg.eps, Mixing):
            return rows.parameter(reg.eps, "eps")
        present = torch.ones_like(rows.x, dtype=torch.bool) if rows.present is None else rows.present
        k, shape = self._k(rows).detach(), rows.parameter(reg.shape, "alpha").detach()
        return mixing_threshold(rows.x.detach(), present, k, shape, type(reg).__name__, self.clip, reg.eps.inputs)

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._threshold(rows, reg).argmax()

    def _fused(self, rows: Rows, reg: Regularizer) -> Tensor | None:
        def plain(rows: Rows, reg: Regularizer, k: Any) -> Tensor:
            return rows.poisoned((CappedSimplex(k) if self.clip else self)._soft(rows, reg))

        self._k(rows)  # checks it
        closed = reg.closed_form and not self.clip
        if closed and rows.n < LONG:
            return softmax(rows, reg, plain)
        found = choice(rows, reg, self.k, self.clip, plain, lambda: self.strength(rows, reg))
        return softmax(rows, reg, plain) if found is None and closed else found

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._threshold(rows, reg).max()

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        rows = Rows(y)
        inside = ((rows.x >= -tol) & (rows.x <= 1 + tol)).all(-1)
        return inside & ((rows.x.sum(-1) - self._k(rows).squeeze(-1)).abs() <= tol * max(1, rows.n))

    def vertices(self, n: int | None = None) -> Tensor:
        n = _need_n(n, type(self).__name__)
        whole, part = int(self.k), float(self.k) - int(self.k)
        rows = set()
        for chosen in itertools.combinations(range(n), whole):
            y = [1.0 if i in chosen else 0.0 for i in range(n)]
            if part == 0:
                rows.add(tuple(y))
                continue
            for i in range(n):
                if i not in chosen:
                    rows.add((*y[:i], part, *y[i + 1 :]))
        return torch.tensor(sorted(rows, reverse=True), dtype=torch.float64).reshape(len(rows), n)


@dataclass(frozen=True, eq=False, init=False)
class Simplex(CappedSimplex):
    """{y >= 0 : sum y = 1}: the choice of one item. argmax is softmax, sparsemax or entmax, max a soft maximum.

    y_i = phi((theta_i - tau)/eps) with tau such that the sum is 1; O(n) a Newton step, softmax in closed form.
    -inf has weight 0; +inf takes all the weight. Source: Blondel, Roulet 2024, chapter 4.

    Example:
        >>> so.Simplex().argmax(torch.tensor([1.0, 0.3, -0.2, 0.8]), so.Quadratic(1.0))
        tensor([0.6000, 0.0000, 0.0000, 0.4000])
    """

    role = "simplex"
    clip = False
    default = Entropy
    default_eps = 0.1

    def __init__(self) -> None:
        object.__setattr__(self, "k", 1)

    def __repr__(self) -> str:
        return "Simplex()"

    def _hard(self, rows: Rows) -> Tensor:
        eligible = self._eligible(rows)
        best = torch.where(eligible, rows.x, -torch.inf).detach().argmax(-1, keepdim=True)
        return torch.zeros_like(rows.x).scatter(-1, best, 1.0) * eligible

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        plain = super()._soft_max
        return log_sum_exp(rows, reg, lambda: plain(rows, reg)) if reg.closed_form else plain(rows, reg)

    def _hard_max(self, rows: Rows) -> Tensor:
        return torch.where(self._eligible(rows), rows.x, -torch.inf).amax(-1, keepdim=True)


def _answer(x: Tensor, eps: Any, k: Any, alpha: Any, family: str, several: str) -> Tensor:
    polytope = CappedSimplex(k) if several == "1" else Simplex()
    return polytope.argmax(x, FAMILIES[family].make(eps, alpha))


ANSWERS["choice"] = _answer


@dataclass(frozen=True, eq=False)
class Hypercube(Polytope):
    """[0, 1]^n: yes or no for each item. y_i = phi(theta_i/eps + omega(1)), elementwise.

    Quadratic: clip(theta/eps + 1/2, 0, 1). Entropy means BinaryEntropy: sigmoid(theta/eps). max sums over the items.

    Example:
        >>> so.Hypercube().argmax(torch.tensor([-2.0, 0.0, 0.25]), so.Quadratic(1.0))
        tensor([0.0000, 0.5000, 0.7500])
    """

    role = "box"
    default = Entropy
    default_eps = 0.1
    coupled = False

    def _family(self, reg: Regularizer) -> type[Regularizer]:
        return type(reg).on_box()

    def _hard(self, rows: Rows) -> Tensor:
        return torch.where(rows.x.detach() > 0, torch.ones_like(rows.x), 0)

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing needs inputs that compete; on the Hypercube each item stands alone, give a number")
        return rows.parameter(reg.eps, "eps")

    def _z(self, rows: Rows, reg: Regularizer) -> tuple[Any, Tensor, Tensor, Tensor]:
        family, eps = self._family(reg), self.strength(rows, reg)
        shape = rows.parameter(reg.shape, "alpha")
        finite = rows.x.isfinite()
        far = torch.where(rows.x > 0, torch.full_like(rows.x, -FAR), FAR)
        z = torch.where(finite, torch.where(finite, rows.x, 0) / eps, far) + family.vertex(shape)
        return family, z, shape, eps

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        family, z, shape, _ = self._z(rows, reg)
        return clipped(family, family.phi, z, shape, 1.0)

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        family, z, shape, eps = self._z(rows, reg)
        above = z - family.vertex(shape)
        value = eps * clipped(family, family.psi, z, shape, above)
        return torch.where(rows.x == torch.inf, torch.inf, value).sum(-1, keepdim=True)

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        return ((y >= -tol) & (y <= 1 + tol)).all(-1)

    def vertices(self, n: int | None = None) -> Tensor:
        corners = list(itertools.product((0.0, 1.0), repeat=_need_n(n, "Hypercube")))
        return torch.tensor(corners, dtype=torch.float64)
