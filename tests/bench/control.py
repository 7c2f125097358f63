"""Times soft loops and checkpoints, beside AlgoVision: ``python -m tests.bench.control [--quick]``.

AlgoVision (Petersen et al. 2021) is compared where it can be imported (``pip install --no-deps --target FOLDER
algovision`` and FOLDER on PYTHONPATH): its own examples, bubble sort and counting, errors against the same equations in
float64. Times are medians of turns taken one after the other, on one thread; a ratio is the median of the ratios within
a turn. Memory is the growth of the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import smoothops as so

PLANS = {"none": None, "Sqrt()": so.Sqrt(), "Binomial(8)": so.Binomial(8)}
ROOM = 100_000  # float32 numbers of a state when memory is measured

# --- programs ---------------------------------------------------------------------------------------------------------


def bubble_sort(array: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """AlgoVision's example: sweeps over the array until one swaps nothing; the loss counts swaps."""
    n = array.shape[-1]

    def sweep(state):
        array, _, swaps, t = state

        def compare(i: int, state):
            v, swapped, swaps = state
            p = so.heaviside(v[:, i] - v[:, i + 1], smoothing=1 / beta)

            def swap():
                order = [*range(i), i + 1, i, *range(i + 2, n)]
                return v[:, order], torch.ones_like(swapped), swaps + 1

            return so.cond(p, swap, lambda: (v, swapped, swaps))

        return *so.fori_loop(0, n - 1 - t, compare, (array, array[:, 0] * 0, swaps)), t + 1

    zero = array[:, 0] * 0
    (array, _, swaps, _), _ = so.while_loop(lambda s: s[1], sweep, (array, zero + 1, zero, 0), n, on_fail="ignore")
    return array, swaps


def counting(x: Tensor, beta: float, checkpoint: so.control.Checkpoint | None = None, steps: int = 60) -> Tensor:
    """AlgoVision's other example: while x < 5: x += 1."""

    def below(x: Tensor) -> Tensor:
        return so.heaviside(5 - x, smoothing=1 / beta)

    return so.while_loop(below, lambda x: x + 1, x, steps, checkpoint=checkpoint, on_fail="ignore")[0]


def wave(x: Tensor, steps: int, checkpoint: so.control.Checkpoint | None) -> Tensor:
    """A loop that goes on with probability 1 - 1/steps: every step counts, each keeps a state or two."""
    chance = torch.full((len(x),), 1 - 1 / steps)
    return so.while_loop(
        lambda s: chance, lambda s: (s * 1.01).sin(), x, steps, checkpoint=checkpoint, on_fail="ignore"
    )[0]


def their_bubble_sort(beta: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    av = importlib.import_module("algovision")
    swap = [av.Let("array", [lambda i: i + 1], "a"), av.Let("array", ["i"], "b")]
    swap += [av.Let("swapped", 1.0), av.Let("loss", lambda loss: loss + 1.0)]
    compare = [
        av.Let("a", "array", ["i"]),
        av.Let("b", "array", [lambda i: i + 1]),
        av.If(av.GT("a", "b"), if_true=swap),
    ]
    loop = av.While(
        av.IsTrue("swapped"), av.Let("swapped", 0), av.For("i", "n", *compare), av.LetInt("n", lambda n: n - 1)
    )
    zeros = [
        av.Var(name, torch.tensor(start)) for name, start in (("a", 0.0), ("b", 0.0), ("swapped", 1.0), ("loss", 0.0))
    ]
    size = av.VarInt("n", lambda array: array.shape[1] - 1)
    return av.Algorithm(av.Input("array"), *zeros, size, loop, av.Output("array"), av.Output("loss"), beta=beta)


def their_counting(beta: float) -> Callable[[Tensor], Tensor]:
    av = importlib.import_module("algovision")
    loop = av.While(av.LT("x", 5), av.Let("x", lambda x: x + 1))
    return av.Algorithm(av.Input("x"), loop, av.Output("x"), beta=beta)


def their_wave(x: Tensor, steps: int) -> Tensor:
    av = importlib.import_module("algovision")
    chance = av.Var("go", torch.tensor(1 - 1 / steps))
    loop = av.While(av.IsTrue("go"), av.Let("x", lambda x: (x * 1.01).sin()))
    options = {"beta": 1.0, "max_iter": steps, "epsilon": 0.0}
    return av.Algorithm(av.Input("x"), chance, loop, av.Output("x"), **options)(x)


def exactly_counting(x: Tensor, beta: float) -> Tensor:
    x, left, total = x.double(), torch.ones(len(x)).double(), 0.0
    for _ in range(200):
        c = torch.sigmoid((5 - x) * beta)
        total, left, x = total + left * (1 - c) * x, left * c, x + 1
    return total + left * x


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    f(x).sum().backward()
    return time.perf_counter() - start


def turns(contestants: dict[str, Callable[[Tensor], Tensor]], x: Tensor, count: int) -> dict[str, tuple[float, float]]:
    """Milliseconds, and the ratio to the first contestant."""
    rows = [[seconds(f, x) for f in contestants.values()] for _ in range(count + 1)][1:]
    return {
        name: (1e3 * statistics.median(r[k] for r in rows), statistics.median(r[k] / r[0] for r in rows))
        for k, name in enumerate(contestants)
    }


def bodies() -> dict[str, tuple[Callable[[int, Tensor], Tensor], Tensor]]:
    torch.manual_seed(0)
    w = torch.randn(64, 64, requires_grad=True)
    return {
        "sin of 1 number": (lambda i, s: torch.sin(s) + 0.1, torch.randn(1)),
        "sin of 1000": (lambda i, s: torch.sin(s) + 0.1, torch.randn(1000)),
        "recurrent layer, 16 x 64": (lambda i, s: s + 0.01 * torch.tanh(s @ w) * torch.cos(s), torch.randn(16, 64)),
        "recurrent layer, 256 x 64": (lambda i, s: s + 0.01 * torch.tanh(s @ w) * torch.cos(s), torch.randn(256, 64)),
    }


def checkpoint_times(steps: int, count: int) -> None:
    print(f"\n| fori_loop, T = {steps} | {' | '.join(f'{p}, ms | ratio' for p in PLANS)} |")
    print("|---|" + "---:|---:|" * len(PLANS))
    for name, (body, x) in bodies().items():
        runs = {p: lambda x, b=body, c=c: so.fori_loop(0, steps, b, x, checkpoint=c) for p, c in PLANS.items()}
        found = turns(runs, x, count)
        print(f"| {name} | " + " | ".join(f"{ms:.0f} | {ratio:.2f}" for ms, ratio in found.values()) + " |", flush=True)


def peak() -> float:
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def grown(name: str, steps: int) -> float:
    """MB by which a loop and its gradient raise the peak; Linux."""
    x = torch.rand(1, ROOM)
    run = (lambda x: their_wave(x, steps)) if name == "AlgoVision" else (lambda x: wave(x, steps, PLANS[name]))
    seconds(lambda x: x.sin(), x)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    seconds(run, x)
    return peak() - before


def memory(sizes: tuple[int, ...], theirs: bool) -> None:
    print(
        f"\n| while_loop on {ROOM} float32, MB | {' | '.join(f'T = {t}' for t in sizes)} |\n|---|"
        + "---:|" * len(sizes)
    )
    for name in [*PLANS, *(["AlgoVision"] if theirs else [])]:
        row = []
        for t in sizes:
            command = [sys.executable, "-m", "tests.bench.control", "--grown", name, str(t)]
            row.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"| {name} | " + " | ".join(f"{mb:.1f}" for mb in row) + " |", flush=True)


def against_algovision(count: int) -> None:
    print("\n| AlgoVision's example | its error | ours | its ms | ours | ours / its |\n|---|---:|---:|---:|---:|---:|")
    torch.manual_seed(0)
    for beta in (1.25, 5.0, 20.0):
        x = torch.randn(1000) * 3
        run = {"its": their_counting(beta), "ours": lambda x, b=beta: counting(x, b)}
        line(f"counting to 5, beta {beta:g}, 1000 numbers", run, x, exactly_counting(x, beta), count)
    for beta in (5.0, 20.0):
        x = torch.randn(64, 8)
        run = {"its": lambda x, f=their_bubble_sort(beta): torch.cat([y.flatten() for y in f(x)])}
        run["ours"] = lambda x, b=beta: torch.cat([y.flatten() for y in bubble_sort(x, b)])
        line(f"bubble sort, beta {beta:g}, 64 x 8", run, x, run["ours"](x.double()), count)


def line(name: str, run: dict[str, Callable[[Tensor], Tensor]], x: Tensor, exact: Tensor, count: int) -> None:
    errors = [(f(x) - exact).abs().max().item() for f in run.values()]
    found = turns(run, x, count)
    times = " | ".join(f"{found[who][0]:.1f}" for who in run)
    print(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} | {times} | {found['ours'][1]:.2f} |", flush=True)


def branches(count: int) -> None:
    x, y, p = torch.randn(100_000), torch.randn(100_000), torch.rand(100_000)
    print("\n| branches of 100000 | ms | ratio |\n|---|---:|---:|")
    for title, q in (("soft", p), ("a third of the weights 0", torch.where(p < 1 / 3, 0, p))):
        runs = {
            "lerp": lambda x, q=q: torch.lerp(y * x.cos(), x.exp(), q),
            "cond": lambda x, q=q: so.cond(q, torch.exp, lambda x: y * x.cos(), x),
            "switch": lambda x, q=q: so.switch(torch.stack([q, 1 - q], -1), [torch.exp, lambda x: y * x.cos()], x),
        }
        for name, (ms, ratio) in turns(runs, x, count).items():
            print(f"| {title}: {name} | {ms:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns, short loops")
    parser.add_argument("--grown", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grown:
        print(grown(options.grown[0], int(options.grown[1])))
        return
    theirs = importlib.util.find_spec("algovision") is not None
    print(f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, 1 thread")
    print("AlgoVision's own code" if theirs else "AlgoVision is not installed: ours alone")
    checkpoint_times(128 if options.quick else 1024, 3 if options.quick else 11)
    branches(5 if options.quick else 31)
    if theirs:
        against_algovision(3 if options.quick else 15)
    memory((16, 64) if options.quick else (64, 256, 1024), theirs)


if __name__ == "__main__":
    main()
