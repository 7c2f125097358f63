"""The softened context: torch's own code under it equals smoothops' operators, and nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smoothops as so
from smoothops._replaced import REPLACED
from smoothops._soft_boolean import RULES as BOOLEAN_RULES
from smoothops._soft_integer import RULES as INTEGER_RULES
from smoothops._soft_values import spelled
from smoothops.softened import ALL_NAMES

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else tuple(numbers(v) for v in x)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=0, atol=0)


# --- what is replaced ------------------------------------------------------------------------------------------------

# torch's spelling -> smoothops'; every name of the table is here (test_the_table_is_complete)
CASES: dict[str, list[tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Any]]]] = {
    "gt": [
        (lambda x, y: x > y, lambda x, y: so.gt(x, y, smoothing=EPS)),
        (lambda x, y: 0.5 < x,  # noqa: SIM300
 lambda x, y: so.gt(x, 0.5, smoothing=EPS)),
        (lambda x, y: torch.greater(x, y), lambda x, y: so.gt(x, y, smoothing=EPS)),
        (lambda x, y: x.clone().gt_(y), lambda x, y: so.gt(x, y, smoothing=EPS)),
    ],
    "ge": [(lambda x, y: x >= y, lambda x, y: so.ge(x, y, smoothing=EPS))],
    "lt": [
        (lambda x, y: x < 1, lambda x, y: so.lt(x, 1, smoothing=EPS)),
        (lambda x, y: torch.less(input=x, other=y), lambda x, y: so.lt(x, y, smoothing=EPS)),
    ],
    "le": [(lambda x, y: x.le(y), lambda x, y: so.le(x, y, smoothing=EPS))],
    "eq": [
        (lambda x, y: x == y, lambda x, y: so.eq(x, y, smoothing=EPS)),
        (lambda x, y: x == True, lambda x, y: so.eq(x, 1, smoothing=EPS)),  # noqa: E712
    ],
    "ne": [
        (lambda x, y: torch.not_equal(x, y), lambda x, y: so.ne(x, y, smoothing=EPS)),
        (lambda x, y: x.bool(), lambda x, y: so.ne(x, 0, smoothing=EPS)),
        (lambda x, y: x.to(torch.bool), lambda x, y: so.ne(x, 0, smoothing=EPS)),
        (lambda x, y: x.any(1), lambda x, y: so.any(so.ne(x, 0, smoothing=EPS), 1)),
        (lambda x, y: x.logical_not(), lambda x, y: 1 - so.ne(x, 0, smoothing=EPS)),
        (
            lambda x, y: torch.logical_and(x, y),
            lambda x, y: so.logical_and(so.ne(x, 0, smoothing=EPS), so.ne(y, 0, smoothing=EPS)),
        ),
        (lambda x, y: x.count_nonzero(1), lambda x, y: so.ne(x, 0, smoothing=EPS).sum(1)),
    ],
    "isclose": [(lambda x, y: torch.isclose(x, y, atol=0.1), lambda x, y: so.isclose(x, y, atol=0.1, smoothing=EPS))],
    "sign": [
        (lambda x, y: x.sign(), lambda x, y: so.sign(x, smoothing=EPS)),
        (lambda x, y: torch.sgn(x), lambda x, y: so.sign(x, smoothing=EPS)),
    ],
    "heaviside": [(lambda x, y: torch.heaviside(x, y), lambda x, y: so.heaviside(x, y, smoothing=EPS))],
    "round": [
        (lambda x, y: x.round(), lambda x, y: so.round(x, smoothing=EPS)),
        (lambda x, y: torch.round(x, decimals=1), lambda x, y: so.round(x, decimals=1, smoothing=EPS)),
        (lambda x, y: x.clone().round_(), lambda x, y: so.round(x, smoothing=EPS)),
    ],
    "floor": [(lambda x, y: torch.floor(x), lambda x, y: so.floor(x, smoothing=EPS))],
    "ceil": [(lambda x, y: x.ceil(), lambda x, y: so.ceil(x, smoothing=EPS))],
    "clamp": [
        (lambda x, y: x.clamp(0, 1), lambda x, y: so.clamp(x, 0, 1, smoothing=EPS)),
        (lambda x, y: torch.clip(x, max=y), lambda x, y: so.clamp(x, None, y, smoothing=EPS)),
        (lambda x, y: x.clamp_min(0), lambda x, y: so.clamp(x, 0, smoothing=EPS)),
        (lambda x, y: torch.clamp_max(x, 0), lambda x, y: so.clamp(x, None, 0, smoothing=EPS)),
        (lambda x, y: x.clone().clamp_(min=0), lambda x, y: so.clamp(x, 0, smoothing=EPS)),
    ],
    "maximum": [
        (lambda x, y: torch.maximum(x, y), lambda x, y: so.maximum(x, y, smoothing=EPS)),
        (lambda x, y: torch.max(x, y), lambda x, y: so.maximum(x, y, smoothing=EPS)),
    ],
    "minimum": [(lambda x, y: x.minimum(y), lambda x, y: so.minimum(x, y, smoothing=EPS))],
    "max": [
        (lambda x, y: x.max(), lambda x, y: so.max(x, smoothing=EPS)),
        (lambda x, y: x.max(dim=1).values, lambda x, y: so.max(x, 1, smoothing=EPS).values),
        (lambda x, y: torch.max(x, 0, keepdim=True)[0], lambda x, y: so.amax(x, 0, True, smoothing=EPS)),
    ],
    "min": [(lambda x, y: x.min(-1)[0], lambda x, y: so.min(x, -1, smoothing=EPS).values)],
    "amax": [
        (lambda x, y: x.amax((0, 1)), lambda x, y: so.amax(x, (0, 1), smoothing=EPS)),
        (lambda x, y: torch.amax(x, axis=1, keepdims=True), lambda x, y: so.amax(x, 1, True, smoothing=EPS)),
    ],
    "amin": [(lambda x, y: torch.amin(x, 1), lambda x, y: so.amin(x, 1, smoothing=EPS))],
    "aminmax": [(lambda x, y: x.aminmax(dim=1).max, lambda x, y: so.amax(x, 1, smoothing=EPS))],
    "argmax": [
        (lambda x, y: F.one_hot(x.argmax(1), 5), lambda x, y: so.argmax(x, 1, smoothing=EPS)),
        (lambda x, y: F.one_hot(x.argmax(0, keepdim=True), 4)[0], lambda x, y: so.argmax(x, 0, smoothing=EPS).T),
        (lambda x, y: F.one_hot(x.argmax(), 20), lambda x, y: so.argmax(x, smoothing=EPS).reshape(-1)),
        (lambda x, y: F.one_hot(x.max(1).indices, 5), lambda x, y: so.argmax(x, 1, smoothing=EPS)),
    ],
    "argmin": [(lambda x, y: F.one_hot(torch.argmin(x, 1), 5), lambda x, y: so.argmin(x, 1, smoothing=EPS))],
    "sort": [
        (lambda x, y: x.sort().values, lambda x, y: so.sort(x)),
        (lambda x, y: torch.sort(x, 0, descending=True)[0], lambda x, y: so.sort(x, 0, True)),
        (lambda x, y: torch.sort(x, stable=True, dim=0).values, lambda x, y: so.sort(x, 0)),
        (lambda x, y: F.one_hot(x.sort().indices, 5), lambda x, y: so.argsort(x)),
        (lambda x, y: F.one_hot(x.sort(0).indices, 4), lambda x, y: so.argsort(x, 0)),
    ],
    "msort": [(lambda x, y: torch.msort(x), lambda x, y: so.sort(x, 0))],
    "argsort": [
        (lambda x, y: F.one_hot(x.argsort(descending=True), 5), lambda x, y: so.argsort(x, descending=True)),
    ],
    "topk": [
        (lambda x, y: x.topk(2).values, lambda x, y: so.topk(x, 2)),
        (lambda x, y: torch.topk(x, 2, 0, largest=False)[0], lambda x, y: so.topk(x, 2, 0, False)),
        (lambda x, y: F.one_hot(x.topk(2).indices, 5), lambda x, y: so.argtopk(x, 2)),
        (lambda x, y: F.one_hot(x.topk(2, 0)[1], 4), lambda x, y: so.argtopk(x, 2, 0)),
    ],
    "kthvalue": [
        (lambda x, y: x.kthvalue(2)[0], lambda x, y: so.kthvalue(x, 2)),
        (lambda x, y: F.one_hot(x.kthvalue(2, 0, True).indices, 4)[0], lambda x, y: so.argsort(x, 0)[1]),
    ],
    "median": [
        (lambda x, y: x.median(), lambda x, y: so.median(x)),
        (lambda x, y: x.median(1, keepdim=True).values, lambda x, y: so.median(x, 1, True)),
        (lambda x, y: F.one_hot(x.median(1).indices, 5), lambda x, y: so.argsort(x)[:, 2]),
    ],
    "quantile": [(lambda x, y: torch.quantile(x, 0.3, dim=1), lambda x, y: so.quantile(x, 0.3, 1))],
    "bucketize": [
        (
            lambda x, y: F.one_hot(torch.bucketize(x, y[0].detach().sort().values.as_subclass(Tensor)), 6),
            lambda x, y: so.bucketize(x, so.sort(y[0].detach()), smoothing=EPS),
        )
    ],
    "searchsorted": [
        (
            lambda x, y: F.one_hot(torch.searchsorted(numbers(x.detach().sort().values), y, side="right"), 6),
            lambda x, y: so.searchsorted(so.sort(x.detach()), y, right=True, smoothing=EPS),
        )
    ],
    "abs": [
        (lambda x, y: x.abs(), lambda x, y: so.abs(x, smoothing=EPS)),
        (lambda x, y: abs(x), lambda x, y: so.abs(x, smoothing=EPS)),
    ],
    "relu": [(lambda x, y: F.relu(x), lambda x, y: so.relu(x, smoothing=EPS))],
}  # fmt: skip


def test_the_table_is_complete() -> None:
    assert set(CASES) == {r.name for r in REPLACED.values()}


@pytest.mark.parametrize("name", CASES)
def test_replaced(name: str) -> None:
    for by_torch, ours in CASES[name]:
        x, y = random(4, 5).requires_grad_(), random(4, 5).requires_grad_()
        with so.softened(EPS, also=("abs", "relu")):
            found = by_torch(x, y)
        expected = ours(x, y)
        same(found, expected)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((numbers(v) * weights).sum(), (x, y), allow_unused=True) for v in (found, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                same(a, b)


@pytest.mark.parametrize("name", CASES)
def test_kept(name: str) -> None:
    for by_torch, _ in CASES[name]:
        x, y = random(4, 5), random(4, 5)
        for context in (
            so.softened(so.Hard()),
            so.softened(0),
            so.softened(EPS, keep=[r for r in CASES if r not in ("abs", "relu")]),
        ):
            with context:
                found = by_torch(x, y)
            expected = by_torch(x, y)
            assert type(found) is Tensor
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_small_eps_is_torch(name: str) -> None:
    for by_torch, _ in CASES[name]:
        x, y = random(4, 5), random(4, 5)
        with so.softened(1e-9, order=so.Laplace(1e-9), also=("abs", "relu")):
            found = by_torch(x, y)
        expected = by_torch(x, y)
        torch.testing.assert_close(numbers(found).double(), expected.double(), rtol=0, atol=1e-7)


# --- the documentation -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "softened.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The names in each row's first column."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    firsts = [re.split(r"(?<!\\)\|", line)[1] for line in section.splitlines() if line.startswith("|")][2:]
    return [re.findall(r"`([a-z_0-9]+)`", first) for first in firsts]


def test_the_page_lists_what_is_replaced() -> None:
    names = [name for row in table("What is replaced") for name in row]
    assert sorted(names) == sorted(ALL_NAMES)


@pytest.mark.parametrize(("heading", "rules"), [("Soft booleans", BOOLEAN_RULES), ("Soft integers", INTEGER_RULES)])
def test_the_page_tells_the_truth_about_rules(heading: str, rules: dict[Any, Any]) -> None:
    names = {name for row in table(heading) for name in row}
    assert len(names) > 10
    for name in names:
        assert set(spelled(name)) & set(rules), name
