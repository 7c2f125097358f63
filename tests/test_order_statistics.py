"""Quantiles, medians and k-th values: torch in the hard limit, copies for weights, derivatives in everything."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, normal

import smoothops as so

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")
LEVELS = (0.0, 0.3, 0.5, 1.0, torch.tensor([0.1, 0.9]).double(), torch.tensor(0.2).double())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
@pytest.mark.parametrize("keepdim", [False, True])
def test_hard_quantile_is_torchs(interpolation: str, dim: int | None, keepdim: bool) -> None:
    x = normal(3, 4, 5)
    for q in LEVELS:
        got = so.quantile(x, q, dim, keepdim, interpolation=interpolation, smoothing=0)
        want = torch.quantile(x, q, dim, keepdim, interpolation=interpolation)
        assert torch.equal(got, want)
    single = x.float()
    assert torch.equal(so.quantile(single, 0.3, dim, smoothing=0), torch.quantile(single, 0.3, dim))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("keepdim", [False, True])
def test_hard_median_and_kthvalue_are_torchs(dim: int, keepdim: bool) -> None:
    x = normal(3, 4, 6).round()
    assert torch.equal(so.median(x, dim, keepdim, smoothing=0), torch.median(x, dim, keepdim).values)
    for k in (1, 2, x.shape[dim]):
        assert torch.equal(so.kthvalue(x, k, dim, keepdim, smoothing=0), torch.kthvalue(x, k, dim, keepdim).values)
    assert torch.equal(so.median(x, smoothing=0), torch.median(x))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("keepdim", [False, True])
def test_no_level_has_no_answer(dim: int | None, keepdim: bool) -> None:
    x, none = torch.randn(3, 5), torch.tensor([])
    for smoothing in (None, 0.1, so.Hard()):
        got = so.quantile(x, none, dim, keepdim, smoothing=smoothing)
        assert got.shape == torch.quantile(x, none, dim, keepdim).shape


def test_tuple_of_dims() -> None:
    x = normal(2, 3, 4)
    flat = x.permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(so.median(x, (0, 2), smoothing=1.0), so.median(flat, 1, smoothing=1.0))
    torch.testing.assert_close(so.quantile(x, 0.3, (0, 2), smoothing=1.0), so.quantile(flat, 0.3, 1, smoothing=1.0))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_weights_are_copies(interpolation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for seed in range(20):
        x = normal(3, 5, seed=seed) * 2
        x = x.round() if seed % 2 else x
        w = torch.randint(1, 4, (5,), generator=generator)
        q = torch.rand(3, generator=generator, dtype=torch.float64)
        got = so.quantile(x, q, 1, weights=w, interpolation=interpolation, smoothing=0)
        want = torch.quantile(x.repeat_interleave(w, 1), q, 1, interpolation=interpolation)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [so.Quadratic(1.0), so.Entropy(1.0), so.Laplace(0.3)], ids=repr)
def test_derivatives(smoothing: so.Smoothing) -> None:
    x, w = normal(2, 6).requires_grad_(), (1.2 + normal(6, seed=1).abs()).requires_grad_()
    q = torch.tensor([0.13, 0.71], dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor, q: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return so.quantile(x, q, 1, weights=w, smoothing=smoothing)

    assert torch.autograd.gradcheck(f, (x, q), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x, q))
    assert torch.autograd.gradcheck(f, (x, q, w), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: so.median(x, 1, smoothing=smoothing), (x,), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: so.kthvalue(x, 2, smoothing=smoothing), (x,), check_forward_ad=True)


def test_absent_items_do_not_count() -> None:
    x, where = normal(2, 6), torch.tensor([True, True, False, True, True, True])
    q, w = torch.tensor([0.2, 0.77]).double(), 1 + normal(6, seed=2).abs()
    for smoothing in (0, 1.0, so.Laplace(0.2)):
        for weights in (None, w):
            kept = None if weights is None else weights[where]
            got = so.quantile(x, q, 1, weights=weights, where=where, smoothing=smoothing)
            want = so.quantile(x[:, where], q, 1, weights=kept, smoothing=smoothing)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        got, want = so.median(x, 1, where=where, smoothing=smoothing), so.median(x[:, where], 1, smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert so.median(x, 1, where=torch.zeros(6, dtype=torch.bool)).isnan().all()
    assert so.kthvalue(x, 6, where=where).isnan().all()


def test_infinities_are_values() -> None:
    inf = float("inf")
    x = torch.tensor([inf, inf, 1.0, -inf])
    assert so.quantile(x, 0.9, smoothing=0) == inf
    assert so.median(x, smoothing=1.0) == 1.0
    assert so.kthvalue(x, 1, smoothing=1.0) == -inf


def test_the_default_adapts() -> None:
    x = normal(4, 9).requires_grad_()
    y = so.median(x, 1)
    (gradient,) = torch.autograd.grad((y * cotangent(y)).sum(), x)
    assert (gradient != 0).sum() > 4  # one item a row would be the hard median
    torch.testing.assert_close(so.median(1000 * x, 1), 1000 * y)


def test_topk_with_a_k_for_each_row() -> None:
    x = normal(3, 6)
    k = torch.tensor([[1], [3], [2]])
    for smoothing in (0, 2.0, so.Laplace(0.3)):
        whole = so.sort(x, 1, True, smoothing=smoothing)
        for dim in (1, 0):
            got = so.topk(x.movedim(1, dim), k.movedim(1, dim), dim, fill=-7.0, smoothing=smoothing).movedim(dim, 1)
            assert got.shape == (3, 3)
            for row in range(3):
                kept = int(k[row])
                assert torch.equal(got[row, :kept], whole[row, :kept])
                assert (got[row, kept:] == -7).all()
    assert torch.equal(so.topk(x, torch.tensor(2), smoothing=0), x.topk(2).values)


def test_argtopk_is_the_head_of_argsort() -> None:
    x = normal(3, 6)
    assert torch.equal(so.argtopk(x, 2, smoothing=0).argmax(-1), x.topk(2).indices)
    assert torch.equal(so.argtopk(x, 2, largest=False, smoothing=0).argmax(-1), x.topk(2, largest=False).indices)
    dense = so.argsort(x, 0, True, smoothing=0.3)
    assert torch.equal(so.argtopk(x, 2, 0, smoothing=0.3), dense[:2])
    assert so.argtopk(x, 0).shape == (3, 0, 6)


def test_strengths_are_those_of_the_sort() -> None:
    x = normal(3, 7)
    want = so.mixing_eps(so.sort, x)
    assert torch.equal(so.mixing_eps(so.median, x, dim=1), want)
    assert torch.equal(so.mixing_eps(so.kthvalue, x, k=2), want)
    assert torch.equal(so.mixing_eps(so.quantile, x, q=0.3, dim=-1), want)
    laplace = so.mixing_eps(so.rank, x, smoothing=so.Laplace)
    assert torch.equal(so.mixing_eps(so.argsort, x, smoothing=so.Laplace), laplace)
    torch.testing.assert_close(so.argsort(x), so.argsort(x, smoothing=so.Laplace(laplace)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: so.topk(x, torch.tensor(7)), "0 <= k <= 4"),
        (lambda x: so.topk(x, torch.zeros(2, 2, dtype=torch.long)), "does not fit"),
        (lambda x: so.quantile(x, 1.5), "q must lie in"),
        (lambda x: so.quantile(x, 0.5, interpolation="cubic"), "linear, lower, higher, midpoint, nearest"),
        (lambda x: so.quantile(x, torch.zeros(2, 2)), "1-d tensor"),
        (lambda x: so.quantile(x, 0.5, weights=torch.full_like(x, 0.1)), "rescale"),
        (lambda x: so.kthvalue(x, 0), "1 <= k <= 4"),
        (lambda x: so.kthvalue(x, 5), "1 <= k <= 4"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(3, 4))
    with pytest.raises(IndexError, match="size 0"):
        so.median(torch.zeros(3, 0), 1)
