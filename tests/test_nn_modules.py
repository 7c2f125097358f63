"""Modules: what they hold is registered, saved, moved and trained; what they compute is the operator's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import smoothops as so

MODULES: dict[str, Callable[[], nn.Module]] = {
    "number": lambda: so.nn.Soften(so.rank, 0.5),
    "default": lambda: so.nn.Soften(so.argmax, dim=-1, keepdim=True),
    "smoothing": lambda: so.nn.Soften(so.argmax, so.Tsallis(1.5, 1.0), dim=-1),
    "tensor": lambda: so.nn.Soften(so.argmax, so.Tsallis(torch.tensor(1.4), torch.tensor(0.7)), dim=-1),
    "parameter": lambda: so.nn.Soften(so.argmax, so.Tsallis(nn.Parameter(torch.tensor(1.4)), 1.0), dim=-1),
    "nested": lambda: so.nn.Soften(so.argmax, so.StraightThrough(so.Entropy(nn.Parameter(torch.tensor(0.7)))), dim=-1),
    "learnable": lambda: so.nn.Soften(so.rank, so.nn.LearnableEps(so.Entropy(0.5), lowest=0.1)),
    "learnable number": lambda: so.nn.Soften(so.rank, so.nn.LearnableEps(0.5)),
    "learnable alpha": lambda: so.nn.Soften(
        so.argmax, so.nn.LearnableEps(so.Tsallis(nn.Parameter(torch.tensor(1.4)), 1.0)), dim=-1
    ),
    "annealed": lambda: so.nn.Soften(so.rank, so.nn.Anneal(so.Quadratic(1.0), 0.1, 5)),
    "fixed tensor": lambda: so.nn.Soften(so.bucketize, 0.3, edges=torch.tensor([-0.5, 0.5])),
    "fixed parameter": lambda: so.nn.Soften(so.bucketize, 0.3, edges=nn.Parameter(torch.tensor([-0.5, 0.5]))),
    "polytope": lambda: so.nn.Soften(so.CappedSimplex(2).argmax, so.Quadratic(0.5)),
    "gate": lambda: so.nn.TopKGate(6, 5, 2),
    "gate learnable": lambda: so.nn.TopKGate(6, 5, 2, smoothing=so.nn.LearnableEps(0.3)),
    "attention": lambda: Attend(so.nn.SparseAttention(6, 2, batch_first=True)),
    "attention learnable": lambda: Attend(
        so.nn.SparseAttention(6, 2, batch_first=True, smoothing=so.nn.LearnableEps(torch.ones(1, 2, 1, 1)))
    ),
}


class Attend(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", MODULES)
def test_saved_and_loaded(name: str) -> None:
    first, x = MODULES[name](), inputs()
    for p in first.parameters():
        p.data += 0.05 * torch.rand_like(p)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    for assign in (False, True):
        second = MODULES[name]()
        second.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
        file.seek(0)
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", MODULES)
def test_copied_moved_cast(name: str) -> None:
    first, x = MODULES[name](), inputs()
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    want = first(x)
    assert not hasattr(want, "dtype") or want.dtype == torch.float32
    wide = first.double()
    assert all(t.dtype == torch.float64 for t in (*wide.parameters(), *wide.buffers()))
    torch.testing.assert_close(wide(x.double()).float(), want, atol=1e-5, rtol=1e-5)
    meta = MODULES[name]().to("meta")
    assert meta(x.to("meta")).shape == want.shape


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_has_the_gradient_of_its_value(name: str) -> None:
    """Against finite differences through functional_call, which a smoothing that kept its old tensors would not see."""
    module, x = MODULES[name]().double(), inputs(torch.float64)
    names, values = zip(*module.named_parameters(), strict=True) if [*module.parameters()] else ((), ())
    seed = torch.randn_like(module(x))
    if name == "nested":  # the hard value has no derivative: the gradient is that of its soft part
        module.smoothing.plain["forward"] = so.Entropy(0.7)
    before = {k: v.clone() for k, v in module.state_dict().items()}

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return (functional_call(module, dict(zip(names, values, strict=True)), (x,)) * seed).sum()

    given = [v.detach().clone().requires_grad_() for v in values]
    if name != "nested":
        assert torch.autograd.gradcheck(loss, [x.requires_grad_(), *given])
    elif given:
        (grad,) = torch.autograd.grad(loss(x, *given), given)
        want = torch.autograd.functional.jacobian(
            lambda e: (so.argmax(x, -1, smoothing=so.Entropy(e)) * seed).sum(), given[0].detach()
        )
        torch.testing.assert_close(grad, want)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6), MODULES[name]())
    want = model(inputs())
    with torch.autocast("cpu", dtype=dtype):
        y = model(inputs())
        loss = (y.float() * torch.randn(y.shape)).sum()
    assert y.dtype == (torch.float32 if "fixed" in name else dtype)  # edges in float32 make all of it float32
    torch.testing.assert_close(y.float(), want, atol=0.3 if want.max() > 2 else 0.05, rtol=0.05)
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name: str) -> None:
    module, x = MODULES[name](), inputs().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want = module(x)
    seed = torch.randn_like(want)
    y = compiled(x)
    torch.testing.assert_close(y, want)
    wanted = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad((y * seed).sum(), wanted), torch.autograd.grad((want * seed).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_repr() -> None:
    assert repr(MODULES["smoothing"]()) == "Soften(argmax, smoothing=Tsallis(eps=1.0, alpha=1.5), dim=-1)"
    assert "LearnableEps(Entropy, eps=0.5)" in repr(MODULES["learnable"]())
    assert "k=2, smoothing=1.0" in repr(MODULES["gate"]())
    assert "6, 2, smoothing=Tsallis(eps=1.0, alpha=1.5), batch_first=True" in repr(MODULES["attention"]())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: so.nn.Soften(torch.sort), TypeError, "no parameter smoothing"),
        (lambda: so.nn.Soften(3), TypeError, "takes a function"),
        (lambda: so.nn.Soften(so.rank, 0.1, dimension=1), TypeError, "no parameter 'dimension'"),
        (lambda: so.nn.Soften(so.rank, "hard"), TypeError, "must be a number"),
        (lambda: so.nn.Soften(so.rank, so.Hard), TypeError, "got Hard"),
        (lambda: so.nn.Soften(so.rank, True), TypeError, "got bool"),
        (lambda: so.nn.Soften(so.rank, torch.tensor(0.1)), TypeError, "LearnableEps"),
        (lambda: so.nn.Soften(so.rank, so.Entropy(torch.tensor(0.1, requires_grad=True))), ValueError, "nn.Parameter"),
        (lambda: so.nn.TopKGate(4, 3, 4), ValueError, "between 0 and experts = 3"),
        (lambda: so.nn.TopKGate(4, 3, 2).statistics(torch.rand(2, 4)), ValueError, r"\(\.\.\., 3\)"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 3.5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate_sums_to_k(k: float, dtype: torch.dtype) -> None:
    gate = so.nn.TopKGate(5, 8, k, dtype=dtype, smoothing=so.Quadratic(0.2))
    weights = gate(torch.randn(7, 3, 5, dtype=dtype))
    assert weights.dtype == dtype
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    error = (weights.double().sum(-1) - k).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps


def test_gate_statistics() -> None:
    gate = so.nn.TopKGate(2, 4, 2)
    even = gate.statistics(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    assert torch.equal(even.load, torch.full((4,), 0.5))
    assert (even.active, even.imbalance) == (2, 0)
    uneven = gate.statistics(torch.tensor([[[1.0, 1, 0, 0]], [[1, 0.5, 0.5, 0]]]))
    torch.testing.assert_close(uneven.load, torch.tensor([1.0, 0.75, 0.25, 0]))
    assert uneven.active == 2.5
    torch.testing.assert_close(uneven.imbalance, torch.tensor([1.0, 0.75, 0.25, 0]).var(correction=0) / 0.25)


def test_the_penalty_balances_a_collapsed_gate() -> None:
    """All inputs go to the same two experts at first; the penalty alone spreads them over the eight."""
    torch.manual_seed(0)
    gate = so.nn.TopKGate(16, 8, 2, smoothing=so.Quadratic(1.0))
    with torch.no_grad():
        gate.score.bias[:2] += 3
    x = torch.randn(256, 16)
    assert gate.statistics(gate(x)).imbalance > 1.5
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        gate.statistics(gate(x)).imbalance.backward()
        optimizer.step()
    statistics = gate.statistics(gate(x))
    assert statistics.imbalance < 0.02
    torch.testing.assert_close(statistics.load.sum(), torch.tensor(2.0))
