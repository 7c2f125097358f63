"""Transport polytopes: masses of 0, forbidden pairs, broken input, and what happens where a solver fails."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import cotangent, normal, value_and_gradient
from torch import Tensor

import smoothops as so

INF, NAN = torch.inf, torch.nan
REGULARIZERS = {"entropy": so.Entropy, "quadratic": so.Quadratic}
BOTH = pytest.mark.parametrize("family", REGULARIZERS)


@BOTH
@pytest.mark.parametrize("method", ["argmax", "max"])
def test_masses_of_0_are_as_if_absent(family: str, method: str) -> None:
    theta, smoothing = normal(2, 5, 4, seed=1), REGULARIZERS[family](0.4)
    a = torch.tensor([0.3, 0.0, 0.5, 0.0, 0.2]).double()
    b = torch.tensor([0.6, 0.0, 0.3, 0.1]).double()
    f = lambda t, a, b: getattr(so.Transport(a, b), method)(t, smoothing)  # noqa: E731
    y, gradient = value_and_gradient(lambda t: f(t, a, b), theta)
    part = theta[:, a > 0][:, :, b > 0].clone().requires_grad_()
    alone, c = f(part, a[a > 0], b[b > 0]), cotangent(y)
    if method == "argmax":
        torch.testing.assert_close(y[:, a > 0][:, :, b > 0], alone.detach(), rtol=1e-9, atol=1e-10)
        assert y.sum() == y[:, a > 0][:, :, b > 0].sum()
        c = c[:, a > 0][:, :, b > 0]
    else:
        torch.testing.assert_close(y, alone.detach(), rtol=1e-9, atol=1e-10)
    (want,) = torch.autograd.grad((alone * c).sum(), part)
    torch.testing.assert_close(gradient[:, a > 0][:, :, b > 0], want, rtol=1e-7, atol=1e-9)
    assert torch.equal(gradient[:, a == 0], torch.zeros(2, 2, 4).double())
    assert torch.equal(gradient[:, :, b == 0], torch.zeros(2, 5, 1).double())
    nothing = so.Transport(0 * a, 0 * b).argmax(theta, smoothing)
    assert torch.equal(nothing, torch.zeros_like(theta))


def test_gradient_in_a_mass_of_0_is_one_sided() -> None:
    theta, b = normal(3, 3, seed=2), torch.tensor([0.2, 0.5, 0.3]).double()
    a, h = torch.tensor([0.0, 0.6, 0.4]).double(), 1e-6
    direction = torch.tensor([1.0, -0.5, -0.5]).double()
    f = lambda a: so.Transport(a, b).argmax(theta, so.Entropy(0.5, solver=so.Sinkhorn(1e-14)))  # noqa: E731
    slope = torch.func.jvp(f, (a,), (direction,))[1]
    torch.testing.assert_close(slope, (f(a + h * direction) - f(a)) / h, rtol=1e-4, atol=1e-5)


@BOTH
def test_forbidden_pairs(family: str) -> None:
    """-inf gives P = 0 and gradient 0; the rest is the limit of a large cost."""
    theta = normal(4, 4, seed=3)
    theta[0, 1] = theta[2, 3] = theta[3, 0] = -INF
    smoothing = REGULARIZERS[family](0.5)
    p, gradient = value_and_gradient(lambda t: so.Birkhoff().argmax(t, smoothing), theta)
    assert so.Birkhoff().contains(p, 1e-9)
    assert (p[theta == -INF] == 0).all()
    assert (gradient[theta == -INF] == 0).all()
    costly, far = value_and_gradient(lambda t: so.Birkhoff().argmax(t, smoothing), theta.clamp(min=-100))
    torch.testing.assert_close(p, costly, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, far, rtol=0, atol=1e-8)
    value, plan = value_and_gradient(lambda t: so.Birkhoff().max(t, smoothing).reshape(1), theta)
    assert value.isfinite().all()
    torch.testing.assert_close(plan / cotangent(value), p, rtol=1e-8, atol=1e-10)
    eps = torch.tensor(0.5).double().requires_grad_()
    y = so.Birkhoff().argmax(theta, REGULARIZERS[family](eps))
    (slope,) = torch.autograd.grad((y * cotangent(y)).sum(), eps)
    ends = [(so.Birkhoff().argmax(theta, REGULARIZERS[family](0.5 + s)) * cotangent(y)).sum() for s in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@BOTH
def test_a_pair_that_can_only_be_0(family: str) -> None:
    """The pattern leaves one matching: the optimum has potentials at infinity, and is reached to the tolerance."""
    theta = torch.tensor([[0.0, 3.0], [-INF, 0.0]]).double()
    p = so.Birkhoff().argmax(theta, REGULARIZERS[family](1.0))
    torch.testing.assert_close(p, torch.eye(2).double(), rtol=0, atol=1e-9)


def one_row(theta: Tensor) -> Tensor:
    return torch.cat([normal(2, *theta.shape, seed=4), theta.unsqueeze(0)])


FORBIDDEN = [[[-INF, -INF], [0.0, 0.0]], [[-INF, -INF, 0.0], [-INF, -INF, 0.0], [0.0, 0.0, 0.0]]]


@BOTH
@pytest.mark.parametrize("theta", FORBIDDEN, ids=["a row", "two rows, one column"])
def test_infeasible_patterns_raise(family: str, theta: list) -> None:
    batch = one_row(torch.tensor(theta).double())
    with pytest.raises(ValueError, match=r"index 2 .* forbid too much"):
        so.Birkhoff().argmax(batch, REGULARIZERS[family](0.5))
    with pytest.raises(ValueError, match=r"leaves no P"):
        so.Birkhoff().maximize(batch)
    n = batch.shape[-1]
    with pytest.raises(ValueError, match=r"leaves no P"):
        so.Transport(torch.arange(1.0, n + 1), torch.arange(1.0, n + 1).flip(0)).max(batch, so.Hard())


@BOTH
def test_nan_stays_in_its_matrix(family: str) -> None:
    theta = normal(3, 3, 3, seed=5)
    theta[1, 0, 2] = NAN
    smoothing = REGULARIZERS[family](0.5)
    for method in ("argmax", "max"):
        f = lambda t, m=method: getattr(so.Birkhoff(), m)(t, smoothing)  # noqa: E731
        y, gradient = value_and_gradient(f, theta)
        clean, clean_gradient = value_and_gradient(f, theta[[0, 2]])
        assert y[1].isnan().all()
        assert gradient[1].isnan().all()
        torch.testing.assert_close(y[[0, 2]], clean, rtol=1e-12, atol=0)
        if method == "argmax":
            weight = cotangent(y)[[0, 2]] / cotangent(clean)
            assert gradient[[0, 2]].isfinite().all()
            assert weight.isfinite().all()
        assert clean_gradient.isfinite().all()


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (2, 1, 1), (0, 2, 4, 4)])
def test_empty_and_single(family: str, shape: tuple[int, ...]) -> None:
    theta = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    p = so.Birkhoff().argmax(theta, REGULARIZERS[family](0.5))
    assert p.shape == shape
    assert torch.equal(p, torch.ones_like(p))
    (gradient,) = torch.autograd.grad(p.sum(), theta)
    assert torch.equal(gradient, torch.zeros_like(theta))
    assert so.Birkhoff().max(theta, REGULARIZERS[family](0.5)).shape == shape[:-2]


def test_masses_broadcast_and_rounding_is_evened_out() -> None:
    theta, b = normal(2, 3, 4, 5, seed=6), normal(3, 1, 5, seed=7).squeeze(1).softmax(-1)
    a = torch.full((4,), 0.25).double()
    p = so.Transport(a, b).argmax(theta, so.Entropy(0.5))
    for i, j in ((0, 0), (1, 2)):
        torch.testing.assert_close(p[i, j], so.Transport(a, b[j]).argmax(theta[i, j], so.Entropy(0.5)))
    eps = torch.tensor([[[0.1]], [[0.5]], [[2.0]]]).double().expand(2, 3, 1, 1)
    p = so.Transport(a, b).argmax(theta, so.Quadratic(eps))
    torch.testing.assert_close(p[1, 2], so.Transport(a, b[2]).argmax(theta[1, 2], so.Quadratic(2.0)))
    off = so.Transport(a * (1 + 1e-6), b[0]).argmax(theta[0, 0], so.Entropy(0.5))
    torch.testing.assert_close(off.sum(), torch.tensor(1 + 5e-7, dtype=torch.float64), rtol=1e-9, atol=0)


A, B, PAIRS = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]), torch.ones(4, 2)
BAD = {
    "sums": (lambda: so.Transport(A, 2 * B), ValueError, r"same sum, got 1\.0 and 2\.0"),
    "negative": (lambda: so.Transport(A, torch.tensor([-0.5, 1.5])), ValueError, r"b must be .*-0\.5"),
    "infinite": (lambda: so.Transport(torch.tensor([INF, 1.0]), B), ValueError, "a must be finite"),
    "no dims": (lambda: so.Transport(torch.tensor(1.0), B), ValueError, "a must have at least one dimension"),
    "size": (lambda: so.Transport(A, B).argmax(torch.zeros(2, 3)), ValueError, r"2 x 3, but b has 2"),
    "batch": (lambda: so.Transport(PAIRS, PAIRS).argmax(torch.zeros(3, 2, 2)), ValueError, "batch"),
    "square": (lambda: so.Birkhoff().argmax(torch.zeros(2, 3)), ValueError, "square"),
    "vector": (lambda: so.Birkhoff().argmax(torch.zeros(3)), IndexError, "dim -2"),
    "+inf": (lambda: so.Birkhoff().argmax(torch.tensor([[INF, 0.0], [0.0, 0.0]])), ValueError, r"\+inf"),
    "mixing": (lambda: so.Birkhoff().argmax(torch.eye(2), so.Quadratic(so.Mixing())), ValueError, "Mixing"),
    "argsort mixing": (lambda: so.argsort(A, smoothing=so.Entropy(so.Mixing())), ValueError, "Mixing"),
    "tsallis": (lambda: so.Birkhoff().argmax(torch.eye(2), so.Tsallis(1.5, 1.0)), ValueError, "Entropy, Quadratic"),
    "range": (lambda: so.Birkhoff().argmax(torch.eye(2), so.Entropy(1e-30)), ValueError, "beyond what float64"),
    "range, quadratic": (lambda: so.Birkhoff().argmax(torch.eye(2), so.Quadratic(1e-30)), ValueError, "beyond what"),
    "vertices": (lambda: so.Birkhoff().vertices(), ValueError, r"vertices\(n\)"),
    "vertices of a batch": (lambda: so.Transport(PAIRS, PAIRS).vertices(), ValueError, "single"),
    "tol": (lambda: so.Sinkhorn(tol=-1.0), ValueError, "tol"),
    "max_iter": (lambda: so.Sinkhorn(max_iter=0), ValueError, "max_iter"),
    "on_fail": (lambda: so.Sinkhorn(on_fail="nan"), ValueError, "raise, warn, ignore"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# --- convergence ------------------------------------------------------------------------------------------------------


def test_failure_is_an_error_a_warning_or_nothing() -> None:
    theta = one_row(normal(6, 6, seed=8) * 50)
    solver = lambda policy: so.Entropy(0.01, solver=so.Sinkhorn(max_iter=5, on_fail=policy))  # noqa: E731
    with pytest.raises(ValueError, match=r"of 3 matrices, .* marginal error .* after 5 steps, wanted 1\.0e-10"):
        so.Birkhoff().argmax(theta, solver("raise"))
    with pytest.warns(UserWarning, match="have not converged"):
        p = so.Birkhoff().argmax(theta, solver("warn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(so.Birkhoff().argmax(theta, solver("ignore")), p)
    assert not so.Birkhoff().contains(p, 1e-6).all()


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-12])
def test_the_tolerance_is_kept(tol: float) -> None:
    theta = normal(20, 30, 30, seed=9)
    for eps in (1.0, 0.1, 0.01, 1e-4):
        p = so.Birkhoff().argmax(theta, so.Entropy(eps, solver=so.Sinkhorn(tol)))
        error = (p.sum(-1) - 1).abs().sum(-1) + (p.sum(-2) - 1).abs().sum(-1)
        assert (error <= max(tol, 1e-9 if eps < 1e-3 else 0) * 30).all()


@BOTH
@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-6])
def test_small_eps_converges_and_is_nearly_hard(family: str, eps: float) -> None:
    x, y = torch.rand(2, 5, 40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theta = -torch.cdist(x, y).square()
    value = so.Birkhoff().max(theta, REGULARIZERS[family](eps))
    hard = so.Birkhoff().max(theta, so.Hard())
    most = 40 * eps * (torch.tensor(40.0).log() if family == "entropy" else 0.5)
    assert (value >= hard - 1e-9).all()
    assert (value <= hard + most).all()


def test_memory_is_independent_of_the_sweeps() -> None:
    """What the graph keeps is the same after few and after many sweeps."""

    def kept(eps: float) -> int:
        sizes: list[int] = []
        theta = normal(1, 40, 40, seed=10).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            so.Birkhoff().argmax(theta, so.Entropy(eps))
        return sum(sizes)

    assert kept(10.0) == kept(1e-3) < 6 * 40 * 40
