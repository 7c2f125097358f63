"""The soft ranking losses: 1 - metric, the limit, derivatives, scale, length, memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from oracles import normal
from ranking import CLASSIC, LOSSES, METRICS, UNBOUNDED, Metric, lists
from torch import Tensor

import smoothops as so
from smoothops.metrics import _pairs

REGULARIZERS = {"quadratic": so.Quadratic(0.7), "entropy": so.Entropy(0.5), "laplace": so.Laplace(0.5)}
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*LOSSES, *CLASSIC])
def loss(request: pytest.FixtureRequest) -> Metric:
    return {**LOSSES, **CLASSIC}[request.param]


def weighted(loss: Metric, labels: Tensor, **options: object) -> Metric:
    """Each list's loss times a number of its own."""
    weights = torch.cos(1 + torch.arange(labels.shape[0]).double())
    return lambda x: loss(x, labels, reduction="none", **options) * weights


# --- values -----------------------------------------------------------------------------------------------------------


def test_loss_is_1_less_the_metric_and_its_limit(name: str) -> None:
    s, y = lists(30, 8)
    metric = METRICS[name](s, y, reduction="none")
    for smoothing in (so.Hard(), 0.0, so.StraightThrough(0.5)):
        assert torch.equal(LOSSES[name](s, y, smoothing=smoothing, reduction="none"), 1 - metric)
    for smoothing in (None, 0.3, so.Laplace(0.3)):
        soft = METRICS[name](s, y, smoothing=smoothing, reduction="none")
        assert torch.equal(LOSSES[name](s, y, smoothing=smoothing, reduction="none"), 1 - soft)
    gap = s.sort(-1).values.diff(dim=-1).min().item()
    for smoothing in (so.Quadratic(gap / 20), so.Laplace(gap / 60), so.Quadratic(so.Mixing(1.0))):
        soft = LOSSES[name](s, y, smoothing=smoothing, reduction="none")
        torch.testing.assert_close(soft, 1 - metric, **EXACT)


def test_tied_scores_in_the_limit() -> None:
    """Where the metric is linear in the places of tied items, hard and soft agree on ties too."""
    s, y = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 1, 0, 1, 0, 0])
    for name in ("precision_at_k, k=3", "recall_at_k, k=3", "spearman", "kendall", "pairwise_accuracy", "auc"):
        hard, soft = (LOSSES[name](s, y, smoothing=e) for e in (so.Hard(), 1e-3))
        torch.testing.assert_close(hard, soft, **EXACT)


def test_empty_lists_cost_nothing(loss: Metric) -> None:
    s, y = lists(3, 6)
    where = torch.tensor([[True] * 6, [False] * 6, [True] * 5 + [False]])
    x = s.clone().requires_grad_()
    each = loss(x, y, where=where, reduction="none")
    assert each[1] == 0
    mean = loss(x, y, where=where)
    torch.testing.assert_close(mean, each.sum() / 2)
    (gradient,) = torch.autograd.grad(mean, x)
    assert gradient.isfinite().all()
    assert (gradient[~where] == 0).all()
    assert loss(s[:, :0], y[:, :0]) == 0
    assert loss(s[:, :0], y[:, :0], reduction="none").tolist() == [0, 0, 0]


def test_lists_without_anything_to_learn(loss: Metric) -> None:
    for s, y in ((normal(5), torch.zeros(5)), (normal(1), torch.ones(1)), (torch.zeros(5), torch.arange(5.0))):
        x = s.double().requires_grad_()
        value = loss(x, y)
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all()


def test_tied_scores_are_parted(name: str) -> None:
    """A model that gives all items one score, as at its start, has a gradient that raises the relevant ones."""
    y = torch.tensor([0.0, 0, 3, 0, 0, 0, 0, 0])
    x = torch.zeros(8).double().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](x, y), x)
    assert gradient[2] < -1e-6
    assert (gradient[y == 0] > 0).all()


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", REGULARIZERS)
def test_derivatives(name: str, reg: str) -> None:
    s, y = lists(2, 5, seed=4)
    f = weighted(LOSSES[name], y, smoothing=REGULARIZERS[reg])
    x = s.requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)


def test_default_derivative_is_that_at_the_eps_it_chose_along_which_the_scale_stays() -> None:
    s, y = lists(4, 9)
    x = s.clone().requires_grad_()
    around = s - s.mean(-1, keepdim=True)
    unit = around / around.norm(dim=-1, keepdim=True)
    for name in ("ndcg", "average_precision", "spearman", "auc", "kendall", "pairwise_accuracy"):
        eps = so.mixing_eps(so.rank, s)
        values = [weighted(LOSSES[name], y, smoothing=e)(x) for e in (None, so.Quadratic(eps))]
        torch.testing.assert_close(*values, **EXACT)
        got, fixed = (torch.autograd.grad(v.sum(), x)[0] for v in values)
        want = fixed - (fixed * unit).sum(-1, keepdim=True) * unit
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_training_on_the_scores_themselves_neither_shrinks_nor_stretches_them(name: str) -> None:
    s, y = lists(1, 12, seed=2)
    x = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](x, y), x)
    assert abs((gradient * (s - s.mean())).sum()) <= 1e-9 * gradient.norm() * s.norm()


def test_transforms(loss: Metric) -> None:
    s, y = lists(3, 5, seed=4)
    one = lambda x, y: loss(x, y)  # noqa: E731
    each = loss(s, y, reduction="none")
    torch.testing.assert_close(torch.vmap(one)(s, y), each, **EXACT)
    x = s.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x, y, reduction="sum"), x)
    gradient = torch.func.grad(one)
    torch.testing.assert_close(torch.vmap(gradient)(s, y), want, rtol=1e-9, atol=1e-11)
    v = normal(3, 5, seed=9)
    tangent = torch.func.jvp(lambda x: loss(x, y, reduction="none"), (s,), (v,))[1]
    torch.testing.assert_close(tangent, (want * v).sum(-1), rtol=1e-9, atol=1e-11)
    hessian = torch.func.hessian(lambda x: one(x, y[0]))(s[0])
    rows = torch.autograd.functional.hessian(lambda x: one(x, y[0]), s[0])
    torch.testing.assert_close(hessian, rows, rtol=1e-7, atol=1e-9)


def test_gradients_in_weights_and_eps() -> None:
    s, y = lists(2, 5, seed=4)
    w = (0.5 + normal(2, 5, seed=3).abs()).requires_grad_()
    eps = torch.tensor([[0.4], [0.8]], dtype=torch.float64, requires_grad=True)
    for name, f in LOSSES.items():

        def value(w: Tensor, e: Tensor, f: Metric = f) -> Tensor:
            return f(s, y, weights=w, smoothing=so.Quadratic(e), reduction="none")

        assert torch.autograd.gradcheck(value, (w, eps)), name


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from the compiler
@pytest.mark.parametrize(
    "which", ["ndcg", "ndcg, k=3", "average_precision", "reciprocal_rank", "spearman", "kendall", "auc", "list_mle",
              "lambda_rank", "approx_ndcg", "neural_ndcg"],
)  # fmt: skip
def test_compiled(which: str) -> None:
    loss, (s, y) = {**LOSSES, **CLASSIC}[which], lists(3, 6)
    where = torch.arange(6).expand(3, 6) != 2
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = s.clone().requires_grad_()
        value = f(x, y, where=where)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# --- scale and length -------------------------------------------------------------------------------------------------


def test_the_default_adapts_to_scale_and_shift(name: str) -> None:
    s, y = lists(4, 20)
    results = []
    for scale, shift in ((1.0, 0.0), (1e4, 0.0), (1e-4, 0.0), (1.0, 1e4)):
        x = (s * scale + shift).requires_grad_()
        value = LOSSES[name](x, y)
        results.append((value.detach(), torch.autograd.grad(value, x)[0] * scale))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-6, atol=1e-8)
    assert results[0][1].abs().max() > 1e-4


@pytest.mark.parametrize("n", [3, 30, 300, 3000])
def test_the_gradient_is_usable_at_every_length(n: int) -> None:
    s, y = lists(4, n)
    for scale in (1.0, 1e4):
        x = (s * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(so.losses.ndcg(x, y), x)
        assert (gradient != 0).double().mean() > 0.4


def test_a_step_down_the_gradient_helps(name: str) -> None:
    s, y = lists(8, 12, seed=2)
    x = s.clone().requires_grad_()
    value = LOSSES[name](x, y, smoothing=1.0)
    (gradient,) = torch.autograd.grad(value, x)
    assert LOSSES[name](s - 0.05 * gradient / gradient.abs().max(), y, smoothing=1.0) < value


def test_infinite_scores_are_extremes_without_gradient(name: str) -> None:
    s, y = lists(1, 7, seed=2)
    s[0, 2], s[0, 4] = torch.inf, -torch.inf
    x = s.clone().requires_grad_()
    value = LOSSES[name](x, y)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[0, [2, 4]] == 0).all()
    hard = LOSSES[name](s, y, smoothing=1e-9)
    torch.testing.assert_close(hard, LOSSES[name](s, y, smoothing=so.Hard()), **EXACT)


# --- all pairs in blocks ----------------------------------------------------------------------------------------------

QUADRATIC = ["kendall", "pairwise_accuracy", "rank_net", "lambda_rank", "approx_ndcg", "pairwise_hinge", "smooth_ap"]


@pytest.mark.parametrize("which", QUADRATIC)
def test_blocks_of_pairs(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, (s, y) = {**LOSSES, **CLASSIC}[which], lists(2, 23)
    options = {"smoothing": so.Entropy(0.5)} if which in LOSSES else {}
    w = 0.5 + normal(2, 23, seed=3).abs()
    results = []
    for block in (2**19, 2 * 23 * 5):
        monkeypatch.setattr(_pairs, "BLOCK", block)
        x = s.clone().requires_grad_()
        v = w.clone().requires_grad_()
        value = loss(x, y, weights=v, reduction="none", **options)
        first = torch.autograd.grad(
            value @ torch.tensor([1.0, -0.3]).double(), (x, v), create_graph=True, materialize_grads=True
        )
        (second,) = torch.autograd.grad((first[0] * normal(2, 23, seed=5)).sum(), x)
        plain = torch.autograd.grad(loss(x, y, weights=v, **options), (x, v), materialize_grads=True)
        results.append((value.detach(), *(f.detach() for f in first), second, *plain))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_batched_gradients_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "BLOCK", 20)
    s, y = lists(2, 7)
    f = weighted(so.losses.kendall, y, smoothing=so.Entropy(0.5))
    assert torch.autograd.gradcheck(f, s.requires_grad_(), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, s)


def test_a_list_of_100_000_items() -> None:
    s, y = lists(1, 100_000)
    for name in ("ndcg", "average_precision", "reciprocal_rank", "spearman", "auc"):
        x = s.clone().requires_grad_()
        value = LOSSES[name](x, y)
        (gradient,) = torch.autograd.grad(value, x)
        hard = 1 - METRICS[name](s, y)
        torch.testing.assert_close(value, hard, rtol=0, atol=1e-2 if name != "reciprocal_rank" else 1)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def peak_of_pairs(n: int) -> float:
    """MB by which all pairs of a list of n raise the peak of a fresh process, forward and backward."""
    code = (
        "import re, torch, smoothops as so; from pathlib import Path; torch.set_num_threads(1)\n"
        "held = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "f = lambda n: so.losses.rank_net(torch.randn(n, requires_grad=True), torch.arange(n) % 3).backward()\n"
        f"f(1000); before = held(); f({n}); print(held() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pairs_take_memory_that_does_not_grow_with_their_number() -> None:
    assert peak_of_pairs(6000) < 150  # one tensor of all pairs would be 288 MB


# --- modules ----------------------------------------------------------------------------------------------------------


def test_module(loss: Metric) -> None:
    s, y = lists(3, 6)
    where = torch.arange(6) < 5
    module = so.losses.RankingLoss(loss, reduction="sum")
    torch.testing.assert_close(module(s, y, where), loss(s, y, where=where, reduction="sum"), rtol=0, atol=0)
    weights = torch.linspace(1, 2, 6).double()
    assert torch.equal(module(s, y, weights=weights), loss(s, y, weights=weights, reduction="sum"))


def test_module_options_and_copies() -> None:
    module = so.losses.RankingLoss(so.losses.ndcg, k=3, smoothing=so.Quadratic(0.5))
    assert repr(module) == "RankingLoss(ndcg, k=3, smoothing=Quadratic(eps=0.5))"
    s, y = lists(3, 6)
    assert torch.equal(module(s, y), so.losses.ndcg(s, y, k=3, smoothing=0.5))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(s, y), module(s, y))
    with pytest.raises(TypeError, match="ndcg has no option kk, where; it has discount, gain, k, reduction, smoothing"):
        so.losses.RankingLoss(so.losses.ndcg, kk=3, where=None)
    with pytest.raises(TypeError, match="loss must be a function"):
        so.losses.RankingLoss("ndcg")


def test_every_metric_has_its_loss() -> None:
    helpers = {"linear_gain", "exponential_gain", "log2_discount"}
    names = set(so.metrics.__all__) - helpers
    assert names <= set(so.losses.__all__)
    assert {key.split(",")[0] for key in METRICS} == names
    assert {key.split(",")[0] for key in LOSSES} | set(CLASSIC) | {"RankingLoss"} == set(so.losses.__all__)
    assert set(METRICS) >= UNBOUNDED
