"""What a race does not show: start of a process, small rows, memory, growth with n, torch.compile, plain torch."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import smoothops as so
from smoothops import kernels
from tests.bench.contest import Run, forward_backward, seconds
from tests.bench.tables import entmax, softly_ordered, softtorch, torchsort

Line = tuple[str, list[float], float | None]  # a name, its numbers, what they are to stay below


def median(call: Callable[[], object], budget: float, least: int = 5) -> float:
    taken: list[float] = []
    call()
    end = time.perf_counter() + budget
    while len(taken) < least or (time.perf_counter() < end and len(taken) < 1000):
        taken.append(seconds(call))
    return statistics.median(taken)


def process(code: str) -> list[float]:
    """The numbers that a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


# --- start of a process ----------------------------------------------------------------------------------------------

CLOCK = """
import time
def held():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
import torch
t, m = time.process_time(), held()
{}
print(time.process_time() - t, held() - m)
"""
FIRST = "import smoothops as so; so.{}.prod().backward()"


def start_up(repeats: int) -> Iterator[Line]:
    """Seconds and MB of the first use, after ``import torch``."""
    x = "torch.arange(3.0, requires_grad=True)"
    rows = [
        ("import smoothops, implicit", "import smoothops, implicit", 0.15),
        ("first argmax", FIRST.format(f"argmax({x})"), 0.5),
        ("first rank", FIRST.format(f"rank({x})"), 0.5),
        ("first sort, Entropy", FIRST.format(f"sort({x}, smoothing=so.Entropy(1.0))"), 0.5),
        ("first rank, Laplace", FIRST.format(f"rank({x}, smoothing=so.Laplace(1.0))"), 0.5),
        ("first sparsemax", FIRST.format(f"sparsemax({x})"), 0.5),
        ("first topk_mask", FIRST.format(f"topk_mask({x}, 2)"), 0.5),
        ("first isotonic", FIRST.format(f"isotonic({x})"), 0.5),
        ("first median", FIRST.format(f"median({x})"), 0.5),
    ]
    for name, code, bar in rows:
        runs = [process(CLOCK.format(code)) for _ in range(repeats)]
        yield name, [statistics.median(r[i] for r in runs) for i in (0, 1)], bar


# --- one small row ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "argmax": lambda x, s: so.argmax(x, -1, smoothing=s),
    "max": lambda x, s: so.max(x, -1, smoothing=s).values,
    "amax": lambda x, s: so.amax(x, -1, smoothing=s),
    "topk_mask": lambda x, s: so.topk_mask(x, 3, smoothing=s),
    "rank": lambda x, s: so.rank(x, smoothing=s),
    "sort": lambda x, s: so.sort(x, smoothing=s),
    "topk": lambda x, s: so.topk(x, 3, smoothing=s),
    "kthvalue": lambda x, s: so.kthvalue(x, 3, smoothing=s),
    "quantile": lambda x, s: so.quantile(x, 0.3, -1, smoothing=s),
    "median": lambda x, s: so.median(x, -1, smoothing=s),
    "maximum": lambda x, s: so.maximum(x, -x, smoothing=s),
    "relu": lambda x, s: so.relu(x, smoothing=s),
    "abs": lambda x, s: so.abs(x, smoothing=s),
    "sign": lambda x, s: so.sign(x, smoothing=s),
    "heaviside": lambda x, s: so.heaviside(x, smoothing=s),
    "round": lambda x, s: so.round(x, smoothing=s),
    "floor": lambda x, s: so.floor(x, smoothing=s),
    "clamp": lambda x, s: so.clamp(x, -0.5, 0.5, smoothing=s),
}
OTHERS: dict[str, Run] = {
    "rank, eps from the data": so.rank,
    "sort, eps from the data": lambda x: so.sort(x),
    "topk_mask, eps from the data": lambda x: so.topk_mask(x, 3),
    "sparsemax": so.sparsemax,
    "entmax, alpha 1.5": so.entmax,
    "isotonic": lambda x: so.isotonic(x),
    "rank, Laplace(0.1)": lambda x: so.rank(x, smoothing=so.Laplace(0.1)),
    "sort, Laplace(0.1)": lambda x: so.sort(x, smoothing=so.Laplace(0.1)),
}


def small_rows(budget: float) -> Iterator[Line]:
    """Microseconds with gradient at 10 and at 100 entries: softly, then StraightThrough over soft and hard."""
    for name, operator in SMALL.items():
        found, shares = [], []
        for n in (10, 100):
            x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
            own = 0.1
            soft = median(forward_backward(lambda x: operator(x, own), x), budget)  # noqa: B023
            with torch.no_grad():
                hard = median(lambda: operator(x, so.Hard()), budget)  # noqa: B023
            through = median(forward_backward(lambda x: operator(x, so.StraightThrough(own)), x), budget)  # noqa: B023
            found.append(1e6 * soft)
            shares.append(through / (soft + hard))
        yield name, [*found, *shares], 250
    for name, run in OTHERS.items():
        rows = [torch.randn(1, n, generator=torch.Generator().manual_seed(0)) for n in (10, 100)]
        yield name, [1e6 * median(forward_backward(run, x), budget) for x in rows], 250


# --- memory and growth -----------------------------------------------------------------------------------------------

WHOLE: dict[str, str] = {
    "sort, Quadratic": "so.sort(x, smoothing=1.0)",
    "rank, Quadratic": "so.rank(x, smoothing=0.1)",
    "rank, Entropy": "so.rank(x, smoothing=so.Entropy(0.1))",
    "rank, Laplace": "so.rank(x, smoothing=so.Laplace(0.1))",
    "sort, Laplace": "so.sort(x, smoothing=so.Laplace(0.1))",
    "rank, eps from the data": "so.rank(x)",
    "argmax, Entropy": "so.argmax(x, -1, smoothing=1.0)",
    "sparsemax": "so.sparsemax(x)",
    "entmax, alpha 1.5": "so.entmax(x)",
    "topk_mask, Quadratic": "so.topk_mask(x, 64, smoothing=0.1)",
    "topk_mask, BinaryEntropy": "so.topk_mask(x, 64, smoothing=so.BinaryEntropy(0.1))",
    "topk_mask, eps from the data": "so.topk_mask(x, 64)",
}
PEAK = """
import torch, smoothops as so
def high():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
def run(n):
    x = torch.randn(n, requires_grad=True)
    g = torch.ones(n)
    open("/proc/self/clear_refs", "w").write("5")
    before = high()
    torch.autograd.grad({}, x, g)
    return (high() - before) * 1024 / (4 * n)
run(1000)
print(run(1000000))
"""


def memory() -> Iterator[Line]:
    """Peak of the process above what it held before, in float32 numbers an entry, at n = 1e6."""
    for name, code in WHOLE.items():
        yield name, process(PEAK.format(code)), 10


def growth(budget: float) -> Iterator[Line]:
    """Milliseconds at n = 1e3 .. 1e6, and the exponent fitted to them."""
    sizes = [1_000, 10_000, 100_000, 1_000_000]
    for name, code in WHOLE.items():
        run = eval(f"lambda x: {code}", {"so": so})
        taken = [1e3 * median(forward_backward(run, torch.randn(n)), budget) for n in sizes]
        at, log = [math.log(n) for n in sizes], [math.log(t) for t in taken]
        middle, mean = statistics.mean(at), statistics.mean(log)
        slope = sum((a - middle) * (b - mean) for a, b in zip(at, log, strict=True))
        yield name, [*taken, slope / sum((a - middle) ** 2 for a in at)], 1.1


# --- torch.compile, plain torch --------------------------------------------------------------------------------------


def compiled(budget: float) -> Iterator[Line]:
    """Compiled time over eager time, forward and backward, at 128 x 1000."""
    x = torch.randn(128, 1000)
    for name, code in WHOLE.items():
        run = eval(
            f"lambda x: {code.replace('(x', '(x, -1', 1) if 'argmax' in code else code}", {"so": so, "torch": torch}
        )
        torch._dynamo.reset()
        fast = torch.compile(run, fullgraph=True)
        eager, other = forward_backward(run, x), forward_backward(fast, x)
        other()
        ratios = [(seconds(other)) / seconds(eager) for _ in range(max(5, int(20 * budget)))]
        yield name, [statistics.median(ratios)], 1.0


def plain(budget: float) -> Iterator[Line]:
    """The path without compiled kernels over torchsort's, forward and backward, at 512 x 64 and 128 x 1000."""
    if torchsort is None:
        return
    for name, ours, theirs in [
        ("rank", lambda x, e: so.rank(x, smoothing=e), lambda x, e: torchsort.soft_rank(x, "l2", e)),
        ("sort", lambda x, e: so.sort(x, smoothing=e), lambda x, e: torchsort.soft_sort(x, "l2", e)),
    ]:
        for eps in (0.1, 1.0):
            found = []
            for shape in ((512, 64), (128, 1000)):
                x = torch.randn(*shape)
                peer = median(forward_backward(lambda x: theirs(x, eps), x), budget)  # noqa: B023
                with mock.patch.object(kernels, "_compiled", return_value=None):
                    found.append(median(forward_backward(lambda x: ours(x, eps), x), budget) / peer)  # noqa: B023
            yield f"{name}, eps {eps:g}", found, None


# --- curves of the figure --------------------------------------------------------------------------------------------


def curves() -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Seconds against n of one row, forward and backward; torch's hard operators forward only."""
    sort = {
        "torch.sort, forward only": (None, lambda x: torch.sort(x, -1).values),
        "smoothops, Quadratic": (so, lambda x: so.sort(x, smoothing=1.0)),
        "smoothops, Entropy": (so, lambda x: so.sort(x, smoothing=so.Entropy(1.0))),
        "smoothops, eps from the data": (so, so.sort),
        "torchsort, l2": (torchsort, lambda x: torchsort.soft_sort(x, "l2", 1.0)),
        "softtorch, fast_soft_sort": (softtorch, softly_ordered("sort", lambda m: 1 / m, return_indices=False)),
    }
    choice = {
        "torch.softmax, forward and backward": (so, lambda x: torch.softmax(x, -1)),
        "smoothops, argmax": (so, lambda x: so.argmax(x, -1, smoothing=1.0)),
        "smoothops, sparsemax": (so, so.sparsemax),
        "smoothops, entmax-1.5": (so, so.entmax),
        "entmax, sparsemax": (entmax, lambda x: entmax.sparsemax(x, -1)),
        "entmax, entmax15": (entmax, lambda x: entmax.entmax15(x, -1)),
    }
    sizes = [100, 1_000, 10_000, 100_000, 1_000_000]
    return {
        "sort": {
            name: timed(name, run, sizes) for name, run in sort.items() if run[0] is not None or "torch.sort" in name
        },
        "choice of one": {name: timed(name, run, sizes) for name, run in choice.items() if run[0] is not None},
    }


def timed(name: str, run: tuple[Any, Run], sizes: list[int]) -> tuple[list[int], list[float]]:
    found = []
    for n in sizes:
        x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
        found.append(median((lambda: run[1](x)) if run[0] is None else forward_backward(run[1], x), 0.5))  # noqa: B023
    return sizes, found
