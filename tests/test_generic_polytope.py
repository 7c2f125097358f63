"""OraclePolytope: projections and their derivatives from a linear maximization oracle, against closed forms."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

W = torch.tensor([0.5, 1.0, 2.0, 3.5, 4.0, 7.0], dtype=torch.float64)
OWN = {
    "simplex": so.Simplex(),
    "capped simplex": so.CappedSimplex(2),
    "hypercube": so.Hypercube(),
    "permutahedron": so.Permutahedron(W),
}
INPUTS = {
    "generic": normal(30, 6, scale=2.0),
    "near the centre": 0.1 * normal(10, 6) + 0.3,
    "ties": 0.3 + 2 * normal(8, 6).round(),
    "far": 1e6 * normal(4, 6),
}
EPS = 0.7


def by_oracle(own: so.Polytope) -> so.OraclePolytope:
    return so.OraclePolytope(own.maximize)


def moved(own: so.Polytope, theta: Tensor, eps: float | Tensor = EPS) -> Tensor:
    """The hypercube's own Omega is sum (y^2 - y)/2, to vanish at its vertices."""
    return theta - eps / 2 if isinstance(own, so.Hypercube) else theta


def outcome(polytope: so.Polytope, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = polytope.argmax(x, so.Quadratic(EPS))
    return y.detach(), torch.autograd.grad((y * cotangent(y)).sum(), theta)[0]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", OWN)
def test_agrees_with_the_own_algorithm(name: str, kind: str) -> None:
    own, theta = OWN[name], INPUTS[kind].clone().requires_grad_()
    (y, gradient), (found, slope) = outcome(own, theta, moved(own, theta)), outcome(by_oracle(own), theta, theta)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-11)
    torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [20, 50])
def test_many_items(n: int) -> None:
    """Far more vertices than could be listed, and faces of nearly n dimensions."""
    w, theta = torch.arange(1.0, n + 1, dtype=torch.float64), normal(4, n, scale=3.0)
    for own in (so.Permutahedron(w), so.CappedSimplex(n // 4)):
        found = by_oracle(own).argmax(theta, so.Quadratic(1.0))
        torch.testing.assert_close(found, own.argmax(theta, so.Quadratic(1.0)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OWN)
def test_every_mode(name: str) -> None:
    own = OWN[name]
    polytope, theta = by_oracle(own), normal(2, 6, seed=5)
    eps = torch.tensor(EPS, dtype=torch.float64)

    def answer(theta: Tensor, eps: Tensor) -> Tensor:
        y = polytope.argmax(theta, so.Quadratic(eps))
        return (y * cotangent(y)).sum()

    def value(theta: Tensor, eps: Tensor) -> Tensor:
        return (polytope.max(theta, so.Quadratic(eps)) * torch.tensor([1.0, 2.0])).sum()

    inputs = (theta.clone().requires_grad_(), eps.clone().requires_grad_())
    for f in (answer, value):
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs)
    y = polytope.argmax(theta, so.Quadratic(EPS))
    torch.testing.assert_close(torch.func.grad(value)(theta, eps), y * torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(torch.func.vmap(lambda t: polytope.argmax(t, so.Quadratic(EPS)))(theta), y)
    hessian = torch.func.hessian(lambda t: polytope.max(t, so.Quadratic(EPS)).sum())(theta)
    known = torch.func.jacrev(lambda t: own.argmax(moved(own, t), so.Quadratic(EPS)))(theta)
    torch.testing.assert_close(hessian, known, rtol=0, atol=1e-12)
    compiled = torch.compile(lambda t: polytope.argmax(t, so.Quadratic(EPS)), fullgraph=True, backend="aot_eager")
    t = theta.clone().requires_grad_()
    torch.testing.assert_close(compiled(t), y)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(t)[0, 0], t), torch.autograd.grad(polytope.argmax(t, so.Quadratic(EPS))[0, 0], t)
    )


def matchings(theta: Tensor) -> Tensor:
    """Matchings of three with three, (rows, 9), by trying all."""
    all_ = torch.stack([torch.eye(3).double()[list(p)].flatten() for p in itertools.permutations(range(3))])
    return all_[(theta @ all_.mT).argmax(-1)]


def test_a_degenerate_polytope() -> None:
    """The Birkhoff polytope: more vertices on a face than its dimension, redundant and tied."""
    import cvxpy as cp

    Y = cp.Variable(9)
    M = cp.reshape(Y, (3, 3), order="C")
    known = so.ConvexSet(Y, [Y >= 0, cp.sum(M, axis=0) == 1, cp.sum(M, axis=1) == 1])
    polytope = so.OraclePolytope(matchings)
    theta = torch.cat([normal(20, 9, scale=2.0), 0.05 * normal(5, 9), torch.zeros(1, 9).double()]).requires_grad_()
    (y, gradient), (found, slope) = (outcome(p, theta, theta) for p in (known, polytope))
    torch.testing.assert_close(found, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-8)
    assert polytope.contains(found.detach()).all()
    assert known.contains(found.detach()).all()


def test_hard_noise_and_losses() -> None:
    own, theta = OWN["capped simplex"], normal(5, 6)
    polytope = by_oracle(own)
    assert torch.equal(polytope.maximize(theta), own.maximize(theta))
    assert torch.equal(polytope.argmax(theta, so.Quadratic(0)), own.maximize(theta))
    noise = lambda: so.Perturbed(0.5, samples=20, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(polytope.argmax(theta, noise()), own.argmax(theta, noise()))
    loss = so.FenchelYoung(so.Quadratic(1.0), polytope, "none")
    torch.testing.assert_close(loss(theta, polytope.argmax(theta, 1.0)), torch.zeros(5).double(), rtol=0, atol=1e-12)
    inside = polytope.contains(torch.stack([own.argmax(theta[0], 1.0), theta[0], theta[0] * torch.nan]))
    assert inside.tolist() == [True, False, False]


def test_shapes_and_dtypes() -> None:
    polytope = by_oracle(OWN["simplex"])
    theta = normal(2, 3, 6).float()
    found = polytope.argmax(theta, so.Quadratic(1.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, so.sparsemax(theta))
    assert polytope.argmax(theta[:0], 1.0).shape == (0, 3, 6)
    nan = polytope.argmax(torch.stack([theta[0, 0] * torch.nan, theta[0, 0]]), 1.0)
    assert nan[0].isnan().all()
    torch.testing.assert_close(nan[1], so.sparsemax(theta[0, 0]))


def test_copies_are_known_to_the_operators() -> None:
    polytope = pickle.loads(pickle.dumps(so.OraclePolytope(matchings)))
    theta = normal(2, 9)
    assert torch.equal(polytope.argmax(theta, 1.0), so.OraclePolytope(matchings).argmax(theta, 1.0))


def test_errors() -> None:
    theta = normal(2, 6)
    polytope = by_oracle(OWN["simplex"])
    with pytest.raises(ValueError, match=r"Entropy is not defined on OraclePolytope.*Quadratic, Perturbed or Hard"):
        polytope.argmax(theta, so.Entropy(1.0))
    with pytest.raises(ValueError, match="Mixing"):
        polytope.argmax(theta, so.Quadratic(so.Mixing(3.0)))
    with pytest.raises(TypeError, match="function of theta"):
        so.OraclePolytope(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(2, 6\); got \(2,\)"):
        so.OraclePolytope(lambda t: t.argmax(-1)).maximize(theta)
    with pytest.raises(ValueError, match="NaN or inf"):
        so.OraclePolytope(lambda t: t / 0).maximize(theta)
    with pytest.raises(ValueError, match="must be finite"):
        polytope.argmax(theta / 0, 1.0)
    with pytest.raises(NotImplementedError, match="maximize"):
        polytope.vertices()
    with pytest.raises(ValueError, match="does not maximize"):
        so.OraclePolytope(lambda t: OWN["permutahedron"].maximize(t.roll(1, -1))).argmax(theta, 1.0)
