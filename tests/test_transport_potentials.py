"""Dual potentials of transport problems: the plan follows from them, and the info is what it says."""

from __future__ import annotations

import pytest
import torch
from oracles import normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import smoothops as so

N, M, EPS = 3, 4, 0.3
EXACTLY = so.Sinkhorn(tol=1e-15)
REGULARIZERS = {"entropy": lambda eps: so.Entropy(eps, solver=EXACTLY), "quadratic": so.Quadratic}
BOTH = pytest.mark.parametrize("family", REGULARIZERS)


def masses(*batch: int) -> tuple[Tensor, Tensor]:
    a, b = normal(*batch, N, seed=1).exp(), normal(*batch, M, seed=2).exp()
    return a, b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


def plan(theta: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, family: str, eps: float = EPS) -> Tensor:
    reduced = (theta - f.unsqueeze(-1) - g.unsqueeze(-2)) / eps
    return a.unsqueeze(-1) * b.unsqueeze(-2) * reduced.exp() if family == "entropy" else reduced.clamp(min=0)


@BOTH
@pytest.mark.parametrize("eps", [0.01, 0.3, 5.0])
def test_the_plan_follows_from_its_potentials(family: str, eps: float) -> None:
    theta, (a, b) = normal(2, 5, N, M, seed=3), masses(5)
    f, g, info = so.Transport(a, b).potentials(theta, REGULARIZERS[family](eps))
    p = so.Transport(a, b).argmax(theta, REGULARIZERS[family](eps))
    torch.testing.assert_close(plan(theta, a, b, f, g, family, eps), p, rtol=0, atol=1e-12)
    torch.testing.assert_close((a * f).sum(-1), (b * g).sum(-1), rtol=1e-12, atol=1e-13)
    assert f.shape == (2, 5, N)
    assert g.shape == (2, 5, M)
    assert info.converged.shape == info.iterations.shape == info.residual.shape == (2, 5)
    assert info.converged.all()
    assert (info.iterations > 0).all()
    assert (info.residual < 1e-12).all()


def test_the_entropic_maximum_is_the_dual_value() -> None:
    theta, (a, b) = normal(5, N, M, seed=4), masses(5)
    polytope, smoothing = so.Transport(a, b), REGULARIZERS["entropy"](EPS)
    f, g, _ = polytope.potentials(theta, smoothing)
    shift = (torch.special.xlogy(a, a).sum(-1) + torch.special.xlogy(b, b).sum(-1)) / 2
    want = (a * f).sum(-1) + (b * g).sum(-1) - EPS * shift
    torch.testing.assert_close(polytope.max(theta, smoothing), want, rtol=1e-12, atol=1e-13)


@BOTH
def test_no_other_potentials_have_a_lower_dual_value(family: str) -> None:
    """Weak duality: what the solver minimizes grows in every direction."""
    theta, (a, b) = normal(N, M, seed=5), masses()
    f, g, _ = so.Transport(a, b).potentials(theta, REGULARIZERS[family](EPS))

    def dual(f: Tensor, g: Tensor) -> Tensor:
        p = plan(theta, a, b, f, g, family)
        return (a * f).sum() + (b * g).sum() + EPS * (p.sum() if family == "entropy" else p.square().sum() / 2)

    least = dual(f, g)
    for seed in range(20):
        step = 0.1 * normal(N + M, seed=seed)
        assert dual(f + step[:N], g + step[N:]) > least - 1e-14


@BOTH
def test_birkhoff_and_batches(family: str) -> None:
    theta = normal(3, 4, 4, seed=6)
    smoothing, one = REGULARIZERS[family](EPS), torch.ones(4).double()
    f, g, _ = so.Birkhoff().potentials(theta, smoothing)
    torch.testing.assert_close(plan(theta, one, one, f, g, family), so.Birkhoff().argmax(theta, smoothing))
    single = so.Birkhoff().potentials(theta[1], smoothing)
    assert torch.equal(single.f, f[1])
    narrow = so.Birkhoff().potentials(theta.float(), smoothing)
    assert narrow.f.dtype == torch.float32
    torch.testing.assert_close(narrow.f.double(), f, rtol=1e-5, atol=1e-6)


@BOTH
def test_derivatives(family: str) -> None:
    theta, (a, b) = normal(N, M, seed=7), masses()

    def both(theta: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        f, g, _ = so.Transport(a, b).potentials(theta, REGULARIZERS[family](eps))
        return f, g

    given = tuple(t.requires_grad_() for t in (theta, a, b, torch.tensor(EPS).double()))
    assert gradcheck(both, given, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(both, given, atol=1e-5)
    (eager,) = torch.autograd.grad(both(*given)[0].square().sum(), theta)
    for transformed in (
        torch.func.grad(lambda t: both(t, *given[1:])[0].square().sum())(theta),
        torch.func.vmap(torch.func.grad(lambda t: both(t, *given[1:])[0].square().sum()))(theta.unsqueeze(0))[0],
    ):
        torch.testing.assert_close(transformed, eager, rtol=1e-9, atol=1e-12)


@BOTH
def test_compiled(family: str) -> None:
    theta = normal(2, 3, 3, seed=8)
    call = lambda t: so.Birkhoff().potentials(t, REGULARIZERS[family](EPS))  # noqa: E731
    want, got = call(theta), torch.compile(call, fullgraph=True, backend="aot_eager")(theta)
    torch.testing.assert_close(got.f, want.f, rtol=1e-10, atol=1e-12)
    assert torch.equal(got.info.iterations, want.info.iterations)
    assert torch.equal(got.info.converged, want.info.converged)


def test_info_of_what_has_not_converged() -> None:
    theta = 5 * normal(4, 6, 6, seed=9)
    theta[2] = 0.0  # solved at once
    smoothing = so.Entropy(0.1, solver=so.Sinkhorn(max_iter=1, on_fail="ignore"))
    info = so.Birkhoff().potentials(theta, smoothing).info
    assert info.converged.tolist() == [False, False, True, False]
    assert info.iterations.tolist() == [1, 1, 1, 1]
    p = so.Birkhoff().argmax(theta, smoothing)
    error = (p.sum(-1) - 1).abs().sum(-1) + (p.sum(-2) - 1).abs().sum(-1)
    torch.testing.assert_close(info.residual, error / 6, rtol=1e-9, atol=1e-14)
    assert (info.residual[[0, 1, 3]] > 1e-2).all()
    with pytest.raises(ValueError, match="have not converged"):
        so.Birkhoff().potentials(theta, so.Entropy(0.1, solver=so.Sinkhorn(max_iter=1)))


def test_the_residual_of_a_loose_tolerance_is_the_error_of_the_plan() -> None:
    theta = normal(5, 20, 20, seed=10)
    smoothing = so.Entropy(0.05, solver=so.Sinkhorn(tol=1e-3))
    info, p = so.Birkhoff().potentials(theta, smoothing).info, so.Birkhoff().argmax(theta, smoothing)
    error = (p.sum(-1) - 1).abs().sum(-1) + (p.sum(-2) - 1).abs().sum(-1)
    torch.testing.assert_close(info.residual, error / 20, rtol=1e-6, atol=1e-12)
    assert (info.residual <= 1e-3).all()
    assert info.converged.all()


@BOTH
def test_nan_forbidden_pairs_and_empty(family: str) -> None:
    theta = normal(3, 4, 4, seed=11)
    theta[1, 2, 0], theta[2, 1, 1] = torch.nan, -torch.inf
    f, g, _ = so.Birkhoff().potentials(theta, REGULARIZERS[family](EPS))
    assert f[1].isnan().all()
    assert g[1].isnan().all()
    p, one = so.Birkhoff().argmax(theta, REGULARIZERS[family](EPS)), torch.ones(4).double()
    torch.testing.assert_close(plan(theta, one, one, f, g, family)[[0, 2]], p[[0, 2]], rtol=0, atol=1e-12)
    none = so.Birkhoff().potentials(theta[:0], REGULARIZERS[family](EPS))
    assert none.f.shape == (0, 4)
    assert none.info.converged.shape == (0,)


@pytest.mark.parametrize("smoothing", [so.Hard(), so.Perturbed(0.5)])
def test_only_regularizers_have_potentials(smoothing: so.Smoothing) -> None:
    with pytest.raises(ValueError, match=r"no dual potentials; use Entropy or Quadratic"):
        so.Birkhoff().potentials(torch.eye(3), smoothing)
