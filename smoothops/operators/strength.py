"""How strong: the eps at which an operator mixes a given number of inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._axes import Rows
from .._regularizer import Mixing, Regularizer
from ..polytopes import Simplex
from ..regularizers import Quadratic
from . import choice, matrices, order, quantiles
from .order import Strength


def _of_choice(largest: bool) -> Callable[..., tuple[Rows, Strength]]:
    def build(x: Tensor, dim: Any = None, keepdim: bool = False, where: Tensor | None = None) -> Any:
        rows = choice._choices(x, dim, where, largest)
        return rows, lambda reg: Simplex().strength(rows, Simplex().check(reg))

    return build


def _of_mask(x: Tensor, k: Any, dim: int = -1, largest: bool = True, where: Tensor | None = None) -> Any:
    rows, polytope = choice._masked(x, k, dim, largest, where)
    return rows, lambda reg: polytope.strength(rows, polytope.check(reg))


def _of_sort(
    x: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, where: Tensor | None = None
) -> Any:
    return order.sorting(x, dim, descending, where)[::2]


def _of_topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, where: Tensor | None = None
) -> Any:
    return order.sorting(x, dim, largest, where)[::2]


def _of_statistic(x: Tensor, *_: Any, dim: Any = None, where: Tensor | None = None, **__: Any) -> Any:
    return order.sorting(x, dim, False, where)[::2]


def _of_matrix(x: Tensor, *_: Any, dim: int = -1, where: Tensor | None = None, **__: Any) -> Any:
    return order._ranking(x, dim, False, None, where)[::2]


def _of_rank(
    x: Tensor, dim: int = -1, descending: bool = False, weights: Tensor | None = None, where: Tensor | None = None
) -> Any:
    return order._ranking(x, dim, descending, weights, where)[::2]


_STRENGTHS: dict[Callable[..., Any], Callable[..., tuple[Rows, Strength]]] = {
    choice.argmax: _of_choice(True),
    choice.amax: _of_choice(True),
    choice.max: _of_choice(True),
    choice.argmin: _of_choice(False),
    choice.amin: _of_choice(False),
    choice.min: _of_choice(False),
    choice.topk_mask: _of_mask,
    order.sort: _of_sort,
    order.topk: _of_topk,
    order.rank: _of_rank,
    quantiles.kthvalue: lambda x, k=1, dim=-1, **given: _of_statistic(x, dim=dim, **given),
    quantiles.median: _of_statistic,
    quantiles.quantile: _of_statistic,
    matrices.argsort: _of_matrix,
    matrices.argtopk: _of_matrix,
    matrices.soft_permutation: _of_matrix,
}


def mixing_eps(
    operator: Callable[..., Any], x: Tensor, mixing: float = 3.0, *, smoothing: Any = Quadratic, **arguments: Any
) -> Tensor:
    """The eps, one a row, at which an output of ``operator`` mixes about ``mixing`` inputs.

    Args:
        operator: rank, sort, topk, topk_mask, argmax, amax, max, a minimum, an order statistic, argsort, ...
        x: (..., n, ...), as the operator takes it.
        mixing: the number of inputs, clamped to [1, n].
        smoothing: a regularizer class, or an object whose eps is ignored.
        arguments: the operator's own (dim, k, descending, where, weights).

    Counted are: rank, sort, topk: the block size, averaged over the items; the others: 1/sum p^2, p the weights with
    which the items move the threshold. The answer reaches the target and lies within one step, or 1 %, of it.

    Returns: detached, of x's dims with size 1 along dim, ready to be passed on as eps; unit as the operator's eps.
    Raises: ValueError for another operator. Complexity: about 10 to 30 solves of the operator, after one sort.

    Example:
        >>> so.mixing_eps(so.topk_mask, torch.tensor([0.0, 1.0, 2.0, 3.0]), k=2).shape
        torch.Size([1])
    """
    if operator not in _STRENGTHS:
        names = ", ".join(sorted(o.__name__ for o in _STRENGTHS))
        raise ValueError(f"mixing_eps does not know {getattr(operator, '__name__', operator)!r}; use one of {names}")
    if isinstance(smoothing, Regularizer):
        reg = dataclasses.replace(smoothing, eps=Mixing(mixing))
    elif isinstance(smoothing, type) and issubclass(smoothing, Regularizer):
        reg = smoothing(Mixing(mixing))
    else:
        raise TypeError(f"smoothing must be a regularizer or its class, got {smoothing!r}")
    rows, strength = _STRENGTHS[operator](x, **arguments)
    return rows.restore_parameter(strength(reg))
