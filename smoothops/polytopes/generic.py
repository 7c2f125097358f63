"""A polytope known only by its linear maximization oracle: projections by Wolfe's algorithm, gradients by the face."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._axes import Rows
from .._opaque import opaque
from .._regularizer import Mixing, Regularizer
from ..regularizers import Quadratic
from ._wolfe import project, within
from .base import Polytope


@dataclass(frozen=True, eq=False)
class OraclePolytope(Polytope):
    """The convex hull of what ``oracle`` returns: any polytope over which linear functions can be maximized.

    Args:
        oracle: theta (rows, n) in float64 -> (rows, n), in each row a vertex that maximizes <theta, y>.

    Quadratic only: the projection of theta/eps by Wolfe's algorithm, ended where no vertex improves by more than
    rounding. Derivatives of all orders: near theta the answer is the projection onto the affine hull of the face on
    which it lies (SparseMAP), found by calls with theta moved by 1e-8. Perturbed works too.
    Complexity: one call of the oracle on all rows for each vertex that enters a face, O(n k^2) beside it for k active
    vertices; memory O(n^2) a row. Source: Wolfe 1976; Niculae, Martins, Blondel, Cardie 2018, "SparseMAP".

    Example:
        >>> corner = lambda theta: torch.nn.functional.one_hot(theta.argmax(-1), theta.shape[-1])
        >>> so.OraclePolytope(corner).argmax(torch.tensor([1.0, 0.3, -0.2, 0.8]), so.Quadratic(1.0))
        tensor([0.6000, 0.0000, 0.0000, 0.4000])
    """

    oracle: Callable[[Tensor], Tensor]

    role = "oracle"
    default_eps = 1.0
    made: ClassVar[weakref.WeakValueDictionary[int, OraclePolytope]] = weakref.WeakValueDictionary()
    count: ClassVar[Any] = itertools.count()

    def __post_init__(self) -> None:
        if not callable(self.oracle):
            raise TypeError(f"oracle must be a function of theta (rows, n), got {type(self.oracle).__name__}")
        self._register()

    def _register(self) -> None:
        object.__setattr__(self, "key", next(self.count))
        self.made[self.key] = self  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def vertex(self, theta: np.ndarray) -> np.ndarray:
        """The oracle on numbers (rows, n), checked."""
        if not np.isfinite(theta).all():
            raise ValueError("theta must be finite: an oracle need not know infinities")
        y = self.oracle(torch.from_numpy(theta.copy()))
        if not isinstance(y, Tensor) or y.shape != theta.shape:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the oracle must return a vertex for each row, of shape {theta.shape}; got {shape}")
        found = y.detach().to(device="cpu", dtype=torch.float64).numpy()
        if not np.isfinite(found).all():
            raise ValueError("the oracle returned NaN or inf; a polytope is bounded")
        return found

    def check(self, reg: Regularizer) -> Regularizer:
        if not isinstance(reg, Quadratic):
            raise ValueError(
                f"{type(reg).__name__} is not defined on OraclePolytope, which is known only by its vertices; use "
                "Quadratic, Perturbed or Hard, or describe the set to ConvexSet"
            )
        return reg

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing has no meaning on OraclePolytope; give a number")
        return rows.parameter(reg.eps, "eps")

    def _hard(self, rows: Rows) -> Tensor:
        return vertex_rows(rows.x.detach(), self.key)  # type: ignore[attr-defined]

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        u = rows.x / self.strength(rows, reg)
        origin, basis = face_rows(u.detach(), self.key)  # type: ignore[attr-defined]
        along = (basis.mT @ (u - origin).unsqueeze(-1)).squeeze(-1)
        return origin + (basis @ along.unsqueeze(-1)).squeeze(-1)

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        # theta - eps y is normal to the face, so that the derivative through y vanishes: the gradient is y (Danskin)
        y = self._soft(rows, reg)
        return (rows.x * y - self.strength(rows, reg) * y.square() / 2).sum(-1, keepdim=True)

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        return torch.zeros_like(rows.x[..., :1])  # Omega = |y|^2 / 2: the vertices need not have one norm

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        """Whether each y is no further than ``tol`` from the polytope, by its projection."""
        rows = Rows(y)
        numbers = _numbers(rows.x)
        found = within(self.vertex, numbers, tol) if numbers.size else numbers.sum(-1)
        return torch.as_tensor(found, dtype=torch.bool, device=y.device).reshape(rows.batch) & ~rows.bad.squeeze(-1)

    def vertices(self, n: int | None = None) -> Tensor:
        raise NotImplementedError("OraclePolytope does not list its vertices; it finds one at a time by maximize")


def _numbers(u: Tensor) -> np.ndarray:
    return u.detach().cpu().double().reshape(-1, u.shape[-1]).numpy()


def _vertex(u: Tensor, key: int) -> Tensor:
    rows = _numbers(u)
    found = OraclePolytope.made[key].vertex(rows) if rows.size else rows
    return torch.from_numpy(found.copy()).reshape(u.shape).to(u)


def _face(u: Tensor, key: int) -> tuple[Tensor, Tensor]:
    rows, n = _numbers(u), u.shape[-1]
    oracle = OraclePolytope.made[key].vertex
    origin, basis = np.zeros_like(rows), np.zeros((*rows.shape, n))
    if rows.size:
        for i, row in enumerate(project(oracle, rows)):
            origin[i] = row.vertices[0]
            basis[i, :, : row.basis.shape[1]] = row.basis
    batch = u.shape[:-1]
    return torch.from_numpy(origin).reshape(*batch, n).to(u), torch.from_numpy(basis).reshape(*batch, n, n).to(u)


vertex_rows = opaque("oracle_vertex(Tensor u, int key) -> Tensor", lambda u, key: torch.empty_like(u))(_vertex)
face_rows = opaque(
    "oracle_face(Tensor u, int key) -> (Tensor, Tensor)",
    lambda u, key: (torch.empty_like(u), u.new_empty(*u.shape, u.shape[-1])),
)(_face)
