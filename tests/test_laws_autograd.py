"""Law 2: every derivative that torch can ask for, in x, agrees with finite differences and with every other mode."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, loss, normal, value_and_gradient
from registry import CASES, Case, case, cases
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def jacobian(f, x: Tensor) -> Tensor:
    """Row by row with plain autograd: the reference of the transforms."""
    x = x.detach().clone().requires_grad_()
    y = f(x)
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in y.reshape(-1)]
    return torch.stack(rows).reshape(*y.shape, *x.shape)


@pytest.mark.parametrize("case", cases("gradcheck"))
def test_gradcheck(case: Case) -> None:
    x = normal(2, 5, seed=1).requires_grad_()
    assert gradcheck(case, (x,), rtol=1e-6, atol=1e-7, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("case", cases("gradcheck", one_each=True))
def test_gradgradcheck(case: Case) -> None:
    x = normal(1, 5, seed=1).requires_grad_()

    def weighted(x: Tensor) -> Tensor:
        y = case(x)
        return (y * cotangent(y)).sum() + (y * y * cotangent(y).flip(-1)).sum()

    assert gradgradcheck(weighted, (x,), rtol=1e-5, atol=1e-6, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("case", cases("transforms"))
def test_vmap_is_a_loop(case: Case) -> None:
    x = normal(3, 2, 5, seed=2)
    torch.testing.assert_close(torch.vmap(case)(x), torch.stack([case(row) for row in x]), **EXACT)
    last = torch.vmap(case, in_dims=2, out_dims=0)(x.movedim(0, 2))
    torch.testing.assert_close(last, case(x), **EXACT)


@pytest.mark.parametrize("case", cases("transforms"))
def test_first_order_transforms(case: Case) -> None:
    x, v = normal(2, 5, seed=3), normal(2, 5, seed=4)
    j = jacobian(case, x)
    along_v = (j * v).sum((-2, -1))
    y, tangent = torch.func.jvp(case, (x,), (v,))
    # the eager pass is compiled; where all but two items are near 0 or 1, tau may move within the rounding of the sum
    torch.testing.assert_close(y, case(x), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(tangent, along_v, **EXACT)
    torch.testing.assert_close(torch.func.jacrev(case)(x), j, **EXACT)
    torch.testing.assert_close(torch.func.jacfwd(case)(x), j, **EXACT)
    leaf = x.clone().requires_grad_()  # the transform around the backward pass alone
    y = case(leaf)
    units = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    rows = torch.vmap(lambda g: torch.autograd.grad(y, leaf, g, retain_graph=True)[0])(units)
    torch.testing.assert_close(rows.reshape(j.shape), j, **EXACT)
    gradient = torch.func.grad(lambda x: loss(case(x)))(x)
    torch.testing.assert_close(gradient, value_and_gradient(case, x)[1], **EXACT)
    each = torch.vmap(torch.func.grad(lambda row: loss(case(row))))(x)
    torch.testing.assert_close(each, torch.stack([value_and_gradient(case, row)[1] for row in x]), **EXACT)


@pytest.mark.parametrize("case", cases("transforms"))
def test_hessians_agree(case: Case) -> None:
    x = normal(5, seed=5)

    def weighted(x: Tensor) -> Tensor:
        y = case(x)
        return loss(y) + loss(y * y)

    plain = jacobian(lambda x: torch.autograd.grad(weighted(x), x, create_graph=True)[0], x)
    torch.testing.assert_close(torch.func.hessian(weighted)(x), plain, **EXACT)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(weighted))(x), plain, **EXACT)
    torch.testing.assert_close(plain, plain.T, **EXACT)
    batch = torch.stack([x, x.flip(0)])
    both = torch.vmap(torch.func.hessian(weighted))(batch)
    torch.testing.assert_close(both[0], plain, **EXACT)


SURROGATES = [c for c in CASES if c.family.startswith("straight")]


def surrogates() -> list:
    return [pytest.param(c, id=c.name, marks=() if c.core else pytest.mark.full) for c in SURROGATES]


@pytest.mark.parametrize("case", surrogates())
def test_straight_through(case: Case) -> None:
    """The hard value to the bit in every mode, and the soft gradient."""
    x, v = normal(2, 6, seed=6), normal(2, 6, seed=7)
    smoothing = case.smoothing()

    def soft(x: Tensor) -> Tensor:
        return case.operator.call(x, smoothing.backward, -1)

    hard = case.operator.call(x, so.Hard(), -1)
    value, gradient = value_and_gradient(case, x)
    assert torch.equal(value, hard)
    torch.testing.assert_close(gradient, value_and_gradient(soft, x)[1], **EXACT)
    value, tangent = torch.func.jvp(case, (x,), (v,))
    assert torch.equal(value, hard)
    torch.testing.assert_close(tangent, torch.func.jvp(soft, (x,), (v,))[1], **EXACT)
    assert torch.equal(torch.vmap(case)(x), torch.vmap(lambda r: case.operator.call(r, so.Hard(), -1))(x))
    _, pull = torch.func.vjp(case, x)
    torch.testing.assert_close(pull(cotangent(hard))[0], gradient, **EXACT)


def test_straight_through_of_two_soft_smoothings() -> None:
    x = normal(2, 6, seed=6)
    smoothing = so.StraightThrough(so.Entropy(0.5), forward=so.Quadratic(0.5))
    value, gradient = value_and_gradient(lambda x: so.argmax(x, -1, smoothing=smoothing), x)
    assert torch.equal(value, so.argmax(x, -1, smoothing=so.Quadratic(0.5)))
    soft = value_and_gradient(lambda x: so.argmax(x, -1, smoothing=so.Entropy(0.5)), x)[1]
    torch.testing.assert_close(gradient, soft, **EXACT)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rank", {}),
        ("sort", {}),
        ("topk", {"k": 2}),
        ("topk_mask", {"k": 2}),
        ("rank", {"descending": True}),
        ("sort", {"dim": 0}),
        ("topk_mask", {"k": 1.5, "largest": False}),
    ],
)
def test_mixing_is_a_fixed_strength(name: str, arguments: dict) -> None:
    """The default smoothing chooses eps and detaches it: value and gradient of that number."""
    operator = getattr(so, name)
    x = normal(4, 9, seed=8)
    eps = so.mixing_eps(operator, x, **arguments)
    assert not eps.requires_grad
    value, gradient = value_and_gradient(lambda x: operator(x, **arguments), x)
    want = value_and_gradient(lambda x: operator(x, **arguments, smoothing=so.Quadratic(eps)), x)
    torch.testing.assert_close(value, want[0], rtol=0, atol=0)
    torch.testing.assert_close(gradient, want[1], rtol=0, atol=0)
    assert gradient.abs().amax(arguments.get("dim", -1)).min() > 1e-3


@pytest.mark.parametrize("name", ["rank-default", "sort-default", "topk_mask-default"])
def test_mixing_in_transforms(name: str) -> None:
    """Under vmap each row has its own eps, under grad eps has no gradient."""
    chosen = case(name)
    x = normal(3, 7, seed=9)
    torch.testing.assert_close(torch.vmap(chosen)(x), chosen(x), **EXACT)
    torch.testing.assert_close(torch.func.jacrev(chosen)(x), jacobian(chosen, x), **EXACT)
    torch.testing.assert_close(torch.func.jacfwd(chosen)(x), jacobian(chosen, x), **EXACT)
