"""Law 1: every answer is feasible and optimal, by certificates that need no other solver."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import normal, rho, spread, value_and_gradient
from registry import CASES, FAMILIES, Case, cases
from torch import Tensor

import smoothops as so

STRENGTHS = [0.02, 0.1, 1.0, 30.0]  # not less: y >= e^-500 has a logarithm
SMALL = 1e-300  # where the gradient of an entropic Omega at 0 is taken
ROUNDING = 2.0**-52


def slope(polytope: so.Polytope, y: Tensor, smoothing: so.Smoothing) -> Tensor:
    """The gradient of eps Omega at y."""
    y = y.detach().clone().requires_grad_()
    return torch.autograd.grad(polytope.penalty(y, smoothing).sum(), y)[0]


def bounded_above(polytope: so.Polytope, smoothing: so.Smoothing) -> bool:
    """Whether the slope of Omega is infinite at y = 1."""
    entropic = isinstance(smoothing, (so.BinaryEntropy, so.Laplace))
    return entropic or (isinstance(polytope, so.Hypercube) and isinstance(smoothing, so.Entropy))


def reduced_cost(polytope: so.Polytope, theta: Tensor, y: Tensor, smoothing: so.Smoothing) -> Tensor:
    """g = theta - grad eps Omega(y), with its limit at the bounds of C."""
    if isinstance(smoothing, so.Quadratic):
        return theta - slope(polytope, y, smoothing)
    if not bounded_above(polytope, smoothing):
        return theta - slope(polytope, y.clamp(min=SMALL), smoothing)
    # next to y = 1 the slope is known only within a rounding of y: take what is closest to the best known coordinate
    high = theta - slope(polytope, (y - ROUNDING).clamp(min=SMALL), smoothing)
    low = theta - slope(polytope, (y + ROUNDING).clamp(max=1 - ROUNDING / 2), smoothing)
    low = torch.where(y + ROUNDING >= 1, -torch.inf, low)
    g = theta - slope(polytope, y.clamp(SMALL, 1 - ROUNDING / 2), smoothing)
    level = g.gather(-1, (y * (1 - y)).argmax(-1, keepdim=True)) if polytope.coupled else torch.zeros(())
    return torch.where(y > 0.5, level.clamp(low, high), g)


def frank_wolfe_gap(polytope: so.Polytope, theta: Tensor, y: Tensor, smoothing: so.Smoothing) -> tuple[Tensor, Tensor]:
    """max_{v in C} <g, v - y>, which is 0 iff y is optimal, and the scale of its rounding."""
    g = reduced_cost(polytope, theta, y, smoothing)
    gap = (g * (polytope.maximize(g) - y)).sum(-1)
    return gap, 1 + g.norm(dim=-1) * y.norm(dim=-1)


def point(case: Case, x: Tensor, eps: float) -> Tensor:
    """The y of the case: its answer, or the gradient of its maximum."""
    if case.operator.maximum:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(case(x, eps).sum(), x)[0]
    return case(x, eps)


def certify(case: Case, x: Tensor, eps: float) -> None:
    polytope, theta, y = case.operator.equation(x, point(case, x, eps), case.family)
    smoothing = case.smoothing(eps)
    assert polytope.contains(y, 1e-12).all()
    gap, scale = frank_wolfe_gap(polytope, theta, y, smoothing)
    assert (gap <= 1e-9 * scale).all(), f"gap {gap.max().item()} at eps {eps}"


@pytest.mark.parametrize("case", cases("certificate", lambda o: o.equation))
@pytest.mark.parametrize("eps", STRENGTHS)
def test_feasible_and_optimal(case: Case, eps: float) -> None:
    for n in (2, 5, 40):
        certify(case, normal(4, n, seed=n), eps)
    certify(case, (normal(4, 6, seed=9) * 2).round() / 2, eps)


@pytest.mark.parametrize("case", cases("danskin", lambda o: o.equation and o.maximum))
@pytest.mark.parametrize("eps", STRENGTHS)
def test_maximum_is_the_objective_at_its_gradient(case: Case, eps: float) -> None:
    x = normal(4, 6, seed=1)
    polytope, theta, y = case.operator.equation(x, point(case, x, eps), case.family)
    smoothing = case.smoothing(eps)
    want = (theta * y).sum(-1) - polytope.penalty(y, smoothing)
    torch.testing.assert_close(case.operator.maximum * case(x, eps).squeeze(-1), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(y, polytope.argmax(theta, smoothing), rtol=1e-10, atol=1e-11)
    bounded = not isinstance(polytope, so.OrderPolytope)
    assert not bounded or (want >= (theta * polytope.maximize(theta)).sum(-1) - 1e-12).all()


@pytest.mark.parametrize("case", cases("certificate", lambda o: o.equation))
def test_no_vertex_and_no_mixture_is_better(case: Case) -> None:
    """Brute force at n = 4: the objective at y is above that of every vertex and of random points of C."""
    x = normal(4, seed=3)
    polytope, theta, y = case.operator.equation(x, point(case, x, 0.3), case.family)
    smoothing = case.smoothing(0.3)

    def objective(v: Tensor) -> Tensor:
        return (theta * v).sum(-1) - polytope.penalty(v, smoothing)

    corners = polytope.vertices(4)
    mixtures = torch.distributions.Dirichlet(torch.full((len(corners),), 0.3, dtype=torch.float64)).sample((200,))
    assert (objective(corners) <= objective(y) + 1e-12).all()
    assert (objective(mixtures @ corners) <= objective(y) + 1e-12).all()
    near = y + 0.01 * (mixtures @ corners - y)
    assert (objective(near) <= objective(y) + 1e-12).all()


POLYTOPES = {
    "Simplex": so.Simplex(),
    "CappedSimplex": so.CappedSimplex(2),
    "CappedSimplex-fractional": so.CappedSimplex(1.5),
    "Hypercube": so.Hypercube(),
    "Permutahedron": so.Permutahedron(spread(4)),
    "Permutahedron-tied": so.Permutahedron(torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=torch.float64)),
    "Permutahedron-negative": so.Permutahedron(normal(4, seed=5)),
}


@pytest.mark.parametrize("name", POLYTOPES)
def test_hard_maximum_is_the_best_vertex(name: str) -> None:
    polytope, theta = POLYTOPES[name], normal(50, 4, seed=6)
    corners = polytope.vertices(4)
    best = (theta @ corners.T).amax(-1)
    y = polytope.maximize(theta)
    torch.testing.assert_close((theta * y).sum(-1), best, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(polytope.max(theta, so.Hard()), best, rtol=1e-14, atol=1e-14)
    assert torch.equal(polytope.argmax(theta, so.Hard()), y)
    assert ((y.unsqueeze(1) - corners).abs().amax(-1).amin(-1) <= 1e-15).all()


@pytest.mark.parametrize("name", POLYTOPES)
def test_contains_tells_inside_from_outside(name: str) -> None:
    polytope = POLYTOPES[name]
    corners = polytope.vertices(4)
    assert len({tuple(c) for c in corners.tolist()}) == len(corners)
    assert polytope.contains(corners).all()
    inside = torch.distributions.Dirichlet(torch.ones(len(corners), dtype=torch.float64)).sample((100,)) @ corners
    assert polytope.contains(inside, 1e-12).all()
    centre = corners.mean(0)
    assert not polytope.contains(centre + 1.001 * (corners - centre)).any()
    if name != "Hypercube":
        assert not polytope.contains(corners + torch.tensor([1e-3, 0, 0, 0], dtype=torch.float64)).any()


@pytest.mark.parametrize("family", ["entropy", "quadratic", "tsallis1.5", "tsallis3", "binary", "laplace"])
@pytest.mark.parametrize("name", POLYTOPES)
def test_penalty_is_0_at_the_vertices_and_below_inside(name: str, family: str) -> None:
    polytope, smoothing = POLYTOPES[name], FAMILIES[family].make(0.7)
    if polytope.role not in type(smoothing).roles or (name == "Permutahedron-negative" and family == "entropy"):
        with pytest.raises(ValueError, match=r"not defined on|w > 0"):
            polytope.argmax(normal(4), smoothing)
        return
    corners = polytope.vertices(4)
    if name != "CappedSimplex-fractional":  # its vertices hold a part 1/2, and Omega is 0 at 0 and 1
        torch.testing.assert_close(
            polytope.penalty(corners, smoothing), torch.zeros(len(corners)).double(), atol=1e-14, rtol=0
        )
    for a, b in itertools.islice(itertools.combinations(corners, 2), 8):
        middle = polytope.penalty((a + b) / 2, smoothing)
        assert middle < (polytope.penalty(a, smoothing) + polytope.penalty(b, smoothing)) / 2


# --- the cone, whose points have a closed form ------------------------------------------------------------------------


def min_max_fit(x: Tensor, w: Tensor) -> Tensor:
    """Isotonic regression by its min-max formula, y_i = max_{a <= i} min_{b >= i} mean_w x[a..b]."""
    n = len(x)
    means = [[(x[a : b + 1] * w[a : b + 1]).sum() / w[a : b + 1].sum() for b in range(a, n)] for a in range(n)]
    return torch.stack([max(min(means[a][b - a] for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 3)), min_size=1, max_size=8))
def test_isotonic_is_the_min_max_formula(pairs: list[tuple[int, int]]) -> None:
    x, w = torch.tensor(pairs, dtype=torch.float64).T
    want = min_max_fit(x, w)
    torch.testing.assert_close(so.isotonic(x, weights=w), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        so.isotonic(x.flip(0), decreasing=True, weights=w.flip(0)), want.flip(0), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(so.isotonic(x), min_max_fit(x, torch.ones_like(x)), rtol=1e-13, atol=1e-13)


# --- closed forms -----------------------------------------------------------------------------------------------------


def sparsemax_by_sorting(x: Tensor) -> Tensor:
    """Martins, Astudillo 2016, algorithm 1."""
    z = x.sort(descending=True).values
    r = rho(len(x))
    size = (1 + r * z > z.cumsum(0)).sum()
    return (x - (z[:size].sum() - 1) / size).clamp(min=0)


def entmax15_by_sorting(x: Tensor) -> Tensor:
    """Peters, Niculae, Martins 2019, algorithm 2."""
    z = x.sort(descending=True).values / 2
    best = None
    for r in range(1, len(x) + 1):
        m = z[:r].mean()
        rest = (1 - ((z[:r] - m) ** 2).sum()) / r
        if rest >= 0 and m - rest.sqrt() <= z[r - 1]:
            best = m - rest.sqrt()
    return (x / 2 - best).clamp(min=0).square()


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.sampled_from([0.05, 0.5, 1.0, 4.0]))
def test_simplex_closed_forms(values: list[float], eps: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(so.argmax(x, smoothing=eps), torch.softmax(x / eps, -1), **close)
    torch.testing.assert_close(so.argmax(x, smoothing=so.Quadratic(eps)), sparsemax_by_sorting(x / eps), **close)
    torch.testing.assert_close(so.argmax(x, smoothing=so.Tsallis(1.5, eps)), entmax15_by_sorting(x / eps), **close)
    torch.testing.assert_close(so.amax(x, smoothing=eps), eps * torch.logsumexp(x / eps, -1), **close)


SAME = {"tsallis1": "entropy", "tsallis2": "quadratic"}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.family in ("tsallis1", "tsallis2")])
def test_generic_path_is_the_closed_form(case: Case) -> None:
    """alpha = 1 takes the threshold search where Entropy takes softmax: value, gradient, and second derivative."""
    twin = Case(case.operator, SAME[case.family])
    x = normal(3, 6, seed=7)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for got, want in zip(value_and_gradient(case, x), value_and_gradient(twin, x), strict=True):
        torch.testing.assert_close(got, want, **close)
    row = x[0]
    hessians = [torch.func.hessian(lambda x, c=c: (c(x) * c(x).cumsum(-1)).sum())(row) for c in (case, twin)]
    torch.testing.assert_close(*hessians, **close)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.family == "number"])
def test_a_number_means_the_operators_own_regularizer(case: Case) -> None:
    twin = Case(case.operator, case.operator.smoothings[0])
    x = normal(3, 6, seed=8)
    assert torch.equal(case(x), twin(x))


# --- an external solver -----------------------------------------------------------------------------------------------


def program(cp, name: str, family: str, theta, eps: float):
    """The same programme stated for cvxpy, straight from the definition of C and Omega."""
    n = len(theta)
    y = cp.Variable(n)
    constraints = {
        "Simplex": lambda: [y >= 0, cp.sum(y) == 1],
        "CappedSimplex": lambda: [y >= 0, y <= 1, cp.sum(y) == 2],
        "Permutahedron": lambda: [
            *(cp.sum_largest(y, k) <= spread(n).topk(k).values.sum().item() for k in range(1, n)),
            cp.sum(y) == spread(n).sum().item(),
        ],
    }[name]()
    omega = {
        "quadratic": lambda: cp.sum_squares(y) / 2,
        "entropy": lambda: -cp.sum(cp.entr(y)),
        "binary": lambda: -cp.sum(cp.entr(y) + cp.entr(1 - y)),
        "tsallis1.5": lambda: cp.sum(cp.power(y, 1.5)) / 0.75,
    }[family]()
    cp.Problem(cp.Maximize(theta @ y - eps * omega), constraints).solve(solver=cp.CLARABEL)
    return torch.as_tensor(y.value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Simplex", "quadratic"),
        ("Simplex", "entropy"),
        ("Simplex", "tsallis1.5"),
        ("CappedSimplex", "quadratic"),
        ("CappedSimplex", "entropy"),
        ("CappedSimplex", "binary"),
        ("CappedSimplex", "tsallis1.5"),
        ("Permutahedron", "quadratic"),
        ("Permutahedron", "entropy"),
    ],
)
def test_cvxpy_agrees(name: str, family: str) -> None:
    cp = pytest.importorskip("cvxpy", reason="the external solver is not installed")
    theta = normal(4, seed=9)
    want = program(cp, name, family, theta.numpy(), 0.5)
    got = POLYTOPES[name].argmax(theta, FAMILIES[family].make(0.5))
    torch.testing.assert_close(got, want, rtol=0, atol=3e-4)  # what an interior point reaches with exponential cones
