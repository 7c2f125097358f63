"""Optimality conditions: zero at solutions that are known, with the derivatives of those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from implicit.adjoint import OneStep, attach
from implicit.conditions import kkt, mirror, newton, projected, proximal, stationary
from implicit.fixed_point import fixed_point
from implicit.linear import LU, ConvergenceError, LstSq, Neumann
from implicit.root import Newton, root

D = torch.float64
Q = normal(4, 4)
Q = Q @ Q.mT + torch.eye(4, dtype=D)
A = normal(2, 4, seed=1)


def quadratic(x: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return x @ Q @ x / 2 - c @ x


def on_plane(x: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return A @ x - b


def equality_solution(c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    system = torch.cat([torch.cat([Q, A.mT], 1), torch.cat([A, torch.zeros(2, 2, dtype=D)], 1)])
    z = torch.linalg.inv(system) @ torch.cat([c, b])
    return z[:4], z[4:]


def close(a: Any, b: Any, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def cases() -> dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any]]]:
    """name -> (residual(z, c), the solution as a function of c)"""

    def square(z: Tensor, c: Tensor) -> Tensor:
        return (torch.arange(1, 5, dtype=D) * (z - c) ** 2).sum() / 2

    def soft(v: Tensor, t: Any) -> Tensor:
        return v.sign() * (v.abs() - 0.3 * t).relu()

    def shrunk(c: Tensor) -> Tensor:
        return soft(c, 1 / torch.arange(1, 5, dtype=D))

    def entropic(z: Tensor, c: Tensor) -> Tensor:
        return (z * (z.log() - c)).sum()

    return {
        "stationary": (stationary(square), lambda c: c * 1.0),
        "projected": (projected(square, torch.relu), torch.relu),
        "proximal": (proximal(square, soft), shrunk),
        "mirror": (mirror(entropic, lambda v: v.softmax(-1), torch.log), lambda c: c.softmax(-1)),
        "kkt": (kkt(lambda x, c: quadratic(x, c, c), lambda x, c: A @ x - 1), lambda c: equality_solution(c, ONES)),
        "newton": (newton(lambda z, c: z**3 + z @ Q - c @ Q - c**3), lambda c: c * 1.0),
    }


ONES = torch.ones(2, dtype=D)
CASES = cases()
C = torch.tensor([0.5, -1.1, 2.0, -0.2], dtype=D)


def flat(z: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in z]) if isinstance(z, tuple) else z


@pytest.mark.parametrize("name", CASES)
def test_condition_has_the_derivatives_of_the_solution(name: str) -> None:
    residual, solution = CASES[name]
    z = solution(C)
    close(flat(residual(z, C)), torch.zeros_like(flat(z)), 1e-12)
    assert flat(residual(torch.utils._pytree.tree_map(lambda t: t + 0.1, z), C)).abs().max() > 1e-3

    def f(c: Tensor) -> Tensor:
        return flat(attach(z, residual, c, check=False))

    def want(c: Tensor) -> Tensor:
        return flat(solution(c))

    for transform in (
        lambda g: jacrev(g)(C),
        lambda g: jacfwd(g)(C),
        lambda g: jvp(g, (C,), (normal(4),))[1],
        lambda g: hessian(lambda c: loss(g(c)))(C),
        lambda g: torch.autograd.functional.jacobian(g, C),
        lambda g: torch.autograd.functional.hessian(lambda c: loss(g(c)), C),
    ):
        close(transform(f), transform(want), 1e-8)
    c = C.clone().requires_grad_()
    assert torch.autograd.gradcheck(residual_of(residual, z), (c,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(residual_of(residual, z), (c,), check_batched_grad=True)


def residual_of(residual: Callable[..., Any], z: Any) -> Callable[[Tensor], Tensor]:
    return lambda c: flat(residual(torch.utils._pytree.tree_map(lambda t: t + 0.1 * c.sum(), z), c))


@pytest.mark.parametrize("name", CASES)
def test_condition_compiles_and_maps(name: str) -> None:
    residual, solution = CASES[name]
    batch = torch.stack([C, C.flip(0), 0.5 * C])
    z = solution(C)
    each = [flat(residual(z, c)) for c in batch]
    close(vmap(lambda c: flat(residual(z, c)))(batch), torch.stack(each), 1e-12)

    def value(c: Tensor) -> Tensor:
        return loss(flat(residual(z, c)))

    c = batch[1].clone().requires_grad_()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(c), c), torch.autograd.grad(value(c), c), 1e-11)


def test_kkt_with_all_constraints() -> None:
    """min x'Qx/2 - c'x with A x = b, x >= l: entries at their bound leave the system."""
    c, b = C.clone(), torch.tensor([0.5, -0.3], dtype=D)
    bound = torch.tensor([-9.0, 0.4, -9.0, -9.0], dtype=D)

    def bounds(x: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return bound - x

    residual = kkt(quadratic, on_plane, bounds)

    def solution(c: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e = torch.zeros(1, 4, dtype=D)
        e[0, 1] = 1.0
        rows = torch.cat([A, e])
        system = torch.cat([torch.cat([Q, rows.mT], 1), torch.cat([rows, torch.zeros(3, 3, dtype=D)], 1)])
        z = torch.linalg.inv(system) @ torch.cat([c, b, bound[1:2]])
        return z[:4], z[4:6], torch.cat([torch.zeros(1, dtype=D), -z[6:], torch.zeros(2, dtype=D)])

    x, equality, inequality = solution(c, b)
    assert inequality[1] > 0.01
    for part in residual((x, equality, inequality), c, b):
        close(part, torch.zeros_like(part), 1e-12)
    inputs = (c.requires_grad_(), b.requires_grad_())
    got = attach((x.detach(), equality.detach(), inequality.detach()), residual, *inputs)
    for a, w in zip(got, solution(*inputs), strict=True):
        grads = (torch.autograd.grad(loss(t), inputs, retain_graph=True) for t in (a, w))
        close(*grads)
    # root reaches the same point from the unconstrained one
    start = (torch.zeros(4, dtype=D), torch.zeros(2, dtype=D), torch.zeros(4, dtype=D))
    found = root(residual, start, c.detach(), b.detach(), method=Newton())
    close(found[0], x.detach(), 1e-8)


def test_weakly_active_inequality_has_the_mean_derivative() -> None:
    residual = kkt(lambda x, c: (x - c) ** 2 / 2, None, lambda x, c: -x)
    c = torch.tensor(0.0, dtype=D, requires_grad=True)
    zero = torch.tensor(0.0, dtype=D)
    x, dual = attach((zero, zero), residual, c)
    # on the two sides dx/dc is 1 and 0, ddual/dc is 0 and -1
    close(torch.autograd.grad(x, c, retain_graph=True)[0], torch.tensor(0.5, dtype=D))
    close(torch.autograd.grad(dual, c)[0], torch.tensor(-0.5, dtype=D))


def test_dependent_constraints_are_singular() -> None:
    twice = kkt(lambda x, c: ((x - c) ** 2).sum() / 2, lambda x, c: torch.stack([x.sum(), 2 * x.sum()]))
    c = torch.tensor([1.0, -1.0], dtype=D, requires_grad=True)
    z = (c.detach().clone(), torch.zeros(2, dtype=D))
    x, _ = attach(z, twice, c)
    with pytest.raises(ConvergenceError, match="singular"):
        loss(x).backward()
    x, _ = attach(z, twice, c, linear=LstSq())
    # x is unique, only the duals are not: the projection on sum(x) = 0
    rows = [torch.autograd.grad(x[i], c, retain_graph=True)[0] for i in range(2)]
    close(torch.stack(rows), torch.eye(2, dtype=D) - 0.5)


def test_newton_condition_has_the_identity_as_jacobian() -> None:
    scaled = newton(lambda z, a: z**2 - a)
    a = torch.tensor([4.0, 9.0], dtype=D, requires_grad=True)
    z = torch.tensor([2.0, 3.0], dtype=D)
    close(jacrev(scaled)(z, a.detach()), torch.eye(2, dtype=D))
    want = 1 / (2 * z)
    close(torch.autograd.grad(attach(z, scaled, a, linear=Neumann(max_iter=1)).sum(), a)[0], want)
    # one differentiated step of the Newton map is exact
    found = fixed_point(lambda z, a: z - scaled(z, a), torch.ones(2, dtype=D), a, grad=OneStep())
    close(torch.autograd.grad(found.sum(), a)[0], want)
    batched = newton(lambda z, a: z**2 - a, linear=LU(), batch_dims=1)
    close(batched(z.unsqueeze(-1) + 0.1, a.unsqueeze(-1))[:, 0], scaled(z + 0.1, a))
    tree = newton(lambda z, a: {"x": z["x"] ** 2 - a, "y": z["y"] - z["x"].sum()})
    step = tree({"x": z + 0.1, "y": torch.tensor(0.0, dtype=D)}, a)
    close(step["x"], scaled(z + 0.1, a))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stationary(3), TypeError, "int"),
        (lambda: projected(torch.sum, None), TypeError, "proj"),
        (lambda: proximal(torch.sum, 1.0), TypeError, "prox"),
        (lambda: mirror(torch.sum, torch.relu, None), TypeError, "phi_grad"),
        (lambda: kkt(torch.sum), ValueError, "stationary"),
        (lambda: kkt("f", torch.sum), TypeError, "str"),
        (lambda: newton(None), TypeError, "NoneType"),
        (lambda: kkt(torch.sum, torch.sum)(torch.ones(2)), ValueError, "tuple of 2"),
        (lambda: kkt(torch.sum, torch.sin)((torch.ones(2), torch.ones(3))), ValueError, r"\(2,\).*\(3,\)"),
        (lambda: stationary(lambda z: torch.ones(()))(torch.ones(2)), ValueError, "depend"),
        (lambda: stationary(lambda z: 1.0)(torch.ones(2)), TypeError, "float"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
