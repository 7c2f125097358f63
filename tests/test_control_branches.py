"""cond and switch: the blend, its hard limit, and that a branch of weight 0 leaves no trace in any order or mode."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from oracles import loss, normal
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp

import smoothops as so

EXACT = {"rtol": 1e-12, "atol": 1e-14}
Pair = namedtuple("Pair", "left right")
UNTAKEN = {  # what is inf or nan, or has an infinite slope, where x <= 0
    "sqrt of a negative": lambda x, th: torch.sqrt(x * th),
    "log of 0": lambda x, th: torch.log(torch.relu(x) * th),
    "division by 0": lambda x, th: th / torch.relu(x),
    "0 to a power": lambda x, th: torch.relu(x) ** (th / 8),
    "asin beyond its range": lambda x, th: torch.asin(1 + th * (x.clamp(max=0) - 0.1)) + torch.atan2(x * 0, x * th),
    "bounded functions of NaN": lambda x, th: torch.sigmoid(torch.sqrt(x * th) * 2.0) * (torch.log(x) / 3.0).tanh(),
    "softmax of -inf": lambda x, th: (th * torch.stack([x.log(), x.log()], -1)).softmax(-1)[..., 0] * x,
}


def steps(x: Tensor) -> Tensor:
    """Exactly 0 for x <= 0 and exactly 1 for x >= 1."""
    return so.heaviside(x - 0.5, smoothing=so.Quadratic(0.5))


X = torch.tensor([-1.5, 0.0, 0.3, 0.8, 2.0], dtype=torch.float64)
THETA = torch.tensor(1.3, dtype=torch.float64)


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_blend_is_exact_at_both_ends_and_linear_between() -> None:
    x, y = normal(5, 3, seed=1), normal(5, 3, seed=2)
    p = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    found = so.cond(p, lambda: x, lambda: y)
    torch.testing.assert_close(found, p[:, None] * x + (1 - p[:, None]) * y, **EXACT)
    assert torch.equal(found[0], y[0])
    assert torch.equal(found[-1], x[-1])


@pytest.mark.parametrize("make", [lambda a, b: a > b, lambda a, b: so.heaviside(a - b, smoothing=so.Hard())])
def test_hard_conditions_are_the_ordinary_if(make) -> None:
    a, b = (torch.randint(-2, 3, (400,)).double() for _ in range(2))
    p = make(a, b)
    found = so.cond(p, lambda a, b: Pair(a - b, {"s": a}), lambda a, b: Pair(b / 3, {"s": b + 1}), a, b)
    for i in range(400):
        if a[i] > b[i]:
            want = (a[i] - b[i], a[i])
        elif a[i] < b[i] or not p.is_floating_point():
            want = (b[i] / 3, b[i] + 1)
        else:  # heaviside(0) = 1/2, also hard
            assert p[i] == 0.5
            continue
        assert (found.left[i], found.right["s"][i]) == want
    assert isinstance(found, Pair)


def test_hard_weights_are_the_ordinary_choice() -> None:
    index = torch.randint(0, 3, (200,))
    x = torch.randint(-9, 9, (200, 2)).double()
    weights = nn.functional.one_hot(index, 3).double()
    branches = [lambda x: x + 1, lambda x: x * 3, lambda x: -x / 7]
    found = so.switch(weights, branches, x)
    assert torch.equal(found, torch.stack([branches[k](row) for k, row in zip(index.tolist(), x, strict=True)]))


def test_switch_is_the_weighted_sum() -> None:
    w = so.argmax(normal(4, 3, seed=3), -1, smoothing=so.Quadratic(1.0))
    x = normal(4, 2, seed=4)
    parts = [x, x.square(), x.exp()]
    found = so.switch(w, [lambda x: x, torch.square, torch.exp], x)
    torch.testing.assert_close(found, sum(w[:, k, None] * part for k, part in enumerate(parts)), **EXACT)
    two = torch.stack([w[:, 0], 1 - w[:, 0]], -1)
    torch.testing.assert_close(
        so.switch(two, [torch.exp, torch.sin], x), so.cond(w[:, 0], torch.exp, torch.sin, x), **EXACT
    )


def test_dims_of_the_weight_are_the_leading_dims_of_every_result() -> None:
    p = torch.rand(4, 1, dtype=torch.float64)
    x = normal(4, 3, 2)
    found = so.cond(p, lambda: (x, 1.0, x[:, :1, 0]), lambda: (-x, x.new_tensor(0.0), 0 * x[:, :1, 0]))
    torch.testing.assert_close(found[0], (2 * p - 1)[..., None] * x)
    assert torch.equal(found[1], p)
    torch.testing.assert_close(found[2], p * x[:, :1, 0])
    with pytest.raises(ValueError, match=r"p of shape \(3,\) does not fit a result of shape \(4, 3\)"):
        so.cond(torch.rand(3), lambda: x[..., 0], lambda: x[..., 1])
    with pytest.raises(ValueError, match=r"shape \(4, 1\) does not fit a result of shape \(4,\)"):
        so.cond(p, lambda: x[:, 0, 0], lambda: x[:, 1, 0])


def test_dtypes() -> None:
    p = torch.tensor([0.0, 0.25, 1.0])
    ints = so.cond(p, lambda: torch.tensor([1, 2, 3]), lambda: torch.tensor([5, 6, 7]))
    assert ints.dtype == torch.float32
    assert ints.tolist() == [5, 5, 3]
    half = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    third = torch.tensor([0.0, 1 / 3, 1.0]).bfloat16()
    found = so.cond(third, lambda: half, lambda: -half)  # one rounding, at the end
    assert torch.equal(found, so.cond(third.float(), lambda: half.float(), lambda: -half.float()).bfloat16())
    assert torch.equal(so.cond(p, lambda: torch.tensor(2.0), lambda: p), 2 * p + (1 - p) * p)
    assert so.cond(p.double(), lambda: p, lambda: p).dtype == torch.float32
    assert so.cond(True, lambda: p, lambda: -p) is not p
    assert torch.equal(so.cond(True, lambda: p, lambda: -p), p)
    tiny = torch.tensor([1e-60, 1.0], dtype=torch.float64)  # not 0, though 0 in float32
    found = so.cond(tiny, lambda: torch.tensor([torch.inf, 1.0]), lambda: torch.zeros(2))
    assert found.tolist() == [torch.inf, 1.0]


@pytest.mark.parametrize("p", [[0.0, 0.5], [0.25, 0.5]])
def test_dtypes_inside_do_not_depend_on_the_weights(p: list[float]) -> None:
    x, scale = torch.ones(2), torch.tensor(3.0, dtype=torch.float64)
    branches = [lambda: x * scale, lambda: torch.maximum(x, scale), lambda: scale / torch.arange(1, 3)]
    for branch in branches:
        found = []
        so.cond(torch.tensor(p), lambda b=branch, f=found: f.append(b()) or f[0], branch)
        assert found[0].dtype == branch().dtype


def test_infinities_of_positive_weight_and_nan_stay_where_they_belong() -> None:
    p = torch.tensor([0.3, 0.7, 0.5, 0.0, 1.0, torch.nan])
    inf = torch.full((6,), torch.inf)
    assert so.cond(p, lambda: inf, lambda: torch.ones(6)).tolist()[:5] == [torch.inf] * 3 + [1.0, torch.inf]
    assert so.cond(p, lambda: -torch.ones(6), lambda: -inf).tolist()[:5] == [-torch.inf] * 4 + [-1.0]
    assert so.cond(p, lambda: inf, lambda: inf).tolist()[:5] == [torch.inf] * 5
    found = so.cond(p, lambda: torch.ones(6), lambda: torch.zeros(6))
    assert found.isnan().tolist() == [False] * 5 + [True]


# --- no trace of what is not taken ------------------------------------------------------------------------------------


def soft(branch, x: Tensor, th: Tensor) -> Tensor:
    return so.cond(steps(x), branch, lambda x, th: th * x.square() + x, x, th)


def rows(branch, x: Tensor, th: Tensor) -> Tensor:
    """The same without the branch where its weight is 0."""
    taken, p = x.detach() > 0, steps(x)
    y = th * x.square() + x
    safe = torch.where(taken, x, 0.6)
    return torch.where(taken, y + p * (branch(safe, th) - y), y)


@pytest.mark.parametrize("name", UNTAKEN)
def test_nothing_leaks_from_a_branch_that_is_not_taken(name: str) -> None:
    """Value, first and second derivatives, forward and reverse, in the argument and in what all rows share."""
    branch = UNTAKEN[name]
    torch.testing.assert_close(soft(branch, X, THETA), rows(branch, X, THETA), **EXACT)
    f, g = (lambda x, th, h=h: loss(h(branch, x, th)) for h in (soft, rows))
    for order in (jacrev, jacfwd, hessian, lambda f, a: jacrev(jacfwd(f, a), a), lambda f, a: jacrev(jacrev(f, a), a)):
        got, want = order(f, (0, 1))(X, THETA), order(g, (0, 1))(X, THETA)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", UNTAKEN)
def test_nothing_leaks_through_plain_autograd(name: str) -> None:
    x, th = X.clone().requires_grad_(), THETA.clone().requires_grad_()
    results = []
    for h in (soft, rows):
        first = torch.autograd.grad(loss(h(UNTAKEN[name], x, th)), (x, th), create_graph=True)
        results.append((*first, *torch.autograd.grad(loss(first[0]) + first[1], (x, th))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", UNTAKEN)
def test_nothing_leaks_into_batched_gradients(name: str) -> None:
    """Rows of is_grads_batched, and of a vmap around autograd.grad: each is the gradient for that cotangent."""
    x, th = X.clone().requires_grad_(), THETA.clone().requires_grad_()
    p = steps(x.detach())  # (outside of the graph: the heaviside of this test is not what is tested)
    y = so.cond(p, UNTAKEN[name], lambda x, th: th * x.square() + x, x, th)
    eye = torch.eye(len(x), dtype=x.dtype)
    want = [torch.autograd.grad(y, (x, th), row, retain_graph=True) for row in eye]
    want = [torch.stack(column) for column in zip(*want, strict=True)]
    assert all(g.isfinite().all() for g in want)
    batched = torch.autograd.grad(y, (x, th), eye, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, (x, th), g, retain_graph=True))(eye)
    for found in (batched, mapped):
        torch.testing.assert_close(list(found), want, **EXACT)


def test_closed_over_tensors_and_modules_stay_clean() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()

    def branch(v: Tensor) -> Tensor:
        return net((v * scale).sqrt().unsqueeze(-1)).squeeze(-1).exp()

    inputs = [x, scale, *net.parameters()]
    found = torch.autograd.grad(loss(so.cond(steps(x), branch, torch.cos, x)), inputs)
    taken = torch.stack([steps(v) * branch(v) + (1 - steps(v)) * v.cos() if v > 0 else v.cos() for v in x])
    torch.testing.assert_close(found, torch.autograd.grad(loss(taken), inputs), **EXACT)


def test_all_weights_zero_cleans_what_has_no_batch() -> None:
    th = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    found = so.cond(steps(x), lambda x: x * th.sqrt(), lambda x: x * th, x)
    assert torch.autograd.grad(found.sum(), (th, x)) == (torch.tensor(-3.0), pytest.approx([-1.0, -1.0]))


def test_a_branch_that_mixes_elements_keeps_its_gradient() -> None:
    """An element of weight 0 still counts in a mean that others take."""

    def f(x: Tensor) -> Tensor:
        return so.cond(n, lambda x: x - x.mean() ** 2, lambda x: 3 * x, x)

    x, n = normal(3, seed=5).requires_grad_(), torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64)
    m = x.mean() ** 2
    want = torch.autograd.grad(loss(torch.where(n == 0, 3 * x, n * (x - m) + (1 - n) * 3 * x)), x)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(f(x)), x)[0], want, **EXACT)


def test_a_nan_that_is_mixed_into_taken_rows_is_not_hidden() -> None:
    x = torch.tensor([-1.0, 4.0, 9.0], requires_grad=True)
    mix = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 0, 1.0]])
    found = so.cond(x > 0, lambda x: mix @ x.sqrt(), lambda x: x, x)
    assert found.isnan().tolist() == [False, True, True]  # 0 times NaN in the last


def test_the_derivative_in_p_is_the_difference_of_the_branches() -> None:
    p = torch.tensor([0.0, 0.3, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    x, y = torch.tensor([2.0, 2, 2, torch.nan]).double(), torch.tensor([5.0, 5, 5, 5]).double()
    (found,) = torch.autograd.grad(so.cond(p, lambda: x, lambda: y).sum(), p)
    assert found.tolist() == [-3, -3, -3, 0]


def test_switch_leaves_no_trace_either() -> None:
    x, th = X.clone().requires_grad_(), THETA.clone().requires_grad_()
    w = torch.stack([steps(x), (1 - steps(x)) * 0.25, (1 - steps(x)) * 0.75], -1)
    branches = [lambda x: (x * th).sqrt(), lambda x: x * th, lambda x: torch.log(1 - x) * th]

    def plain(x: Tensor) -> Tensor:
        found = w[:, 1] * x * th
        for column, low, high, k in ((w[:, 0], 0.0, torch.inf, 0), (w[:, 2], -torch.inf, 1.0, 2)):
            inside = (x > low) & (x < high)
            found = found + torch.where(inside, column * branches[k](torch.where(inside, x, 0.5)), 0)
        return found

    results = []
    for f in (lambda x: so.switch(w, branches, x), plain):
        first = torch.autograd.grad(loss(f(x)), (x, th), create_graph=True)
        results.append((*first, *torch.autograd.grad(loss(first[0]) + first[1], (x, th), retain_graph=True)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# --- derivatives and modes --------------------------------------------------------------------------------------------


def two_ways(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    p = so.heaviside(x - y, smoothing=1.0)
    one = so.cond(p, lambda a, b: {"u": a * b, "v": a.sin()}, lambda a, b: {"u": b.cos(), "v": a * a}, x, y)
    w = so.argmax(torch.stack([x, y, 0 * x], -1), -1, smoothing=1.0)
    return one["u"] + one["v"], so.switch(w, [torch.exp, torch.sin, lambda v: v**3], y)


def test_gradients() -> None:
    inputs = tuple(normal(3, seed=s).requires_grad_() for s in (6, 7))
    assert gradcheck(two_ways, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(two_ways, inputs, check_batched_grad=True)


def test_transforms() -> None:
    x, y = normal(3, seed=6), normal(3, seed=7)
    torch.testing.assert_close(torch.vmap(two_ways)(x, y), two_ways(x, y), **EXACT)
    by_row = torch.vmap(torch.func.grad(lambda x, y: sum(two_ways(x, y))))(x, y)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(by_row, torch.autograd.grad(sum(two_ways(leaf, y)).sum(), leaf)[0], **EXACT)
    v = normal(3, seed=8)
    tangent = jvp(lambda x: two_ways(x, y)[0], (x,), (v,))[1]
    torch.testing.assert_close(tangent, jacrev(lambda x: two_ways(x, y)[0])(x) @ v, **EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    f = lambda x, y: soft(UNTAKEN["sqrt of a negative"], x, y)  # noqa: E731
    x, y = X.clone().requires_grad_(), THETA.clone().requires_grad_()
    fast = torch.compile(f, fullgraph=True, backend="aot_eager")
    for g, w in zip(*([h(x, y), *torch.autograd.grad(loss(h(x, y)), (x, y))] for h in (fast, f)), strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_no_look_at_any_number() -> None:
    """On the meta device there are no numbers to look at; nor is a graph cut."""
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    p, w = torch.empty(4, device="meta", requires_grad=True), torch.empty(4, 2, device="meta", requires_grad=True)
    one = so.cond(p, lambda x: (x * 2).sqrt(), lambda x: x.log(), x, prune=True)
    two = so.switch(w, [torch.sqrt, torch.log], x, prune=True)
    grads = torch.autograd.grad((one + two).sum(), (x, p, w))
    assert [g.shape for g in grads] == [x.shape, p.shape, w.shape]


def test_prune_leaves_out_what_nobody_takes() -> None:
    called = []

    def branch(k: int, dtype: torch.dtype = torch.float32):
        return lambda x: (called.append(k), (x + k).to(dtype))[1]

    x = torch.zeros(2)
    for p, want in ((torch.tensor([0.0, 0.0]), [1]), (torch.ones(2), [0]), (torch.tensor([0.0, 1.0]), [0, 1])):
        called.clear()
        full = so.cond(p, branch(0), branch(1), x)
        called.clear()
        assert torch.equal(so.cond(p, branch(0), branch(1), x, prune=True), full)
        assert called == want
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    called.clear()
    found = so.switch(weights, [branch(k) for k in range(4)], x, prune=True)
    assert called == [1, 2]
    assert found.tolist() == [1.5, 2.0]


def test_rows_are_independent_bit_for_bit() -> None:
    x = torch.cat([X, normal(20, seed=11)])
    whole = soft(UNTAKEN["sqrt of a negative"], x, THETA)
    alone = torch.cat([soft(UNTAKEN["sqrt of a negative"], v[None], THETA) for v in x])
    assert torch.equal(whole, alone)


def test_empty_batch_and_no_grad() -> None:
    assert so.cond(torch.ones(0), torch.sqrt, torch.log, torch.ones(0)).shape == (0,)
    assert so.switch(torch.ones(0, 2), [torch.sqrt, torch.log], torch.ones(0)).shape == (0,)
    with torch.inference_mode():
        assert not so.cond(torch.tensor(0.0), torch.sqrt, torch.neg, torch.tensor(-1.0)).isnan()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: {"a": torch.ones(2), "b": torch.ones(2)}, "structure"),
        (lambda: {"a": torch.ones(3)}, r"false_fn returned float32 \(3,\) at \['a'\], true_fn returned float32 \(2,\)"),
        (lambda: {"a": torch.ones(2).double()}, r"float64 \(2,\) at \['a'\], true_fn returned float32"),
        (lambda: {"a": "x"}, "'x' at"),
    ],
)
def test_branches_that_do_not_match(other, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        so.cond(torch.tensor(0.5), lambda: {"a": torch.ones(2)}, other)


def test_bad_arguments() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"p has values in \[0, 1.5\], expected \[0, 1\]"):
        so.cond(torch.tensor([0.0, 1.5]), torch.sqrt, torch.log, one)
    with pytest.raises(TypeError, match="p must be a tensor"):
        so.cond("yes", torch.sqrt, torch.log, one)
    with pytest.raises(TypeError, match="complex"):
        so.cond(torch.tensor(1j), torch.sqrt, torch.log, one)
    with pytest.raises(TypeError, match="false_fn must be a function, got Tensor"):
        so.cond(one, torch.sqrt, one)
    with pytest.raises(TypeError, match="one_hot"):
        so.switch(torch.tensor(1), [torch.sqrt], one)
    with pytest.raises(ValueError, match="do not fit 3 branches"):
        so.switch(one / 2, [torch.sqrt] * 3, one)
    with pytest.raises(ValueError, match="sum is off by 1"):
        so.switch(one, [torch.sqrt] * 2, one)
    with pytest.raises(ValueError, match=r"the least is -0\.5"):
        so.switch(torch.tensor([1.5, -0.5]), [torch.sqrt] * 2, one)
    with pytest.raises(TypeError, match="view_as_real"):
        so.cond(one, lambda: one * 1j, lambda: one * 0j)
    with pytest.raises(ValueError, match=r"branches\[2\] returned shape \(3,\), another branch \(2,\)"):
        so.switch(torch.ones(3) / 3, [lambda: 1.0, lambda: one, lambda: torch.ones(3)])
    with pytest.raises(TypeError, match="results must consist of tensors and numbers"):
        so.cond(torch.tensor(0.5), lambda: None, lambda: None)
