"""Peak memory of an operator and its gradient, in float32 numbers an entry: no n x n tensor, and no copy too many."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smoothops as so
from smoothops import kernels

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
N = 1_000_000
# bounds leave room for one copy of x in float64
OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "sort": (lambda x: so.sort(x, smoothing=1.0), 11),
    "sort, mixing": (so.sort, 12),
    "sort, Entropy": (lambda x: so.sort(x, smoothing=so.Entropy(1.0)), 13),
    "sort, Laplace": (lambda x: so.sort(x, smoothing=so.Laplace(0.1)), 23),
    "rank": (lambda x: so.rank(x, smoothing=0.1), 8),
    "rank, mixing": (so.rank, 11),
    "rank, Entropy": (lambda x: so.rank(x, smoothing=so.Entropy(0.1)), 13),
    "rank, Laplace": (lambda x: so.rank(x, smoothing=so.Laplace(0.1)), 12),
    "argmax": (lambda x: so.argmax(x, -1, smoothing=1.0), 12),
    "amax": (lambda x: so.amax(x, -1, smoothing=1.0), 13),
    "sparsemax": (so.sparsemax, 5),
    "entmax": (so.entmax, 5),
    "topk_mask": (lambda x: so.topk_mask(x, 64, smoothing=0.1), 5),
    "topk_mask, BinaryEntropy": (lambda x: so.topk_mask(x, 64, smoothing=so.BinaryEntropy(0.1)), 7),
    "topk_mask, mixing": (lambda x: so.topk_mask(x, 64), 14),
    "median": (lambda x: so.median(x, -1), 13),
}
LIBC = ctypes.CDLL(None)
TRIM = getattr(LIBC, "malloc_trim", None)
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
pytestmark = pytest.mark.skipif(
    not RESET.exists() or TRIM is None, reason="the peak of a process can be reset on Linux with glibc only"
)


@pytest.fixture(autouse=True)
def tensors_from_the_system() -> Iterator[None]:
    """Each tensor is mapped by itself and goes back when it is freed: holes in the heap would count as peak."""
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    yield
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # where glibc's own rule ends up after large tensors
    LIBC.mallopt(M_TRIM_THRESHOLD, 1 << 26)


def peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def differentiate(operator: Callable[[Tensor], Tensor], n: int) -> float:
    """How much the peak grows, in numbers an entry."""
    x = torch.linspace(-3, 3, n).sin().requires_grad_()
    g = torch.ones(n)
    gc.collect()
    assert TRIM is not None
    TRIM(0)  # what is free but held would hide what is taken
    RESET.write_text("5")
    before = peak()
    y = operator(x)
    torch.autograd.grad(y, x, g if y.ndim else g[0])
    return (peak() - before) / (4 * n)


@pytest.mark.parametrize("name", OPERATORS)
def test_peak_memory(name: str) -> None:
    if kernels._compiled("cpu") is None:
        pytest.skip("numba cannot be imported")
    operator, bound = OPERATORS[name]
    differentiate(operator, 2000)  # compiles
    # the least of three: what else the process frees late must not count
    assert min(differentiate(operator, N) for _ in range(3)) <= bound


@pytest.mark.full
@pytest.mark.parametrize("name", OPERATORS)
def test_peak_memory_in_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many copies in float64, of which the steps of a search are some, but nothing n times as large as x."""
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    assert differentiate(OPERATORS[name][0], N // 20) <= 400
