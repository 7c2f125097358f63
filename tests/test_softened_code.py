"""Code that cannot be changed, softened: metrics, a module with hard decisions, functions of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smoothops as so

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


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
    grid = x.view(1, 1, -1)
    untouched: dict[str, Callable[[], Tensor]] = {
        "smooth_l1": lambda: F.smooth_l1_loss(x, y),
        "dropout": lambda: F.dropout(x, 0.0),
        "linear": lambda: F.linear(x, torch.stack([y])),
        "relu": lambda: F.relu(x),
        "interpolate": lambda: F.interpolate(grid, scale_factor=2.0),
        "gelu": lambda: F.gelu(x),
        "norm": lambda: torch.norm(x),
        "softmax": lambda: F.softmax(x, 0),
        "split": lambda: torch.split(x, 5)[1],
        "unique": lambda: torch.unique(x),
        "max_pool1d": lambda: F.max_pool1d(grid, 2),
        "cdist": lambda: torch.cdist(x[:, None], y[:, None]),
        "layer_norm": lambda: F.layer_norm(x, (12,)),
        "cross_entropy": lambda: F.cross_entropy(x, torch.tensor(3)),
        "einsum": lambda: torch.einsum("i,j->ij", x, y),
        "pad": lambda: F.pad(x, (1, 1)),
    }
    for name, f in untouched.items():
        expected_ = f()
        with so.softened(EPS):
            assert torch.equal(f(), expected_), name
    with so.softened(EPS):
        written = [
            F.threshold(x, 0.2, -1.0), F.hardshrink(x), F.hardtanh(x), F.relu6(x), nn.ReLU6()(x),
            F.hinge_embedding_loss(x, labels), F.margin_ranking_loss(x, y, labels, margin=0.5, reduction="none"),
            nn.Threshold(0.2, -1.0, inplace=True)(x.clone()), torch.threshold(x, 0.2, -1.0),
            F.threshold(x.clone(), 0.2, -1.0, True), F.margin_ranking_loss(x, y, labels, reduction="sum"),
        ]  # fmt: skip
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


def test_compact_smoothing_is_exact_away_from_the_boundary() -> None:
    attention, mask = random(2, 4), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    def masked(x: Tensor) -> Tensor:
        if (mask == 0).all():
            return x
        return x.masked_fill(mask == 0, -torch.inf).softmax(-1)[:, mask.bool()]

    expected = masked(attention)
    with so.softened(so.Quadratic(0.3)):
        torch.testing.assert_close(masked(attention), expected)
    with so.softened(0.3), pytest.raises(ValueError, match="soft boolean"):
        masked(attention)


def test_attention_with_a_hard_mask_runs() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8, generator=G)
    mask = torch.arange(5) > 3  # of integers: hard
    expected = attention(x, x, x, key_padding_mask=mask.expand(2, 5))[0]
    with so.softened(EPS):
        mask = torch.arange(5) > 3
        assert mask.dtype == torch.bool
        found = attention(x, x, x, key_padding_mask=mask.expand(2, 5))[0]
    torch.testing.assert_close(found, expected)
