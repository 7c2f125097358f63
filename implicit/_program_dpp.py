"""Which expression of a problem cannot be differentiated with respect to parameters, and how to rewrite it."""

from __future__ import annotations

from typing import Any

from ._program_form import quadratic_scope


def check_dpp(problem: Any) -> None:
    """ValueError unless the problem is convex, and affine in its parameters where it must be (DPP)."""
    if problem.is_mixed_integer():
        raise ValueError("the problem has boolean or integer variables: its solution is not differentiable; relax them")
    if not problem.is_dcp():
        part = smallest(problem, dpp=False)
        raise ValueError(
            f"the problem is not convex by cvxpy's rules (DCP): {describe(part)} is not; see dcp.stanford.edu"
        )
    with quadratic_scope():
        objective = problem.objective.is_dcp(dpp=True)
    if objective and all(c.is_dcp(dpp=True) for c in problem.constraints):
        return
    raise ValueError(not_dpp(problem))


def not_dpp(problem: Any) -> str:
    part = smallest(problem, dpp=True)
    return (
        f"the problem is convex, but not in a form that can be differentiated with respect to its parameters (DPP): "
        f"{describe(part)} is not affine in them. {rewrite(part)}"
    )


def smallest(problem: Any, dpp: bool) -> Any:
    """The smallest part of the problem that breaks the rules."""
    from contextlib import nullcontext

    from cvxpy.utilities import scopes

    def kept(part: Any) -> bool:
        with scopes.dpp_scope() if dpp else nullcontext():
            return bool(part.is_dcp())

    for root in [problem.objective, *problem.constraints]:
        part, worse = root, [] if kept(root) else [root]
        while worse:
            part = worse[0]
            worse = [a for a in part.args if not kept(a)]
        if part is not root or not kept(root):
            return part
    return problem.objective


def describe(part: Any) -> str:
    text = " ".join(str(part).split())
    return repr(text if len(text) <= 120 else text[:117] + "...")


def rewrite(part: Any) -> str:
    """What to write instead, by the kind of the offending atom."""
    name = type(part).__name__
    if name in ("quad_form", "QuadForm", "SymbolicQuadForm"):
        return "Write cp.sum_squares(L @ x) with a parameter L, L'L = P."
    if name == "quad_over_lin":
        return "Pass the reciprocal of the denominator as a parameter and multiply by it."
    if name in ("MulExpression", "multiply"):
        if all(a.parameters() for a in part.args):
            return (
                "It multiplies parameters: make the product one new parameter, computed in torch, or introduce a "
                "variable with an equality constraint for the factor that holds a variable too."
            )
        return "Make the parametric factor one parameter, computed in torch."
    if name == "DivExpression":
        return "Make 1 / parameter a new parameter, computed in torch, and multiply by it."
    if not part.variables():
        return "Make it one new parameter, computed in torch from the old ones."
    return (
        "Make its parametric part a new parameter, computed in torch, or a new variable with t == ... as a constraint."
    )
