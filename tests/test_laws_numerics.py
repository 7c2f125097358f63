"""Law 6: float32 is the float64 answer rounded once; half precision, integers and bools follow torch's promotion."""

from __future__ import annotations

import pytest
import torch
from oracles import cotangent, normal
from registry import CASES, Case, cases
from torch import Tensor

import smoothops as so

STRENGTHS = [1e-3, 0.05, 1.0, 50.0]


def both(f, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = f(x)
    (gradient,) = torch.autograd.grad((y * cotangent(y).to(y.dtype)).sum(), x)
    return y.detach().double(), gradient.double()


def agree(case: Case, x: Tensor, eps: float, dtype: torch.dtype, tolerance: float) -> None:
    """The answer in ``dtype`` against that of the same numbers in float64."""
    narrow = both(lambda x: case(x, eps), x.to(dtype))
    wide = both(lambda x: case(x, eps), x.to(dtype).double())
    for got, want, name in zip(narrow, wide, ("value", "gradient"), strict=True):
        # below 1e-15: two items at 0 or 1 to the last digit, whose threshold may lie anywhere between them
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-15)
        assert error <= tolerance, f"{name} at eps {eps}: relative error {error.item():.1e}"


@pytest.mark.parametrize("case", cases("precision"))
@pytest.mark.parametrize("eps", STRENGTHS)
def test_float32_is_float64_rounded(case: Case, eps: float) -> None:
    if case.excused("strength") and eps != 1.0:
        return
    agree(case, normal(3, 500, seed=1), eps, torch.float32, 1e-5)
    agree(case, 1e4 + normal(2, 300, seed=2), eps, torch.float32, 1e-5)


BIG = [
    "argmax-quadratic",
    "argmax-entropy",
    "amax-entropy",
    "topk_mask-quadratic",
    "topk_mask-binary",
    "rank-quadratic",
]
BIG += ["rank-entropy", "sort-quadratic", "sort-entropy", "isotonic-one", "Hypercube.argmax-entropy"]
LARGE = [c for c in CASES if c.name in BIG]


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in LARGE])
def test_float32_of_long_rows(case: Case, n: int) -> None:
    x = normal(n, seed=3)
    for eps in (1e-3, 1.0, 1e4):
        agree(case, x, eps, torch.float32, 1e-5)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in LARGE])
def test_one_outlier(case: Case) -> None:
    """Where one item is far from the rest, nothing cancels."""
    x = normal(5000, seed=4)
    x[17] = 1e6
    agree(case, x, 1.0, torch.float32, 1e-5)
    sums = {"rank": 5000 * 5001 / 2, "argmax": 1.0, "topk_mask": 2.0}
    total = sums.get(case.operator.name)
    if total is not None:
        assert abs(case(x.float()).double().sum() - total) <= 1e-6 * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases("half"))
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """float32 or better inside: the error is one rounding of the answer."""
    x = normal(3, 40, seed=5)
    ulp = torch.finfo(dtype).eps
    y = case(x.to(dtype))
    assert y.dtype == dtype
    agree(case, x, case.operator.eps, dtype, 2 * ulp)


@pytest.mark.parametrize("case", cases("dtype"))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_promote(case: Case, dtype: torch.dtype) -> None:
    x = (normal(3, 6, seed=6) * 3).round().to(dtype)
    y = case(x)
    assert y.dtype == torch.get_default_dtype()
    assert torch.equal(y, case(x.to(torch.get_default_dtype())))


@pytest.mark.parametrize("case", cases("dtype"))
def test_dtypes_in_and_out(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        x = normal(3, 6, seed=7, dtype=dtype).requires_grad_()
        y = case(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert x.grad.dtype == dtype
    with pytest.raises(TypeError, match="complex"):
        case(torch.zeros(2, 5, dtype=torch.complex64))


@pytest.mark.parametrize("case", cases("strength", lambda o: o.base))
def test_a_parameter_of_another_dtype_does_not_change_the_answers(case: Case) -> None:
    x = normal(3, 6, seed=8, dtype=torch.float32)
    eps = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = case(x, eps)
    assert y.dtype == torch.float32
    assert torch.equal(y, case(x, 0.5))
    (gradient,) = torch.autograd.grad((y * cotangent(y).float()).sum(), eps)
    assert gradient.dtype == torch.float64
    assert case(x.double(), eps.detach().float()).dtype == torch.float64


def test_default_dtype_is_respected() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert so.rank(torch.tensor([3, 1, 2])).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_pooling_decisions_are_made_in_float64() -> None:
    """A gap below eps by less than a rounding of float32 is still pooled, alike in both dtypes."""
    x = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float32)
    eps = 0.1  # the float32 gaps scatter around it
    narrow = both(lambda x: so.rank(x, smoothing=eps), x)
    wide = both(lambda x: so.rank(x, smoothing=eps), x.double())
    for got, want in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
