"""Comparisons against closed forms, torch's own, and what a soft boolean must be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import smoothops as so

COMPARE = {
    "gt": (so.gt, torch.gt), "ge": (so.ge, torch.ge), "lt": (so.lt, torch.lt), "le": (so.le, torch.le),
    "eq": (so.eq, torch.eq), "ne": (so.ne, torch.ne), "isclose": (so.isclose, torch.isclose),
}  # fmt: skip
REAL = st.floats(allow_nan=False, width=32)
HARD = so.Hard()


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", COMPARE)
@given(a=REAL, b=REAL)
def test_hard_is_torchs(name: str, a: float, b: float) -> None:
    soft, hard = COMPARE[name]
    x, y = double(a, a), double(b, a)
    expected = hard(x, y).to(x.dtype)
    for smoothing in (HARD, 0.0, so.Quadratic(0.0), so.StraightThrough(0.1)):
        assert torch.equal(soft(x, y, smoothing=smoothing), expected)


@pytest.mark.parametrize("name", COMPARE)
@given(a=REAL, b=REAL, eps=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_soft_booleans_lie_in_the_unit_interval(name: str, a: float, b: float, eps: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, y = torch.tensor([a, a, 1000.0], dtype=dtype), torch.tensor([b, a, 1000.0], dtype=dtype)
        for smoothing in (so.Entropy(eps), so.Quadratic(eps), so.Laplace(eps)):
            p = COMPARE[name][0](x, y, smoothing=smoothing)
            assert p.dtype == dtype
            assert bool(((p >= 0) & (p <= 1)).all())


@given(a=REAL, b=REAL)
def test_opposites(a: float, b: float) -> None:
    x, y = double(a), double(b)
    torch.testing.assert_close(so.gt(x, y) + so.le(x, y), double(1.0))
    torch.testing.assert_close(so.eq(x, y) + so.ne(x, y), double(1.0))
    assert torch.equal(so.gt(x, y), so.lt(y, x))


def test_equality_is_sech_squared() -> None:
    d = torch.linspace(-30, 30, 61, dtype=torch.float64)
    torch.testing.assert_close(so.eq(d, 0.0, smoothing=1.0), 1 / torch.cosh(d / 2) ** 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(so.ne(d, 0.0, smoothing=1.0), torch.tanh(d / 2) ** 2, rtol=1e-14, atol=0)
    assert so.eq(double(0.0), 1.0, smoothing=1.0).item() == pytest.approx(0.7864477329659274, rel=1e-15)


def test_gaussian_scale() -> None:
    p = so.gt(double(1.0), 0.0, scale=(3.0, 4.0))
    assert p.item() == pytest.approx(0.5 * math.erfc(-0.2 / math.sqrt(2)), rel=1e-14)
    assert so.lt(double(1.0), 0.0, scale=(3.0, 4.0)).item() == pytest.approx(1 - p.item(), rel=1e-14)
    assert so.eq(double(2.0), 2.0, scale=(1.0, 0.0)).item() == 1
    s = double(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: so.gt(double(1.0), 0.2, scale=(s, 1.0)), s)


def test_a_gaussian_pair_is_what_a_simulation_gives() -> None:
    noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    often = (0.3 + 0.5 * noise[0] > 1.2 * noise[1]).double().mean()
    assert so.gt(double(0.3), 0.0, scale=(0.5, 1.2)).item() == pytest.approx(often.item(), abs=3e-3)


def test_isclose() -> None:
    x = double(1000.0, 1000.0, math.inf, math.inf, -math.inf, 1.0)
    y = double(1000.0, 1000.001, math.inf, 1.0, math.inf, math.inf)
    p = so.isclose(x, y, smoothing=1e-6)
    torch.testing.assert_close(p, double(1.0, 1.0, 1.0, 0.0, 0.0, 0.0))
    nan = double(math.nan)
    assert so.isclose(nan, nan, equal_nan=True).item() == 1
    assert so.isclose(nan, nan).isnan().all()
    with pytest.raises(ValueError, match="rtol must be a number >= 0"):
        so.isclose(x, y, rtol=-1.0)


@pytest.mark.parametrize("smoothing", [so.Entropy(1.0), so.Quadratic(0.7), so.Laplace(0.5), HARD])
def test_the_cases_of_an_interval_sum_to_one(smoothing: so.Smoothing) -> None:
    x = double(-50.0, -1.0, -0.3, 0.0, 1.0, 7.0, 50.0, math.inf, -math.inf)
    inside = so.between(x, -1.0, 1.0, smoothing=smoothing)
    total = so.lt(x, -1.0, smoothing=smoothing) + inside + so.gt(x, 1.0, smoothing=smoothing)
    torch.testing.assert_close(total, torch.ones_like(x), rtol=0, atol=1e-15)


def test_between() -> None:
    assert so.between(double(0.0), -1.0, 1.0, smoothing=1.0).item() == pytest.approx(math.tanh(0.5), rel=1e-14)
    # far in the tail, where 1 - 1 would leave nothing
    far = so.between(double(60.0), -1.0, 1.0, smoothing=1.0).item()
    assert far == pytest.approx(math.exp(-59) - math.exp(-61), rel=1e-12)
    assert so.between(double(0.0), 1.0, -1.0, smoothing=1.0).item() == 0
    x = double(-1.0, 1.0, 1.5)
    assert torch.equal(so.between(x, -1.0, 1.0, smoothing=HARD), double(1.0, 1.0, 0.0))
    low = double(-0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda low: so.between(x, low, 1.2, smoothing=0.7), low)


def test_infinities_tie_with_themselves() -> None:
    inf = double(math.inf, -math.inf)
    assert torch.equal(so.gt(inf, inf), double(0.5, 0.5))
    assert torch.equal(so.eq(inf, inf), double(1.0, 1.0))
    assert torch.equal(so.gt(inf, inf.flip(0)), double(1.0, 0.0))
    assert so.gt(double(math.nan), 0.0).isnan().all()


def test_gradients_meet_in_both_arguments() -> None:
    a, b = double(0.3, -0.2).requires_grad_(), double(0.1, 0.4).requires_grad_()
    for f in (so.gt, so.le, so.eq, so.ne, so.isclose):
        for smoothing in (so.Entropy(0.5), so.Laplace(0.5)):
            run = lambda a, b, f=f, s=smoothing: f(a, b, smoothing=s)  # noqa: E731
            assert torch.autograd.gradcheck(run, (a, b), check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(run, (a, b))


def test_straight_through_equality_has_the_soft_gradient() -> None:
    x = double(0.3, 0.0).requires_grad_()
    hard = so.eq(x, 0.0, smoothing=so.StraightThrough(0.5))
    assert torch.equal(hard, double(0.0, 1.0))
    (given,) = torch.autograd.grad(hard.sum(), x)
    (soft,) = torch.autograd.grad(so.eq(x, 0.0, smoothing=0.5).sum(), x)
    torch.testing.assert_close(given, soft)


def test_perturbed_comparisons() -> None:
    make = lambda: so.Perturbed(0.5, noise=so.Logistic(), samples=20_000, generator=torch.Generator().manual_seed(0))  # noqa: E731
    for f in (so.gt, so.eq, so.ne):
        exact = f(double(0.3), 0.1, smoothing=0.5)
        torch.testing.assert_close(f(double(0.3), 0.1, smoothing=make()), exact, rtol=0, atol=2e-2)


def test_numbers_keep_their_digits() -> None:
    """0.2 beside a float64 tensor is not float32's 0.2."""
    x, other = double(0.2, 0.7), torch.full((2,), 0.2, dtype=torch.float64)
    for f in (so.gt, so.le, so.eq, so.ne):
        assert torch.equal(f(x, 0.2, smoothing=1e-9), f(x, other, smoothing=1e-9))
    assert torch.equal(so.between(x, 0.2, 0.7, smoothing=1e-9), so.between(x, other, other + 0.5, smoothing=1e-9))
    assert torch.equal(so.isclose(x, 0.2, smoothing=so.Hard()), double(1.0, 0.0))
    assert torch.equal(so.clamp(x, 0.2, 0.3, smoothing=so.Hard()), x.clamp(0.2, 0.3))
    assert torch.equal(so.where(torch.tensor([True, False]), 0.2, x), x)
    assert torch.equal(so.bucketize(x, [0.2], smoothing=so.Hard()), double(1.0, 0.0, 0.0, 1.0).reshape(2, 2))


def test_bad_arguments() -> None:
    x = double(1.0)
    with pytest.raises(ValueError, match="pass scale or smoothing, not both"):
        so.gt(x, 0.0, scale=(1.0, 1.0), smoothing=0.1)
    with pytest.raises(TypeError, match="pair of standard deviations"):
        so.gt(x, 0.0, scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="standard deviations >= 0"):
        so.gt(x, 0.0, scale=(-1.0, 1.0))
    with pytest.raises(ValueError, match="positive in one of its two parts"):
        so.gt(x, 0.0, scale=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\) do not broadcast"):
        so.gt(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match="b must be a number or a tensor, got str"):
        so.gt(x, "0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="complex"):
        so.gt(x, torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="Tsallis is not defined on"):
        so.gt(x, 0.0, smoothing=so.Tsallis(1.5, 1.0))
