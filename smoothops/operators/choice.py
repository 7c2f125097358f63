"""Choices: argmax and max over the simplex (one item), topk_mask over the capped simplex (k items)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._axes import Dim, Rows, check_tensor, single_dim
from ..polytopes import CappedSimplex, Simplex
from ..regularizers import Quadratic, Tsallis
from ..smoothing import SmoothingLike


class Extremum(NamedTuple):
    """What ``max`` and ``min`` return: the soft extremum, and the weights that attain it, shaped like x."""

    values: Tensor
    indices: Tensor


# --- one item: the simplex -------------------------------------------------------------------------------------------


def argmax(
    x: Tensor, dim: int | None = None, keepdim: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = 0.1,
) -> Tensor:  # fmt: skip
    """Soft argmax: weights y = argmax_{y in simplex} <x, y> - eps Omega(y), summing to 1 along ``dim``.

    Args:
        x: (..., n, ...).
        dim: the dimension to choose along; None chooses over all entries.
        keepdim: accepted and moot: the weights have the shape of x.
        where: bool mask, broadcastable to x; absent items have weight 0.
        smoothing: a number eps, in the unit of x, means Entropy(eps), softmax(x/eps). Also Quadratic, Tsallis,
            Perturbed (the shares of the noisy argmax), Hard.

    Returns: weights shaped like x. -inf has weight 0, +inf all the weight; ties share equally (Hard: the first).
    Raises: ValueError for a smoothing not defined on the simplex, IndexError for an empty or missing dim.
    Complexity: O(n). Source: Blondel, Roulet 2024; Martins, Astudillo 2016.

    Example:
        >>> so.argmax(torch.tensor([1.0, 3.0, 2.0]), smoothing=so.Quadratic(2.0))
        tensor([0.0000, 0.7500, 0.2500])
    """
    return _choose(x, dim, where, smoothing, largest=True)


def argmin(
    x: Tensor, dim: int | None = None, keepdim: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = 0.1,
) -> Tensor:  # fmt: skip
    """Soft argmin: ``argmax(-x)``; +inf has weight 0. See :func:`argmax`.

    Example:
        >>> so.argmin(torch.tensor([1.0, 3.0, 2.0]), smoothing=so.Quadratic(2.0))
        tensor([0.7500, 0.0000, 0.2500])
    """
    return _choose(x, dim, where, smoothing, largest=False)


def amax(
    x: Tensor, dim: Dim = (), keepdim: bool = False, *, where: Tensor | None = None, smoothing: SmoothingLike = 0.1
) -> Tensor:
    """Soft maximum: m = max_{y in simplex} <x, y> - eps Omega(y); its gradient is ``argmax(x)``.

    Args:
        x: (..., n, ...).
        dim: one dimension, a tuple, or () for all.
        keepdim: keep the reduced dimensions with size 1.
        where: bool mask, broadcastable to x; absent items do not count.
        smoothing: a number eps, in the unit of x, means Entropy(eps): eps logsumexp(x/eps). Also as :func:`argmax`.

    Returns: values in x's unit, at least the hard maximum (Omega is 0 at the vertices). -inf for an all-absent row.
    Raises: ValueError for a smoothing not defined on the simplex, IndexError for an empty or missing dim.
    Complexity: O(n). Source: Nesterov 2005, "Smooth minimization of non-smooth functions".

    Example:
        >>> so.amax(torch.tensor([0.5, 0.0, -1.0]), smoothing=so.Quadratic(1.0))
        tensor(0.5625)
    """
    rows = _choices(x, dim, where, True)
    return rows.reduced(rows.poisoned_value(Simplex().value_problem(rows, smoothing)), keepdim)


def amin(
    x: Tensor, dim: Dim = (), keepdim: bool = False, *, where: Tensor | None = None, smoothing: SmoothingLike = 0.1
) -> Tensor:
    """Soft minimum: ``-amax(-x)``, at most the hard minimum. See :func:`amax`.

    Example:
        >>> so.amin(torch.tensor([0.0, 1.0]), smoothing=0.0)
        tensor(0.)
    """
    return -amax(-check_tensor(x), dim, keepdim, where=where, smoothing=smoothing)


def max(
    x: Tensor, dim: int | Tensor | None = None, keepdim: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = 0.1,
) -> Any:  # fmt: skip
    """Soft ``torch.max``: of all entries, along a dim, or of two tensors.

    max(x) is a scalar, ``amax(x)``. max(x, dim) is the named tuple (values, indices): ``amax`` and the ``argmax``
    weights, shaped like x; with Perturbed each draws noise of its own. max(x, other) is the elementwise soft maximum,
    over the simplex of the pair.
    For arguments, errors, complexity and source see :func:`amax`.

    Example:
        >>> so.max(torch.tensor([[1.0, 3.0, 2.0]]), dim=1, smoothing=so.Quadratic(2.0)).values
        tensor([3.1250])
    """
    if isinstance(dim, Tensor):
        pair = torch.stack(torch.broadcast_tensors(check_tensor(x), check_tensor(dim, "other")), -1)
        return amax(pair, -1, where=where, smoothing=smoothing)
    if dim is None:
        return amax(x, (), keepdim, where=where, smoothing=smoothing)
    rows = _choices(x, single_dim(dim), where, True)
    values = Simplex().value_problem(rows, smoothing, _first_max)
    weights = Simplex().problem(rows, smoothing)
    return Extremum(rows.reduced(rows.poisoned_value(values), keepdim), rows.restore(weights))


def min(
    x: Tensor, dim: int | Tensor | None = None, keepdim: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = 0.1,
) -> Any:  # fmt: skip
    """Soft ``torch.min``: the negative of :func:`max` of the negatives; the weights are ``argmin``'s.

    Example:
        >>> so.min(torch.tensor([1.0, 3.0, 2.0]), smoothing=0.0)
        tensor(1.)
    """
    flipped = -check_tensor(dim, "other") if isinstance(dim, Tensor) else dim
    found = max(-check_tensor(x), flipped, keepdim, where=where, smoothing=smoothing)
    return Extremum(-found.values, found.indices) if isinstance(found, Extremum) else -found


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """Sparsemax: the Euclidean projection of x onto the simplex, ``argmax(x, dim, smoothing=Quadratic(1))``.

    Source: Martins, Astudillo 2016, "From softmax to sparsemax".

    Example:
        >>> so.sparsemax(torch.tensor([0.5, 0.0, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    return argmax(x, dim, smoothing=Quadratic(1.0))


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """Entmax: ``argmax(x, dim, smoothing=Tsallis(alpha, 1))``; softmax at alpha = 1, sparsemax at 2.

    ``alpha`` is a number >= 1 or a tensor, 0-d or of x's dims with size 1 along ``dim``, with gradient.
    Source: Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models".

    Example:
        >>> so.entmax(torch.tensor([1.0, 0.3, -0.2, 0.8]))
        tensor([0.4970, 0.1260, 0.0110, 0.3660])
    """
    return argmax(x, dim, smoothing=Tsallis(alpha, 1.0))


def _first_max(rows: Rows) -> Tensor:
    """The maximum as torch.max(x, dim) differentiates it: through the entry that comes first, amax through all ties."""
    return rows.lowered().max(-1, keepdim=True).values


def _choices(x: Tensor, dim: Dim, where: Tensor | None, largest: bool) -> Rows:
    x = check_tensor(x)
    rows = Rows(x if largest else -x, dim, where)
    if rows.n == 0:
        raise IndexError(f"cannot choose along dim {dim!r} of size 0 of a tensor of shape {tuple(x.shape)}")
    return rows


def _choose(x: Tensor, dim: int | None, where: Tensor | None, smoothing: SmoothingLike, largest: bool) -> Tensor:
    rows = _choices(x, None if dim is None else single_dim(dim), where, largest)
    return rows.restore(Simplex().problem(rows, smoothing))


# --- k items: the capped simplex -------------------------------------------------------------------------------------


def topk_mask(
    x: Tensor, k: float | Tensor, dim: int = -1, largest: bool = True, *, where: Tensor | None = None,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft top-k mask: y = argmax <x, y> - eps Omega(y) over {y in [0, 1]^n : sum y = k}.

    Args:
        x: (..., n, ...).
        k: 0 <= k <= n, may be fractional; a number, or a tensor (0-d, or size 1 along ``dim``) with gradient.
        largest: False for the k smallest.
        where: bool mask; with fewer than k items present each of them has weight 1.
        smoothing: a number eps, in the unit of x, means Quadratic(eps); None: Quadratic(Mixing(3.0)), eps from x.
            Also Entropy, Tsallis, BinaryEntropy, Laplace; Perturbed and Hard, without gradient in k.

    Returns: weights shaped like x, summing to k along ``dim``. -inf has weight 0; ties share equally.
    Raises: ValueError for k out of range or a smoothing not defined on the capped simplex.
    Complexity: O(n) a Newton step. Source: Sander et al. 2023; Struski et al. 2025.

    Example:
        >>> so.topk_mask(torch.tensor([1.0, 0.3, -0.2, 0.8]), 2, smoothing=1.0)
        tensor([0.9667, 0.2667, 0.0000, 0.7667])
    """
    rows, polytope = _masked(x, k, dim, largest, where)
    return rows.restore(polytope.problem(rows, smoothing))


def _masked(x: Tensor, k: float | Tensor, dim: int, largest: bool, where: Tensor | None) -> tuple[Rows, CappedSimplex]:
    x = check_tensor(x)
    return Rows(x if largest else -x, single_dim(dim), where), CappedSimplex(k)
