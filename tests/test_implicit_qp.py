"""implicit.qp: solutions, multipliers and reports, on the compiled path and on the one of plain torch."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
from oracles import normal
from scipy.optimize import linprog
from torch import Tensor

from implicit import QPSolution, _qp_solve, qp
from implicit._qp_batch import flatten, solve_batch
from implicit._qp_status import Options

D = torch.float64
EYE = torch.eye(2, dtype=D)
ONES = torch.ones(1, 2, dtype=D)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_qp_solve, "has_numba", lambda: request.param == "compiled")
    return request.param


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=D)


def close(found: Tensor, true: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(found, true, rtol=tol, atol=tol)


def random_problem(batch: int, n: int, p: int, m: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Feasible, with about a third of the rows active."""
    root = normal(batch, n, n, seed=seed)
    Q, c = root @ root.mT / n + 0.3 * torch.eye(n, dtype=D), normal(batch, n, seed=seed + 1)
    A, G = normal(batch, p, n, seed=seed + 2), normal(batch, m, n, seed=seed + 3)
    inside = 0.3 * normal(batch, n, 1, seed=seed + 4)
    h = (G @ inside).squeeze(-1) + 0.4 * normal(batch, m, seed=seed + 5).abs()
    return Q, c, A, (A @ inside).squeeze(-1), G, h


def integer_problem(batch: int, n: int, p: int, m: int, seed: int) -> tuple[Tensor, ...]:
    """Full of ties: repeated, zero, dependent and weakly active rows, many infeasible problems."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=generator).double()  # noqa: E731
    root = draw(batch, n, n)
    data = [root @ root.mT + torch.eye(n, dtype=D), draw(batch, n), draw(batch, p, n), draw(batch, p)]
    if p > 1:
        data[2][::2, 1], data[3][::4, 1] = data[2][::2, 0], data[3][::4, 0]
    return *data, draw(batch, m, n), draw(batch, m) + 1


def violation(data: tuple[Tensor, ...], s: QPSolution) -> float:
    """The optimality conditions, written down once more, relative to the size of the data."""
    Q, c, A, b, G, h = data
    times = lambda M, v: (M @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    slack = h - times(G, s.x)
    wrong = [
        times((Q + Q.mT) / 2, s.x) + c + times(A.mT, s.dual_eq) + times(G.mT, s.dual_ineq),
        times(A, s.x) - b,
        slack.clamp(max=0),
        s.dual_ineq.clamp(max=0),
        s.dual_ineq * slack,
    ]
    size = 1 + sum(v.abs().max() for v in s[:3] if v.numel())
    return max((w.abs().amax() / size).item() for w in wrong if w.numel())


def by_enumeration(Q: Tensor, c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor | None:
    """The solution of one tiny problem, as that of one of all its active sets; None where no point is feasible."""
    n, best, value = len(c), None, np.inf
    for size in range(n + 1):
        for chosen in itertools.combinations(range(len(h)), size):
            M, t = torch.cat([A, G[list(chosen)]]), torch.cat([b, h[list(chosen)]])
            K = torch.cat([torch.cat([Q, M.T], 1), torch.cat([M, torch.zeros(len(M), len(M), dtype=D)], 1)])
            z = torch.linalg.pinv(K, rtol=1e-12) @ torch.cat([-c, t])
            x = z[:n]
            fits = (K @ z - torch.cat([-c, t])).abs().max() < 1e-9 and (G @ x <= h + 1e-9).all()
            objective = (x @ Q @ x / 2 + c @ x).item()
            if fits and objective < value - 1e-9:
                best, value = x, objective
    return best


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "m"), [(10, 0, 10), (12, 3, 20), (5, 4, 0), (20, 0, 100), (1, 0, 3), (40, 5, 40)])
def test_optimality_conditions_hold_to_rounding(n: int, p: int, m: int) -> None:
    data = random_problem(16, n, p, m)
    s = qp(*data)
    assert violation(data, s) < 1e-13
    assert s.info.residual.max() < 1e-13
    assert (s.dual_ineq >= 0).all()


@pytest.mark.parametrize(("n", "p", "m"), [(2, 0, 5), (3, 1, 6), (2, 2, 4)])
def test_tied_problems_equal_enumeration(n: int, p: int, m: int) -> None:
    data = integer_problem(40, n, p, m, seed=n)
    s = qp(*data, on_fail="nan")
    for i in range(40):
        true = by_enumeration(*(v[i] for v in data))
        assert (true is not None) == bool(s.info.converged[i])
        if true is not None:
            close(s.x[i], true, 1e-9)


@pytest.mark.parametrize(("n", "p", "m"), [(3, 2, 8), (5, 2, 12), (6, 0, 30)])
def test_tied_problems_are_solved_or_refuted(n: int, p: int, m: int) -> None:
    """Every problem has a solution to rounding, or a ray that proves that it has none."""
    data = integer_problem(200, n, p, m, seed=10 + n)
    numbers = solve_batch(flatten(data, torch.Size([200])), Options(p, 1e-11, 1000))
    good = numbers.converged
    assert 10 < good.sum() < 190
    assert numbers.residual[good].max() < 1e-13
    rays = numbers.ray[~good] / numbers.ray[~good].abs().sum(-1, keepdim=True)
    M, t = torch.cat([data[2], data[4]], 1)[~good], torch.cat([data[3], data[5]], 1)[~good]
    assert (M.mT @ rays.unsqueeze(-1)).abs().max() < 1e-10
    assert rays[:, p:].min() > -1e-12
    assert (t * rays).sum(-1).max() < -1e-4


def test_both_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (random_problem(20, 15, 2, 30), integer_problem(100, 4, 1, 9, seed=3)):
        found = []
        for compiled in (True, False):
            monkeypatch.setattr(_qp_solve, "has_numba", lambda compiled=compiled: compiled)
            found.append(qp(*data, on_fail="nan"))
        for a, b in zip(found[0][:3], found[1][:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_agrees_with_a_solver() -> None:
    data = random_problem(3, 30, 4, 40, seed=20)
    s = qp(*data)
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_ktratio"), 1e-12)
    for i in range(3):
        Q, c, A, b, G, h = (v[i].numpy() for v in data)
        x = cp.Variable(30)
        rows = [A @ x == b, G @ x <= h]
        cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(Q)) + c @ x), rows).solve(cp.CLARABEL, **tight)
        np.testing.assert_allclose(s.x[i], x.value, rtol=0, atol=1e-6)
        np.testing.assert_allclose(s.dual_eq[i], rows[0].dual_value, rtol=0, atol=1e-5)
        np.testing.assert_allclose(s.dual_ineq[i], rows[1].dual_value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("condition", [1e6, 1e10, 1e13])
def test_ill_conditioned(condition: float) -> None:
    q = torch.linalg.qr(normal(6, 20, 20))[0]
    Q = q @ torch.diag(torch.logspace(0, -np.log10(condition), 20, dtype=D)) @ q.mT
    c, G, h = (Q @ normal(6, 20, 1)).squeeze(-1), normal(6, 20, 20, seed=1), normal(6, 20, seed=2).abs()
    assert qp(Q, c, G=G, h=h).info.residual.max() < 1e-13


def test_scales_of_rows_columns_and_objective() -> None:
    Q, c, _, _, G, h = random_problem(4, 8, 0, 12)
    s = qp(Q, c, G=G, h=h)
    rows, columns = torch.logspace(-6, 6, 12, dtype=D), torch.logspace(-4, 4, 8, dtype=D)
    close(qp(Q * 1e9, c * 1e9, G=G, h=h).x, s.x)
    close(qp(Q, c * 1e9, G=G, h=h * 1e9).x / 1e9, s.x)
    scaled = qp(Q, c, G=G * rows[:, None], h=h * rows)
    close(scaled.x, s.x)
    close(scaled.dual_ineq * rows, s.dual_ineq)
    close(qp(Q * columns[:, None] * columns, c * columns, G=G * columns, h=h).x * columns, s.x)


def test_asymmetric_q_counts_by_its_symmetric_part() -> None:
    Q, c, *rest = random_problem(3, 5, 1, 6)
    skew = normal(5, 5)
    assert torch.equal(qp(Q + skew - skew.T, c).x.round(decimals=9), qp(Q, c).x.round(decimals=9))
    close(qp(Q + skew - skew.T, c, *rest).x, qp(Q, c, *rest).x, 1e-10)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_without_constraints_or_unknowns() -> None:
    Q, c, A, b, _, _ = random_problem(1, 4, 2, 0)
    Q, c, A, b = Q[0], c[0], A[0], b[0]
    s = qp(Q, c)
    close(s.x, -torch.linalg.solve(Q, c))
    assert s.dual_eq.shape == s.dual_ineq.shape == (0,)
    assert s.info.margin == torch.inf
    K = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(2, 2, dtype=D)], 1)])
    s = qp(Q, c, A, b)
    close(torch.cat([s.x, s.dual_eq]), torch.linalg.solve(K, torch.cat([-c, b])))
    none = torch.zeros(0, 4, dtype=D), torch.zeros(0, dtype=D)
    close(qp(Q, c, *none, *none).x, qp(Q, c).x)
    assert qp(torch.zeros(0, 0, dtype=D), torch.zeros(0, dtype=D)).x.shape == (0,)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
def test_batch_shapes(batch: tuple[int, ...]) -> None:
    Q, c, A, b, G, h = (v[0] for v in random_problem(1, 4, 1, 5))
    s = qp(Q.expand(*batch, 4, 4), c, A, b, G, h.expand(*batch, 5))
    assert s.x.shape == (*batch, 4)
    assert s.dual_eq.shape == (*batch, 1)
    assert s.dual_ineq.shape == (*batch, 5)
    assert all(v.shape == batch for v in s.info)
    close(s.x, qp(Q, c, A, b, G, h).x.expand(*batch, 4))


def test_partial_broadcasting_equals_a_loop() -> None:
    Q, c, A, b, G, h = random_problem(4, 4, 1, 5)
    Q, A, G, h = Q[:3, None], A[0], G[:1], h[:1] + torch.arange(4, dtype=D)[:, None] / 10
    s = qp(Q, c, A, b[0], G, h)
    for i, j in itertools.product(range(3), range(4)):
        close(s.x[i, j], qp(Q[i, 0], c[j], A, b[0], G[0], h[j]).x)


def test_a_problem_does_not_depend_on_its_batch() -> None:
    data = random_problem(9, 12, 2, 20)
    whole = qp(*data)
    for i in range(9):
        close(qp(*(v[i] for v in data)).x, whole.x[i], 1e-13)


def test_strides_do_not_matter_and_data_stay_untouched() -> None:
    data = random_problem(3, 6, 2, 7)
    copies = [v.clone() for v in data]
    turned = [v.mT.contiguous().mT if v.ndim == 3 else torch.stack([v, v], -1)[..., 0] for v in data]
    close(qp(*turned).x, qp(*data).x, 1e-14)
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_solved_in_float64(dtype: torch.dtype) -> None:
    data = tuple(v.to(dtype) for v in random_problem(3, 6, 1, 7))
    s = qp(*data)
    assert s.x.dtype == s.dual_eq.dtype == s.dual_ineq.dtype == s.info.residual.dtype == s.info.margin.dtype == dtype
    true = qp(*(v.double() for v in data))
    assert torch.equal(s.x, true.x.to(dtype))
    assert torch.equal(s.dual_ineq, true.dual_ineq.to(dtype))


# --- degenerate rows, infinite bounds, singular Q ---------------------------------------------------------------------


def test_repeated_and_dependent_rows() -> None:
    s = qp(EYE, vector(-1, -2), G=ONES.expand(3, 2), h=vector(1, 1, 1))
    close(s.x, vector(0, 1))
    close(s.dual_ineq.sum(), vector(1)[0])
    assert s.info.margin == 0
    s = qp(EYE, vector(-1, -2), A=torch.cat([ONES, 2 * ONES]), b=vector(1, 2))
    close(s.x, vector(0, 1))
    # four rows through one vertex of the plane
    corner = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 2]], dtype=D)
    close(qp(EYE, vector(-5, -7), G=corner, h=corner @ vector(1, 1)).x, vector(1, 1))


@pytest.mark.parametrize("angle", [1e-4, 1e-6, 3e-7])
def test_nearly_parallel_rows_are_not_taken_for_a_contradiction(angle: float) -> None:
    """x_1 <= 0 and x_1 + angle x_2 >= 5 angle: the nearest point is (0, 5)."""
    s = qp(EYE, vector(0, 0), G=torch.tensor([[1, 0], [-1, -angle]], dtype=D), h=vector(0, -5 * angle))
    close(s.x, vector(0, 5), 1e-6)


def test_infinite_bounds_and_zero_rows() -> None:
    s = qp(EYE, vector(-1, -2), G=torch.cat([EYE, 0 * ONES]), h=vector(torch.inf, 1, 0))
    close(s.x, vector(1, 1))
    close(s.dual_ineq, vector(0, 1, 0))
    assert s.info.margin == 0
    assert qp(EYE, vector(-1, -2), G=EYE, h=vector(torch.inf, 1)).info.margin == 1


def test_margin_is_the_least_dual_or_slack() -> None:
    s = qp(EYE, vector(-1, -2), G=EYE, h=vector(1.25, 1.5))
    close(s.info.margin, vector(0.25)[0])
    s = qp(EYE, vector(-1, -2), G=EYE, h=vector(1.75, 1.9))
    close(s.info.margin, vector(0.1)[0], 1e-11)


@pytest.mark.parametrize(("n", "m"), [(5, 12), (10, 30)])
def test_linear_programmes(n: int, m: int) -> None:
    G, h = normal(8, m, n), normal(8, m, seed=1).abs() + 0.1
    c = -(normal(8, 1, m, seed=2).abs() @ G).squeeze(1)
    s = qp(torch.zeros(n, n, dtype=D), c, G=G, h=h)
    for i in range(8):
        true = linprog(c[i].numpy(), G[i].numpy(), h[i].numpy(), bounds=(None, None))
        np.testing.assert_allclose(s.x[i], true.x, rtol=0, atol=1e-9)
        np.testing.assert_allclose(s.dual_ineq[i], -true.ineqlin.marginals, rtol=0, atol=1e-9)


def test_singular_q_with_a_unique_solution() -> None:
    root = normal(6, 10, 4)
    Q = root @ root.mT  # of rank 4
    c, G = normal(6, 10, seed=1), torch.cat([torch.eye(10, dtype=D), -torch.eye(10, dtype=D)])
    data = (Q, c, torch.zeros(0, 10, dtype=D), torch.zeros(0, dtype=D), G, torch.ones(20, dtype=D))
    s = qp(*data)
    assert violation((*data[:2], *(v.expand(6, *v.shape) for v in data[2:])), s) < 1e-12
    s = qp(torch.diag(vector(1, 0)), vector(-1, -2), A=ONES, b=vector(1))
    close(s.x, vector(-1, 2))
    close(s.dual_eq, vector(2))


def test_mixed_batch_of_definite_and_singular() -> None:
    Q = torch.stack([EYE, torch.diag(vector(1, 0)), 0 * EYE])
    s = qp(Q, vector(-1, -2), G=torch.cat([EYE, -EYE]), h=vector(0.5, 0.75, 0, 0))
    close(s.x, vector(0.5, 0.75).expand(3, 2))


def test_iterations_are_few() -> None:
    Q, c, _, _, G, h = random_problem(32, 50, 0, 50)
    assert qp(Q, c, G=G, h=h).info.iterations.max() <= 60
