"""The blend c x + (1 - c) y under where and cond: exact at both ends, and right where numbers are not finite."""

from __future__ import annotations

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

BLENDS = {"where": so.where, "cond": lambda c, x, y: so.cond(c, lambda: x, lambda: y)}
each = pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS)
INF, NAN, HUGE = torch.inf, torch.nan, 1.7e308
ENDS = [  # c, x, y, the mean, its derivative in c
    (0.0, INF, 2.0, 2.0, 0.0),
    (0.0, NAN, 2.0, 2.0, 0.0),
    (1.0, 2.0, -INF, 2.0, 0.0),
    (1.0, 2.0, NAN, 2.0, 0.0),
    (0.0, 3.0, INF, INF, 0.0),
    (0.0, HUGE, -HUGE, -HUGE, 0.0),  # a difference that overflows
    (1.0, HUGE, -HUGE, HUGE, 0.0),
    (0.0, 5.0, 2.0, 2.0, 3.0),
    (1.0, 5.0, 2.0, 5.0, 3.0),
]


@each
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_ends(blend, case: tuple[float, ...]) -> None:
    c, x, y = (torch.tensor([v, 0.5], dtype=torch.float64, requires_grad=True) for v in case[:3])
    found = blend(c, x, y)
    assert found[0] == case[3]
    grads = torch.autograd.grad(found[0], (c, x, y))
    assert [g[0].item() for g in grads] == [case[4], case[0], 1 - case[0]]


@each
def test_between_the_ends(blend) -> None:
    c = torch.tensor([0.3, 0.7, 0.5, 0.25, 0.25, 0.25, NAN], dtype=torch.float64)
    x = torch.tensor([INF, INF, INF, HUGE, 1.0, NAN, 1.0], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, INF, -HUGE, -INF, 1.0, 2.0], dtype=torch.float64)
    want = torch.tensor([INF, INF, INF, -HUGE / 2, -INF, NAN, NAN], dtype=torch.float64)
    torch.testing.assert_close(blend(c, x, y), want, equal_nan=True, rtol=1e-15, atol=0)


@each
@pytest.mark.parametrize("odd", [False, True])
def test_gradients(blend, odd: bool) -> None:
    """``odd``: one entry without weight is infinite, which takes the longer way for all."""
    c = torch.tensor([0.2, 0.5, 0.9, 0.6], dtype=torch.float64, requires_grad=True)
    x, y = (normal(4, seed=s).requires_grad_() for s in (1, 2))

    def f(c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not odd:
            return blend(c, x, y)
        ends = [torch.cat([v, v.new_tensor([end])]) for v, end in ((c, 0.0), (x, INF), (y, 1.0))]
        return blend(*ends)

    assert gradcheck(f, (c, x, y), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (c, x, y), check_batched_grad=True)
    want = torch.autograd.grad(loss(c * x + (1 - c) * y), (c, x, y))
    torch.testing.assert_close(torch.autograd.grad(loss(f(c, x, y)[:4]), (c, x, y)), want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.05, so.Quadratic(0.4), so.Laplace(0.1), so.Hard()], ids=repr)
def test_weights_of_a_switch_sum_to_one_in_float32(smoothing) -> None:
    """The mean of equal branches is that branch."""
    x, edges = normal(20_000, scale=3.0, seed=4).float(), torch.linspace(-3, 3, 15)
    weights = so.bucketize(x, edges, smoothing=smoothing)
    assert (weights.double().sum(-1) - 1).abs().max() < 1e-6
    found = so.switch(weights, [lambda: torch.ones(20_000)] * 16)
    torch.testing.assert_close(found, torch.ones(20_000), rtol=0, atol=1e-6)


def test_what_where_was_given_may_be_changed_afterwards() -> None:
    c, x, y = (torch.tensor(v, requires_grad=r) for v, r in (([0.5], True), ([1.0], False), ([3.0], False)))
    found = so.where(c, x, y)
    x.mul_(7)
    y.zero_()
    assert torch.autograd.grad(found, c)[0] == -2


# --- soft indices -----------------------------------------------------------------------------------------------------

KEYS = torch.arange(4.0, dtype=torch.float64)
READ = {
    "take": lambda x, w: so.take(x, w),
    "take_along_dim": lambda x, w: so.take_along_dim(x, w.unsqueeze(0), 0)[0],
    "gather": lambda x, w: so.gather(x, 0, w.unsqueeze(0))[0],
    "index_select": lambda x, w: so.index_select(x, 0, w.unsqueeze(0))[0],
    "narrow": lambda x, w: so.narrow(x, 0, w, 1)[0],
    "lookup": lambda x, w: so.lookup(KEYS, (w * KEYS).sum(), x, smoothing=so.Quadratic(0.5)),
}
ODD = {  # values, an index, what is read there
    "nan beside it": ([1.0, NAN, 3.0, INF], [0.0, 0.0, 1.0, 0.0], 3.0),
    "infinite": ([1.0, NAN, INF, -INF], [0.0, 0.0, 1.0, 0.0], INF),
    "negative": ([1.0, NAN, -INF, INF], [0.0, 0.0, 1.0, 0.0], -INF),
    "nan": ([1.0, 2.0, NAN, 4.0], [0.0, 0.0, 1.0, 0.0], NAN),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("odd", ODD)
def test_what_has_weight_zero_is_not_read(name: str, odd: str) -> None:
    values, index, want = ODD[odd]
    x, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (values, index))
    y = READ[name](x, w)
    torch.testing.assert_close(y, torch.tensor(want, dtype=torch.float64), equal_nan=True, rtol=0, atol=0)
    if want == 3:
        slopes = torch.autograd.grad(y, (x, w), allow_unused=True)
        assert slopes[0].tolist() == index
        assert slopes[1].isfinite().all()


@pytest.mark.parametrize("name", READ)
def test_an_infinity_among_what_is_read_changes_nothing_else(name: str) -> None:
    """The longer way for all gives the same numbers and gradients."""
    x, w = normal(4, seed=3).requires_grad_(), torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64)
    w.requires_grad_()
    rows = [x, torch.cat([x[:3], x.new_tensor([INF])])]
    ys = [READ[name](row, w) for row in rows]
    torch.testing.assert_close(*ys, rtol=1e-15, atol=0)
    grads = [torch.autograd.grad(y, x)[0] for y in ys]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-15, atol=0)


def test_what_has_weight_zero_is_not_written() -> None:
    x = torch.tensor([1.0, INF, NAN, 4.0], dtype=torch.float64)
    index = torch.eye(4, dtype=torch.float64)[[1, 2, 0]]
    src = torch.tensor([5.0, 6.0, -INF], dtype=torch.float64, requires_grad=True)
    found = so.scatter(x, 0, index, src)
    assert found.tolist() == [-INF, 5.0, 6.0, 4.0]
    assert torch.autograd.grad(found[1:].sum(), src)[0].tolist() == [1, 1, 0]
