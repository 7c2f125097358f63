"""Any convex set that cvxpy can describe, solved as a cone programme: the fallback, and the oracle of the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._axes import Rows
from .._regularizer import FAMILIES, Mixing, Regularizer
from .base import Polytope


@dataclass(frozen=True, eq=False)
class ConvexSet(Polytope):
    """{y : constraints}, any convex set described in cvxpy, through :func:`implicit.program`.

    Args:
        variable: the ``cvxpy.Variable`` y, a vector (n,) or a matrix (r, c), whose last dims theta then has.
        constraints: a list of cvxpy constraints on it, which may use further variables but no parameters.

    Quadratic is exact to rounding, also at ties; Entropy needs a set within y >= 0; Tsallis takes a number alpha.
    Omega is |y|^2/2, sum y log y, sum (y^alpha - y)/(alpha (alpha - 1)), not shifted. ``maximize`` of a polyhedron
    is a vertex if no further variables describe it. All derivatives. Complexity: a solver call and sparse LU a row.

    Example:
        >>> import cvxpy as cp
        >>> y = cp.Variable(3)
        >>> budget = so.ConvexSet(y, [y >= 0, cp.sum(y) <= 1, cp.norm(y) <= 0.8])
        >>> budget.argmax(torch.tensor([1.0, 0.5, 0.0]), so.Quadratic(1.0))
        tensor([0.7500, 0.2500, 0.0000])
    """

    variable: Any
    constraints: list[Any]
    _programs: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    role = "convex"
    default_eps = 1.0

    def __post_init__(self) -> None:
        import cvxpy as cp

        if not isinstance(self.variable, cp.Variable):
            raise TypeError(f"variable must be a cvxpy.Variable, got {type(self.variable).__name__}")
        if self.variable.ndim not in (1, 2):
            raise ValueError(f"variable must be a vector or a matrix, got shape {self.variable.shape}; use (1,)")
        if not isinstance(self.constraints, (list, tuple)):
            raise TypeError(f"constraints must be a list of cvxpy constraints, got {type(self.constraints).__name__}")
        object.__setattr__(self, "constraints", list(self.constraints))
        parameters = [p.name() for c in self.constraints for p in c.parameters()]
        if parameters:
            raise ValueError(f"the constraints hold parameters ({', '.join(parameters)}); use implicit.program")
        object.__setattr__(self, "event_dims", (-1,) if self.variable.ndim == 1 else (-2, -1))
        self._program(None)  # says at once what is not convex

    # --- the programmes, made once ------------------------------------------------------------------------------------

    def _program(self, reg: Regularizer | None) -> Any:
        """theta -> argmax <theta, y> - Omega(y) of ``reg`` at eps = 1, or of the linear function for None."""
        import cvxpy as cp

        import implicit

        key = None if reg is None else (type(reg), reg.shape)
        if key not in self._programs:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "torch.compile cannot trace cvxpy, which states the programme at the first call: call the "
                    "ConvexSet once with this smoothing before compiling"
                )
            y, theta = self.variable, cp.Parameter(self.variable.shape, name="theta")
            objective = cp.sum(cp.multiply(theta, y))
            if reg is not None:
                objective = objective - reg.at(1.0, reg.shape).cvxpy(y)  # type: ignore[attr-defined]
            problem = cp.Problem(cp.Maximize(objective), self.constraints)
            self._programs[key] = implicit.program(problem, [theta], [y])
            if reg is None and self._programs[key].core.cones.polyhedral:
                self._programs[key] = implicit.program(problem, [theta], [y], implicit.HiGHS())
        return self._programs[key]

    def _solve(self, reg: Regularizer | None, theta: Tensor) -> Tensor:
        """theta and the answer as rows (..., n)."""
        if theta.shape[-1] != self.variable.size:
            raise ValueError(f"theta has {theta.shape[-1]} entries for a variable of shape {self.variable.shape}")
        if not theta.numel():
            return theta.clone()
        shaped = theta.reshape(*theta.shape[:-1], *self.variable.shape)
        return self._program(reg)(shaped)[0].reshape(theta.shape)

    # --- a polytope ---------------------------------------------------------------------------------------------------

    def check(self, reg: Regularizer) -> Regularizer:
        if not hasattr(reg, "cvxpy"):
            allowed = ", ".join(sorted(name for name, family in FAMILIES.items() if hasattr(family, "cvxpy")))
            raise ValueError(
                f"{type(reg).__name__} is not defined on ConvexSet; use one of {allowed}, any regularizer with a "
                "method cvxpy(y) that gives eps Omega(y) as an expression of cvxpy, or Hard"
            )
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing has no meaning on ConvexSet, where nobody counts what is mixed; give a number")
        if isinstance(reg.shape, Tensor):
            raise ValueError(f"{type(reg).__name__} on ConvexSet needs a number alpha, which cvxpy compiles in")
        if type(reg).__name__ != "Quadratic" and not self._nonnegative():
            raise ValueError(f"{type(reg).__name__} needs a set within y >= 0; add the constraint, or use Quadratic")
        return reg

    def _nonnegative(self) -> bool:
        if "lowest" not in self._programs:
            n = self.variable.size
            try:
                lowest = self._solve(None, -torch.eye(n, dtype=torch.float64)).diagonal().min()
            except RuntimeError:  # unbounded below
                lowest = torch.tensor(-torch.inf)
            self._programs["lowest"] = bool(lowest >= -1e-6)
        return self._programs["lowest"]

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        assert not isinstance(reg.eps, Mixing)  # refused by check
        return rows.parameter(reg.eps, "eps")

    def _hard(self, rows: Rows) -> Tensor:
        return self._solve(None, rows.x.detach()).detach()

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._solve(reg, rows.x / self.strength(rows, reg))

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        # by Danskin the derivative through y vanishes, so that the gradient is y, and its derivatives are those of y
        y = self._soft(rows, reg)
        shape = rows.parameter(reg.shape, "alpha")
        linear = self._linear(type(reg), float(reg.shape))
        omega = type(reg).omega(y, shape).sum(-1, keepdim=True) - linear * y.sum(-1, keepdim=True)
        return (rows.x * y).sum(-1, keepdim=True) - self.strength(rows, reg) * omega

    def _linear(self, family: type[Regularizer], alpha: float) -> float:
        """By how much omega(y) of the library exceeds that of cvxpy, for each y: they differ in a linear term."""
        key = ("linear", family, alpha)
        if key not in self._programs:
            one = torch.ones((), dtype=torch.float64)
            ours = family.omega(one, torch.full_like(one, alpha))
            self._programs[key] = float(ours) - float(family.make(1.0, alpha).cvxpy(1.0).value)  # type: ignore[attr-defined]
        return self._programs[key]

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        return self._linear(family, float(shape.flatten()[0])) * rows.x.sum(-1, keepdim=True)

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        """Whether each y is no further than ``tol`` from the set, by its projection."""
        from ..regularizers import Quadratic

        rows = Rows(y, self.event_dims)
        apart = self._solve(Quadratic(1.0), rows.x.detach()) - rows.x
        return ((apart.abs().amax(-1, keepdim=True) <= tol) & ~rows.bad).reshape(rows.batch)

    def vertices(self, n: int | None = None) -> Tensor:
        raise NotImplementedError("ConvexSet does not list its vertices, which may be infinitely many; use maximize")
