"""Selection: the soft if of values (where), and reading and writing at soft positions.

A soft index is a distribution over positions: the integer index's shape with a last dimension of size n. The operators
take both: integers go to torch's own functions, floating-point indices are averaged over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._axes import check_tensor, concrete, floating_dtype, normalize_dims, single_dim, tensor_like, wide_dtype
from ._blend import blend, known_finite
from .comparisons import interval
from .logic import soft_boolean
from .operators import argmax
from .smoothing import SmoothingLike

Number = Tensor | float


def where(condition: Tensor, x: Number, y: Number) -> Tensor:
    """Soft where: c x + (1 - c) y, exact at both ends.

    A branch of weight exactly 0 contributes exactly 0 to the value and to the gradients with respect to x and y, also
    where it is inf or nan.

    Args:
        condition: soft booleans c in [0, 1], with gradient x - y, or bool.
        x, y: tensors or numbers; all three broadcast.

    Returns: in the floating dtype that x and y promote to. Raises: ValueError for c outside of [0, 1].
    It cannot cure where(c, sqrt(x), 0), whose NaN arises inside sqrt at its backward pass: use :func:`cond`.
    Source: Blondel, Roulet 2024, chapter 5.

    Example:
        >>> so.where(torch.tensor([0.25, 0.0]), torch.tensor([4.0, torch.inf]), torch.tensor([0.0, 1.0]))
        tensor([1., 1.])
    """
    c = soft_boolean(condition, "condition")
    dtype = floating_dtype(x, y)
    c = c.to(torch.promote_types(torch.promote_types(dtype, c.dtype), torch.float32))
    c, a, b = torch.broadcast_tensors(c, tensor_like(x, c), tensor_like(y, c))
    # of its own: as after torch.where, the caller may go on to change x and y in place
    return blend(c, a.clone(), b.clone()).to(dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Soft ``torch.take``: the entries of the flattened x at ``index``, sum_j w_j x_j.

    index: integers of any shape, or a soft index (..., x.numel()). Returns: shaped as the integer index.

    Example:
        >>> so.take(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.0, 0.0, 0.5]))
        tensor(2.5000)
    """
    x = check_tensor(x)
    if not _soft(index, x.numel(), "take"):
        return torch.take(x, index)
    return _mixed(index, x.reshape(-1).expand(*index.shape[:-1], -1)).to(x.dtype)


def take_along_dim(x: Tensor, indices: Tensor, dim: int = -1) -> Tensor:
    """Soft ``torch.take_along_dim``: y_k = sum_j w_kj x_j along ``dim``; the other dims broadcast.

    Args:
        x: (..., n, ...).
        indices: integers (..., m, ...), or a soft index (..., m, ..., n), as :func:`argsort` gives it.

    Returns: (..., m, ...). Raises: ValueError for a soft index over another number of positions.
    Complexity: O(m n) a row.

    Example:
        >>> x = torch.tensor([5.0, 1.0, 2.0])
        >>> so.take_along_dim(x, so.argsort(x, smoothing=so.Hard()), 0)
        tensor([1., 2., 5.])
    """
    x, dim = check_tensor(x), _dim(x, dim)
    if not _soft(indices, x.shape[dim], "take_along_dim"):
        return torch.take_along_dim(x, indices, dim)
    if indices.ndim != x.ndim + 1:
        raise ValueError(f"a soft index for x of {x.ndim} dims has one more dim, got shape {tuple(indices.shape)}")
    w = indices.movedim(dim, -2)
    return _mixed(w, x.movedim(dim, -1).unsqueeze(-2)).to(x.dtype).movedim(-1, dim)


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Soft ``torch.gather``: as :func:`take_along_dim`, but dims other than ``dim`` are cut to the index's size.

    Example:
        >>> so.gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, torch.tensor([[[0.5, 0.5]]]))
        tensor([[1.5000]])
    """
    x, dim = check_tensor(x), _dim(x, dim)
    if not _soft(index, x.shape[dim], "gather"):
        return torch.gather(x, dim, index)
    if index.ndim != x.ndim + 1:
        raise ValueError(f"a soft index for x of {x.ndim} dims has one more dim, got shape {tuple(index.shape)}")
    return take_along_dim(_cut(x, dim, index.shape), index, dim)


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Soft ``torch.index_select``: the slices of x along ``dim`` at ``index``.

    index: integers (m,), or a soft index (m, n); the answer has m in place of n. O(m n) a row.

    Example:
        >>> so.index_select(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0, torch.tensor([[0.5, 0.5]]))
        tensor([[2., 3.]])
    """
    x, dim = check_tensor(x), _dim(x, dim)
    if not _soft(index, x.shape[dim], "index_select"):
        return torch.index_select(x, dim, index)
    if index.ndim != 2:
        raise ValueError(f"a soft index for index_select has shape (m, n), got {tuple(index.shape)}")
    moved = x.movedim(dim, 0)
    y = _product(_positions(index), moved.reshape(len(moved), -1))
    return y.reshape(len(index), *moved.shape[1:]).to(x.dtype).movedim(0, dim)


def narrow(x: Tensor, dim: int, start: int | Tensor, length: int, *, fill: float | None = None) -> Tensor:
    """Soft ``torch.narrow``: y_i = sum_j w_j x_{j + i}, i = 0, ..., length - 1, at a soft start w.

    Args:
        x: (..., n, ...).
        start: an int, an integer tensor (0-d), or a soft index (n,), or (..., n) with the other dims of x before.
        length: an int in [0, n].
        fill: what is read beyond the end. None: a start after n - length counts as n - length, so that the slice stays
            inside. Nothing ever wraps around.

    Returns: (..., length, ...). Raises: ValueError for a length or an integer start out of range. O(n length) a row.

    Example:
        >>> so.narrow(torch.tensor([1.0, 2.0, 3.0]), 0, torch.tensor([0.5, 0.5, 0.0]), 2)
        tensor([1.5000, 2.5000])
    """
    x, dim = check_tensor(x), _dim(x, dim)
    n = x.shape[dim]
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= n:
        raise ValueError(f"length must be an int in [0, {n}], the size of dim {dim}, got {length!r}")
    rows = x.movedim(dim, -1)
    if fill is not None:
        rows = torch.nn.functional.pad(rows, (0, length), value=float(fill))
    if not isinstance(start, Tensor) or not start.is_floating_point():
        if int(start) < 0 or int(start) + length > rows.shape[-1]:
            raise ValueError(f"start {int(start)} with length {length} leaves dim {dim} of size {n}; see fill=")
        return rows.narrow(-1, int(start), length).movedim(-1, dim)
    _soft(start, n, "narrow")
    w = _positions(start)
    if fill is None and length > 0:
        w = torch.cat([w[..., : n - length], w[..., n - length :].sum(-1, keepdim=True)], -1)
    windows = rows.unfold(-1, length, 1)[..., : w.shape[-1], :] if length else rows[..., :0]
    if not length:
        return windows.movedim(-1, dim)
    return _product(w.unsqueeze(-2), windows).squeeze(-2).to(x.dtype).movedim(-1, dim)


def scatter(x: Tensor, dim: int, index: Tensor, src: Number) -> Tensor:
    """Soft ``torch.scatter``: writes src at ``index`` along ``dim``, one after the other: x <- x + w_k (src_k - x).

    Args:
        x: (..., n, ...).
        index: integers (..., m, ...), or a soft index (..., m, ..., n) over the n positions.
        src: (..., m, ...), or a number.

    Returns: a new tensor shaped like x; where writes meet, the last one wins. Dims other than ``dim`` may be shorter in
    the index: what lies beyond is kept. Raises: ValueError for shapes that do not fit. Complexity: O(m n) a row.

    Example:
        >>> so.scatter(torch.tensor([1.0, 1.0]), 0, torch.tensor([[0.5, 0.5]]), 3.0)
        tensor([2., 2.])
    """
    x, dim = check_tensor(x), _dim(x, dim)
    if not _soft(index, x.shape[dim], "scatter"):
        return torch.scatter(x, dim, index, src.to(x.dtype) if isinstance(src, Tensor) else src)
    if index.ndim != x.ndim + 1:
        raise ValueError(f"a soft index for x of {x.ndim} dims has one more dim, got shape {tuple(index.shape)}")
    w = _positions(index.movedim(dim, -2))
    values = src if isinstance(src, Tensor) else tensor_like(src, w).expand(index.shape[:-1])
    if any(a < b for a, b in zip(values.shape, index.shape[:-1], strict=False)) or values.ndim != x.ndim:
        raise ValueError(f"src of shape {tuple(values.shape)} does not cover the index {tuple(index.shape[:-1])}")
    values = values[tuple(slice(s) for s in index.shape[:-1])].movedim(dim, -1).to(w.dtype)
    kept = (1 - w).flip(-2).cumprod(-2).flip(-2)  # of what a position held before the writes k, k + 1, ...
    after = torch.cat([kept[..., 1:, :], torch.ones_like(kept[..., :1, :])], -2)
    part = _cut(x, dim, index.shape).movedim(dim, -1).to(w.dtype)
    first = kept[..., 0, :] if w.shape[-2] else torch.ones_like(part)
    written = (_times(first, part) + _times(w * after, values.unsqueeze(-1)).sum(-2)).to(x.dtype).movedim(-1, dim)
    return written if written.shape == x.shape else _pasted(x, written)


def lookup(keys: Tensor, query: Tensor, values: Tensor, *, smoothing: SmoothingLike = 0.1) -> Tensor:
    """Soft dictionary: sum_j w_j values_j, w the soft argmax of -|query - key_j|^2; hard: the nearest key's value.

    Args:
        keys: (m,), or (m, d) vectors.
        query: any shape (...), or (..., d).
        values: (m, ...).
        smoothing: a number eps, in the unit of a squared distance, means Entropy(eps); or as for :func:`argmax`.

    Returns: (...) followed by the dims of one value. Raises: ValueError for shapes that do not fit.
    Complexity: O(m d) a query. Source: Graves, Wayne, Danihelka 2014, "Neural Turing machines".

    Example:
        >>> keys, values = torch.tensor([0.0, 1.0]), torch.tensor([10.0, 20.0])
        >>> so.lookup(keys, torch.tensor([0.0, 0.5]), values, smoothing=0.5)
        tensor([11.1920, 15.0000])
    """
    keys, query, values = check_tensor(keys, "keys"), check_tensor(query, "query"), check_tensor(values, "values")
    if keys.ndim not in (1, 2) or (keys.ndim == 2 and (not query.ndim or query.shape[-1] != keys.shape[-1])):
        raise ValueError(
            f"keys must be (m,) for queries (...), or (m, d) for queries (..., d), got {tuple(keys.shape)} for "
            f"{tuple(query.shape)}"
        )
    if values.ndim == 0 or len(values) != len(keys):
        raise ValueError(f"values must have one entry for each of the {len(keys)} keys, got {tuple(values.shape)}")
    wide = wide_dtype(keys.device)
    gap = query.to(wide).unsqueeze(-1 if keys.ndim == 1 else -2) - keys.to(wide)
    distance = gap.square() if keys.ndim == 1 else gap.square().sum(-1)
    w = argmax(-distance, -1, smoothing=smoothing)
    y = _product(_positions(w), values.reshape(len(keys), -1))
    return y.reshape((*w.shape[:-1], *values.shape[1:])).to(values.dtype)


def bucketize(
    x: Tensor, edges: Tensor | Sequence[float], *, right: bool = False, smoothing: SmoothingLike = None
) -> Tensor:
    """Soft ``torch.bucketize``: how much of x lies in each bucket, w_j = F((x - e_{j-1})/eps) - F((x - e_j)/eps).

    Args:
        x: any shape.
        edges: (m,), not decreasing, with gradient.
        right: for ``Hard`` at an edge: the bucket is e_{j-1} < x <= e_j, or, if right, e_{j-1} <= x < e_j.
        smoothing: a number eps, in the unit of x, means Entropy(eps), as in :func:`gt`; None: Entropy(0.1).

    Returns: weights (..., m + 1) that sum to 1; with ``Hard`` one-hot. Differences of one law, not products of two.
    Raises: ValueError for edges that decrease. Complexity: O(m) an entry. Source: Blondel, Roulet 2024, chapter 5.

    Example:
        >>> so.bucketize(torch.tensor([0.5]), torch.tensor([0.0, 1.0]), smoothing=so.Quadratic(1.0))
        tensor([[0.2500, 0.5000, 0.2500]])
    """
    x = check_tensor(x)
    edges = check_tensor(edges, "edges") if isinstance(edges, Tensor) else tensor_like(edges, x)
    if edges.ndim != 1:
        raise ValueError(f"edges must have shape (m,), got {tuple(edges.shape)}; for rows of edges see searchsorted")
    return _buckets(x, edges, right, smoothing)


def searchsorted(sorted_sequence: Tensor, x: Tensor, *, right: bool = False, smoothing: SmoothingLike = None) -> Tensor:
    """Soft ``torch.searchsorted``: the place of each x in a sorted sequence, as weights over its m + 1 places.

    sorted_sequence: (..., m); x: (..., k), or (m,) with x of any shape. Returns (..., k, m + 1), summing to 1.
    Otherwise as :func:`bucketize`.

    Example:
        >>> so.searchsorted(torch.tensor([0.0, 1.0]), torch.tensor([0.5]), smoothing=so.Hard())
        tensor([[0., 1., 0.]])
    """
    edges, x = check_tensor(sorted_sequence, "sorted_sequence"), check_tensor(x)
    if edges.ndim != 1 and edges.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit the sequences {tuple(edges.shape)}: all dims but the last agree"
        )
    return _buckets(x, edges if edges.ndim == 1 else edges.unsqueeze(-2), right, smoothing)


# --- what they share -------------------------------------------------------------------------------------------------


def _buckets(x: Tensor, edges: Tensor, right: bool, smoothing: SmoothingLike) -> Tensor:
    if concrete(edges) and bool((edges.diff(dim=-1) < 0).any()):
        raise ValueError("edges must not decrease; sort them first")
    wide, dtype = wide_dtype(x.device), torch.promote_types(x.dtype, edges.dtype)
    x, edges = x.to(wide).unsqueeze(-1), edges.to(wide)
    tied = (x == edges) & x.isinf()
    gap = torch.where(tied, 0, x) - torch.where(tied, 0, edges)
    end = torch.where(x.isnan(), x, torch.inf)
    at = float(right)
    return interval(torch.cat([end, gap], -1), torch.cat([gap, -end], -1), at, at, smoothing).to(dtype)


def _dim(x: Tensor, dim: int) -> int:
    (d,) = normalize_dims(single_dim(dim), x.ndim) or (0,)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension to index, got a 0-d tensor")
    return d


def _soft(index: Tensor, n: int, name: str) -> bool:
    """Whether ``index`` is a soft one over n positions; integers are not."""
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.is_complex():
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"the index of {name} must be an integer tensor, or a soft index of floats, got {kind}")
    if not index.is_floating_point():
        return False
    if index.ndim == 0 or index.shape[-1] != n:
        raise ValueError(
            f"a soft index of {name} over {n} positions has {n} weights in its last dim, got shape {tuple(index.shape)}"
        )
    return True


def _positions(w: Tensor) -> Tensor:
    return w.to(wide_dtype(w.device))


def _mixed(w: Tensor, x: Tensor) -> Tensor:
    """sum_j w_j x_j; weight exactly 0 leaves out inf and nan."""
    return _times(*torch.broadcast_tensors(_positions(w), x.to(wide_dtype(x.device)))).sum(-1)


def _times(w: Tensor, x: Tensor) -> Tensor:
    """w x, where weight exactly 0 leaves out inf and nan."""
    return w * (x if known_finite(x) else torch.where((w == 0) & ~x.isfinite(), 0, x))


def _product(w: Tensor, x: Tensor) -> Tensor:
    """The matrix product w x in the dtype of w, where weight exactly 0 leaves out inf and nan."""
    x = x.to(w.dtype)
    if known_finite(x):
        return w @ x
    y = w @ torch.where(x.isfinite(), x, 0)
    odd = torch.cat([x == torch.inf, x == -torch.inf, x.isnan()], -1).to(w.dtype)
    high, low, bad = ((w != 0).to(w.dtype) @ odd > 0).chunk(3, -1)
    return torch.where(bad | (high & low), torch.nan, torch.where(high, torch.inf, torch.where(low, -torch.inf, y)))


def _cut(x: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """x with its dims other than ``dim`` cut to those of an index."""
    if any(s > x.shape[d] for d, s in enumerate(shape[: x.ndim]) if d != dim):
        raise ValueError(f"the index {tuple(shape[: x.ndim])} is larger than x {tuple(x.shape)} beside dim {dim}")
    return x[tuple(slice(None) if d == dim else slice(s) for d, s in enumerate(shape[: x.ndim]))]


def _pasted(x: Tensor, corner: Tensor) -> Tensor:
    """x with ``corner`` in place of its first entries along every dim."""
    for d in reversed(range(x.ndim)):
        base = x[tuple(slice(s) for s in corner.shape[:d])]
        corner = base.slice_scatter(corner, d, 0, corner.shape[d])
    return corner
