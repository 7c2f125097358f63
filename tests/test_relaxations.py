"""SoftSort and NeuralSort against the sums and softmaxes that define them, written as loops."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor

from smoothops.relaxations import NeuralSort, Relaxation, SoftSort
from smoothops.smoothing import Problem

FAMILIES = [SoftSort, NeuralSort]
SIZES = (0, 1, 2, 3, 5, 8, 13)
Strength = float | Tensor

each = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("what", ["values", "matrix"])


def soft(family: type[Relaxation], what: str, x: Tensor, eps: Strength, m: Tensor | None = None) -> Tensor:
    strength = torch.as_tensor(eps, dtype=x.dtype)
    return getattr(family(eps), what)(x, strength.reshape(1) if strength.ndim == 0 else strength, m)


def soft_sort(x: list[float], eps: float) -> list[list[float]]:
    return [softmax([-abs(s - v) / eps for v in x]) for s in sorted(x)]


def neural_sort(x: list[float], eps: float) -> list[list[float]]:
    n = len(x)
    spread = [sum(abs(v - w) for w in x) for v in x]
    return [softmax([((2 * i - n - 1) * x[j] - spread[j]) / eps for j in range(n)]) for i in range(1, n + 1)]


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


LOOPS = {SoftSort: soft_sort, NeuralSort: neural_sort}


def dense(family: type[Relaxation], x: Tensor, eps: Strength) -> Tensor:
    """The definition in torch, with all n^2 pairs, for its derivatives."""
    n = x.shape[-1]
    if family is SoftSort:
        return torch.softmax(-(x.sort(stable=True).values.unsqueeze(-1) - x.unsqueeze(-2)).abs() / eps, -1)
    spread = (x.unsqueeze(-1) - x.unsqueeze(-2)).abs().sum(-1)
    factor = 2 * torch.arange(1, n + 1, dtype=x.dtype) - n - 1
    return torch.softmax((factor.unsqueeze(-1) * x.unsqueeze(-2) - spread.unsqueeze(-2)) / eps, -1)


def first_and_second(f, x: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    """f, the gradient of a weighted sum of it, and the gradient of a weighted sum of that."""
    x, eps = x.detach().requires_grad_(), eps.detach().requires_grad_()
    y = f(x, eps)
    first = torch.autograd.grad((y * cotangent(y)).sum(), (x, eps), create_graph=True)
    again = sum((g * cotangent(g)).sum() for g in first)
    return y, *first, *torch.autograd.grad(again, (x, eps))


@each
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("eps", [0.03, 0.5, 20.0])
def test_is_the_definition_in_loops(family: type[Relaxation], n: int, eps: float) -> None:
    for x in (normal(2, n, seed=n), normal(2, n, seed=n).round()):
        want = torch.tensor([LOOPS[family](row, eps) for row in x.tolist()], dtype=x.dtype).reshape(2, n, n)
        torch.testing.assert_close(soft(family, "matrix", x, eps), want, rtol=1e-11, atol=1e-14)
        values = (want * x.unsqueeze(-2)).sum(-1)
        torch.testing.assert_close(soft(family, "values", x, eps), values, rtol=1e-11, atol=1e-14)


@each
def test_ties_have_the_derivatives_of_the_definition(family: type[Relaxation]) -> None:
    """|.| has derivative 0 at 0, to second order too."""
    eps = torch.tensor(0.6, dtype=torch.float64)
    for x in (normal(6, seed=1), torch.tensor([1.0, 0, 1, 1, 0, 2]).double(), torch.zeros(5).double()):
        got = first_and_second(lambda x, e: soft(family, "matrix", x, e), x, eps)
        want = first_and_second(lambda x, e: dense(family, x, e), x, eps)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        values = first_and_second(lambda x, e: soft(family, "values", x, e), x, eps)
        want = first_and_second(lambda x, e: (dense(family, x, e) * x.unsqueeze(-2)).sum(-1), x, eps)
        for a, b in zip(values, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_equal_items_of_neural_sort_have_equal_gradients() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = soft(NeuralSort, "values", x, 0.8)
    (gradient,) = torch.autograd.grad((y * cotangent(y)).sum(), x)
    torch.testing.assert_close(gradient[[2, 4]], gradient[[0, 0]], rtol=1e-13, atol=0)


@each
def test_what_holds_for_every_input(family: type[Relaxation]) -> None:
    x = torch.cat([normal(60, 9, seed=3), normal(60, 9, seed=4).round()])
    for eps in (0.01, 0.3, 3.0, 100.0):
        p, y = soft(family, "matrix", x, eps), soft(family, "values", x, eps)
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(-1), torch.ones_like(x), rtol=0, atol=1e-14)
        assert (y.diff(dim=-1) >= -1e-14).all()  # monotone
        assert (y >= x.amin(-1, keepdim=True) - 1e-14).all()
        assert (y <= x.amax(-1, keepdim=True) + 1e-14).all()
        order = torch.randperm(9)
        assert torch.equal(soft(family, "values", x[:, order], eps), y)
        moved = soft(family, "values", 3 * x + 1000, 3 * eps)
        torch.testing.assert_close(moved, 3 * y + 1000, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(soft(family, "values", -x, eps), -y.flip(-1), rtol=1e-12, atol=1e-13)
    order = torch.randperm(9)
    free = normal(9, seed=5)  # without ties, columns move with their items
    torch.testing.assert_close(
        soft(family, "matrix", free[order], 0.5), soft(family, "matrix", free, 0.5)[:, order], rtol=1e-13, atol=0
    )
    # as the documentation says, the sum is another one
    assert (soft(family, "values", free**3, 1.0).sum() - (free**3).sum()).abs() > 0.01


@each
@both
def test_absent_items(family: type[Relaxation], what: str) -> None:
    m = torch.tensor([0, 1, 2, 5, 7]).unsqueeze(-1)
    inside = torch.arange(7) < m
    x = torch.where(inside, normal(5, 7, seed=6), 0).requires_grad_()
    eps = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either
        got = soft(family, what, x, eps, m)
        torch.autograd.grad((got * cotangent(got)).sum(), (x, eps), retain_graph=True)
    for row, count in zip(range(5), m.flatten().tolist(), strict=True):
        alone = x[row, :count].detach().requires_grad_()
        want = soft(family, what, alone, eps)
        index = (row, *[slice(count)] * want.ndim)
        torch.testing.assert_close(got[index], want, rtol=1e-13, atol=1e-15)
        weights = torch.zeros_like(got)
        weights[index] = cotangent(want)
        inner = torch.autograd.grad((want * cotangent(want)).sum(), (alone, eps))
        outer = torch.autograd.grad((got * weights).sum(), (x, eps), retain_graph=True)
        torch.testing.assert_close(outer[0][row, :count], inner[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(outer[1], inner[1], rtol=1e-12, atol=1e-14)
    assert (got[~inside] == 0).all()
    if what == "matrix":
        assert (got.mT[~inside] == 0).all()
    (gradient,) = torch.autograd.grad((got * cotangent(got)).sum(), x)
    assert (gradient[~inside] == 0).all()


@each
def test_hard_limit(family: type[Relaxation]) -> None:
    x = normal(50, 13, seed=7)
    order = x.argsort(-1)
    assert torch.equal(soft(family, "values", x, 1e-12), x.sort().values)
    assert torch.equal(soft(family, "matrix", x, 1e-12), torch.nn.functional.one_hot(order).double())
    pair = soft(family, "matrix", torch.tensor([1.0, 0.0, 1.0]).double(), 1e-12)  # a tie is averaged
    assert pair.tolist() == [[0, 1, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]


@each
@both
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("eps", [1e-30, 1.0, 1e30])
def test_no_overflow(family: type[Relaxation], what: str, scale: float, eps: float) -> None:
    x = torch.cat([normal(2, 6), normal(2, 6).round(), torch.tensor([[0, 1, -1e-9, 1e-9, 0, 1.0]])]) * scale
    x.requires_grad_()
    strength = torch.tensor(eps, dtype=torch.float64, requires_grad=True)
    y = soft(family, what, x, strength)
    assert y.isfinite().all()
    for gradient in torch.autograd.grad((y * cotangent(y)).sum(), (x, strength)):
        assert gradient.isfinite().all()


def test_neural_sort_beside_an_outlier() -> None:
    """The sums of |s_j - s_k| would round all small differences away."""
    x = normal(6, seed=8)
    alone = soft(NeuralSort, "matrix", x, 0.5)
    for far in (-1e30, 1e30):
        p = soft(NeuralSort, "matrix", torch.cat([x, torch.tensor([far]).double()]), 0.5)
        assert torch.equal(p[1:, :-1] if far < 0 else p[:-1, :-1], alone)


@each
@both
def test_derivatives(family: type[Relaxation], what: str) -> None:
    x = normal(2, 5, seed=9).requires_grad_()
    eps = torch.tensor([[0.5], [1.2]], dtype=torch.float64, requires_grad=True)
    m = torch.tensor([[5], [3]])
    for count in (None, m):
        for inputs in ((x, eps), (x, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))):

            def f(x: Tensor, e: Tensor, count: Tensor | None = count) -> Tensor:
                return soft(family, what, x, e, count)

            assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(f, inputs)


@each
@both
def test_function_transforms(family: type[Relaxation], what: str) -> None:
    x, eps, v = normal(3, 5, seed=10), torch.tensor([[0.5], [1.0], [2.0]]).double(), normal(3, 5, seed=11)

    def f(x: Tensor, e: Tensor) -> Tensor:
        return soft(family, what, x, e)

    def total(x: Tensor) -> Tensor:
        y = f(x, eps)
        return (y * cotangent(y)).sum()

    want = f(x, eps)
    torch.testing.assert_close(torch.func.vmap(f)(x, eps), want, rtol=1e-13, atol=1e-15)
    only_eps = torch.func.vmap(f, in_dims=(None, 0))(x[0], eps)
    torch.testing.assert_close(only_eps, f(x[:1].expand(3, 5), eps), rtol=1e-13, atol=1e-15)
    jacobian = torch.func.jacrev(f)(x, eps)
    _, tangent = torch.func.jvp(lambda x: f(x, eps), (x,), (v,))
    torch.testing.assert_close(tangent, (jacobian * v).sum((-1, -2)), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.func.jacfwd(f)(x, eps), jacobian, rtol=1e-11, atol=1e-13)
    hessian = torch.func.hessian(total)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, x), rtol=1e-10, atol=1e-12)


@each
@both
def test_compiled(family: type[Relaxation], what: str, fresh_compiler) -> None:
    x, m = normal(3, 5, seed=12), torch.tensor([[5], [3], [1]])
    x = torch.where(torch.arange(5) < m, x, 0)

    def f(x: Tensor, m: Tensor | None) -> Tensor:
        return getattr(family(0.5), what)(x, torch.full((1, 1), 0.5, dtype=x.dtype), m)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for count in (None, m):
        results = []
        for g in (f, compiled):
            given = x.clone().requires_grad_()
            y = g(given, count)
            results.append((y, *torch.autograd.grad((y * cotangent(y)).sum(), given)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@each
@both
def test_rows_are_independent(family: type[Relaxation], what: str) -> None:
    """Alone, among few and among many rows a row has the same value and gradients, to the bit, on any threads."""
    threads = torch.get_num_threads()
    try:
        for n, count in ((5, 1), (33, 1), (200, 3)):
            torch.set_num_threads(count)
            x = normal(20, n, seed=n).requires_grad_()
            eps = torch.full((20, 1), 0.3, dtype=torch.float64, requires_grad=True)
            y = soft(family, what, x, eps)
            c = cotangent(y)
            whole = torch.autograd.grad((y * c).sum(), (x, eps))
            for part in (slice(0, 1), slice(3, 4), slice(5, 18)):
                some = [t[part].detach().requires_grad_() for t in (x, eps)]
                got = soft(family, what, *some)
                assert torch.equal(got, y[part])
                for a, b in zip(torch.autograd.grad((got * c[part]).sum(), some), whole, strict=True):
                    assert torch.equal(a, b[part])
    finally:
        torch.set_num_threads(threads)


@both
def test_against_softtorch(what: str) -> None:
    """Its NeuralSort is another one: there |.| is softened too."""
    peer = pytest.importorskip("softtorch", reason="softtorch is not installed: an optional comparison")
    x = normal(4, 9, seed=13)
    p = peer.argsort(x, softness=0.7, method="softsort", mode="smooth", standardize=False)
    want = p if what == "matrix" else (p * x.unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(soft(SoftSort, what, x, 0.7), want, rtol=1e-12, atol=1e-14)


@each
def test_is_a_smoothing(family: type[Relaxation]) -> None:
    relaxation = family(0.5)
    problem = Problem(lambda: "hard", lambda reg: "soft", relaxed=lambda r: r)
    assert relaxation.solve(problem) is relaxation
    assert family(0).solve(problem) == family(0.0).solve(problem) == "hard"
    assert repr(relaxation) == f"{family.__name__}(eps=0.5)"
    for twin in (copy.deepcopy(relaxation), pickle.loads(pickle.dumps(relaxation))):
        assert repr(twin) == repr(relaxation)
    with pytest.raises(ValueError, match=f"{family.__name__} softens sorts only.*so.Quadratic"):
        relaxation.solve(Problem(lambda: torch.zeros(1), lambda reg: torch.zeros(1)))


@each
def test_bad_strength(family: type[Relaxation]) -> None:
    for eps in (-1.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match=f"{family.__name__} eps must be positive"):
            family(eps)
    with pytest.raises(TypeError, match="must be a number or a tensor, got str"):
        family("strong")
