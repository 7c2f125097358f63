"""The Entropy argmax of long rows, which a compiled kernel answers, against torch's softmax."""

from __future__ import annotations

import pytest
import torch

import smoothops as so

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [127, 128, 1000, 5000])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 7.0])
def test_value_and_gradient(dtype: torch.dtype, n: int, eps: float) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype).requires_grad_()
    g = torch.randn(3, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = so.argmax(x, -1, smoothing=so.Entropy(eps))
    (got,) = torch.autograd.grad(y, x, g)
    wide = x.detach().double().requires_grad_()
    weights = ((wide - wide.detach().amax(-1, keepdim=True)) / eps).exp()
    want = weights / weights.sum(-1, keepdim=True)  # torch.softmax is ten times less exact in float64
    (slope,) = torch.autograd.grad(want, wide, g.double())
    ulp = torch.finfo(dtype).eps
    assert (y.double() - want).abs().max() <= 2 * ulp
    assert (got.double() - slope).abs().max() <= 2 * ulp * slope.abs().max() + 1e-13 / eps


def test_rows_that_hold_nan_or_infinities() -> None:
    """Each by its own rule, and without a trace in the others."""
    x = torch.randn(7, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = so.argmax(x[-1:], -1, smoothing=0.5)
    x[0, 5] = NAN
    x[1] = -INF
    x[2, [3, 9]] = INF
    x[3, ::2] = -INF
    x[4, 7], x[4, 8] = NAN, -INF
    x[5] = -INF
    x[5, 4] = NAN
    x.requires_grad_()
    y = so.argmax(x, -1, smoothing=0.5)
    assert y[[0, 4, 5]].isnan().all()
    assert (y[1] == 0).all()
    assert y[2].nonzero().squeeze(-1).tolist() == [3, 9]
    torch.testing.assert_close(y[2, [3, 9]], torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(y[3], torch.softmax(x[3] / 0.5, -1))
    assert torch.equal(y[-1:], clean)
    weights = torch.randn(7, 300, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * weights).nan_to_num(0.0).sum(), x)
    assert gradient[[1, 2]].abs().max() == 0
    assert gradient[[3, 6]].isfinite().all()
    assert (gradient[3, ::2] == 0).all()


def test_with_a_mask_and_along_another_dim() -> None:
    x, where = torch.randn(200, 4, dtype=torch.float64), torch.rand(200, 4) < 0.5
    y = so.argmax(x, 0, where=where, smoothing=0.3)
    want = torch.softmax(x.masked_fill(~where, -INF) / 0.3, 0)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-15)
