"""The softened context as a context: who is softened, who is not, and that it leaves no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import implicit
import smoothops as so
from smoothops._soft_values import CONTEXTS

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Any) -> Tensor:
    return x.as_subclass(Tensor)


def soft_sign(x: Tensor, eps: float = EPS) -> Tensor:
    return so.sign(x, smoothing=eps)


@pytest.fixture(autouse=True)
def no_trace() -> Any:
    yield
    assert _get_current_function_mode_stack() == []
    assert CONTEXTS.entered == []
    x = random(3)
    assert torch.equal(x.sign(), torch.where(x > 0, 1.0, -1.0).double())
    assert (x > 0).dtype == torch.bool


# --- code that cannot be changed -------------------------------------------------------------------------------------


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).double().mean()


def test_accuracy_is_differentiable() -> None:
    logits, labels = random(8, 5).requires_grad_(), torch.randint(5, (8,), generator=G)
    with so.softened(EPS):
        found = accuracy(logits, labels)
    expected = so.argmax(logits, -1, smoothing=EPS).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v, logits) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with so.softened(so.StraightThrough(EPS)):
        through = accuracy(logits, labels)
    assert through.item() == accuracy(logits, labels).item()
    torch.testing.assert_close(torch.autograd.grad(through, logits)[0], a)


def f1(logits: Tensor, labels: Tensor) -> Tensor:
    predicted = torch.sigmoid(logits) > 0.5
    hits = (predicted & labels).sum()
    return 2 * hits / (predicted.sum() + labels.sum())


def test_metrics_and_their_derivatives() -> None:
    logits, labels = random(8), torch.rand(8, generator=G) > 0.5

    def soft(x: Tensor) -> Tensor:
        with so.softened(EPS):
            return f1(x, labels)

    p = so.gt(torch.sigmoid(logits), 0.5, smoothing=EPS)
    torch.testing.assert_close(soft(logits), 2 * p[labels].sum() / (p.sum() + labels.sum()))
    check(soft, logits)

    def knn(x: Tensor) -> Tensor:
        with so.softened(EPS, order=so.Laplace(EPS)):
            near = (x[:, None] - x[None, :]).square().topk(3, largest=False).indices
            votes = labels[near].sum(-1) >= 2
            return (votes == labels).double().mean() + x[near[:, 0]].square().sum()

    check(knn, logits)

    def top2(x: Tensor) -> Tensor:
        with so.softened(EPS, order=so.Laplace(EPS)):
            return (x.topk(2).indices == torch.tensor([[0], [3]])).any(-1).double().mean()

    check(top2, random(2, 4))


def check(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)
    x = x.detach()
    v = torch.randn_like(x)
    gradient = torch.func.grad(f)(x)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], (gradient * v).sum())
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([x, v])), torch.stack([f(x), f(v)]))
    torch.testing.assert_close(torch.func.jacrev(f)(x), gradient)
    hessian = torch.func.hessian(f)(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian @ v.flatten(), torch.func.jvp(torch.func.grad(f), (x,), (v,))[1].flatten())


class Gate(nn.Module):
    """Hard decisions in a module: a gate, a quantizer, a router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 2, generator=G))
        self.act = nn.Sequential(nn.Threshold(0.1, 0.0), nn.Hardtanh())

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        route = scores.max(dim=-1)[1]
        x = torch.round(4 * self.act(x)) / 4
        out = torch.einsum("bi,bio->bo", x, self.experts[route])
        out[scores.amax(-1) < 0] = 0.0
        return out


def test_a_module_with_hard_decisions() -> None:
    model, x = Gate().double(), random(16, 4)
    hard = model(x)
    grads = torch.autograd.grad(hard.square().sum(), model.gate.weight, allow_unused=True)
    assert grads[0] is None  # torch stops there
    with so.softened(EPS):
        soft = model(x)
    w = so.argmax(model.gate(x), -1, smoothing=EPS)
    a = so.where(so.gt(x, 0.1, smoothing=EPS), x, 0.0)
    a = so.round(4 * so.clamp(a, -1.0, 1.0, smoothing=EPS), smoothing=EPS) / 4
    expected = torch.einsum("bi,bk,kio->bo", a, w, model.experts)
    closed = so.lt(so.amax(model.gate(x), -1, smoothing=EPS), 0, smoothing=EPS)
    expected = so.where(closed[:, None], 0.0, expected)
    torch.testing.assert_close(soft, expected)
    grads = [torch.autograd.grad(v.square().sum(), list(model.parameters())) for v in (soft, expected)]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e)
    with so.softened(1e-9):
        torch.testing.assert_close(model(x), hard)
    decorated = so.softened(EPS)(model.forward)
    torch.testing.assert_close(decorated(x), soft)


def test_functional() -> None:
    x, y = random(12), random(12)
    labels = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    plain = {
        "smooth_l1": F.smooth_l1_loss(x, y), "dropout": F.dropout(x, 0.0), "linear": F.linear(x, torch.stack([y])),
        "relu": F.relu(x), "interpolate": F.interpolate(x.view(1, 1, -1), scale_factor=2.0), "gelu": F.gelu(x),
        "norm": torch.norm(x), "softmax": F.softmax(x, 0), "split": torch.split(x, 5)[1],
        "unique": torch.unique(x), "pool": F.max_pool1d(x.view(1, 1, -1), 2), "cdist": torch.cdist(x[:, None], y[:, None]),
    }  # fmt: skip
    with so.softened(EPS):
        inside = {
            "smooth_l1": F.smooth_l1_loss(x, y), "dropout": F.dropout(x, 0.0), "linear": F.linear(x, torch.stack([y])),
            "relu": F.relu(x), "interpolate": F.interpolate(x.view(1, 1, -1), scale_factor=2.0), "gelu": F.gelu(x),
            "norm": torch.norm(x), "softmax": F.softmax(x, 0), "split": torch.split(x, 5)[1],
            "unique": torch.unique(x), "pool": F.max_pool1d(x.view(1, 1, -1), 2), "cdist": torch.cdist(x[:, None], y[:, None]),
        }  # fmt: skip
        written = [
            F.threshold(x, 0.2, -1.0), F.hardshrink(x), F.hardtanh(x), F.relu6(x), nn.ReLU6()(x),
            F.hinge_embedding_loss(x, labels), F.margin_ranking_loss(x, y, labels, margin=0.5, reduction="none"),
            nn.Threshold(0.2, -1.0, inplace=True)(x.clone()), torch.threshold(x, 0.2, -1.0),
            F.threshold(x.clone(), 0.2, -1.0, True), F.margin_ranking_loss(x, y, labels, reduction="sum"),
        ]  # fmt: skip
    for name in plain:
        assert torch.equal(plain[name], inside[name]), name
    step, clip = so.where(so.gt(x, 0.2, smoothing=EPS), x, -1.0), lambda v: so.clamp(v, 0, smoothing=EPS)
    outside = so.logical_or(so.gt(x, 0.5, smoothing=EPS), so.lt(x, -0.5, smoothing=EPS))
    expected = [
        step, so.where(outside, x, 0.0), so.clamp(x, -1, 1, smoothing=EPS), so.clamp(x, 0, 6, smoothing=EPS),
        so.clamp(x, 0, 6, smoothing=EPS), torch.where(labels == 1, x, clip(1 - x)).mean(),
        clip(-labels * (x - y) + 0.5), step, step, step, clip(-labels * (x - y)).sum(),
    ]  # fmt: skip
    for i, (a, b) in enumerate(zip(written, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=str(i))
    for eps, tolerance in ((0.0, 1e-15), (1e-9, 1e-7)):
        with so.softened(eps):
            for f, args in (
                (F.threshold, (x, 0.2, -1.0)), (F.hardshrink, (x,)), (F.relu6, (x,)), (F.hardtanh, (x,)),
                (F.hinge_embedding_loss, (x, labels)), (F.margin_ranking_loss, (x, y, labels)),
            ):  # fmt: skip
                soft = f(*args)  # type: ignore[operator]
                with so.softened(so.Hard()):
                    hard = f(*args)  # type: ignore[operator]
                torch.testing.assert_close(soft, hard, rtol=0, atol=tolerance)


def test_attention_with_a_hard_mask_runs() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8, generator=G)
    mask = torch.arange(5) > 3  # of integers: hard
    expected = attention(x, x, x, key_padding_mask=mask.expand(2, 5))[0]
    with so.softened(EPS):
        mask = torch.arange(5) > 3
        assert mask.dtype == torch.bool
        found = attention(x, x, x, key_padding_mask=mask.expand(2, 5))[0]
    torch.testing.assert_close(found, expected)


# --- who is not softened ---------------------------------------------------------------------------------------------


def test_integers_and_nan_tests_are_exact() -> None:
    i, x = torch.arange(5), torch.tensor([1.0, torch.nan])
    with so.softened(EPS):
        for exact in (i > 2, i == 3, i > 2.5, i.bool(), x != x, x.isnan(), torch.isfinite(x)):
            assert type(exact) is Tensor
            assert exact.dtype == torch.bool
        assert (x != x).tolist() == [False, True]
        assert type(i.argmax()) is Tensor
        assert i.clamp(1, 3).tolist() == [1, 1, 2, 3, 3]
        assert torch.tensor(1j).sgn() == 1j
        assert torch.where(i > 2, 1, 0).dtype == torch.long


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": so.rank, "sort": so.sort, "topk": lambda x: so.topk(x, 3), "topk_mask": lambda x: so.topk_mask(x, 2),
    "argsort": so.argsort, "quantile": lambda x: so.quantile(x, 0.4), "argmax": so.argmax, "amax": so.amax,
    "sparsemax": so.sparsemax, "entmax": so.entmax, "rank, entropy": lambda x: so.rank(x, smoothing=so.Entropy(0.3)),
    "perturbed": lambda x: so.argmax(x, smoothing=so.Perturbed(0.3, so.Gumbel(), 20, generator=torch.Generator().manual_seed(0))),
    "network": lambda x: so.sort(x, smoothing=so.SortingNetwork(0.3)), "laplace": lambda x: so.rank(x, smoothing=so.Laplace(0.3)),
    "hard": lambda x: so.rank(x, smoothing=so.Hard()), "where": lambda x: so.where(so.gt(x, 0), x, -x), "round": so.round,
    "all": lambda x: so.all(so.gt(x, 0)), "clamp": lambda x: so.clamp(x, -1, 1), "bucketize": lambda x: so.bucketize(x, [0.0, 1.0]),
    "isotonic": so.isotonic, "max": lambda x: so.max(x, 0).values, "loss": lambda x: so.losses.ndcg(x, torch.arange(7.0)),
    "metric": lambda x: so.metrics.spearman(x, torch.arange(7.0)),
    "root": lambda x: implicit.root(lambda z, a: z**3 + z - a, torch.zeros_like(x), x),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_own_operators_are_the_same_inside(name: str) -> None:
    operator, x = OPERATORS[name], random(7).requires_grad_()

    def run() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        y = operator(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y, g, torch.autograd.grad(g.square().sum() + x.sum(), x)[0]

    outside = run()
    with so.softened(EPS, also=("abs", "relu")):
        inside = run()
        with so.softened(1.0, also=("abs", "relu")):
            nested = run()
    for a, b, c in zip(outside, inside, nested, strict=True):
        assert type(b) is Tensor
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.sign(ctx.saved_tensors[0])


def test_a_backward_pass_is_not_replaced() -> None:
    x = random(5).requires_grad_()
    with so.softened(EPS):
        y = Rectified.apply(x)
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        with so.softened(1.0):
            y.sum().backward()
    torch.testing.assert_close(y, x * soft_sign(x))  # the forward pass is ordinary code
    assert torch.equal(g, x.sign())
    assert x.grad is not None
    assert torch.equal(x.grad, g)


def test_optimizers_and_printing_are_not_softened() -> None:
    def train() -> tuple[Tensor, str]:
        w = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=0.1, amsgrad=True)
        for _ in range(3):
            optimizer.zero_grad()
            w.square().sum().backward()
            nn.utils.clip_grad_norm_([w], 1.0)
            optimizer.step()
        return w.detach(), repr(w)

    expected = train()
    with so.softened(EPS):
        found = train()
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.distributions.Normal(found[0], found[0].exp()).log_prob(found[0])
    assert found[1] == expected[1]


# --- entering and leaving --------------------------------------------------------------------------------------------


def test_nesting() -> None:
    x = random(4)
    outer = so.softened(EPS)
    with outer:
        assert torch.equal(torch.sign(x), soft_sign(x))
        with so.softened(1.0, keep="floor"):
            assert torch.equal(torch.sign(x), soft_sign(x, 1.0))
            assert torch.equal(torch.floor(x), torch.floor(x.clone()))
            with outer:  # re-entered
                assert torch.equal(torch.sign(x), soft_sign(x))
            with so.softened(so.Hard()):
                assert (x > 0).dtype == torch.bool
                assert set(torch.sign(x).tolist()) <= {1.0, -1.0}
            assert torch.equal(torch.sign(x), soft_sign(x, 1.0))
        assert torch.equal(torch.sign(x), soft_sign(x))
    with so.softened(EPS), so.softened(1.0, keep="sign"):
        assert set(torch.sign(x).tolist()) <= {1.0, -1.0}  # kept by the inner one, whatever the outer one says


def test_exceptions_leave_no_trace() -> None:
    for bad in (lambda x: 1 / 0, lambda x: bool(x[0] > 0), lambda x: x.sort(dim=7), lambda x: F.threshold(x, None, 0)):
        with pytest.raises((ZeroDivisionError, ValueError, IndexError, TypeError)), so.softened(EPS):
            bad(random(3))  # type: ignore[no-untyped-call]
        assert CONTEXTS.entered == []


def test_decorator_and_recursion() -> None:
    @so.softened(EPS)
    def collapse(x: Tensor, n: int) -> Tensor:
        return torch.sign(x) if n == 0 else collapse(x, n - 1)

    x = random(3)
    assert torch.equal(collapse(x, 3), soft_sign(x))


def test_threads() -> None:
    x, barrier = random(50), threading.Barrier(4)
    found: dict[float, list[Tensor]] = {}

    def run(eps: float) -> None:
        found[eps] = []
        for _ in range(20):
            barrier.wait()
            if eps == 0:
                found[eps].append(torch.sign(x))
                continue
            with so.softened(eps):
                found[eps].append(torch.sign(x))

    threads = [threading.Thread(target=run, args=(eps,)) for eps in (0.0, 0.1, 0.5, 2.0)]
    with so.softened(7.0):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for eps, values in found.items():
        assert len(values) == 20
        assert all(torch.equal(v, soft_sign(x, eps) if eps else torch.sign(x)) for v in values)


def test_with_another_mode() -> None:
    x = random(3)
    with torch.device("cpu"), so.softened(EPS), torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.equal(torch.sign(x), soft_sign(x))


def test_no_grad_and_inference_mode_give_the_same_values() -> None:
    x = random(4).requires_grad_()
    with so.softened(EPS):
        values = [x.sign(), numbers(x > 0), x.sort().values]
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                again = [x.sign(), numbers(x > 0), x.sort().values]
            for a, b in zip(values, again, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_follow_torch(dtype: torch.dtype) -> None:
    x = random(6).to(dtype)
    with so.softened(EPS):
        assert x.sign().dtype == x.sort().values.dtype == (x > 0).dtype == x.clamp(0, 1).dtype == dtype
        assert torch.where(x > 0, x, 0.0).dtype == dtype
        assert (x > 0).float().dtype == torch.float32


# --- compile ---------------------------------------------------------------------------------------------------------


def test_inside_compile_it_raises() -> None:
    def f(x: Tensor) -> Tensor:
        with so.softened(EPS):
            return torch.sign(x)

    x = random(3)
    with pytest.raises(Exception, match=r"so\.softened cannot be used inside torch\.compile"):
        torch.compile(f, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="eager")(x), soft_sign(x))  # torch runs this frame uncompiled
    torch._dynamo.reset()


def test_around_compiled_code() -> None:
    x = random(3)
    compiled = torch.compile(lambda x: torch.sign(x) + 1, backend="eager")
    compiled(x)
    with so.softened(EPS):
        torch.testing.assert_close(compiled(x), soft_sign(x) + 1)
        strict = torch.compile(lambda x: torch.sign(x) + 2, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"so\.softened cannot be used inside torch\.compile"):
            strict(x)
    torch.testing.assert_close(compiled(x), torch.sign(x) + 1)
    torch._dynamo.reset()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="keep takes names among gt"):
        so.softened(keep="greater")
    with pytest.raises(ValueError, match="also takes names among abs, relu"):
        so.softened(also=("sign",))
    with pytest.raises(TypeError, match="logic must be"):
        so.softened(logic="product")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="smoothing must be a Smoothing"):
        so.softened("soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps"):
        so.softened(-1.0)
    with so.softened(EPS), pytest.raises(TypeError, match=r"sign\(out=\.\.\.\) has no soft form"):
        torch.sign(torch.ones(3), out=torch.ones(3))
    with so.softened(so.Laplace(1.0)), pytest.raises(ValueError, match="Laplace"):
        torch.ones(3).argmax()


def test_the_context_itself_can_be_copied() -> None:
    context = copy.deepcopy(so.softened(EPS, keep="sign"))
    x = random(3)
    with context:
        assert set(torch.sign(x).tolist()) <= {1.0, -1.0}
        assert torch.equal(torch.floor(x), so.floor(x, smoothing=EPS))
