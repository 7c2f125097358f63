"""Logic on soft booleans, p = P(A) and q = P(B), under an assumed dependence of A and B.

A logic states P(A and B); the rest follows: P(A or B) = p + q - P(A and B), P(A xor B) = P(A or B) - P(A and B), and
P(A implies B) = 1 - p + P(A and B). On 0 and 1 all of them are Boole's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._axes import Dim, Rows, concrete, row_sum, wide_dtype


@dataclass(frozen=True)
class Logic(ABC):
    """How the events behind soft booleans depend on each other."""

    @abstractmethod
    def conjunction(self, p: Tensor, q: Tensor) -> Tensor:
        """P(A and B)."""

    def disjunction(self, p: Tensor, q: Tensor) -> Tensor:
        """P(A or B)."""
        return 1 - self.conjunction(1 - p, 1 - q)

    @abstractmethod
    def every(self, p: Tensor) -> Tensor:
        """P(all of a row), (..., n) -> (..., 1)."""

    def some(self, p: Tensor) -> Tensor:
        """P(one of a row at least), (..., n) -> (..., 1)."""
        return 1 - self.every(1 - p)


def _product(p: Tensor) -> Tensor:
    """The product of each row by halves: derivatives at zeros are exact, and rows independent, unlike torch.prod."""
    while p.shape[-1] > 1:
        half = p.shape[-1] // 2
        p = torch.cat([p[..., :half] * p[..., half : 2 * half], p[..., 2 * half :]], -1)
    return p


@dataclass(frozen=True)
class Product(Logic):
    """Independent events: P(A and B) = p q.

    Example:
        >>> so.logical_or(torch.tensor(0.5), torch.tensor(0.5), logic=so.Product())
        tensor(0.7500)
    """

    def conjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return p * q

    def disjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return p + q * (1 - p)

    def every(self, p: Tensor) -> Tensor:
        return _product(p)

    def some(self, p: Tensor) -> Tensor:
        # 1 - prod(1 - p) would lose small p, the logarithm is lost where a p is 1
        certain = (p == 1).any(-1, keepdim=True)
        open_ = torch.where(certain, 0, p)
        return torch.where(certain, 1 - _product(1 - p), -torch.expm1(row_sum(torch.log1p(-open_))))


@dataclass(frozen=True)
class Godel(Logic):
    """Comonotone events, the more likely one includes the other: P(A and B) = min(p, q).

    Example:
        >>> so.logical_or(torch.tensor(0.5), torch.tensor(0.25), logic=so.Godel())
        tensor(0.5000)
    """

    def conjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(p, q)

    def disjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.maximum(p, q)

    def every(self, p: Tensor) -> Tensor:
        return p.amin(-1, keepdim=True)

    def some(self, p: Tensor) -> Tensor:
        return p.amax(-1, keepdim=True)


@dataclass(frozen=True)
class Lukasiewicz(Logic):
    """Events as exclusive as p and q allow: P(A and B) = max(p + q - 1, 0), P(A or B) = min(p + q, 1).

    Example:
        >>> so.logical_and(torch.tensor(0.5), torch.tensor(0.75), logic=so.Lukasiewicz())
        tensor(0.2500)
    """

    def conjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return (p + q - 1).clamp(min=0)

    def disjunction(self, p: Tensor, q: Tensor) -> Tensor:
        return (p + q).clamp(max=1)

    def every(self, p: Tensor) -> Tensor:
        return (1 - row_sum(1 - p)).clamp(min=0)

    def some(self, p: Tensor) -> Tensor:
        return row_sum(p).clamp(max=1)


INDEPENDENT = Product()


def logical_and(p: Tensor, q: Tensor, *, logic: Logic = INDEPENDENT) -> Tensor:
    """Soft p and q: P(A and B). Product: p q; Godel: min(p, q); Lukasiewicz: max(p + q - 1, 0).

    Args:
        p, q: soft booleans in [0, 1], or bool tensors, that broadcast.
        logic: the assumed dependence, Product() by default.

    Returns: a soft boolean. Raises: ValueError for values outside of [0, 1]. Source: van Krieken, Acar, van Harmelen
    2022, "Analyzing differentiable fuzzy logic operators".

    Example:
        >>> so.logical_and(torch.tensor(0.5), torch.tensor(0.5))
        tensor(0.2500)
    """
    p, q, dtype = _pair(p, q)
    return _logic(logic).conjunction(p, q).to(dtype)


def logical_or(p: Tensor, q: Tensor, *, logic: Logic = INDEPENDENT) -> Tensor:
    """Soft p or q: p + q - P(A and B). Product: p + q - p q; Godel: max(p, q); Lukasiewicz: min(p + q, 1).

    Arguments as :func:`logical_and`.

    Example:
        >>> so.logical_or(torch.tensor(0.5), torch.tensor(0.5))
        tensor(0.7500)
    """
    p, q, dtype = _pair(p, q)
    return _logic(logic).disjunction(p, q).to(dtype)


def logical_not(p: Tensor) -> Tensor:
    """Soft not p: 1 - p.

    Example:
        >>> so.logical_not(torch.tensor([0.25, 1.0]))
        tensor([0.7500, 0.0000])
    """
    return 1 - soft_boolean(p, "p")


def logical_xor(p: Tensor, q: Tensor, *, logic: Logic = INDEPENDENT) -> Tensor:
    """Soft p xor q: P(A or B) - P(A and B). Product: p + q - 2 p q; Godel: |p - q|; Lukasiewicz: 1 - |p + q - 1|.

    Arguments as :func:`logical_and`.

    Example:
        >>> so.logical_xor(torch.tensor(0.75), torch.tensor(0.5))
        tensor(0.5000)
    """
    p, q, dtype = _pair(p, q)
    logic = _logic(logic)
    return (logic.disjunction(p, q) - logic.conjunction(p, q)).to(dtype)


def implies(p: Tensor, q: Tensor, *, logic: Logic = INDEPENDENT) -> Tensor:
    """Soft p implies q: 1 - p + P(A and B). Product: 1 - p + p q; Godel: min(1 - p + q, 1); Lukasiewicz: max(q, 1 - p).

    Arguments as :func:`logical_and`.

    Example:
        >>> so.implies(torch.tensor(0.5), torch.tensor(0.5))
        tensor(0.7500)
    """
    p, q, dtype = _pair(p, q)
    return (1 - p + _logic(logic).conjunction(p, q)).to(dtype)


def all(
    p: Tensor, dim: Dim = None, keepdim: bool = False, *, where: Tensor | None = None, logic: Logic = INDEPENDENT
) -> Tensor:
    """Soft all: the probability that every event along ``dim`` happens. Product: prod p_i; Godel: min p_i.

    Args:
        p: soft booleans, or a bool tensor.
        dim: an int, a tuple, or None for all dimensions.
        where: bool mask, broadcastable to p: absent entries do not count; without any the answer is 1.
        logic: the assumed dependence. Lukasiewicz: max(1 - sum (1 - p_i), 0).

    Returns: shaped as ``torch.all``. Raises: ValueError for values outside of [0, 1]. Complexity: O(n).

    Example:
        >>> so.all(torch.tensor([0.5, 0.5, 1.0]))
        tensor(0.2500)
    """
    return _reduced(p, dim, keepdim, where, 1.0, _logic(logic).every)


def any(
    p: Tensor, dim: Dim = None, keepdim: bool = False, *, where: Tensor | None = None, logic: Logic = INDEPENDENT
) -> Tensor:
    """Soft any: the probability that an event along ``dim`` happens. Product: 1 - prod (1 - p_i); Godel: max p_i.

    Small p_i are not lost in the difference. Lukasiewicz: min(sum p_i, 1). Arguments as :func:`all`; nothing: 0.

    Example:
        >>> so.any(torch.tensor([0.5, 0.5, 0.0]))
        tensor(0.7500)
    """
    return _reduced(p, dim, keepdim, where, 0.0, _logic(logic).some)


def _logic(logic: Logic) -> Logic:
    if not isinstance(logic, Logic):
        raise TypeError(f"logic must be so.Product(), so.Godel() or so.Lukasiewicz(), got {logic!r}")
    return logic


def soft_boolean(p: Tensor, name: str) -> Tensor:
    """p as numbers in [0, 1]."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of soft booleans, got {type(p).__name__}")
    if not p.is_floating_point() and p.dtype != torch.bool:
        raise TypeError(f"{name} must be a floating-point or bool tensor of soft booleans, got dtype {p.dtype}")
    if p.dtype == torch.bool:
        return p.to(torch.get_default_dtype())
    if concrete(p) and p.numel():
        low, high = (float(v) for v in p.detach().aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"{name} must hold soft booleans, in [0, 1], got values from {low} to {high}; comparisons such as "
                "so.gt give them"
            )
    return p


def _pair(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    p, q = soft_boolean(p, "p"), soft_boolean(q, "q")
    try:
        torch.broadcast_shapes(p.shape, q.shape)
    except RuntimeError:
        raise ValueError(f"p and q of shapes {tuple(p.shape)} and {tuple(q.shape)} do not broadcast") from None
    wide = wide_dtype(p.device)
    return p.to(wide), q.to(wide), torch.promote_types(p.dtype, q.dtype)


def _reduced(
    p: Tensor, dim: Dim, keepdim: bool, where: Tensor | None, nothing: float, formula: Callable[[Tensor], Tensor]
) -> Tensor:
    rows = Rows(soft_boolean(p, "p"), dim, where)
    if rows.n == 0:
        value = torch.full((*rows.batch, 1), nothing, dtype=rows.wide, device=rows.device)
    else:
        x = rows.x if rows.present is None else torch.where(rows.present, rows.x, nothing)
        value = rows.poisoned_value(formula(x))
    return rows.reduced(value, keepdim)
