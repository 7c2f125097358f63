"""Elementwise operators against what they stand for: expectations, sums of steps, closed forms, limits."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import normal, value_and_gradient

import smoothops as so

INF = float("inf")
FAMILIES = (so.Quadratic, so.Entropy, so.BinaryEntropy, so.Laplace)
ONE_BY_ONE = (so.heaviside, so.sign, so.relu, so.abs, so.floor, so.ceil, so.round)


def cdf(z: torch.Tensor, family: type) -> torch.Tensor:
    if family is so.Quadratic:
        return ((z + 1) / 2).clamp(0, 1)
    if family is so.Laplace:
        tail = torch.exp(-z.abs()) / 2
        return torch.where(z < 0, tail, 1 - tail)
    return torch.sigmoid(z)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.2499, 0.2501, 0.7, 3.0, 40.0])
def test_floor_is_the_sum_of_the_steps(family: type, eps: float) -> None:
    """floor(x) = sum over the integers k of F((x - k)/eps), below 0 of F - 1: all of them, one by one."""
    x = normal(60, scale=2)
    k = torch.arange(-4000, 4001, dtype=torch.float64)
    steps = cdf((x.unsqueeze(-1) - k) / eps, family) - (k <= 0).double()
    want = steps.sum(-1)
    torch.testing.assert_close(so.floor(x, smoothing=family(eps)), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(so.ceil(x, smoothing=family(eps)), -so.floor(-x, smoothing=family(eps)))
    torch.testing.assert_close(so.round(x, smoothing=family(eps)), so.floor(x + 0.5, smoothing=family(eps)))


@pytest.mark.parametrize("family", FAMILIES)
def test_integral_and_derivative(family: type) -> None:
    """relu is at least max(x, 0), 0 and x far away, and its derivative is heaviside, the distribution function."""
    x = normal(200, scale=2)
    value, gradient = value_and_gradient(lambda v: so.relu(v, smoothing=family(0.3)), x)
    step = so.heaviside(x, smoothing=family(0.3))
    torch.testing.assert_close(step, cdf(x / 0.3, family), rtol=0, atol=1e-14)
    weights = torch.cos(1 + torch.arange(200, dtype=torch.float64) * 1.7)
    torch.testing.assert_close(gradient, weights * step, rtol=1e-13, atol=1e-14)
    assert (value >= x.clamp(min=0)).all()
    far = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(so.relu(far, smoothing=family(0.3)), far.clamp(min=0), rtol=0, atol=1e-13)


def test_closed_forms() -> None:
    x, e = normal(100), 0.4
    torch.testing.assert_close(so.relu(x, smoothing=so.Entropy(e)), e * torch.nn.functional.softplus(x / e))
    torch.testing.assert_close(so.abs(x, smoothing=so.Entropy(e)), e * torch.log(2 * torch.cosh(x / e)))
    torch.testing.assert_close(so.sign(x, smoothing=so.Entropy(e)), torch.tanh(x / (2 * e)))
    torch.testing.assert_close(so.maximum(x, x.flip(0), smoothing=e), e * torch.logaddexp(x / e, x.flip(0) / e))
    near = x[x.abs() <= e / 2]
    torch.testing.assert_close(so.abs(near, smoothing=so.Quadratic(e)), near.square() / e + e / 4)
    inside = so.clamp(x, -1.0, 1.0, smoothing=so.Entropy(e))
    assert inside.min() > -1
    assert inside.max() < 1
    assert torch.equal(inside.argsort(), x.argsort())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_by_one_on_infinities_and_nan(family: type) -> None:
    x = torch.tensor([-INF, -1.3, math.nan, 0.4, INF], dtype=torch.float64)
    for f in ONE_BY_ONE:
        y, gradient = value_and_gradient(lambda v, f=f: f(v, smoothing=family(0.2)).nan_to_num(0.0, 0.0, 0.0), x)
        y = f(x, smoothing=family(0.2))
        assert y.isnan().tolist() == [False, False, True, False, False]
        hard = f(x[[0, 4]], smoothing=0)
        assert torch.equal(y[[0, 4]], hard)
        assert gradient[[0, 4]].tolist() == [0, 0]
        torch.testing.assert_close(y[[1, 3]], f(x[[1, 3]], smoothing=family(0.2)), rtol=0, atol=0)
    pair = so.maximum(torch.tensor([INF, -INF, -INF, 1.0]), torch.tensor([1.0, -INF, 2.0, -INF]), smoothing=0.1)
    assert pair.tolist() == [INF, -INF, 2.0, 1.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_eps_and_bounds(family: type) -> None:
    x = normal(5).requires_grad_()
    e = torch.tensor([0.3, 0.4, 0.2, 0.6, 0.5], dtype=torch.float64, requires_grad=True)
    low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.5, 0.7))
    for f in ONE_BY_ONE:
        assert torch.autograd.gradcheck(lambda x, e, f=f: f(x, smoothing=family(e)), (x, e), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x, e, f=f: f(x, smoothing=family(e)), (x, e))
    assert torch.autograd.gradcheck(lambda *a: so.clamp(*a[:3], smoothing=family(a[3])), (x, low, high, e))
    other = normal(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: so.minimum(a, b, smoothing=family(0.3)), (x, other))


def test_large_numbers_keep_their_integers() -> None:
    x = torch.tensor([1e15 + 0.5, -1e9 - 0.25, 1e30], dtype=torch.float64)
    for eps in (0.01, 1.0):
        y = so.floor(x, smoothing=eps)
        assert ((y - x).abs() <= 1.5 + 1e-16 * x.abs()).all()
    torch.testing.assert_close(so.round(torch.tensor([2.26]), decimals=1, smoothing=1e-4), torch.tensor([2.3]))


def test_bad_arguments() -> None:
    x = normal(3)
    with pytest.raises(ValueError, match="min, max or both"):
        so.clamp(x)
    with pytest.raises(ValueError, match="BinaryEntropy, Entropy, Laplace, Quadratic"):
        so.relu(x, smoothing=so.Tsallis(1.5, 0.1))
    with pytest.raises(ValueError, match="stands alone"):
        so.round(x, smoothing=so.Quadratic(so.Mixing(3.0)))
    with pytest.raises(ValueError, match="does not broadcast"):
        so.relu(x, smoothing=torch.ones(2))
    with pytest.raises(TypeError, match="complex"):
        so.abs(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize("far", [1e12, 1e30, torch.finfo(torch.float64).max, torch.inf])
def test_far_bounds_cost_no_digit(far: float) -> None:
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    low = torch.full_like(x, -far).requires_grad_()
    for y in (so.clamp(x, -far, far), so.clamp(x, low), so.maximum(x, low), so.maximum(low, x), so.minimum(x, -low)):
        assert torch.equal(y, x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))
