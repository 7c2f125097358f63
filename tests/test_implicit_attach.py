"""attach: any computed solution gets the derivatives of the implicit function theorem, of every order and mode."""

from __future__ import annotations

import copy
import gc
import math

import numpy as np
import pytest
import torch
from oracles import loss, normal
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import implicit

F64 = torch.float64


def tanh_map(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(W @ z + b)


def iterated(W: Tensor, b: Tensor, steps: int = 200) -> Tensor:
    """The fixed point by unrolling: the oracle of values and gradients."""
    z = torch.zeros_like(b)
    for _ in range(steps):
        z = tanh_map(z, W, b)
    return z


def attached(W: Tensor, b: Tensor, **options) -> Tensor:
    z = iterated(W.detach(), b.detach())
    return implicit.attach(z.detach(), lambda z, W, b: z - tanh_map(z, W, b), W, b, **options)


def problem(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    W = normal(n, n, seed=seed)
    return (0.6 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_(), normal(n, seed=seed + 1).requires_grad_()


def gradients(f, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(f(*inputs)), inputs)


def close(got, want, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def test_gradcheck_of_both_orders() -> None:
    W, b = problem(3)
    assert gradcheck(attached, (W, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(attached, (W, b), check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize(
    "linear", [implicit.LU(), implicit.LstSq(), implicit.GMRES(), implicit.NormalCG(), implicit.Neumann()]
)
def test_every_linear_solver_gives_the_same_derivatives(linear) -> None:
    W, b = problem()
    close(gradients(lambda W, b: attached(W, b, linear=linear), W, b), gradients(iterated, W, b))
    assert gradgradcheck(lambda W, b: attached(W, b, linear=linear), (W, b))


def test_torch_func() -> None:
    W, b = (t.detach() for t in problem(3))
    v = normal(3, seed=7)
    f = torch.func

    def both(transform) -> None:
        close(transform(attached), transform(iterated))

    both(lambda g: f.grad(lambda b: loss(g(W, b)))(b))
    both(lambda g: f.jacrev(g, argnums=(0, 1))(W, b))
    both(lambda g: f.jacfwd(g, argnums=(0, 1))(W, b))
    both(lambda g: f.jvp(lambda b: g(W, b), (b,), (v,)))
    both(lambda g: f.hessian(lambda b: loss(g(W, b)))(b))
    both(lambda g: f.jacfwd(f.jacfwd(lambda b: loss(g(W, b))))(b))
    both(lambda g: f.jacrev(f.jacrev(lambda W: loss(g(W, b))))(W))
    both(lambda g: f.jacrev(f.jacfwd(f.jacrev(lambda b: loss(g(W, b)))))(b))
    rows = torch.stack([b, 2 * b, -b])
    both(lambda g: f.vmap(lambda b: g(W, b))(rows))
    both(lambda g: f.vmap(f.grad(lambda b: loss(g(W, b))))(rows))
    both(lambda g: f.vmap(f.hessian(lambda b: loss(g(W, b))))(rows))
    both(lambda g: f.vmap(f.vmap(lambda b: g(W, b)))(rows[None]))


def test_autograd_on_top_of_torch_func() -> None:
    W, b = problem(3)

    def outer(g) -> tuple[Tensor, ...]:
        inner = torch.func.grad(lambda b: loss(g(W, b)))(b)
        (second,) = torch.autograd.grad(loss(inner), W, create_graph=True)
        return torch.autograd.grad(loss(second), (W, b))

    close(outer(attached), outer(iterated))


def test_vectorized_functional_hessian() -> None:
    W, b = problem(3)
    hessian = torch.autograd.functional.hessian
    close(
        hessian(lambda b: loss(attached(W, b)), b, vectorize=True),
        hessian(lambda b: loss(iterated(W, b)), b, vectorize=True),
    )


def chain(f, x: Tensor, order: int) -> list[Tensor]:
    out = [f(x)]
    for _ in range(order):
        out.append(torch.autograd.grad(out[-1], x, create_graph=True)[0])
    return [t.detach() for t in out]


def test_kepler_to_the_fourth_order() -> None:
    """E - e sin E = M: with c = 1 - e cos E, dE/dM = 1/c, and d/dM = (1/c) d/dE again and again."""
    E, e = 1.2880913132118377, 0.3
    M = torch.tensor(1.0, dtype=F64, requires_grad=True)
    x = torch.tensor(E, dtype=F64, requires_grad=True)
    want, c = [x], 1 - e * torch.cos(x)
    for _ in range(4):
        want.append(torch.autograd.grad(want[-1], x, create_graph=True)[0] / c)
    assert want[1].item() == pytest.approx(1.0913293011504175, abs=1e-13)
    got = chain(lambda M: implicit.attach(E, lambda E, M: E - e * torch.sin(E) - M, M), M, 4)
    for g, w in zip(got, want, strict=True):
        assert g.item() == pytest.approx(w.item(), abs=1e-9)
    e_leaf = torch.tensor(e, dtype=F64, requires_grad=True)
    dE = torch.autograd.grad(implicit.attach(E, lambda E: E - e_leaf * torch.sin(E) - 1), e_leaf)[0]
    assert dE.item() == pytest.approx(1.0480083050499363, abs=1e-13)


def test_scalar_equilibrium_to_the_third_order() -> None:
    """z = tanh(a z + b): with s = 1 - z^2, dz/db = s / (1 - a s) =: g(z), and d/db = g d/dz."""
    z0, a = 0.50083188766986503, 0.5
    b = torch.tensor(0.3, dtype=F64, requires_grad=True)
    z = torch.tensor(z0, dtype=F64, requires_grad=True)
    g = (1 - z * z) / (1 - a * (1 - z * z))
    want = [z]
    for _ in range(3):
        want.append(torch.autograd.grad(want[-1], z, create_graph=True)[0] * g)
    assert want[1].item() == pytest.approx(1.1978700146562403, abs=1e-12)
    assert want[2].item() == pytest.approx(-3.0675615391162819, abs=1e-12)
    got = chain(lambda b: implicit.attach(z0, lambda z, b: z - torch.tanh(a * z + b), b), b, 3)
    forward = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(
        lambda b: implicit.attach(z0, lambda z, b: z - torch.tanh(a * z + b), b))))(b.detach())  # fmt: skip
    for have, w in zip([*got, forward], [*want, want[3]], strict=True):
        assert have.item() == pytest.approx(w.item(), abs=1e-9)


def test_ridge_regression_to_the_third_order() -> None:
    X, y = normal(8, 3), normal(8, seed=1)
    H, rhs = X.T @ X, X.T @ y
    lam = torch.tensor(0.7, dtype=F64, requires_grad=True)
    eye = torch.eye(3, dtype=F64)
    w = torch.linalg.solve(H + 0.7 * eye, rhs)
    got = chain(lambda t: loss(implicit.attach(w, lambda w, t: H @ w + t * w - rhs, t)), lam, 3)
    power = torch.linalg.inv(H + 0.7 * eye)
    for k in range(4):
        want = loss((-1) ** k * math.factorial(k) * torch.linalg.matrix_power(power, k) @ w)
        close(got[k], want, 1e-9)


# --- what may be an unknown and an argument ---------------------------------------------------------------------------


def test_pytrees_of_mixed_shapes_keywords_and_other_arguments() -> None:
    a, b = torch.tensor(2.0, dtype=F64, requires_grad=True), normal(2, 3).abs().add(1).requires_grad_()
    unused = normal(2).requires_grad_()

    def residual(z, params, power, *, scale, name):
        assert name == "cube"
        return {"s": z["s"] ** 2 - params["a"] * scale, "m": (z["m"][0] ** power - params["list"][0] * z["s"] * scale,)}

    def solution(a: Tensor, b: Tensor):
        s = (3 * a).sqrt()
        return {"s": s, "m": ((b * s * 3) ** (1 / 3),)}

    def solved(a: Tensor, b: Tensor):
        params = {"a": a, "list": [b, unused], "flag": True, "none": None}
        z = torch.utils._pytree.tree_map(lambda t: t.detach(), solution(a, b))
        return implicit.attach(z, residual, params, 3, scale=3.0, name="cube")

    got, want = solved(a, b), solution(a, b)
    assert got["s"].shape == ()
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for pick in (lambda z: loss(z["s"]), lambda z: loss(z["m"][0])):
        close(torch.autograd.grad(pick(got), (a, b), **options), torch.autograd.grad(pick(want), (a, b), **options))
    assert torch.autograd.grad(loss(solved(a, b)["s"]), unused, allow_unused=True)[0] is None
    assert gradgradcheck(lambda a, b: solved(a, b)["m"][0], (a, b))


def test_closed_over_tensors_that_depend_on_one_another() -> None:
    c = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)

    def solved(c: Tensor) -> Tensor:
        w = c * c
        u = w * 2
        return implicit.attach((w * u).detach() ** (1 / 3), lambda z, w: z**3 - w * u, w)

    assert gradcheck(solved, (c,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solved, (c,))
    close(gradients(solved, c)[0], gradients(lambda c: (2 * c**4) ** (1 / 3), c)[0])


def test_module_parameters_are_found() -> None:
    layer = nn.Linear(3, 3).to(F64)
    nn.init.orthogonal_(layer.weight, gain=0.5)
    x = normal(3, seed=3).requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(layer(z) + x)

    z = torch.zeros(3, dtype=F64)
    for _ in range(200):
        z = f(z)
    inputs = (layer.weight, layer.bias, x)
    want = torch.autograd.grad(loss(z), inputs, create_graph=True)
    got = torch.autograd.grad(loss(implicit.attach(z, lambda z: z - f(z))), inputs, create_graph=True)
    close(got, want)
    close(torch.autograd.grad(loss(got[0]), inputs), torch.autograd.grad(loss(want[0]), inputs))


class Counted(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        Counted.calls += 1
        return g


def test_code_that_cannot_be_recorded_is_refused() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    scripted = torch.jit.script(nn.Linear(2, 2).to(F64))
    with pytest.raises(ValueError, match="cannot be recorded"):
        implicit.attach(torch.zeros(2, dtype=F64), lambda z: z + 0 * scripted(z))
    z = implicit.attach(torch.ones(2, dtype=F64), lambda z: z - Counted.apply(w))
    assert torch.equal(torch.autograd.grad(loss(z), w, retain_graph=True)[0], torch.autograd.grad(loss(w), w)[0])
    with pytest.raises(ValueError, match="cannot be recorded"):
        torch.autograd.grad(loss(z), w, create_graph=True)
    assert implicit.attach(torch.ones(2, dtype=F64), lambda z, w: z - Counted.apply(w), w).requires_grad


def test_frozen_arguments_are_never_differentiated() -> None:
    a, frozen = torch.tensor([4.0], dtype=F64, requires_grad=True), torch.tensor([2.0], dtype=F64)
    Counted.calls = 0
    z = implicit.attach(torch.tensor([2.0], dtype=F64), lambda z, a, w: z * Counted.apply(w) - a, a, frozen)
    z.sum().backward()
    assert Counted.calls == 0
    assert frozen.grad is None
    implicit.attach(
        torch.tensor([2.0], dtype=F64), lambda z, a, w: z * Counted.apply(w) - a, a, frozen.requires_grad_()
    ).sum().backward()
    assert Counted.calls == 1


@pytest.mark.parametrize("make", [float, np.asarray, torch.as_tensor])
def test_results_from_outside(make) -> None:
    a = torch.tensor(4.0, dtype=F64, requires_grad=True)
    z = implicit.attach(make(2.0), lambda z, a: z * z - a, a)
    assert torch.autograd.grad(z, a)[0].item() == 0.25


def test_batch_dims_is_a_loop_over_samples() -> None:
    W, _ = problem()
    rows = normal(3, 2, 4, seed=5).requires_grad_()
    z = torch.stack([iterated(W, row) for row in rows.reshape(-1, 4)]).reshape(3, 2, 4)

    def residual(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return z - torch.tanh(z @ W.T + b)

    got = gradients(lambda W, b: implicit.attach(z, residual, W, b, batch_dims=2), W, rows)
    close(got, torch.autograd.grad(loss(z), (W, rows)))


# --- memory, graphs, effects ------------------------------------------------------------------------------------------


def test_two_calls_then_one_backward_and_two_backwards_of_one_graph() -> None:
    W, b = problem()
    single = gradients(attached, W, b)
    close(torch.autograd.grad(loss(attached(W, b)) + loss(attached(W, b)), (W, b)), tuple(2 * g for g in single))
    value = loss(attached(W, b))
    for _ in range(2):
        close(torch.autograd.grad(value, (W, b), retain_graph=True), single)


def test_nothing_outlives_a_thousand_calls() -> None:
    W, b = problem(2)

    def count() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    z = iterated(W, b).detach()
    before = 0
    gc.collect()
    gc.disable()
    try:  # freed by reference counts alone: there is no cycle
        for k in range(1010):
            value = loss(implicit.attach(z, lambda z, W, b: z - tanh_map(z, W, b), W, b))
            if k % 2:
                torch.autograd.grad(value, (W, b), create_graph=k % 4 == 1)
            del value
            if k == 9:
                before = count()
        assert count() == before
    finally:
        gc.enable()


def test_changing_an_argument_in_place_before_backward_raises() -> None:
    W, b = problem()
    weight = W.detach().clone().requires_grad_()
    z = attached(weight, b)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss(z).backward()


def test_the_caller_s_solution_is_neither_differentiated_nor_shared() -> None:
    z = torch.tensor([2.0], dtype=F64, requires_grad=True)
    a = torch.tensor([4.0], dtype=F64, requires_grad=True)
    out = implicit.attach(z, lambda z, a: z * z - a, a)
    assert out.data_ptr() != z.data_ptr()
    assert torch.autograd.grad(out.sum(), z, allow_unused=True)[0] is None
    with torch.no_grad():
        assert not implicit.attach(z, lambda z, a: z * z - a, a).requires_grad


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_step() -> None:
    layer = nn.Linear(3, 3).to(F64)
    nn.init.orthogonal_(layer.weight, gain=0.5)
    x = normal(5, 3, seed=3)
    with torch.no_grad():
        z = torch.zeros(5, 3, dtype=F64)
        for _ in range(100):
            z = torch.tanh(layer(z) + x)

    def step(layer: nn.Module, z: Tensor, x: Tensor) -> Tensor:
        return loss(implicit.attach(z, lambda z, x: z - torch.tanh(layer(z) + x), x, batch_dims=1))

    twin = copy.deepcopy(layer)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    step(layer, z, a).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(twin, z, b).backward()
    close(twin.weight.grad, layer.weight.grad, 1e-12)
    close(b.grad, a.grad, 1e-12)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_what_is_not_a_solution_is_refused() -> None:
    a = torch.tensor([4.0, 9.0], dtype=F64, requires_grad=True)
    wrong = torch.tensor([2.0, 3.001], dtype=F64)
    for scale in (1e-12, 1.0, 1e12):  # the units of the equation do not matter
        with pytest.raises(implicit.ConvergenceError, match="not a solution in samples \\[1\\]"):
            implicit.attach(wrong, lambda z, a, s=scale: s * (z * z - a), a, batch_dims=1)
        implicit.attach(wrong.round() + 1e-12, lambda z, a, s=scale: s * (z * z - a), a)
    assert implicit.attach(wrong, lambda z, a: z * z - a, a, check=False).requires_grad
    with pytest.raises(implicit.ConvergenceError, match="not a solution"), torch.no_grad():
        implicit.attach(wrong, lambda z, a: z * z - a, a)
    with pytest.raises(implicit.ConvergenceError, match="not a solution"):
        torch.func.grad(lambda a: implicit.attach(wrong, lambda z, a: z * z - a, a).sum())(a)


def test_batched_jacobians_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    A, b = normal(3, 5, 5) + 4 * torch.eye(5, dtype=F64), normal(3, 5, seed=1).requires_grad_()
    z = torch.linalg.solve(A, b.detach())

    def gradient() -> Tensor:
        out = implicit.attach(z, lambda z, b: (A @ z.unsqueeze(-1)).squeeze(-1) - b, b, batch_dims=1)
        return torch.autograd.grad(loss(out), b)[0]

    want = torch.linalg.solve(A.mT, torch.func.grad(loss)(z))
    for numbers in (1, 32, 1000):
        monkeypatch.setattr("implicit._jacobian.CHUNK", numbers)
        torch.testing.assert_close(gradient(), want, rtol=1e-12, atol=1e-12)
