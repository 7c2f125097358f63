"""ConvexSet as the oracle of the other polytopes, and as a polytope of its own."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

N = 4
W = torch.tensor([0.5, 1.0, 2.5, 4.0], dtype=torch.float64)


def described(name: str) -> so.ConvexSet:
    y = cp.Variable(N)
    if name == "permutahedron by inequalities":
        tops = W.flip(0).cumsum(0).tolist()
        return so.ConvexSet(y, [cp.sum_largest(y, k) <= tops[k - 1] for k in range(1, N)] + [cp.sum(y) == tops[-1]])
    if name == "permutahedron by matrices":
        M = cp.Variable((N, N))
        return so.ConvexSet(y, [y == M @ W.numpy(), M >= 0, cp.sum(M, axis=0) == 1, cp.sum(M, axis=1) == 1])
    constraints = {
        "simplex": [y >= 0, cp.sum(y) == 1],
        "capped simplex": [y >= 0, y <= 1, cp.sum(y) == 2],
        "hypercube": [y >= 0, y <= 1],
        "cone": [cp.diff(y) >= 0],
    }
    return so.ConvexSet(y, constraints[name])


OWN = {
    "simplex": so.Simplex(),
    "capped simplex": so.CappedSimplex(2),
    "hypercube": so.Hypercube(),
    "permutahedron by inequalities": so.Permutahedron(W),
    "permutahedron by matrices": so.Permutahedron(W),
    "cone": so.OrderPolytope(),
}
SMOOTHINGS = {
    "quadratic": so.Quadratic(0.7),
    "entropy": so.Entropy(0.7),
    "entmax": so.Tsallis(1.5, 0.7),
    "tsallis 3": so.Tsallis(3.0, 0.7),
    "fermi-dirac": so.BinaryEntropy(0.7),
}
# on the hypercube Entropy means BinaryEntropy, which ConvexSet cannot know
CASES = [
    (c, s)
    for c, own in OWN.items()
    for s, r in SMOOTHINGS.items()
    if own.role in r.roles and (c, s) != ("hypercube", "entropy")
]


def moved(name: str, smoothing: str, theta: Tensor) -> Tensor:
    """The hypercube's own Quadratic is sum (y^2 - y)/2, to vanish at its vertices: theta moves by eps/2."""
    return theta - 0.35 if (name, smoothing) == ("hypercube", "quadratic") else theta


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_agrees_with_the_own_algorithm(case: tuple[str, str]) -> None:
    own, reg, other = OWN[case[0]], SMOOTHINGS[case[1]], described(case[0])
    atol = 1e-9 if case[1] == "quadratic" else 1e-5
    theta = normal(5, N, scale=1.5).requires_grad_()
    values, gradients = [], []
    for y in (own.argmax(moved(*case, theta), reg), other.argmax(theta, reg)):
        values.append(y.detach())
        gradients.append(torch.autograd.grad((y * cotangent(y)).sum(), theta)[0])
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=atol)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=atol)
    assert other.contains(values[0]).all()
    assert not other.contains(values[0] + torch.tensor([-2.0, 2.0, 1.0, -1.0])).any()
    # the maxima differ by a constant, the shift of Omega; their gradient is y
    value = other.max(theta, reg)
    apart = (value - own.max(moved(*case, theta), reg)).detach()
    torch.testing.assert_close(apart, apart[:1].expand(5), rtol=0, atol=10 * atol)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), theta)[0], values[1], rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in OWN if name != "cone"])
def test_vertices_and_noise(name: str) -> None:
    own, other = OWN[name], described(name)
    theta = normal(5, N)
    torch.testing.assert_close(other.maximize(theta), own.maximize(theta), rtol=0, atol=1e-12)
    torch.testing.assert_close(other.max(theta, so.Hard()), own.max(theta, so.Hard()), rtol=0, atol=1e-12)
    if "permutahedron" not in name:  # with further variables M a vertex of the set of (y, M), whose y need not be one
        corner = other.maximize(torch.zeros(1, N).double())
        assert (own.vertices(N) == corner.round(decimals=9)).all(-1).any()
    noise = lambda: so.Perturbed(0.5, samples=6, generator=torch.Generator().manual_seed(0))  # noqa: E731
    torch.testing.assert_close(other.argmax(theta, noise()), own.argmax(theta, noise()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy", "entmax"])
def test_derivatives_of_a_curved_set(smoothing: str) -> None:
    y = cp.Variable(3)
    budget = so.ConvexSet(y, [y >= 0, cp.sum(y) <= 1, cp.norm(y) <= 0.8])
    theta = torch.tensor([[1.0, 0.5, 0.2], [0.1, 0.9, 1.0]], dtype=torch.float64, requires_grad=True)
    eps = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    made = {"quadratic": so.Quadratic, "entropy": so.Entropy, "entmax": lambda e: so.Tsallis(1.5, e)}[smoothing]

    def answer(theta: Tensor, eps: Tensor) -> Tensor:
        y = budget.argmax(theta, made(eps))
        return (y * cotangent(y)).sum()

    def value(theta: Tensor, eps: Tensor) -> Tensor:
        return budget.max(theta, made(eps)).sum()

    assert gradcheck(answer, (theta, eps), check_forward_ad=True)
    assert gradgradcheck(answer, (theta, eps))
    assert gradcheck(value, (theta, eps))
    assert gradgradcheck(value, (theta, eps))
    mapped = torch.func.vmap(lambda t: budget.argmax(t, made(0.6)))(theta.detach())
    torch.testing.assert_close(mapped, budget.argmax(theta.detach(), made(0.6)), rtol=0, atol=1e-12)


def test_matrices() -> None:
    """The spectraplex: the projection of theta is sparsemax of its eigenvalues."""
    Y = cp.Variable((3, 3), symmetric=True)
    density = so.ConvexSet(Y, [Y >> 0, cp.trace(Y) == 1])
    theta = normal(2, 3, 3)
    theta = theta + theta.mT
    values, vectors = torch.linalg.eigh(theta)
    expected = vectors @ torch.diag_embed(so.sparsemax(values)) @ vectors.mT
    torch.testing.assert_close(density.argmax(theta, so.Quadratic(1.0)), expected, rtol=0, atol=1e-10)
    assert density.contains(expected).tolist() == [True, True]
    top = vectors[..., -1:] @ vectors[..., -1:].mT
    torch.testing.assert_close(density.maximize(theta), top, rtol=0, atol=1e-7)
    loss = so.FenchelYoung(so.Quadratic(1.0), density, "none")
    torch.testing.assert_close(loss(theta, expected), torch.zeros(2).double(), rtol=0, atol=1e-9)


def test_a_users_regularizer() -> None:
    class Huber(so.Regularizer):
        """omega(y) = y^2/2 + y^4."""

        @staticmethod
        def omega(y: Tensor, shape: Tensor) -> Tensor:
            return y.square() / 2 + y**4

        def cvxpy(self, y: Any) -> Any:
            return self.eps * (cp.sum_squares(y) / 2 + cp.sum(cp.power(y, 4)))

    y = cp.Variable(2)
    theta = torch.tensor([5.0, -1.0], dtype=torch.float64, requires_grad=True)
    box = so.ConvexSet(y, [y >= 0, y <= 3])
    found = box.argmax(theta, Huber(1.0))
    root = np.roots([4, 0, 1, -5])
    expected = float(root[np.isreal(root)].real[0])  # y + 4 y^3 = 5
    torch.testing.assert_close(found.detach(), torch.tensor([expected, 0.0], dtype=torch.float64), rtol=0, atol=1e-8)
    (gradient,) = torch.autograd.grad(found[0], theta)
    assert abs(gradient[0].item() - 1 / (1 + 12 * expected**2)) < 1e-5


def test_errors() -> None:
    y, p = cp.Variable(3), cp.Parameter(3, name="p")
    box = so.ConvexSet(y, [y >= -1, y <= 1])
    theta = torch.zeros(3)
    with pytest.raises(ValueError, match=r"Laplace is not defined on ConvexSet; use one of .*Entropy.*Quadratic"):
        box.argmax(theta, so.Laplace(1.0))
    with pytest.raises(ValueError, match="within y >= 0"):
        box.argmax(theta, so.Entropy(1.0))
    with pytest.raises(ValueError, match="Mixing"):
        box.argmax(theta, so.Quadratic(so.Mixing(3.0)))
    with pytest.raises(ValueError, match="number alpha"):
        so.ConvexSet(y, [y >= 0, y <= 1]).argmax(theta, so.Tsallis(torch.tensor(1.5), 1.0))
    with pytest.raises(ValueError, match=r"4 entries for a variable of shape \(3,\)"):
        box.argmax(torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match=r"parameters \(p\)"):
        so.ConvexSet(y, [y <= p])
    with pytest.raises(ValueError, match="not convex"):
        so.ConvexSet(y, [cp.norm(y) >= 1])
    with pytest.raises(TypeError, match=r"cvxpy\.Variable"):
        so.ConvexSet(torch.zeros(3), [])
    with pytest.raises(RuntimeError, match="unbounded"):
        so.ConvexSet(y, [y >= 0]).maximize(torch.ones(3))
    with pytest.raises(RuntimeError, match="contradict"):
        so.ConvexSet(y, [y >= 1, y <= 0]).argmax(theta, 1.0)
    with pytest.raises(NotImplementedError, match="maximize"):
        box.vertices()


def test_nan_stays_in_its_row() -> None:
    theta = torch.tensor([[1.0, torch.nan, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    found = described("simplex").argmax(theta, so.Quadratic(1.0))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], so.sparsemax(theta[1]))
