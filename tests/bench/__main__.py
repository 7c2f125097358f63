"""Times smoothops against torch's hard operators and other libraries: ``python -m tests.bench [--quick]``.

All contestants of a table take turns in one run, on one thread, in processor time, and a number is the median of the
ratios of neighbouring calls: what else the machine does then hardly counts. The full run rewrites docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smoothops as so

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end -->"
SHAPES = [(128, 100), (128, 1000), (1024, 1024), (1, 100_000), (1, 1_000_000)]
SLOW = 20.0  # seconds: what takes longer than this once is not measured again

Run = Callable[[Tensor], Tensor]


def optional(name: str) -> Any:
    """Another library, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


torchsort, entmax, softtorch = (optional(name) for name in ("torchsort", "entmax", "softtorch"))


def softly(operator: str, softness: float, **options: Any) -> Run:
    return lambda x: getattr(softtorch, operator)(x, -1, softness=softness, standardize=False, **options)


def softly_ordered(operator: str, eps: Callable[[int], float], **options: Any) -> Run:
    """softtorch scales the positions to [0, 1]: eps(n - 1) is the softness that matches ours."""

    def run(x: Tensor) -> Tensor:
        found = softly(operator, eps(x.shape[-1] - 1), method="fast_soft_sort", mode="c0", **options)(x)
        return found if isinstance(found, Tensor) else found.values

    return run


def tenth(x: Tensor) -> int:
    return x.shape[-1] // 10


def mask(regularizer: Callable[[float], Any]) -> Run:
    return lambda x: so.topk_mask(x, tenth(x), smoothing=regularizer(0.1))


# Per table: the hard operator of torch, forward only; then forward and backward of (library, name, function).
TABLES: list[tuple[str, Run, list[tuple[Any, str, Run]]]] = [
    (
        "torch.sort",
        lambda x: torch.sort(x, -1).values,
        [
            (so, "rank, Quadratic(0.1)", lambda x: so.rank(x, smoothing=0.1)),
            (torchsort, "soft_rank, l2", lambda x: torchsort.soft_rank(x, "l2", 0.1)),
            (softtorch, "rank, fast_soft_sort, c0", softly_ordered("rank", lambda m: 0.1 * m, descending=False)),
            (so, "rank, Entropy(0.1)", lambda x: so.rank(x, smoothing=so.Entropy(0.1))),
            (torchsort, "soft_rank, kl", lambda x: torchsort.soft_rank(x, "kl", 0.1)),
            (so, "rank, eps from the data", so.rank),
            (so, "sort, Quadratic(1)", lambda x: so.sort(x, smoothing=1.0)),
            (torchsort, "soft_sort, l2", lambda x: torchsort.soft_sort(x, "l2", 1.0)),
            (softtorch, "sort, fast_soft_sort, c0", softly_ordered("sort", lambda m: 1 / m, return_indices=False)),
            (so, "sort, Entropy(1)", lambda x: so.sort(x, smoothing=so.Entropy(1.0))),
            (torchsort, "soft_sort, kl", lambda x: torchsort.soft_sort(x, "kl", 1.0)),
            (so, "sort, eps from the data", so.sort),
        ],
    ),
    (
        "torch.softmax",
        lambda x: torch.softmax(x, -1),
        [
            (so, "argmax, Entropy(1)", lambda x: so.argmax(x, -1, smoothing=1.0)),
            (so, "sparsemax", so.sparsemax),
            (entmax, "sparsemax", lambda x: entmax.sparsemax(x, -1)),
            (softtorch, "argmax, c0", softly("argmax", 1.0, mode="c0")),
            (so, "entmax, alpha 1.5", so.entmax),
            (entmax, "entmax15", lambda x: entmax.entmax15(x, -1)),
            (softtorch, "argmax, c1", softly("argmax", 2.0, mode="c1")),
            (so, "entmax, alpha 1.3", lambda x: so.entmax(x, 1.3)),
            (entmax, "entmax_bisect, alpha 1.3", lambda x: entmax.entmax_bisect(x, 1.3, -1)),
        ],
    ),
    (
        "torch.topk, k = n/10",
        lambda x: torch.topk(x, tenth(x), -1).values,
        [
            (so, "topk_mask, Quadratic(0.1)", mask(so.Quadratic)),
            (entmax, "budget_bisect", lambda x: entmax.budget_bisect(x / 0.1, tenth(x), -1)),
            (so, "topk_mask, BinaryEntropy(0.1)", mask(so.BinaryEntropy)),
            (so, "topk_mask, Laplace(0.1)", mask(so.Laplace)),
            (so, "topk_mask, eps from the data", lambda x: so.topk_mask(x, tenth(x))),
        ],
    ),
]


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def forward(run: Run, x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def forward_backward(run: Run, x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    cotangent = torch.randn_like(x)
    return lambda: torch.autograd.grad(run(x), x, cotangent)


def race(baseline: Run, contestants: list[tuple[str, Run]], x: Tensor, budget: float) -> tuple[float, dict[str, float]]:
    """Seconds of the baseline, and each contestant's median multiple of it, all taking turns for ``budget`` seconds."""
    hard = forward(baseline, x)
    calls = {name: forward_backward(run, x) for name, run in contestants}
    for call in (hard, *calls.values()):  # compiles, fills caches
        call()
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while len(base) < 3 or (time.perf_counter() < end and len(base) < 300):
        turn = []
        for name, call in calls.items():
            if ratios[name] and ratios[name][-1] * base[-1] > SLOW:
                continue
            turn.append(seconds(hard))
            ratios[name].append(seconds(call) / turn[-1])
        base.append(statistics.median(turn))
    return statistics.median(base), {name: statistics.median(r) for name, r in ratios.items()}


def shape_name(shape: tuple[int, int]) -> str:
    return " x ".join(f"{n:,}".replace(",", " ") for n in shape)


def number(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def tables(shapes: list[tuple[int, int]], budget: float) -> Iterator[str]:
    for title, baseline, listed in TABLES:
        contestants = [(f"{lib.__name__}: {name}", run) for lib, name, run in listed if lib is not None]
        columns = []
        for shape in shapes:
            print(f"{title}: {shape_name(shape)}", file=sys.stderr, flush=True)
            x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
            gc.collect()
            columns.append(race(baseline, contestants, x, budget))
        yield f"| multiples of {title} | " + " | ".join(map(shape_name, shapes)) + " |"
        yield "|---|" + "---:|" * len(shapes)
        yield f"| {title}, forward only | " + " | ".join(f"{1e3 * base:.3g} ms" for base, _ in columns) + " |"
        for name, _ in contestants:
            yield f"| {name} | " + " | ".join(f"{number(ratio[name])}" for _, ratio in columns) + " |"
        yield ""


def process(code: str) -> float:
    """The number that a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


TIMED = "import time, torch; t = time.process_time(); {}; print(time.process_time() - t)"


def start_up(repeats: int) -> Iterator[str]:
    rank = "so.rank(torch.arange(3.0, requires_grad=True)).prod().backward()"
    rows = {
        "`import torch`": "import time; t = time.process_time(); import torch; print(time.process_time() - t)",
        "`import smoothops, implicit` after it": TIMED.format("import smoothops, implicit"),
        "first `so.argmax`, forward and backward, with the import": TIMED.format(
            "import smoothops as so; so.argmax(torch.arange(3.0, requires_grad=True)).prod().backward()"
        ),
        "first `so.rank`, forward and backward, with the import": TIMED.format(f"import smoothops as so; {rank}"),
    }
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, code in rows.items():
            taken[name].append(process(code))
    yield "| start of a process | ms |"
    yield "|---|---:|"
    for name, values in taken.items():
        yield f"| {name} | {1e3 * statistics.median(values):.0f} |"
    yield ""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def conditions() -> Iterator[str]:
    versions = [("torch", torch.__version__)]
    for name, library in (("torchsort", torchsort), ("entmax", entmax), ("softtorch", softtorch)):
        versions.append((name, importlib.metadata.version(name) if library is not None else "not installed"))
    listed = ", ".join(f"{name} {version}" for name, version in versions)
    today = datetime.date.today().isoformat()
    yield f"{today}; {cpu()}, {torch.get_num_threads()} thread, processor time; float32; {listed}."
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: small shapes, printed only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    parts = [conditions(), start_up(1 if quick else 9), tables(SHAPES[:2] if quick else SHAPES, 2.0 if quick else 20.0)]
    report = []
    for part in parts:
        for line in part:
            print(line, flush=True)
            report.append(line)
    if quick:
        return
    head, _, rest = PAGE.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text("\n".join([head + BEGIN, "", *report]) + END + tail)
    print(f"wrote {PAGE.name}", file=sys.stderr)


main()
