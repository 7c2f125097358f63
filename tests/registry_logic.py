"""Lines of the registry for comparisons, logic and selection."""

from __future__ import annotations

import torch
from oracles import spread
from registry_more import CONSTANT, PAIR, STAY, STEP, UNIT
from registry_parts import ITEMS, SIMPLEX, Kind, Operator, constant
from torch import Tensor

import smoothops as so

SOFT = tuple(f for f in STEP if f != "straight")  # of a composition each step has its own straight-through gradient
COMPOSED = {**CONSTANT, "half": "the steps are rounded before they meet", "row strength": "a reduction"}
REDUCED = Kind("invariant", None, 0)
BUMP = {**STAY, "bounded": "a product of two steps"}
PROGRAMME = {"certificate": "not a programme over a polytope", "danskin": "not a programme over a polytope"}


def floating(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def placed(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
    """The buckets of each entry against the edges -0.5, 0.25, 1, times fixed values."""
    weights = so.bucketize(x, floating(torch.tensor([-0.5, 0.25, 1.0]), x), smoothing=s)
    return (weights * spread(4).to(weights)).sum(-1)


def taken(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
    """Fixed values at the soft argmax of x along d, kept."""
    d = d % x.ndim
    values = (
        floating(torch.linspace(0, 1, x.shape[d], dtype=torch.float64), x).expand(x.movedim(d, -1).shape).movedim(-1, d)
    )
    return so.take_along_dim(values, so.argmax(x, d, smoothing=s).movedim(d, -1).unsqueeze(d), d)


# fmt: off
LOGIC = [
    Operator("gt", lambda x, s, d: so.gt(x, 0.25, smoothing=s), ITEMS, STEP, hard=lambda x, d: (x > 0.25).to(x.dtype),
             centre=constant(0.5), exempt={**UNIT, **STAY, **CONSTANT}),
    Operator("le", lambda x, s, d: so.le(x, x.flip(d) / 2, smoothing=s), Kind(None, None, 0), STEP,
             hard=lambda x, d: (x <= x.flip(d) / 2).to(x.dtype), exempt={**PAIR, **CONSTANT}),
    Operator("eq", lambda x, s, d: so.eq(x, 0.25, smoothing=s), ITEMS, STEP,
             hard=lambda x, d: (x == 0.25).to(x.dtype), centre=constant(1.0), exempt={**UNIT, **BUMP, **CONSTANT}),
    Operator("ne", lambda x, s, d: so.ne(x, x.flip(d) / 2, smoothing=s), Kind(None, None, 0), STEP,
             hard=lambda x, d: (x != x.flip(d) / 2).to(x.dtype), exempt={**PAIR, **BUMP, **CONSTANT}),
    Operator("isclose", lambda x, s, d: so.isclose(x, 0.25, 0.1, 0.2, smoothing=s), ITEMS, STEP,
             hard=lambda x, d: torch.isclose(x, torch.tensor(0.25, dtype=x.dtype), 0.1, 0.2).to(x.dtype),
             centre=constant(1.0), exempt={**UNIT, **BUMP, **CONSTANT}),
    Operator("between", lambda x, s, d: so.between(x, -0.5, 0.75, smoothing=s), ITEMS, STEP,
             hard=lambda x, d: ((x >= -0.5) & (x <= 0.75)).to(x.dtype), centre=constant(0.0),
             exempt={**UNIT, **BUMP, **CONSTANT}),
    Operator("bucketize", placed, ITEMS, STEP, exempt={**UNIT, **BUMP, **CONSTANT}),
    Operator("all", lambda x, s, d: so.all(so.heaviside(x, smoothing=s), d, True), REDUCED, SOFT,
             exempt={**COMPOSED, "bounded": "a product of steps"}),
    Operator("any", lambda x, s, d: so.any(so.heaviside(x, smoothing=s), d, True), REDUCED, SOFT,
             exempt={**COMPOSED, "bounded": "a product of steps"}),
    Operator("any-lukasiewicz", lambda x, s, d: so.any(so.gt(x, 1.0, smoothing=s), d, True, logic=so.Lukasiewicz()),
             REDUCED, SOFT, exempt={**COMPOSED, **UNIT, "bounded": "a sum of steps"}),
    Operator("where", lambda x, s, d: so.where(so.heaviside(x, smoothing=s), x, x.flip(d) / 2), Kind(None, None, 1),
             SOFT, exempt={**COMPOSED, **PAIR, "bounded": "a product", "extreme": "infinities of partial weight"}),
    Operator("take_along_dim", taken, Kind(None, 0.0, 0), SIMPLEX,
             exempt={**PROGRAMME, **COMPOSED, "bounded": "a sum of weights"}),
]
# fmt: on
