"""Each combinator with each checkpoint: no look at any number, torch.compile as one graph, vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import loss, normal
from torch import Tensor

import smoothops as so

EXACT = {"rtol": 1e-12, "atol": 1e-14}
Plan = so.control.Checkpoint | None
LAW = so.Quadratic(0.5)  # weights that are exactly 0 and 1


def cond(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    p = so.heaviside(x.sum(-1), smoothing=LAW)
    return so.cond(p, lambda x: (x.sum(-1, keepdim=True) * w + 0.5).sqrt() + x, lambda x: (x * w).exp(), x)


def switch(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    y = x.sum(-1)
    weights = so.bucketize(y, [-0.6, 0.6], smoothing=LAW)
    return so.switch(weights, [lambda y: (0.2 - y * w).log(), lambda y: y * w, lambda y: (y + 0.2).sqrt() * w], y)


def fori_loop(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    return so.fori_loop(0, 5, lambda i, s: (s * w).sin() + 0.1 * i, x, checkpoint=plan)


def scan(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    carry, ys = so.scan(lambda c, v: ((c * w + v).tanh(), c.sin()), x[..., 0], x, dim=-1, checkpoint=plan)
    return carry + ys.sum(-1)


def scan_of_branches(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    def f(c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        c = so.cond(so.heaviside(v, smoothing=LAW), lambda: (v * w + 0.5).sqrt(), lambda: c * w)
        return c, c * v

    carry, ys = so.scan(f, x[..., 0], x, dim=-1, reverse=True, checkpoint=plan)
    return carry + ys.sum(-1)


def while_loop(x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    def positive(s: Tensor) -> Tensor:
        return so.heaviside(s.sum(-1), smoothing=LAW)

    return so.while_loop(positive, lambda s: s - w * s.cos(), x, 3, checkpoint=plan, on_fail="ignore")[0]


PLANS = [None, so.Sqrt(), so.Binomial(1), so.Binomial(3)]
CASES = [(f, None) for f in (cond, switch)]
CASES += [(f, plan) for f in (fori_loop, scan, scan_of_branches, while_loop) for plan in PLANS]
each = pytest.mark.parametrize(("f", "plan"), CASES, ids=[f"{f.__name__}-{plan!r}" for f, plan in CASES])
Program = Callable[[Tensor, Tensor, Plan], Tensor]


def inputs() -> tuple[Tensor, Tensor]:
    return normal(6, 3, seed=1).requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)


@each
def test_no_look_at_any_number(f: Program, plan: Plan) -> None:
    """On the meta device there are none: not in the value, nor in its first and second derivatives."""
    x, w = (torch.empty_like(v, device="meta").requires_grad_() for v in inputs())
    y = f(x, w, plan)
    assert y.device.type == "meta"
    first = torch.autograd.grad(y.square().sum(), (x, w), retain_graph=True)
    assert [g.shape for g in first] == [x.shape, w.shape]
    slopes = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in slopes), (x, w))
    assert [g.shape for g in second] == [x.shape, w.shape]


# compiling takes long: by default without a plan and with Sqrt(); a compiled while_loop keeps all states in any case
@pytest.mark.parametrize(
    ("f", "plan"),
    [
        pytest.param(f, plan, marks=() if plan in PLANS[:2] else pytest.mark.full)
        for f, plan in CASES
        if f is not while_loop or plan in PLANS[:2]
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(f: Program, plan: Plan) -> None:
    x, w = inputs()
    if f is scan_of_branches and plan is not None:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Higher Order Operator: torch\.utils\.checkpoint"):
            torch.compile(lambda x, w: f(x, w, plan), fullgraph=True, backend="aot_eager")(x, w)
        return
    fast = torch.compile(lambda x, w: f(x, w, plan), fullgraph=True, backend="aot_eager")(x, w)
    slow = f(x, w, None)
    torch.testing.assert_close(fast, slow, **EXACT)
    grads = [torch.autograd.grad(loss(y), (x, w)) for y in (fast, slow)]
    torch.testing.assert_close(*grads, **EXACT)
    assert all(g.isfinite().all() for g in grads[0])


@each
def test_vmap(f: Program, plan: Plan) -> None:
    x, w = inputs()
    rows = torch.vmap(lambda x: f(x, w, plan))(x)
    whole = f(x, w, plan)
    torch.testing.assert_close(rows, whole, **EXACT)
    # the gradient outside of vmap, where all rows share w, and inside
    grads = [torch.autograd.grad(loss(y), (x, w), retain_graph=True) for y in (rows, whole)]
    torch.testing.assert_close(*grads, **EXACT)
    if plan is None:
        found = torch.vmap(torch.func.grad(lambda x: f(x, w, None).sum()))(x.detach())
        torch.testing.assert_close(found, torch.autograd.grad(whole.sum(), x)[0], **EXACT)


@pytest.mark.parametrize("f", [cond, switch, scan_of_branches, while_loop])
def test_a_tensor_that_all_rows_of_a_vmap_share(f: Program) -> None:
    """grad of vmap, to second order."""
    x, w = (v.detach() for v in inputs())
    by_vmap = lambda w: loss(torch.vmap(lambda x: f(x, w, None))(x))  # noqa: E731
    whole = lambda w: loss(f(x, w, None))  # noqa: E731
    for order in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.grad(f))):
        torch.testing.assert_close(order(by_vmap)(w), order(whole)(w), rtol=1e-11, atol=1e-12)
