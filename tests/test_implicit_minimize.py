"""Minimizers: every method reaches the minimum, in every mode of torch, sample by sample, or says that it did not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicit.adjoint import Unroll, attach
from implicit.bilevel import hypergradient
from implicit.conditions import stationary
from implicit.linear import CG, ConvergenceError
from implicit.minimize import FISTA, LBFGS, GradientDescent, MirrorDescent, minimize
from implicit.root import Newton

D = torch.float64
METHODS = [LBFGS(), LBFGS(memory=3), Newton(), Newton(line_search=False), FISTA(), GradientDescent()]
X, Y = normal(12, 4), normal(12, seed=1)


def name(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


def ridge(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return ((X @ w - Y) ** 2).sum() / 2 + (l * w**2).sum() / 2


def logistic(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return torch.nn.functional.softplus(-Y.sign() * (X @ w)).sum() + (l * w**2).sum() / 2


def ridge_solution(l: Tensor) -> Tensor:  # noqa: E741
    return torch.linalg.inv(X.mT @ X + torch.diag_embed(l.expand(4))) @ (X.mT @ Y)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_minimum(method: Any) -> None:
    l = torch.tensor(0.7, dtype=D)  # noqa: E741
    w, info = minimize(ridge, torch.zeros(4, dtype=D), l, method=method, info=True)
    torch.testing.assert_close(w, ridge_solution(l), rtol=1e-10, atol=1e-10)
    assert bool(info.converged)
    assert info.residual <= 1e-11 * (X.mT @ Y).norm() * 1.001 or info.residual <= 1e-13
    w = minimize(logistic, torch.zeros(4, dtype=D), l, method=method)
    gradient = torch.func.grad(logistic)(w, l)
    assert gradient.norm() <= 1e-10


def rosenbrock(z: Tensor) -> Tensor:
    return ((1 - z[:-1]) ** 2 + 100 * (z[1:] - z[:-1] ** 2) ** 2).sum()


@pytest.mark.parametrize("method", [LBFGS(), Newton()], ids=name)
def test_rosenbrock(method: Any) -> None:
    for n, start in ((2, [-1.2, 1.0]), (6, [-1.2, 1.0] * 3)):
        z = minimize(rosenbrock, torch.tensor(start, dtype=D), method=method)
        torch.testing.assert_close(rosenbrock(z), torch.zeros((), dtype=D), atol=1e-15 if n == 2 else 4.0, rtol=0)
        assert torch.func.grad(rosenbrock)(z).norm() < 1e-7


def test_newton_leaves_a_saddle_point() -> None:
    # the gradient method root(Newton) would converge to the saddle at 0
    z = minimize(lambda z: (z[0] ** 2 - 1) ** 2 + z[1] ** 2, torch.tensor([0.1, 1.0], dtype=D), method=Newton())
    torch.testing.assert_close(z.abs(), torch.tensor([1.0, 0.0], dtype=D), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [FISTA(), GradientDescent(), FISTA(step_size=0.02)], ids=name)
def test_constraints_and_shrinkage(method: Any) -> None:
    c = torch.tensor([0.5, -0.3, 2.0, 0.1], dtype=D)
    a = torch.tensor([1.0, 3.0, 10.0, 40.0], dtype=D)

    def f(z: Tensor) -> Tensor:
        return (a * (z - c) ** 2).sum() / 2

    z = minimize(f, torch.ones(4, dtype=D), method=method, proj=lambda z: z.clamp(0, 1))
    torch.testing.assert_close(z, c.clamp(0, 1), rtol=0, atol=1e-9)
    z = minimize(f, torch.ones(4, dtype=D), method=method, prox=lambda v, t: v.sign() * (v.abs() - t * 0.4).relu())
    torch.testing.assert_close(z, c.sign() * (c.abs() - 0.4 / a).relu(), rtol=0, atol=1e-9)


def test_mirror_descent_on_the_simplex() -> None:
    c = normal(5)

    def entropic(z: Tensor, c: Tensor) -> Tensor:
        return (z * (z.log() - c)).sum() / 2 + (z**2).sum()

    z0 = torch.full((5,), 0.2, dtype=D)
    z = minimize(entropic, z0, c, method=MirrorDescent())
    assert abs(z.sum() - 1) < 1e-14
    gradient = torch.func.grad(entropic)(z, c)
    torch.testing.assert_close(gradient, gradient.mean().expand(5), rtol=1e-9, atol=1e-9)
    own = MirrorDescent(lambda v: v.softmax(-1), lambda z: z.log() + 1)
    torch.testing.assert_close(minimize(entropic, z0, c, method=own), z, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda c: minimize(entropic, z0, c, method=MirrorDescent()), (c.requires_grad_(),))


def test_mirror_descent_converges_to_rounding() -> None:
    """Steps chosen by differences of values stall at the square root of the machine epsilon."""
    for seed in range(6):
        Q, c = normal(6, 6, seed=seed), normal(6, seed=seed + 50)

        def f(z: Tensor, Q: Tensor = Q, c: Tensor = c) -> Tensor:
            return (Q @ z).square().sum() / 2 + c @ z + 0.1 * (z * z.log()).sum()

        z, info = minimize(f, torch.full((6,), 1 / 6, dtype=D), method=MirrorDescent(), info=True)
        assert info.iterations < 1500
        gradient = torch.func.grad(f)(z)
        assert (z * (gradient - z @ gradient)).norm() < 1e-10


def test_fista_is_faster_than_gradient_descent() -> None:
    scale = torch.logspace(0, 3, 30, dtype=D)
    c = normal(30)

    def count(method: Any) -> Tensor:
        f = lambda z: (scale * (z - c) ** 2).sum()  # noqa: E731
        return minimize(f, torch.zeros(30, dtype=D), method=method, info=True, rtol=1e-8)[1].iterations

    counts = [count(FISTA()), count(GradientDescent())]
    assert counts[0] < counts[1] / 5


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LBFGS(), Newton(), FISTA(), GradientDescent()], ids=name)
def test_gradients(method: Any) -> None:
    def f(l: Tensor) -> Tensor:  # noqa: E741
        return minimize(logistic, torch.zeros(4, dtype=D), l, method=method)

    l = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=D, requires_grad=True)  # noqa: E741
    assert torch.autograd.gradcheck(f, (l,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (l,), check_batched_grad=True)


@pytest.mark.parametrize("method", [LBFGS(), Newton(), FISTA()], ids=name)
def test_transforms(method: Any) -> None:
    def f(l: Tensor) -> Tensor:  # noqa: E741
        return minimize(ridge, torch.zeros(4, dtype=D), l, method=method)

    l, batch = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=D), 0.5 + normal(3, 4).abs()  # noqa: E741
    transforms: list[Callable[..., Any]] = [
        lambda g: grad(lambda x: loss(g(x)))(l),
        lambda g: jacrev(g)(l),
        lambda g: jacfwd(g)(l),
        lambda g: jvp(g, (l,), (batch[0],))[1],
        lambda g: vmap(g)(batch),
        lambda g: vmap(grad(lambda x: loss(g(x))))(batch),
        lambda g: hessian(lambda x: loss(g(x)))(l),
        lambda g: jacrev(jacrev(g))(l),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(f), transform(ridge_solution), rtol=1e-8, atol=1e-10)


def test_modules_and_closures_have_gradients() -> None:
    layer = torch.nn.Linear(4, 1, dtype=D)
    scale = torch.tensor(0.3, dtype=D, requires_grad=True)
    unused = torch.tensor(1.0, dtype=D, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return (layer(z) ** 2).sum() + scale * (z - 1).square().sum()

    z = minimize(f, torch.zeros(4, dtype=D))
    got = torch.autograd.grad(loss(z), [*layer.parameters(), scale, unused], allow_unused=True)

    def explicit(weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        a = 2 * weight.mT @ weight + 2 * scale * torch.eye(4, dtype=D)
        return torch.linalg.solve(a, 2 * scale * torch.ones(4, dtype=D) - 2 * (weight.mT @ bias))

    inputs = [*layer.parameters(), scale]
    want = torch.autograd.grad(loss(explicit(*inputs)), inputs)
    assert got[3] is None
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_unrolling_approaches_the_implicit_gradient() -> None:
    l = torch.tensor(0.7, dtype=D, requires_grad=True)  # noqa: E741
    want = torch.autograd.grad(loss(ridge_solution(l)), l)[0]
    for method in (GradientDescent(), FISTA(), LBFGS()):
        w = minimize(ridge, torch.zeros(4, dtype=D), l, method=method, grad=Unroll())
        torch.testing.assert_close(torch.autograd.grad(loss(w), l)[0], want, rtol=1e-6, atol=1e-7)


def test_compiled_training_step() -> None:
    z0 = ridge_solution(torch.tensor(0.7, dtype=D))

    def f(l: Tensor) -> Tensor:  # noqa: E741
        return loss(attach(z0, stationary(ridge), l, check=False))

    l = torch.tensor(0.7, dtype=D, requires_grad=True)  # noqa: E741
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(l), l), torch.autograd.grad(f(l), l), rtol=1e-10, atol=1e-12
    )


# --- pytrees, samples, options ----------------------------------------------------------------------------------------


def test_pytrees_aux_and_keywords() -> None:
    def f(z: dict[str, Tensor], a: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor]:
        value = ((z["x"] - a) ** 2).sum() + (z["y"] - b) ** 2 + z["x"].sum() * z["y"] / 2
        return value, z["y"]

    a, b = normal(2, 2).requires_grad_(), torch.tensor(0.5, dtype=D, requires_grad=True)
    z0 = {"x": torch.zeros(2, 2, dtype=D), "y": torch.tensor(0.0, dtype=D)}
    for method in (LBFGS(), Newton(), FISTA()):
        z, aux, info = minimize(f, z0, a, b=b, method=method, has_aux=True, info=True)
        y = (2 * b - a.sum() / 2) / (2 - 0.5)  # elimination of x = a - y/4
        torch.testing.assert_close(z["y"], y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(z["x"], a - y / 4, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(z["x"].sum(), b)[0], torch.tensor(-4 / 3, dtype=D))
        assert not aux.requires_grad
        assert info.converged.shape == ()


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_samples_converge_by_themselves(method: Any) -> None:
    scale = torch.tensor([[1.0, 1.0, 1.0], [1.0, 3.0, 9.0], [1.0, 30.0, 60.0]], dtype=D)
    c = normal(3, 3).requires_grad_()

    def f(z: Tensor, scale: Tensor, c: Tensor) -> Tensor:
        return (scale * (z - c) ** 2 + (z - c) ** 4).sum(-1)

    z, info = minimize(f, torch.zeros(3, 3, dtype=D), scale, c, method=method, batch_dims=1, info=True)
    torch.testing.assert_close(z, c, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss(z), c)[0], torch.autograd.grad(loss(c), c)[0])
    assert info.iterations.shape == (3,)
    for i in range(3):
        start = torch.zeros(1, 3, dtype=D)
        alone, single = minimize(f, start, scale[i : i + 1], c[i : i + 1], method=method, batch_dims=1, info=True)
        assert torch.equal(alone[0], z[i])
        assert single.iterations[0] == info.iterations[i]


def test_failures() -> None:
    with pytest.raises(ConvergenceError, match=r"GradientDescent.*did not converge.*max_iter"):
        minimize(rosenbrock, torch.zeros(2, dtype=D), method=GradientDescent(), max_iter=5)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        minimize(rosenbrock, torch.zeros(2, dtype=D), max_iter=2, on_fail="warn")
    assert minimize(rosenbrock, torch.zeros(2, dtype=D), max_iter=2, on_fail="nan").isnan().all()
    assert minimize(rosenbrock, torch.zeros(2, dtype=D), max_iter=2, on_fail="ignore").isfinite().all()
    with pytest.raises(ConvergenceError):  # unbounded below
        minimize(lambda z: z.sum(), torch.zeros(2, dtype=D))
    c = torch.tensor(1.0, dtype=D, requires_grad=True)
    flat = minimize(lambda z, c: (z[0] - c) ** 2 + 0 * z[1], torch.zeros(2, dtype=D), c)
    with pytest.raises(ConvergenceError, match="singular"):
        flat.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: minimize(rosenbrock, z, method="lbfgs"), TypeError, "LBFGS.*'lbfgs'"),
        (lambda z: minimize(rosenbrock, z, proj=torch.relu), ValueError, "LBFGS takes neither"),
        (lambda z: minimize(rosenbrock, z, method=FISTA(), proj=torch.relu, prox=torch.relu), ValueError, "not both"),
        (lambda z: minimize(lambda z: z, z), ValueError, r"shape \(2,\).*\(\)"),
        (lambda z: minimize(lambda z: 3.0, z), TypeError, "float"),
        (lambda z: minimize(lambda z: torch.zeros(()), z), ValueError, "depend"),
        (lambda z: minimize("f", z), TypeError, "str"),
        (lambda z: minimize(rosenbrock, z, max_iter=0), ValueError, "max_iter"),
        (lambda z: minimize(lambda z: z.log().sum(), z - 1), ValueError, "not finite"),
        (lambda z: FISTA(step_size=-1.0), ValueError, "step_size"),
        (lambda z: LBFGS(memory=0), ValueError, "memory"),
    ],
)
def test_bad_arguments(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, dtype=D))


def test_methods_are_values() -> None:
    for method in (LBFGS(memory=4), FISTA(step_size=0.1), GradientDescent(), MirrorDescent()):
        assert repr(pickle.loads(pickle.dumps(method))) == repr(copy.deepcopy(method)) == repr(eval(repr(method)))


# --- hypergradients ---------------------------------------------------------------------------------------------------


def test_hypergradient() -> None:
    def outer(w: Tensor, l: Tensor, *_: Any) -> Tensor:  # noqa: E741
        return loss(w) ** 2 + l.sum() ** 2

    l = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=D)  # noqa: E741
    w = ridge_solution(l)
    got = hypergradient(outer, stationary(ridge), w, l)
    want = grad(lambda l: outer(ridge_solution(l), l))(l)  # noqa: E741
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(hypergradient(outer, stationary(ridge), w, l, linear=CG()), want, rtol=1e-9, atol=1e-9)
    batch = torch.stack([l, 2 * l])
    each = vmap(lambda l: hypergradient(outer, stationary(ridge), ridge_solution(l), l))(batch)  # noqa: E741
    torch.testing.assert_close(each, vmap(grad(lambda l: outer(ridge_solution(l), l)))(batch))  # noqa: E741

    def inner(w: Tensor, l: Tensor, tag: str, other: Tensor) -> Tensor:  # noqa: E741
        return stationary(ridge)(w, l)

    got = hypergradient(outer, inner, w, l, "tag", torch.ones(3, dtype=D))
    torch.testing.assert_close(got[0], want, rtol=1e-9, atol=1e-10)
    assert got[1] is None
    assert torch.equal(got[2], torch.zeros(3, dtype=D))
    with pytest.raises(ConvergenceError, match="not a solution"):
        hypergradient(outer, stationary(ridge), w + 0.1, l)
    with pytest.raises(ValueError, match="hyperparameters"):
        hypergradient(outer, stationary(ridge), w)
    with pytest.raises(ValueError, match="one number"):
        hypergradient(lambda w, _: w, stationary(ridge), w, l)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_search_that_ends_in_rounding_ends_the_iteration(batch_dims: int) -> None:
    """At a kink no step falls, however short: the sample fails at once instead of at max_iter."""
    calls = 0

    def kink(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (z - 1 / 3).abs().sum(-1) + 1e-3 * (z[..., 0] - 2) ** 2

    z0 = torch.tensor([[0.0, 0.1], [5.0, -3.0]], dtype=D)
    options = {"method": LBFGS(), "rtol": 1e-12, "batch_dims": batch_dims, "on_fail": "ignore", "info": True}
    z, info = minimize(kink, z0 if batch_dims else z0[1], **options)
    assert not info.converged.any()
    assert calls < 500
    torch.testing.assert_close(z, torch.full_like(z, 1 / 3))


def test_a_search_that_ends_at_the_minimum_converges() -> None:
    """rtol = 0 cannot be met; what differs from the solution by rounding alone has converged all the same."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 8, 4, generator=generator, dtype=D) * torch.logspace(0, -2, 4, dtype=D)
    y = torch.rand(40, 8, generator=generator, dtype=D)

    def logistic(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        eta = (X @ w.unsqueeze(-1)).squeeze(-1)
        return (torch.nn.functional.softplus(eta) - y * eta).sum(-1) + 1e-3 * w.square().sum(-1)

    zero, exact = torch.zeros(40, 4, dtype=D), {"rtol": 0.0, "atol": 0.0, "method": LBFGS()}
    together = minimize(logistic, zero, X, y, batch_dims=1, **exact)
    alone = torch.stack([minimize(logistic, zero[i], X[i], y[i], **exact) for i in range(40)])
    by_newton = minimize(logistic, zero, X, y, batch_dims=1, method=Newton())
    torch.testing.assert_close(together, by_newton, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(alone, by_newton, rtol=1e-8, atol=1e-8)
