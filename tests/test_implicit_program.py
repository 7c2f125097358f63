"""implicit.program against closed forms, cone by cone, in values and in derivatives of every mode."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicit

F64 = torch.float64


class Case(NamedTuple):
    problem: Any
    parameters: list[Any]
    variables: list[Any]
    closed: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    quadratic: bool = False
    tol: float = 1e-9


def symmetric(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def sparsemax() -> Case:
    y, theta = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(theta @ y - cp.sum_squares(y) / 2), [y >= 0, cp.sum(y) == 1])

    def closed(t: Tensor) -> tuple[Tensor, ...]:
        s = t.sort(-1, descending=True).values
        tau = (s.cumsum(-1) - 1) / torch.arange(1, 5)
        support = (tau < s).sum(-1, keepdim=True)
        return ((t - tau.gather(-1, support - 1)).clamp(min=0),)

    return Case(problem, [theta], [y], closed, (normal(3, 4),), True)


def ridge() -> Case:
    x, A, b, r = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + r * cp.sum_squares(x)))

    def closed(A: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        H = A.mT @ A + r[..., None, None] * torch.eye(3)
        return (torch.linalg.solve(H, (A.mT @ b.unsqueeze(-1)).squeeze(-1)),)

    return Case(
        problem,
        [A, b, r],
        [x],
        closed,
        (normal(2, 5, 3), normal(2, 5, seed=1), torch.tensor([0.5, 2.0], dtype=F64)),
        True,
    )


def form() -> Case:
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x))
    root = normal(2, 3, 3)

    def closed(P: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return (-torch.linalg.solve(symmetric(P), q),)

    return Case(problem, [P, q], [x], closed, (root @ root.mT + torch.eye(3), normal(2, 3, seed=1)), True)


def lasso() -> Case:
    """On the support S with signs s: x_S = (A_S'A_S)^-1 (A_S'b - l s)."""
    x, b, level = cp.Variable(3), cp.Parameter(6), cp.Parameter(nonneg=True)
    A = normal(6, 3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A.numpy() @ x - b) / 2 + level * cp.norm1(x)))

    S, signs = A[:, [0, 2]], torch.tensor([-1.0, 1.0], dtype=F64)

    def closed(b: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        kept = torch.linalg.solve(S.mT @ S, S.mT @ b - level * signs)
        return (torch.stack([kept[0], 0 * kept[0], kept[1]]),)

    return Case(
        problem,
        [b, level],
        [x],
        closed,
        (A @ torch.tensor([-1.5, 0.0, 1.2], dtype=F64) + 0.01 * normal(6, seed=4), torch.tensor(0.7, dtype=F64)),
    )


def vertex() -> Case:
    """A linear programme: max x_1 + x_2 where the first two rows of Ax <= b meet."""
    x, b = cp.Variable(2), cp.Parameter(3)
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0], [-1.0, -1.0]], dtype=F64)
    problem = cp.Problem(cp.Maximize(cp.sum(x)), [A.numpy() @ x <= b])
    b0 = torch.tensor([[4.0, 6.0, 0.0], [3.0, 5.0, 1.0]], dtype=F64)
    return Case(problem, [b], [x], lambda b: (b[..., :2] @ A[:2].inverse().mT,), (b0,))


def ball() -> Case:
    x, theta, r = cp.Variable(4), cp.Parameter(4), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - theta)), [cp.norm(x) <= r])

    def closed(t: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        return (t * torch.minimum(torch.ones(()), r.unsqueeze(-1) / t.norm(dim=-1, keepdim=True)),)

    return Case(problem, [theta, r], [x], closed, (normal(3, 4), torch.tensor([0.5, 1.0, 9.0], dtype=F64)))


def psd() -> Case:
    X, theta = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - theta)), [X >> 0])

    def closed(t: Tensor) -> tuple[Tensor, ...]:
        values, vectors = torch.linalg.eigh(symmetric(t))
        return (vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT,)

    return Case(problem, [theta], [X], closed, (symmetric(normal(2, 3, 3, seed=3)),))


def softmax() -> Case:
    y, theta = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(theta @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1])
    return Case(problem, [theta], [y], lambda t: (torch.softmax(t, -1),), (2 * normal(3, 4),))


def log_barrier() -> Case:
    """min <c, x> - sum log x: x = 1/c."""
    x, c = cp.Variable(3), cp.Parameter(3, nonneg=True)
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.log(x))))
    return Case(problem, [c], [x], lambda c: (1 / c,), (normal(2, 3).abs() + 0.3,))


def cobb_douglas() -> Case:
    """max x^a y^(1-a) where p x + q y = 1: x = a/p, y = (1 - a)/q."""
    x, p = cp.Variable(3), cp.Parameter(2, nonneg=True)
    problem = cp.Problem(cp.Maximize(x[2]), [p @ x[:2] == 1, cp.PowCone3D(x[0], x[1], x[2], 0.3)])

    def closed(p: Tensor) -> tuple[Tensor, ...]:
        good = torch.tensor([0.3, 0.7], dtype=F64) / p
        return (torch.cat([good, good[..., :1] ** 0.3 * good[..., 1:] ** 0.7], -1),)

    return Case(problem, [p], [x], closed, (torch.tensor([[0.5, 2.0], [1.0, 0.2]], dtype=F64),))


def two_variables() -> Case:
    """Shapes and order: a matrix, a number and a diagonal, each returned."""
    M, t, D = cp.Variable((2, 3)), cp.Variable(), cp.Variable((2, 2), diag=True)
    A, d = cp.Parameter((2, 3)), cp.Parameter((2, 2), diag=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(M - A) + cp.square(t - A[1, 2]) + cp.sum_squares(D - d)), [M >= 0])
    return Case(
        problem,
        [A, d],
        [t, M, D],
        lambda A, d: (A[..., 1, 2], A.clamp(min=0), torch.diag_embed(d.diagonal(dim1=-2, dim2=-1))),
        (normal(2, 2, 3), torch.diag_embed(normal(2, 2, seed=1))),
        True,
    )


CASES = {
    f.__name__: f
    for f in (sparsemax, ridge, form, lasso, vertex, ball, psd, softmax, log_barrier, cobb_douglas, two_variables)
}


def layer(case: Case, **options: Any) -> implicit.Program:
    return implicit.program(case.problem, case.parameters, case.variables, **options)


def lowered(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """Weighted sums of the answers of both, and inputs which keep a declared symmetry or diagonal when they move."""
    program = layer(case)

    def repaired(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        out = []
        for p, t in zip(case.parameters, tensors, strict=True):
            square = p.attributes["symmetric"] or p.attributes["PSD"]
            t = symmetric(t) if square else t
            out.append(torch.diag_embed(t.diagonal(dim1=-2, dim2=-1)) if p.attributes["diag"] else t)
        return out

    def weighed(answers: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(a * cotangent(a)).sum() for a in answers]).sum()

    return (
        lambda *t: weighed(program(*repaired(t))),
        lambda *t: weighed(case.closed(*repaired(t))),
        tuple(t.clone().requires_grad_() for t in case.inputs),
    )


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_by_closed_form(name: str) -> None:
    case = CASES[name]()
    program = layer(case)
    assert program.quadratic == case.quadratic
    for found, exact in zip(program(*case.inputs), case.closed(*case.inputs), strict=True):
        torch.testing.assert_close(found, exact, rtol=case.tol, atol=case.tol)
    ours, exact, inputs = lowered(case)
    mine, true = torch.autograd.grad(ours(*inputs), inputs), torch.autograd.grad(exact(*inputs), inputs)
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_every_mode(name: str) -> None:
    ours, exact, inputs = lowered(CASES[name]())
    assert gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True)
    if name != "vertex":  # whose second derivatives vanish
        assert gradgradcheck(ours, inputs)
    every = tuple(range(len(inputs)))
    detached = tuple(t.detach() for t in inputs)
    hessian, true = (torch.func.hessian(f, argnums=every)(*detached) for f in (ours, exact))
    for row, expected in zip(hessian, true, strict=True):
        for a, b in zip(row, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sparsemax", "ball", "softmax"])
def test_vmap_and_compile(name: str) -> None:
    case = CASES[name]()
    program = layer(case)
    (expected,) = program(*case.inputs)
    torch.testing.assert_close(torch.func.vmap(program)(*case.inputs)[0], expected)
    compiled = torch.compile(lambda *t: program(*t)[0], fullgraph=True, backend="aot_eager")
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs)
    torch.testing.assert_close(compiled(*case.inputs), expected)
    weights = cotangent(expected)
    found = torch.autograd.grad((compiled(*inputs) * weights).sum(), inputs)
    known = torch.autograd.grad((program(*inputs)[0] * weights).sum(), inputs)
    torch.testing.assert_close(found, known)


def test_leading_dims_shared_parameters_and_empty_batches() -> None:
    case = ball()
    program = layer(case)
    theta, r = normal(2, 1, 4), torch.tensor([0.5, 1.0, 9.0], dtype=F64)
    (found,) = program(theta, r)
    assert found.shape == (2, 3, 4)
    torch.testing.assert_close(found, case.closed(theta.expand(2, 3, 4), r.expand(2, 3))[0])
    shared = torch.tensor(0.5, dtype=F64, requires_grad=True)
    torch.autograd.grad(program(theta, shared)[0].sum(), shared)[0]
    assert program(theta[0, 0], shared)[0].shape == (4,)
    empty = normal(0, 4).requires_grad_()
    out = program(empty, shared)[0]
    assert out.shape == (0, 4)
    assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 4)


def test_float32_in_float32_out() -> None:
    case = ball()
    program = layer(case)
    inputs = tuple(t.float().requires_grad_() for t in case.inputs)
    (found,) = program(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, case.closed(*inputs)[0])
    assert torch.autograd.grad(found.sum(), inputs)[0].dtype == torch.float32
    assert program(case.inputs[0].float(), case.inputs[1])[0].dtype == F64


@pytest.mark.parametrize("name", ["ball", "psd", "softmax", "cobb_douglas", "lasso"])
def test_scs_reaches_the_same(name: str) -> None:
    case = CASES[name]()
    for found, exact in zip(
        layer(case, solver=implicit.SCS(eps=1e-7))(*case.inputs), case.closed(*case.inputs), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ball", "psd", "softmax"])
def test_agrees_with_cvxpylayers(name: str) -> None:
    from cvxpylayers.torch import CvxpyLayer

    case = CASES[name]()
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs)
    (theirs,) = CvxpyLayer(case.problem, parameters=case.parameters, variables=case.variables)(*inputs)
    (ours,) = layer(case)(*inputs)
    weights = symmetric(normal(*ours.shape)) if name == "psd" else normal(*ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, theirs)), strict=True):
        a, b = (symmetric(a), symmetric(b)) if name == "psd" else (a, b)
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_a_redundant_constraint_changes_nothing() -> None:
    y, theta = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(theta @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1, 2 * cp.sum(y) == 2])
    t = normal(2, 4).requires_grad_()
    found, exact = implicit.program(problem, [theta], [y])(t)[0], torch.softmax(t, -1)
    weights = normal(2, 4, seed=1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    mine, true = (torch.autograd.grad((v * weights).sum(), t)[0] for v in (found, exact))
    torch.testing.assert_close(mine, true, rtol=0, atol=1e-9)


def test_a_flat_face_of_the_exponential_cone() -> None:
    y, theta = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(theta @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1, y[0] == 0])
    t = normal(2, 4)
    found = implicit.program(problem, [theta], [y])(t)[0]
    assert found[:, 0].abs().max() < 1e-5
    torch.testing.assert_close(found[:, 1:], torch.softmax(t[:, 1:], -1), rtol=0, atol=1e-5)  # a degenerate solution


def test_a_linear_programme_by_the_simplex_method_ends_in_a_vertex() -> None:
    y, theta = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Maximize(theta @ y), [y >= 0, cp.sum(y) == 1])
    ties = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.2, 0.3]], dtype=F64)
    (found,) = implicit.program(problem, [theta], [y], implicit.HiGHS())(ties)
    assert ((found == 0) | (found == 1)).all()
    assert torch.equal((found * ties).sum(-1), ties.amax(-1))
    (centre,) = implicit.program(problem, [theta], [y])(ties)
    assert ((centre > 0.1) & (centre < 0.9)).sum() == 5


def test_copies_and_pickles() -> None:
    case = softmax()
    program = layer(case)
    for other in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert torch.equal(other(*case.inputs)[0], program(*case.inputs)[0])
        torch.testing.assert_close(torch.func.vmap(other)(*case.inputs)[0], program(*case.inputs)[0])


def test_nothing_of_the_callers_is_changed() -> None:
    case = ball()
    case.variables[0].value = [1.0, 2.0, 3.0, 4.0]
    layer(case)(*case.inputs)
    assert case.variables[0].value.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert all(p.value is None for p in case.parameters)


def test_the_import_is_lazy() -> None:
    code = "import sys, implicit; assert not {'cvxpy', 'cvxpylayers', 'scipy', 'clarabel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["ball", "psd", "softmax", "cobb_douglas"])
def test_samples_do_not_see_each_other(name: str) -> None:
    case = CASES[name]()
    program = layer(case)
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs)
    (together,) = program(*inputs)
    slopes = torch.autograd.grad((together * cotangent(together)).sum(), inputs)
    for i in range(len(together)):
        (alone,) = program(*(t[i : i + 1] for t in inputs))
        assert torch.equal(alone, together[i : i + 1])
        own = torch.autograd.grad((alone * cotangent(together)[i : i + 1]).sum(), inputs)
        for a, b in zip(own, slopes, strict=True):
            torch.testing.assert_close(a[i], b[i], rtol=0, atol=1e-15)
