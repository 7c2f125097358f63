"""Checkpoints: how many states live, how often each step is computed, and that gradients do not notice."""

from __future__ import annotations

import math
import weakref
from collections import Counter

import pytest
import torch
from oracles import loss, normal
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so
from smoothops.control import _reversal

PLANS = [so.Sqrt(), so.Binomial(1), so.Binomial(2), so.Binomial(5)]
EXACT = {"rtol": 1e-12, "atol": 1e-14}


class Holder:
    def __init__(self, t: Tensor) -> None:
        self.t = t


@pytest.fixture
def living(monkeypatch):
    """States kept by the schedule, and tensors on tapes, that are alive."""
    kept: weakref.WeakSet = weakref.WeakSet()
    taped: weakref.WeakSet = weakref.WeakSet()

    class Counted(_reversal.Kept):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            kept.add(self)

    def pack(t: Tensor) -> Holder:
        holder = Holder(t)
        taped.add(holder)
        return holder

    monkeypatch.setattr(_reversal, "Kept", Counted)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.t):
        yield kept, taped


def most(living, steps: int, checkpoint: so.control.Checkpoint | None) -> tuple[int, int]:
    """The most kept states, and kept and taped ones together, at any call of the body; its tape holds one state."""
    kept, taped = living
    found = [(0, 0)]

    def body(i: int, s: Tensor) -> Tensor:
        s = s.sin()
        found.append((len(kept), len(kept) + len(taped)))
        return s

    x = torch.tensor(0.5, requires_grad=True)
    torch.autograd.grad(so.fori_loop(0, steps, body, x, checkpoint=checkpoint), x)
    return tuple(max(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1024])
def test_sqrt_keeps_two_square_roots(living, steps: int) -> None:
    assert most(living, steps, so.Sqrt())[1] <= 2 * math.sqrt(steps) + 2
    assert most(living, steps, None)[1] == steps


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 300])
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_binomial_keeps_its_slots_and_is_optimal(living, steps: int, slots: int) -> None:
    calls: Counter = Counter()

    def body(i: int, s: Tensor) -> Tensor:
        calls[i] += 1
        return s.sin()

    x = torch.tensor(0.5, requires_grad=True)
    torch.autograd.grad(so.fori_loop(0, steps, body, x, checkpoint=so.Binomial(slots)), x)
    t = next(t for t in range(steps + 1) if math.comb(slots + t, slots) >= steps)
    advances = {i: calls[i] - 1 for i in calls}  # beside the taped run
    advances[steps - 1] -= 1  # the value of the loop
    assert max(advances.values(), default=0) <= t
    optimum = t * steps - math.comb(slots + t, t - 1) if t else 0
    assert sum(advances.values()) == optimum
    assert most(living, steps, so.Binomial(slots))[0] <= slots + 1  # with the state on the tape


def test_sqrt_computes_each_step_twice() -> None:
    calls: Counter = Counter()

    def body(i: int, s: Tensor) -> Tensor:
        calls[i] += 1
        return s.sin()

    x = torch.tensor(0.5, requires_grad=True)
    y = so.fori_loop(0, 50, body, x, checkpoint=so.Sqrt())
    assert set(calls.values()) == {1}
    y.backward()
    assert calls == dict.fromkeys(range(50), 2)


# --- gradients --------------------------------------------------------------------------------------------------------


def program(x: Tensor, th: Tensor, checkpoint: so.control.Checkpoint | None) -> tuple[Tensor, ...]:
    """A pytree with an int, tensors closed over of which one is made from the other, and side outputs."""
    double = th * 2

    def f(carry, v):
        a, (b, n) = carry["a"], carry["rest"]
        new = torch.sin(a * th) + double * b + v[0] + n
        return {"a": new, "rest": [b * 0.9 + v[1].sum(), n + 1]}, (new * b, v[0].square())

    init = {"a": th.cos(), "rest": [x.sum(), torch.tensor(3)]}
    carry, ys = so.scan(f, init, (x, x.exp()), reverse=True, checkpoint=checkpoint)
    assert carry["rest"][1] == 3 + len(x)
    return carry["a"], carry["rest"][0], *ys


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_gradients(plan) -> None:
    inputs = normal(6, 2, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    value, want = program(*inputs, plan), program(*inputs, None)
    torch.testing.assert_close(value, want, rtol=0, atol=0)
    got, first = (torch.autograd.grad(sum(map(loss, v)), inputs, create_graph=True) for v in (value, want))
    torch.testing.assert_close(got, first, **EXACT)
    second = [torch.autograd.grad(sum(map(loss, g)), inputs) for g in (got, first)]
    torch.testing.assert_close(*second, **EXACT)
    assert gradcheck(
        lambda *a: program(*a, plan), inputs, check_forward_ad=True, check_batched_grad=True, atol=1e-5, rtol=1e-4
    )


def test_second_order() -> None:
    inputs = normal(3, 2, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    for plan in (so.Sqrt(), so.Binomial(2)):
        assert gradgradcheck(lambda *a, plan=plan: program(*a, plan), inputs)


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_modules_and_random_numbers(plan) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5))
    x = torch.randn(4, 3, requires_grad=True)
    results = []
    for checkpoint in (None, plan):
        torch.manual_seed(7)
        y = so.fori_loop(0, 7, lambda i, s: s + net(s), x, checkpoint=checkpoint)
        grads = torch.autograd.grad(loss(y), [x, *net.parameters()])
        results.append((y, *grads, torch.rand(1)))  # what comes after is the same too
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_backward_accumulates_and_repeats() -> None:
    x = torch.tensor([0.3, 0.4], requires_grad=True)
    w = torch.tensor(0.9, requires_grad=True)
    y = so.fori_loop(0, 9, lambda i, s: (s * w).sin(), x, checkpoint=so.Binomial(2))
    loss(y).backward(retain_graph=True)
    once = x.grad.clone(), w.grad.clone()
    loss(y).backward()
    torch.testing.assert_close((x.grad, w.grad), (2 * once[0], 2 * once[1]))
    with pytest.raises(RuntimeError, match="second time"):
        loss(y).backward()


def test_only_what_is_needed() -> None:
    """A state without gradient, a chain without any, and no_grad."""
    x, w = torch.tensor(0.3), torch.tensor(0.9, requires_grad=True)
    y = so.fori_loop(0, 9, lambda i, s: (s * w).sin(), x, checkpoint=so.Sqrt())
    v = x * 1
    for _ in range(9):
        v = (v * w).sin()
    torch.testing.assert_close(torch.autograd.grad(y, w), torch.autograd.grad(v, w))
    assert not so.fori_loop(0, 9, lambda i, s: s.sin(), x, checkpoint=so.Sqrt()).requires_grad
    with torch.no_grad():
        assert not so.fori_loop(0, 9, lambda i, s: (s * w).sin(), x, checkpoint=so.Sqrt()).requires_grad
    assert so.fori_loop(3, 3, lambda i, s: s.sin(), w, checkpoint=so.Sqrt()) == w


@pytest.mark.parametrize("plan", PLANS, ids=repr)
@pytest.mark.parametrize("derived", [False, True])
def test_tensors_that_only_pass_through_and_tensors_that_come_twice(plan, derived: bool) -> None:
    """A closed-over tensor returned as it is; a state that the body closes over too."""
    leaf = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    results = []
    for checkpoint in (None, plan):
        w = leaf * 2 if derived else leaf
        v = w.exp() if derived else leaf

        def f(s, x, w=w, v=v):
            return (s[0] * w + x, v if x > 3 else s[1]), (v, w) if x > 1 else (w, w)

        (a, b), (c, d) = so.scan(f, (w, 0 * w), torch.arange(6.0).double(), checkpoint=checkpoint)
        value = loss(a) + loss(b) + loss(c) + loss(d)
        (alone,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        results.append((a, b, c, d, alone, first, torch.autograd.grad(loss(first), leaf)[0]))
    torch.testing.assert_close(*results, **EXACT)


def test_autocast_is_the_same_when_played_again() -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    grads = []
    for checkpoint in (None, so.Sqrt()):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            y = so.fori_loop(0, 5, lambda i, s: s + net(s).float(), x, checkpoint=checkpoint)
        grads.append(torch.autograd.grad(loss(y), net.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)
    assert grads[0].abs().max() > 0.1


def test_a_loop_in_a_branch_stays_clean_when_played_again() -> None:
    x = torch.tensor([-1.0, 4.0], dtype=torch.float64, requires_grad=True)
    th = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def branch(x: Tensor, plan) -> Tensor:
        return so.fori_loop(0, 4, lambda i, s: (s * th).sqrt(), x, checkpoint=plan)

    grads = []
    for plan in (None, so.Sqrt(), so.Binomial(2)):
        y = so.cond(x > 0, lambda x, plan=plan: branch(x, plan), torch.exp, x)
        grads.append(torch.autograd.grad(loss(y), (x, th)))
    assert all(g.isfinite().all() for g in grads[0])
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, **EXACT)


# --- what torch cannot ------------------------------------------------------------------------------------------------


def chain(x: Tensor, plan) -> Tensor:
    return so.fori_loop(0, 9, lambda i, s: s.sin() + 0.1 * i, x, checkpoint=plan)


@pytest.mark.parametrize("plan", [None, *PLANS], ids=repr)
def test_transforms(plan) -> None:
    x, v = normal(3, seed=1), normal(3, seed=2)
    torch.testing.assert_close(torch.vmap(lambda x: chain(x, plan))(x), chain(x, None), **EXACT)
    want = torch.autograd.functional.jvp(lambda x: chain(x, None), x, v)[1]
    torch.testing.assert_close(torch.func.jvp(lambda x: chain(x, plan), (x,), (v,))[1], want, **EXACT)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        if plan is None:
            assert transform(lambda x: loss(chain(x, None)))(x).isfinite().all()
        else:
            with pytest.raises(ValueError, match="pass checkpoint=None there"):
                transform(lambda x: loss(chain(x, plan)))(x)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(s, w)
        with torch._C.DisableTorchFunction():  # as code that is not made of torch functions
            return s * w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        s, w = ctx.saved_tensors
        return g * w, g * s


def test_a_tensor_that_no_torch_function_takes_is_not_lost() -> None:
    x, w = torch.tensor(0.3, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    y = so.fori_loop(0, 4, lambda i, s: Opaque.apply(s, w), x, checkpoint=so.Sqrt())
    with pytest.raises(ValueError, match="make it a part of the state or pass checkpoint=None"):
        y.backward()
    y = so.fori_loop(0, 4, lambda i, s: (Opaque.apply(s[0], s[1]), s[1]), (x, w), checkpoint=so.Sqrt())[0]
    torch.testing.assert_close(torch.autograd.grad(y, (x, w)), (w**4, 4 * x * w**3))


@pytest.mark.parametrize("read", [so.heaviside, so.rank, lambda v: so.argmax(v, -1, smoothing=so.Quadratic(1.0))])
def test_a_derived_tensor_read_by_a_compiled_operator(read) -> None:
    w = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    start, derived = torch.ones(2, dtype=torch.float64), w * 2

    def final(checkpoint: so.Sqrt | None) -> Tensor:
        return so.fori_loop(0, 9, lambda i, s: s + 0.1 * read(derived) * s, start, checkpoint=checkpoint)

    (want,) = torch.autograd.grad(loss(final(None)), w, retain_graph=True)
    assert want.abs().max() > 0
    torch.testing.assert_close(torch.autograd.grad(loss(final(so.Sqrt())), w, retain_graph=True)[0], want, **EXACT)


def test_changes_in_place_are_noticed() -> None:
    x = torch.tensor([0.3, 0.5], requires_grad=True)
    middle = x * 1
    y = so.fori_loop(0, 4, lambda i, s: s.sin(), middle, checkpoint=so.Sqrt())
    with torch.no_grad():
        middle.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="inplace operation"):
        so.fori_loop(0, 9, lambda i, s: s.mul_(0.5) + 0 * x, x * 1, checkpoint=so.Sqrt()).sum().backward()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        so.Binomial(0)
    with pytest.raises(TypeError, match=r"so.Sqrt\(\) or so.Binomial"):
        chain(torch.ones(1), 3)
    with pytest.raises(TypeError, match="Sqrt"):
        chain(torch.ones(1), so.Sqrt)
