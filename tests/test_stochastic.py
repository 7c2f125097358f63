"""Stochastic smoothing against closed forms (within five standard errors) and against estimators written by hand."""

from __future__ import annotations

import copy
import doctest
import math
import pickle

import pytest
import torch
from oracles import cotangent, loss, normal
from torch import Tensor

import smoothops as so
from smoothops import noises, stochastic
from smoothops.noises import Gumbel, Logistic, Noise, Normal
from smoothops.smoothing import Problem
from smoothops.stochastic import Perturbed

NOISES = {"normal": Normal(), "gumbel": Gumbel(), "logistic": Logistic()}
CDF = {
    "normal": torch.special.ndtr,
    "gumbel": lambda z: torch.exp(-torch.exp(-z)),
    "logistic": torch.sigmoid,
}
SCORE = {"normal": lambda z: z, "gumbel": lambda z: 1 - torch.exp(-z), "logistic": lambda z: torch.tanh(z / 2)}
CURVATURE = {  # (log p)''
    "normal": lambda z: -torch.ones_like(z),
    "gumbel": lambda z: -torch.exp(-z),
    "logistic": lambda z: -1 / (2 * torch.cosh(z / 2) ** 2),
}
VARIANTS = [(False, False), (False, True), (True, False), (True, True)]
ROWS = 4000
EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_noise = pytest.mark.parametrize("law", list(NOISES))
variants = pytest.mark.parametrize(("antithetic", "control_variate"), VARIANTS)


def perturbed(noise: Noise, samples: int = 50, seed: int | None = None, **options: bool) -> Perturbed:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Perturbed(1.0, noise, samples, generator=generator, **options)


def one_hot(v: Tensor) -> Tensor:
    return torch.zeros_like(v).scatter(-1, v.argmax(-1, keepdim=True), 1.0)


def top2(v: Tensor) -> Tensor:
    return torch.zeros_like(v).scatter(-1, v.topk(2).indices, 1.0)


def step(v: Tensor) -> Tensor:
    return (v > 0).to(v.dtype)


def rows(*values: float) -> Tensor:
    """(ROWS, n): every row is one independent replicate of the estimate."""
    return torch.tensor(values, dtype=torch.float64).expand(ROWS, -1).clone().requires_grad_()


def check_unbiased(estimates: Tensor, exact: Tensor, resolution: float = 0.1) -> None:
    """The mean over the rows is ``exact`` within 5 standard errors, which are small enough to tell."""
    error = estimates.std(0) / len(estimates) ** 0.5
    assert (5 * error).max() < resolution * max(1.0, exact.abs().max().item())
    assert ((estimates.mean(0) - exact).abs() <= 5 * error + 1e-12).all()


def check_derivatives(estimate: Tensor, exact: Tensor, at: tuple[Tensor, ...], like: tuple[Tensor, ...], order: int):
    """A number a row, ``estimate`` (ROWS,), and all its derivatives in ``at`` against those of the number ``exact``."""
    check_unbiased(estimate.detach(), exact.detach())
    if order == 0:
        return
    got = torch.autograd.grad(estimate.sum(), at, create_graph=True, materialize_grads=True)
    want = torch.autograd.grad(exact, like, create_graph=True, materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        for i in range(w.shape[0]):
            check_derivatives(g[:, i], w[i], at, like, order - 1)


# --- noises ----------------------------------------------------------------------------------------------------------


@every_noise
def test_noise_has_its_law(law: str) -> None:
    """Kolmogorov-Smirnov at a level of 1e-3, and the mean: the first does not survive a scale wrong by 5 %."""
    noise, count = NOISES[law], 100_000
    z = noise.sample((count,), torch.Generator().manual_seed(1), torch.float64, torch.device("cpu"))
    places = torch.arange(1, count + 1, dtype=torch.float64) / count
    for draws in (z, noise.mirror(z)):
        distance = (CDF[law](draws.sort().values) - places).abs().max() * count**0.5
        assert distance < 1.95
        assert abs(draws.mean() - noise.mean) < 5 * draws.std() / count**0.5
    assert (CDF[law](1.05 * z.sort().values) - places).abs().max() * count**0.5 > 1.95


@every_noise
def test_log_prob_is_the_logarithm_of_the_density(law: str) -> None:
    noise, z = NOISES[law], torch.linspace(-3, 30, 200, dtype=torch.float64).requires_grad_()
    (density,) = torch.autograd.grad(CDF[law](z).sum(), z)
    assert (noise.log_prob(z).exp() - density).abs().max() < 1e-13
    log_prob = noise.log_prob(z)
    (slope,) = torch.autograd.grad(log_prob.sum(), z, create_graph=True)
    torch.testing.assert_close(slope, -SCORE[law](z), **EXACT)
    if law != "normal":
        (curvature,) = torch.autograd.grad(slope.sum(), z)
        torch.testing.assert_close(curvature, CURVATURE[law](z), rtol=1e-9, atol=1e-12)
    assert noise.log_prob(torch.tensor([-600.0, 600.0])).isnan().sum() == 0


@every_noise
def test_mirror_exchanges_the_tails(law: str) -> None:
    noise, z = NOISES[law], torch.linspace(-3.5, 36, 300, dtype=torch.float64)
    torch.testing.assert_close(noise.mirror(noise.mirror(z)), z, rtol=1e-12, atol=1e-12)
    near = z[z < 5]
    torch.testing.assert_close(CDF[law](noise.mirror(near)), 1 - CDF[law](near), rtol=0, atol=1e-14)


def test_mirror_of_gumbel_does_not_cancel() -> None:
    """Far up, 1 - F(z) = e^-z to 1e-26, so that the mirror is -log z; far down, F(z) = exp(-e^-z)."""
    z = torch.tensor([30.0, 36.0, -3.6, -4.0], dtype=torch.float64)
    want = torch.cat([-z[:2].log(), (-z[2:]).exp()])
    torch.testing.assert_close(Gumbel().mirror(z)[:2], want[:2], rtol=1e-13, atol=0)
    torch.testing.assert_close(Gumbel().mirror(z)[2:], want[2:], rtol=1e-14, atol=0)


def test_uniform_has_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.tensor([0.0, 1 - 2.0**-53], dtype=dtype))
    for noise in (Gumbel(), Logistic()):
        z = noise.sample((2,), None, torch.float64, torch.device("cpu"))
        assert z.isfinite().all()
        assert noise.mirror(z).isfinite().all()


# --- closed forms ----------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_gumbel_argmax_is_softmax(antithetic: bool, control_variate: bool, eps: float) -> None:
    theta, e = rows(0.3 * eps, -0.2 * eps, 0.0), rows(eps)
    x, s = theta[0].detach().requires_grad_(), e[0].detach().requires_grad_()
    smoothing = perturbed(Gumbel(), antithetic=antithetic, control_variate=control_variate)
    y, want = smoothing.average(theta, one_hot, e), torch.softmax(x / s, -1)
    check_derivatives(y[:, 0], want[0], (theta, e), (x, s), 2 if eps == 2 else 1)
    check_unbiased(y[:, 1:].detach(), want[1:].detach())


@variants
def test_gumbel_maximum_is_logsumexp(antithetic: bool, control_variate: bool) -> None:
    theta, e = rows(0.6, -0.4), rows(1.5)
    x, s = theta[0].detach().requires_grad_(), e[0].detach().requires_grad_()
    smoothing = perturbed(Gumbel(), antithetic=antithetic, control_variate=control_variate)
    m = smoothing.maximum(theta, one_hot, e)[:, 0]
    check_derivatives(m, s[0] * torch.logsumexp(x / s, -1), (theta, e), (x, s), 2)


def test_third_derivatives_of_maximum() -> None:
    """The first order at which the nodes of the integral matter."""
    theta, e = rows(0.6, -0.4), rows(2.0)
    x, s = theta[0].detach().requires_grad_(), e[0].detach().requires_grad_()
    m = perturbed(Gumbel()).maximum(theta, one_hot, e)[:, 0]
    check_derivatives(m, s[0] * torch.logsumexp(x / s, -1), (theta,), (x,), 3)


@pytest.mark.parametrize("law", ["normal", "logistic"])
@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_step_becomes_the_distribution_function(law: str, eps: float) -> None:
    u, e = rows(0.4 * eps), rows(eps)
    x, s = u[0].detach().requires_grad_(), e[0].detach().requires_grad_()
    y = perturbed(NOISES[law]).average(u, step, e)[:, 0]
    check_derivatives(y, CDF[law](x / s)[0], (u, e), (x, s), 2 if eps == 2 else 1)


@pytest.mark.parametrize("law", ["normal", "logistic"])
def test_perturbed_relu(law: str) -> None:
    """max_{y in [0, 1]} u y: eps times the antiderivative of the distribution function."""
    u, e = rows(0.8), rows(2.0)
    x, s = u[0].detach().requires_grad_(), e[0].detach().requires_grad_()
    z = x / s
    if law == "normal":
        want = s * (z * CDF[law](z) + torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    else:
        want = s * torch.nn.functional.softplus(z)
    m = perturbed(NOISES[law]).maximum(u, step, e)[:, 0]
    check_derivatives(m, want[0], (u, e), (x, s), 2)


@pytest.mark.parametrize("name", ["average", "maximum"])
def test_gradients_in_what_the_oracle_uses(name: str) -> None:
    """The values w of a permutahedron of two items, of which the larger score takes the larger."""
    theta, w, e = rows(0.6, -0.4), rows(1.0, 3.0), rows(1.5)
    x, v, s = (leaf[0].detach().requires_grad_() for leaf in (theta, w, e))
    z = (x[0] - x[1]) / (s * math.sqrt(2))
    first = v[0] + (v[1] - v[0]) * CDF["normal"](z)
    if name == "maximum":
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        first = x[0] * first + x[1] * (v.sum() - first) + (v[1] - v[0]) * s * math.sqrt(2) * density

    def oracle(points: Tensor) -> Tensor:
        return w.expand_as(points).gather(-1, points.argsort(-1).argsort(-1))

    y = getattr(perturbed(Normal()), name)(theta, oracle, e)[:, 0]
    check_derivatives(y, first[0], (theta, w, e), (x, v, s), 2)


# --- variance --------------------------------------------------------------------------------------------------------


def slopes(f, at: float, eps: float, smoothing: Perturbed) -> Tensor:
    """One estimate a row of the derivative of E f(at + eps Z)."""
    u = rows(at)
    (g,) = torch.autograd.grad(smoothing.average(u, f, torch.full((1, 1), eps, dtype=torch.float64)).sum(), u)
    return g[:, 0]


def test_control_variate_on_a_cube() -> None:
    """u^3 at 3.5 with sigma 0.1: 435 a sample without, 52 with; its smoothed slope is 3u^2 + 3s^2 = 36.78."""
    for control_variate, std in ((False, 435), (True, 52)):
        smoothing = perturbed(Normal(), 200, antithetic=False, control_variate=control_variate)
        g = slopes(lambda v: v**3, 3.5, 0.1, smoothing)
        check_unbiased(g, torch.tensor(36.78), resolution=0.1)
        assert abs(g.std() * 200**0.5 / std - 1) < 0.05


@every_noise
def test_control_variate_at_large_eps(law: str) -> None:
    """There oracle(theta), a vertex, would be worse than none; the std falls by sqrt(1 - p), p the item's weight."""
    theta, e = rows(1.0, 0.0, 0.5, -1.0), torch.full((1, 1), 3.0, dtype=torch.float64)
    std = []
    for control_variate in (True, False):
        y = perturbed(NOISES[law], antithetic=False, control_variate=control_variate).average(theta, one_hot, e)[:, 0]
        (g,) = torch.autograd.grad(y.sum(), theta)
        std.append(g.var(0).sum().sqrt())
    assert abs(std[0] / std[1] / (1 - y.mean()).sqrt() - 1) < 0.05


@every_noise
def test_antithetic_pairs(law: str) -> None:
    """The errors of the value of an odd function cancel, and those that a constant makes in its slope."""
    values, constants = [], []
    for antithetic in (True, False):
        smoothing = perturbed(NOISES[law], 20, antithetic=antithetic, control_variate=False)
        value = smoothing.average(rows(0.0), torch.tanh, torch.ones(1, 1, dtype=torch.float64))
        values.append(value.detach().std())
        constants.append(slopes(lambda v: v + 10, 0.5, 1.0, smoothing).std())
    assert values[0] < 0.75 * values[1]
    assert constants[0] < 0.75 * constants[1]


# --- the estimator, by hand ------------------------------------------------------------------------------------------


class ByHand:
    """The estimators of average at theta (n,) and a number eps, one sample after the other."""

    def __init__(self, law: str, smoothing: Perturbed, theta: Tensor, eps: float, oracle, seed: int) -> None:
        noise, pairs = NOISES[law], smoothing.samples // (2 if smoothing.antithetic else 1)
        generator = torch.Generator().manual_seed(seed)
        z = noise.sample((pairs, len(theta)), generator, theta.dtype, theta.device)
        groups = [[a, noise.mirror(a)] if smoothing.antithetic else [a] for a in z]
        answers = [[oracle(theta + eps * (a - noise.mean)) for a in group] for group in groups]
        self.value, self.first, self.second, self.in_eps = 0, 0, 0, 0
        for p, (group, ys) in enumerate(zip(groups, answers, strict=True)):
            others = [y for q, other in enumerate(answers) if q != p for y in other]
            base = sum(others) / len(others) if smoothing.control_variate else 0
            for a, y in zip(group, ys, strict=True):
                psi, c = SCORE[law](a), (y - base) / smoothing.samples
                curve = torch.outer(psi, psi) + torch.diag(CURVATURE[law](a))
                self.value = self.value + y / smoothing.samples
                self.first = self.first + torch.outer(c, psi) / eps
                self.second = self.second + c[:, None, None] * curve / eps**2
                self.in_eps = self.in_eps + c * (psi * (a - noise.mean) - 1).sum() / eps


@every_noise
@variants
@pytest.mark.parametrize("oracle", [one_hot, top2, lambda v: v.argsort(-1).argsort(-1).double()])
def test_derivatives_are_the_estimator(law: str, antithetic: bool, control_variate: bool, oracle) -> None:
    theta, eps = normal(5), torch.tensor([0.8], dtype=torch.float64)
    options = {"antithetic": antithetic, "control_variate": control_variate}
    want = ByHand(law, perturbed(NOISES[law], 8, **options), theta, 0.8, oracle, seed=3)

    def average(theta: Tensor, eps: Tensor) -> Tensor:
        return perturbed(NOISES[law], 8, seed=3, **options).average(theta, oracle, eps)

    def maximum(theta: Tensor, eps: Tensor) -> Tensor:
        return perturbed(NOISES[law], 8, seed=3, **options).maximum(theta, oracle, eps)[0]

    jacrev, jacfwd = torch.func.jacrev, lambda f: torch.func.jacfwd(f, randomness="same")
    torch.testing.assert_close(average(theta, eps), want.value, **EXACT)
    for first in (jacrev, jacfwd):
        torch.testing.assert_close(first(average)(theta, eps), want.first, **EXACT)
        torch.testing.assert_close(first(lambda e: average(theta, e))(eps)[:, 0], want.in_eps, **EXACT)
        torch.testing.assert_close(first(maximum)(theta, eps), want.value, **EXACT)
        for second in (jacrev, jacfwd):
            torch.testing.assert_close(second(first(average))(theta, eps), want.second, rtol=1e-12, atol=1e-11)
            hessian = second(first(maximum))(theta, eps)
            torch.testing.assert_close(hessian, (want.first + want.first.mT) / 2, **EXACT)


@every_noise
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradient_of_maximum_is_average_to_the_bit(law: str, create_graph: bool) -> None:
    theta, eps = normal(3, 5).requires_grad_(), torch.full((1, 1), 0.8, dtype=torch.float64).requires_grad_()
    m = perturbed(NOISES[law], seed=1).maximum(theta, one_hot, eps)
    y = perturbed(NOISES[law], seed=1).average(theta, one_hot, eps)
    assert m.shape == (3, 1)
    in_theta, in_eps = torch.autograd.grad(m.sum(), (theta, eps), create_graph=create_graph)
    assert torch.equal(in_theta, y)
    # <theta, grad_theta> + eps grad_eps = m, which is homogeneous of degree 1
    torch.testing.assert_close((theta * in_theta).sum() + (eps * in_eps).sum(), m.sum(), **EXACT)


# --- every way to differentiate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["average", "maximum"])
@every_noise
def test_forward_mode_is_reverse_mode(name: str, law: str) -> None:
    theta, eps = normal(3, 5), torch.rand(3, 1, dtype=torch.float64) + 0.5
    tangents = (normal(3, 5, seed=1), normal(3, 1, seed=2))

    def f(theta: Tensor, eps: Tensor) -> Tensor:
        return loss(getattr(perturbed(NOISES[law], 6, seed=5), name)(theta, one_hot, eps))

    gradients = torch.func.grad(f, (0, 1))(theta, eps)
    want = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(f, (theta, eps), tangents)[1], want, **EXACT)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():  # which does not stop tangents
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip((theta, eps), tangents, strict=True)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent, want, **EXACT)


@pytest.mark.parametrize("name", ["average", "maximum"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(name: str, create_graph: bool) -> None:
    """Several cotangents at once, through the first and the second derivative."""
    theta, eps = normal(2, 4).requires_grad_(), torch.full((1, 1), 0.6, dtype=torch.float64).requires_grad_()
    y = getattr(perturbed(Gumbel(), 6), name)(theta, top2, eps)
    first = torch.autograd.grad(loss(y), (theta, eps), create_graph=True)
    for output in (y, *first):
        weights = normal(3, *output.shape, seed=1)
        keep = {"create_graph": create_graph, "retain_graph": True}
        batched = torch.autograd.grad(output, (theta, eps), weights, is_grads_batched=True, **keep)
        single = [torch.autograd.grad(output, (theta, eps), w, **keep) for w in weights]
        for got, *want in zip(batched, *single, strict=True):
            torch.testing.assert_close(got, torch.stack(want), **EXACT)


@pytest.mark.parametrize("generator", [None, 7])
def test_vmap(generator: int | None) -> None:
    """randomness="different": every slice has noise of its own; "same": each slice is the call alone."""
    theta, eps = normal(4).expand(600, 4), torch.tensor([0.7], dtype=torch.float64)

    def gradient(theta: Tensor) -> Tensor:
        smoothing = perturbed(Gumbel(), 50, seed=generator)
        return torch.func.grad(lambda x: loss(smoothing.average(x, one_hot, eps)))(theta)

    each = torch.func.vmap(gradient, randomness="different")(theta)
    x = theta[0].clone().requires_grad_()
    check_unbiased(each, torch.autograd.grad(loss(torch.softmax(x / eps, -1)), x)[0])
    assert each.unique(dim=0).shape[0] == 600
    torch.manual_seed(2)
    same = torch.func.vmap(gradient, randomness="same")(theta[:5])
    torch.manual_seed(2)
    alone = gradient(theta[0])
    torch.testing.assert_close(same, alone.expand(5, 4), **EXACT)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(gradient)(theta)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["average", "maximum"])
def test_compiled_is_eager(name: str) -> None:
    x, eps, held = normal(3, 5), torch.full((1, 1), 0.7, dtype=torch.float64), perturbed(Gumbel(), 6)

    def f(x: Tensor) -> Tensor:
        made_inside = getattr(Perturbed(0.7, samples=6), name)(x, one_hot, eps)
        return made_inside + getattr(held, name)(x, top2, eps)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: loss(f(x)))(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (cotangent(x),))[1]

    def backward(g) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(g(leaf)), leaf)[0]

    for function in (f, gradient, tangent):
        fast = torch.compile(function, fullgraph=True, backend="aot_eager")
        for run in (lambda g: g(x), backward) if function is f else (lambda g: g(x),):
            results = []
            for g in (fast, function):
                torch.manual_seed(4)
                results.append(run(g))
            torch.testing.assert_close(*results, **EXACT)


# --- values ----------------------------------------------------------------------------------------------------------


def test_top_k_sums_to_k_exactly() -> None:
    theta = normal(20, 9).requires_grad_()
    y = Perturbed(0.5, samples=64).average(theta, top2, torch.full((1, 1), 0.5, dtype=torch.float64))
    assert torch.equal(y.sum(-1), torch.full((20,), 2.0, dtype=torch.float64))
    (g,) = torch.autograd.grad((y.sum(-1) * normal(20)).sum(), theta)
    assert g.abs().max() < 1e-13


@pytest.mark.parametrize("name", ["average", "maximum"])
def test_value_and_noise_do_not_depend_on_grad_mode(name: str) -> None:
    theta, eps = normal(3, 5), torch.full((1, 1), 0.5, dtype=torch.float64)
    with_gradient, without = perturbed(Gumbel(), seed=1), perturbed(Gumbel(), seed=1)
    for _ in range(2):  # the second call starts where the first left the generator
        y = getattr(with_gradient, name)(theta.clone().requires_grad_(), one_hot, eps)
        assert torch.equal(getattr(without, name)(theta, one_hot, eps), y)
    assert y.requires_grad


@pytest.mark.parametrize("law", ["normal", "logistic"])
def test_symmetric_pairs_give_no_less_than_the_hard_maximum(law: str) -> None:
    theta = normal(2000, 4)
    m = Perturbed(0.7, NOISES[law], 4).maximum(theta, one_hot, torch.full((1, 1), 0.7, dtype=torch.float64))
    assert (m - theta.amax(-1, keepdim=True)).min() > -1e-14


@pytest.mark.parametrize("excluded", [-math.inf, -1e300, -1e30])
@every_noise
def test_excluded_items(law: str, excluded: float) -> None:
    """No NaN in any derivative, and none at all in the excluded item."""
    x, eps = normal(2, 4), torch.full((1, 1), 0.5, dtype=torch.float64)
    x[:, 1] = excluded
    for name in ("average", "maximum"):

        def f(x: Tensor, eps: Tensor, name: str = name) -> Tensor:
            smoothing = perturbed(NOISES[law], 8, seed=2, control_variate=name == "maximum")
            return loss(getattr(smoothing, name)(x, one_hot, eps))

        assert f(x, eps).isfinite()
        for g in torch.func.grad(f, (0, 1))(x, eps):
            assert g.isfinite().all()
            assert (g != 0).any()
        assert torch.equal(torch.func.grad(f)(x, eps)[:, 1], torch.zeros(2, dtype=torch.float64))
        hessian = torch.func.jacrev(torch.func.grad(f))(x, eps)
        assert hessian.isfinite().all()
        assert torch.equal(hessian[:, 1], torch.zeros_like(hessian[:, 1]))
        assert torch.func.jvp(f, (x, eps), (torch.ones_like(x), eps))[1].isfinite()


def test_infinite_winner_and_huge_scores() -> None:
    x = torch.tensor([[1.0, math.inf, 0.0], [1e30, -1e30, 0.0]], dtype=torch.float64).requires_grad_()
    eps = torch.ones(1, 1, dtype=torch.float64)
    y, m = (getattr(Perturbed(1.0), name)(x, one_hot, eps) for name in ("average", "maximum"))
    assert torch.equal(y, one_hot(x))
    assert m[:, 0].tolist() == [math.inf, 1e30]
    assert torch.equal(torch.autograd.grad(loss(y), x)[0], torch.zeros_like(x))
    assert torch.equal(torch.autograd.grad(m.sum(), x)[0], one_hot(x))


# --- the object ------------------------------------------------------------------------------------------------------


def test_reproducible_and_nothing_is_modified() -> None:
    theta, eps = normal(2, 5), torch.full((1, 1), 0.5, dtype=torch.float64)
    before, state = theta.clone(), torch.get_rng_state()
    smoothing = perturbed(Gumbel(), seed=3)
    twins = [copy.deepcopy(smoothing), pickle.loads(pickle.dumps(smoothing))]
    first, second = (smoothing.average(theta, lambda v: one_hot(v.sub_(1)), eps) for _ in range(2))
    assert not torch.equal(first, second)
    for twin in twins:
        assert torch.equal(twin.average(theta, one_hot, eps), first)
        assert torch.equal(twin.average(theta, one_hot, eps), second)
    assert torch.equal(theta, before)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is untouched
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        answers.append(perturbed(Normal()).average(theta, one_hot, eps))
    assert torch.equal(*answers)


def test_solve_and_repr() -> None:
    hard, soft = lambda: torch.zeros(1), lambda reg: torch.ones(1)
    problem = Problem(hard, soft, sampled=lambda smoothing: torch.full((1,), smoothing.samples))
    assert Perturbed(0).solve(problem) == 0
    assert Perturbed(0.1, samples=6).solve(problem) == 6
    assert Perturbed(torch.tensor(0.1), samples=6).solve(problem) == 6
    assert repr(Perturbed(0.1, Gumbel(), samples=6)) == (
        "Perturbed(eps=0.1, noise=Gumbel(), samples=6, antithetic=True, control_variate=True, generator=None)"
    )
    assert isinstance(Perturbed(0.1).noise, Normal)
    with pytest.raises(ValueError, match=r"Perturbed averages hard answers.*so\.Quadratic"):
        Perturbed(0.1).solve(Problem(hard, soft))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps must be positive or 0"),
        ({"eps": torch.tensor(0.0)}, ValueError, "eps must be positive everywhere"),
        ({"eps": so.Mixing(3.0)}, TypeError, "eps must be a number or a tensor, got Mixing"),
        ({"noise": Gumbel}, TypeError, "noise object such as"),
        ({"samples": 10.0}, TypeError, "samples must be an int, got 10.0"),
        ({"samples": 0}, ValueError, "at least 1, got 0"),
        ({"samples": 11}, ValueError, "pass 12, or antithetic=False"),
        ({"samples": 2}, ValueError, "at least 4, or control_variate=False"),
        ({"samples": 1, "antithetic": False}, ValueError, "at least 2, or control_variate=False"),
        ({"antithetic": 1}, TypeError, "antithetic must be True or False, got 1"),
        ({"control_variate": None}, TypeError, "control_variate must be True or False"),
        ({"generator": 3}, TypeError, "manual_seed"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Perturbed(**{"eps": 0.1, **arguments})


def test_bad_oracles() -> None:
    theta, eps = normal(2, 5), torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"all but the last dimension of its input, \(100, 2, 5\), got \(100, 2\)"):
        Perturbed(1.0).average(theta, lambda v: v.amax(-1), eps)
    with pytest.raises(ValueError, match=r"argmax of shape \(100, 2, 5\), got \(100, 2, 1\)"):
        Perturbed(1.0).maximum(theta, lambda v: v.amax(-1, keepdim=True), eps)


def test_examples() -> None:
    examples = {"torch": torch, "so": so}
    found = [t for m in (noises, stochastic) for t in doctest.DocTestFinder().find(m, globs=examples) if t.examples]
    assert len(found) == 4
    assert not any(doctest.DocTestRunner().run(test).failed for test in found)
