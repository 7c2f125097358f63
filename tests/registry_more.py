"""Lines of the registry: elementwise operators, order statistics, and the orders of the Laplace law."""

from __future__ import annotations

import torch
from oracles import hard_rank, present, spread
from registry_parts import (
    ABSENT,
    BOX,
    ITEMS,
    KL_SORT,
    ORDER,
    PAIRS,
    RANKS,
    VALUES,
    WEIGHTS,
    Kind,
    Operator,
    constant,
    item_sum,
    mean,
)
from torch import Tensor

import smoothops as so

STEP = (*BOX, "laplace")
LIFT = Kind("equivariant", None, 1)
UNIT = {"scale": "its bounds or the integers are a unit of their own"}
STAY = {"row strength": "each entry stands alone, eps broadcasts to x", "nan": "NaN stays in its entry"}
CONSTANT = {"transforms/hard": "torch gives it a constant derivative, which has no graph"}
ROUNDING = {**UNIT, **STAY, **CONSTANT, "bounded": "the slope of a sum of steps", "extreme": "see test_elementwise"}
PAIR = {**STAY, "row strength": "the row is a pair"}
STATISTIC = {"eps": 2.0, "exempt": {**KL_SORT, "certificate": "an entry of a sort", "row strength": "a reduction"}}
TORCHS = {f"precision/{f}": "torch places q in float32" for f in ("hard", "straight", "straight-entropy")}
QUANTILE = {"eps": 2.0, "exempt": {**STATISTIC["exempt"], **TORCHS}}
LAW = {"certificate": "not a programme over a polytope", "danskin": "not a programme over a polytope"}
LAPLACE_VALUES = Kind("invariant", 1.0, 1, symmetric_ties=False)


def placed(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
    """P v along d for a fixed v."""
    matrix = so.argsort(x, d, smoothing=s)
    return (matrix * spread(x.shape[d]).to(matrix)).sum(-1)


def reordered(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
    """P x along d."""
    v = x.movedim(d, -1).unsqueeze(-1)
    return so.soft_permutation(x, d, smoothing=s).matmul(v).squeeze(-1).movedim(-1, d)


def relaxed(family: str) -> list[Operator]:
    """What takes a relaxation of a sort: SoftSort and NeuralSort see no order of the items, a network does."""
    blind = family != "network"
    values = Kind("invariant" if blind else None, 1.0, 1, symmetric_ties=False)
    whole = {"centre": mean} if blind else {"total": item_sum}
    rest = {"full": family != "softsort"}
    statistic = {"exempt": {"row strength": "a reduction"}, **rest}

    # fmt: off
    lines = [
        Operator("sort-relaxed", lambda x, s, d: so.sort(x, d, smoothing=s), values, (family,),
                 hard=lambda x, d: x.sort(d).values, **whole),
        Operator("sort-descending-relaxed", lambda x, s, d: so.sort(x, d, True, smoothing=s), values, (family,),
                 hard=lambda x, d: x.sort(d, descending=True).values, **whole, **rest),
        Operator("sort-where-relaxed", lambda x, s, d: so.sort(x, d, where=present(x, d), fill=0.0, smoothing=s),
                 values, (family,), without=lambda x, s, d: so.sort(x, d, smoothing=s), exempt=ABSENT),
        Operator("topk-relaxed", lambda x, s, d: so.topk(x, 2, d, smoothing=s), values, (family,),
                 hard=lambda x, d: x.topk(2, d).values, **rest),
        Operator("kthvalue-relaxed", lambda x, s, d: so.kthvalue(x, min(2, x.shape[d]), d, True, smoothing=s), values,
                 (family,), hard=lambda x, d: x.kthvalue(2, d, True).values, **statistic),
        Operator("median-relaxed", lambda x, s, d: so.median(x, d, True, smoothing=s), values, (family,),
                 hard=lambda x, d: x.median(d, True).values, **statistic),
        Operator("quantile-relaxed", lambda x, s, d: so.quantile(x, 0.3, d, True, smoothing=s), values, (family,),
                 **statistic),
        Operator("argsort-relaxed", placed, Kind(None, 0.0, 0, symmetric_ties=False), (family,),
                 exempt={"bounded": "rows of a matrix", "half/neuralsort": "a difference of rounded cotangents"},
                 **rest),
    ]
    # fmt: on
    return lines


# fmt: off
MORE = [
    Operator("heaviside", lambda x, s, d: so.heaviside(x, smoothing=s), ITEMS, STEP, exempt=STAY,
             hard=lambda x, d: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)), centre=constant(0.5), base=True),
    Operator("sign", lambda x, s, d: so.sign(x, smoothing=s), ITEMS, STEP, hard=lambda x, d: x.sign(),
             centre=constant(0.0), exempt={**STAY, **CONSTANT, "bounded": "twice a step"}),
    Operator("relu", lambda x, s, d: so.relu(x, smoothing=s), LIFT, STEP, hard=lambda x, d: x.relu(), exempt=STAY),
    Operator("abs", lambda x, s, d: so.abs(x, smoothing=s), LIFT, STEP, hard=lambda x, d: x.abs(), exempt=STAY),
    Operator("maximum", lambda x, s, d: so.maximum(x, x.flip(d) / 2, smoothing=s), PAIRS, STEP, exempt=PAIR,
             hard=lambda x, d: torch.maximum(x, x.flip(d) / 2)),
    Operator("minimum", lambda x, s, d: so.minimum(x, x.flip(d) / 2, smoothing=s), PAIRS, STEP, exempt=PAIR,
             hard=lambda x, d: torch.minimum(x, x.flip(d) / 2)),
    Operator("clamp", lambda x, s, d: so.clamp(x, -0.5, 0.75, smoothing=s), Kind("equivariant", None, 0), STEP,
             hard=lambda x, d: x.clamp(-0.5, 0.75), exempt={**UNIT, **STAY, "bounded/hard": "its slope is 1"}),
    Operator("floor", lambda x, s, d: so.floor(x, smoothing=s), LIFT, STEP, eps=0.2, hard=lambda x, d: x.floor(),
             exempt=ROUNDING),
    Operator("ceil", lambda x, s, d: so.ceil(x, smoothing=s), LIFT, STEP, eps=0.2, hard=lambda x, d: x.ceil(),
             exempt=ROUNDING),
    Operator("round", lambda x, s, d: so.round(x, smoothing=s), LIFT, STEP, eps=0.2, hard=lambda x, d: x.round(),
             exempt=ROUNDING),
    # order statistics
    Operator("kthvalue", lambda x, s, d: so.kthvalue(x, min(2, x.shape[d]), d, True, smoothing=s), VALUES, ORDER,
             hard=lambda x, d: x.kthvalue(2, d, True).values, **STATISTIC),
    Operator("median", lambda x, s, d: so.median(x, d, True, smoothing=s), VALUES, ORDER,
             hard=lambda x, d: x.median(d, True).values, **STATISTIC),
    Operator("quantile", lambda x, s, d: so.quantile(x, 0.3, d, True, smoothing=s), VALUES, ORDER, **QUANTILE),
    # the Laplace law
    Operator("rank-laplace", lambda x, s, d: so.rank(x, d, smoothing=s), WEIGHTS, ("laplace",), hard=hard_rank,
             exempt={**LAW, "bounded": "n items may add up: n/2 eps"}, **RANKS),
    Operator("rank-where-laplace", lambda x, s, d: so.rank(x, d, where=present(x, d), smoothing=s), WEIGHTS,
             ("laplace",), eps=0.4, without=lambda x, s, d: so.rank(x, d, smoothing=s),
             exempt={**LAW, **ABSENT, "bounded": "n items may add up: n/2 eps"}),
    Operator("sort-laplace", lambda x, s, d: so.sort(x, d, smoothing=s), LAPLACE_VALUES, ("laplace",), exempt=LAW,
             hard=lambda x, d: x.sort(d).values),
    Operator("sort-descending-laplace", lambda x, s, d: so.sort(x, d, True, smoothing=s), LAPLACE_VALUES,
             ("laplace",), hard=lambda x, d: x.sort(d, descending=True).values, exempt=LAW),
    Operator("argsort", placed, Kind(None, 0.0, 0, symmetric_ties=False), ("laplace",),
             exempt={**LAW, "bounded": "rows of a matrix"}),
    Operator("soft_permutation", reordered, LAPLACE_VALUES, ("laplace",), eps=0.3, total=item_sum, centre=mean,
             exempt={**LAW, "bounded": "P depends on x too"}),
    *(line for family in ("softsort", "neuralsort", "network") for line in relaxed(family)),
]
# fmt: on
