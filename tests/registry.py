"""The registry: every operator x smoothing that the laws hold for, and the few exceptions with their reasons.

A new operator is one line in OPERATORS. Every law (test_laws_*.py) then applies to it, except those that its line, its
kind or its smoothing lists under ``exempt`` with a reason. Each operator is called as ``call(x, smoothing, dim)`` and
answers with as many dimensions as x: length n, k or 1 along ``dim``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import hard_mask, hard_one, hard_part, hard_rank, importance, present, repeated, spread
from registry_logic import LOGIC
from registry_matrices import MATRICES
from registry_more import MORE
from registry_parts import (
    ABSENT,
    BOX,
    CAPPED,
    CONE,
    CONE_MAXIMUM,
    CONE_POINT,
    FAMILIES,
    FIT,
    INTERPOLATES,
    ITEMS,
    ITEMS_MAXIMUM,
    KL_SORT,
    MAXIMUM,
    ONE,
    ORDER,
    PAIRS,
    PARTIAL,
    RANKS,
    RELAXED,
    SIMPLEX,
    SORT,
    TOPK,
    TWO,
    VALUES,
    WEIGHTED,
    WEIGHTS,
    Family,
    Kind,
    Operator,
    box,
    capped,
    cone,
    constant,
    falling,
    hard_vertex,
    item_sum,
    of,
    of_descending_sort,
    of_sort,
    on_last,
    on_last_max,
    orders,
    positions,
    simplex,
)
from registry_sets import SETS
from torch import Tensor

import smoothops as so

# fmt: off
OPERATORS = [
    # one item
    Operator("argmax", lambda x, s, d: so.argmax(x, d, smoothing=s), WEIGHTS, SIMPLEX, hard=hard_one,
             equation=of(simplex), base=True, **ONE),
    Operator("argmin", lambda x, s, d: so.argmin(x, d, smoothing=s), WEIGHTS, SIMPLEX,
             hard=lambda x, d: hard_one(-x, d), equation=of(simplex, -1), **ONE),
    Operator("argmax-where", lambda x, s, d: so.argmax(x, d, where=present(x, d), smoothing=s), WEIGHTS, SIMPLEX,
             total=constant(1.0), without=lambda x, s, d: so.argmax(x, d, smoothing=s), exempt=ABSENT),
    Operator("amax", lambda x, s, d: so.amax(x, d, True, smoothing=s), MAXIMUM, SIMPLEX,
             hard=lambda x, d: x.amax(d, True), equation=of(simplex), maximum=1, base=True),
    Operator("amin", lambda x, s, d: so.amin(x, d, True, smoothing=s), MAXIMUM, SIMPLEX,
             hard=lambda x, d: x.amin(d, True), equation=of(simplex, -1), maximum=-1),
    Operator("amax-where", lambda x, s, d: so.amax(x, d, True, where=present(x, d), smoothing=s), MAXIMUM, SIMPLEX,
             without=lambda x, s, d: so.amax(x, d, True, smoothing=s),
             exempt={"permutation": "the mask stays in place"}),
    Operator("max.values", lambda x, s, d: so.max(x, d, True, smoothing=s).values, MAXIMUM, SIMPLEX,
             hard=lambda x, d: x.max(d, True).values, equation=of(simplex), maximum=1),
    Operator("max.indices", lambda x, s, d: so.max(x, d, smoothing=s).indices, WEIGHTS, SIMPLEX, hard=hard_one,
             equation=of(simplex), **ONE),
    Operator("min.values", lambda x, s, d: so.min(x, d, True, smoothing=s).values, MAXIMUM, SIMPLEX,
             hard=lambda x, d: x.min(d, True).values, equation=of(simplex, -1), maximum=-1),
    Operator("min.indices", lambda x, s, d: so.min(x, d, smoothing=s).indices, WEIGHTS, SIMPLEX,
             hard=lambda x, d: hard_one(-x, d), equation=of(simplex, -1), **ONE),
    Operator("max-of-two", lambda x, s, d: so.max(x, x.flip(d) / 2, smoothing=s), PAIRS, SIMPLEX,
             hard=lambda x, d: torch.maximum(x, x.flip(d) / 2), exempt={"row strength": "the row is a pair"}),
    Operator("sparsemax", lambda x, s, d: so.sparsemax(x, d), WEIGHTS, ("one",), equation=of(simplex), **ONE),
    Operator("entmax", lambda x, s, d: so.entmax(x, 1.5, d), WEIGHTS, ("entmax",), equation=of(simplex), **ONE),
    # k items
    Operator("topk_mask", lambda x, s, d: so.topk_mask(x, 2, d, smoothing=s), WEIGHTS, CAPPED,
             hard=lambda x, d: hard_mask(x, d, 2), equation=of(capped(2)), base=True, **TWO),
    Operator("topk_mask-smallest", lambda x, s, d: so.topk_mask(x, 2, d, False, smoothing=s), WEIGHTS, CAPPED,
             hard=lambda x, d: hard_mask(-x, d, 2), equation=of(capped(2), -1), **TWO),
    Operator("topk_mask-fractional", lambda x, s, d: so.topk_mask(x, 1.5, d, smoothing=s), WEIGHTS, CAPPED,
             hard=lambda x, d: hard_part(x, d, 1.5), equation=of(capped(1.5)), **PARTIAL),
    Operator("topk_mask-tensor", lambda x, s, d: so.topk_mask(x, torch.tensor(1.5), d, smoothing=s), WEIGHTS, CAPPED,
             hard=lambda x, d: hard_part(x, d, 1.5), equation=of(capped(torch.tensor(1.5))), **PARTIAL),
    Operator("topk_mask-where", lambda x, s, d: so.topk_mask(x, 2, d, where=present(x, d), smoothing=s), WEIGHTS,
             CAPPED, total=lambda x: min(2.0, present(x, -1).sum().item()),
             without=lambda x, s, d: so.topk_mask(x, 2, d, smoothing=s), exempt=ABSENT),
    # ranks
    Operator("rank", lambda x, s, d: so.rank(x, d, smoothing=s), WEIGHTS, ORDER, hard=hard_rank,
             equation=of(positions), base=True, **RANKS),
    Operator("rank-descending", lambda x, s, d: so.rank(x, d, True, smoothing=s), WEIGHTS, ORDER,
             hard=lambda x, d: hard_rank(-x, d), equation=of(positions, -1), **RANKS),
    Operator("rank-weights", lambda x, s, d: so.rank(x, d, weights=importance(x, d), smoothing=s), WEIGHTS, WEIGHTED,
             eps=0.4, hard=lambda x, d: hard_rank(x, d, importance(x, d)),
             exempt={**INTERPOLATES, "ties": "tied items of different weight"}),
    Operator("rank-where", lambda x, s, d: so.rank(x, d, where=present(x, d), smoothing=s), WEIGHTS, ORDER, eps=0.4,
             without=lambda x, s, d: so.rank(x, d, smoothing=s), exempt=ABSENT),
    # sorted values; a finite fill, since nan has no finite differences
    Operator("sort", lambda x, s, d: so.sort(x, d, smoothing=s), VALUES, ORDER, hard=lambda x, d: x.sort(d).values,
             equation=of_sort, exempt=KL_SORT, base=True, **SORT),
    Operator("sort-descending", lambda x, s, d: so.sort(x, d, True, smoothing=s), VALUES, ORDER,
             hard=lambda x, d: x.sort(d, descending=True).values, equation=of_descending_sort, exempt=KL_SORT, **SORT),
    Operator("sort-where", lambda x, s, d: so.sort(x, d, where=present(x, d), fill=0.0, smoothing=s), VALUES, ORDER,
             eps=2.0, without=lambda x, s, d: so.sort(x, d, smoothing=s), exempt={**ABSENT, **KL_SORT}),
    Operator("topk", lambda x, s, d: so.topk(x, 2, d, smoothing=s), VALUES, ORDER,
             hard=lambda x, d: x.topk(2, d).values, **TOPK),
    Operator("topk-smallest", lambda x, s, d: so.topk(x, 2, d, False, smoothing=s), VALUES, ORDER,
             hard=lambda x, d: x.topk(2, d, False).values, **TOPK),
    Operator("isotonic", lambda x, s, d: so.isotonic(x, d), FIT, ("one",), total=item_sum, equation=of(cone)),
    Operator("isotonic-decreasing", lambda x, s, d: so.isotonic(x, d, True), FIT, ("one",), total=item_sum,
             equation=of(falling)),
    Operator("isotonic-weights", lambda x, s, d: so.isotonic(x, d, weights=importance(x, d)), FIT, ("one",)),
    # polytopes
    Operator("Simplex.argmax", on_last(simplex), WEIGHTS, SIMPLEX, hard=hard_vertex(simplex), equation=of(simplex),
             **ONE),
    Operator("Simplex.max", on_last_max(simplex), MAXIMUM, SIMPLEX, hard=lambda x, d: x.amax(d, True),
             equation=of(simplex), maximum=1),
    Operator("CappedSimplex.argmax", on_last(capped(1.5)), WEIGHTS, CAPPED, hard=hard_vertex(capped(1.5)),
             equation=of(capped(1.5)), **PARTIAL),
    Operator("CappedSimplex.max", on_last_max(capped(2)), Kind("invariant", 2.0, 1), CAPPED,
             hard=lambda x, d: x.topk(2, d).values.sum(d, True), equation=of(capped(2)), maximum=1, base=True),
    Operator("CappedSimplex.max-fractional", on_last_max(capped(1.5)), Kind("invariant", 1.5, 1), CAPPED,
             equation=of(capped(1.5)), maximum=1),
    Operator("Hypercube.argmax", on_last(box), ITEMS, BOX, hard=hard_vertex(box), equation=of(box),
             centre=constant(0.5), base=True),
    Operator("Hypercube.max", on_last_max(box), ITEMS_MAXIMUM, BOX, hard=lambda x, d: x.clamp(min=0).sum(d, True),
             equation=of(box), maximum=1),
    Operator("Permutahedron.argmax", on_last(orders(spread)), WEIGHTS, ORDER, hard=hard_vertex(orders(spread)),
             equation=of(orders(spread)), total=lambda x: spread(x.shape[-1]).sum(),
             centre=lambda x: spread(x.shape[-1]).mean(), eps=0.4),
    Operator("Permutahedron.argmax-tied-w", on_last(orders(repeated)), WEIGHTS, ORDER,
             hard=hard_vertex(orders(repeated)), equation=of(orders(repeated)), eps=0.4),
    Operator("Permutahedron.max", on_last_max(orders(spread)), Kind("invariant", None, 1), ORDER, eps=0.4,
             equation=of(orders(spread)), maximum=1, base=True),
    Operator("OrderPolytope.argmax", on_last(cone), CONE_POINT, CONE, equation=of(cone)),
    Operator("OrderPolytope.max", on_last_max(falling), CONE_MAXIMUM, CONE, equation=of(falling), maximum=1),
    *MORE,
    *LOGIC,
    *MATRICES,
    *SETS,
]
# fmt: on


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An operator with one of its smoothings."""

    operator: Operator
    family: str

    @property
    def name(self) -> str:
        return f"{self.operator.name}-{self.family}"

    @property
    def core(self) -> bool:
        """Whether the case belongs to the default selection: every operator once, the base ones with everything."""
        own = self.family == self.operator.smoothings[0] and not self.operator.full
        return self.operator.base or own

    @property
    def _family(self) -> Family:
        return (FAMILIES | RELAXED)[self.family]

    def smoothing(self, eps: Any = None) -> Any:
        return self._family.make(self.operator.eps if eps is None else eps)

    def __call__(self, x: Tensor, eps: Any = None, dim: int = -1) -> Tensor:
        return self.operator.call(x, self.smoothing(eps), dim)

    def excused(self, law: str) -> str | None:
        """Why ``law`` does not apply, or None."""
        own, families = self.operator.exempt, self._family.exempt
        return own.get(law) or own.get(f"{law}/{self.family}") or families.get(law) or families.get(law.split()[-1])


CASES = [Case(operator, family) for operator in OPERATORS for family in operator.smoothings]


def sum_error(case: Case) -> float:
    """How far rounding may move a sum: for alpha > 2 phi is so steep at 0 that an ulp of x moves y by 1e-8."""
    return 1e-7 if case.family == "tsallis3" else 1e-13


def cases(
    law: str, needs: Callable[[Operator], object] = lambda o: True, *, all_core: bool = False, one_each: bool = False
) -> list[Any]:
    """The cases that ``law`` applies to; those outside the default selection are marked ``full``.

    ``one_each``, for laws that take long: by default one smoothing an operator.
    """
    chosen = [c for c in CASES if needs(c.operator) and c.excused(law) is None]
    first = {c.operator.name: c for c in reversed(chosen) if c.core}
    default = [(c.core or all_core) and (not one_each or first[c.operator.name] is c) for c in chosen]
    marks = [() if d else pytest.mark.full for d in default]
    return [pytest.param(c, id=c.name, marks=m) for c, m in zip(chosen, marks, strict=True)]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)
