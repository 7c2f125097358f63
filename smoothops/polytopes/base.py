"""What a polytope is: a set C over which linear functions can be maximized, hard or regularized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._axes import Rows
from .._regularizer import FAMILIES, Mixing, Regularizer
from ..regularizers import Quadratic
from ..smoothing import Hard, Problem, SmoothingLike, StraightThrough, as_smoothing


class Polytope(ABC):
    """A set C of vectors y of shape (..., n), or of matrices where ``event_dims`` names two dimensions.

    Each method works on the last dimension, or on ``event_dims``, flattened.

    argmax:  y(theta) = argmax_{y in C} <theta, y> - eps Omega(y)
    max:     m(theta) = max_{y in C}    <theta, y> - eps Omega(y),     grad m = y
    """

    role: ClassVar[str]  # what a regularizer must declare to soften this set
    default: ClassVar[type[Regularizer]] = Quadratic  # the regularizer that a bare number means
    default_eps: ClassVar[Any] = Mixing(3.0)
    coupled: ClassVar[bool] = True  # the items of a row depend on each other
    bounded: ClassVar[bool] = True  # every linear function has a maximum
    event_dims: tuple[int, ...] = (-1,)  # the dimensions of one y: a ClassVar, or set by the instance

    # --- what a subclass supplies, on rows (..., n) -------------------------------------------------------------------

    @abstractmethod
    def _hard(self, rows: Rows) -> Tensor:
        """A vertex that maximizes <x, y>, ties as torch breaks them."""

    @abstractmethod
    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        """The regularized argmax."""

    @abstractmethod
    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        """The regularized maximum, (..., 1)."""

    @abstractmethod
    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        """eps as (..., 1), chosen from the data where it is ``Mixing``."""

    @abstractmethod
    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        """Whether each y (..., n) lies in C up to ``tol``: bool of shape (...)."""

    @abstractmethod
    def vertices(self, n: int | None = None) -> Tensor:
        """All vertices, (number, n). Exponentially many for most sets: for tests and small n."""

    def _fused(self, rows: Rows, reg: Regularizer) -> Tensor | None:
        """The same as ``_soft``, NaN and all, by a compiled pass; None where there is none."""
        return None

    def _family(self, reg: Regularizer) -> type[Regularizer]:
        """The scalar functions that ``reg`` stands for on this set."""
        return type(reg)

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        """sum omega at a vertex, (..., 1) or broadcastable: what shifts Omega to 0 there."""
        return family.vertex(shape) * rows.x.sum(-1, keepdim=True)

    def _hard_max(self, rows: Rows) -> Tensor:
        y = self._hard(rows)
        return torch.where(y == 0, 0, rows.x * y).sum(-1, keepdim=True)

    # --- what a user calls --------------------------------------------------------------------------------------------

    def maximize(self, theta: Tensor) -> Tensor:
        """A vertex y that maximizes <theta, y>; ties as torch breaks them. theta: (..., n)."""
        rows = Rows(theta, self.event_dims, together=self.coupled)
        return rows.restore(rows.poisoned(self._hard(rows)))

    def argmax(self, theta: Tensor, smoothing: SmoothingLike = None) -> Tensor:
        """The regularized argmax y(theta), shaped like theta; ValueError for a smoothing not defined on C."""
        rows = Rows(theta, self.event_dims, together=self.coupled)
        return rows.restore(self.problem(rows, smoothing))

    def max(self, theta: Tensor, smoothing: SmoothingLike = None) -> Tensor:
        """The regularized maximum m(theta), shape (...); its gradient is ``argmax``."""
        rows = Rows(theta, self.event_dims, together=self.coupled)
        return rows.reduced(rows.poisoned_value(self.value_problem(rows, smoothing)), False)

    def penalty(self, y: Tensor, smoothing: SmoothingLike = None) -> Tensor:
        """eps Omega(y) for y in C, shape (...), shifted to be 0 at the vertices of C. Hard has penalty 0."""
        reg = as_smoothing(smoothing, self.default, self.default_eps)
        rows = Rows(y, self.event_dims)
        if not isinstance(reg, (Regularizer, Hard, StraightThrough)):
            raise ValueError(
                f"the Omega of {type(reg).__name__} is not known; penalty needs one of {', '.join(FAMILIES)}"
            )
        if not isinstance(reg, Regularizer):
            return torch.zeros(rows.batch, dtype=rows.dtype, device=rows.device)
        if isinstance(reg.eps, Mixing):
            raise ValueError("penalty needs a number or tensor eps: Mixing depends on theta, see mixing_eps")
        family, shape = self._family(self.check(reg)), rows.parameter(reg.shape, "alpha")
        omega = family.omega(rows.x, shape).sum(-1, keepdim=True) - self._vertex_energy(rows, family, shape)
        return rows.reduced(rows.poisoned_value(rows.parameter(reg.eps, "eps") * omega), False)

    # --- shared with the operators ------------------------------------------------------------------------------------

    def problem(self, rows: Rows, smoothing: SmoothingLike) -> Tensor:
        """The answer (..., n), with NaN in the rows that hold one, in x's dtype or a wider one."""

        def soft(reg: Regularizer) -> Tensor:
            y = self._fused(rows, self.check(reg))
            return rows.poisoned(self._soft(rows, reg)) if y is None else y

        def sampled(p: Any) -> Tensor:
            return rows.poisoned(self._mean(p.average, rows, p))

        bound = as_smoothing(smoothing, self.default, self.default_eps)
        hard = lambda: rows.poisoned(self._hard(rows))  # noqa: E731
        return bound.solve(Problem(hard, soft, None, sampled if self.bounded else None))

    def value_problem(
        self, rows: Rows, smoothing: SmoothingLike, hard: Callable[[Rows], Tensor] | None = None
    ) -> Tensor:
        def known() -> Tensor:
            return (hard or self._hard_max)(rows)

        def soft(reg: Regularizer) -> Tensor:
            return self._soft_max(rows, self.check(reg))

        def sampled(p: Any) -> Tensor:
            value, exact = self._mean(p.maximum, rows, p).sum(-1, keepdim=True), known()
            return torch.where(exact.isinf(), exact, value)  # +inf, or -inf where no item may be chosen

        bound = as_smoothing(smoothing, self.default, self.default_eps)
        return bound.solve(Problem(known, soft, None, sampled if self.bounded else None))

    def _mean(self, estimate: Callable[..., Tensor], rows: Rows, p: Any) -> Tensor:
        """``estimate``, the average or the maximum of a Perturbed, from the hard answers of the rows under noise."""
        theta, eps = rows.lowered(), rows.parameter(p.eps, "eps")
        if self.coupled:
            return estimate(theta, lambda v: self._hard(rows.at(v)), eps)
        # each item by itself: the noise of the others would only add variance to its gradient
        each = lambda v: self._hard(rows.at(v.squeeze(-1))).unsqueeze(-1)  # noqa: E731
        return estimate(theta.unsqueeze(-1), each, eps.unsqueeze(-1)).squeeze(-1)

    def check(self, reg: Regularizer) -> Regularizer:
        """``reg``, or a ValueError that lists what softens this set."""
        check_role(reg, self.role, type(self).__name__)
        return reg


def check_role(reg: Regularizer, role: str | Iterable[str], name: str) -> str:
    """The first role in which ``reg`` can soften ``name``, else a ValueError that lists what is allowed."""
    roles = (role,) if isinstance(role, str) else tuple(role)
    for found in roles:
        if found in type(reg).roles:
            return found
    allowed = ", ".join(sorted(f for f, c in FAMILIES.items() if c.roles.intersection(roles)))
    raise ValueError(f"{type(reg).__name__} is not defined on {name}; use one of {allowed}, or Hard")
