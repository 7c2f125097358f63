"""The Laplace ranks, sorts and doubly stochastic operator against the sums over all pairs that they stand for."""

from __future__ import annotations

import pytest
import torch
from oracles import normal
from torch import Tensor

import smoothops as so

STRENGTHS = (1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3)


def cdf(z: Tensor) -> Tensor:
    tail = torch.exp(-z.abs()) / 2
    return torch.where(z < 0, tail, 1 - tail)


def sums(b: Tensor, x: Tensor, a: float) -> Tensor:
    """G(b) = sum_i F((b - x_i)/a), all pairs."""
    return cdf((b.unsqueeze(-1) - x.unsqueeze(-2)) / a).sum(-1)


@pytest.mark.parametrize("a", STRENGTHS)
@pytest.mark.parametrize("n", [1, 2, 5, 33, 70, 600])
def test_rank_and_sort_are_the_sums_over_all_pairs(n: int, a: float) -> None:
    x = normal(3, n, seed=n)
    torch.testing.assert_close(so.rank(x, smoothing=so.Laplace(a)), sums(x, x, a) + 0.5, rtol=1e-12, atol=1e-12)
    y = so.sort(x, smoothing=so.Laplace(a))
    places = torch.arange(n, dtype=torch.float64) + 0.5
    # y solves G(y) = m - 1/2 up to a rounding of y, which G magnifies by n / 2a
    torch.testing.assert_close(sums(y, x, a), places.expand(3, n), rtol=0, atol=1e-12 * n * (1 + 1 / a))


def test_gradient_of_sort_is_a_softmax_of_distances() -> None:
    x = normal(7).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda v: so.sort(v, smoothing=so.Laplace(0.4)), x)
    y = so.sort(x, smoothing=so.Laplace(0.4)).detach()
    want = torch.softmax(-(y.unsqueeze(-1) - x.detach()).abs() / 0.4, -1)
    torch.testing.assert_close(jacobian, want, rtol=1e-12, atol=1e-14)


def test_strong_smoothing_and_overflow() -> None:
    x = normal(6)
    for a in (1e-300, 1e-30, 1e8, 1e30):
        y, r = so.sort(x, smoothing=so.Laplace(a)), so.rank(x, smoothing=so.Laplace(a))
        assert y.isfinite().all()
        assert r.isfinite().all()
        if a < 1:
            torch.testing.assert_close(y, x.sort().values, rtol=0, atol=1e-15)
            assert torch.equal(r, so.rank(x, smoothing=0))


@pytest.mark.parametrize("e", STRENGTHS)
@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("descending", [False, True])
def test_operator_is_its_dense_form(n: int, e: float, descending: bool) -> None:
    x = normal(3, n, seed=n)
    operator = so.soft_permutation(x, descending=descending, smoothing=e)
    dense = operator.dense()
    assert dense.shape == operator.shape
    assert torch.equal(dense, so.argsort(x, descending=descending, smoothing=e))
    for total in (dense.sum(-1), dense.sum(-2)):
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-11)
    assert dense.min() >= -1e-12
    vector, matrix = normal(n, seed=1), normal(3, n, 2, seed=2)
    for v in (vector, matrix):
        torch.testing.assert_close(operator @ v, dense @ v, rtol=0, atol=1e-10)
        torch.testing.assert_close(operator.T @ v, dense.mT @ v, rtol=0, atol=1e-10)
    sorted_x = (operator @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(sorted_x.sum(-1), x.sum(-1), rtol=0, atol=1e-11)
    steps = sorted_x.diff(dim=-1) * (-1 if descending else 1)
    assert (steps >= -1e-11).all()


def test_operator_with_infinities_and_absent_items() -> None:
    inf = float("inf")
    x = torch.tensor([[1.0, inf, -inf, 2.0, inf, 9.0, 3.0]], dtype=torch.float64)
    where = torch.tensor([[True] * 5 + [False, True]])
    for descending in (False, True):
        operator = so.soft_permutation(x, descending=descending, where=where, smoothing=0.3)
        dense, v = operator.dense(), normal(7, seed=4)
        torch.testing.assert_close(dense.sum(-1), torch.tensor([[1.0] * 6 + [0]]).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(dense.sum(-2), where.double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(operator @ v, dense @ v, rtol=0, atol=1e-12)
        torch.testing.assert_close(operator.T @ v, dense.mT @ v, rtol=0, atol=1e-12)
        place = 0 if descending else 4
        assert dense[0, place, [1, 4]].tolist() == [0.5, 0.5]


def test_derivatives_of_the_operator() -> None:
    x, v = normal(2, 5).requires_grad_(), normal(5, seed=1).requires_grad_()
    e = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for f in (
        lambda x, v, e: so.soft_permutation(x, smoothing=e) @ v,
        lambda x, v, e: so.soft_permutation(x, smoothing=e).T @ v,
        lambda x, v, e: so.argsort(x, smoothing=e) @ v,
    ):
        assert torch.autograd.gradcheck(f, (x, v, e), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (x, v, e))


def test_hard_argsort_is_torchs() -> None:
    x = normal(4, 5).round()
    for descending in (False, True):
        for dim in (0, 1):
            got = so.argsort(x, dim, descending, smoothing=0).argmax(-1)
            want = torch.argsort(x, dim=dim, descending=descending, stable=True)
            assert torch.equal(got, want)


def test_a_million_items_take_linear_memory() -> None:
    x = normal(1_000_000)
    y = so.soft_permutation(x, smoothing=0.01) @ x
    assert y.shape == x.shape
    torch.testing.assert_close(y.mean(), x.mean(), rtol=0, atol=1e-9)
    assert (y.diff() >= -1e-9).all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs Laplace"):
        so.soft_permutation(normal(3), smoothing=so.Quadratic(1.0))
    with pytest.raises(ValueError, match="use one of Entropy, Laplace, Quadratic, or Hard"):
        so.argsort(normal(3), smoothing=so.Tsallis(1.5, 1.0))
    with pytest.raises(ValueError, match="does not fit"):
        so.soft_permutation(normal(3)) @ normal(4)
