"""Transport polytopes against independent solvers, brute force, closed forms, and finite differences."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from oracles import cotangent, normal, value_and_gradient
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

N, M = 3, 4
EXACTLY = so.Sinkhorn(tol=1e-15)
REGULARIZERS = {"entropy": lambda eps: so.Entropy(eps, solver=EXACTLY), "quadratic": so.Quadratic}
BOTH = pytest.mark.parametrize("family", REGULARIZERS)


def masses(*batch: int, total: float = 2.0) -> tuple[Tensor, Tensor]:
    a, b = normal(*batch, N, seed=1).exp(), normal(*batch, M, seed=2).exp()
    return tuple(total * mass / mass.sum(-1, keepdim=True) for mass in (a, b))  # type: ignore[return-value]


def unshifted(p: Tensor, family: str) -> Tensor:
    return torch.special.xlogy(p, p).sum((-2, -1)) if family == "entropy" else p.square().sum((-2, -1)) / 2


# --- independent solvers ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("eps", [0.05, 0.7, 5.0])
def test_cvxpy_agrees(family: str, eps: float) -> None:
    cp = pytest.importorskip("cvxpy", reason="the external solver is not installed")
    theta, (a, b) = normal(N, M, seed=3), masses()
    p = cp.Variable((N, M))
    omega = -cp.sum(cp.entr(p)) if family == "entropy" else cp.sum_squares(p) / 2
    sums = [p >= 0, cp.sum(p, 1) == a.numpy(), cp.sum(p, 0) == b.numpy()]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(theta.numpy(), p)) - eps * omega), sums)
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13 if family == "quadratic" else 1e-8)
    problem.solve(solver="CLARABEL", **tight)
    polytope, smoothing = so.Transport(a, b), REGULARIZERS[family](eps)
    atol = 1e-9 if family == "quadratic" else 1e-5
    torch.testing.assert_close(polytope.argmax(theta, smoothing), torch.from_numpy(p.value), rtol=0, atol=atol)
    shift = eps * (unshifted(a.unsqueeze(0), family) + unshifted(b.unsqueeze(0), family)) / 2
    assert abs(polytope.max(theta, smoothing) - problem.value - shift) <= atol


@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_pot_agrees(eps: float) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    theta, (a, b) = normal(N, M, seed=4), masses(total=1.0)
    want = ot.sinkhorn(a, b, -theta, eps, method="sinkhorn_log", stopThr=1e-14, numItermax=100_000)
    torch.testing.assert_close(so.Transport(a, b).argmax(theta, so.Entropy(eps)), want, rtol=0, atol=1e-9)
    want = ot.emd(a, b, -theta)
    torch.testing.assert_close(so.Transport(a, b).maximize(theta), want, rtol=0, atol=1e-12)


def test_the_hard_matching_is_the_best_of_all_permutations() -> None:
    theta = normal(20, 5, 5, seed=5)
    corners = so.Birkhoff().vertices(5)
    best = torch.einsum("bij,vij->bv", theta, corners).amax(-1)
    p = so.Birkhoff().maximize(theta)
    torch.testing.assert_close((p * theta).sum((-2, -1)), best, rtol=1e-14, atol=0)
    torch.testing.assert_close(so.Birkhoff().max(theta, so.Hard()), best, rtol=1e-14, atol=0)
    assert ((p == 0) | (p == 1)).all()
    assert torch.equal(p.sum(-1), torch.ones(20, 5).double())


def test_the_hard_plan_is_the_best_vertex() -> None:
    theta, (a, b) = normal(20, N, M, seed=6), masses()
    polytope = so.Transport(a, b)
    corners = polytope.vertices()
    assert polytope.contains(corners, 1e-12).all()
    best = torch.einsum("bij,vij->bv", theta, corners).amax(-1)
    torch.testing.assert_close(polytope.max(theta, so.Hard()), best, rtol=1e-12, atol=0)
    assert polytope.contains(polytope.maximize(theta), 1e-12).all()
    equal = so.Transport(torch.full((4,), 0.25), torch.full((4,), 0.25))
    assert set(equal.maximize(normal(4, 4)).flatten().tolist()) == {0.0, 0.25}


# --- closed forms -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("eps", [0.05, 0.5, 1.0, 20.0])
def test_two_by_two(family: str, eps: float) -> None:
    """One number p = P_11 = P_22 is left, a binary choice with d = theta_11 + theta_22 - theta_12 - theta_21."""
    theta = normal(50, 2, 2, seed=7)
    d = theta[:, 0, 0] + theta[:, 1, 1] - theta[:, 0, 1] - theta[:, 1, 0]
    p = torch.sigmoid(d / (2 * eps)) if family == "entropy" else (d / (4 * eps) + 0.5).clamp(0, 1)
    want = torch.stack([p, 1 - p, 1 - p, p], -1).reshape(-1, 2, 2)
    got = so.Birkhoff().argmax(theta, REGULARIZERS[family](eps))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_no_cost_is_independence() -> None:
    a, b = masses()
    p = so.Transport(a, b).argmax(torch.zeros(N, M).double(), so.Entropy(0.3))
    torch.testing.assert_close(p, a.unsqueeze(-1) * b / 2, rtol=1e-12, atol=0)


@BOTH
def test_one_row_or_column_leaves_no_choice(family: str) -> None:
    b = masses()[1]
    p, gradient = value_and_gradient(
        lambda t: so.Transport(b.sum(-1, keepdim=True), b).argmax(t, REGULARIZERS[family](0.3)), normal(1, M)
    )
    torch.testing.assert_close(p, b.unsqueeze(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros(1, M).double(), rtol=0, atol=1e-12)


# --- optimality -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("eps", [1e-3, 0.05, 1.0, 30.0])
def test_feasible_and_optimal(family: str, eps: float) -> None:
    """The Frank-Wolfe gap of the reduced cost g = theta - eps grad Omega(P) over the polytope is 0."""
    for n, polytope in ((6, so.Birkhoff()), (N, so.Transport(*masses(4)))):
        theta = normal(4, n, n if n == 6 else M, seed=n)
        p = polytope.argmax(theta, REGULARIZERS[family](eps))
        assert polytope.contains(p, 1e-12).all()
        g = theta - eps * (p.clamp(min=1e-300).log() if family == "entropy" else p)
        g = torch.where(p > 1e-290, g, 0) if family == "entropy" else g  # there the slope of Omega has no digits
        gap = (g * (polytope.maximize(g) - p)).sum((-2, -1))
        if family == "entropy":  # over the pairs that are used: a vertex on the others would profit from their 0
            gap = gap[(p > 1e-290).flatten(1).all(-1)]
        assert (gap <= 1e-9 * (1 + theta.abs().amax())).all()


@BOTH
def test_the_maximum_is_the_objective_at_its_gradient(family: str) -> None:
    theta, (a, b) = normal(5, N, M, seed=8), masses(5)
    for polytope, t in ((so.Transport(a, b), theta), (so.Birkhoff(), normal(5, 4, 4, seed=9))):
        for eps in (0.05, 1.0):
            smoothing = REGULARIZERS[family](eps)
            value, p = value_and_gradient_of_sum(lambda t, c=polytope, s=smoothing: c.max(t, s), t)
            torch.testing.assert_close(p, polytope.argmax(t, smoothing), rtol=1e-10, atol=1e-12)
            want = (t * p).sum((-2, -1)) - polytope.penalty(p, smoothing)
            torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-11)
            assert (value >= polytope.max(t, so.Hard()) - 1e-12).all()


def value_and_gradient_of_sum(f, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.clone().requires_grad_()
    y = f(t)
    return y.detach(), torch.autograd.grad(y.sum(), t)[0]


@BOTH
def test_penalty_is_0_at_permutations_and_below_inside(family: str) -> None:
    corners, smoothing = so.Birkhoff().vertices(3), REGULARIZERS[family](0.7)
    torch.testing.assert_close(so.Birkhoff().penalty(corners, smoothing), torch.zeros(6).double(), rtol=0, atol=1e-14)
    for p, q in itertools.combinations(corners, 2):
        assert so.Birkhoff().penalty((p + q) / 2, smoothing) < 0


# --- derivatives ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method", ["argmax", "max"])
def test_derivatives_in_everything(family: str, method: str) -> None:
    """First and second order, forward and backward, in theta, a, b and eps."""

    def f(theta: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
        return getattr(so.Transport(a, b), method)(theta, REGULARIZERS[family](eps))

    def weighted(*given: Tensor) -> Tensor:
        y = f(*given)
        return (y * cotangent(y)).sum() + (y * y * cotangent(y).flip(-1)).sum()

    given = (normal(2, N, M, seed=10), *masses(2), torch.tensor(0.7).double())
    given = tuple(t.requires_grad_() for t in given)
    assert gradcheck(f, given, rtol=1e-6, atol=1e-7, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(weighted, given, rtol=1e-5, atol=1e-6, check_fwd_over_rev=True, check_batched_grad=True)


def test_third_derivative() -> None:
    """Of the 2 x 2 matching, a logistic function of one entry."""

    def f(t: Tensor) -> Tensor:
        theta = torch.stack([t, 0 * t, 0 * t, 0 * t]).reshape(2, 2)
        return so.Birkhoff().argmax(theta, so.Entropy(0.5))[0, 0]

    t = torch.tensor(0.3).double()
    third = torch.func.grad(torch.func.grad(torch.func.grad(f)))(t)
    s = torch.sigmoid(t)
    want = s * (1 - s) * (1 - 6 * s + 6 * s * s)
    torch.testing.assert_close(third, want, rtol=1e-8, atol=0)


def test_gradient_in_the_masses_is_the_potential() -> None:
    """d max / d a is known up to a constant, that of a direction in which the sums would differ."""
    theta, (a, b) = normal(N, M, seed=11), masses()
    direction = torch.tensor([1.0, -1.0, 0.0]).double()
    for family, make in REGULARIZERS.items():
        smoothing = make(0.4)
        slope = torch.func.jvp(lambda a, s=smoothing: so.Transport(a, b).max(theta, s), (a,), (direction,))[1]
        h = 1e-5
        values = [so.Transport(a + s * h * direction, b).max(theta, smoothing) for s in (1, -1)]
        torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-7, atol=1e-8, msg=family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_the_defaults_are_exact(dtype: torch.dtype) -> None:
    """Relative error below 1e-6, whatever the sweeps left: the bar that solvers with a fixed number of them miss."""
    for eps in (0.01, 0.1, 1.0):
        theta = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(1)).to(dtype)

        def gradient(t: Tensor, solver: so.Sinkhorn | None, eps: float = eps) -> Tensor:
            smoothing = so.Entropy(eps, solver=solver)
            return value_and_gradient(lambda t: so.Birkhoff().argmax(t, smoothing), t)[1].double()

        got, want = gradient(theta, None), gradient(theta.double(), EXACTLY)
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_large_matrices_take_the_iterative_solve() -> None:
    """From 100 columns on the adjoint is solved by conjugate gradients, or by a factorization where these are slow."""
    theta = torch.rand(2, 130, 120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = torch.full((130,), 1 / 130).double(), torch.full((120,), 1 / 120).double()
    v = normal(2, 130, 120, seed=12)
    for eps in (0.2, 0.01, 1e-3):
        smoothing = REGULARIZERS["entropy"](eps)
        f = lambda t, s=smoothing: so.Transport(a, b).argmax(t, s)  # noqa: E731
        gradient = value_and_gradient(f, theta)[1]
        y, tangent = torch.func.jvp(f, (theta,), (v,))
        torch.testing.assert_close((gradient * v).sum(), (tangent * cotangent(y)).sum(), rtol=1e-9, atol=1e-12)


# --- orders -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("eps", [0.1, 2.0])
@pytest.mark.parametrize("descending", [False, True])
def test_argsort_is_the_programme_over_birkhoff(family: str, eps: float, descending: bool) -> None:
    x, smoothing = normal(4, 6, seed=13), REGULARIZERS[family](eps)
    places = torch.arange(1.0, 7.0).double().flip(0) if descending else torch.arange(1.0, 7.0).double()
    want = so.Birkhoff().argmax(places.unsqueeze(-1) * x.unsqueeze(-2), smoothing)
    p = so.argsort(x, descending=descending, smoothing=smoothing)
    torch.testing.assert_close(p, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        so.argtopk(x, 2, smoothing=smoothing), so.argsort(x, -1, True, smoothing=smoothing)[:, :2]
    )


def test_sort_and_rank_are_products_with_the_argsort() -> None:
    x, smoothing = normal(4, 6, seed=14), REGULARIZERS["entropy"](0.5)
    for descending in (False, True):
        p = so.argsort(x, descending=descending, smoothing=smoothing)
        y = so.sort(x, descending=descending, smoothing=smoothing)
        torch.testing.assert_close(y, (p @ x.unsqueeze(-1)).squeeze(-1), rtol=1e-13, atol=1e-14)
        r = so.rank(x, descending=descending, smoothing=smoothing)
        torch.testing.assert_close(r, torch.arange(1.0, 7.0).double() @ p, rtol=1e-13, atol=1e-14)
    top = so.topk(x, 2, smoothing=smoothing)
    torch.testing.assert_close(top, so.sort(x, -1, True, smoothing=smoothing)[:, :2], rtol=0, atol=0)
    permutahedron = so.rank(x, smoothing=so.Entropy(0.5))
    assert (permutahedron - so.rank(x, smoothing=smoothing)).abs().max() > 0.1


@pytest.mark.parametrize("n", [2, 7, 300])
def test_orders_at_tiny_eps_are_hard(n: int) -> None:
    """The dual of the hard order is known, so that no eps is too small; ties are averaged."""
    x = normal(3, n, seed=15)
    for smoothing in (so.Entropy(1e-12, solver=so.Sinkhorn()), so.Quadratic(1e-12)):
        torch.testing.assert_close(so.argsort(x, smoothing=smoothing), so.argsort(x, smoothing=so.Hard()))
    tied = torch.tensor([1.0, 0.0, 1.0]).double()
    half = torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]).double()
    torch.testing.assert_close(so.argsort(tied, smoothing=so.Entropy(1e-9)), half)
    torch.testing.assert_close(
        so.rank(tied, smoothing=so.Entropy(1e-9, solver=so.Sinkhorn())), so.rank(tied, smoothing=0)
    )


def test_weights_have_no_rank_over_birkhoff() -> None:
    with pytest.raises(ValueError, match=r"weights in rank need Quadratic"):
        so.rank(normal(5), weights=torch.ones(5), smoothing=REGULARIZERS["entropy"](0.5))


# --- losses, wrappers, values -----------------------------------------------------------------------------------------


@BOTH
def test_fenchel_young_loss_of_a_matching(family: str) -> None:
    theta, smoothing = normal(3, 4, 4, seed=16), REGULARIZERS[family](0.5)
    loss = so.FenchelYoung(smoothing, so.Birkhoff(), "none")
    target = torch.eye(4)[torch.tensor([1, 0, 3, 2])].double().expand(3, 4, 4)
    value, gradient = value_and_gradient_of_sum(lambda t: loss(t, target), theta)
    assert (value >= 0).all()
    torch.testing.assert_close(gradient, so.Birkhoff().argmax(theta, smoothing) - target, rtol=1e-9, atol=1e-11)
    own = so.Birkhoff().argmax(theta, smoothing)
    torch.testing.assert_close(loss(theta, own), torch.zeros(3).double(), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="must lie in Birkhoff"):
        loss(theta, 2 * target)


def test_perturbed_and_straight_through() -> None:
    theta = normal(3, 3, seed=17)
    p = so.Birkhoff().argmax(theta, so.Perturbed(0.5, samples=400))
    assert so.Birkhoff().contains(p, 1e-12)
    hard, gradient = value_and_gradient(lambda t: so.Birkhoff().argmax(t, so.StraightThrough(0.5)), theta)
    assert torch.equal(hard, so.Birkhoff().maximize(theta))
    want = value_and_gradient(lambda t: so.Birkhoff().argmax(t, so.Entropy(0.5)), theta)[1]
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)


def test_polytopes_and_solvers_are_values() -> None:
    theta, smoothing = normal(2, N, M), so.Entropy(0.3, solver=so.Sinkhorn(1e-12, 1000, "warn"))
    for polytope in (so.Transport(*masses()), so.Birkhoff()):
        t = theta[..., :N] if isinstance(polytope, so.Birkhoff) else theta
        for twin in (pickle.loads(pickle.dumps(polytope)), copy.deepcopy(polytope)):
            assert torch.equal(twin.argmax(t, smoothing), polytope.argmax(t, copy.deepcopy(smoothing)))
    with pytest.raises(AttributeError):
        smoothing.solver.tol = 1.0
