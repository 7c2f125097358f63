"""The kernels that find the discrete structure: compiled and plain against each other and against brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

import smoothops as so
from smoothops import kernels
from smoothops.kernels import torch as plain
from smoothops.kernels.torch import LOGSUMEXP, MEAN

compiled = pytest.importorskip("smoothops.kernels.cpu", reason="numba cannot be imported")
RULES = pytest.mark.parametrize("rule", [MEAN, LOGSUMEXP], ids=["mean", "logsumexp"])

# --- pooling ---------------------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # theta, w, weights, group, eps


def descending(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.sort(-1, descending=True).values


def positions(rows: int, n: int) -> Tensor:
    return torch.arange(n, 0, -1, dtype=torch.float64).expand(rows, n)


def case(theta: Tensor, w: Tensor, eps: float, weights: Tensor | None = None, group: Tensor | None = None) -> Rows:
    return (
        theta.contiguous(),
        w.expand_as(theta).contiguous(),
        torch.ones_like(theta) if weights is None else weights,
        torch.ones_like(theta, dtype=torch.int8) if group is None else group.expand(theta.shape).to(torch.int8),
        torch.full((theta.shape[0], 1), eps, dtype=torch.float64),
    )


def outlier(n: int) -> Tensor:
    """One large value, then a slope: in a soft sort each round pools one more item with it."""
    w = -torch.arange(n, dtype=torch.float64).expand(2, n) / n
    return torch.cat([w[:, :1] + 1e6, w[:, 1:]], -1)


CASES: dict[str, Rows] = {
    **{f"rank, eps {eps:g}": case(descending(4, 60), positions(4, 60), eps) for eps in (1e-4, 1e-2, 0.1, 1, 100)},
    **{f"sort, eps {eps:g}": case(positions(4, 60), descending(4, 60), eps) for eps in (1e-2, 1, 10, 1e3, 1e6)},
    "two random rows": case(descending(5, 40), descending(5, 40, seed=1), 0.7),
    "tied": case((2 * descending(5, 50)).round() / 2, positions(5, 50), 0.05),
    "all tied": case(torch.ones(2, 30, dtype=torch.float64), positions(2, 30), 1e-30),
    "equal gaps, at the kink": case(positions(2, 33) / 4, positions(2, 33), 0.25),
    "equal gaps, pooled": case(positions(2, 33) / 4, positions(2, 33), 0.2501),
    "outlier": case(positions(2, 200), outlier(200), 1.0),
    "outlier last": case(positions(2, 200), -outlier(200).flip(-1), 1.0),
    "groups": case(descending(3, 48), positions(3, 48), 1.0, group=torch.arange(48) // 13),
    "groups of infinities": case(
        descending(3, 40), positions(3, 40), 1.0, group=torch.tensor([0, 1, 2, 3, 4, 7, 8, 15]).repeat_interleave(5)
    ),
    "one item": case(descending(3, 1), positions(3, 1), 1.0),
    "large offset": case(descending(2, 50) + 1e9, positions(2, 50), 0.1),
    "tiny scale": case(descending(2, 50) * 1e-200, positions(2, 50), 1e-201),
}
WEIGHTED = {  # MEAN only
    "weighted": case(descending(4, 50), positions(4, 50), 0.1, weights=descending(4, 50, seed=2).exp()),
    "weighted by 1e-6 to 1e6": case(
        descending(4, 50), positions(4, 50), 0.1, weights=10 ** (descending(4, 50, seed=3) * 2)
    ),
    "isotonic": case(descending(4, 50).flip(-1).roll(7, -1), torch.zeros(4, 50, dtype=torch.float64), 1.0),
}
ALL = [
    pytest.param(rows, rule, id=f"{name}-{'mean' if rule == MEAN else 'logsumexp'}")
    for name, rows in (CASES | WEIGHTED).items()
    for rule in (MEAN, LOGSUMEXP)
    if rule == MEAN or (name in CASES and "outlier" not in name)  # exp(1e6) is nobody's vertex
]


def level(rows: Rows, rule: int, r: int, a: int, b: int) -> float:
    """What pooling makes nonincreasing: the level of the block of items a to b of row r."""
    theta, w, weights, _, eps = rows
    e, part = float(eps[r]), slice(a, b + 1)
    if rule == MEAN:
        m = weights[r, part]
        shifted = (theta[r, part] - theta[r, a]) - e * (w[r, part] - w[r, a])
        return float(theta[r, a] - e * w[r, a] + (m * shifted).sum() / m.sum())
    return float(torch.logsumexp(theta[r, part] / e, 0) - torch.logsumexp(w[r, part], 0))


def minimax(rows: Rows, rule: int, r: int) -> list[float]:
    """The isotonic fit of a row, group by group: min over a <= i of max over b >= i of the level of a to b."""
    group = rows[3][r].tolist()
    n = len(group)
    fit = []
    best = {}
    for a in range(n):
        inside = [b for b in range(a, n) if group[a : b + 1] == [group[a]] * (b - a + 1)]
        levels = [level(rows, rule, r, a, b) for b in inside]
        for i in inside:
            best[a, i] = max(levels[i - a :])
    for i in range(n):
        fit.append(min(v for (a, j), v in best.items() if j == i))
    return fit


@pytest.mark.parametrize(("rows", "rule"), ALL)
def test_compiled_and_plain_agree(rows: Rows, rule: int) -> None:
    assert torch.equal(compiled.pool(*rows, rule), plain.pool(*rows, rule))


@pytest.mark.parametrize(("rows", "rule"), ALL)
@pytest.mark.parametrize("module", [compiled, plain], ids=["compiled", "plain"])
def test_blocks_are_the_isotonic_fit(module: object, rows: Rows, rule: int) -> None:
    start = module.pool(*rows, rule)  # type: ignore[attr-defined]
    r, n = 0, rows[0].shape[1]
    first = start[r].tolist()
    assert all(s <= i and first[s] == s for i, s in enumerate(first))
    group = rows[3][r]
    assert torch.equal(group, group[start[r]]), "items of two groups were pooled"
    if n > 60:
        return  # the brute force is cubic
    ends = {s: i for i, s in enumerate(first)}
    ours = [level(rows, rule, r, s, ends[s]) for s in first]
    best = minimax(rows, rule, r)
    scale = max(abs(v) for v in best) or 1.0
    assert max(abs(a - b) for a, b in zip(ours, best, strict=True)) <= 1e-13 * scale


@pytest.mark.parametrize(("rows", "rule"), ALL)
def test_a_block_holds_together(rows: Rows, rule: int) -> None:
    """Strictly pooled: each block would violate the order if it were cut anywhere, so ``gap == eps`` is not pooled."""
    start = compiled.pool(*rows, rule)[0].tolist()
    ends = {s: i for i, s in enumerate(start)}
    slack = 1e-12 * max(abs(level(rows, rule, 0, i, i)) for i in range(len(start)))
    for s, e in ends.items():
        for cut in range(s, e):
            assert level(rows, rule, 0, s, cut) <= level(rows, rule, 0, cut + 1, e) + slack


@pytest.mark.parametrize("name", [*CASES, *WEIGHTED])
def test_mean_pooling_against_scipy(name: str) -> None:
    theta, w, weights, _, eps = rows = (CASES | WEIGHTED)[name]
    if "groups" in name or name == "large offset":
        pytest.skip("scipy knows no groups, and loses eleven digits to the offset")
    start = compiled.pool(*rows, MEAN)
    for r in range(theta.shape[0]):
        target = theta[r] - eps[r] * w[r]
        expected = isotonic_regression(target.numpy(), weights=weights[r].numpy(), increasing=False).x
        m = torch.zeros_like(target).index_add(0, start[r], weights[r])
        total = torch.zeros_like(target).index_add(0, start[r], weights[r] * target)
        np.testing.assert_allclose((total / m)[start[r]], expected, rtol=0, atol=1e-12 * float(target.abs().max()))


def test_gap_equal_to_eps_is_not_pooled() -> None:
    for module in (compiled, plain):
        separate = module.pool(*CASES["equal gaps, at the kink"], MEAN)
        assert torch.equal(separate, torch.arange(33).expand(2, 33))
        assert not module.pool(*CASES["equal gaps, pooled"], MEAN).any()


def test_one_outlier_reaches_the_sequential_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    original = plain._pool_sequentially

    def counted(state: plain.State, rule: int) -> plain.State:
        left.append(state[0].shape[1])
        return original(state, rule)

    monkeypatch.setattr(plain, "_pool_sequentially", counted)
    rows = CASES["outlier"]
    start = plain.pool(*rows, MEAN)
    assert not start.any()
    assert len(left) == 1
    assert 2 * (200 - plain.ROUNDS) <= left[0] <= 2 * 200
    # logsumexp needs a milder outlier
    w = descending(2, 400)
    w[:, 0] = 100
    mild = case(positions(2, 400) / 400, w, 0.001)
    assert torch.equal(plain.pool(*mild, LOGSUMEXP), compiled.pool(*mild, LOGSUMEXP))


@RULES
def test_rounds_and_fallback_give_the_same_blocks(rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = CASES["rank, eps 0.1"]
    expected = plain.pool(*rows, rule)
    for rounds in (1, 2, 3, 5):
        monkeypatch.setattr(plain, "ROUNDS", rounds)
        assert torch.equal(plain.pool(*rows, rule), expected)


@RULES
@pytest.mark.parametrize("module", [compiled, plain], ids=["compiled", "plain"])
def test_rows_do_not_see_each_other(module: object, rule: int) -> None:
    theta, w, weights, group, eps = CASES["rank, eps 0.1"]
    together = module.pool(theta, w, weights, group, eps, rule)  # type: ignore[attr-defined]
    for r in range(4):
        part = slice(r, r + 1)
        alone = module.pool(theta[part], w[part], weights[part], group[part], eps[part], rule)  # type: ignore[attr-defined]
        assert torch.equal(alone, together[part])


@RULES
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_pool(shape: tuple[int, int], rule: int) -> None:
    empty = torch.zeros(shape, dtype=torch.float64)
    for module in (compiled, plain):
        assert module.pool(*case(empty, empty, 1.0), rule).shape == shape


@RULES
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 1e3])
def test_long_rows_agree(rule: int, eps: float) -> None:
    rows = case(descending(1, 20_000), positions(1, 20_000), eps)
    if rule == LOGSUMEXP:
        rows = (rows[0], rows[1].log(), *rows[2:])
    assert torch.equal(compiled.pool(*rows, rule), plain.pool(*rows, rule))


# --- the operators on top of either kernel ---------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda x: so.rank(x, smoothing=0.1),
    "rank, mixing": lambda x: so.rank(x),
    "rank, entropy": lambda x: so.rank(x, smoothing=so.Entropy(0.1)),
    "rank, weights": lambda x: so.rank(x, weights=torch.arange(1.0, 41.0), smoothing=0.5),
    "rank, where": lambda x: so.rank(x, where=x.detach() > -1, smoothing=0.1),
    "sort": lambda x: so.sort(x, smoothing=20.0),
    "sort, mixing": lambda x: so.sort(x),
    "sort, entropy": lambda x: so.sort(x, smoothing=so.Entropy(20.0)),
    "topk": lambda x: so.topk(x, 7, smoothing=20.0),
    "isotonic": lambda x: so.isotonic(x),
    "sparsemax": lambda x: so.sparsemax(x),
    "entmax": lambda x: so.entmax(x),
    "entmax, alpha 1.2": lambda x: so.entmax(x, 1.2),
    "entmax, alpha 3": lambda x: so.entmax(x, 3.0),
    "amax": lambda x: so.amax(x, 1, smoothing=so.Tsallis(1.5, 0.3)),
    "mask": lambda x: so.topk_mask(x, 5.5, smoothing=0.3),
    "mask, mixing": lambda x: so.topk_mask(x, 5),
    "mask, entropy": lambda x: so.topk_mask(x, 5, smoothing=so.Entropy(0.3)),
    "mask, tsallis": lambda x: so.topk_mask(x, 5, smoothing=so.Tsallis(1.5, 0.3)),
    "mask, binary entropy": lambda x: so.topk_mask(x, 35, smoothing=so.BinaryEntropy(0.3)),
    "mask, laplace": lambda x: so.topk_mask(x, 5, smoothing=so.Laplace(0.3)),
    "mask, where": lambda x: so.topk_mask(x, 5, where=x.detach() > -1, smoothing=so.Laplace(0.3)),
    "mask, k of each row": lambda x: so.topk_mask(x, torch.arange(1.0, 7.0).unsqueeze(1), smoothing=0.3),
}


# tau is known to the rounding of the sum, k, so that a value near 1 moves by some ulps where k is 35
ULPS = {"mask, binary entropy": 16}


def ulps(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of float64 rounding at the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / (torch.finfo(torch.float64).eps * b.abs().max()))


@pytest.mark.parametrize("name", OPERATORS)
def test_without_numba_the_numbers_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS[name]
    x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    assert kernels._compiled("cpu") is not None
    fast = operator(x)
    c = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    (fast_gradient,) = torch.autograd.grad(fast, x, c)
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    slow = operator(x)
    (slow_gradient,) = torch.autograd.grad(slow, x, c)
    assert ulps(fast, slow) <= ULPS.get(name, 4)
    assert ulps(fast_gradient, slow_gradient) <= 16
