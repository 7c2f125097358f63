"""Logic: Boole's tables at 0 and 1, probability's laws between, and gradients at the corners."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import smoothops as so

LOGICS = [so.Product(), so.Godel(), so.Lukasiewicz()]
UNIT = st.floats(0, 1)
BINARY = {
    "and": (so.logical_and, torch.logical_and),
    "or": (so.logical_or, torch.logical_or),
    "xor": (so.logical_xor, torch.logical_xor),
    "implies": (so.implies, lambda p, q: ~p | q),
}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("logic", LOGICS, ids=repr)
@pytest.mark.parametrize("name", BINARY)
def test_boole(name: str, logic: so.Logic) -> None:
    soft, hard = BINARY[name]
    p, q = (torch.tensor(v) for v in zip(*itertools.product([False, True], repeat=2), strict=True))
    assert torch.equal(soft(p, q, logic=logic), hard(p, q).float())
    rows = torch.tensor(list(itertools.product([False, True], repeat=3)))
    assert torch.equal(so.all(rows, 1, logic=logic), rows.all(1).float())
    assert torch.equal(so.any(rows, 1, logic=logic), rows.any(1).float())
    assert torch.equal(so.logical_not(p), torch.logical_not(p).float())


@pytest.mark.parametrize("logic", LOGICS, ids=repr)
@given(p=UNIT, q=UNIT)
def test_probabilities(logic: so.Logic, p: float, q: float) -> None:
    """De Morgan, and the probabilities of A and B, A or B, A xor B, A implies B as those of events."""
    a, b = double(p), double(q)
    both, either = so.logical_and(a, b, logic=logic), so.logical_or(a, b, logic=logic)
    close = {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(both + either, a + b, **close)
    torch.testing.assert_close(1 - so.logical_and(1 - a, 1 - b, logic=logic), either, **close)
    torch.testing.assert_close(so.logical_xor(a, b, logic=logic), either - both, **close)
    torch.testing.assert_close(so.implies(a, b, logic=logic), 1 - a + both, **close)
    torch.testing.assert_close(so.all(torch.cat([a, b]), logic=logic), both.squeeze(), **close)
    torch.testing.assert_close(so.any(torch.cat([a, b]), logic=logic), either.squeeze(), **close)
    frechet = torch.clamp(a + b - 1, min=0), torch.minimum(a, b)
    assert frechet[0] - 1e-15 <= both <= frechet[1] + 1e-15


def test_a_thousand_nearly_certain_values() -> None:
    p = torch.full((1000,), 0.999, requires_grad=True)
    value = so.all(p)
    (gradient,) = torch.autograd.grad(value, p)
    assert value.item() == pytest.approx(0.999**1000, rel=1e-4)  # 0.999 is rounded to float32
    torch.testing.assert_close(gradient, torch.full((1000,), 0.999**999), rtol=1e-4, atol=0)


def test_small_probabilities_are_not_lost() -> None:
    assert so.any(double(*[1e-20] * 10)).item() == pytest.approx(1e-19, rel=1e-12)


@pytest.mark.parametrize("f", [so.all, so.any])
@pytest.mark.parametrize("row", [(0.2, 0.7, 0.4), (0.0, 0.7, 0.4), (0.0, 0.0, 0.4), (1.0, 0.7, 0.4), (1.0, 1.0, 0.4)])
def test_derivatives_at_the_corners(f, row: tuple[float, ...]) -> None:
    """Products of all but one, or two, of the factors, zeros and ones included."""
    p = double(*row).requires_grad_()
    factor = p if f is so.all else 1 - p
    sign = 1.0 if f is so.all else -1.0
    (gradient,) = torch.autograd.grad(f(p), p, create_graph=True)
    for i in range(3):
        rest = torch.stack([factor[j] for j in range(3) if j != i])
        assert gradient[i].item() == pytest.approx(rest.prod().item(), abs=1e-15)
        (second,) = torch.autograd.grad(gradient[i], p, retain_graph=True)
        expected = [0.0 if j == i else sign * factor[3 - i - j].item() for j in range(3)]
        torch.testing.assert_close(second, double(*expected), rtol=0, atol=1e-15)


def test_shapes_follow_torch() -> None:
    p = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for dim, keepdim in itertools.product([None, 0, -1, (0, 2)], [False, True]):
        expected = torch.amin(p, dim if dim is not None else (0, 1, 2), keepdim)
        assert torch.equal(so.all(p, dim, keepdim, logic=so.Godel()), expected)
    assert so.all(torch.zeros(2, 0), 1).tolist() == [1, 1]
    assert so.any(torch.zeros(2, 0), 1).tolist() == [0, 0]


def test_absent_entries_do_not_count() -> None:
    p = double(0.5, 0.0, 0.5)
    present = torch.tensor([True, False, True])
    for logic in LOGICS:
        assert so.all(p, where=present, logic=logic) == so.all(p[[0, 2]], logic=logic)
        assert so.any(1 - p, where=present, logic=logic) == so.any(1 - p[[0, 2]], logic=logic)
    assert so.all(p, where=~present & present).item() == 1


@pytest.mark.parametrize("f", [*(f for f, _ in BINARY.values())])
def test_gradcheck(f) -> None:
    p, q = double(0.3, 0.6).requires_grad_(), double(0.2, 0.9).requires_grad_()
    for logic in LOGICS:
        run = lambda p, q, logic=logic: f(p, q, logic=logic)  # noqa: E731
        assert torch.autograd.gradcheck(run, (p, q), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, (p, q))


def test_bad_arguments() -> None:
    p = double(0.5)
    with pytest.raises(ValueError, match=r"soft booleans, in \[0, 1\], got values from 0.5 to 1.5"):
        so.logical_and(double(0.5, 1.5), p)
    with pytest.raises(TypeError, match="floating-point or bool tensor"):
        so.all(torch.tensor([1, 0]))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        so.logical_not(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logic must be"):
        so.all(p, logic="product")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not broadcast"):
        so.logical_or(torch.zeros(2), torch.zeros(3))
