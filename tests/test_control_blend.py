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


def test_what_where_was_given_may_be_changed_afterwards() -> None:
    c, x, y = (torch.tensor(v, requires_grad=r) for v, r in (([0.5], True), ([1.0], False), ([3.0], False)))
    found = so.where(c, x, y)
    x.mul_(7)
    y.zero_()
    assert torch.autograd.grad(found, c)[0] == -2
