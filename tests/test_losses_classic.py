"""The classic surrogates against their definitions, written out item by item in plain Python, and allRank's numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import normal
from ranking import CLASSIC, Metric, lists
from torch import Tensor

import smoothops as so

EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(params=CLASSIC)
def loss(request: pytest.FixtureRequest) -> Metric:
    return CLASSIC[request.param]


def softplus(v: float) -> float:
    return math.log1p(math.exp(-abs(v))) + max(v, 0)


def sigmoid(v: float) -> float:
    return 0.5 + 0.5 * math.tanh(v / 2)


def pairs(y: list[float]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(y)) for j in range(len(y)) if y[i] > y[j]]


def discount(r: float) -> float:
    return 1 / math.log2(1 + r)


def ideal(gains: list[float], k: int | None = None) -> float:
    return sum(g * discount(r) for r, g in enumerate(sorted(gains, reverse=True)[:k], 1))


def by_hand(s: list[float], y: list[float], w: list[float]) -> dict[str, float]:
    n, every = len(s), pairs(y)
    heavy = sum(w[i] * w[j] for i, j in every)
    e, f = sum(map(math.exp, s)), sum(map(math.exp, y))
    order = sorted(range(n), key=lambda i: -y[i])
    rank = {i: r for r, i in enumerate(sorted(range(n), key=lambda i: -s[i]), 1)}
    gains = [a * b for a, b in zip(y, w, strict=True)]
    soft = lambda i, t, among: 1 + sum(sigmoid((s[j] - s[i]) / t) for j in among if j != i)  # noqa: E731
    relevant = [i for i in range(n) if y[i] > 0]
    swap = lambda i, j: abs((gains[i] - gains[j]) * (discount(rank[i]) - discount(rank[j])))  # noqa: E731
    approx = [soft(i, 0.1, range(n)) for i in range(n)]
    return {
        "list_net": -sum(w[i] * math.exp(y[i]) / f * math.log(math.exp(s[i]) / e) for i in range(n)),
        "list_mle": sum(
            w[i] * (math.log(sum(math.exp(s[j]) for j in order[place:])) - s[i]) for place, i in enumerate(order)
        ),
        "rank_net": sum(w[i] * w[j] * softplus(s[j] - s[i]) for i, j in every) / heavy,
        "pairwise_hinge": sum(w[i] * w[j] * max(0, 1 - s[i] + s[j]) for i, j in every) / heavy,
        "lambda_rank": sum(swap(i, j) * softplus(s[j] - s[i]) for i, j in every) / ideal(gains),
        "soft_margin": sum(a * softplus(-b if c > 0 else b) for a, b, c in zip(w, s, y, strict=True)) / sum(w),
        "approx_ndcg": 1 - sum(g * discount(r) for g, r in zip(gains, approx, strict=True)) / ideal(gains),
        "smooth_ap": 1
        - sum(w[i] * soft(i, 0.01, relevant) / soft(i, 0.01, range(n)) for i in relevant) / sum(w[i] for i in relevant),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_definitions(n: int, weighted: bool) -> None:
    s, y = lists(6, n, seed=n)
    s[0] *= 0.01
    w = 0.5 + normal(6, n, seed=3).abs() if weighted else torch.ones(6, n).double()
    for row in range(6):
        expected = by_hand(s[row].tolist(), y[row].tolist(), w[row].tolist())
        for name, want in expected.items():
            got = CLASSIC[name](s[row], y[row], weights=w[row] if weighted else None)
            assert got.item() == pytest.approx(want, rel=1e-10, abs=1e-12), name


def test_cut_offs_gains_and_other_options() -> None:
    s, y = lists(1, 8, seed=2)
    a, b = s[0].tolist(), y[0].tolist()
    rank = {i: r for r, i in enumerate(sorted(range(8), key=lambda i: -a[i]), 1)}
    gains = [2**v - 1 for v in b]
    weight = [discount(rank[i]) * (rank[i] <= 3) for i in range(8)]
    want = sum(abs((gains[i] - gains[j]) * (weight[i] - weight[j])) * softplus(a[j] - a[i]) for i, j in pairs(b))
    got = so.losses.lambda_rank(s, y, k=3, gain=so.metrics.exponential_gain)
    assert got.item() == pytest.approx(want / ideal(gains, 3))
    hinge = so.losses.pairwise_hinge(s, y, margin=0.25).item()
    assert hinge == pytest.approx(sum(max(0, 0.25 - a[i] + a[j]) for i, j in pairs(b)) / len(pairs(b)))
    # a low temperature is the metric
    for k in (None, 3):
        neural = so.losses.neural_ndcg(s, y, k=k, temperature=1e-3)
        torch.testing.assert_close(neural, 1 - so.metrics.ndcg(s, y, k=k), rtol=0, atol=1e-6)
    torch.testing.assert_close(so.losses.approx_ndcg(s, y, temperature=1e-3), 1 - so.metrics.ndcg(s, y), **EXACT)
    ap = 1 - so.metrics.average_precision(s, y)
    torch.testing.assert_close(so.losses.smooth_ap(s, y, temperature=1e-3), ap, **EXACT)


def test_list_mle_is_a_likelihood() -> None:
    """The probabilities of all orders sum to 1."""
    s = normal(4)
    orders = torch.tensor(list(itertools.permutations(range(4)))).double()
    loss = so.losses.list_mle(s.expand(24, 4), orders, reduction="none")
    torch.testing.assert_close((-loss).exp().sum(), torch.tensor(1.0).double())


APPROX = [0.6171177, 0.6226141]
NEURAL = [0.6543846, 0.6692575]


def test_numbers_of_allrank() -> None:
    """approxNDCGLoss and neuralNDCG of allRank 1.4.3 on these lists, in float32; the second list has padding."""
    s = torch.tensor([[0.3, 0.9, 0.1, -0.4], [1.5, -0.2, 0.4, 9.0]]).double()
    y = torch.tensor([[2.0, 1, 0, 3], [0, 1, 4, 0]])
    where = torch.tensor([[True] * 4, [True] * 3 + [False]])
    options = {"where": where, "gain": so.metrics.exponential_gain, "reduction": "none"}
    approx = 1 - so.losses.approx_ndcg(s, y, temperature=1.0, **options)
    torch.testing.assert_close(approx, torch.tensor(APPROX).double(), rtol=0, atol=2e-6)
    neural = 1 - so.losses.neural_ndcg(s, y, **options)
    torch.testing.assert_close(neural, torch.tensor(NEURAL).double(), rtol=0, atol=2e-5)


def test_padding_changes_nothing(loss: Metric) -> None:
    s, y = lists(3, 5)
    padded = [torch.cat([v, torch.full((3, 3), fill).double()], -1) for v, fill in ((s, 1e6), (y, 3.0))]
    where = torch.arange(8) < 5
    results = []
    for a, b, options in ((s, y, {}), (*padded, {"where": where})):
        x = a.clone().requires_grad_()
        value = loss(x, b, reduction="none", **options)
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert (gradient[:, 5:] == 0).all()
        results.append((value.detach(), gradient[:, :5]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_rows_are_independent_and_nan_stays(loss: Metric) -> None:
    s, y = lists(4, 6)
    whole = loss(s, y, reduction="none")
    assert torch.equal(torch.stack([loss(a, b) for a, b in zip(s, y, strict=True)]), whole)
    s[1, 2] = torch.nan
    broken = loss(s, y, reduction="none")
    assert broken.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(broken[[0, 2, 3]], whole[[0, 2, 3]], rtol=0, atol=1e-12)


def test_derivatives(loss: Metric) -> None:
    s, y = lists(2, 5, seed=4)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, y, weights=w, reduction="none") * torch.tensor([1.0, -0.7])

    x, w = (s * 0.3).requires_grad_(), (0.5 + normal(2, 5, seed=3).abs()).requires_grad_()
    temperature = {"temperature": 0.5} if loss in (so.losses.smooth_ap, so.losses.approx_ndcg) else {}
    g = lambda x, w: loss(x, y, weights=w, reduction="none", **temperature)  # noqa: E731
    if loss is so.losses.lambda_rank:
        w = w.detach()  # the change of NDCG is a constant in the scores only
    assert torch.autograd.gradcheck(g, (x, w), check_forward_ad=True, check_batched_grad=True)
    if loss is not so.losses.pairwise_hinge:
        assert torch.autograd.gradgradcheck(lambda x: g(x, w.detach()), x)
    assert f(x, w).isfinite().all()


def test_large_scores_overflow_nothing(loss: Metric) -> None:
    s, y = lists(3, 6)
    x = (s * 1e4).requires_grad_()
    value = loss(x, y)
    assert value.isfinite()
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_bad_arguments() -> None:
    s, y = lists(2, 4)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        so.losses.approx_ndcg(s, y, temperature=0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        so.losses.neural_ndcg(s, y, temperature=-1.0)
    with pytest.raises(ValueError, match="margin must be a positive number"):
        so.losses.pairwise_hinge(s, y, margin=-1.0)
    with pytest.raises(ValueError, match="sinkhorn must be"):
        so.losses.neural_ndcg(s, y, sinkhorn=-1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        so.losses.lambda_rank(s, y, k=0)
    with pytest.raises(ValueError, match="same shape"):
        so.losses.list_net(s, y[:, :2])
