"""Laws 5 and 8: how an answer follows its input, what it sums to, ties, and how steep it may be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import cotangent, normal, value_and_gradient
from registry import FAMILIES, Case, cases, sum_error
from torch import Tensor

import smoothops as so

# values with ties, small and large gaps; strengths over six decades
numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10, width=32))
rows = st.lists(numbers, min_size=2, max_size=9).map(lambda v: torch.tensor(v, dtype=torch.float64))
strengths = st.sampled_from([1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 30.0, 1e3])


def close(got: Tensor, want: Tensor, scale: float | Tensor = 1.0) -> None:
    """Equal to a few roundings of the largest intermediate number."""
    assert got.shape == want.shape
    error = (got - want).abs().max() if got.numel() else torch.zeros(())
    assert error <= 1e-11 * scale, f"off by {error.item()}"


def steepness(x: Tensor, eps: float) -> float:
    """How much a rounding of x can move y: |x| / eps or eps |x|, whatever the unit of eps."""
    return 1 + x.abs().max().item() * max(1 / eps, 1, eps)


@pytest.mark.parametrize("case", cases("permutation", lambda o: o.kind.permutation))
@given(x=rows, eps=strengths, data=st.data())
def test_permutation(case: Case, x: Tensor, eps: float, data: st.DataObject) -> None:
    if case.excused("ties") or "hard" in case.family or "straight" in case.family:
        x = x + 1e-3 * torch.arange(len(x))  # Hard breaks ties by position
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    y, shuffled = case(x, eps), case(x[order], eps)
    close(shuffled, y[order] if case.operator.kind.permutation == "equivariant" else y, steepness(x, eps))


@pytest.mark.parametrize("case", cases("shift", lambda o: o.kind.shift is not None))
@given(x=rows, eps=strengths, c=st.sampled_from([-8.0, 0.25, 3.0, 1024.0]))
def test_shift(case: Case, x: Tensor, eps: float, c: float) -> None:
    x = (x * 4096).round() / 4096  # so that x + c is exact, and no gap moves past eps by rounding
    close(case(x + c, eps), case(x, eps) + case.operator.kind.shift * c, abs(c) * steepness(x, eps))


@pytest.mark.parametrize("case", cases("scale"))
@given(x=rows, eps=strengths, s=st.sampled_from([2.0**-30, 0.25, 2.0, 2.0**40]))
def test_scale(case: Case, x: Tensor, eps: float, s: float) -> None:
    """x and eps in another unit, a power of 2 so that nothing rounds."""
    kind = case.operator.kind
    if case.family == "default":  # items that are all tied show no unit
        x = x + torch.arange(len(x)) / 4
    got, want = case(s * x, eps * s**kind.power), case(x, eps) * s**kind.degree
    close(got, want, s**kind.degree * steepness(x, eps))


@pytest.mark.parametrize("case", cases("total", lambda o: o.total))
@given(x=rows, eps=strengths)
def test_sum(case: Case, x: Tensor, eps: float) -> None:
    total = case.operator.total(x)
    scale = 1 + (x.abs().sum().item() if isinstance(total, Tensor) else total)
    y = case(x, eps)
    assert abs(y.sum(-1) - total) <= sum_error(case) * len(x) * scale
    assert y.isfinite().all()


@pytest.mark.parametrize("case", cases("total", lambda o: o.total and o.kind.degree == 0))
def test_gradient_of_a_constant_sum_is_0(case: Case) -> None:
    x = normal(4, 7, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(case(x).sum(), x)
    scale = value_and_gradient(case, x)[1].abs().max() + 1
    assert gradient.abs().max() <= 1e-13 * scale


MONOTONE = ("rank", "argmax", "topk_mask", "Hypercube.argmax", "Permutahedron.argmax", "CappedSimplex.argmax")


@pytest.mark.parametrize("case", cases("monotone", lambda o: o.name in MONOTONE))
@given(x=rows, eps=strengths)
def test_items_keep_their_order(case: Case, x: Tensor, eps: float) -> None:
    """A larger input never has the smaller answer; no rounding may turn two neighbours."""
    y = case(x, eps)
    order = x.argsort(stable=True)
    strictly = x[order].diff() > 0
    assert (y[order].diff()[strictly] >= -1e-13 * (1 + y.abs().max())).all()


@pytest.mark.parametrize("case", cases("monotone", lambda o: o.name in ("sort", "topk-smallest", "isotonic")))
@given(x=rows, eps=strengths)
def test_sorted_values_increase(case: Case, x: Tensor, eps: float) -> None:
    y = case(x, eps)
    assert (y.diff() >= -1e-13 * (1 + y.abs().max())).all()
    if case.family == "entropy":
        return  # it sorts e^x: its values may leave the range of x from below
    assert y.min() >= x.min() - 1e-13 * x.abs().max()
    assert y.max() <= x.max() + 1e-13 * x.abs().max()


@pytest.mark.parametrize("case", cases("ties", lambda o: o.kind.symmetric_ties and o.kind.permutation == "equivariant"))
@given(x=rows, eps=strengths, data=st.data())
def test_tied_items_have_the_same_answer_and_gradient(case: Case, x: Tensor, eps: float, data: st.DataObject) -> None:
    if "hard" in case.family or "straight" in case.family:
        return  # Hard breaks ties as torch does, see test_hard_is_torch
    if case.excused("permutation"):
        return
    i, j = data.draw(st.permutations(range(len(x))))[:2]
    x[j] = x[i]
    x.requires_grad_()
    y = case(x, eps)
    assert abs(y[i] - y[j]) <= 1e-13 * (1 + y.detach().abs().max())
    weight = torch.ones_like(y)
    others = [p for p in range(len(x)) if p not in (i, j)]
    weight[others] = cotangent(y)[others].detach()
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    assert abs(gradient[i] - gradient[j]) <= 1e-11 * (1 + 1 / eps)


def steepest(case: Case, n: int, eps: float) -> float:
    """A bound on the spectral norm of dy/dx."""
    if case.operator.kind.degree == 1:
        return 1.0 + n  # weights, or block means
    scale = 1 / eps
    if "rank-weights" in case.name:
        scale *= 2  # the weights differ by a factor of 2
    if "entropy" in case.family and ("rank" in case.name or "Permutahedron" in case.name):
        return scale * n * (n + 1)  # sum of a block times a softmax
    return scale


@pytest.mark.parametrize("case", cases("bounded", lambda o: not o.maximum))
@given(x=rows, eps=strengths)
def test_gradients_are_bounded(case: Case, x: Tensor, eps: float) -> None:
    x.requires_grad_()
    y = case(x, eps)
    weight = cotangent(y)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    assert gradient.norm() <= steepest(case, len(x), eps) * weight.norm() * (1 + 1e-12)


@given(x=rows, eps=strengths)
def test_sort_differentiates_along_the_stable_order(x: Tensor, eps: float) -> None:
    """At ties the i-th value's gradient goes where torch.sort(stable=True) sends it."""
    x = x.round()
    tiny = 1e-7 * torch.arange(len(x))
    for descending in (False, True):
        apart = x - tiny if descending else x + tiny
        value, gradient = value_and_gradient(lambda x, d=descending: so.sort(x, descending=d, smoothing=so.Hard()), x)
        torch.testing.assert_close(value, x.sort(descending=descending).values, rtol=0, atol=0)
        want = value_and_gradient(lambda x, d=descending: x.sort(descending=d).values, apart)[1]
        torch.testing.assert_close(gradient, want, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["quadratic", "entropy"])
def test_gap_equal_to_eps_is_not_pooled(family: str) -> None:
    """At gap == eps (rho_i - rho_j) both formulas agree in value; the gradient is that of the items apart."""
    smoothing = FAMILIES[family].make(0.5)
    gaps = [0.5, 0.5, 0.5] if family == "quadratic" else [0.5 * math.log((i + 1) / i) for i in (1, 2, 3)]
    x = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    if family == "entropy":
        x = x * (1 + 1e-15)  # a logarithm is not exact
    value, gradient = value_and_gradient(lambda x: so.rank(x, smoothing=smoothing), x)
    torch.testing.assert_close(value, torch.arange(1.0, 5.0, dtype=torch.float64), rtol=1e-14, atol=0)
    assert family == "entropy" or torch.equal(gradient, torch.zeros(4, dtype=torch.float64))
    x = torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: so.sort(x, smoothing=so.Quadratic(0.5)), x)
    assert torch.equal(value, x)
    assert torch.equal(gradient, cotangent(x))


@pytest.mark.parametrize("eps", [0.1, 0.4, 1.0, 3.0])
def test_soft_rank_is_hard_iff_the_gaps_are_at_least_eps(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = torch.rand(200, 5, generator=generator, dtype=torch.float64) * 4 * eps
    x = torch.cat([torch.zeros(200, 1), gaps.cumsum(-1)], -1)
    hard = torch.arange(1.0, 7.0, dtype=torch.float64).expand(200, 6)
    same = (so.rank(x, smoothing=eps) - hard).abs().amax(-1) < 1e-12
    assert torch.equal(same, (gaps >= eps).all(-1))
    same = (so.sort(x, smoothing=eps) - x).abs().amax(-1) < 1e-12
    assert torch.equal(same, (gaps <= 1 / eps).all(-1))


def test_weighted_rank_is_replication() -> None:
    """An integer weight counts as so many copies, whose ranks it averages; sum w r = W (W + 1)/2."""
    x, w = normal(20, 6, seed=2), torch.tensor([1, 3, 2, 1, 4, 2])
    for eps in (0.05, 0.5, 5.0):
        got = so.rank(x, weights=w.double(), smoothing=eps)
        copies = so.rank(x.repeat_interleave(w, -1), smoothing=eps)
        first = torch.zeros_like(x).index_add(-1, torch.arange(6).repeat_interleave(w), copies) / w
        total = w.sum().item()
        torch.testing.assert_close((got * w).sum(-1), torch.full((20,), total * (total + 1) / 2).double())
        if eps == 5.0:
            torch.testing.assert_close(got, first, rtol=1e-12, atol=1e-12)


def test_descending_is_the_flip_or_the_negative() -> None:
    x = normal(3, 7, seed=3)
    for name in FAMILIES:
        if name not in ("quadratic", "entropy", "default", "hard"):
            continue
        smoothing = FAMILIES[name].make(0.5)
        assert torch.equal(so.sort(x, descending=True, smoothing=smoothing), so.sort(x, smoothing=smoothing).flip(-1))
        assert torch.equal(so.rank(x, descending=True, smoothing=smoothing), so.rank(-x, smoothing=smoothing))
        assert torch.equal(so.argmin(x, -1, smoothing=0.5), so.argmax(-x, -1, smoothing=0.5))


@pytest.mark.parametrize("family", ["quadratic", "entropy", "default", "hard", "straight"])
def test_topk_is_a_part_of_sort(family: str) -> None:
    x, smoothing = normal(3, 7, seed=4), FAMILIES[family].make(1.5)
    for k in range(8):
        top = so.topk(x, k, smoothing=smoothing)
        assert torch.equal(top, so.sort(x, descending=True, smoothing=smoothing)[:, :k])
        low = so.topk(x, k, largest=False, smoothing=smoothing)
        assert torch.equal(low, so.sort(x, smoothing=smoothing)[:, :k])
