"""Selection: torch's own answers at hard indices, averages at soft ones, nothing from what has weight 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import smoothops as so

G = torch.Generator().manual_seed(0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def soft(index: Tensor, n: int) -> Tensor:
    return one_hot(index, n).double()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


# --- where -----------------------------------------------------------------------------------------------------------


def test_where_is_exact_at_both_ends() -> None:
    x, y = random(50) * 1e6, random(50) * 1e-6
    assert torch.equal(so.where(torch.ones(50), x, y), x)
    assert torch.equal(so.where(torch.zeros(50), x, y), y)
    assert torch.equal(so.where(x > 0, x, y), torch.where(x > 0, x, y))
    c = torch.rand(50, generator=G, dtype=torch.float64)
    torch.testing.assert_close(so.where(c, x, y), c * x + (1 - c) * y)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_branch_of_weight_zero_does_not_exist(bad: float, weight: float) -> None:
    good, c = double(3.0).requires_grad_(), double(weight).requires_grad_()
    poison = double(bad).requires_grad_()
    pair = (poison, good) if weight == 0 else (good, poison)
    value = so.where(c, *pair)
    assert value.item() == 3
    gradients = torch.autograd.grad(value.sum(), (good, poison, c), create_graph=True)
    assert [g.item() for g in gradients] == [1, 0, 0]
    second = torch.autograd.grad(gradients[0].sum(), (good, poison, c), allow_unused=True)
    assert all(s is None or s.isfinite().all() for s in second)


def test_where_keeps_an_infinity_that_both_branches_share() -> None:
    inf = double(math.inf)
    assert so.where(double(0.3), inf, inf).item() == math.inf
    assert so.where(double(0.3), inf, 1.0).item() == math.inf


def test_where_gradients() -> None:
    c, x, y = double(0.3, 0.0, 1.0, 0.5).requires_grad_(), random(4).requires_grad_(), random(4).requires_grad_()
    same = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    inside = lambda c, x, y: so.where(0.1 + 0.8 * c, x, y * (1 - same) + x * same)  # noqa: E731
    assert torch.autograd.gradcheck(inside, (c, x, y), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(inside, (c, x, y))
    gradients = torch.autograd.grad(so.where(c, x, y).sum(), (c, x, y))
    for given, expected in zip(gradients, (x - y, c, 1 - c), strict=True):
        torch.testing.assert_close(given, expected.detach())


def test_where_dtypes_and_errors() -> None:
    assert so.where(torch.tensor([True]), 1.0, torch.zeros(1)).dtype == torch.float32
    assert so.where(torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64), 1).dtype == torch.float64
    assert so.where(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([2])).tolist() == [1.5]
    with pytest.raises(ValueError, match="soft booleans"):
        so.where(double(1.5), 0.0, 1.0)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_one_hot_indices_are_integers() -> None:
    x = random(3, 4, 5)
    flat = torch.tensor([[3, 0], [7, 59]])
    assert torch.equal(so.take(x, flat), torch.take(x, flat))
    assert torch.equal(so.take(x, soft(flat, 60)), torch.take(x, flat))
    for dim in (0, 1, 2, -1, -2):
        n = x.shape[dim]
        index = torch.randint(n, (3, 4, 5), generator=G).narrow(dim, 0, 2)
        expected = torch.take_along_dim(x, index, dim)
        assert torch.equal(so.take_along_dim(x, index, dim), expected)
        assert torch.equal(so.take_along_dim(x, soft(index, n), dim), expected)
        part = index[:2, :, :2]
        assert torch.equal(so.gather(x, dim, part), torch.gather(x, dim, part))
        assert torch.equal(so.gather(x, dim, soft(part, n)), torch.gather(x, dim, part))
        row = torch.tensor([n - 1, 0, 0])
        assert torch.equal(so.index_select(x, dim, row), torch.index_select(x, dim, row))
        torch.testing.assert_close(so.index_select(x, dim, soft(row, n)), torch.index_select(x, dim, row))
        src = random(*index.shape)
        distinct = torch.stack([torch.randperm(n, generator=G)[:2] for _ in range(60 // n)], -1)
        distinct = distinct.reshape(2, *(s for d, s in enumerate(x.shape) if d != dim % 3)).movedim(0, dim)
        assert torch.equal(so.scatter(x, dim, distinct, src), torch.scatter(x, dim, distinct, src))
        assert torch.equal(so.scatter(x, dim, soft(distinct, n), src), torch.scatter(x, dim, distinct, src))
        for start in range(n - 1):
            expected = torch.narrow(x, dim, start, 2)
            assert torch.equal(so.narrow(x, dim, start, 2), expected)
            assert torch.equal(so.narrow(x, dim, soft(torch.tensor(start), n), 2), expected)


def test_soft_indices_average() -> None:
    x = double(5.0, 1.0, 2.0)
    w = so.argsort(x, smoothing=0.3)
    torch.testing.assert_close(so.take_along_dim(x, w, 0), w @ x)
    torch.testing.assert_close(so.take(x, w), w @ x)
    torch.testing.assert_close(so.take_along_dim(x, so.argsort(x, smoothing=so.Hard()), 0), x.sort().values)


def test_what_has_weight_zero_is_not_read() -> None:
    x = double(1.0, math.nan, 3.0)
    w = double(0.5, 0.0, 0.5).requires_grad_()
    assert so.take(x, w).item() == 2
    assert so.take_along_dim(x, w.unsqueeze(0), 0).item() == 2


def test_a_slice_never_wraps_around() -> None:
    x = double(1.0, 2.0, 3.0, 4.0)
    last = double(0.0, 0.0, 0.0, 1.0)
    assert so.narrow(x, 0, last, 2).tolist() == [3, 4]
    assert so.narrow(x, 0, last, 2, fill=9.0).tolist() == [4, 9]
    assert so.narrow(x, 0, 3, 2, fill=9.0).tolist() == [4, 9]
    assert so.narrow(x, 0, double(0.0, 0.5, 0.0, 0.5), 2).tolist() == [2.5, 3.5]
    assert so.narrow(x, 0, last, 0).tolist() == []
    with pytest.raises(ValueError, match="start 3 with length 2 leaves dim 0"):
        so.narrow(x, 0, 3, 2)
    batch = torch.stack([x, -x])
    starts = torch.stack([last, double(1.0, 0.0, 0.0, 0.0)])
    assert so.narrow(batch, 1, starts, 2).tolist() == [[3, 4], [-1, -2]]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_writes_follow_each_other() -> None:
    x, w, v = random(4), torch.rand(3, 4, generator=G, dtype=torch.float64), random(3)
    expected = x
    for k in range(3):
        expected = expected + w[k] * (v[k] - expected)
    torch.testing.assert_close(so.scatter(x, 0, w, v), expected)
    again = torch.tensor([1, 1])
    assert so.scatter(x, 0, soft(again, 4), double(5.0, 6.0))[1].item() == 6
    before = x.clone()
    so.scatter(x, 0, w, 2.0)
    assert torch.equal(x, before)


def test_a_small_index_keeps_the_rest() -> None:
    x = random(3, 4)
    index = torch.tensor([[1, 2]])
    expected = torch.scatter(x, 1, index, 7.0)
    assert torch.equal(so.scatter(x, 1, soft(index, 4), 7.0), expected)
    assert torch.equal(so.scatter(x, 0, soft(index, 3), 7.0), torch.scatter(x, 0, index, 7.0))


# --- lookup and buckets ----------------------------------------------------------------------------------------------


def test_lookup_is_a_dictionary_in_the_limit() -> None:
    keys, values = random(6, 3), random(6, 2, 2)
    torch.testing.assert_close(so.lookup(keys, keys[[4, 1]], values, smoothing=1e-4), values[[4, 1]])
    assert torch.equal(so.lookup(keys, keys[2] + 1e-3, values, smoothing=so.Hard()), values[2])
    w = torch.softmax(-(0.3 - double(0.0, 1.0)).square() / 0.5, 0)
    found = so.lookup(double(0.0, 1.0), double(0.3).squeeze(), double(10.0, 20.0), smoothing=0.5)
    torch.testing.assert_close(found, w @ double(10.0, 20.0))
    with pytest.raises(ValueError, match="one entry for each of the 6 keys"):
        so.lookup(keys, keys[0], values[:5])
    with pytest.raises(ValueError, match="keys must be"):
        so.lookup(keys, double(0.0), values)


@pytest.mark.parametrize("right", [False, True])
def test_hard_buckets_are_torchs(right: bool) -> None:
    edges = double(-1.0, 0.0, 0.0, 2.0)
    x = double(-math.inf, -2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0, math.inf)
    expected = soft(torch.bucketize(x, edges, right=right), 5)
    assert torch.equal(so.bucketize(x, edges, right=right, smoothing=so.Hard()), expected)
    assert torch.equal(so.searchsorted(edges, x, right=right, smoothing=so.Hard()), expected)
    rows = torch.stack([edges, edges + 1])
    twice = torch.stack([x, x])
    index = torch.searchsorted(rows, twice, right=right)
    assert torch.equal(so.searchsorted(rows, twice, right=right, smoothing=so.Hard()), soft(index, 5))


@pytest.mark.parametrize("smoothing", [so.Entropy(0.3), so.Quadratic(0.5), so.Laplace(0.2), so.Entropy(1e-9)])
def test_buckets_sum_to_one(smoothing: so.Smoothing) -> None:
    edges = torch.linspace(-3, 3, 40)
    w = so.bucketize(torch.linspace(-9, 9, 101), edges, smoothing=smoothing)
    assert w.shape == (101, 41)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(-1), torch.ones(101), rtol=0, atol=1e-6)


def test_bucket_gradients() -> None:
    x, edges = random(3).requires_grad_(), double(-0.5, 0.1, 0.9).requires_grad_()
    run = lambda x, e: so.bucketize(x, e, smoothing=0.4)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, edges), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, edges))


def test_gradients_of_reading_and_writing() -> None:
    x, w, v = random(2, 4), torch.rand(2, 3, 4, generator=G, dtype=torch.float64), random(2, 3)
    inputs = [t.requires_grad_() for t in (x, w, v)]
    for run in (
        lambda x, w, v: so.take_along_dim(x, w, 1),
        lambda x, w, v: so.gather(x, 1, w),
        lambda x, w, v: so.scatter(x, 1, w, v),
        lambda x, w, v: so.narrow(x, 1, w[:, 0], 2),
        lambda x, w, v: so.index_select(x, 1, w[0]),
        lambda x, w, v: so.lookup(x[0], v, w[0, 0], smoothing=0.5),
    ):
        assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("transform", ["vmap", "compile"])
def test_transforms(transform: str) -> None:
    x, w, v = random(2, 4), torch.rand(2, 3, 4, generator=G, dtype=torch.float64), random(2, 3)

    def run(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        written = so.scatter(x, 0, w, v)
        chosen = so.where(so.gt(written, 0.0), written, x)
        weights = so.bucketize(so.narrow(chosen, 0, w[0], 2), double(-1.0, 1.0))
        return weights.sum(0) * so.lookup(x, so.take(chosen, w), x).sum()

    expected = torch.stack([run(*row) for row in zip(x, w, v, strict=True)])
    if transform == "vmap":
        torch.testing.assert_close(torch.vmap(run)(x, w, v), expected)
    else:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[0], w[0], v[0]), expected[0])


def test_bad_indices() -> None:
    x = random(3, 4)
    with pytest.raises(TypeError, match="integer tensor, or a soft index"):
        so.take(x, torch.tensor([True]))
    with pytest.raises(ValueError, match="over 12 positions has 12 weights"):
        so.take(x, torch.ones(5))
    with pytest.raises(ValueError, match="one more dim"):
        so.take_along_dim(x, torch.ones(2, 4), 1)
    with pytest.raises(ValueError, match=r"shape \(m, n\)"):
        so.index_select(x, 1, torch.ones(4))
    with pytest.raises(ValueError, match="larger than x"):
        so.gather(x, 1, torch.ones(5, 1, 4))
    with pytest.raises(ValueError, match="does not cover the index"):
        so.scatter(x, 1, torch.ones(3, 2, 4), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"length must be an int in \[0, 4\]"):
        so.narrow(x, 1, 0, 5)
    with pytest.raises(ValueError, match="edges must not decrease"):
        so.bucketize(x, double(1.0, 0.0))
    with pytest.raises(ValueError, match="Perturbed"):
        so.bucketize(x, double(0.0), smoothing=so.Perturbed(0.1))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_a_soft_argsort_is_an_index(dim: int) -> None:
    """Positions along ``dim``, items last: what take_along_dim and gather read."""
    x = random(3, 4, 5)
    for smoothing in (so.Hard(), so.Laplace(1e-6)):
        index = so.argsort(x, dim, smoothing=smoothing)
        assert index.shape == (3, 4, 5, x.shape[dim])
        torch.testing.assert_close(so.take_along_dim(x, index, dim), x.sort(dim).values)
        torch.testing.assert_close(so.gather(x, dim, index), x.sort(dim).values)
    top = so.argtopk(x, 2, dim, smoothing=so.Hard())
    assert torch.equal(so.take_along_dim(x, top, dim), x.topk(2, dim).values)
