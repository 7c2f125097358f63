"""Compiled sweeps of entropic transport: the numbers of plain torch, in hard cases, too, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor

import smoothops as so
from smoothops import kernels
from smoothops.kernels import threads

pytest.importorskip("smoothops.kernels.cpu", reason="numba cannot be imported")


def distances(batch: int, n: int, m: int) -> Tensor:
    x, y = (torch.rand(batch, k, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (n, m))
    return -torch.cdist(x, y).square()


def masses(batch: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    a, b = normal(batch, n, seed=1).softmax(-1), normal(batch, m, seed=2).softmax(-1)
    return a, b


def everything(theta: Tensor, a: Tensor, b: Tensor, eps: float, tol: float = 1e-12) -> list[Tensor]:
    """The plan, and the gradients in theta, the masses and eps."""
    given = [t.clone().requires_grad_() for t in (theta, a, b, torch.tensor(eps).double())]
    p = so.Transport(*given[1:3]).argmax(given[0], so.Entropy(given[3], solver=so.Sinkhorn(tol)))
    return [p.detach(), *torch.autograd.grad((p * cotangent(p)).sum(), given)]


@pytest.mark.parametrize("shape", [(4, 7, 5), (3, 40, 50), (1, 130, 120), (1, 30, 300)], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.02, 2e-3])
def test_compiled_is_plain(shape: tuple[int, int, int], eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps, annealing, Newton steps by conjugate gradients and by a factorization, odd and even sizes."""
    given = distances(*shape), *masses(*shape)
    fast = everything(*given, eps)
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    for got, want in zip(fast, everything(*given, eps), strict=True):
        assert (got - want).abs().max() <= 1e-8 * want.abs().max()


@pytest.mark.parametrize("eps", [1.0, 0.05])
def test_masses_of_0_and_forbidden_pairs(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    theta, (a, b) = distances(3, 6, 8), masses(3, 6, 8)
    a[:, 2], b[:, 5], b[1, 0] = 0, 0, 0
    theta[0, 1, 1:4] = theta[2, 5, 0] = -torch.inf
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    fast = everything(theta, a, b, eps)
    assert all(t.isfinite().all() for t in fast)
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    for got, want in zip(fast, everything(theta, a, b, eps), strict=True):
        assert (got - want).abs().max() <= 1e-8 * want.abs().max()


def test_answers_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given = distances(7, 40, 33), *masses(7, 40, 33)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "WORTH", 1)
    try:
        answers = []
        for number in (1, 3):
            torch.set_num_threads(number)
            answers.append(everything(*given, 0.02)[:2])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_parts_that_hardly_meet(eps: float) -> None:
    """Newton must move the potentials of whole blocks by tens before the error shows that it has."""
    n, m = 5, 7
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.rand(50, k, 2, generator=generator).double() for k in (n, m))
    a, b = (torch.rand(50, k, generator=generator).double() for k in (n, m))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    theta = -torch.cdist(x, y).square()
    f, g, info = so.Transport(a, b).potentials(theta, so.Entropy(eps))
    assert info.converged.all()
    assert info.residual.max() < 1e-8
    hard = so.Transport(a, b).max(theta, so.Hard())
    value = so.Transport(a, b).max(theta, so.Entropy(eps))
    assert ((value - hard).abs() <= eps * torch.tensor(n * m).log()).all()
    # weak duality of the hard problem, from potentials that are nearly feasible there
    excess = (theta - f.unsqueeze(-1) - g.unsqueeze(-2)).amax((-2, -1)).clamp(min=0)
    assert ((a * f).sum(-1) + (b * g).sum(-1) + excess >= hard - 1e-12).all()


def test_what_the_sweeps_leave_is_solved_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than the compiled factorization takes, and too many products for conjugate gradients."""
    from smoothops.polytopes import _sinkhorn

    left = []
    swept = _sinkhorn._swept
    monkeypatch.setattr(_sinkhorn, "_swept", lambda given, *rest: left.append(len(given[0])) or swept(given, *rest))
    monkeypatch.setattr(_sinkhorn, "COMPILED_DIRECT", 0)
    theta = torch.cat([distances(2, 30, 30), 1e-3 * distances(1, 30, 30)])
    p = so.Birkhoff().argmax(theta, so.Entropy(2e-3, solver=so.Sinkhorn(1e-12)))
    assert left == [2]
    assert so.Birkhoff().contains(p, 1e-11).all()
    f, g, info = so.Birkhoff().potentials(theta, so.Entropy(2e-3, solver=so.Sinkhorn(1e-12)))
    assert info.converged.all()
    again = ((theta - f.unsqueeze(-1) - g.unsqueeze(-2)) / 2e-3).exp()
    torch.testing.assert_close(p, again, rtol=1e-9, atol=1e-12)
