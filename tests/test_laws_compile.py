"""Law 3: torch.compile without a graph break gives the values and gradients of eager mode."""

from __future__ import annotations

import pytest
import torch
from oracles import loss, normal, spread, value_and_gradient
from registry import Case, case, cases
from torch import Tensor

import smoothops as so

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch's own, from the compiler's imports and from numpy underneath it
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def compiled(f, backend: str = "aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def same(f, x: Tensor, backend: str = "aot_eager") -> None:
    wanted = value_and_gradient(f, x)  # first: a ConvexSet states its programme at the first call, in cvxpy
    for got, want in zip(value_and_gradient(compiled(f, backend), x), wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("case", cases("compile", one_each=True))
def test_compiled_is_eager(case: Case) -> None:
    same(case, normal(3, 6, seed=1))


@pytest.mark.parametrize("name", ["argmax-entropy", "topk_mask-quadratic", "rank-entropy", "sort-quadratic"])
def test_compiled_transforms(name: str) -> None:
    """The gradient, vmap and jvp are taken inside the compiled function."""
    chosen, x, v = case(name), normal(3, 6, seed=2), normal(3, 6, seed=3)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: loss(chosen(x)))(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: chosen(x), (x,), (v,))[1]

    for f in (gradient, torch.vmap(lambda x: chosen(x)), tangent):
        torch.testing.assert_close(compiled(f)(x), f(x), **EXACT)


@pytest.mark.parametrize("name", ["argmax", "rank", "sort", "topk_mask"])
def test_compiled_parameters(name: str) -> None:
    """eps, k and w as tensors with gradient."""
    x = normal(3, 6, seed=4)
    calls = {
        "argmax": lambda e: so.argmax(x, -1, smoothing=so.Tsallis(e + 1, e)),
        "rank": lambda e: so.Permutahedron(spread(6) * e).argmax(x, so.Quadratic(e)),
        "sort": lambda e: so.sort(x, smoothing=so.Entropy(e)),
        "topk_mask": lambda e: so.topk_mask(x, e + 1, smoothing=so.BinaryEntropy(e)),
    }
    same(calls[name], torch.tensor(0.5, dtype=torch.float64))


def test_other_sizes_need_no_new_code() -> None:
    """One compiled function serves every size: with dynamic shapes nothing is compiled again after the second."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda x: so.rank(x, smoothing=0.5), fullgraph=True, backend=counter, dynamic=True)
    for rows, n in ((3, 6), (4, 7), (9, 12), (5, 30)):
        x = normal(rows, n, seed=5)
        torch.testing.assert_close(fast(x), so.rank(x, smoothing=0.5), **EXACT)
    assert counter.frame_count <= 2


def test_inductor() -> None:
    """The code that a user gets: one network with a rank, a mask and a soft maximum."""

    def network(x: Tensor) -> Tensor:
        ranks = so.rank(x, smoothing=so.Quadratic(0.4))
        mask = so.topk_mask(x, 2, smoothing=so.Entropy(0.5))
        return so.amax(ranks * mask, -1, smoothing=so.Entropy(0.7))

    same(network, normal(4, 8, seed=6), "inductor")


FUSED = [
    "argmax-entropy",
    "topk_mask-quadratic",
    "topk_mask-entropy",
    "rank-entropy",
    "sort-quadratic",
    "sort-laplace-laplace",
]


@pytest.mark.parametrize("name", FUSED)
def test_compiled_rows_that_hold_nan_or_infinities(name: str) -> None:
    """One row has a NaN, one an infinity, one only -inf: each is as in eager mode, and so are the others."""
    x = normal(5, 6, seed=7)
    x[0, 1], x[1, 2], x[2] = torch.nan, torch.inf, -torch.inf
    for got, want in zip(
        value_and_gradient(compiled(case(name)), x), value_and_gradient(case(name), x), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want, equal_nan=True, **EXACT)


@pytest.mark.parametrize("name", FUSED)
def test_transforms_of_compiled_functions(name: str) -> None:
    """A function compiled for a plain call serves in a transform, and differentiates twice where the backend can."""
    chosen, x = case(name), normal(3, 6, seed=8)
    fast = torch.compile(lambda x: chosen(x), backend="eager")
    torch.testing.assert_close(fast(x), chosen(x), **EXACT)
    torch.testing.assert_close(torch.vmap(fast)(x), torch.vmap(chosen)(x), **EXACT)
    torch.testing.assert_close(torch.func.jacrev(fast)(x), torch.func.jacrev(chosen)(x), **EXACT)

    def curvature(f) -> Tensor:
        x0 = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(f(x0).square()), x0, create_graph=True)
        return torch.autograd.grad(loss(g), x0)[0]

    torch.testing.assert_close(curvature(fast), curvature(chosen), **EXACT)
