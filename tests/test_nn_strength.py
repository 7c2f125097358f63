"""The strength of a smoothing while a model trains: LearnableEps and Anneal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import smoothops as so


def test_learnable_eps_is_found() -> None:
    """The temperature of a softmax is recovered from its answers."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    target = torch.softmax(x / 0.37, -1)
    eps = so.nn.LearnableEps(so.Entropy(2.0))
    model = so.nn.Soften(so.argmax, eps, dim=-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    assert abs(eps.eps.item() - 0.37) < 1e-3


def test_learnable_eps_keeps_its_bound() -> None:
    eps = so.nn.LearnableEps(0.5, lowest=0.2)
    torch.testing.assert_close(eps.eps, torch.tensor(0.5))
    eps.log_eps.data.fill_(-100.0)
    torch.testing.assert_close(eps(), torch.tensor(0.2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: so.nn.LearnableEps(0.0), ValueError, "above lowest"),
        (lambda: so.nn.LearnableEps(0.1, lowest=0.1), ValueError, "above lowest"),
        (lambda: so.nn.LearnableEps(0.1, lowest=-1.0), ValueError, "lowest must be"),
        (lambda: so.nn.LearnableEps(so.Hard()), TypeError, "needs a number eps"),
        (lambda: so.nn.LearnableEps(so.Quadratic(so.Mixing(3.0))), TypeError, "needs a number eps"),
        (lambda: so.nn.Anneal(1.0, 0.0, 10), ValueError, "cannot pass 0"),
        (lambda: so.nn.Anneal(1.0, 0.1, 0), ValueError, "steps must be"),
        (lambda: so.nn.Anneal(1.0, 0.1, 2.5), ValueError, "steps must be"),
        (lambda: so.nn.Anneal(1.0, -0.1, 3, "linear"), ValueError, "end must be"),
        (lambda: so.nn.Anneal(1.0, 0.1, 3, "square"), ValueError, "'cosine' or a function"),
        (lambda: so.nn.Anneal(so.Entropy(torch.tensor(1.0)), 0.1, 3), TypeError, "number as start"),
        (lambda: so.nn.Anneal(1.0, so.Entropy(0.1), 3), TypeError, "number as end"),
        (lambda: so.nn.Anneal(so.Hard(), 0.1, 3), TypeError, "needs a number eps"),
        (lambda: so.nn.Anneal(1.0, 0.1, 3).load_state_dict({"step": 1}), ValueError, "last_step"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


SHAPES: dict[str, Callable[[float], float]] = {
    "geometric": lambda t: 2.0 * (0.05 / 2.0) ** t,
    "linear": lambda t: 2.0 + t * (0.05 - 2.0),
    "cosine": lambda t: 0.05 + (2.0 - 0.05) * (1 + math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_from_start_to_end(shape: str) -> None:
    schedule = so.nn.Anneal(2.0, 0.05, 10, shape)
    seen = []
    for _ in range(14):
        seen.append(schedule.eps)
        assert schedule() == schedule.eps
        schedule.step()
    assert seen[:10] == pytest.approx([SHAPES[shape](i / 10) for i in range(10)])
    assert seen[0] == 2.0
    assert seen[10:] == [0.05] * 4


def test_a_shape_of_ones_own_and_the_hard_end() -> None:
    schedule = so.nn.Anneal(so.Quadratic(1.0), 0.0, 2, lambda t: (1 - t) ** 2)
    x = torch.tensor([0.3, 0.1, 0.2])
    model = so.nn.Soften(so.rank, schedule)
    schedule.step()
    assert torch.equal(model(x), so.rank(x, smoothing=so.Quadratic(0.25)))
    schedule.step()
    assert torch.equal(model(x), so.rank(x, smoothing=so.Hard()))
    with pytest.raises(ValueError, match="leads to eps"):
        so.nn.Anneal(1.0, 0.5, 2, lambda t: -5.0).step()


def test_resumed_as_a_scheduler_of_torch_is() -> None:
    """Beside a learning-rate scheduler, saved and loaded in the middle."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any, so.nn.Anneal]:
        torch.manual_seed(0)
        schedule = so.nn.Anneal(so.Entropy(1.0), 0.05, 8)
        model = nn.Sequential(nn.Linear(4, 6), so.nn.Soften(so.rank, schedule))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8), schedule

    def train(steps: int, model: nn.Module, optimizer: Any, *schedulers: Any) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            losses.append(loss.item())
        return losses

    x, target = torch.randn(20, 4), torch.randn(20, 6).argsort().argsort() + 1.0
    whole = make()
    want = train(8, *whole)
    first = make()
    train(4, *first)
    second = make()
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    assert train(4, *second) == want[4:]


def test_steps_do_not_compile_anew() -> None:
    schedule = so.nn.Anneal(so.Entropy(1.0), 0.0, 20, "linear")
    model, x = so.nn.Soften(so.argmax, schedule, dim=-1), torch.randn(3, 5)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    frames = []
    for _ in range(21):
        torch.testing.assert_close(compiled(x), model(x))
        frames.append(count.frame_count)
        schedule.step()
    assert frames[:20] == [frames[0]] * 20
    assert frames[20] > frames[0]  # the hard operator is another one


def test_repr() -> None:
    assert repr(so.nn.Anneal(so.Entropy(1.0), 0.1, 10)) == (
        "Anneal(Entropy(eps=1.0), 0.1, steps=10, shape='geometric') at eps=1"
    )
    assert repr(so.nn.LearnableEps(torch.ones(3, 1))) == "LearnableEps(eps=of shape (3, 1))"
