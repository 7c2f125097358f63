"""Law 2 in the parameters: eps, alpha, k, w and weights have gradients, as 0-d tensors and one a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import cotangent, normal, spread, value_and_gradient
from registry import Case, cases
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so


def check(f: Callable[..., Tensor], *arguments: Tensor, second: bool = True) -> None:
    """First derivatives in every mode, and the second ones of a weighted sum."""
    given = tuple(a.detach().clone().requires_grad_() for a in arguments)
    assert gradcheck(f, given, rtol=1e-6, atol=1e-7, check_forward_ad=True, check_batched_grad=True)

    def weighted(*a: Tensor) -> Tensor:
        y = f(*a)
        return (y * cotangent(y)).sum() + (y * y * cotangent(y).flip(-1)).sum()

    if second:
        assert gradgradcheck(weighted, given, rtol=1e-5, atol=1e-6, check_fwd_over_rev=True)


@pytest.mark.parametrize("case", cases("strength", one_each=True))
def test_eps(case: Case) -> None:
    x, eps = normal(5, seed=1), torch.tensor(case.operator.eps, dtype=torch.float64)
    check(lambda x, eps: case(x, eps), x, eps, second=case.operator.base)


@pytest.mark.parametrize("case", cases("row strength"))
def test_eps_of_each_row(case: Case) -> None:
    """Rows do not see each other's eps, in value or gradient, along any dim."""
    x, eps = normal(3, 5, seed=1), case.operator.eps * torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    y = case(x, eps)
    for i in range(3):
        assert torch.equal(y[i], case(x[i], eps[i, 0]))
    if not case.operator.method:  # eps is laid out as x, whose last dim a polytope takes
        assert torch.equal(case(x.T, eps.T, 0), y.T)
    gradient = value_and_gradient(lambda e: case(x, e), eps)[1]
    c = cotangent(y)
    for i in range(3):
        e = eps[i, 0].clone().requires_grad_()
        (alone,) = torch.autograd.grad((case(x[i], e) * c[i]).sum(), e)
        torch.testing.assert_close(gradient[i, 0], alone, rtol=1e-12, atol=1e-13)


ALPHAS = [1.0, 1.25, 1.5, 2.0, 3.0]
TSALLIS = {
    "argmax": lambda x, s: so.argmax(x, -1, smoothing=s),
    "amax": lambda x, s: so.amax(x, -1, smoothing=s),
    "topk_mask": lambda x, s: so.topk_mask(x, 1.5, smoothing=s),
    "CappedSimplex.max": lambda x, s: so.CappedSimplex(2).max(x, s),
}


@pytest.mark.parametrize("name", TSALLIS)
@pytest.mark.parametrize("alpha", ALPHAS[1:])
def test_alpha(name: str, alpha: float) -> None:
    x, a = normal(5, seed=2), torch.tensor(alpha, dtype=torch.float64)
    check(lambda x, a: TSALLIS[name](x, so.Tsallis(a, 0.6)), x, a)


@pytest.mark.parametrize("name", TSALLIS)
def test_alpha_at_its_lower_end(name: str) -> None:
    """alpha = 1 is Entropy; the derivative in alpha there is the one-sided limit."""
    x = normal(5, seed=3)

    def f(a: Tensor) -> Tensor:
        y = TSALLIS[name](x, so.Tsallis(a, 0.6))
        return (y * cotangent(y)).sum()

    one = torch.tensor(1.0, dtype=torch.float64)
    slope = torch.func.grad(f)(one)
    h = 1e-4
    forward = (-3 * f(one) + 4 * f(one + h) - f(one + 2 * h)) / (2 * h)
    torch.testing.assert_close(slope, forward, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.func.grad(f)(one + 1e-9), slope, rtol=1e-6, atol=1e-8)


def test_alpha_of_the_simplex_at_1_in_closed_form() -> None:
    """d y / d alpha at alpha = 1 is -(y log^2 y - y sum y log^2 y) / 2."""
    x = normal(6, seed=4)
    y = torch.softmax(x, -1)
    log2 = y.log().square()
    want = -(y * log2 - y * (y * log2).sum()) / 2
    one = torch.tensor(1.0, dtype=torch.float64)
    got = torch.func.jacfwd(lambda a: so.entmax(x, a))(one)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_alpha_of_each_row() -> None:
    x, alpha = normal(5, 6, seed=5), torch.tensor(ALPHAS, dtype=torch.float64).unsqueeze(1)
    y = so.argmax(x, -1, smoothing=so.Tsallis(alpha, 0.8))
    for row, a, want in zip(x, ALPHAS, y, strict=True):
        torch.testing.assert_close(so.argmax(row, smoothing=so.Tsallis(a, 0.8)), want, rtol=0, atol=0)
    check(lambda x, a: so.argmax(x, -1, smoothing=so.Tsallis(a, 0.8)), x[1:4], alpha[1:4])


CAPPED = {
    "quadratic": so.Quadratic,
    "entropy": so.Entropy,
    "tsallis1.5": lambda eps: so.Tsallis(1.5, eps),
    "tsallis3": lambda eps: so.Tsallis(3.0, eps),
    "binary": so.BinaryEntropy,
    "laplace": so.Laplace,
}


@pytest.mark.parametrize("family", CAPPED)
@pytest.mark.parametrize("k", [0.3, 1.7, 2.4, 4.2])
def test_k(family: str, k: float) -> None:
    x, k_tensor = normal(5, seed=6), torch.tensor(k, dtype=torch.float64)
    smoothing = CAPPED[family](0.9)
    check(lambda x, k: so.topk_mask(x, k, smoothing=smoothing), x, k_tensor, second=k == 1.7)
    check(lambda x, k: so.CappedSimplex(k).max(x, smoothing), x, k_tensor, second=k == 2.4)
    number = so.topk_mask(x, k, smoothing=smoothing)
    torch.testing.assert_close(so.topk_mask(x, k_tensor, smoothing=smoothing), number, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("family", CAPPED)
def test_k_of_each_row(family: str) -> None:
    x, k = normal(3, 6, seed=7), torch.tensor([[0.5], [2.0], [4.5]], dtype=torch.float64)
    smoothing = CAPPED[family](0.7)
    y = so.topk_mask(x, k, smoothing=smoothing)
    for i in range(3):
        torch.testing.assert_close(y[i], so.topk_mask(x[i], k[i, 0], smoothing=smoothing), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(y.sum(-1, keepdim=True), k, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(so.topk_mask(x.T, k.T, 0, smoothing=smoothing), y.T, rtol=0, atol=0)
    check(lambda x, k: so.topk_mask(x, k, smoothing=smoothing), x, k, second=False)


@pytest.mark.parametrize("family", ["quadratic", "entropy"])
@pytest.mark.parametrize("eps", [0.1, 0.6, 10.0])
def test_w(family: str, eps: float) -> None:
    """w need not be sorted; its gradient returns to where each entry came from."""
    x, w, smoothing = normal(5, seed=8), spread(5), CAPPED[family](eps)
    check(lambda x, w: so.Permutahedron(w).argmax(x, smoothing), x, w)
    check(lambda x, w: so.Permutahedron(w).max(x, smoothing), x, w)


@pytest.mark.parametrize("family", ["quadratic", "entropy"])
def test_w_of_each_row(family: str) -> None:
    x, smoothing = normal(3, 5, seed=9), CAPPED[family](0.6)
    w = torch.stack([spread(5), spread(5).flip(0), spread(5, 1.3)])
    y, m = so.Permutahedron(w).argmax(x, smoothing), so.Permutahedron(w).max(x, smoothing)
    for i in range(3):
        assert torch.equal(y[i], so.Permutahedron(w[i]).argmax(x[i], smoothing))
        assert torch.equal(m[i], so.Permutahedron(w[i]).max(x[i], smoothing))
    check(lambda x, w: so.Permutahedron(w).argmax(x, smoothing), x, w, second=False)


def test_gradient_of_w_per_block() -> None:
    """Quadratic: the mean of the cotangent over the block (formulas of Blondel et al. 2020), in w's own order."""
    x, w, g = normal(6, seed=10), spread(6), normal(6, seed=11)
    whole = torch.func.grad(lambda w: (so.Permutahedron(w).argmax(x, so.Quadratic(100.0)) * g).sum())(w)
    torch.testing.assert_close(whole, g.mean().expand(6), rtol=1e-12, atol=1e-13)
    single = torch.func.grad(lambda w: (so.Permutahedron(w).argmax(x, so.Quadratic(1e-9)) * g).sum())(w)
    torch.testing.assert_close(single[w.argsort()], g[x.argsort()], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("eps", [0.05, 0.4, 5.0])
def test_weights_of_rank(eps: float) -> None:
    x, weights = normal(2, 5, seed=12), torch.tensor([1.0, 0.5, 2.0, 1.5, 0.7], dtype=torch.float64)
    check(lambda x, w: so.rank(x, weights=w, smoothing=eps), x, weights)


@pytest.mark.parametrize("decreasing", [False, True])
def test_weights_of_isotonic(decreasing: bool) -> None:
    x, weights = normal(2, 6, seed=13), torch.tensor([1.0, 0.5, 2.0, 1.5, 0.7, 3.0], dtype=torch.float64)
    check(lambda x, w: so.isotonic(x, -1, decreasing, weights=w), x, weights)


def test_learned_parameters_together() -> None:
    """alpha, eps and k in one call, under vmap and grad."""
    x = normal(3, 5, seed=14)
    alpha, eps, k = (torch.tensor(v, dtype=torch.float64) for v in (1.4, 0.8, 2.3))
    check(lambda x, a, e, k: so.topk_mask(x, k, smoothing=so.Tsallis(a, e)), x[0], alpha, eps, k)

    def f(row: Tensor, a: Tensor, e: Tensor, k: Tensor) -> Tensor:
        y = so.topk_mask(row, k, smoothing=so.Tsallis(a, e))
        return (y * cotangent(y)).sum()

    many = torch.vmap(torch.func.grad(f, argnums=(0, 1, 2, 3)), in_dims=(0, None, None, None))(x, alpha, eps, k)
    for i in range(3):
        for got, want in zip(many, torch.func.grad(f, argnums=(0, 1, 2, 3))(x[i], alpha, eps, k), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-12)
    ks = torch.tensor([0.7, 2.0, 4.4], dtype=torch.float64)
    each = torch.vmap(f, in_dims=(0, None, None, 0))(x, alpha, eps, ks)
    torch.testing.assert_close(each, torch.stack([f(x[i], alpha, eps, ks[i]) for i in range(3)]), rtol=1e-12, atol=0)
