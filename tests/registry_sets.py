"""Lines of the registry: sets known by an oracle or by constraints, here the simplex, which has a closed form too."""

from __future__ import annotations

import torch
from registry_parts import WEIGHTS, Kind, Operator, hard_vertex, on_last, on_last_max, simplex
from torch import Tensor

import smoothops as so

VALUE = Kind("invariant", 1.0, 1)
ONLY_QUADRATIC = ("quadratic", "number", "hard", "straight")
FINITE = {"extreme": "infinities and strengths beyond the digits of float64 raise"}
SOLVED = {
    **FINITE,
    "precision": "a gradient that is exactly 0 comes out of a linear solve as 1e-12",
    "ties": "to the digits of theta/eps",
}


def corner(theta: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(theta.argmax(-1), theta.shape[-1])


ORACLE = so.OraclePolytope(corner)


def oracle(n: int) -> so.Polytope:
    return ORACLE


DESCRIBED: dict[int, so.Polytope] = {}


def described(n: int) -> so.Polytope:
    if n not in DESCRIBED:
        import cvxpy as cp

        y = cp.Variable(n)
        DESCRIBED[n] = so.ConvexSet(y, [y >= 0, cp.sum(y) == 1])
    return DESCRIBED[n]


# fmt: off
SETS = [
    Operator("OraclePolytope.argmax", on_last(oracle), WEIGHTS, ONLY_QUADRATIC, hard=hard_vertex(simplex),
             exempt={**FINITE, "ties": "equal to the digits of theta/eps"}),
    Operator("OraclePolytope.max", on_last_max(oracle), VALUE, ONLY_QUADRATIC, exempt=FINITE),
    Operator("ConvexSet.argmax", on_last(described), WEIGHTS, ("quadratic", "number"), exempt=SOLVED),
    Operator("ConvexSet.max", on_last_max(described), VALUE, ("quadratic", "number"), exempt=SOLVED),
]
# fmt: on
