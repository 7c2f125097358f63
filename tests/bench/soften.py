"""Times softened functions: ``python -m tests.bench.soften [--quick]``.

Times are medians of turns taken one after the other, on one thread; a ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable

import torch

import smoothops as so

STEPS = 50
EPS = 0.3


def branches(x):
    """STEPS branches on a tensor."""
    y = x
    for _ in range(STEPS):
        if y > 0.5:  # noqa: SIM108
            y = y * 0.9
        else:
            y = y + 0.1
    return y


def by_cond(x):
    """The same by so.cond."""
    y = x
    for _ in range(STEPS):
        p = so.heaviside(y - 0.5, smoothing=EPS)
        y = so.cond(p, lambda y: y * 0.9, lambda y: y + 0.1, y)
    return y


def by_hand(x):
    """The same by sigmoid and lerp."""
    y = x
    for _ in range(STEPS):
        y = torch.lerp(y + 0.1, y * 0.9, torch.sigmoid((y - 0.5) / EPS))
    return y


def python_conditions(x):
    """Branches that no tensor decides, each beside one operation on a matrix."""
    for i in range(STEPS):
        if i % 3 == 0:
            x = x @ x
        elif i % 3 == 1:
            x = x / x.norm()
        else:
            x = x + 1.0
    return x


def python_numbers(a):
    """Branches on numbers of Python: the sorting of a list."""
    n = len(a)
    for i in range(n):
        for j in range(n - 1 - i):
            if a[j] > a[j + 1]:
                a[j], a[j + 1] = a[j + 1], a[j]
    return a


def counter(x):
    """Branches that keep their worlds apart: STEPS + 1 values of an integer."""
    count = 0
    for i in range(STEPS):
        if x > i / STEPS:
            count += 1
    return count


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def compare(runs: dict[str, Callable[[], object]], turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each, and the median ratio to the first within a turn."""
    for f in runs.values():
        f()
    rows = [{name: seconds(f) for name, f in runs.items()} for _ in range(turns)]
    first = next(iter(runs))
    times = {name: statistics.median(row[name] for row in rows) for name in runs}
    return times, {name: statistics.median(row[name] / row[first] for row in rows) for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns")
    turns = 5 if parser.parse_args().quick else 25
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread")

    soft = so.soften(smoothing=EPS)
    x = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    runs: dict[str, Callable[[], object]] = {
        "sigmoid and lerp by hand": lambda: by_hand(x),
        "so.cond": lambda: by_cond(x),
        "soften": lambda f=soft(branches): f(x),  # type: ignore[misc]
        "soften, forward and backward": lambda f=soft(branches): f(x).backward(),  # type: ignore[misc]
        ".hard, the function as written": lambda f=soft(branches): f.hard(x),  # type: ignore[misc]
    }
    times, ratios = compare(runs, turns)
    print(f"\n| a branch on a tensor, of {STEPS} | us | ratio |\n|---|---:|---:|")
    for name in runs:
        print(f"| {name} | {1e6 * times[name] / STEPS:.0f} | {ratios[name]:.1f} |")

    worlds, _ = compare({"soften": lambda f=soft(counter): f(x)}, max(3, turns // 5))  # type: ignore[misc]
    print(f"\na branch of {STEPS} that keep an integer apart: {1e6 * worlds['soften'] / STEPS:.0f} us")

    matrix = torch.randn(64, 64, requires_grad=True)
    numbers = torch.randn(60).tolist()
    print("\n| no condition on a tensor | as written, us | softened, us | ratio |\n|---|---:|---:|---:|")
    for name, f, given in (
        ("numbers of Python, a sort of 60", python_numbers, numbers),
        (f"{STEPS} branches beside 64 x 64 matrices", python_conditions, matrix),
    ):
        copied = (lambda v=given, f=f: f(list(v))) if isinstance(given, list) else (lambda v=given, f=f: f(v))
        times, ratios = compare({"plain": copied, "soft": lambda g=soft(f), v=given: g(v)}, 4 * turns)  # type: ignore[misc]
        print(f"| {name} | {1e6 * times['plain']:.0f} | {1e6 * times['soft']:.0f} | {ratios['soft']:.2f} |")


if __name__ == "__main__":
    main()
