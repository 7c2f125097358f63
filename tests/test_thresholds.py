"""Thresholds, by every path, against bisection in long double; and where entries differ in size by many digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import smoothops as so
from smoothops import kernels


@pytest.fixture(params=["compiled", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths in turn."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "_compiled", lambda name: None)


Wide = np.ndarray  # of long double
HAS_LONG_DOUBLE = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def tsallis(alpha: float) -> Callable[[Wide], Wide]:
    return lambda z: np.maximum((alpha - 1) * z, 0) ** (1 / np.longdouble(alpha - 1))


def logistic(z: Wide) -> Wide:
    t = np.exp(-np.abs(z))
    return np.where(z < 0, t, 1) / (1 + t)


def laplace(z: Wide) -> Wide:
    t = np.exp(-np.abs(z)) / 2
    return np.where(z < 0, t, 1 - t)


# phi as tabulated in the literature, independent of the library's own
UNBOUNDED = {
    "Quadratic": (so.Quadratic, lambda z: np.maximum(z, 0)),
    "Entropy": (so.Entropy, np.exp),
    "Tsallis 1.5": (lambda e: so.Tsallis(1.5, e), tsallis(1.5)),
    "Tsallis 1.1": (lambda e: so.Tsallis(1.1, e), tsallis(1.1)),
    "Tsallis 4": (lambda e: so.Tsallis(4.0, e), tsallis(4.0)),
}
BOUNDED = {"BinaryEntropy": (so.BinaryEntropy, logistic), "Laplace": (so.Laplace, laplace)}


def by_bisection(x: np.ndarray, eps: float, k: float, phi: Callable[[Wide], Wide], reference: float) -> np.ndarray:
    """phi((x - tau)/eps) with sum k, in long double. ``reference`` is an entry of x near the threshold."""
    u = (x.astype(np.longdouble) - np.longdouble(reference)) / np.longdouble(eps)
    reach = np.longdouble(100) + 2 * np.abs(u).max()
    low, high = -reach, reach
    with np.errstate(over="ignore"):
        for _ in range(400):
            tau = (low + high) / 2
            if phi(u - tau).sum() > np.longdouble(k):
                low = tau
            else:
                high = tau
        return phi(u - (low + high) / 2)


def same(ours: Tensor, expected: Wide, atol: float) -> None:
    np.testing.assert_allclose(ours.numpy(), expected.astype(np.float64), rtol=0, atol=atol)


STRENGTHS = [1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e8]
N = 24


def scores(seed: int) -> Tensor:
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("eps", STRENGTHS)
@pytest.mark.parametrize("k", [1e-6, 0.3, 1, 2.5, N // 2, N - 1, N - 1e-3])
@pytest.mark.parametrize("name", [*UNBOUNDED, *BOUNDED])
def test_capped_threshold_against_bisection(path: None, name: str, k: float, eps: float) -> None:
    make, phi = (UNBOUNDED | BOUNDED)[name]
    x = scores(5)
    ours = so.topk_mask(x, k, smoothing=make(eps))
    order = x.sort(descending=True).values
    bounded = phi if name in BOUNDED else lambda z: np.minimum(phi(z), 1)
    expected = by_bisection(x.numpy(), eps, k, bounded, float(order[min(math.floor(k), N - 1)]))
    same(ours, expected, atol=2e-14 if k > 0.1 else 1e-15)
    assert abs(float(ours.sum()) - k) <= (1e-14 * k if k > 0.1 else 1e-15)


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("eps", STRENGTHS)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_simplex_threshold_against_bisection(path: None, name: str, eps: float) -> None:
    make, phi = UNBOUNDED[name]
    for seed in range(3):
        x = scores(seed)
        expected = by_bisection(x.numpy(), eps, 1, phi, float(x.max()))
        ours = so.argmax(x, smoothing=make(eps))
        same(ours, expected, atol=1e-14)


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("name", [*UNBOUNDED, *BOUNDED])
@pytest.mark.parametrize("shift", [0.0, 1e6, -1e6])
def test_threshold_of_clustered_scores(path: None, name: str, shift: float) -> None:
    """Ties, a far outlier on each side, and a common offset."""
    make, phi = (UNBOUNDED | BOUNDED)[name]
    x = torch.tensor([0.0, 0, 0, 1, 1, 0.5, 1e5, -1e5, 0.25, 0.25], dtype=torch.float64) + shift
    bounded = phi if name in BOUNDED else lambda z: np.minimum(phi(z), 1)
    expected = by_bisection(x.numpy(), 0.3, 4, bounded, shift + 0.25)
    ours = so.topk_mask(x, 4, smoothing=make(0.3))
    same(ours, expected, atol=1e-15)


SIZES = [0.0, 1.0, -1.0, 1e-30, 1e-8, 1e8, -1e8, 1e15, -1e15, 1e30, -1e30, 0.5, 3.0]
FAMILIES = [
    so.Quadratic(1.0), so.Entropy(1.0), so.Tsallis(1.0, 1.0), so.Tsallis(1.1, 1.0), so.Tsallis(1.25, 1.0),
    so.Tsallis(1.7, 1.0), so.Tsallis(3.0, 1.0), so.BinaryEntropy(1.0), so.Laplace(1.0),
]  # fmt: skip


@pytest.mark.parametrize("smoothing", FAMILIES, ids=repr)
@given(values=st.lists(st.sampled_from(SIZES), min_size=3, max_size=8), k=st.sampled_from([0.5, 1, 1.5, 2, 3]))
def test_entries_of_very_different_size(smoothing: so.Smoothing, values: list[float], k: float) -> None:
    """Newton's steps may be lost in the rounding of an entry, or of a slope of 1e-200; the sum stays k."""
    x = torch.tensor(values, dtype=torch.float64)
    alpha = getattr(smoothing, "alpha", 1)
    assert abs(float(so.topk_mask(x, k, smoothing=smoothing).sum()) - k) <= (1e-7 if alpha > 2 else 1e-13)
