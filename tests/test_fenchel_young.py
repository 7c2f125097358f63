"""Fenchel-Young losses: their definition, their gradient, published special cases, and bad arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracles import normal
from torch import Tensor
from torch.nn.functional import cross_entropy

import smoothops as so

RHO = torch.arange(1, 6, dtype=torch.float64)
SETS = {
    "simplex": (so.Simplex(), [0.0, 1, 0, 0, 0]),
    "simplex, inner": (so.Simplex(), [0.1, 0.4, 0, 0.3, 0.2]),
    "top 2": (so.CappedSimplex(2), [0.0, 1, 0, 0, 1]),
    "multilabel": (so.Hypercube(), [1.0, 1, 0, 0, 1]),
    "ranking": (so.Permutahedron(RHO), [2.0, 5, 1, 3, 4]),
    "isotonic": (so.OrderPolytope(), [-1.0, 0, 0, 2, 3]),
}
SMOOTHINGS = {
    "quadratic": so.Quadratic(0.8),
    "entropy": so.Entropy(0.8),
    "entmax": so.Tsallis(1.5, 0.8),
    "fermi-dirac": so.BinaryEntropy(0.8),
}
CASES = [
    (c, s) for c, (polytope, _) in SETS.items() for s, reg in SMOOTHINGS.items() if polytope.role in type(reg).roles
]


def made(case: tuple[str, str], reduction: str = "none") -> tuple[so.FenchelYoung, Tensor]:
    polytope, y = SETS[case[0]]
    return so.FenchelYoung(SMOOTHINGS[case[1]], polytope, reduction), torch.tensor(y, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_value_gradient_and_minimum(case: tuple[str, str]) -> None:
    loss, y = made(case)
    theta = normal(40, 5, scale=2.0).requires_grad_()
    value = loss(theta, y.expand(40, 5))
    assert (value > -1e-12).all()
    answer = loss.polytope.argmax(theta.detach(), loss.smoothing)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    torch.testing.assert_close(gradient, answer - y, rtol=0, atol=1e-12)
    # zero at y = argmax(theta), and nowhere else
    torch.testing.assert_close(loss(theta, answer), torch.zeros(40).double(), rtol=0, atol=1e-11)
    apart = (answer - y).abs().amax(-1) > 1e-3
    assert apart.any()
    assert (value[apart] > 1e-8).all()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_convex(case: tuple[str, str]) -> None:
    loss, y = made(case)
    a, b = normal(100, 5, seed=1, scale=2.0), normal(100, 5, seed=2, scale=2.0)
    ends = (loss(a, y.expand(100, 5)) + loss(b, y.expand(100, 5))) / 2
    assert (loss((a + b) / 2, y.expand(100, 5)) <= ends + 1e-12).all()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_derivatives(case: tuple[str, str]) -> None:
    loss, y = made(case)
    theta = normal(2, 5, seed=3).requires_grad_()
    f = lambda v: loss(v, y.expand(2, 5)) * torch.tensor([1.0, -0.7])  # noqa: E731
    assert torch.autograd.gradcheck(f, theta, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, theta)
    one = lambda v: loss(v, y)  # noqa: E731
    x = theta.detach()
    want = torch.stack([torch.func.hessian(one)(row) for row in x])
    torch.testing.assert_close(torch.vmap(torch.func.hessian(one))(x), want)
    tangent = torch.func.jvp(one, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, torch.func.grad(one)(x[0]) @ x[1])


def test_gradient_in_the_strength_and_the_target() -> None:
    y = normal(2, 5).softmax(-1).requires_grad_()
    eps = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    theta = normal(2, 5, seed=3).requires_grad_()

    def f(theta: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        return so.FenchelYoung(so.Entropy(eps), so.Simplex(), "none")(theta, z.softmax(-1))

    assert torch.autograd.gradcheck(f, (theta, eps, y))
    assert torch.autograd.gradgradcheck(f, (theta, eps, y))


def test_published_losses() -> None:
    entmax = pytest.importorskip("entmax")
    theta, target = normal(50, 7, scale=3.0).requires_grad_(), torch.arange(50) % 7
    published = {
        so.Entropy(1.0): lambda x, t: cross_entropy(x, t, reduction="none"),
        so.Quadratic(1.0): entmax.sparsemax_loss,
        so.Tsallis(1.5, 1.0): entmax.entmax15_loss,
        so.Tsallis(1.2, 1.0): lambda x, t: entmax.entmax_bisect_loss(x, t, 1.2, n_iter=100),
        so.Tsallis(2.5, 1.0): lambda x, t: entmax.entmax_bisect_loss(x, t, 2.5, n_iter=100),
    }
    for smoothing, theirs in published.items():
        ours = so.FenchelYoung(smoothing, so.Simplex(), "none")(theta, target)
        want = theirs(theta, target)
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(v.sum(), theta)[0] for v in (ours, want)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_other_closed_forms() -> None:
    theta = normal(30, 5, scale=2.0)
    labels = (normal(30, 5, seed=1) > 0).double()
    multilabel = so.FenchelYoung(so.Entropy(1.0), so.Hypercube(), "none")(theta, labels)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(theta, labels, reduction="none").sum(-1)
    torch.testing.assert_close(multilabel, bce, rtol=0, atol=1e-12)
    # isotonic regression: half the squared distance from theta to y, less that to the cone
    y = so.isotonic(normal(30, 5, seed=2))
    found = so.FenchelYoung(so.Quadratic(1.0), so.OrderPolytope(), "none")(theta, y)
    want = ((theta - y).square() - (theta - so.isotonic(theta)).square()).sum(-1) / 2
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    # the perceptron
    hard = so.FenchelYoung(so.Hard(), so.Simplex(), "none")(theta, torch.arange(30) % 5)
    torch.testing.assert_close(hard, theta.amax(-1) - theta[torch.arange(30), torch.arange(30) % 5])


@pytest.mark.parametrize("smoothing", [so.Quadratic(1e-6), so.Entropy(1e-6)], ids=["quadratic", "entropy"])
def test_small_eps_is_the_perceptron(smoothing: so.Smoothing) -> None:
    theta, y = normal(20, 5), RHO.flip(0).expand(20, 5)
    hard, soft = (so.FenchelYoung(s, so.Permutahedron(RHO), "none")(theta, y) for s in (so.Hard(), smoothing))
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-4)


def test_default_strength_is_chosen_once() -> None:
    theta, y = normal(20, 5).requires_grad_(), RHO.flip(0).expand(20, 5)
    loss = so.FenchelYoung(None, so.Permutahedron(RHO), "none")
    eps = so.mixing_eps(so.rank, theta.detach())
    fixed = so.FenchelYoung(so.Quadratic(eps), so.Permutahedron(RHO), "none")
    torch.testing.assert_close(loss(theta, y), fixed(theta, y), rtol=0, atol=0)
    answer = loss.polytope.argmax(theta.detach(), so.Quadratic(eps))
    assert (loss(theta.detach(), answer).abs() < 1e-11).all()


def test_perturbed() -> None:
    theta, target = normal(4, 5).requires_grad_(), torch.arange(4)
    noise = so.Perturbed(1.0, so.Gumbel(), 20000, generator=torch.Generator().manual_seed(0))
    value = so.FenchelYoung(noise, so.Simplex(), "none")(theta, target)
    torch.testing.assert_close(value, cross_entropy(theta, target, reduction="none"), rtol=0, atol=0.05)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    (want,) = torch.autograd.grad(cross_entropy(theta, target, reduction="sum"), theta)
    torch.testing.assert_close(gradient, want, rtol=0, atol=0.03)


def test_reductions_shapes_and_dtypes() -> None:
    theta, target = normal(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    each = so.FenchelYoung(1.0, so.Simplex(), "none")(theta, target)
    assert each.shape == (2, 3)
    torch.testing.assert_close(so.FenchelYoung(1.0, so.Simplex())(theta, target), each.mean())
    torch.testing.assert_close(so.FenchelYoung(1.0, so.Simplex(), "sum")(theta, target), each.sum())
    one_hot = torch.nn.functional.one_hot(target, 5)
    torch.testing.assert_close(so.FenchelYoung(1.0, so.Simplex(), "none")(theta, one_hot), each)
    for dtype in (torch.float32, torch.bfloat16):
        got = so.FenchelYoung(1.0, so.Simplex(), "none")(theta.to(dtype), target)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), each, rtol=0.02, atol=0.02)
    # what single precision would cancel
    far = torch.tensor([[1e6, 1e6 - 1, 0]])
    assert so.FenchelYoung(1.0, so.Simplex())(far, torch.tensor([0])) == pytest.approx(0.31326169, rel=1e-6)


def test_infinities_and_nan() -> None:
    theta = torch.tensor([[0.0, -torch.inf, 1.0], [torch.nan, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = so.FenchelYoung(1.0, so.Simplex(), "none")(theta, torch.tensor([2, 1]))
    assert value[0].item() == pytest.approx(0.31326168751822286)
    assert value[1].isnan()
    value[0].backward()
    torch.testing.assert_close(theta.grad[0], torch.tensor([0.2689414213699951, 0, -0.2689414213699951]).double())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from the compiler
@pytest.mark.parametrize("case", [("simplex", "entmax"), ("top 2", "quadratic"), ("ranking", "quadratic")])
def test_compiled(case: tuple[str, str]) -> None:
    loss, y = made(case, "mean")
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        theta = normal(3, 5, seed=4).requires_grad_()
        value = f(theta, y.expand(3, 5))
        results.append((value.detach(), *torch.autograd.grad(value, theta)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_module() -> None:
    loss = so.FenchelYoung(so.Quadratic(1.0), so.CappedSimplex(2), "sum")
    assert repr(loss) == "FenchelYoung(Quadratic(eps=1.0), CappedSimplex(k=2), reduction='sum')"
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(normal(5), torch.eye(5)[:2].sum(0)), loss(normal(5), torch.eye(5)[:2].sum(0)))


def test_bad_arguments() -> None:
    loss, theta = so.FenchelYoung(1.0, so.Simplex()), normal(2, 3)
    with pytest.raises(ValueError, match="y must lie in"):
        loss(theta, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"theta's shape \(2, 3\), or integer class indices \(2,\), got \(3,\)"):
        loss(theta, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"theta's shape \(2, 3\), got \(2,\)"):
        so.FenchelYoung(1.0, so.CappedSimplex(1))(theta, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="reduction must be one of"):
        so.FenchelYoung(1.0, so.Simplex(), "average")
    with pytest.raises(ValueError, match="BinaryEntropy is not defined on Simplex"):
        so.FenchelYoung(so.BinaryEntropy(1.0), so.Simplex())
    with pytest.raises(TypeError, match="polytope must be one"):
        so.FenchelYoung(1.0, "simplex")
    with pytest.raises(ValueError, match="at least 1 dimension"):
        loss(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor"):
        loss(theta, [0, 1])
