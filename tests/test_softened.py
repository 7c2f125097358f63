"""The softened context: torch's own code under it equals smoothops' operators, and nothing is left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smoothops as so
from smoothops._replaced import REPLACED

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
        (lambda x, y: 0.5 < x, lambda x, y: so.gt(x, 0.5, smoothing=EPS)),
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
    "ne": [(lambda x, y: torch.not_equal(x, y), lambda x, y: so.ne(x, y, smoothing=EPS))],
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
        (lambda x, y: F.one_hot(x.sort(0).indices, 4), lambda x, y: so.argsort(x, 0).movedim(-2, 0)),
    ],
    "msort": [(lambda x, y: torch.msort(x), lambda x, y: so.sort(x, 0))],
    "argsort": [
        (lambda x, y: F.one_hot(x.argsort(descending=True), 5), lambda x, y: so.argsort(x, descending=True)),
    ],
    "topk": [
        (lambda x, y: x.topk(2).values, lambda x, y: so.topk(x, 2)),
        (lambda x, y: torch.topk(x, 2, 0, largest=False)[0], lambda x, y: so.topk(x, 2, 0, False)),
        (lambda x, y: F.one_hot(x.topk(2).indices, 5), lambda x, y: so.argtopk(x, 2)),
        (lambda x, y: F.one_hot(x.topk(2, 0)[1], 4), lambda x, y: so.argtopk(x, 2, 0).movedim(-2, 0)),
    ],
    "kthvalue": [
        (lambda x, y: x.kthvalue(2)[0], lambda x, y: so.kthvalue(x, 2)),
        (lambda x, y: F.one_hot(x.kthvalue(2, 0, True).indices, 4)[0], lambda x, y: so.argsort(x, 0)[:, 1]),
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
    "abs": [(lambda x, y: x.abs(), lambda x, y: so.abs(x, smoothing=EPS)), (lambda x, y: abs(x), lambda x, y: so.abs(x, smoothing=EPS))],
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


# --- soft booleans ---------------------------------------------------------------------------------------------------


def test_logic_and_reductions() -> None:
    x, y = random(4, 5), random(4, 5)
    p, q = so.gt(x, 0, smoothing=EPS), so.lt(y, 1, smoothing=EPS)
    for logic in (so.Product(), so.Godel(), so.Lukasiewicz()):
        with so.softened(EPS, logic=logic):
            a, b = x > 0, y < 1
            found = [a & b, a | b, a ^ b, ~a, torch.logical_and(a, b), a.logical_or(b), a.all(), b.any(1), True & a]
            found += [torch.any(b, dim=1, keepdim=True), a == b, a != b, a & (y.long() > 0), a <= b, a > b]
        expected = [
            so.logical_and(p, q, logic=logic),
            so.logical_or(p, q, logic=logic),
            so.logical_xor(p, q, logic=logic),
        ]
        expected += [1 - p, expected[0], expected[1], so.all(p, logic=logic), so.any(q, 1, logic=logic), p]
        expected += [so.any(q, 1, True, logic=logic), 1 - expected[2], expected[2]]
        expected += [so.logical_and(p, y.long() > 0, logic=logic), so.implies(p, q, logic=logic)]
        expected += [so.logical_and(p, 1 - q, logic=logic) if logic == so.Product() else p - expected[0]]
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert type(f).__name__ == "SoftBoolean", i
            torch.testing.assert_close(numbers(f), e, msg=str(i))


def test_counts_are_plain_numbers() -> None:
    x = random(4, 5)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        for found, expected in (
            (a.sum(), p.sum()), (a.sum(1), p.sum(1)), (a.float().mean(), p.float().mean()), (a.long().sum(), p.sum()),
            (a.sum(dtype=torch.long), p.sum()), (a.count_nonzero(), p.sum()), (a.double(), p), (a * x, p * x),
            (1 - a.double(), 1 - p), (a.int() + 1, p + 1), (torch.sum(a, -1, keepdim=True), p.sum(1, keepdim=True)),
        ):  # fmt: skip
            assert type(found) is Tensor
            same(found, expected)


def test_moving_entries_keeps_the_type() -> None:
    x = random(4, 5)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        moves: list[Callable[[Any], Any]] = [
            lambda t: t[1:, None, 2], lambda t: t.T, lambda t: t.reshape(-1), lambda t: t.view(2, 10), lambda t: t.mT,
            lambda t: t[torch.tensor([0, 3])], lambda t: t.unsqueeze(0).expand(3, -1, -1), lambda t: t.clone().detach(),
            lambda t: torch.cat([t, t]), lambda t: torch.stack([t, t], 1), lambda t: t.gather(1, torch.tensor([[0, 1]])),
            lambda t: t.split(2)[1], lambda t: t.unbind(0)[0], lambda t: list(t)[1], lambda t: t.to("cpu"),
            lambda t: t.bool(), lambda t: t.to(torch.bool), lambda t: t.flatten().contiguous(), lambda t: t.flip(0),
            lambda t: t[torch.tensor([True, False, True, False])],
        ]  # fmt: skip
        for i, move in enumerate(moves):
            found = move(a)
            assert type(found).__name__ == "SoftBoolean", i
            if i not in (15, 16):
                same(found, move(p))
    both = a & a.clone()  # outside of the context too
    same(both, p * p)


def test_where_and_masks() -> None:
    x, y = random(4, 5), random(4, 5)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        same(torch.where(a, x, y), so.where(p, x, y))
        same(torch.where(a, 1.0, y), so.where(p, 1.0, y))
        same(x.where(a, y), so.where(p, x, y))
        same(torch.where(condition=a, input=x, other=y), so.where(p, x, y))
        same(y.masked_fill(a, 2.0), so.where(p, 2.0, y))
        same(torch.masked_fill(y, a, torch.tensor(2.0)), so.where(p, 2.0, y))
        same(y.clone().masked_fill_(a, 2.0), so.where(p, 2.0, y))
        z = y.clone()
        z[a] = 2.0
        same(z, so.where(p, 2.0, y))
        z = torch.stack([y, y], -1)
        z[a] = 2.0
        same(z[..., 0], so.where(p, 2.0, y))
        both = torch.where(y.long() > 0, a, ~a)
        assert type(both).__name__ == "SoftBoolean"
        same(both, torch.where(y.long() > 0, p, 1 - p))
        same(torch.where(a, y < 0, True), so.where(p, so.lt(y, 0, smoothing=EPS), torch.ones_like(p)))
        (mask := y.long() > 0).logical_or_(x.long() > 0)  # hard masks are torch's
        assert mask.dtype == torch.bool


@pytest.mark.parametrize(
    "use",
    [
        bool, int, lambda a: a.item(), lambda a: a and True, lambda a: a.tolist(), lambda a: a.numpy(),
        lambda a: torch.ones(3)[a.expand(3)], lambda a: a.nonzero(), lambda a: torch.where(a), lambda a: a.view(1)[a.view(1)],
        lambda a: torch.masked_select(torch.ones(3), a), lambda a: torch.zeros(3, dtype=torch.bool).fill_(a),
        lambda a: torch.zeros(3, dtype=torch.bool).copy_(a), lambda a: torch.zeros(3, dtype=torch.bool).__setitem__(0, a),
        lambda a: torch.zeros(3, dtype=torch.bool).logical_or_(a), lambda a: torch.is_nonzero(a),
        lambda a: torch.ones(3).__setitem__(a.expand(3), torch.ones(3)), lambda a: torch.zeros(3).long().masked_fill_(a, 1),
        lambda a: next(iter(a.view(1))).__bool__(), lambda a: [1 for v in a.view(1) if v],
    ],
)  # fmt: skip
def test_no_silent_truth(use: Callable[[Any], Any]) -> None:
    for value in (0.001, -1e-3, 2.0):
        with so.softened(0.1):
            a = torch.tensor(value, dtype=torch.float64) > 0
            with pytest.raises(ValueError, match=r"soft boolean with values strictly between 0 and 1"):
                use(a)
        with pytest.raises(ValueError, match=r"StraightThrough"):  # it remains one outside
            use(a)
    with so.softened(so.StraightThrough(0.1)):
        use(torch.tensor(2.0) > 0)  # 1 exactly
    with so.softened(so.Quadratic(0.1)):
        assert bool(torch.tensor(2.0) > 0) is True
        assert bool(torch.tensor(-2.0) > 0) is False
        assert (torch.tensor([2.0, -1.0]) > 0).tolist() == [True, False]


def test_hard_masks_read_and_write() -> None:
    x = random(20)
    with so.softened(so.StraightThrough(0.1)):
        assert torch.equal(x[x > 0], x[x.detach().numpy() > 0])
        assert torch.equal((x > 0).nonzero(), torch.where(x > 0)[0][:, None])
        y = x.clone()
        y[y < 0] = torch.zeros(int((y < 0).sum().item()), dtype=torch.float64)
    assert bool((y >= 0).all())


def test_soft_booleans_are_not_changed_in_place_by_arithmetic() -> None:
    with so.softened(EPS):
        a = random(3) > 0
        for change in (lambda: a.add_(1), lambda: a.logical_and_(torch.ones(3)), lambda: a.mul_(2.0)):
            with pytest.raises((TypeError, ValueError), match="in place|needs another boolean"):
                change()
        before = a
        a &= random(3) > 0
        assert a is before
        assert type(a).__name__ == "SoftBoolean"
        with pytest.raises(ValueError, match="needs another boolean"):
            _ = a & torch.tensor([1, 2, 3])


def test_soft_boolean_copies() -> None:
    import copy
    import pickle

    with so.softened(EPS):
        a = random(3) > 0
        i = random(3, 4).argmax(1)
    for twin in (copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert type(twin) is type(a)
        same(twin, a)
        with pytest.raises(ValueError, match="soft boolean"):
            bool(twin[0])
    for twin in (copy.deepcopy(i), pickle.loads(pickle.dumps(i))):
        same(twin, i)
        same(twin == torch.tensor([0, 1, 2]), i == torch.tensor([0, 1, 2]))
    assert "SoftBoolean" in repr(a)
    assert "SoftInteger" in repr(i)
