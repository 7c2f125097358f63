"""implicit.program on problems without an answer, and on problems and tensors that it cannot take."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch
from oracles import cotangent, normal

import implicit

F64 = torch.float64


def conic(**options: Any) -> implicit.Program:
    """min |x - a| where |x| <= r and x_1 >= 1: infeasible for r < 1."""
    x, a, r = cp.Variable(3), cp.Parameter(3, name="a"), cp.Parameter(name="r")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= r, x[0] >= 1])
    return implicit.program(problem, [a, r], [x], **options)


def quadratic(**options: Any) -> implicit.Program:
    """min |x - a|^2 where 1 <= x <= r."""
    x, a, r = cp.Variable(3), cp.Parameter(3, name="a"), cp.Parameter(name="r")
    return implicit.program(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 1, x <= r]), [a, r], [x], **options)


RADII = torch.tensor([2.0, 0.5, 3.0, 1.5], dtype=F64)


@pytest.mark.parametrize("made", [conic, quadratic])
@pytest.mark.parametrize("solver", [implicit.Clarabel(), implicit.SCS()])
def test_infeasible_samples_raise(made: Any, solver: Any) -> None:
    with pytest.raises(implicit.ConvergenceError, match=r"1.*(contradict|infeasible)"):
        made(solver=solver)(normal(4, 3), RADII)
    with pytest.raises(implicit.ConvergenceError):
        torch.func.vmap(made(solver=solver))(normal(4, 3), RADII)


@pytest.mark.parametrize("made", [conic, quadratic])
def test_nan_marks_the_sample_and_leaves_the_others_alone(made: Any) -> None:
    a, clean = normal(4, 3).requires_grad_(), torch.tensor([0, 2, 3])
    (found,) = made(on_fail="nan")(a, RADII)
    (gradient,) = torch.autograd.grad((found * cotangent(found)).sum(), a)
    assert found[1].isnan().all()
    assert gradient[1].isnan().all()
    (expected,) = made()(a[clean], RADII[clean])
    known = torch.autograd.grad((expected * cotangent(found)[clean]).sum(), a)[0]
    torch.testing.assert_close(found[clean], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient[clean], known[clean], rtol=0, atol=1e-14)


def test_warn_and_ignore() -> None:
    with pytest.warns(RuntimeWarning, match="not solved in samples"):
        assert conic(on_fail="warn")(normal(4, 3), RADII)[0][1].isnan().all()
    assert (conic(on_fail="ignore")(normal(4, 3), RADII)[0][1] == 0).all()
    with pytest.raises(ValueError, match="on_fail must be one of"):
        conic(on_fail="hope")


def test_unbounded() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    program = implicit.program(cp.Problem(cp.Minimize(c @ x), [cp.norm(x[:1]) <= 1]), [c], [x])
    with pytest.raises(implicit.ConvergenceError, match="unbounded"):
        program(torch.ones(2))


def test_inaccurate_answers_are_refused() -> None:
    a = normal(2, 3)
    with pytest.raises(implicit.ConvergenceError, match=r"residual .* tolerance 1.0e-20.*'Solved'"):
        conic(tol=1e-20)(a, RADII[[0, 2]])


def test_cvxpylayers_hands_on_what_we_refuse() -> None:
    """With Clarabel it returns numbers for an infeasible problem, and no error."""
    from cvxpylayers.torch import CvxpyLayer

    x, a = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.norm(x - a)), [x >= 1, cp.norm(x) <= 1])
    program = implicit.program(problem, [a], [x])
    with pytest.raises(implicit.ConvergenceError, match="contradict"):
        program(torch.zeros(2))
    layer = CvxpyLayer(problem, parameters=[a], variables=[x], solver_args={"solve_method": "Clarabel"})
    try:
        (theirs,) = layer(torch.zeros(2, dtype=F64))
    except Exception:  # a later version may refuse as well
        return
    assert not ((theirs >= 1 - 1e-6).all() and theirs.norm() <= 1 + 1e-6)


def test_problems_that_are_not_dpp_are_explained() -> None:
    x, p, q = cp.Variable(2), cp.Parameter(2, name="p"), cp.Parameter(name="q")
    root = cp.Parameter((2, 2), PSD=True, name="S")
    bad = {
        r"'p \* .*q.*' is not affine.*product one new parameter": cp.sum_squares(x - cp.multiply(p, q)),
        r"Make 1 / parameter a new parameter": cp.norm(x / q),
        r"'exp\(q\).*' is not affine.*one parameter": cp.exp(q) * cp.norm(x),
        r"QuadForm.*sum_squares\(L @ x\)": cp.exp(cp.quad_form(x, root)),
    }
    for message, objective in bad.items():
        problem = cp.Problem(cp.Minimize(objective), [x >= 1])
        with pytest.raises(ValueError, match=message):
            implicit.program(problem, problem.parameters(), [x])


def test_problems_that_are_not_convex_are_explained() -> None:
    x, p = cp.Variable(2), cp.Parameter(2)
    with pytest.raises(ValueError, match=r"not convex.*norm|not convex.*Pnorm"):
        implicit.program(cp.Problem(cp.Minimize(p @ x), [cp.norm(x) >= 1]), [p], [x])
    z = cp.Variable(2, boolean=True)
    with pytest.raises(ValueError, match="integer"):
        implicit.program(cp.Problem(cp.Minimize(p @ z)), [p], [z])


def test_wrong_members() -> None:
    x, p, q = cp.Variable(2), cp.Parameter(2, name="p"), cp.Parameter(2, name="q")
    problem = cp.Problem(cp.Minimize(cp.norm(x - p) + cp.norm(x - q)))
    with pytest.raises(ValueError, match=r"missing \['q'\]"):
        implicit.program(problem, [p], [x])
    with pytest.raises(ValueError, match="not in the problem"):
        implicit.program(problem, [p, q], [cp.Variable(2)])
    with pytest.raises(TypeError, match="list of Variable"):
        implicit.program(problem, [p, q], [p])
    with pytest.raises(TypeError, match=r"Clarabel\(\.\.\.\)"):
        implicit.program(problem, [p, q], [x], solver="CLARABEL")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cvxpy\.Problem"):
        implicit.program(x, [p], [x])
    with pytest.raises(ValueError, match="tol must be a positive number"):
        implicit.Clarabel(tol=0)


def test_wrong_tensors() -> None:
    program = quadratic()
    with pytest.raises(TypeError, match="2 parameters"):
        program(torch.zeros(3))
    with pytest.raises(ValueError, match=r"parameter a has shape \(3,\).*\(4,\)"):
        program(torch.zeros(4), torch.tensor(2.0))
    with pytest.raises(ValueError, match="do not broadcast"):
        program(torch.zeros(2, 3), torch.ones(5))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        program(torch.zeros(3), 2.0)
    with pytest.raises(ValueError, match="a holds NaN"):
        program(torch.tensor([0.0, torch.nan, 0.0]), torch.tensor(2.0))


def test_declared_attributes_are_checked() -> None:
    x, r, S = cp.Variable(2), cp.Parameter(nonneg=True, name="r"), cp.Parameter((2, 2), PSD=True, name="S")
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, S) + r * cp.norm1(x)), [cp.sum(x) == 1])
    program = implicit.program(problem, [r, S], [x])
    with pytest.raises(ValueError, match="r was declared nonneg"):
        program(torch.tensor(-1.0), torch.eye(2))
    with pytest.raises(ValueError, match="S was declared symmetric"):
        program(torch.tensor(1.0), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="S was declared PSD"):
        program(torch.tensor(1.0), torch.diag(torch.tensor([1.0, -1.0])))
