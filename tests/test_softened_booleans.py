"""Soft booleans: logic in place of bool tensors', counts that are numbers, and no truth value between 0 and 1."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import smoothops as so

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else tuple(numbers(v) for v in x)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=0, atol=0)


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


def test_extremes_are_any_and_all() -> None:
    x, y = random(4, 5), random(4, 5)
    p, q = so.gt(x, 0, smoothing=EPS), so.gt(y, 0, smoothing=EPS)
    with so.softened(EPS):
        a, b = x > 0, y > 0
        for found, expected in (
            (a.max(), so.any(p)), (a.amin(1), so.all(p, 1)), (a.max(1).values, so.any(p, 1)),
            (a.min(dim=0, keepdim=True)[0], so.all(p, 0, True)), (torch.max(a, b), so.logical_or(p, q)),
        ):  # fmt: skip
            assert type(found).__name__ == "SoftBoolean"
            torch.testing.assert_close(numbers(found), expected)
        assert torch.equal(a.max(1).indices, p.max(1).indices)
        assert f"{a[0, 0]:.3f}" == f"{p[0, 0]:.3f}"


def test_with_soft_integers() -> None:
    x, n = random(6), random(6, 2)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a, i = x > 0, n.argmax(1)
        w = so.argmax(n, 1, smoothing=EPS)[:, 1]
        torch.testing.assert_close(numbers(a == i), p * w + (1 - p) * (1 - w))
        torch.testing.assert_close(numbers(i < a), p * (1 - w))
        same(a * 1.0, p)
        torch.testing.assert_close(numbers(a[i]), so.argmax(n, 1, smoothing=EPS) @ p[:2])
        assert f"{i[0]:d}" in ("0", "1")


def test_moving_entries_keeps_the_type() -> None:
    x = random(4, 5)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        moves: list[Callable[[Any], Any]] = [
            lambda t: t[1:, None, 2], lambda t: t.T, lambda t: t.reshape(-1), lambda t: t.view(2, 10), lambda t: t.mT,
            lambda t: t[torch.tensor([0, 3])], lambda t: t.unsqueeze(0).expand(3, -1, -1), lambda t: t.clone().detach(),
            lambda t: torch.cat([t, t]), lambda t: torch.stack([t, t], 1),
            lambda t: t.gather(1, torch.tensor([[0, 1]])),
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
        bool,
        int,
        lambda a: a.item(),
        lambda a: a and True,
        lambda a: a.tolist(),
        lambda a: a.numpy(),
        lambda a: torch.ones(3)[a.expand(3)],
        lambda a: a.nonzero(),
        lambda a: torch.where(a),
        lambda a: a.view(1)[a.view(1)],
        lambda a: torch.masked_select(torch.ones(3), a),
        lambda a: torch.zeros(3, dtype=torch.bool).fill_(a),
        lambda a: torch.zeros(3, dtype=torch.bool).copy_(a),
        lambda a: torch.zeros(3, dtype=torch.bool).__setitem__(0, a),
        lambda a: torch.zeros(3, dtype=torch.bool).logical_or_(a),
        lambda a: torch.is_nonzero(a),
        lambda a: torch.ones(3).__setitem__(a.expand(3), torch.ones(3)),
        lambda a: torch.zeros(3).long().masked_fill_(a, 1),
        lambda a: next(iter(a.view(1))).__bool__(),
        lambda a: [1 for v in a.view(1) if v],
    ],
)
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
        for change in (lambda: a.add_(1), lambda: a.bitwise_and_(torch.ones(3)), lambda: a.mul_(2.0)):
            with pytest.raises((TypeError, ValueError), match=r"in place|needs another boolean"):
                change()
        before = a
        a &= random(3) > 0
        assert a is before
        assert type(a).__name__ == "SoftBoolean"
        with pytest.raises(ValueError, match="needs another boolean"):
            _ = a & torch.tensor([1, 2, 3])


def test_soft_boolean_copies() -> None:
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
