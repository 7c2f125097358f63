"""What the tests of soften share."""

from __future__ import annotations

import torch
from torch import Tensor

import smoothops as so

EPS = 0.5


def real(v: float) -> Tensor:
    return torch.tensor(v, dtype=torch.float64)


def step(u) -> Tensor:
    return so.heaviside(torch.as_tensor(u, dtype=torch.float64), smoothing=EPS)


def equal(found, wanted) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(wanted, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-14,
    )


soft = so.soften(smoothing=EPS)
