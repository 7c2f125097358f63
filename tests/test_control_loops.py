"""fori_loop and scan against the Python loops that they stand for."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

EXACT = {"rtol": 1e-12, "atol": 1e-14}
State = namedtuple("State", "x rest")


@pytest.mark.parametrize(("lo", "hi"), [(0, 5), (3, 9), (-2, 2), (4, 4), (5, 2)])
def test_fori_loop_is_the_python_loop(lo: int, hi: int) -> None:
    def body(i: int, s: State) -> State:
        return State(s.x * 0.5 + i, {"n": s.rest["n"] + 1, "k": s.rest["k"] * i, "none": None})

    init = State(normal(2, 3), {"n": 0, "k": torch.tensor(3), "none": None})
    want = init
    for i in range(lo, hi):
        want = body(i, want)
    got = so.fori_loop(lo, hi, body, init)
    assert type(got) is State
    assert torch.equal(got.x, want.x)
    assert got.rest == want.rest


def test_scan_is_the_python_loop() -> None:
    xs = {"a": normal(5, 2, seed=1), "b": torch.arange(5)}
    carry, ys = so.scan(lambda c, x: (c * 0.5 + x["a"], (c.sum(), x["b"] * 2)), torch.zeros(2).double(), xs)
    c, sums = torch.zeros(2).double(), []
    for row in xs["a"]:
        sums.append(c.sum())
        c = c * 0.5 + row
    assert torch.equal(carry, c)
    assert torch.equal(ys[0], torch.stack(sums))
    assert torch.equal(ys[1], 2 * torch.arange(5))


@pytest.mark.parametrize("dim", [0, 1, -1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_along_a_dim_in_either_direction(dim: int, reverse: bool) -> None:
    x = normal(3, 4, 5)
    shape = x.select(dim, 0).shape
    carry, ys = so.scan(lambda c, v: (c + v, c + v), x.new_zeros(shape), x, dim=dim, reverse=reverse)
    want = x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)
    torch.testing.assert_close(ys, want, **EXACT)
    torch.testing.assert_close(carry, x.sum(dim), **EXACT)
    # y without the dims of x, and a number
    assert so.scan(lambda c, v: (c, 1.0), torch.zeros(()), x, dim=0)[1].tolist() == [1.0] * 3


def recurrence(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    carry, ys = so.scan(lambda h, v: ((h @ w + v).tanh(), h.sum() * v), x[0] * 0, x)
    return so.fori_loop(1, 4, lambda i, s: s + i * (s * w[0]).sin(), carry), ys


def test_gradients() -> None:
    inputs = normal(4, 2, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_()
    assert gradcheck(recurrence, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(recurrence, inputs, check_batched_grad=True)


def test_transforms() -> None:
    x, w = normal(3, 4, 2, seed=1), normal(2, 2, seed=2)
    got = torch.vmap(torch.func.grad(lambda x: loss(recurrence(x, w)[0])))(x)
    want = torch.stack([torch.func.grad(lambda x: loss(recurrence(x, w)[0]))(row) for row in x])
    torch.testing.assert_close(got, want, **EXACT)
    f = lambda x: loss(recurrence(x, w)[0])  # noqa: E731
    torch.testing.assert_close(torch.func.hessian(f)(x[0]), torch.autograd.functional.hessian(f, x[0]), **EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    x, w = normal(4, 2, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_()
    fast = torch.compile(recurrence, fullgraph=True, backend="aot_eager")
    found = [(*f(x, w), *torch.autograd.grad(sum(loss(y) for y in f(x, w)), (x, w))) for f in (fast, recurrence)]
    torch.testing.assert_close(*found, **EXACT)
    batched = torch.compile(torch.vmap(recurrence, (0, None)), fullgraph=True, backend="aot_eager")
    rows = normal(3, 4, 2, seed=3)
    torch.testing.assert_close(batched(rows, w), torch.vmap(recurrence, (0, None))(rows, w), **EXACT)


def grow(i: int, s: Tensor) -> Tensor:
    return torch.cat([s, s])


def test_bad_arguments() -> None:
    one = torch.ones(2)
    with pytest.raises(TypeError, match=r"hi must be an int, got float"):
        so.fori_loop(0, 2.0, lambda i, s: s, one)
    with pytest.raises(TypeError, match="body must be a function"):
        so.fori_loop(0, 2, one, one)
    with pytest.raises(ValueError, match=r"grow returned float32 \(4,\), its state was float32 \(2,\)"):
        so.fori_loop(0, 3, grow, one)
    with pytest.raises(ValueError, match=r"float64 \(2,\) at \[1\], its state was float32"):
        so.fori_loop(0, 3, lambda i, s: (s[0], s[1].double()), (one, one))
    with pytest.raises(ValueError, match="structure"):
        so.fori_loop(0, 3, lambda i, s: (s, s), one)
    with pytest.raises(TypeError, match=r"must return \(carry, y\), got Tensor"):
        so.scan(lambda c, x: c, one, one)
    with pytest.raises(ValueError, match=r"length \[2, 3\] along dim 0"):
        so.scan(lambda c, x: (c, c), one, (one, torch.ones(3)))
    with pytest.raises(ValueError, match="at least 1"):
        so.scan(lambda c, x: (c, c), one, torch.ones(0))
    with pytest.raises(TypeError, match="pytree of tensors"):
        so.scan(lambda c, x: (c, c), one, [1, 2])
    with pytest.raises(ValueError, match="as the first y"):
        so.scan(lambda c, x: (c + 1, torch.ones(int(c[0]))), one, one)
    with pytest.raises(IndexError):
        so.scan(lambda c, x: (c, c), one, one, dim=1)
