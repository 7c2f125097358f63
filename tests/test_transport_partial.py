"""Partial transport, masses of different sums: against independent solvers, brute force and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

N, M = 3, 4
REGULARIZERS = {"entropy": lambda eps: so.Entropy(eps, solver=so.Sinkhorn(tol=1e-15)), "quadratic": so.Quadratic}
BOTH = pytest.mark.parametrize("family", REGULARIZERS)
SIDES = pytest.mark.parametrize("ratio", [0.6, 1.5], ids=["a is larger", "b is larger"])


def masses(ratio: float, *batch: int) -> tuple[Tensor, Tensor]:
    a, b = normal(*batch, N, seed=1).exp(), normal(*batch, M, seed=2).exp()
    return a / a.sum(-1, keepdim=True), ratio * b / b.sum(-1, keepdim=True)


def partial(a: Tensor, b: Tensor) -> so.Transport:
    return so.Transport(a, b, partial=True)


# --- independent solvers ----------------------------------------------------------------------------------------------


@BOTH
@SIDES
@pytest.mark.parametrize("eps", [0.05, 0.7])
def test_cvxpy_agrees(family: str, ratio: float, eps: float) -> None:
    """The problem itself, with what stays behind as a variable of its own, and the regularizer on both."""
    cp = pytest.importorskip("cvxpy", reason="the external solver is not installed")
    theta, (a, b) = normal(N, M, seed=3), masses(ratio)
    p, left = cp.Variable((N, M)), cp.Variable(N if ratio < 1 else M)
    omega = -cp.sum(cp.entr(p)) - cp.sum(cp.entr(left)) if family == "entropy" else 0
    omega = omega if family == "entropy" else (cp.sum_squares(p) + cp.sum_squares(left)) / 2
    rest = (left, 0) if ratio < 1 else (0, left)
    sums = [p >= 0, left >= 0, cp.sum(p, 1) + rest[0] == a.numpy(), cp.sum(p, 0) + rest[1] == b.numpy()]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(theta.numpy(), p)) - eps * omega), sums)
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13 if family == "quadratic" else 1e-8)
    problem.solve(solver="CLARABEL", **tight)
    polytope, smoothing = partial(a, b), REGULARIZERS[family](eps)
    y, atol = polytope.argmax(theta, smoothing), 1e-9 if family == "quadratic" else 1e-5
    torch.testing.assert_close(y, torch.from_numpy(p.value), rtol=0, atol=atol)
    assert polytope.contains(y, 1e-12)

    def omega_of(t: Tensor) -> Tensor:
        return torch.special.xlogy(t, t).sum() if family == "entropy" else t.square().sum() / 2

    surplus = (a.sum() - b.sum()).abs()
    shift = eps * (omega_of(a) + omega_of(b) + omega_of(surplus)) / 2
    found = torch.from_numpy(p.value).clamp(min=0), torch.from_numpy(left.value).clamp(min=0)
    want = (theta * found[0]).sum() - eps * (omega_of(found[0]) + omega_of(found[1]))
    assert abs(polytope.max(theta, smoothing) - want - shift) <= atol


@SIDES
def test_the_hard_plan_is_that_of_linprog(ratio: float) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    theta, (a, b) = normal(10, N, M, seed=4), masses(ratio)
    rows, columns = np.kron(np.eye(N), np.ones(M)), np.kron(np.ones(N), np.eye(M))
    most, total = np.concatenate([a, b]), [min(a.sum().item(), b.sum().item())]
    p = partial(a, b).maximize(theta)
    for given, got in zip(theta, p, strict=True):
        want = optimize.linprog(-given.flatten(), np.vstack([rows, columns]), most, np.ones((1, N * M)), total)
        torch.testing.assert_close((given * got).sum().item(), -want.fun, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.flatten(), torch.from_numpy(want.x), rtol=0, atol=1e-9)
    assert partial(a, b).contains(p, 1e-12).all()


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (4, 4)])
def test_rectangular_matching_is_scipys(shape: tuple[int, int]) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    theta = normal(20, *shape, seed=5)
    p = partial(torch.ones(shape[0]), torch.ones(shape[1])).maximize(theta)
    for given, got in zip(theta, p, strict=True):
        want = torch.zeros(shape).double()
        want[optimize.linear_sum_assignment(given.numpy(), maximize=True)] = 1
        assert torch.equal(got, want)


# --- the set ----------------------------------------------------------------------------------------------------------


@SIDES
def test_the_best_vertex(ratio: float) -> None:
    theta, (a, b) = normal(20, 2, 3, seed=6), (t[:k] for t, k in zip(masses(ratio), (2, 3), strict=True))
    polytope = partial(a, b)
    corners = polytope.vertices()
    assert polytope.contains(corners, 1e-12).all()
    best = torch.einsum("bij,vij->bv", theta, corners).amax(-1)
    torch.testing.assert_close(polytope.max(theta, so.Hard()), best, rtol=1e-10, atol=1e-12)
    assert len(corners) > len(so.Transport(a, b * (a.sum() / b.sum())).vertices())


def test_contains() -> None:
    polytope = partial(torch.tensor([0.5, 0.5]), torch.tensor([0.3, 0.3]))
    inside = torch.tensor([[0.3, 0.1], [0.0, 0.2]])
    assert polytope.contains(inside)
    assert not polytope.contains(inside + torch.tensor([[0.1, 0.0], [0.0, -0.1]]))  # a column of 0.4
    assert not polytope.contains(inside * 0.9)  # mass of the smaller side stays behind
    assert not polytope.contains(torch.tensor([[0.3, 0.3], [0.0, 0.0]]))  # a row of 0.6
    assert not polytope.contains(inside + torch.tensor([[0.01, -0.01], [-0.01, 0.01]]))  # an entry of -0.01


@BOTH
def test_equal_sums_are_the_balanced_problem(family: str) -> None:
    theta, (a, b) = normal(2, N, M, seed=7), masses(1.0)
    smoothing = REGULARIZERS[family](0.3)
    for scale in (1.0, 1 + 1e-7):  # up to rounding
        for method in ("argmax", "max", "penalty"):
            given = so.Transport(a, b).argmax(theta, smoothing) if method == "penalty" else theta
            got, want = (
                getattr(c, method)(given, smoothing) for c in (partial(a, b * scale), so.Transport(a, b * scale))
            )
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(partial(a, b).maximize(theta), so.Transport(a, b).maximize(theta), rtol=0, atol=1e-12)
    assert len(partial(a[:2], a[:2]).vertices()) == 2


@BOTH
def test_the_larger_side_may_differ_within_a_batch(family: str) -> None:
    theta, smoothing = normal(3, N, M, seed=8), REGULARIZERS[family](0.3)
    pairs = [masses(ratio) for ratio in (0.5, 1.0, 2.0)]
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    for smooth in (smoothing, so.Hard()):
        y, value = partial(a, b).argmax(theta, smooth), partial(a, b).max(theta, smooth)
        for i, (one, other) in enumerate(pairs):
            torch.testing.assert_close(y[i], partial(one, other).argmax(theta[i], smooth), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(value[i], partial(one, other).max(theta[i], smooth), rtol=1e-10, atol=1e-12)
    shared = partial(a[0], b).argmax(theta, smoothing)
    torch.testing.assert_close(shared[2], partial(a[0], b[2]).argmax(theta[2], smoothing), rtol=1e-10, atol=1e-12)


@BOTH
@SIDES
def test_the_maximum_is_the_objective_at_its_gradient(family: str, ratio: float) -> None:
    theta, (a, b) = normal(5, N, M, seed=9).requires_grad_(), masses(ratio, 5)
    polytope, smoothing = partial(a, b), REGULARIZERS[family](0.3)
    value = polytope.max(theta, smoothing)
    (p,) = torch.autograd.grad(value.sum(), theta)
    torch.testing.assert_close(p, polytope.argmax(theta, smoothing).detach(), rtol=1e-10, atol=1e-12)
    want = (theta * p).sum((-2, -1)) - polytope.penalty(p, smoothing)
    torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-11)
    assert (value >= polytope.max(theta, so.Hard()) - 1e-12).all()
    loss = so.FenchelYoung(smoothing, polytope, "none")(theta, p)
    torch.testing.assert_close(loss.detach(), torch.zeros(5).double(), rtol=0, atol=1e-10)


@BOTH
@SIDES
@pytest.mark.parametrize("method", ["argmax", "max"])
def test_derivatives_in_everything(family: str, ratio: float, method: str) -> None:
    def f(theta: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
        return getattr(partial(a, b), method)(theta, REGULARIZERS[family](eps))

    given = (normal(N, M, seed=10), *masses(ratio), torch.tensor(0.7).double())
    given = tuple(t.requires_grad_() for t in given)
    assert gradcheck(f, given, rtol=1e-6, atol=1e-7, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *t: f(*t).square(), given, rtol=1e-5, atol=1e-6, check_fwd_over_rev=True)


@BOTH
def test_gradients_where_masses_are_0_are_finite(family: str) -> None:
    """The mass left over of the smaller side is 0, as may be others: the slope of sum a log a there is left out."""
    theta, (a, b) = normal(N, M, seed=11), masses(1.5)
    a = torch.cat([a[:-1], torch.zeros(1)]).requires_grad_()
    value = partial(a, b.requires_grad_()).max(theta, REGULARIZERS[family](0.3))
    for slope in torch.autograd.grad(value, (a, b)):
        assert slope.isfinite().all()


@SIDES
def test_other_smoothings(ratio: float) -> None:
    theta, (a, b) = normal(2, N, M, seed=12), masses(ratio)
    polytope = partial(a, b)
    p = polytope.argmax(theta, so.Perturbed(0.3, samples=50))
    assert polytope.contains(p, 1e-10).all()
    assert polytope.max(theta, so.Perturbed(0.3, samples=50)).isfinite().all()
    assert torch.equal(polytope.argmax(theta, so.StraightThrough(0.3)), polytope.maximize(theta))


@SIDES
def test_potentials(ratio: float) -> None:
    theta, (a, b) = normal(2, N, M, seed=13), masses(ratio)
    f, g, info = partial(a, b).potentials(theta, REGULARIZERS["entropy"](0.3))
    p = a.unsqueeze(-1) * b * ((theta - f.unsqueeze(-1) - g.unsqueeze(-2)) / 0.3).exp()
    torch.testing.assert_close(p, partial(a, b).argmax(theta, REGULARIZERS["entropy"](0.3)), rtol=1e-10, atol=1e-12)
    assert info.converged.all()


@BOTH
def test_forbidden_pairs_may_stay_behind(family: str) -> None:
    """A row that is forbidden altogether has no plan among equal sums, but here it may keep its mass."""
    theta = normal(3, 2, seed=14)
    theta[1] = -torch.inf
    polytope, smoothing = partial(torch.ones(3).double(), torch.ones(2).double()), REGULARIZERS[family](0.3)
    p = polytope.argmax(theta, smoothing)
    torch.testing.assert_close(p[[0, 2]], so.Birkhoff().argmax(theta[[0, 2]], smoothing), rtol=1e-8, atol=1e-9)
    assert torch.equal(p[1], torch.zeros(2).double())
    with pytest.raises(ValueError, match="forbid too much"):
        partial(torch.ones(2).double(), torch.ones(2).double()).argmax(theta[:2], smoothing)


def test_errors_name_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"same sum, got 3\.0 and 5\.0; .*partial=True"):
        so.Transport(torch.ones(3), torch.ones(5))
    with pytest.raises(TypeError, match="partial must be True or False, got 1"):
        so.Transport(torch.ones(3), torch.ones(5), partial=1)  # type: ignore[arg-type]
