"""Ranking metrics against scikit-learn, scipy and definitions written out; conventions; what every metric keeps."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from oracles import normal
from ranking import METRICS, SIGNED, UNBOUNDED, Metric, lists
from torch import Tensor

import smoothops as so

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=METRICS)
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param]


def samples(tied: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(scores, graded labels, weights) of 60 single lists of 2 to 13 items."""
    found = []
    for seed in range(60):
        n = 2 + seed % 12
        scores = normal(n, seed=seed) * 2
        labels = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed)).double()
        found.append((scores.round() if tied else scores, labels, 0.2 + normal(n, seed=seed + 99).abs()))
    return found


# --- against scikit-learn and scipy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [None, 1, 3, 50])
def test_dcg_is_sklearns(tied: bool, k: int | None) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for s, y, _ in samples(tied):
        lists = y.numpy()[None], s.numpy()[None]
        assert so.metrics.dcg(s, y, k=k).item() == pytest.approx(sklearn.dcg_score(*lists, k=k), abs=1e-12)
        assert so.metrics.ndcg(s, y, k=k).item() == pytest.approx(sklearn.ndcg_score(*lists, k=k), abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_average_precision_and_auc_are_sklearns(tied: bool, weighted: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    seen = 0
    for s, y, w in samples(tied):
        relevant, ours = (y > 1).int(), {"weights": w} if weighted else {}
        theirs = {"sample_weight": w.numpy()} if weighted else {}
        if not 0 < relevant.sum() < len(y):
            continue
        seen += 1
        for f, g in (
            (so.metrics.average_precision, sklearn.average_precision_score),
            (so.metrics.auc, sklearn.roc_auc_score),
            (so.metrics.pairwise_accuracy, sklearn.roc_auc_score),
        ):
            want = g(relevant.numpy(), s.numpy(), **theirs)
            assert f(s, relevant, **ours).item() == pytest.approx(want, abs=1e-12)
    assert seen > 40


@pytest.mark.parametrize("tied", [False, True])
def test_correlations_are_scipys(tied: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    seen = 0
    for s, y, w in samples(tied):
        copies = (w * 3).ceil().long()
        if len(s.unique()) == 1 or len(y.unique()) == 1:
            continue
        seen += 1
        want = stats.spearmanr(s.numpy(), y.numpy()).statistic
        assert so.metrics.spearman(s, y).item() == pytest.approx(want, abs=1e-12)
        want = stats.kendalltau(s.numpy(), y.numpy()).statistic
        assert so.metrics.kendall(s, y).item() == pytest.approx(want, abs=1e-12)
        repeated = [v.repeat_interleave(copies).numpy() for v in (s, y)]
        want = stats.spearmanr(*repeated).statistic
        assert so.metrics.spearman(s, y, weights=copies).item() == pytest.approx(want, abs=1e-12)
    assert seen > 40


# --- against their definitions ----------------------------------------------------------------------------------------


def by_hand(s: Tensor, y: Tensor, k: int | None) -> dict[str, float]:
    """From the list of relevant flags in the order of the scores, in plain Python."""
    shown = [bool(y[i] > 0) for i in s.argsort(descending=True)]
    k = len(shown) if k is None else k
    first = shown.index(True) + 1 if True in shown else None
    total, top = sum(shown), shown[:k]
    precisions = [sum(shown[: i + 1]) / (i + 1) for i, relevant in enumerate(top) if relevant]
    return {
        "precision_at_k": sum(top) / min(k, len(shown)),
        "recall_at_k": sum(top) / total if total else 0,
        "hit_rate_at_k": float(any(top)),
        "reciprocal_rank": 1 / first if first and first <= k else 0,
        "average_precision": sum(precisions) / min(k, total) if total else 0,
    }


@pytest.mark.parametrize("k", [None, 1, 2, 5, 50])
def test_definitions(k: int | None) -> None:
    for s, y, _ in samples(False):
        for name, want in by_hand(s, (y > 2).double(), k).items():
            assert getattr(so.metrics, name)(s, y > 2, k=k).item() == pytest.approx(want, abs=1e-12), name


def test_ties_share_the_mean_over_all_orders() -> None:
    """dcg, precision and recall: what a random order of the tied items gives in the mean."""
    import itertools

    s, y = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1, 0, 1, 2])
    orders = [v for v in itertools.permutations(range(5)) if all(s[a] >= s[b] for a, b in itertools.pairwise(v))]
    places = torch.stack([-torch.tensor(v).argsort().double() for v in orders])
    for name in ("dcg", "ndcg", "precision_at_k", "recall_at_k"):
        f = getattr(so.metrics, name)
        for k in (None, 1, 2, 3, 4):
            mean = f(places, y.expand(len(orders), 5), k=k)
            torch.testing.assert_close(f(s, y, k=k), mean, **EXACT)


def test_gain_discount_and_weights() -> None:
    s, y = lists(5, 9)
    w = 0.5 + normal(5, 9, seed=7).abs()
    order = s.argsort(-1, descending=True)
    gains, places = (w * (2**y - 1)).gather(-1, order), torch.arange(1, 10).double()
    for discount in (lambda r: 1 / r, lambda r: 1 / torch.log2(1 + r)):
        want = (gains * discount(places)).sum(-1)
        best = (gains.sort(-1, descending=True).values * discount(places)).sum(-1)
        options = {"weights": w, "gain": so.metrics.exponential_gain, "discount": discount, "reduction": "none"}
        torch.testing.assert_close(so.metrics.dcg(s, y, **options), want, **EXACT)
        torch.testing.assert_close(so.metrics.ndcg(s, y, **options), want / best, **EXACT)
    heavy = (w * (y > 0)).sum(-1)
    recall = (w * (y > 0) * (s >= s.sort(-1).values[:, 6:7])).sum(-1) / heavy
    torch.testing.assert_close(so.metrics.recall_at_k(s, y, k=3, weights=w, reduction="none"), recall, **EXACT)


def test_ties_of_curved_metrics() -> None:
    """All scores equal: hard, the mean discount, and for average precision the last rank; soft, those of mean ranks."""
    s, y = torch.zeros(5).double(), torch.tensor([0.0, 1, 0, 2, 1])
    places = torch.arange(1, 6).double()
    discount = so.metrics.log2_discount
    torch.testing.assert_close(so.metrics.dcg(s, y), 4 * discount(places).mean(), **EXACT)
    torch.testing.assert_close(so.metrics.dcg(s, y, smoothing=None), 4 * discount(places.mean()), **EXACT)
    torch.testing.assert_close(so.metrics.reciprocal_rank(s, y), places.reciprocal().mean(), **EXACT)
    assert so.metrics.reciprocal_rank(s, y, smoothing=None).item() == pytest.approx(1 / 3)
    assert so.metrics.average_precision(s, y).item() == pytest.approx(3 / 5)
    assert so.metrics.average_precision(s, y, smoothing=None).item() == pytest.approx(2 / 3)


# --- conventions ------------------------------------------------------------------------------------------------------

# of lists: no relevant item (all labels 0), all scores equal, a single relevant item; None: not the same hard and soft
CONVENTIONS = {
    "dcg": (0, None, 1), "ndcg": (0, None, 1), "average_precision": (0, None, 1), "reciprocal_rank": (0, None, 1),
    "precision_at_k": (0, 0.6, 1), "recall_at_k": (0, 0.6, 1), "hit_rate_at_k": (0, 0.6, 1),
    "spearman": (0, 0, 0), "kendall": (0, 0, 0), "pairwise_accuracy": (0.5, 0.5, 0.5), "auc": (0.5, 0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [so.Hard(), None], ids=["hard", "default"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_degenerate_lists(name: str, smoothing: so.Smoothing | None) -> None:
    f, (no_relevant, tied, single) = getattr(so.metrics, name), CONVENTIONS[name]
    options = {"k": 3} if name.endswith("_at_k") else {}
    labels = torch.tensor([0.0, 1, 0, 2, 1])
    lists = [
        (normal(5), torch.zeros(5), no_relevant),
        (normal(1), torch.ones(1), single),
        (normal(0), torch.ones(0), 0),
    ]
    if tied is not None:
        lists.append((torch.zeros(5).double(), labels, tied))
    for scores, y, want in lists:
        x = scores.clone().requires_grad_()
        value = f(x, y, smoothing=smoothing, **options)
        assert value.item() == pytest.approx(want, abs=1e-12), (scores, y)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("smoothing", [so.Hard(), None], ids=["hard", "default"])
def test_empty_lists_are_0_and_leave_the_mean(metric: Metric, smoothing: so.Smoothing | None) -> None:
    s, y = lists(4, 6)
    where = torch.ones(4, 6, dtype=torch.bool)
    where[2] = False
    x = s.clone().requires_grad_()
    each = metric(x, y, where=where, smoothing=smoothing, reduction="none")
    assert each[2] == 0
    mean = metric(x, y, where=where, smoothing=smoothing)
    torch.testing.assert_close(mean, each.sum() / 3)
    torch.testing.assert_close(metric(x, y, where=where, smoothing=smoothing, reduction="sum"), each.sum())
    if mean.requires_grad:
        (gradient,) = torch.autograd.grad(mean, x)
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()
    assert metric(s, y, where=torch.zeros(6, dtype=torch.bool), smoothing=smoothing) == 0
    assert metric(s[:0], y[:0], smoothing=smoothing, reduction="none").shape == (0,)


@pytest.mark.parametrize("smoothing", [so.Hard(), None, so.Laplace(0.3)], ids=["hard", "default", "laplace"])
def test_padding_changes_nothing(metric: Metric, smoothing: so.Smoothing | None) -> None:
    s, y = lists(3, 6)
    padded = [torch.cat([v, torch.full((3, 4), fill).double()], -1) for v, fill in ((s, 1e6), (y, 3.0))]
    padded[1][:, -1] = torch.nan
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    where = (torch.arange(10) < 6)[order]
    results = []
    for x, labels, options in ((s, y, {}), (padded[0][:, order], padded[1][:, order], {"where": where})):
        x = x.clone().requires_grad_()
        value = metric(x, labels, smoothing=smoothing, reduction="none", **options)
        gradient = torch.zeros_like(x)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), x)
        results.append((value.detach(), gradient))
    (want, g), (got, h) = results
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(h[:, order.argsort()][:, :6], g, rtol=1e-9, atol=1e-11)
    assert (h[:, order.argsort()][:, 6:] == 0).all()


def test_soft_metrics_lie_in_the_range() -> None:
    for seed in range(20):
        s, y = lists(5, 3 + seed, seed=seed)
        for name, f in METRICS.items():
            if name in UNBOUNDED:
                continue
            low = -1 if name in SIGNED else 0
            for smoothing in (None, 0.01, 0.3, 3.0, so.Laplace(0.3), so.Quadratic(so.Mixing(8.0))):
                value = f(s, y, smoothing=smoothing, reduction="none")
                assert (value >= low - 1e-9).all(), (name, smoothing)
                assert (value <= 1 + 1e-9).all(), (name, smoothing)


def test_perfect_order_is_1() -> None:
    y = torch.tensor([0.0, 3, 1, 2, 4]).double()
    for name, f in METRICS.items():
        if name not in UNBOUNDED:
            assert f(y, y).item() == pytest.approx(1 if name != "recall_at_k, k=3" else 3 / 4), name


# --- what every metric keeps ------------------------------------------------------------------------------------------


def test_rows_dims_and_dtypes(metric: Metric) -> None:
    s, y = lists(6, 7)
    for smoothing in (so.Hard(), None):
        whole = metric(s, y, smoothing=smoothing, reduction="none")
        assert torch.equal(
            metric(s.view(2, 3, 7), y.view(2, 3, 7), smoothing=smoothing, reduction="none").flatten(), whole
        )
        alone = torch.stack([metric(a, b, smoothing=smoothing) for a, b in zip(s, y, strict=True)])
        assert torch.equal(alone, whole)
        torch.testing.assert_close(metric(s, y, smoothing=smoothing), whole.mean(), **EXACT)
        strided = s.t().contiguous().t()
        assert torch.equal(metric(strided, y, smoothing=smoothing, reduction="none"), whole)
        for dtype in (torch.float32, torch.bfloat16):
            got = metric(s.to(dtype), y, smoothing=smoothing, reduction="none")
            assert got.dtype == dtype
            want = metric(s.to(dtype).double(), y, smoothing=smoothing, reduction="none")
            torch.testing.assert_close(got, want.to(dtype), rtol=1e-6, atol=1e-6)
    assert torch.equal(metric((s * 4).round().long(), y), metric((s * 4).round().float(), y))


def test_nan_stays_in_its_list(metric: Metric) -> None:
    s, y = lists(3, 6)
    want = metric(s, y, smoothing=None, reduction="none")
    s[1, 2] = torch.nan
    for smoothing in (so.Hard(), None):
        assert metric(s, y, smoothing=smoothing, reduction="none").isnan().tolist() == [False, True, False]
    got = metric(s, y, smoothing=None, reduction="none")
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], **EXACT)


def test_bad_arguments(metric: Metric) -> None:
    s, y = lists(3, 6)
    with pytest.raises(ValueError, match=r"same shape \(..., list\), got \(3, 6\) and \(3, 5\)"):
        metric(s, y[:, :5])
    with pytest.raises(ValueError, match="same shape"):
        metric(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="reduction must be one of"):
        metric(s, y, reduction="batchmean")
    with pytest.raises(ValueError, match="weights must be positive"):
        metric(s, y, weights=torch.zeros(6))
    with pytest.raises(ValueError, match="does not broadcast"):
        metric(s, y, weights=torch.ones(5))
    with pytest.raises(TypeError, match="where must be a bool tensor"):
        metric(s, y, where=torch.ones(6))
    with pytest.raises(TypeError, match=r"scores must be a torch\.Tensor"):
        metric([1.0], y)


def test_bad_cut_off() -> None:
    s, y = lists(3, 6)
    for name in so.metrics.__all__:
        f = getattr(so.metrics, name)
        if "k" in inspect.signature(f).parameters:
            with pytest.raises(ValueError, match="k must be at least 1"):
                f(s, y, k=0)
            with pytest.raises(TypeError, match="k must be an int"):
                f(s, y, k=2.0)


def test_a_relaxed_sort_is_no_rank() -> None:
    with pytest.raises(ValueError, match="SoftSort"):
        so.metrics.ndcg(*lists(2, 4), smoothing=so.SoftSort(0.1))


def test_perturbed_is_the_mean_metric_under_noise(metric: Metric) -> None:
    s, y = normal(2, 6, seed=1), torch.tensor([1.0, 0, 0, 2, 0, 0]).expand(2, 6).double()
    noise = 0.5 * torch.randn(4000, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = metric(s + noise, y.expand(4000, 2, 6), reduction="none").mean(0)
    smoothing = so.Perturbed(0.5, samples=4000, generator=torch.Generator().manual_seed(0))
    x = s.clone().requires_grad_()
    got = metric(x, y, smoothing=smoothing, reduction="none")
    scale = 4 if "dcg" in getattr(metric, "__name__", "") else 1
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * scale)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-3


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for f in METRICS.values():
            f(*lists(2, 5), smoothing=None)
