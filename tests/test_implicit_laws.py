"""Laws of implicit differentiation: closed forms, failures, reports, and the modes in which torch may call."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.autograd import gradcheck

import implicit
from implicit import attach, fixed_point, gradient_report, root

F64 = torch.float64


def test_ill_conditioned_symmetric_system() -> None:
    """Condition 1e5: the relative error of the derivative is below 1e-6."""
    q = torch.linalg.qr(normal(40, 40, seed=5))[0]
    H = q @ torch.diag(torch.logspace(-5, 0, 40, dtype=F64)) @ q.T
    b = normal(40).requires_grad_()
    z = root(lambda z, b: H @ z - b, torch.zeros(40, dtype=F64), b)
    (got,) = torch.autograd.grad(loss(z), b)
    (v,) = torch.autograd.grad(loss(z), z)
    want = q @ torch.diag(torch.logspace(5, 0, 40, dtype=F64)) @ q.T @ v
    assert ((got - want).norm() / want.norm()).item() < 1e-6


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 6, 60])
@pytest.mark.parametrize("sign", [1, -1])
def test_contraction_of_a_scaled_rotation(n: int, sign: int) -> None:
    """A power iteration sees nothing of a rotation; Arnoldi gives its modulus."""
    angles = torch.linspace(0.3, 2.9, n // 2, dtype=F64)
    blocks = [torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=F64) for t in angles]
    q = torch.linalg.qr(normal(n, n, seed=n))[0]
    R, b = q @ torch.block_diag(*blocks) @ q.T, normal(n)
    M = torch.eye(n, dtype=F64) - 0.9 * R
    z = torch.linalg.solve(M, b)
    report = gradient_report(lambda z: sign * (z - 0.9 * R @ z - b), z)
    assert report.contraction.item() == pytest.approx(0.9, abs=1e-6)
    assert report.condition.item() == pytest.approx(torch.linalg.cond(M).item(), rel=1e-9)
    assert report.residual.item() < 1e-12
    assert report.adjoint.residual.item() < 1e-12


def test_report_of_each_sample_and_of_a_large_problem() -> None:
    a = torch.tensor([0.5, 0.99], dtype=F64)
    report = gradient_report(lambda z, a: (1 - a) * z - 1, 1 / (1 - a), a, batch_dims=1)
    torch.testing.assert_close(report.contraction, a)
    assert report.condition.tolist() == [1, 1]
    d = torch.linspace(0.1, 0.6, 700, dtype=F64)
    large = gradient_report(lambda z: z - d * z, torch.zeros(700, dtype=F64))
    assert large.contraction.item() == pytest.approx(0.6, rel=1e-2)
    assert 0.9 * 0.9 / 0.4 <= large.condition.item() <= 0.9 / 0.4 + 1e-9
    with pytest.raises(RuntimeError, match="call it outside"):
        torch.func.vmap(lambda z: gradient_report(torch.sin, z).residual)(torch.zeros(2, 3))


# --- modes ------------------------------------------------------------------------------------------------------------


def solve_all(a: Tensor) -> list[Tensor]:
    """z = tanh(z / 2 + a), by everything that solves it."""

    def f(z: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + a)

    z0 = torch.zeros_like(a)
    z = fixed_point(f, z0, a)
    return [
        z,
        root(lambda z, a: z - f(z, a), z0, a),
        implicit.Equilibrium(f, batch_dims=0)(a),
        attach(z, lambda z, a: z - f(z, a), a),
        implicit.custom_fixed_point(f)(lambda z0, a: z.detach())(None, a),
        fixed_point(f, z0, a, method=implicit.Broyden()),
        root(lambda z, a: z - f(z, a), z0, a, method=implicit.Chord()),
    ]


def test_no_grad_inference_mode_and_constant_arguments() -> None:
    a = normal(3, seed=8).requires_grad_()
    want = [z.detach() for z in solve_all(a)]
    with torch.no_grad():
        found = solve_all(a)
    found += solve_all(a.detach())
    assert not any(z.requires_grad for z in found)
    with torch.inference_mode():
        found += [fixed_point(lambda z: torch.tanh(0.5 * z + a), torch.zeros(3, dtype=F64))]
    for have, z in zip(found, [*want, *want, want[0]], strict=True):
        torch.testing.assert_close(have, z, rtol=0, atol=1e-10)


def test_all_solvers_agree_in_every_mode() -> None:
    a = normal(3, seed=8)
    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f: torch.func.jacfwd(torch.func.jacrev(f))):
        first, *others = [transform(lambda a, k=k: solve_all(a)[k])(a) for k in range(7)]
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_scalar_unknowns(shape: tuple[int, ...]) -> None:
    a = torch.ones(shape, dtype=F64, requires_grad=True)
    for z in solve_all(a):
        assert z.shape == shape
        assert torch.autograd.grad(z.sum(), a)[0].shape == shape


def test_threads_do_not_disturb_one_another() -> None:
    inputs = [normal(20, seed=k).requires_grad_() for k in range(4)]
    want = [torch.autograd.grad(loss(solve_all(a)[0]), a)[0] for a in inputs]
    got: dict[int, Tensor] = {}

    def work(k: int) -> None:
        got[k] = torch.autograd.grad(loss(solve_all(inputs[k])[0]), inputs[k])[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k in range(4):
        assert torch.equal(got[k], want[k])


def test_a_thousand_solves_leave_nothing_behind() -> None:
    a = normal(3).requires_grad_()
    before = 0
    gc.collect()
    gc.disable()
    try:  # freed by reference counts alone
        for k in range(1010):
            z, info = fixed_point(lambda z, a: torch.tanh(0.5 * z + a), torch.zeros(3, dtype=F64), a, info=True)
            torch.autograd.grad(loss(z), a, create_graph=k % 10 == 1)
            del z, info
            if k == 9:
                before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_gradients_only_for_what_needs_them() -> None:
    a, b = (torch.ones(2, dtype=F64, requires_grad=k) for k in (True, False))
    z = root(lambda z, a, b: z * b - a, torch.zeros(2, dtype=F64), a, b)
    z.sum().backward()
    assert b.grad is None
    assert gradcheck(lambda a: root(lambda z, a: z * b - a, torch.zeros(2, dtype=F64), a), (a,))


# --- failures of attach -----------------------------------------------------------------------------------------------


def test_singular_jacobians_are_reported_or_give_the_least_norm() -> None:
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    z = torch.tensor([0.5, 0.5], dtype=F64)

    def residual(z: Tensor, a: Tensor) -> Tensor:
        return torch.stack([z.sum() - a, 2 * z.sum() - 2 * a])

    with pytest.raises(implicit.ConvergenceError, match="singular"):
        attach(z, residual, a).prod().backward()
    with pytest.raises(implicit.ConvergenceError, match="singular"):
        torch.func.grad(lambda a: attach(z, residual, a).prod())(a)
    least = attach(z, residual, a, linear=implicit.LstSq())
    assert torch.autograd.grad(least[0], a)[0].item() == pytest.approx(0.5)


def test_bad_arguments_are_explained() -> None:
    z = torch.ones(2, dtype=F64)
    for bad, error, text in [
        (lambda: attach(z, lambda z: z.sum()), ValueError, "returned"),
        (lambda: attach(z, 3), TypeError, "expected a function"),
        (lambda: attach(torch.ones(2, dtype=torch.int64), lambda z: z), TypeError, "floating-point"),
        (lambda: attach("z", lambda z: z), TypeError, "must consist of tensors"),
        (lambda: attach((), lambda z: z), ValueError, "no tensors"),
        (lambda: attach(z, lambda z: z, batch_dims=-1), ValueError, "batch_dims"),
        (lambda: attach((z, torch.ones(3)), lambda z: z, batch_dims=1), ValueError, "differ"),
    ]:
        with pytest.raises(error, match=text):
            bad()


@pytest.mark.parametrize("derived", [False, True])
def test_tensors_that_are_read_only_near_the_solution_are_found(derived: bool) -> None:
    """The first evaluation closes over nothing; the one at the solution does."""
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    closed = w * w if derived else w

    def f(z: Tensor, a: Tensor) -> Tensor:
        return a + closed * z if z > 1 else a + z / 4

    z = fixed_point(f, torch.tensor(0.0, dtype=F64), a)
    gradients = torch.autograd.grad(z, (w, a), retain_graph=True)
    expected = torch.autograd.grad(a / (1 - closed), (w, a))
    torch.testing.assert_close(z.detach(), (a / (1 - closed)).detach())
    torch.testing.assert_close(gradients, expected)
