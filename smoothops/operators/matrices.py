"""Orders as matrices: argsort, argtopk, and the doubly stochastic operator that they are the dense form of."""

from __future__ import annotations

import torch
from torch import Tensor

from .._axes import Rows, check_tensor, single_dim
from .._regularizer import Mixing, Regularizer
from ..lapsum import LapSum
from ..polytopes.base import check_role
from ..regularizers import Laplace
from ..relaxations import Relaxation
from ..smoothing import Problem, SmoothingLike, as_smoothing
from ..soft_permutation import SoftPermutation
from ..stochastic import Perturbed
from ._matched import Matched
from ._placed import Placed
from .order import ascending, check_count, descending_order, positions


def soft_permutation(
    x: Tensor, dim: int = -1, descending: bool = False, *, where: Tensor | None = None, smoothing: SmoothingLike = None
) -> SoftPermutation:
    """The doubly stochastic operator P near the permutation that sorts x, without forming it.

    P_ki = F((b_k - x_i)/eps) - F((b_{k-1} - x_i)/eps), F the Laplace law, b_k such that sum_i F((b_k - x_i)/eps) = k.

    Args:
        x: (..., n, ...).
        descending: the first position is that of the largest.
        where: bool mask; absent items have zero columns, and the last positions zero rows.
        smoothing: a number eps, in the unit of x, means Laplace(eps); None: Laplace(Mixing(3.0)).

    Returns: an operator (batch..., n positions, n items) with ``P @ v``, ``P.T @ u`` in O(n), and ``P.dense()``.
    P x is monotone and keeps the sum of x. Raises: ValueError for another smoothing than Laplace.
    Complexity: one sort, then O(n) a product. Source: Struski et al. 2025, "LapSum".

    Example:
        >>> P = so.soft_permutation(torch.tensor([2.0, 0.0, 1.0]), smoothing=0.2)
        >>> P @ torch.tensor([2.0, 0.0, 1.0])
        tensor([0.0415, 1.0000, 1.9585])
    """
    reg = as_smoothing(smoothing, Laplace, Mixing(3.0))
    if not isinstance(reg, Laplace):
        raise ValueError(f"soft_permutation needs Laplace(eps), got {type(reg).__name__}; for others see argsort")
    rows = Rows(x, single_dim(dim), where)
    order, present = descending_order(rows)
    scale = LapSum(rows.x.gather(-1, order), positions(rows, present), present).argmax_strength(rows, reg)
    return SoftPermutation(rows, order, present, scale, descending)


def argsort(
    x: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, *, where: Tensor | None = None,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft argsort: for each position a distribution over the items.

    Laplace: the dense form of :func:`soft_permutation`, whose arguments these are. Entropy, Quadratic: the programme
    y = argmax <rho x', P> - eps Omega(P) over Birkhoff's polytope, rho = (1, ..., n). Hard: a permutation matrix.

    Args:
        x: (..., n, ...).
        stable: accepted; Hard is always stable, as ``torch.argsort(x, stable=True)``.
        smoothing: a number eps, in the unit of x, means Laplace(eps); None: Laplace(Mixing(3.0)). Also Entropy(eps,
            solver=Sinkhorn(...)), Quadratic, SortingNetwork, Perturbed (mean of x + eps Z), SoftSort, NeuralSort, Hard.

    Returns: a soft index, x's shape, positions along ``dim``, and a last dim of items; doubly stochastic, except for
    SoftSort and NeuralSort, whose columns do not sum to 1. Absent items have zero columns. See :func:`take_along_dim`.
    Raises: ValueError for a smoothing without a matrix. Complexity: O(n^2), that of the answer; on Birkhoff more.

    Example:
        >>> so.argsort(torch.tensor([2.0, 0.0, 1.0]), smoothing=so.Hard())
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])
    """
    rows = Rows(x, single_dim(dim), where)

    def finished(matrix: Tensor) -> Tensor:
        bad = rows.bad.unsqueeze(-1)
        return torch.where(bad, matrix + rows.poison.sum(-1, keepdim=True).unsqueeze(-1), matrix).to(rows.dtype)

    def soft(reg: Regularizer) -> Tensor:
        if check_role(reg, ("cdf", "transport"), "argsort") == "transport":
            return finished(Placed(rows, descending).matrix(Matched(reg)))
        return soft_permutation(x, dim, descending, where=where, smoothing=reg).dense()

    def hard() -> Tensor:
        return finished(_permutation(rows, descending))

    def relaxed(r: Relaxation) -> Tensor:
        return finished(Placed(rows, descending).matrix(r))

    def sampled(p: Perturbed) -> Tensor:
        def flat(v: Tensor) -> Tensor:
            return _permutation(rows.at(v), descending).flatten(-2)

        matrix = p.average(rows.lowered(), flat, rows.parameter(p.eps, "eps"))
        return finished(matrix.reshape(*matrix.shape[:-1], rows.n, rows.n))

    matrix = as_smoothing(smoothing, Laplace, Mixing(3.0)).solve(Problem(hard, soft, relaxed, sampled))
    return matrix.movedim(-2, rows.dims[0]) if rows.dims else matrix


def _permutation(rows: Rows, descending: bool) -> Tensor:
    """The permutation matrix of the stable sort, in the wide dtype; absent items and the last positions are 0."""
    order, present = descending_order(rows, stable_ascending=not descending)
    if not descending:  # ascending, with the absent items still last
        order = ascending(order, present)
        present = None if present is None else ascending(present, present)
    matrix = torch.zeros(*order.shape, rows.n, dtype=rows.wide, device=order.device)
    one = torch.ones_like(order, dtype=rows.wide) if present is None else present.to(rows.wide)
    return matrix.scatter(-1, order.unsqueeze(-1), one.unsqueeze(-1))


def argtopk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, where: Tensor | None = None,
    smoothing: SmoothingLike = None,
) -> Tensor:  # fmt: skip
    """Soft positions of the top k: the first k rows of the soft :func:`argsort`, largest first.

    Args:
        x: (..., n, ...).
        k: how many, an int in [0, n].
        largest: False for the k smallest, smallest first.
        sorted: accepted; the rows are always in order.
        where, smoothing: as in :func:`argsort`.

    Returns: a soft index (..., k, ..., n), a distribution over the items for each place.
    Raises: ValueError for k out of range. Complexity: O(n^2) time and memory.

    Example:
        >>> so.argtopk(torch.tensor([2.0, 0.0, 1.0]), 1, smoothing=so.Hard())
        tensor([[1., 0., 0.]])
    """
    x = check_tensor(x)
    if isinstance(k, Tensor):
        raise TypeError("k must be an int in argtopk: all rows have the same number of positions")
    most = check_count(x, k, dim)
    matrix = argsort(x, dim, largest, where=where, smoothing=smoothing)
    return matrix.narrow(dim % x.ndim if x.ndim else 0, 0, most)
