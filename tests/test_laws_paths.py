"""The compiled kernels give the numbers of the reference path in plain torch, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, normal
from registry import Case, cases
from torch import Tensor

from smoothops import kernels

pytest.importorskip("smoothops.kernels.cpu", reason="numba cannot be imported")


def both(case: Case, x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = case(x) if eps is None else case(x, eps)
    return y.detach(), torch.autograd.grad((y * cotangent(y)).sum(), x)[0]


@pytest.mark.parametrize("case", cases("paths"))
def test_compiled_path_is_the_reference_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ties = torch.tensor([[0.5, -1.0, 0.5, 2.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
    inputs = [(normal(3, 40, seed=4), None), (1e5 + normal(2, 200, seed=5), None), (ties, 0.3)]
    if not case.excused("strength"):
        inputs += [(normal(3, 40, seed=6), eps) for eps in (1e-3, 30.0)]
    fast = [both(case, x, eps) for x, eps in inputs]
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    # eps of the default is found by either path to about 1e-8; a strength of 1e-3 multiplies rounding by 1e3
    tolerance = 1e-6 if case.family == "default" else 1e-9
    for (x, eps), found in zip(inputs, fast, strict=True):
        for got, want, name in zip(found, both(case, x, eps), ("value", "gradient"), strict=True):
            error = (got - want).abs().max() / want.abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name} at eps {eps}: relative error {error.item():.1e}"
