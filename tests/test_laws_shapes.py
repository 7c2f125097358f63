"""Law 7: any shape, any dim, any memory layout; rows do not depend on each other, to the bit."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, normal, value_and_gradient
from registry import CASES, Case, case, cases
from torch import Tensor

import smoothops as so

CLOSE = {"rtol": 1e-13, "atol": 1e-14}


@pytest.mark.parametrize("case", cases("rows"))
@pytest.mark.parametrize("dim", [-1, 0])
def test_rows_are_independent(case: Case, dim: int) -> None:
    """Alone, among few and among many rows a row has the same value and gradient, to the bit, along any dim."""
    for n in (5, 33):
        x = normal(20 if case.family == "default" else 70, n, seed=n)
        x = x if dim == -1 else x.T.contiguous()
        y, gradient = value_and_gradient(lambda x: case(x, dim=dim), x)
        c = cotangent(y)
        for part in (slice(0, 1), slice(3, 4), slice(5, 18)):
            index = (part,) if dim == -1 else (slice(None), part)
            some = x[index].clone().requires_grad_()
            got = case(some, dim=dim)
            assert torch.equal(got.detach(), y[index])
            (got_gradient,) = torch.autograd.grad((got * c[index]).sum(), some)
            assert torch.equal(got_gradient, gradient[index])
        assert torch.equal(case(x.select(1 + dim, 3), dim=dim), y.select(1 + dim, 3))


@pytest.mark.parametrize("case", cases("rows", all_core=True))
def test_any_dim(case: Case) -> None:
    x = normal(3, 6, 4, seed=1)
    want, want_gradient = value_and_gradient(case, x.movedim(1, -1))
    for dim in (1, -2):
        y = case(x, dim=dim)
        torch.testing.assert_close(y.movedim(dim, -1), want, rtol=1e-13, atol=1e-14)
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((case(given, dim=1).movedim(1, -1) * cotangent(want)).sum(), given)
    torch.testing.assert_close(gradient.movedim(1, -1), want_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", cases("layout"))
def test_any_layout(case: Case) -> None:
    """Transposed, strided, expanded and channels-last memory give the numbers of contiguous memory."""
    x = normal(6, 5, seed=2)
    torch.testing.assert_close(case(x.T), case(x.T.contiguous()), **CLOSE)
    wide = normal(4, 12, seed=3)
    torch.testing.assert_close(case(wide[:, ::2]), case(wide[:, ::2].contiguous()), **CLOSE)
    row = normal(6, seed=4)
    expanded = row.expand(3, 6).detach()
    want, want_gradient = value_and_gradient(case, expanded.contiguous())
    leaf = row.clone().requires_grad_()
    y = case(leaf.expand(3, 6))
    torch.testing.assert_close(y.detach(), want, **CLOSE)
    (gradient,) = torch.autograd.grad((y * cotangent(want)).sum(), leaf)
    torch.testing.assert_close(gradient, want_gradient.sum(0), rtol=1e-12, atol=1e-14)
    image = normal(2, 3, 4, 5, seed=5)
    last = image.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(case(last, dim=1), case(image, dim=1), **CLOSE)


@pytest.mark.parametrize("case", cases("empty"))
def test_empty_batch(case: Case) -> None:
    for shape in ((0, 5), (2, 0, 5)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = case(x)
        assert y.shape[:-1] == x.shape[:-1]
        assert y.numel() == 0
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.shape == x.shape
    if not case.operator.method:
        x = torch.zeros(5, 0, dtype=torch.float64)
        assert case(x, dim=0).shape[1] == 0


@pytest.mark.parametrize("case", cases("single"))
def test_one_item(case: Case) -> None:
    """n = 1: the only weight is 1, the only rank 1, the only value itself."""
    if "topk" in case.operator.name or "CappedSimplex" in case.operator.name:
        return  # two items are asked for; see test_one_item_out_of_one
    x = normal(3, 1, seed=6)
    y, gradient = value_and_gradient(case, x)
    assert gradient.isfinite().all()
    name = case.operator.name
    if name.startswith(("argmax", "argmin", "Simplex.argmax", "sparsemax", "entmax", "rank")) or name.endswith(
        ".indices"
    ):
        assert torch.equal(y, torch.ones_like(x))
        assert torch.equal(gradient, torch.zeros_like(x))
    elif name.startswith(("amax", "amin", "max.v", "min.v", "sort", "isotonic", "Simplex.max")):
        torch.testing.assert_close(y, x, rtol=1e-15, atol=1e-16)
        torch.testing.assert_close(gradient, cotangent(y), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("family", sorted({c.family for c in CASES if c.operator.name == "topk_mask"}))
def test_none_and_all_of_the_items(family: str) -> None:
    """k = 0 and k = n, as a number and as a tensor; one item out of one."""
    smoothing = case(f"topk_mask-{family}").smoothing()
    for x in (normal(3, 4, seed=7), normal(3, 1, seed=8)):
        n = x.shape[-1]
        for k in (0, n, torch.tensor(0.0), torch.tensor(float(n))):
            y, gradient = value_and_gradient(lambda x, k=k: so.topk_mask(x, k, smoothing=smoothing), x)
            assert torch.equal(y, torch.full_like(x, float(k) / n))
            assert torch.equal(gradient, torch.zeros_like(x))
        values = so.CappedSimplex(n).max(x, smoothing)
        torch.testing.assert_close(values, x.sum(-1), rtol=1e-14, atol=1e-15)
        assert torch.equal(so.CappedSimplex(0).max(x, smoothing), torch.zeros(3, dtype=torch.float64))


SMOOTHINGS = [so.Hard(), so.Quadratic(0.5), so.Entropy(0.5), None, so.StraightThrough(so.Quadratic(0.5))]


@pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=lambda s: type(s).__name__)
def test_no_items(smoothing: so.Smoothing | None) -> None:
    """n = 0, as torch answers: an empty sort, no maximum."""
    x = torch.zeros(3, 0)
    for call in (so.sort, so.rank, lambda x, smoothing: so.topk(x, 0, smoothing=smoothing)):
        assert call(x, smoothing=smoothing).shape == (3, 0)
    assert so.topk_mask(x, 0, smoothing=smoothing).shape == (3, 0)
    assert so.sort(x, 0, smoothing=smoothing).shape == (3, 0)
    for call in (so.argmax, so.amax, so.max, so.argmin):
        with pytest.raises((IndexError, RuntimeError)):
            call(x, -1, smoothing=smoothing)
    assert so.argmax(x, 0, smoothing=smoothing).shape == (3, 0)
    assert so.amax(x, 0, smoothing=smoothing).shape == (0,)


@pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=lambda s: type(s).__name__)
def test_a_number_without_dims(smoothing: so.Smoothing | None) -> None:
    """A 0-d tensor is one item, as for torch."""
    x = torch.tensor(2.5, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    for dim in (0, -1):
        assert torch.equal(so.argmax(x, dim, smoothing=smoothing), one)
        assert torch.equal(so.rank(x, dim, smoothing=smoothing), one)
        assert torch.equal(so.topk_mask(x, 1, dim, smoothing=smoothing), one)
        for y in (
            so.amax(x, dim, smoothing=smoothing),
            so.sort(x, dim, smoothing=smoothing),
            so.topk(x, 1, dim, smoothing=smoothing),
            so.max(x, dim, smoothing=smoothing).values,
        ):
            assert y.shape == ()
            torch.testing.assert_close(y, x, rtol=1e-15, atol=0)


def test_keepdim_and_shapes() -> None:
    """The shapes of the reductions are those of torch."""
    x = normal(2, 3, 4, seed=9)
    for dim in (0, 1, -1):
        for keepdim in (False, True):
            want = x.max(dim, keepdim)
            got = so.max(x, dim, keepdim, smoothing=0.3)
            assert got.values.shape == want.values.shape
            assert got.indices.shape == x.shape
            assert so.amax(x, dim, keepdim).shape == x.amax(dim, keepdim).shape
            assert so.min(x, dim, keepdim, smoothing=0.3).values.shape == want.values.shape
    for dims in ((0, 1), (0, 2), (2, 0), (), (0, 1, 2), (1,)):
        for keepdim in (False, True):
            assert so.amax(x, dims, keepdim).shape == x.amax(dims, keepdim).shape
    for k in (0, 1, 3):
        assert so.topk(x, k, 1, smoothing=1.0).shape == x.topk(k, 1).values.shape
    assert so.argmax(x, keepdim=True).shape == x.shape
    assert so.max(x).shape == ()


@pytest.mark.parametrize("name", ["rank", "sort", "topk", "topk_mask", "argmax", "amax"])
def test_strength_that_mixing_found_can_be_passed_on(name: str) -> None:
    """mixing_eps has size 1 along dim, whatever the dim."""
    operator, extra = getattr(so, name), {"k": 2} if name.startswith("topk") else {}
    x = normal(3, 6, 4, seed=10)
    for dim, shape in ((0, (1, 6, 4)), (1, (3, 1, 4)), (-1, (3, 6, 1))):
        eps = so.mixing_eps(operator, x, dim=dim, **extra)
        assert eps.shape == shape
        assert (eps > 0).all()
        y = operator(x, dim=dim, **extra, smoothing=so.Quadratic(eps))
        again = operator(x.movedim(dim, -1), dim=-1, **extra, smoothing=so.Quadratic(eps.movedim(dim, -1)))
        moved: Tensor = y if name == "amax" else y.movedim(dim, -1)
        torch.testing.assert_close(moved, again, rtol=1e-13, atol=1e-14)


def test_where_broadcasts() -> None:
    x = normal(4, 5, seed=11)
    mask = torch.tensor([True, False, True, True, False])
    full = mask.expand(4, 5)
    for call in (so.argmax, so.rank, so.sort, so.amax):
        torch.testing.assert_close(call(x, -1, where=mask), call(x, -1, where=full), rtol=0, atol=0, equal_nan=True)
    column = torch.tensor([[True], [False], [True], [True]])
    y = so.rank(x, 0, where=column, smoothing=0.3)
    assert torch.equal(y[1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(y[[0, 2, 3]], so.rank(x[[0, 2, 3]], 0, smoothing=0.3), rtol=1e-13, atol=0)
