"""Operators inside modules: export, half types under autocast, inference mode, data-parallel training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smoothops as so

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda x: so.argmax(x, -1),
    "entmax": so.entmax,
    "topk_mask": lambda x: so.topk_mask(x, 2),
    "rank": so.rank,
    "sort": so.sort,
    "rank-laplace": lambda x: so.rank(x, smoothing=so.Laplace(0.1)),
    "argsort": so.argsort,
    "median": lambda x: so.median(x, -1),
    "relu": so.relu,
    "round": so.round,
    "straight-through": lambda x: so.rank(x, smoothing=so.StraightThrough(1.0)),
}


class Layer(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.f = nn.Linear(6, 6), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.linear(x))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6)


@pytest.mark.parametrize("name", OPERATORS)
def test_export(name: str, x: Tensor) -> None:
    layer = Layer(OPERATORS[name])
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_and_inference_mode(name: str, x: Tensor) -> None:
    layer = Layer(OPERATORS[name])
    with torch.inference_mode():
        want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == want.shape
    (y.float() * torch.randn_like(y.float())).sum().backward()
    assert layer.linear.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, on gloo without a network
def test_data_parallel_training(x: Tensor, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for f in OPERATORS.values():
            alone = Layer(f)
            parallel = nn.parallel.DistributedDataParallel(alone)
            y = parallel(x)
            (y * torch.randn_like(y)).sum().backward()
            assert alone.linear.weight.grad.isfinite().all()
    finally:
        torch.distributed.destroy_process_group()
