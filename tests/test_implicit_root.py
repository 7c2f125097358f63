"""root: every method finds the root, says when it does not, and gives the same derivatives."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicit
from implicit import Bisection, Broyden, Chord, LevenbergMarquardt, Newton, root

F64 = torch.float64
METHODS = [Newton(), Newton(line_search=False), Chord(), LevenbergMarquardt(), Broyden(), Bisection(0.0, 3.0)]
ids = pytest.mark.parametrize("method", METHODS, ids=repr)


def kepler(E: Tensor, M: Tensor, e: Tensor) -> Tensor:
    return E - e * torch.sin(E) - M


@ids
def test_kepler(method) -> None:
    M, e = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 0.3))
    E, info = root(kepler, torch.tensor(1.0, dtype=F64), M, e=e, method=method, info=True)
    assert E.item() == pytest.approx(1.2880913132118377, abs=1e-11)
    dM, de = torch.autograd.grad(E, (M, e))
    assert dM.item() == pytest.approx(1.0913293011504175, abs=1e-10)
    assert de.item() == pytest.approx(1.0480083050499363, abs=1e-10)
    assert info.converged.item()
    assert 1 <= info.iterations.item() <= 60
    assert info.adjoint.converged.item()


@ids
def test_gradcheck_in_a_batch(method) -> None:
    M = torch.tensor([0.5, 1.0, 1.7], dtype=F64, requires_grad=True)
    e = torch.tensor([0.1, 0.3, 0.2], dtype=F64, requires_grad=True)

    def solved(M: Tensor, e: Tensor) -> Tensor:
        return root(kepler, torch.ones(3, dtype=F64), M, e, method=method, batch_dims=1, rtol=1e-14)

    assert gradcheck(solved, (M, e), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solved, (M, e))


@ids
def test_vmap_is_a_loop(method) -> None:
    M = torch.tensor([0.5, 1.0, 1.7], dtype=F64)

    def solved(M: Tensor) -> Tensor:
        return root(kepler, torch.tensor(1.0, dtype=F64), M, 0.3, method=method)

    for f in (solved, torch.func.grad(solved), torch.func.jacfwd(torch.func.grad(solved))):
        want = torch.stack([f(m) for m in M])
        torch.testing.assert_close(torch.func.vmap(f)(M), want, rtol=1e-10, atol=1e-10)


def cubes(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return z**3 + z - b * a.unsqueeze(-1)


@pytest.mark.parametrize("method", [*METHODS[:2], *METHODS[3:5], Bisection(-9.0, 9.0)], ids=repr)
def test_samples_are_independent_and_finished_ones_are_left_out(method) -> None:
    a, b = torch.linspace(0.01, 5, 24, dtype=F64), normal(24, 3)
    evaluated: list[int] = []

    def counted(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        evaluated.append(len(z))
        return cubes(z, a, b)

    options = {"method": method, "batch_dims": 1, "on_fail": "ignore", "info": True}
    z0 = torch.zeros(24, 3, dtype=F64)
    z, info = root(counted, z0, a, b, **options)
    alone, evaluated = sum(evaluated), []
    dropped, short = root(counted, z0, a, b, in_dims=(0, 0), **options)
    assert torch.equal(z, dropped)
    assert torch.equal(info.iterations, short.iterations)
    assert torch.equal(info.residual, short.residual)
    assert sum(evaluated) < alone or info.iterations.min() == info.iterations.max()
    for k in range(0, 24, 6):
        single, one = root(cubes, z0[:1], a[k : k + 1], b[k : k + 1], **options)
        assert torch.equal(single[0], z[k])
        assert torch.equal(one.iterations[0], info.iterations[k])


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e10])
def test_the_units_of_the_equation_do_not_matter(scale: float) -> None:
    for method in (Newton(), LevenbergMarquardt(), Broyden()):
        z = root(lambda z: scale * (torch.exp(z) - 3), torch.zeros(3, dtype=F64), method=method)
        torch.testing.assert_close(z, torch.full_like(z, 3.0).log(), rtol=1e-9, atol=0)


def test_starting_at_the_root_is_converged_at_rounding() -> None:
    z = torch.tensor([2.0], dtype=F64).sqrt()
    for method in (Newton(), LevenbergMarquardt(), Broyden(), Chord()):
        got, info = root(lambda z: z * z - 2, z, method=method, info=True)
        assert info.converged
        torch.testing.assert_close(got, z, rtol=1e-15, atol=0)


def test_line_search_reaches_where_full_steps_diverge() -> None:
    z0 = torch.tensor([3.0], dtype=F64)
    assert abs(root(torch.atan, z0, method=Newton()).item()) < 1e-10
    with pytest.raises(implicit.ConvergenceError):
        root(torch.atan, z0, method=Newton(line_search=False))


def test_newton_with_an_iterative_solver_and_large_systems() -> None:
    n = 700
    b = normal(n, seed=2).requires_grad_()

    def f(z: Tensor, b: Tensor) -> Tensor:
        return z + 0.02 * torch.roll(z, 1) ** 3 - b

    for linear in (implicit.Auto(), implicit.GMRES()):
        z = root(f, torch.zeros(n, dtype=F64), b, linear=linear)
        assert f(z, b).abs().max() < 1e-9
        (g,) = torch.autograd.grad(loss(z), b)
        J = torch.eye(n, dtype=F64) + torch.diag(0.06 * z.roll(1) ** 2).roll(-1, 1).detach()
        torch.testing.assert_close(J.T @ g, torch.autograd.grad(loss(z), z)[0], rtol=1e-8, atol=1e-8)


def test_bisection_of_brackets_with_roots_at_their_ends_and_at_zero() -> None:
    lower, upper = torch.tensor([-1.0, 0.0, -2.0], dtype=F64), torch.tensor([0.0, 5.0, 1.0], dtype=F64)
    z = root(lambda z: z**3, torch.zeros(3, dtype=F64) + 0.1, method=Bisection(lower, upper), atol=1e-30)
    assert (z.abs() <= 1e-30).all()
    z = root(lambda z: {"x": 1 - z["x"]}, {"x": torch.zeros(2, dtype=F64)}, method=Bisection(0.0, 3.0))
    torch.testing.assert_close(z["x"], torch.ones(2, dtype=F64), rtol=1e-11, atol=0)


# --- failures ---------------------------------------------------------------------------------------------------------


def no_root(z: Tensor, a: Tensor) -> Tensor:
    return z * z - a


A = torch.tensor([4.0, -1.0, 9.0], dtype=F64)


@pytest.mark.parametrize("method", [Newton(), LevenbergMarquardt(), Broyden()], ids=repr)
def test_failure_names_residual_tolerance_iterations_and_samples(method) -> None:
    text = r"root \(\w+\) did not converge in 1 of 3 samples \(1\): residual \d.*, tolerance \d.*, after \d+ iterations"
    with pytest.raises(implicit.ConvergenceError, match=text):
        root(no_root, torch.full((3,), 1.5, dtype=F64), A, method=method, batch_dims=1)


def test_policies() -> None:
    z0, a = torch.full((3,), 1.5, dtype=F64), A.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match="1 of 3 samples"):
        z = root(no_root, z0, a, batch_dims=1, on_fail="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored, info = root(no_root, z0, a, batch_dims=1, on_fail="ignore", info=True)
        marked = root(no_root, z0, a, batch_dims=1, on_fail="nan")
    assert torch.equal(z, ignored)
    assert info.converged.tolist() == [True, False, True]
    assert marked.isnan().tolist() == [False, True, False]
    (g,) = torch.autograd.grad(loss(marked), a)
    assert g.isnan().tolist() == [False, True, False]
    (want,) = torch.autograd.grad(loss(z), a)
    assert torch.equal(g[[0, 2]], want[[0, 2]])
    with pytest.raises(implicit.ConvergenceError):
        torch.func.vmap(lambda a: root(no_root, torch.tensor(1.5, dtype=F64), a))(A)


def test_singular_adjoint_follows_the_policy() -> None:
    a = torch.tensor([4.0, 0.0], dtype=F64, requires_grad=True)
    z0 = torch.tensor([2.0, 0.0], dtype=F64)

    def backward(on_fail: str) -> Tensor:
        return torch.autograd.grad(root(no_root, z0, a, batch_dims=1, on_fail=on_fail).sum(), a)[0]

    with pytest.raises(implicit.ConvergenceError, match="singular"):
        backward("raise")
    with pytest.warns(RuntimeWarning, match="singular"):
        backward("warn")
    assert backward("nan").isnan().tolist() == [False, True]


def test_bad_arguments_are_explained() -> None:
    z = torch.ones(2, dtype=F64)
    nan = torch.tensor([1.0, torch.nan], dtype=F64)
    for bad, error, text in [
        (lambda: root(lambda z: z, z, max_iter=0), ValueError, "max_iter must be a positive int"),
        (lambda: root(lambda z: z, z, rtol=-1.0), ValueError, "rtol"),
        (lambda: root(lambda z: z, z, on_fail="stop"), ValueError, "on_fail must be one of"),
        (lambda: root(lambda z: z, z, linear="LU"), TypeError, "linear must be"),
        (lambda: root(lambda z: z, z, grad="implicit"), TypeError, "grad must be"),
        (lambda: root(lambda z: z, z, grad=implicit.OneStep()), ValueError, "use fixed_point"),
        (lambda: root(lambda z: z[:1], z), ValueError, "one equation for each unknown"),
        (lambda: root(lambda z: nan, z), ValueError, "not finite"),
        (lambda: root(lambda z: nan, z, batch_dims=1), ValueError, r"not finite in 1 of 2 samples \(1\)"),
        (lambda: root(lambda z: z.mul_(2), z.clone()), ValueError, "in place"),
        (lambda: root(lambda z: z, z, has_aux=True), TypeError, "has_aux"),
        (lambda: root(lambda z: z, z, in_dims=(0,), batch_dims=1), ValueError, "in_dims"),
        (lambda: root(lambda z: z * z - 1, z * 0, method=Chord()), ValueError, "singular Jacobian at z0"),
        (lambda: root(lambda z: z, z, method=Bisection(1.0, 2.0)), ValueError, "same sign"),
        (lambda: root(lambda z: z - 1, z, method=Bisection(2.0, 3.0)), ValueError, "same sign"),
        (lambda: root(lambda z: z, z, method=implicit.Picard()), TypeError, "must be one of Newton, Broyden"),
        (lambda: root(lambda z: z, z, method=Bisection(-1.0, 2.0), grad=implicit.Unroll()), ValueError, "constant"),
        (lambda: root(lambda z: z, z, method=Bisection(2.0, -2.0)), ValueError, "lower <= upper"),
        (lambda: root(lambda z: z, z, method=Bisection(torch.ones(3), 2.0)), ValueError, "broadcast"),
        (lambda: LevenbergMarquardt(damping=0.0), ValueError, "damping"),
        (lambda: Broyden(memory=0), ValueError, "memory"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            bad()


# --- options ----------------------------------------------------------------------------------------------------------


def test_aux_and_info() -> None:
    a = torch.tensor(4.0, dtype=F64, requires_grad=True)
    z, aux, info = root(lambda z: (z * z - a, {"z": z}), torch.tensor(1.0, dtype=F64), has_aux=True, info=True)
    assert aux["z"].item() == z.item()
    assert not aux["z"].requires_grad
    assert info.adjoint is None
    assert torch.autograd.grad(z, a)[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("method", [Newton(), LevenbergMarquardt(), Broyden()], ids=repr)
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_unrolled_steps_have_nearly_the_implicit_derivative(method, checkpoint) -> None:
    a, b = torch.linspace(0.5, 2, 4, dtype=F64).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    options = {"method": method, "batch_dims": 1, "rtol": 1e-14}
    z0 = 0.3 * b.detach()

    def gradients(grad) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(root(cubes, z0, a, b, grad=grad, **options)), (a, b))

    want = gradients(implicit.Implicit())
    torch.testing.assert_close(gradients(implicit.Unroll(checkpoint)), want, rtol=1e-5, atol=1e-6)


def test_custom_root() -> None:
    calls = []

    @implicit.custom_root(lambda z, a, *, k: z**k - a, has_aux=True)
    def solver(z0, a, *, k):
        """any solver"""
        assert not a.requires_grad
        calls.append(z0)
        return torch.as_tensor(a.numpy() ** (1 / k)), "aux"

    a = torch.tensor([4.0, 9.0], dtype=F64, requires_grad=True)
    _, aux = solver(None, a, k=3)
    assert (aux, calls, solver.__doc__) == ("aux", [None], "any solver")
    assert gradcheck(lambda a: solver(None, a, k=3)[0], (a,))
    assert gradgradcheck(lambda a: solver(None, a, k=3)[0], (a,))

    wrong = implicit.custom_root(lambda z, a: z * z - a)(lambda z0, a: a)
    with pytest.raises(implicit.ConvergenceError, match="not a solution"):
        wrong(None, a)


@ids
def test_methods_can_be_copied(method) -> None:
    for twin in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert repr(twin) == repr(method)
        assert hash(twin)
    with pytest.raises(AttributeError):
        method.anything = 1
