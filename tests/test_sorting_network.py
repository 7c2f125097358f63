"""Soft sorting networks against their compare-exchanges written one pair at a time, and against diffsort."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from oracles import cotangent, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smoothops.noises import Logistic
from smoothops.sorting_network import Bitonic, Cauchy, Layer, Network, OddEven, Optimal, Reciprocal, Sigmoid
from smoothops.sorting_network import SortingNetwork as Sorter

SIZES = (0, 1, 2, 3, 5, 8, 13)
# f on all of the line, and the largest error of a compare-exchange, max s f(-s)
SIGMOIDS: dict[type[Sigmoid], tuple[Callable[[float], float], float]] = {
    Logistic: (lambda v: 1 / (1 + math.exp(-v)), 0.27846454276107),
    Cauchy: (lambda v: math.atan(v) / math.pi + 0.5, 1 / math.pi),
    Reciprocal: (lambda v: (v / (2 + abs(v)) + 1) / 2, 1),
    Optimal: (lambda v: v + 0.5 if abs(v) <= 0.25 else 1 - 1 / (16 * v) if v > 0 else -1 / (16 * v), 1 / 16),
}
KINDS = [Bitonic, OddEven]

kinds = pytest.mark.parametrize("kind", KINDS)
sigmoids = pytest.mark.parametrize("sigmoid", SIGMOIDS)
both = pytest.mark.parametrize("what", ["values", "matrix"])


def soft(sorter: Sorter, what: str, x: Tensor, eps: Tensor | None = None, m: Tensor | None = None) -> Tensor:
    strength = torch.as_tensor(sorter.eps if eps is None else eps, dtype=x.dtype)
    return getattr(sorter, what)(x, strength.reshape(1) if strength.ndim == 0 else strength, m)


def comparisons(kind: type[Network], n: int) -> Iterator[tuple[int, int]]:
    """(wire of the smaller, wire of the larger), textbook form: bitonic with blocks in alternating directions."""
    if kind is OddEven:
        yield from ((i, i + 1) for step in range(n) for i in range(step % 2, n - 1, 2))
        return
    wires = 1 << (n - 1).bit_length() if n > 1 else n
    block = 2
    while block <= wires:
        step = block // 2
        while step:
            for i in range(wires):
                if i < i ^ step:
                    yield (i, i ^ step) if i & block == 0 else (i ^ step, i)
            step //= 2
        block *= 2


def network_in_loops(x: list[float], eps: float, f: Callable[[float], float], kind: type[Network]) -> list[list[float]]:
    """The values, each followed by its row of the matrix; wires without an item hold one larger than all others."""
    n = len(x)
    wires: list[list[float] | None] = [[v, *(float(i == j) for j in range(n))] for i, v in enumerate(x)]
    wires += [None] * ((1 << (n - 1).bit_length() if n else 0) - n)
    for i, j in comparisons(kind, n):
        a, b = wires[i], wires[j]
        if a is None or b is None:
            wires[i], wires[j] = (b, a) if a is None else (a, b)
            continue
        alpha = f((b[0] - a[0]) / eps)
        wires[i] = [alpha * p + (1 - alpha) * q for p, q in zip(a, b, strict=True)]
        wires[j] = [(1 - alpha) * p + alpha * q for p, q in zip(a, b, strict=True)]
    return [w for w in wires[:n] if w is not None]


@kinds
@sigmoids
@pytest.mark.parametrize("n", SIZES)
def test_is_the_network_in_loops(kind: type[Network], sigmoid: type[Sigmoid], n: int) -> None:
    for x, eps in itertools.product((normal(2, n, seed=n), normal(2, n, seed=n).round()), (0.03, 0.7, 9.0)):
        rows = [network_in_loops(row, eps, SIGMOIDS[sigmoid][0], kind) for row in x.tolist()]
        want = torch.tensor(rows, dtype=x.dtype).reshape(2, n, n + 1)
        sorter = Sorter(eps, sigmoid(), kind())
        torch.testing.assert_close(soft(sorter, "values", x), want[..., 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(soft(sorter, "matrix", x), want[..., 1:], rtol=0, atol=1e-13)


@kinds
@sigmoids
@pytest.mark.parametrize("n", [2, 8, 16])
def test_against_diffsort(kind: type[Network], sigmoid: type[Sigmoid], n: int) -> None:
    peer = pytest.importorskip("diffsort", reason="diffsort is not installed: an optional comparison")
    network = peer.networks.get_sorting_network("bitonic" if kind is Bitonic else "odd_even", n, "cpu")
    network = [[t.double() for t in layer] for layer in network]
    x, steepness = normal(5, n, seed=n).requires_grad_(), 3.0
    y, p = peer.functional.sort(network, x, steepness=steepness, distribution=sigmoid.__name__.lower())
    sorter = Sorter(1 / steepness, sigmoid(), kind())
    close = {"rtol": 0, "atol": 1e-8 if sigmoid is Optimal else 1e-13}  # it adds 1e-10 to a denominator
    values, matrix = soft(sorter, "values", x), soft(sorter, "matrix", x)
    torch.testing.assert_close(values, y, **close)
    torch.testing.assert_close(matrix, p.mT, **close)
    for ours, its in ((values, y), (matrix, p.mT)):
        (got,) = torch.autograd.grad((ours * cotangent(ours)).sum(), x)
        (want,) = torch.autograd.grad((its * cotangent(ours)).sum(), x, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7 if sigmoid is Optimal else 1e-12)


@kinds
@sigmoids
def test_what_holds_for_every_input(kind: type[Network], sigmoid: type[Sigmoid]) -> None:
    x = torch.cat([normal(60, 9, seed=3), normal(60, 9, seed=4).round()])
    one = torch.ones_like(x)
    for eps in (0.01, 0.3, 3.0, 100.0):
        sorter = Sorter(eps, sigmoid(), kind())
        p, y = soft(sorter, "matrix", x), soft(sorter, "values", x)
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(-1), one, rtol=0, atol=1e-14)
        torch.testing.assert_close(p.sum(-2), one, rtol=0, atol=1e-14)
        torch.testing.assert_close((p * x.unsqueeze(-2)).sum(-1), y, rtol=0, atol=1e-13)
        torch.testing.assert_close(y.sum(-1), x.sum(-1), rtol=0, atol=1e-13)
        assert (y >= x.amin(-1, keepdim=True) - 1e-14).all()
        assert (y <= x.amax(-1, keepdim=True) + 1e-14).all()
        moved = soft(Sorter(3 * eps, sigmoid(), kind()), "values", 3 * x + 1000)
        torch.testing.assert_close(moved, 3 * y + 1000, rtol=1e-12, atol=1e-12)
    # as the documentation says: the order of x matters, and the answer need not be monotone
    strong = Sorter(30.0, sigmoid(), kind())
    y = soft(strong, "values", x)
    assert (soft(strong, "values", x[:, torch.randperm(9)]) - y).abs().max() > 0.01
    assert y.diff(dim=-1).min() < -0.01


@sigmoids
def test_a_compare_exchange(sigmoid: type[Sigmoid]) -> None:
    """The claims in the docstrings: the error, and for all but Logistic monotone in both inputs."""
    a = torch.linspace(-3, 3, 6001, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    pair = torch.cat([a, torch.zeros_like(a)], -1)
    y = soft(Sorter(0.5, sigmoid()), "values", pair)
    error = (y - pair.sort().values).abs().max().item()
    bound = SIGMOIDS[sigmoid][1]
    assert 0.7 * bound < error / 0.5 <= bound * (1 + 1e-9)
    for wire in (0, 1):
        (slope,) = torch.autograd.grad(y[:, wire].sum(), a, retain_graph=True)
        assert (slope.min() < -0.01) == (sigmoid is Logistic)
        assert slope.min() >= -1e-15 or sigmoid is Logistic
    far = soft(Sorter(1.0, sigmoid()), "values", torch.tensor([[0.0, 1e18]]).double())
    # the small weight keeps its digits: s f(-s) in the limit
    assert far[0, 0].item() == pytest.approx(0 if sigmoid is Logistic else bound, rel=1e-12)


def test_ties_are_smooth() -> None:
    """At a tie the derivatives are those of the plain formula, to second order too."""
    x = torch.tensor([0.4, 0.4], dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        alpha = torch.sigmoid((x[1] - x[0]) / 0.3)
        return torch.stack([alpha * x[0] + (1 - alpha) * x[1], (1 - alpha) * x[0] + alpha * x[1]])

    def ours(x: Tensor) -> Tensor:
        return soft(Sorter(0.3, Logistic()), "values", x)

    for derivative in (torch.func.jacrev, torch.func.hessian):
        torch.testing.assert_close(derivative(ours)(x), derivative(plain)(x), rtol=1e-13, atol=1e-14)


@kinds
@both
def test_absent_items(kind: type[Network], what: str) -> None:
    """A row with m items goes through the network for m items, to the bit."""
    m = torch.arange(10).unsqueeze(-1)
    inside = torch.arange(9) < m
    x = torch.where(inside, normal(10, 9, seed=6), 0).requires_grad_()
    sorter = Sorter(0.4, kind=kind())
    got = soft(sorter, what, x, m=m)
    for row in range(10):
        alone = x[row, :row].detach().requires_grad_()
        want = soft(sorter, what, alone)
        index = (row, *[slice(row)] * want.ndim)
        assert torch.equal(got[index], want)
        (inner,) = torch.autograd.grad((want * cotangent(want)).sum(), alone)
        (outer,) = torch.autograd.grad((got[index] * cotangent(want)).sum(), x, retain_graph=True)
        torch.testing.assert_close(outer[row, :row], inner, rtol=1e-12, atol=1e-14)
    assert (got[~inside] == 0).all()
    if what == "matrix":
        assert (got.mT[~inside] == 0).all()
    (gradient,) = torch.autograd.grad((got * cotangent(got)).sum(), x)
    assert (gradient[~inside] == 0).all()


@kinds
@sigmoids
def test_hard_limit(kind: type[Network], sigmoid: type[Sigmoid]) -> None:
    for n in (2, 5, 13, 16):
        x = normal(50, n, seed=n)
        sorter = Sorter(1e-30, sigmoid(), kind())
        assert torch.equal(soft(sorter, "values", x), x.sort().values)
        want = torch.nn.functional.one_hot(x.argsort(-1), n).double()
        torch.testing.assert_close(soft(sorter, "matrix", x), want, rtol=0, atol=1e-25)
    huge = torch.tensor([1e30, 1.0, -1e30, 2.0]).double()
    assert torch.equal(soft(Sorter(1e-30, sigmoid(), kind()), "values", huge), huge.sort().values)


@kinds
@sigmoids
@both
def test_no_overflow(kind: type[Network], sigmoid: type[Sigmoid], what: str) -> None:
    rows = torch.cat([normal(2, 6), normal(2, 6).round(), torch.tensor([[0, 1, -1e-9, 1e-9, 0, 1.0]])])
    for scale, eps in itertools.product((1e-30, 1.0, 1e30), (1e-30, 1.0, 1e30)):
        x = (rows * scale).requires_grad_()
        strength = torch.tensor(eps, dtype=torch.float64, requires_grad=True)
        y = soft(Sorter(strength, sigmoid(), kind()), what, x)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad((y * cotangent(y)).sum(), (x, strength)):
            assert gradient.isfinite().all()


@kinds
@sigmoids
@both
def test_derivatives(kind: type[Network], sigmoid: type[Sigmoid], what: str) -> None:
    n = 5
    x = normal(2, n, seed=9).requires_grad_()
    eps = torch.tensor([[0.5], [1.2]], dtype=torch.float64, requires_grad=True)
    for count, e in ((None, eps), (torch.tensor([[5], [3]]), eps[:1].sum().detach().requires_grad_())):

        def f(x: Tensor, e: Tensor, count: Tensor | None = count) -> Tensor:
            return soft(Sorter(1.0, sigmoid(), kind()), what, x, e, count)

        assert torch.autograd.gradcheck(f, (x, e), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (x, e))


@kinds
@both
def test_function_transforms(kind: type[Network], what: str) -> None:
    x, eps, v = normal(3, 5, seed=10), torch.tensor([[0.5], [1.0], [2.0]]).double(), normal(3, 5, seed=11)

    def f(x: Tensor, e: Tensor) -> Tensor:
        return soft(Sorter(1.0, Logistic(), kind()), what, x, e)

    def total(x: Tensor) -> Tensor:
        y = f(x, eps)
        return (y * cotangent(y)).sum()

    want = f(x, eps)
    assert torch.equal(torch.func.vmap(f)(x, eps), want)
    assert torch.equal(torch.func.vmap(f, in_dims=(None, 0))(x[0], eps), f(x[:1].expand(3, 5), eps))
    jacobian = torch.func.jacrev(f)(x, eps)
    _, tangent = torch.func.jvp(lambda x: f(x, eps), (x,), (v,))
    torch.testing.assert_close(tangent, (jacobian * v).sum((-1, -2)), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.func.jacfwd(f)(x, eps), jacobian, rtol=1e-11, atol=1e-13)
    hessian = torch.func.hessian(total)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        pytest.param(kind, what, marks=pytest.mark.full if (kind is Bitonic) == (what == "values") else ())
        for kind in KINDS
        for what in ("values", "matrix")
    ],
)
def test_compiled(kind: type[Network], what: str, fresh_compiler) -> None:
    m = torch.tensor([[5], [3], [1]])
    x = torch.where(torch.arange(5) < m, normal(3, 5, seed=12), 0)

    def f(x: Tensor, m: Tensor | None) -> Tensor:
        sorter = Sorter(0.5) if kind is Bitonic else Sorter(0.5, kind=kind())  # made inside, with its defaults
        return getattr(sorter, what)(x, torch.full((1, 1), 0.5, dtype=x.dtype), m)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for count in (None, m):
        results = []
        for g in (f, compiled):
            given = x.clone().requires_grad_()
            y = g(given, count)
            results.append((y, *torch.autograd.grad((y * cotangent(y)).sum(), given)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@kinds
@sigmoids
@both
def test_rows_are_independent(kind: type[Network], sigmoid: type[Sigmoid], what: str) -> None:
    """Alone, among few and among many rows a row has the same value and gradients, to the bit."""
    for n in (5, 33):
        x = normal(20, n, seed=n).requires_grad_()
        eps = torch.full((20, 1), 0.3, dtype=torch.float64, requires_grad=True)
        sorter = Sorter(1.0, sigmoid(), kind())
        y = soft(sorter, what, x, eps)
        c = cotangent(y)
        whole = torch.autograd.grad((y * c).sum(), (x, eps))
        for part in (slice(0, 1), slice(3, 4), slice(5, 18)):
            some = [t[part].detach().requires_grad_() for t in (x, eps)]
            got = soft(sorter, what, *some)
            assert torch.equal(got, y[part])
            for a, b in zip(torch.autograd.grad((got * c[part]).sum(), some), whole, strict=True):
                assert torch.equal(a, b[part])


class Pairs(Network):
    """A single layer."""

    def wires(self, n: int) -> int:
        return n

    def layers(self, n: int) -> Iterator[Layer]:
        yield Layer(0, n // 2, 1, False, 0)


def test_a_long_row_is_independent_on_several_threads() -> None:
    """Where torch would split the sum of a single row over its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for seed in range(3):
            gradients = []
            x, c = normal(2, 70_000, seed=seed), normal(70_000, seed=seed + 10)
            for rows in (x, x[:1]):
                eps = torch.full((len(rows), 1), 0.3, dtype=torch.float64, requires_grad=True)
                given = rows.clone().requires_grad_()
                y = soft(Sorter(1.0, kind=Pairs()), "values", given, eps)
                gradients.append(torch.autograd.grad((y * c).sum(), (given, eps)))
            for among, alone in zip(*gradients, strict=True):
                assert torch.equal(among[:1], alone)
    finally:
        torch.set_num_threads(threads)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation made."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.seen = max(self.seen, t.numel())
        return out


@kinds
def test_values_form_no_matrix(kind: type[Network]) -> None:
    n = 4096 if kind is Bitonic else 200
    x = normal(n, seed=2).requires_grad_()
    with Largest() as largest:
        y = soft(Sorter(0.01, kind=kind()), "values", x)
        torch.autograd.grad((y * cotangent(y)).sum(), x)
    assert n <= largest.seen <= 2 * n


def test_parts() -> None:
    sorter = Sorter(0.1)
    assert repr(sorter) == "SortingNetwork(eps=0.1, sigmoid=Cauchy(), kind=Bitonic())"
    other = Sorter(0.1, Optimal(), OddEven())
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert repr(twin) == repr(other) == "SortingNetwork(eps=0.1, sigmoid=Optimal(), kind=OddEven())"
    for wrong in (Logistic, "logistic", 1.0, Bitonic()):
        with pytest.raises(TypeError, match=r"sigmoid must be one of Logistic\(\), Cauchy\(\), Reciprocal\(\), Opt"):
            Sorter(0.1, sigmoid=wrong)
    for wrong in (OddEven, "bitonic", 1.0, Cauchy()):
        with pytest.raises(TypeError, match=r"kind must be Bitonic\(\) or OddEven\(\), got"):
            Sorter(0.1, kind=wrong)
    with pytest.raises(ValueError, match="SortingNetwork eps must be positive"):
        Sorter(-1.0)
