"""What implicit.qp says where there is no answer, and what the other problems of the batch get."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from oracles import normal
from torch import Tensor
from torch.func import vmap

from implicit import ConvergenceError, _qp_solve, qp

D = torch.float64
EYE = torch.eye(2, dtype=D)
ONES = torch.ones(1, 2, dtype=D)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_qp_solve, "has_numba", lambda: request.param == "compiled")
    return request.param


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=D)


C = vector(-1, -2)

# --- one bad problem among four ---------------------------------------------------------------------------------------


def four() -> tuple[list[Tensor], list[Tensor]]:
    """Four problems, and the same with the third infeasible: rows 1 and 4 of G contradict each other."""
    root, G = normal(4, 3, 3), normal(4, 5, 3, seed=1)
    G[:, 4] = -G[:, 1]
    h = normal(4, 5, seed=2).abs() + 0.1
    values = [root @ root.mT + torch.eye(3, dtype=D), 3 * normal(4, 3, seed=3), G, h]
    bad = [v.clone() for v in values]
    bad[3][2, 1], bad[3][2, 4] = -1, 0.5
    return values, bad


def run(values: list[Tensor], **options: Any) -> Any:
    Q, c, G, h = values
    return qp(Q, c, G=G, h=h, **options)


def test_infeasible_problem_is_named_with_its_constraints() -> None:
    _, bad = four()
    with pytest.raises(ConvergenceError, match=r"problem 2 of the batch \(4,\) is infeasible: .* G\[1\], G\[4\] "):
        run(bad)
    with pytest.warns(RuntimeWarning, match=r"problem 2 of .* is infeasible"):
        s = run(bad, on_fail="warn")
    assert s.info.converged.tolist() == [True, True, False, True]
    with pytest.raises(ConvergenceError, match=r"problem \(1, 0\) of the batch \(2, 2\) is infeasible"):
        run([v.reshape(2, 2, *v.shape[1:]) for v in bad])
    with pytest.raises(ConvergenceError, match="is infeasible"):
        vmap(lambda *v: run(list(v)).x)(*bad)
    compiled = torch.compile(lambda h: qp(*bad[:2], G=bad[2], h=h).x, fullgraph=True, backend="aot_eager")
    with pytest.raises(ConvergenceError, match="is infeasible"):
        compiled(bad[3])


@pytest.mark.parametrize("on_fail", ["nan", "ignore"])
def test_the_others_equal_the_clean_batch(on_fail: str) -> None:
    good, bad = four()
    others = [0, 1, 3]
    results = []
    for values in (good, bad):
        inputs = [v.requires_grad_() for v in values]
        s = run(inputs, on_fail=on_fail)
        grads = torch.autograd.grad((s.x * normal(4, 3, seed=5)).sum() + s.dual_ineq.sum(), inputs)
        results.append([s.x.detach(), s.dual_ineq.detach(), s.info.residual, *grads])
    for clean, found in zip(*results, strict=True):
        assert torch.equal(clean[others], found[others])
        assert on_fail == "ignore" or clean.ndim == 1 or found[2].isnan().any()


def test_nan_under_transforms() -> None:
    _, bad = four()
    x = vmap(lambda *v: run(list(v), on_fail="nan").x)(*bad)
    assert torch.equal(x.isnan().any(-1), torch.tensor([False, False, True, False]))


# --- causes -----------------------------------------------------------------------------------------------------------


def test_contradictions() -> None:
    with pytest.raises(ConvergenceError, match=r"A\[0\], A\[1\] contradict"):
        qp(EYE, C, A=torch.cat([ONES, ONES]), b=vector(1, 2))
    with pytest.raises(ConvergenceError, match=r"A\[0\], G\[1\] contradict .*weighted by -0.5, 0.5"):
        qp(EYE, C, A=ONES, b=vector(1), G=torch.cat([EYE[:1], ONES]), h=vector(9, 0.5))
    with pytest.raises(ConvergenceError, match=r"the row G\[1\] is zero"):
        qp(EYE, C, G=torch.cat([ONES, 0 * ONES]), h=vector(1, -1))
    with pytest.raises(ConvergenceError, match=r"G\[0\], G\[1\], G\[2\] contradict"):
        qp(0 * EYE, C, G=torch.cat([-EYE, ONES]), h=vector(0, 0, -1))


def test_unbounded_and_not_unique() -> None:
    with pytest.raises(ConvergenceError, match="unbounded below: c falls along a direction where Q is zero"):
        qp(torch.diag(vector(1, 0)), C, G=EYE[:1], h=vector(1))
    with pytest.raises(ConvergenceError, match="unbounded"):
        qp(0 * EYE, vector(-1, 2), G=-EYE, h=vector(0, 0))
    with pytest.raises(ConvergenceError, match="unbounded"):
        qp(0 * EYE, C)
    with pytest.raises(ConvergenceError, match=r"no unique solution.*multiple of the identity to Q"):
        qp(0 * EYE, vector(-1, -1), G=torch.cat([-EYE, ONES]), h=vector(0, 0, 1))
    with pytest.raises(ConvergenceError, match="no unique solution"):
        qp(0 * EYE, vector(0, 0))


def test_indefinite_q() -> None:
    with pytest.raises(
        ValueError, match=r"problem 2 of the batch \(3,\) has a Q that is not positive semidefinite.*-1"
    ):
        qp(torch.stack([EYE, EYE, -EYE]), C)
    with pytest.raises(ValueError, match=r"not positive semidefinite: its least eigenvalue is -0\.5"):
        qp(torch.diag(vector(1, -0.5)), C, G=EYE, h=C)
    x = qp(torch.stack([EYE, -EYE]), C, on_fail="nan").x
    assert torch.equal(x.isnan(), torch.tensor([[False, False], [True, True]]))


@pytest.mark.parametrize("name", ["Q", "c", "A", "b", "G", "h"])
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_numbers_that_are_not_finite(name: str, number: float) -> None:
    values = dict(zip("QcAbGh", (EYE, C, ONES, vector(1), EYE, vector(1, 1)), strict=True))
    values = {key: v.expand(3, *v.shape).clone() for key, v in values.items()}
    values[name][1].view(-1)[-1] = number
    with pytest.raises(ValueError, match=rf"problem 1 of the batch \(3,\) has {number} in {name} at \["):
        qp(**values)
    x = qp(**values, on_fail="nan").x
    assert torch.equal(x.isnan().any(-1), torch.tensor([False, True, False]))


def test_too_few_iterations() -> None:
    G, h = normal(30, 10), normal(30, seed=1).abs()
    with pytest.raises(ConvergenceError, match=r"not solved after \d+ steps; raise max_iter"):
        qp(torch.eye(10, dtype=D), 5 * normal(10, seed=2), G=G, h=h, max_iter=1)
    assert qp(torch.eye(10, dtype=D), 5 * normal(10, seed=2), G=G, h=h).info.converged


def test_residual_above_the_tolerance() -> None:
    q = torch.linalg.qr(normal(8, 8))[0]
    Q = q @ torch.diag(torch.logspace(0, -9, 8, dtype=D)) @ q.T
    with pytest.raises(ConvergenceError, match=r"residual of .* only, above 8\.9e-16: .*loosen rtol"):
        qp(Q, normal(8, seed=1), G=normal(8, 8, seed=2), h=normal(8, seed=3).abs(), rtol=0)


# --- arguments --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"Q": [[1.0]]}, TypeError, "Q must be a tensor, got list"),
    ({"c": None}, TypeError, "c must be a tensor, got NoneType"),
    ({"c": C.float()}, TypeError, "c must be torch.float64 on cpu as Q is, got torch.float32"),
    ({"Q": EYE.long(), "c": C.long()}, TypeError, "Q must be real floating point, got torch.int64"),
    ({"Q": EYE.cfloat(), "c": C.cfloat()}, TypeError, "Q must be real floating point, got torch.complex64"),
    ({"Q": torch.ones(2, 3, dtype=D)}, ValueError, r"Q must have shape \(..., n, n\), got \(2, 3\)"),
    ({"Q": C}, ValueError, r"Q must have shape \(..., n, n\), got \(2,\)"),
    ({"c": vector(1, 2, 3)}, ValueError, r"c must have shape \(..., 2\) to go with Q, got \(3,\)"),
    ({"A": EYE}, ValueError, "A and b must be given together"),
    ({"h": C}, ValueError, "so must G and h"),
    ({"G": torch.ones(1, 3, dtype=D), "h": vector(1)}, ValueError, r"G must have shape \(..., rows, 2\)"),
    ({"G": EYE, "h": vector(1, 2, 3)}, ValueError, r"h must have shape \(..., 2\) to go with G, got \(3,\)"),
    ({"G": EYE, "h": vector(1, 2)[0]}, ValueError, "h must have shape"),
    ({"Q": EYE.expand(3, 2, 2), "c": C.expand(4, 2)}, ValueError, r"batch dims must broadcast; got Q \(3, 2, 2\), c"),
    ({"rtol": -1.0}, ValueError, "rtol must be a number >= 0, got -1.0"),
    ({"atol": True}, ValueError, "atol must be a number >= 0, got True"),
    ({"max_iter": 0}, ValueError, "max_iter must be a positive int"),
    ({"on_fail": "explode"}, ValueError, "on_fail"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        qp(**{"Q": EYE, "c": C, **change})


def test_import_and_a_solve_on_the_torch_path_load_no_compiler() -> None:
    code = (
        "import sys, torch, implicit; from implicit import _qp_solve; _qp_solve.has_numba = lambda: False;"
        "implicit.qp(torch.eye(2), torch.ones(2), G=torch.eye(2), h=-2 * torch.ones(2));"
        "bad = {'numba', 'scipy', 'cvxpy', 'torch._dynamo'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
