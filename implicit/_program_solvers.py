"""The solvers of canonical programmes: what they are called, how they list a triangle, and one call of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


class ConeSolver(ABC):
    """Numbers (x, y) for min x'Px/2 + q'x, s = b - Ax in K, from one call of a compiled solver."""

    name: ClassVar[str]  # in cvxpy

    @abstractmethod
    def solve(self, P: Any, q: Any, A: Any, b: Any, dims: Any) -> tuple[Any, Any, str]:
        """x, y and the solver's own word for how it went, from numpy arrays."""

    @staticmethod
    @abstractmethod
    def pairs(n: int) -> list[tuple[int, int]]:
        """The triangle of an n x n matrix in the solver's order."""


def check_setting(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


@dataclass(frozen=True, eq=False)
class Clarabel(ConeSolver):
    """Clarabel, an interior point method: the default solver of :func:`program`.

    Args:
        tol: tolerance of feasibility and gap; Newton steps on the optimality conditions follow anyway.
        max_iter: steps at most.

    Source: Goulart, Chen 2024, "Clarabel: an interior-point solver for conic programs with quadratic objectives".

    Example:
        >>> implicit.Clarabel(tol=1e-6)
        Clarabel(tol=1e-06, max_iter=200)
    """

    tol: float = 1e-9
    max_iter: int = 200

    name = "CLARABEL"

    def __post_init__(self) -> None:
        check_setting(self.tol, "tol")
        check_setting(self.max_iter, "max_iter")

    @staticmethod
    def pairs(n: int) -> list[tuple[int, int]]:
        return [(i, j) for j in range(n) for i in range(j + 1)]

    def solve(self, P: Any, q: Any, A: Any, b: Any, dims: Any) -> tuple[Any, Any, str]:
        import clarabel
        import numpy as np
        from scipy import sparse

        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_iter = int(self.max_iter)
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = self.tol
        cones: list[Any] = [clarabel.ZeroConeT(dims.zero)] if dims.zero else []
        cones += [clarabel.NonnegativeConeT(dims.nonneg)] if dims.nonneg else []
        cones += [clarabel.SecondOrderConeT(d) for d in dims.soc]
        cones += [clarabel.PSDTriangleConeT(d) for d in dims.psd]
        cones += [clarabel.ExponentialConeT()] * dims.exp
        cones += [clarabel.PowerConeT(a) for a in dims.p3d]
        upper = sparse.csc_matrix(np.triu(P))
        out = clarabel.DefaultSolver(upper, q, sparse.csc_matrix(A), b, cones, settings).solve()
        return np.array(out.x), np.array(out.z), str(out.status)


@dataclass(frozen=True, eq=False)
class SCS(ConeSolver):
    """SCS, a first-order method for large programmes: each step is cheap, and there are many.

    Args:
        eps: tolerance of feasibility and gap.
        max_iters: steps at most.

    Source: O'Donoghue, Chu, Parikh, Boyd 2016, "Conic optimization via operator splitting".

    Example:
        >>> implicit.SCS(eps=1e-6)
        SCS(eps=1e-06, max_iters=100000)
    """

    eps: float = 1e-8
    max_iters: int = 100_000

    name = "SCS"

    def __post_init__(self) -> None:
        check_setting(self.eps, "eps")
        check_setting(self.max_iters, "max_iters")

    @staticmethod
    def pairs(n: int) -> list[tuple[int, int]]:
        return [(i, j) for j in range(n) for i in range(j, n)]

    def solve(self, P: Any, q: Any, A: Any, b: Any, dims: Any) -> tuple[Any, Any, str]:
        import numpy as np
        import scs
        from scipy import sparse

        cone = {"z": dims.zero, "l": dims.nonneg, "q": dims.soc, "s": dims.psd, "ep": dims.exp, "p": dims.p3d}
        data = {"P": sparse.csc_matrix(np.triu(P)), "A": sparse.csc_matrix(A), "b": b, "c": q}
        options = {"eps_abs": self.eps, "eps_rel": self.eps, "max_iters": int(self.max_iters), "verbose": False}
        out = scs.SCS(data, {k: v for k, v in cone.items() if v}, **options).solve()
        return out["x"], out["y"], out["info"]["status"]


@dataclass(frozen=True, eq=False)
class HiGHS(ConeSolver):
    """HiGHS, a simplex method, for linear programmes: the solution is a vertex, also where it is not unique.

    Args:
        tol: tolerance of feasibility; Newton steps on the optimality conditions follow anyway.

    Source: Huangfu, Hall 2018, "Parallelizing the dual revised simplex method".

    Example:
        >>> implicit.HiGHS()
        HiGHS(tol=1e-09)
    """

    tol: float = 1e-9

    name = "CLARABEL"  # the canonical form is the same

    def __post_init__(self) -> None:
        check_setting(self.tol, "tol")

    @staticmethod
    def pairs(n: int) -> list[tuple[int, int]]:
        return Clarabel.pairs(n)

    def solve(self, P: Any, q: Any, A: Any, b: Any, dims: Any) -> tuple[Any, Any, str]:
        import numpy as np
        from scipy import optimize, sparse

        if P.any() or dims.soc or dims.psd or dims.exp or dims.p3d:
            raise ValueError("HiGHS() is for linear programmes; use Clarabel()")
        free, options = dims.zero, {"primal_feasibility_tolerance": self.tol, "dual_feasibility_tolerance": self.tol}
        equal = {"A_eq": sparse.csr_matrix(A[:free]), "b_eq": b[:free]} if free else {}
        below = {"A_ub": sparse.csr_matrix(A[free:]), "b_ub": b[free:]} if len(b) > free else {}
        found = optimize.linprog(q, **below, **equal, bounds=(None, None), method="highs-ds", options=options)
        if found.x is None:
            word = {2: "Infeasible", 3: "Unbounded"}.get(found.status, found.message)
            return np.zeros_like(q), np.zeros_like(b), word
        dual = [found[part].marginals for part, used in (("eqlin", equal), ("ineqlin", below)) if used]
        return found.x, -np.concatenate(dual) if dual else np.zeros(0), "Optimal"
