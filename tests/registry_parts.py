"""What a line of the registry is made of: smoothings, kinds of answer, equations, and reasons for exceptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from oracles import rho
from torch import Tensor

import smoothops as so

# --- smoothings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A smoothing as a function of its strength."""

    make: Callable[[Any], Any]
    exempt: Mapping[str, str] = field(default_factory=dict)


NOT_REGULARIZED = {
    "certificate": "no eps Omega in its equation",
    "danskin": "no eps Omega in its equation",
    "centre": "no strength of its own",
    "strength": "no strength of its own",
}
SURROGATE = {
    **NOT_REGULARIZED,
    "gradcheck": "its gradient is, on purpose, not the derivative of its value; see test_straight_through",
}
ADAPTIVE = {
    "gradcheck": "eps follows the data without gradient; see test_mixing_is_a_fixed_strength",
    "certificate": "penalty needs a number",
    "danskin": "penalty needs a number",
    "centre": "chooses its own strength",
    "strength": "chooses its own strength",
    "bounded": "chooses its own strength",
}
STEEP = {"bounded": "phi' is unbounded where y goes to 0 for alpha > 2"}
FIXED = {
    "scale": "its strength is 1",
    "centre": "its strength is 1",
    "hard": "its strength is 1",
    "strength": "its strength is 1",
    "bounded": "its strength is 1",
}

FAMILIES = {
    "quadratic": Family(so.Quadratic),
    "entropy": Family(so.Entropy),
    "tsallis1": Family(partial(so.Tsallis, 1.0)),
    "tsallis1.25": Family(partial(so.Tsallis, 1.25)),
    "tsallis1.5": Family(partial(so.Tsallis, 1.5)),
    "tsallis2": Family(partial(so.Tsallis, 2.0)),
    "tsallis3": Family(partial(so.Tsallis, 3.0), STEEP),
    "binary": Family(so.BinaryEntropy),
    "laplace": Family(so.Laplace),
    "hard": Family(lambda eps: so.Hard(), NOT_REGULARIZED),
    "straight": Family(lambda eps: so.StraightThrough(so.Quadratic(eps)), SURROGATE),
    "straight-entropy": Family(lambda eps: so.StraightThrough(so.Entropy(eps)), SURROGATE),
    "number": Family(lambda eps: eps, {"certificate": "same as its regularizer", "danskin": "same"}),
    "default": Family(lambda eps: None, ADAPTIVE),
    "one": Family(lambda eps: so.Quadratic(1.0), FIXED),
    "entmax": Family(lambda eps: so.Tsallis(1.5, 1.0), FIXED),
}

# smoothings of matrices and sorts only
EXACTLY = so.Sinkhorn(tol=1e-15)
RELAXED = {
    "sinkhorn": Family(partial(so.Entropy, solver=EXACTLY)),
    "softsort": Family(so.SoftSort),
    "neuralsort": Family(so.NeuralSort),
    "network": Family(so.SortingNetwork),
}

SIMPLEX = (
    "entropy", "quadratic", "tsallis1.5", "tsallis1", "tsallis1.25", "tsallis2", "tsallis3", "number", "hard",
    "straight-entropy", "straight",
)  # fmt: skip
CAPPED = (
    "quadratic", "entropy", "tsallis1.5", "tsallis1", "tsallis1.25", "tsallis2", "tsallis3", "binary", "laplace",
    "number", "default", "hard", "straight",
)  # fmt: skip
BOX = ("entropy", "quadratic", "binary", "number", "hard", "straight")
ORDER = ("quadratic", "entropy", "number", "default", "hard", "straight", "straight-entropy")
WEIGHTED = ("quadratic", "number", "default", "hard", "straight")
CONE = ("quadratic", "number")


# --- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How an answer follows its input: y(P x) = P y or y; y(x + c) = y + shift c; y(s x, s^p eps) = s^degree y."""

    permutation: str | None  # "equivariant", "invariant" or None
    shift: float | None
    degree: int
    power: int = 1
    symmetric_ties: bool = True


WEIGHTS = Kind("equivariant", 0.0, 0)
MAXIMUM = Kind("invariant", 1.0, 1)
VALUES = Kind("invariant", 1.0, 1, power=-1, symmetric_ties=False)
ITEMS = Kind("equivariant", None, 0)  # each item stands alone
ITEMS_MAXIMUM = Kind("invariant", None, 1)
FIT = Kind(None, 1.0, 1, power=0, symmetric_ties=False)
CONE_POINT = Kind(None, None, 0, symmetric_ties=False)
CONE_MAXIMUM = Kind(None, None, 1, symmetric_ties=False)
PAIRS = Kind(None, None, 1, symmetric_ties=False)


# --- pieces of the lines below ---------------------------------------------------------------------------------------


def on_last(polytope: Callable[[int], so.Polytope]) -> Callable[..., Tensor]:
    """``argmax`` of a polytope of dimension n, along ``dim``."""
    return lambda x, s, d: polytope(x.shape[d]).argmax(x.movedim(d, -1), s).movedim(-1, d)


def on_last_max(polytope: Callable[[int], so.Polytope]) -> Callable[..., Tensor]:
    return lambda x, s, d: polytope(x.shape[d]).max(x.movedim(d, -1), s).unsqueeze(d)


def hard_vertex(polytope: Callable[[int], so.Polytope]) -> Callable[..., Tensor]:
    return lambda x, d: polytope(x.shape[d]).maximize(x.movedim(d, -1)).movedim(-1, d)


# --- the equation of each answer: (polytope, theta, point), point = argmax_{y in C} <theta, y> - eps Omega(y) ---------

Equation = tuple[so.Polytope, Tensor, Tensor]


def of(polytope: Callable[[int], so.Polytope], sign: int = 1) -> Callable[[Tensor, Tensor, str], Equation]:
    return lambda x, y, family: (polytope(x.shape[-1]), sign * x, y)


def of_sort(x: Tensor, y: Tensor, family: str) -> Equation:
    """theta = rho over the permutahedron of x; Entropy pools log y over the permutahedron of e^x."""
    theta = rho(x.shape[-1]).expand_as(x)
    if family == "entropy":
        return so.Permutahedron(x.exp()), theta, y.exp()
    return so.Permutahedron(x), theta, y


def of_descending_sort(x: Tensor, y: Tensor, family: str) -> Equation:
    return of_sort(x, y.flip(-1), family)


# --- operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Operator:
    """One operator, or one polytope method, with its arguments."""

    name: str
    call: Callable[[Tensor, Any, int], Tensor]
    kind: Kind
    smoothings: tuple[str, ...]
    eps: float = 0.7  # where about half of what can happen happens, on N(0, 1) and n = 6
    hard: Callable[[Tensor, int], Tensor] | None = None
    total: Callable[[Tensor], Any] | None = None  # what y sums to along the last dim
    centre: Callable[[Tensor], Any] | None = None  # y as eps -> inf, along the last dim
    equation: Callable[[Tensor, Tensor, str], Equation] | None = None
    maximum: int = 0  # 1 or -1: the call is the maximum (2), with this sign; its gradient is the point
    without: Callable[[Tensor, Any, int], Tensor] | None = None  # the same operator without ``where``
    exempt: Mapping[str, str] = field(default_factory=dict)
    base: bool = False  # all its smoothings belong to the default selection
    full: bool = False  # none of them does

    def __repr__(self) -> str:
        return self.name

    @property
    def method(self) -> bool:
        """Whether this is a method of a polytope, which works on the last dim."""
        return self.name[0].isupper()


ABSENT = {
    "permutation": "the mask stays in place; see test_absent_items_do_not_count",
    "shift": "padding does not shift",
}
INTERPOLATES = {"permutation": "the weights stay in place"}
PART = {"certificate": "a part of a sort; see test_topk_is_a_part_of_sort"}
KL_SORT = {
    "scale/entropy": "Entropy sorts e^x, which has no scale",
    "scale/straight-entropy": "Entropy sorts e^x, which has no scale",
    "total/entropy": "Entropy keeps no sum",
    "total/straight-entropy": "Entropy keeps no sum",
    "centre/entropy": "the log-mean-exp; see test_entropy_sort_tends_to_the_log_mean_exp",
}


def simplex(n: int) -> so.Polytope:
    return so.Simplex()


def capped(k: Any) -> Callable[[int], so.Polytope]:
    return lambda n: so.CappedSimplex(k)


def positions(n: int) -> so.Polytope:
    return so.Permutahedron(rho(n))


def box(n: int) -> so.Polytope:
    return so.Hypercube()


def cone(n: int) -> so.Polytope:
    return so.OrderPolytope()


def falling(n: int) -> so.Polytope:
    return so.OrderPolytope(decreasing=True)


def orders(w: Callable[[int], Tensor]) -> Callable[[int], so.Polytope]:
    return lambda n: so.Permutahedron(w(n))


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def equal_share(k: float) -> Callable[[Tensor], float]:
    return lambda x: k / x.shape[-1]


def constant(k: float) -> Callable[[Tensor], float]:
    return lambda x: k


def rank_sum(x: Tensor) -> float:
    return x.shape[-1] * (x.shape[-1] + 1) / 2


def rank_mean(x: Tensor) -> float:
    return (x.shape[-1] + 1) / 2


def item_sum(x: Tensor) -> Tensor:
    return x.sum(-1)


ONE = {"total": constant(1.0), "centre": equal_share(1.0)}
TWO = {"total": constant(2.0), "centre": equal_share(2.0)}
PARTIAL = {"total": constant(1.5), "centre": equal_share(1.5)}
RANKS = {"total": rank_sum, "centre": rank_mean, "eps": 0.4}
SORT = {"total": item_sum, "centre": mean, "eps": 2.0}
TOPK = {"eps": 2.0, "exempt": {**PART, **KL_SORT}}
