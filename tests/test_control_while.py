"""while_loop: the halting distribution, its hard limit, its means, and that what has halted leaves no trace."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from oracles import cotangent, loss, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev

import smoothops as so

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def exact(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PLANS = [None, so.Sqrt(), so.Binomial(4)]


def count(x: Tensor, smoothing=1.0, **options):
    """while x > 0: x -= 1; c += 1"""

    def positive(state):
        return so.heaviside(state[0], smoothing=smoothing)

    (x, c), info = so.while_loop(positive, lambda s: (s[0] - 1, s[1] + 1), (x, 0 * x), 30, **options)
    return c, info


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_the_soft_count_and_its_derivatives(plan) -> None:
    x = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    c, info = count(x, checkpoint=plan)
    (slope,) = torch.autograd.grad(c, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    found = torch.stack([c, slope, curvature])
    want = torch.tensor([3.2639162367849024, 0.9329879847252555, 0.05017646367216593], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(info.steps, c, **EXACT)
    if plan is None:
        for order in (lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f))):
            assert order(lambda x: count(x)[0])(x.detach()) == pytest.approx(curvature.item(), abs=1e-14)


def walk(chances: Tensor, states: Tensor, **options):
    """A loop whose chances (T, ...) to go on and states (T + 1, ...) are given."""
    steps = len(chances)

    def go_on(state):
        t, _ = state
        return chances[t] if t < steps else chances[0] * 0

    init = (0, states[0])
    return so.while_loop(go_on, lambda s: (s[0] + 1, states[s[0] + 1]), init, steps, on_fail="ignore", **options)


def enumerated(chances: Tensor) -> Tensor:
    """P(N = t) for t = 0, ..., T by products, one at a time."""
    rows, left = [], torch.ones_like(chances[0])
    for c in chances:
        rows.append(left * (1 - c))
        left = left * c
    return torch.stack([*rows, left])


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_against_enumeration(plan) -> None:
    c, s = normal(6, 3, seed=1).sigmoid().requires_grad_(), normal(7, 3, 2, seed=2).requires_grad_()
    (n, mean), info = walk(c, s, checkpoint=plan, halting=True)
    w, t = enumerated(c), torch.arange(7.0).double()[:, None]
    want = (w[..., None] * s).sum(0), (w * t).sum(0), (w * t**2).sum(0) - (w * t).sum(0) ** 2, w[-1], w
    got = mean, info.steps, info.variance, info.residual, info.halting
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(n.double(), want[1], rtol=1e-6, atol=0)
    assert n.dtype == torch.float64
    first = [torch.autograd.grad(sum(map(loss, v)), (c, s), create_graph=True) for v in (got, want)]
    torch.testing.assert_close(*first, **EXACT)
    second = [torch.autograd.grad(sum(map(loss, g)), (c, s)) for g in first]
    torch.testing.assert_close(*second, rtol=1e-11, atol=1e-12)


# --- the hard limit ---------------------------------------------------------------------------------------------------


def gcd(a: int, b: int) -> tuple[int, int]:
    n = 0
    while b != 0:
        a, b, n = b, a % b, n + 1
    return a, n


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_hard_loops_are_the_ordinary_program(plan) -> None:
    """Euclid on random integers, ties and zeros included, each in its own number of steps."""
    rng = random.Random(0)
    pairs = [(rng.randint(0, 12), rng.randint(0, 12)) for _ in range(150)]
    a, b = (torch.tensor(v) for v in zip(*pairs, strict=True))

    def body(s):
        a, b = s
        return b, torch.where(b == 0, 0, a % torch.where(b == 0, 1, b))

    (found, zero), info = so.while_loop(lambda s: s[1] != 0, body, (a, b), 30, checkpoint=plan)
    assert found.tolist() == [gcd(*pair)[0] for pair in pairs]
    assert not zero.any()
    assert info.steps.tolist() == [gcd(*pair)[1] for pair in pairs]
    assert not info.variance.any()
    assert not info.residual.any()


@pytest.mark.parametrize("smoothing", [so.Hard(), so.StraightThrough(so.Quadratic(0.3)), 1e-3])
def test_hard_count_on_integers_and_ties(smoothing) -> None:
    x = torch.randint(-3, 9, (60,)).double() + 0.25 * (not isinstance(smoothing, so.Hard))

    def ordinary(v: float) -> float:
        n = 0
        while v > 0:
            v, n = v - 1, n + 1
        return n

    def positive(s):
        return s[0] > 0 if isinstance(smoothing, so.Hard) else so.heaviside(s[0], smoothing=smoothing)

    (_, c), info = so.while_loop(positive, lambda s: (s[0] - 1, s[1] + 1), (x, 0 * x), 20)
    assert c.tolist() == [ordinary(v) for v in x.tolist()]
    assert info.steps.tolist() == c.tolist()


def test_straight_through_has_the_soft_gradient_of_the_steps_that_are_taken() -> None:
    x = torch.tensor(3.2, dtype=torch.float64, requires_grad=True)
    c, _ = count(x, so.StraightThrough(so.Entropy(1.0)))
    assert c == 4
    # d c / d c_t = prod_{i<t} c_i (c_T - t) for the four steps taken
    slopes = [torch.sigmoid(x.detach() - t) * torch.sigmoid(t - x.detach()) * (4 - t) for t in range(4)]
    torch.testing.assert_close(torch.autograd.grad(c, x)[0], sum(slopes), **EXACT)


# --- no trace of what has halted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_nothing_leaks_from_rows_that_have_halted(plan) -> None:
    """x -> sqrt(x th - 1) while x > 1: below, the root of a negative number, and NaN from then on."""

    def run(x: Tensor, th: Tensor):
        def go_on(s: Tensor) -> Tensor:
            return so.heaviside(s - 1.5, smoothing=so.Quadratic(0.5))

        return so.while_loop(go_on, lambda s: (s * th - 1).sqrt(), x, 12, checkpoint=plan)

    x = torch.tensor([1.2, 30.0, 0.5, 5.0, -1.0], dtype=torch.float64, requires_grad=True)
    th = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    whole = run(x, th)
    rows = [run(row, th) for row in x]
    torch.testing.assert_close(whole[0], torch.stack([r[0] for r in rows]), rtol=0, atol=0)
    assert whole[0].isfinite().all()
    steps = [torch.stack([r[1].steps for r in rows]), whole[1].steps]
    torch.testing.assert_close(*steps, rtol=0, atol=0)
    both = [whole[0], torch.stack([r[0] for r in rows])]
    first = [torch.autograd.grad(loss(y), (x, th), create_graph=True) for y in both]
    torch.testing.assert_close(*first, **EXACT)
    assert all(g.isfinite().all() for g in first[0])
    second = [torch.autograd.grad(loss(g[0]) + g[1], (x, th)) for g in first]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-11)
    if plan is None:
        f = lambda x, th: loss(run(x, th)[0])  # noqa: E731
        for order in (hessian, lambda f, a: jacrev(jacfwd(f, a), a), lambda f, a: jacrev(jacrev(f, a), a)):
            found = order(f, (0, 1))(x.detach(), th.detach())
            got = sum(found[0][0] @ torch.ones(5).double()) + found[0][1].sum()
            assert got.isfinite()
            torch.testing.assert_close(found[1][0], found[0][1], rtol=1e-9, atol=1e-10)


def test_steps_beyond_the_halt_change_nothing() -> None:
    """No early exit inside a transform: the numbers are those of the loop that ends at once."""
    x = torch.tensor([3.5, 0.1, -4.0, 40.0], dtype=torch.float64)
    called = []

    def run(x: Tensor) -> Tensor:
        def body(s):
            called.append(1)
            return s[0] - 1, s[1] + 1

        return so.while_loop(lambda s: so.heaviside(s[0], smoothing=1.0), body, (x, 0 * x), 90)[0][1]

    eager = run(x)
    taken = len(called)
    assert 40 < taken < 60
    called.clear()
    assert torch.equal(torch.vmap(run)(x), eager)
    assert len(called) == 90
    assert torch.equal(torch.stack([run(v) for v in x]), eager)


# --- means ------------------------------------------------------------------------------------------------------------


def test_a_mean_of_states_is_no_state_and_readout_averages_what_is_read() -> None:
    c, s = normal(5, 2, seed=3).sigmoid(), normal(6, 2, seed=4)
    w = enumerated(c)
    found, _ = walk(c, s, mean=so.Readout(lambda state: {"square": state[1] ** 2, "big": state[1] > 0}))
    torch.testing.assert_close(found["square"], (w * s**2).sum(0), **EXACT)
    torch.testing.assert_close(found["big"], (w * (s > 0)).sum(0).float(), rtol=1e-6, atol=0)


def test_a_readout_of_states_that_have_no_weight_leaves_no_trace() -> None:
    """sqrt(2 s + 1) of the state after the loop ended at 0; other rows go on below, where it is NaN."""
    x, th = exact(3.0, 1.0, 0.0), exact(2.0)[0]

    def run(x: Tensor, th: Tensor) -> Tensor:
        mean = so.Readout(lambda s: (s * th + 1).sqrt())
        return so.while_loop(lambda s: s > 0.5, lambda s: s - 1, x, 9, mean=mean)[0]

    assert run(x, th).tolist() == [1, 1, 1]
    slopes = lambda f: (f(run, 0)(x, th).diagonal(), f(run, 1)(x, th))  # noqa: E731
    for order in (jacrev, jacfwd):
        torch.testing.assert_close(slopes(order), (exact(1, 1, 1), exact(0, 0, 0)), **EXACT)
    x, th = x.requires_grad_(), th.requires_grad_()
    found = torch.autograd.grad(loss(run(x, th)), (x, th))
    torch.testing.assert_close(found, (cotangent(x.detach()), th.detach() * 0), **EXACT)


def test_samples_are_states_and_their_mean_and_gradient_are_unbiased() -> None:
    c, s = normal(5, seed=5).sigmoid().requires_grad_(), normal(6, seed=6).requires_grad_()
    many = 200_000
    g = torch.Generator().manual_seed(0)
    wide = [v[:, None].expand(-1, many) for v in (c, s)]
    (_, drawn), _ = walk(*wide, mean=so.Sample(g))
    assert torch.isin(drawn.detach(), s.detach()).all()
    mean = walk(c, s)[0][1]
    error = 5 * drawn.detach().std() / many**0.5
    assert (drawn.mean() - mean).abs() < error
    got, want = torch.autograd.grad(drawn.mean(), (c, s)), torch.autograd.grad(mean, (c, s))
    torch.testing.assert_close(got, want, rtol=0, atol=5 / many**0.5)


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_samples_repeat_with_their_generator_and_are_drawn_once(plan) -> None:
    c, s = normal(5, 4, seed=5).sigmoid().requires_grad_(), normal(6, 4, seed=6)
    results = []
    for checkpoint in (None, plan):
        drawn = walk(c, s, mean=so.Sample(torch.Generator().manual_seed(3)), checkpoint=checkpoint)[0][1]
        results.append((drawn, torch.autograd.grad(loss(drawn), c)[0]))
    torch.testing.assert_close(*results, **EXACT)


# --- derivatives and modes --------------------------------------------------------------------------------------------


def heron(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Newton's square root until it is near."""
    y, info = so.while_loop(
        lambda y: so.heaviside((y * y - a).square() - 0.01, smoothing=so.Entropy(0.05)),
        lambda y: (y + a / y) / 2, x, 5, on_fail="ignore", halting=True,
    )  # fmt: skip
    return y, *info


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_gradients(plan) -> None:
    inputs = torch.tensor([3.0, 1.0]).double().requires_grad_(), torch.tensor([2.0, 0.6]).double().requires_grad_()
    assert gradcheck(heron, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(heron, inputs, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_and_compiled() -> None:
    x, a = torch.tensor([3.0, 1.0]).double().requires_grad_(), torch.tensor([2.0, 0.6]).double().requires_grad_()
    want = heron(x, a)
    torch.testing.assert_close(torch.vmap(heron, out_dims=(0, 0, 0, 0, 1))(x, a), want, **EXACT)
    fast = torch.compile(heron, fullgraph=True, backend="aot_eager")(x, a)
    torch.testing.assert_close(fast, want, **EXACT)
    grads = [torch.autograd.grad(sum(map(loss, v)), (x, a)) for v in (fast, want)]
    torch.testing.assert_close(*grads, **EXACT)


def test_dims_and_dtypes() -> None:
    """The condition's dims lead; a state without them is the same for all rows; integers give a mean."""
    limit = torch.tensor([0.5, 2.5, 4.5])
    (n, wide), info = so.while_loop(
        lambda s: s[0] < limit, lambda s: (s[0] + 1, s[1] * 2), (0, torch.ones(3, 2, dtype=torch.bfloat16)), 9
    )
    assert n.tolist() == info.steps.tolist() == [1, 3, 5]
    assert n.dtype == info.steps.dtype == torch.float32
    assert wide.dtype == torch.bfloat16
    assert wide[:, 1].tolist() == [2, 8, 32]
    found, _ = so.while_loop(lambda s: s < 3, lambda s: s + 1, torch.tensor(0), 9)
    assert found.item() == 3
    assert found.dtype == torch.float32


def test_long_loops_lose_nothing_by_underflow() -> None:
    """Survival e^-2000: the gradient of the mean is still that of the geometric law."""
    c = torch.tensor(0.98, dtype=torch.float64, requires_grad=True)
    n, info = so.while_loop(lambda s: c, lambda s: s + 1, torch.tensor(0.0).double(), 3000)
    torch.testing.assert_close(n, c / (1 - c), rtol=1e-11, atol=0)
    torch.testing.assert_close(info.variance, c / (1 - c) ** 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(n, c)[0], 1 / (1 - c.detach()) ** 2, rtol=1e-9, atol=0)


# --- loops that do not halt, and other mistakes -----------------------------------------------------------------------


def test_a_loop_that_does_not_halt_is_seen() -> None:
    forever = (lambda s: torch.tensor([0.0, 0.9]), lambda s: s + 1, torch.zeros(2), 10)
    with pytest.warns(RuntimeWarning, match=r"did not halt within max_iter=10 steps: mass 0.349 is left"):
        _, info = so.while_loop(*forever)
    assert info.residual[1] == pytest.approx(0.9**10)
    with pytest.raises(RuntimeError, match="raise max_iter"):
        so.while_loop(*forever, on_fail="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        so.while_loop(*forever, on_fail="ignore")
        so.while_loop(*forever, tol=0.5)
    nan = lambda s: torch.tensor(torch.nan)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="mass nan is left"):
        assert so.while_loop(nan, lambda s: s + 1, torch.zeros(()), 4)[0].isnan()


def grow(s: Tensor) -> Tensor:
    return torch.cat([s, s])


def test_bad_arguments() -> None:
    s = torch.zeros(2)
    half = lambda s: torch.full((2,), 0.5)  # noqa: E731
    with pytest.raises(ValueError, match=r"values in \[-1, 2\], expected \[0, 1\]"):
        so.while_loop(lambda s: torch.tensor([-1.0, 2.0]), torch.sin, s, 3)
    with pytest.raises(ValueError, match="max_iter must be a positive int, got 0"):
        so.while_loop(half, torch.sin, s, 0)
    with pytest.raises(TypeError, match=r"so.FinalState\(\), so.Readout"):
        so.while_loop(half, torch.sin, s, 3, mean="final")
    with pytest.raises(ValueError, match="'raise', 'warn', 'ignore'"):
        so.while_loop(half, torch.sin, s, 3, on_fail="nan")
    with pytest.raises(TypeError, match="body_fn must be a function"):
        so.while_loop(half, s, s, 3)
    with pytest.raises(TypeError, match="fn must be a function"):
        so.Readout(3)
    with pytest.raises(ValueError, match=r"grow returned float32 \(4,\), its state was float32 \(2,\)"):
        so.while_loop(half, grow, s, 3)
    with pytest.raises(ValueError, match=r"the condition of shape \(3,\) does not fit a result of shape \(2,\)"):
        so.while_loop(lambda s: torch.ones(3) / 2, torch.sin, s, 3)
    shapes = iter([(), (2,)])
    with pytest.raises(ValueError, match=r"returned shape \(2,\), at first \(\)"):
        so.while_loop(lambda s: torch.full(next(shapes), 0.5), torch.sin, s, 3)
    with pytest.raises(TypeError, match="must consist of tensors and numbers, got 'a'"):
        so.while_loop(half, lambda s: s, (s, "a"), 3)
