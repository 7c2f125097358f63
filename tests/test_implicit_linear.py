"""Linear solves: every solver against torch, every derivative, samples that do not know of each other, failures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicit.krylov import CG, GMRES, BiCGStab, Neumann, NormalCG
from implicit.linear import LU, Auto, Cholesky, ConvergenceError, LinearOperator, LstSq, linear_solve

D = torch.float64


def general(*shape: int, seed: int = 0) -> Tensor:
    """Well-conditioned matrices, not symmetric."""
    return normal(*shape, seed=seed) / (2 * shape[-1] ** 0.5) + 2 * torch.eye(shape[-1], dtype=D)


def definite(*shape: int, seed: int = 0) -> Tensor:
    a = general(*shape, seed=seed)
    return (a @ a.mT + (a @ a.mT).mT) / 2


def symmetric(a: Tensor) -> Tensor:
    """Keeps perturbed arguments symmetric, as CG and Cholesky ask."""
    return (a + a.mT) / 2


GENERAL = [LU(), LstSq(), GMRES(), GMRES(restart=3), BiCGStab(), NormalCG(), Auto(), Auto(dense=1)]
DEFINITE = [Cholesky(), CG()]
FREE = [GMRES(), BiCGStab(), NormalCG(), Auto(dense=1), CG(), Neumann(preconditioner=lambda v: 0.2 * v)]
SOLVERS = [(s, general) for s in GENERAL] + [(s, definite) for s in [*DEFINITE, FREE[-1]]]


def name(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value).split("<")[0]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "matrix"), SOLVERS, ids=name)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_values(solver: Any, matrix: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    a, x = matrix(*shape, 7, 7), normal(*shape, 7, seed=1)
    b = (a @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(linear_solve(a, b, method=solver), x, rtol=1e-8, atol=1e-8)
    free = linear_solve(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), b, method=solver)
    torch.testing.assert_close(free, x, rtol=1e-8, atol=1e-8)
    columns = normal(*shape, 7, 2, seed=2)
    torch.testing.assert_close(linear_solve(a, a @ columns, method=solver), columns, rtol=1e-8, atol=1e-8)


def test_right_hand_sides_are_told_apart_as_torch_does() -> None:
    for a_shape, b_shape in [
        ((3, 3), (3,)),
        ((3, 3), (3, 2)),
        ((4, 3, 3), (4, 3)),
        ((4, 3, 3), (3, 2)),
        ((3, 3), (4, 3, 1)),
    ]:
        a, b = general(*a_shape), normal(*b_shape)
        for method in (Auto(), GMRES()):
            torch.testing.assert_close(
                linear_solve(a, b, method=method), torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9
            )
    assert linear_solve(general(0, 0), normal(0)).shape == (0,)
    assert linear_solve(general(0, 3, 3), normal(0, 3), method=GMRES()).shape == (0, 3)


@pytest.mark.parametrize("spectrum", ["spread", "outlier"])
def test_condition_1e5_is_solved_by_default(spectrum: str) -> None:
    n = 150
    q = torch.linalg.qr(normal(n, n))[0]
    values = torch.logspace(-5, 0, n, dtype=D) if spectrum == "spread" else torch.linspace(1, 2, n, dtype=D)
    values[-1] = 1.0 if spectrum == "spread" else 1e5
    a = symmetric((q * values) @ q.mT)
    x = normal(n, seed=1)
    for method, matrix in ((CG(), a), (Auto(), a), (Auto(dense=1), lambda v: a @ v), (Cholesky(), a)):
        found = linear_solve(matrix, a @ x, method=method)
        assert (found - x).norm() / x.norm() < 1e-6


def test_single_precision_reaches_its_default_tolerance() -> None:
    a, x = definite(20, 20).float(), normal(20).float()
    for method in (LU(), CG(), GMRES(), BiCGStab(), NormalCG()):
        found = linear_solve(a, a @ x, method=method)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, x, rtol=2e-3, atol=2e-3)


def test_auto_tells_its_choice() -> None:
    def operator(n: int, scale: Tensor) -> LinearOperator:
        return LinearOperator((n, n), lambda v: scale * v + 0.1 * v.roll(1, -1) * (scale[0] - 1), dtype=D)

    assert isinstance(Auto().choose(operator(512, torch.ones(512, dtype=D))), LU)
    assert isinstance(Auto().choose(operator(600, torch.ones(600, dtype=D))), CG)
    assert isinstance(Auto().choose(operator(600, torch.full((600,), 3.0, dtype=D))), GMRES)
    assert isinstance(Auto(dense=1000).choose(operator(600, torch.ones(600, dtype=D))), LU)
    assert Auto(rtol=1e-3, max_iter=7).choose(operator(600, torch.ones(600, dtype=D))).max_iter == 7
    # symmetric, but indefinite: CG may break down, GMRES takes over
    scale = torch.linspace(-1, 1, 600, dtype=D)
    b = normal(600)
    torch.testing.assert_close(
        linear_solve(lambda v: scale * v, scale * b, method=Auto(max_iter=9000)), b, rtol=1e-6, atol=1e-6
    )


def test_warm_start_ridge_and_preconditioner() -> None:
    a, b = definite(40, 40), normal(40)
    x, shifted = torch.linalg.solve(a, b), torch.linalg.solve(a + 0.3 * torch.eye(40, dtype=D), b)
    operator = LinearOperator.from_tensor(a)
    for solver in (CG(), GMRES(), BiCGStab(), NormalCG()):
        _, cold = solver.solve(operator, b)
        found, warm = solver.solve(operator, b, x + 1e-9)
        assert warm.iterations < cold.iterations
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
        shifted = linear_solve(a, b, method=type(solver)(ridge=0.3))
        torch.testing.assert_close(
            shifted, torch.linalg.solve(a + 0.3 * torch.eye(40, dtype=D), b), rtol=1e-9, atol=1e-9
        )
    scales = torch.logspace(0, 4, 40, dtype=D)
    bad = LinearOperator.from_tensor(a * scales.unsqueeze(-1) * scales)
    _, plain = CG().solve(bad, b)
    for jacobi in (torch.diag(scales**-2), lambda v: v / scales**2):
        _, helped = CG(preconditioner=jacobi).solve(bad, b)
        assert helped.iterations < plain.iterations / 3


def test_preconditioner_is_transposed_for_the_adjoint() -> None:
    a, b = general(30, 30), normal(30)
    inverse = torch.linalg.inv(a) + 0.001 * normal(30, 30, seed=3)
    operator = LinearOperator.from_tensor(a)
    kinds = (inverse, lambda v: (inverse @ v.unsqueeze(-1)).squeeze(-1), LinearOperator.from_tensor(inverse))
    for solver in (GMRES, BiCGStab, Neumann, lambda preconditioner: Auto(1, preconditioner=preconditioner)):
        for kind in kinds:
            x, report = solver(preconditioner=kind).T.solve(operator.T, b)
            torch.testing.assert_close(a.mT @ x, b, rtol=1e-9, atol=1e-9)
            assert report.iterations <= 9


# --- operators --------------------------------------------------------------------------------------------------------


def test_operator() -> None:
    a, v = general(2, 5, 5), normal(2, 5)
    for operator in (
        LinearOperator.from_tensor(a),
        LinearOperator((2, 5, 5), lambda u: (a @ u.unsqueeze(-1)).squeeze(-1), dtype=D),
    ):
        want = {operator: a, operator.T: a.mT, operator.T.T: a, operator.shifted(2.0): a + 2 * torch.eye(5, dtype=D)}
        for each, matrix in want.items():
            torch.testing.assert_close(each.dense(), matrix, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(each.matvec(v), (matrix @ v.unsqueeze(-1)).squeeze(-1), rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(
                each.rmatvec(v), (matrix.mT @ v.unsqueeze(-1)).squeeze(-1), rtol=1e-13, atol=1e-13
            )
    assert repr(operator) == "LinearOperator(shape=(2, 5, 5), dtype=torch.float64, device=cpu)"


def test_solvers_are_values() -> None:
    for solver in (
        LU(ridge=0.5),
        Cholesky(),
        LstSq(rtol=1e-3),
        CG(),
        NormalCG(),
        GMRES(restart=7),
        BiCGStab(),
        Neumann(),
        Auto(),
    ):
        again = eval(repr(solver))
        assert repr(pickle.loads(pickle.dumps(solver))) == repr(copy.deepcopy(solver)) == repr(again) == repr(solver)
        with pytest.raises(AttributeError):
            solver.ridge = 1.0  # type: ignore[misc]


# --- derivatives ------------------------------------------------------------------------------------------------------


def closures(method: Any) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """x(A, b) from a tensor, from a callable that closes over A, and from one that computes with A first."""

    def definite_too(a: Tensor) -> Tensor:
        return symmetric(a) if isinstance(method, (CG, Cholesky, Neumann)) else a

    def closed(a: Tensor, b: Tensor) -> Tensor:
        a = definite_too(a)
        return linear_solve(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), b, method=method)

    return [lambda a, b: linear_solve(definite_too(a), b, method=method), closed]


@pytest.mark.parametrize("method", [*GENERAL, *DEFINITE, FREE[-1]], ids=name)
@pytest.mark.parametrize("kind", [0, 1], ids=["tensor", "callable"])
def test_gradients(method: Any, kind: int) -> None:
    f = closures(method)[kind]
    a, b = definite(3, 3).requires_grad_(), normal(3).requires_grad_()
    assert torch.autograd.gradcheck(f, (a, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (a, b), check_batched_grad=True)


@pytest.mark.parametrize("method", [*GENERAL, *DEFINITE, FREE[-1]], ids=name)
@pytest.mark.parametrize("kind", [0, 1], ids=["tensor", "callable"])
def test_transforms(method: Any, kind: int) -> None:
    f = closures(method)[kind]
    w = normal(4, seed=9)

    def want(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.inv(symmetric(a) if isinstance(method, (CG, Cholesky, Neumann)) else a) @ b

    def scalar(g: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b: (g(a, b) ** 2 * w).sum()

    a, b = definite(3, 4, 4), normal(3, 4)
    transforms: list[Callable[..., Any]] = [
        lambda g: vmap(g)(a, b),
        lambda g: vmap(g, (None, 0))(a[0], b),
        lambda g: vmap(g, (0, None))(a, b[0]),
        lambda g: vmap(vmap(g, (None, 0)), (0, None))(a, b),
        lambda g: jacrev(g)(a[0], b[0]),
        lambda g: jacfwd(g)(a[0], b[0]),
        lambda g: jvp(g, (a[0], b[0]), (a[1], b[1]))[1],
        lambda g: vmap(grad(scalar(g)))(a, b),
        lambda g: hessian(scalar(g))(a[0], b[0]),
        lambda g: jacrev(jacrev(scalar(g)))(a[0], b[0]),
        lambda g: jacrev(jacfwd(scalar(g)))(a[0], b[0]),
        lambda g: vmap(hessian(scalar(g)))(a[:2], b[:2]),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(f), transform(want), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [LU(), LstSq(), Cholesky(), Auto(), GMRES(), CG()], ids=name)
def test_forward_over_forward_is_right_or_refused(method: Any) -> None:
    f = closures(method)[0]
    a, b = definite(3, 3), normal(3)

    def want(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.inv(symmetric(a) if isinstance(method, (CG, Cholesky)) else a) @ b

    if isinstance(method, (GMRES, CG)):
        with pytest.raises(NotImplementedError, match="hessian"):
            jacfwd(jacfwd(f))(a, b)
    else:
        torch.testing.assert_close(jacfwd(jacfwd(f))(a, b), jacfwd(jacfwd(want))(a, b), rtol=1e-9, atol=1e-10)


def test_third_order() -> None:
    for method in (LU(), GMRES(), CG()):

        def f(t: Tensor, method: Any = method) -> Tensor:
            return linear_solve(lambda v: (1 + t) * v, torch.ones(2, dtype=D), method=method).sum()

        t = torch.tensor(0.5, dtype=D)
        assert abs(grad(grad(grad(f)))(t) + 12 / 1.5**4) < 1e-9


@pytest.mark.parametrize("method", [Auto(), LU(), Cholesky(), LstSq()], ids=name)
def test_compiles(method: Any) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return loss(linear_solve(a, b, method=method) ** 2)

    a, b = definite(4, 4).requires_grad_(), normal(4).requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), f(a, b), rtol=1e-12, atol=1e-12)
    want, got = (torch.autograd.grad(g(a, b), (a, b)) for g in (f, compiled))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_singular_systems_have_the_derivative_of_the_pseudoinverse() -> None:
    u, v = normal(4, 2), normal(2, 4, seed=1)
    b = normal(4, seed=2)

    def f(u: Tensor) -> Tensor:
        return linear_solve(u @ v, b, method=LstSq())

    torch.testing.assert_close(f(u), torch.linalg.pinv(u @ v) @ b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(f, (u.requires_grad_(),))


# --- samples and failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [*DEFINITE, LU(), GMRES(), GMRES(restart=3), BiCGStab(), NormalCG(), Neumann()], ids=name
)
def test_samples_are_independent_to_the_bit(solver: Any) -> None:
    n = 12
    q = torch.linalg.qr(normal(n, n))[0]
    # the samples need very different numbers of iterations
    values = torch.stack([1 + s * torch.linspace(-1, 1, n, dtype=D) for s in (0.0, 0.1, 0.5, 0.9)])

    def operator(values: Tensor) -> LinearOperator:
        # elementwise products alone: a matrix product may depend on the batch
        return LinearOperator((*values.shape, n), lambda v: values * v + 1e-3 * v.flip(-1), dtype=D)

    b = normal(4, n) @ q
    together, report = solver.solve(operator(values), b)
    assert bool(report.converged.all())
    for i in range(4):
        alone, single = solver.solve(operator(values[i : i + 1]), b[i : i + 1])
        assert torch.equal(together[i], alone[0])
        assert report.iterations[i] == single.iterations[0]
        one, _ = solver.solve(operator(values[i]), b[i])  # without a batch the sums may be ordered otherwise
        torch.testing.assert_close(one, alone[0], rtol=1e-9, atol=1e-10)
    b[2] = float("nan")
    x, report = solver.solve(operator(values), b)
    assert report.converged.tolist() == [True, True, False, True]
    assert torch.equal(x[[0, 1, 3]], together[[0, 1, 3]])


def test_a_singular_sample_is_named() -> None:
    a = general(5, 3, 3)
    a[3] = torch.arange(9, dtype=D).reshape(3, 3)  # singular, though no pivot is exactly zero
    a[1, 0] = 0.0
    for b in (torch.ones(5, 3, dtype=D), a.sum(-1)):  # the second one is in the range
        with pytest.raises(ConvergenceError, match=r"singular matrix in 2 of 5 samples \(1, 3\).*LstSq"):
            linear_solve(a, b)
        with pytest.raises(ConvergenceError, match=r"samples \(1, 3\)"):
            vmap(linear_solve)(a, b)
    x = linear_solve(a, a.sum(-1), method=LstSq())
    torch.testing.assert_close((a @ x.unsqueeze(-1)).squeeze(-1), a.sum(-1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ConvergenceError, match="positive definite"):
        linear_solve(-torch.eye(3, dtype=D), torch.ones(3, dtype=D), method=Cholesky())


def test_failures_raise() -> None:
    a, b = general(20, 20), normal(20)
    with pytest.raises(ConvergenceError, match=r"did not converge: relative residual .* after 2 iterations.*max_iter"):
        linear_solve(a, b, method=GMRES(max_iter=2))
    with pytest.raises(ConvergenceError, match="relative residual"):
        linear_solve(3 * a, b, method=Neumann())  # diverges
    for method in (CG(), Cholesky()):
        with pytest.raises(ValueError, match="symmetric"):
            linear_solve(a, b, method=method)
    # a failure in the derivative alone: the forward solve starts at its solution
    b = b.requires_grad_()
    x = linear_solve(a, b, method=GMRES(max_iter=2), x0=torch.linalg.solve(a, b))
    with pytest.raises(ConvergenceError, match="did not converge"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"square.*\(2, 3\)"),
        ((torch.eye(3), torch.ones(2)), ValueError, r"\(3, 3\).*\(2,\)|\(3, 3\).*2"),
        ((torch.eye(3), torch.ones(3, dtype=D)), TypeError, "float32.*float64"),
        ((torch.eye(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)), TypeError, "floating point"),
        ((torch.eye(3), [1.0, 1.0, 1.0]), TypeError, "list"),
        (("A", torch.ones(3)), TypeError, "str"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_solve(*arguments)


def test_fake_tensors_give_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert linear_solve(torch.eye(3), torch.ones(3)).shape == (3,)
        assert linear_solve(torch.eye(3).expand(2, 3, 3), torch.ones(2, 3)).shape == (2, 3)


def test_bad_options() -> None:
    for make in (
        lambda: CG(max_iter=0), lambda: GMRES(rtol=-1.0), lambda: LU(ridge=-1.0), lambda: GMRES(restart=0),
        lambda: LstSq(rtol=2.0), lambda: Auto(max_iter=0), lambda: LinearOperator((2, 3), torch.clone),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be|square"):
            make()
    with pytest.raises(TypeError, match="method"):
        linear_solve(torch.eye(2), torch.ones(2), method="cg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x0"):
        linear_solve(torch.eye(2), torch.ones(2), method=CG(), x0=torch.ones(3))
