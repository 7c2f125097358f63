"""Problems whose solution and derivatives are known in closed form, each through the function a user would take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.func import grad, jacrev, vmap

from implicit import conditions
from implicit.adjoint import attach
from implicit.bilevel import hypergradient
from implicit.fixed_point import Anderson, Picard, fixed_point
from implicit.linear import CG, GMRES, Auto, LstSq, linear_solve
from implicit.minimize import FISTA, GradientDescent, minimize
from implicit.root import LevenbergMarquardt, Newton, root

D = torch.float64


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=D)


def nested(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> list[Tensor]:
    """f and its first derivatives at x, by plain autograd on itself."""
    x = x.detach().clone().requires_grad_()
    values = [f(x)]
    for _ in range(order):
        (derivative,) = torch.autograd.grad(values[-1], x, create_graph=True)
        values.append(derivative)
    return values


def transformed(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> list[Tensor]:
    """The same by torch.func."""
    values, g = [], f
    for _ in range(order + 1):
        values.append(g(x))
        g = grad(g)
    return values


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a.contiguous(), b.contiguous())


def close(a: Any, b: Any, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --- smooth equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivatives", [nested, transformed])
def test_ridge(derivatives: Any) -> None:
    x, y, l = normal(8, 3), normal(8, seed=1), scalar(0.7)  # noqa: E741

    def objective(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return ((x @ w - y) ** 2).sum() / 2 + l * (w**2).sum() / 2

    h = x.mT @ x + l * torch.eye(3, dtype=D)
    w = torch.linalg.solve(h, x.mT @ y)
    weights = normal(3, seed=2)
    want = [
        (-1) ** k * math.factorial(k) * weights @ torch.linalg.matrix_power(torch.linalg.inv(h), k) @ w
        for k in range(4)
    ]
    close(minimize(objective, torch.zeros(3, dtype=D), l), w)
    got = derivatives(lambda l: weights @ minimize(objective, torch.zeros(3, dtype=D), l), l, 3)  # noqa: E741
    close(torch.stack(got), torch.stack(want), 1e-8)
    got = derivatives(lambda l: weights @ attach(w, conditions.stationary(objective), l), l, 3)  # noqa: E741
    close(torch.stack(got), torch.stack(want), 1e-8)


@pytest.mark.parametrize("derivatives", [nested, transformed])
def test_kepler(derivatives: Any) -> None:
    mean, eccentricity = scalar(1.0), scalar(0.3)

    def solve(mean: Tensor, e: Tensor) -> Tensor:
        return root(lambda E: E - e * E.sin() - mean, scalar(1.0), method=Newton())

    value = 1.2880913132118377
    s, c, e = math.sin(value), math.cos(value), 0.3
    first = 1 / (1 - e * c)
    second = -e * s * first**3
    third = -e * c * first**4 - 3 * e * s * first**2 * second
    assert abs(first - 1.0913293011504175) < 1e-13
    close(
        torch.stack(derivatives(lambda m: solve(m, eccentricity), mean, 3)),
        torch.tensor([value, first, second, third], dtype=D),
    )
    close(derivatives(lambda e: solve(mean, e), eccentricity, 1)[1], scalar(1.0480083050499363))


@pytest.mark.parametrize("derivatives", [nested, transformed])
def test_scalar_equilibrium(derivatives: Any) -> None:
    a, b, z = 0.5, scalar(0.3), 0.50083188766986503
    s = 1 - z * z
    q = 1 - a * s
    third = (-2 * (s - 2 * z * z) / q**3 + 12 * a * z * z * s / q**4) * s / q
    want = torch.tensor([z, 1.1978700146562403, -3.0675615391162819, third], dtype=D)
    for method in (Anderson(), Picard()):
        got = derivatives(lambda b, m=method: fixed_point(lambda z: torch.tanh(a * z + b), scalar(0.0), method=m), b, 3)
        close(torch.stack(got), want)


@pytest.mark.parametrize("lyapunov", [False, True], ids=["sylvester", "lyapunov"])
@pytest.mark.parametrize("method", [Auto(), GMRES()], ids=["Auto", "GMRES"])
def test_matrix_equations(lyapunov: bool, method: Any) -> None:
    """A X + X B = C, and A X + X A' = C."""
    eye = torch.eye(3, dtype=D)
    a, c, v = normal(3, 3) + 4 * eye, normal(3, 3, seed=2), normal(3, 3, seed=3)
    b = a.mT if lyapunov else normal(3, 3, seed=1) + 4 * eye

    def solve(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        def product(x: Tensor) -> Tensor:
            x = x.reshape(3, 3)
            return (a @ x + x @ (a.mT if lyapunov else b)).reshape(9)

        return linear_solve(product, c.reshape(9), method=method).reshape(3, 3)

    def oracle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.linalg.solve(kron(a, eye) + kron(eye, b.mT), c.reshape(9)).reshape(3, 3)

    inputs = [t.detach().clone().requires_grad_() for t in (a, b, c)]
    x = solve(*inputs)
    close(x, oracle(a, b, c))
    got = torch.autograd.grad((x * v).sum(), inputs, materialize_grads=True)
    u = oracle(a.mT, b.mT, v)  # A'U + UB' = V
    x = x.detach()
    abar, bbar = -u @ x.mT, -x.mT @ u
    close(got, (abar + bbar.mT, torch.zeros(3, 3, dtype=D), u) if lyapunov else (abar, bbar, u))


def test_equilibrium_layer() -> None:
    w, u, x = 0.3 * normal(4, 4), normal(4, 3, seed=1), normal(5, 3, seed=2)

    def layer(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(w @ z + u @ x), torch.zeros(4, dtype=D))

    jacobian = vmap(jacrev(layer))(x)
    for i in range(5):
        z = layer(x[i])
        slope = torch.diag(1 - z**2)
        close(jacobian[i], torch.linalg.solve(torch.eye(4, dtype=D) - slope @ w, slope @ u))


def test_stationary_distribution() -> None:
    def solve(p: Tensor) -> Tensor:
        n = p.shape[-1]

        def residual(pi: Tensor, p: Tensor) -> Tensor:
            return torch.cat([(p.mT @ pi - pi)[:-1], pi.sum(-1, keepdim=True) - 1])

        return root(residual, torch.full((n,), 1 / n, dtype=D), p)

    p, q = scalar(0.3).requires_grad_(), scalar(0.2).requires_grad_()
    pi = solve(torch.stack([torch.stack([1 - p, p]), torch.stack([q, 1 - q])]))
    close(pi, torch.tensor([0.4, 0.6], dtype=D))
    close(torch.autograd.grad(pi[0], (p, q)), (scalar(-0.2 / 0.25), scalar(0.3 / 0.25)))
    # any number of states: dpi = pi dP Z with the fundamental matrix Z = (I - P + 1 pi)^-1
    chain, direction = normal(5, 5).softmax(-1), normal(5, 5, seed=1)
    direction = direction - direction.mean(-1, keepdim=True)
    pi, tangent = torch.func.jvp(solve, (chain,), (direction,))
    fundamental = torch.linalg.inv(torch.eye(5, dtype=D) - chain + pi.expand(5, 5))
    close(tangent, pi @ direction @ fundamental)


@pytest.mark.parametrize("method", [Newton(), LevenbergMarquardt()], ids=["Newton", "LevenbergMarquardt"])
def test_chemical_steady_state(method: Any) -> None:
    """2 A <-> B with mass action: k a^2 = b and a + 2 b = total; a = (sqrt(1 + 8 k total) - 1) / 4k."""

    def solve(k: Tensor, total: Tensor) -> dict[str, Tensor]:
        def rates(c: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return k * c["a"] ** 2 - c["b"], c["a"] + 2 * c["b"] - total

        return root(rates, {"a": scalar(1.0), "b": scalar(1.0)}, method=method)

    k, total = scalar(1.7), scalar(3.0)
    size = math.sqrt(1 + 8 * 1.7 * 3)
    a = (size - 1) / (4 * 1.7)
    close(solve(k, total)["a"], scalar(a))
    close(grad(lambda total: solve(k, total)["a"])(total), scalar(1 / size))
    close(grad(lambda total: solve(k, total)["b"])(total), scalar((1 - 1 / size) / 2))
    close(grad(lambda k: solve(k, total)["a"])(k), scalar(3 / (1.7 * size) - a / 1.7))


# --- constrained and nonsmooth ----------------------------------------------------------------------------------------


def soft(v: Tensor, t: Any) -> Tensor:
    return v.sign() * (v.abs() - t).relu()


@pytest.mark.parametrize("method", [FISTA(), GradientDescent()], ids=["FISTA", "GradientDescent"])
def test_lasso(method: Any) -> None:
    x, y, l = normal(20, 6), normal(20, seed=1), scalar(6.0).requires_grad_()  # noqa: E741

    def objective(w: Tensor) -> Tensor:
        return ((x @ w - y) ** 2).sum() / 2

    w = minimize(objective, torch.zeros(6, dtype=D), method=method, prox=lambda v, t: soft(v, t * l))
    support = w.detach() != 0
    assert 1 < support.sum() < 6
    s, gram = w.detach()[support].sign(), x[:, support].mT @ x[:, support]
    close(w[support], torch.linalg.solve(gram, x[:, support].mT @ y - l.detach() * s))
    want = torch.zeros(6, dtype=D)
    want[support] = -torch.linalg.solve(gram, s)
    for i in range(6):
        close(torch.autograd.grad(w[i], l, retain_graph=True)[0], want[i])


def test_svm_dual() -> None:
    """min a'Ka/2 - sum(a), 0 <= a <= C: on the free entries a = K_FF^-1 (1 - K_FB C)."""
    x = normal(10, 2)
    labels = torch.where(normal(10, seed=1) > 0, 1.0, -1.0).to(D)
    kernel = torch.exp(-(torch.cdist(x, x) ** 2)) * labels.unsqueeze(-1) * labels + 0.1 * torch.eye(10, dtype=D)
    bound = scalar(1.0).requires_grad_()
    kernel.requires_grad_()

    def box(z: Tensor) -> Tensor:
        return torch.minimum(z.relu(), bound)

    def objective(a: Tensor, kernel: Tensor) -> Tensor:
        return a @ kernel @ a / 2 - a.sum()

    a = minimize(objective, torch.full((10,), 0.5, dtype=D), kernel, method=FISTA(), proj=box)
    value, k = a.detach(), kernel.detach()
    free, upper = (value > 1e-6) & (value < 1 - 1e-6), value > 1 - 1e-6
    assert free.any()
    assert upper.any()
    inverse = torch.linalg.inv(k[free][:, free])
    close(value[free], inverse @ (1 - k[free][:, upper].sum(-1)))
    slope = upper.to(D)
    slope[free] = -inverse @ k[free][:, upper].sum(-1)
    by_bound, by_kernel = torch.autograd.grad(loss(a), (bound, kernel))
    close(by_bound, loss(slope))
    weights = torch.autograd.grad(loss(a := value.clone().requires_grad_()), a)[0]
    r = torch.zeros(10, dtype=D)
    r[free] = inverse @ weights[free]
    close((by_kernel + by_kernel.mT) / 2, -(torch.outer(r, value) + torch.outer(value, r)) / 2)


@pytest.mark.parametrize("moves", [False, True], ids=["relu", "clamp"])
def test_box_qp_with_a_weakly_active_bound(moves: bool) -> None:
    """min z'Qz/2 - c'z, z >= 0, with z_1 = 0 and multiplier 0: one of the two one-sided derivatives, that of proj."""

    def proj(z: Tensor) -> Tensor:
        return z.clamp(min=0) if moves else z.relu()

    q = normal(4, 4)
    q = q @ q.mT + torch.eye(4, dtype=D)
    z = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=D)
    c = q @ z
    c[2] -= 0.7  # strongly active
    c.requires_grad_()

    def objective(z: Tensor, c: Tensor) -> Tensor:
        return z @ q @ z / 2 - c @ z

    found = minimize(objective, torch.ones(4, dtype=D), c.detach(), method=FISTA(), proj=proj)
    close(found, z)
    free = torch.tensor([True, moves, False, True])
    want = torch.zeros(4, 4, dtype=D)
    want[free.unsqueeze(-1) & free] = torch.linalg.inv(q[free][:, free]).reshape(-1)
    exact = attach(z, conditions.projected(objective, proj), c)
    rows = [torch.autograd.grad(exact[i], c, retain_graph=True)[0] for i in range(4)]
    close(torch.stack(rows), want)


def test_logistic_regression_hypergradient() -> None:
    """dw/dl = -H^-1 w with H = X' S X + l I."""
    x, y, held_x, held_y = normal(30, 4), normal(30, seed=1) > 0, normal(20, 4, seed=2), normal(20, seed=3) > 0
    nll = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return nll(x @ w, y.to(D), reduction="sum") + l * (w**2).sum() / 2

    def outer(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return nll(held_x @ w, held_y.to(D))

    l = scalar(0.8)  # noqa: E741
    w = minimize(inner, torch.zeros(4, dtype=D), l)
    p = torch.sigmoid(x @ w)
    hessian = x.mT @ torch.diag(p * (1 - p)) @ x + l * torch.eye(4, dtype=D)
    slope = held_x.mT @ (torch.sigmoid(held_x @ w) - held_y.to(D)) / 20
    want = -slope @ torch.linalg.solve(hessian, w)
    close(hypergradient(outer, conditions.stationary(inner), w, l), want)
    close(hypergradient(outer, conditions.stationary(inner), w, l, linear=CG()), want)
    close(grad(lambda l: outer(minimize(inner, torch.zeros(4, dtype=D), l), l))(l), want)  # noqa: E741


def test_sinkhorn_potentials() -> None:
    """Two by two, the plan is a root of (1 - k) p^2 + (1 - a - b + k (a + b)) p - k a b, k = exp(-(C's cross sum)/eps).

    The potentials are unique up to a constant: their Jacobian is singular, and LstSq takes the solution of least norm.
    """
    eps = 0.5
    cost = torch.tensor([[0.0, 0.9], [0.7, 0.2]], dtype=D)

    def plan(f: Tensor, g: Tensor, cost: Tensor) -> Tensor:
        return torch.exp((f.unsqueeze(-1) + g - cost) / eps)

    def marginals(potentials: tuple[Tensor, Tensor], a: Tensor, b: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        p = plan(*potentials, cost)
        return p.sum(-1) - torch.stack([a, 1 - a]), p.sum(-2) - torch.stack([b, 1 - b])

    def implicit_plan(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
        f, g = torch.zeros(2, dtype=D), torch.zeros(2, dtype=D)
        with torch.no_grad():
            for _ in range(500):
                f = eps * (torch.stack([a, 1 - a]).log() - torch.logsumexp((g - cost) / eps, -1))
                g = eps * (torch.stack([b, 1 - b]).log() - torch.logsumexp((f.unsqueeze(-1) - cost) / eps, -2))
        f, g = attach((f, g), marginals, a, b, cost, linear=LstSq())
        return plan(f, g, cost)[0, 0]

    def closed_form(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
        k = torch.exp(-(cost[0, 0] + cost[1, 1] - cost[0, 1] - cost[1, 0]) / eps)
        middle = 1 - a - b + k * (a + b)
        return (-middle + (middle**2 + 4 * (1 - k) * k * a * b).sqrt()) / (2 * (1 - k))

    inputs = [t.requires_grad_() for t in (scalar(0.4), scalar(0.7), cost)]
    close(implicit_plan(*inputs), closed_form(*inputs))
    close(torch.autograd.grad(implicit_plan(*inputs), inputs), torch.autograd.grad(closed_form(*inputs), inputs))
