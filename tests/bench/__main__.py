"""Times smoothops against torch's hard operators and other libraries: ``python -m tests.bench [--quick]``.

Prints the tables with the multiples that smoothops is to stay below. The full run rewrites docs/benchmarks.md,
docs/benchmarks.json and the figure docs/img/benchmarks.png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bench import costs
from tests.bench.contest import Table, race
from tests.bench.tables import QUICK, TABLES, entmax, softtorch, torchsort

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end -->"
Results = dict[str, Any]


def shape_name(shape: tuple[int, int]) -> str:
    return " x ".join(f"{n:,}".replace(",", " ") for n in shape)


def number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def judged(value: float | None, bar: float | None) -> str:
    """A number, and what it was to stay below where it does not."""
    if value is None:
        return ""
    return f"{number(value)} (> {bar:g})" if bar is not None and value > bar else number(value)


def raced(table: Table, budget: float, results: Results) -> Iterator[str]:
    columns = []
    for shape in table.shapes:
        print(f"{table.title}: {shape_name(shape)}", file=sys.stderr, flush=True)
        columns.append(race(table, shape, budget))
    results[table.title] = [
        {"shape": shape, "seconds": base, "multiples": ratios}
        for shape, (base, ratios) in zip(table.shapes, columns, strict=True)
    ]
    yield f"| multiples of {table.title} | " + " | ".join(map(shape_name, table.shapes)) + " |"
    yield "|---|" + "---:|" * len(table.shapes)
    yield "| its time | " + " | ".join(f"{1e3 * base:.3g} ms" for base, _ in columns) + " |"
    for c in table.contestants:
        if c.library is not None:
            cells = (
                judged(ratios.get(c.label), c.bar(shape))
                for shape, (_, ratios) in zip(table.shapes, columns, strict=True)
            )
            yield f"| {c.label} | " + " | ".join(cells) + " |"
    yield ""


def listed(title: str, heads: list[str], judges: list[bool], lines: Iterable[costs.Line], results: Results):
    """A table of lines; ``judges`` says which numbers the bar is for."""
    print(title, file=sys.stderr, flush=True)
    found = list(lines)
    results[title] = {name: numbers for name, numbers, _ in found}
    yield f"| {title} | " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * len(heads)
    for name, numbers, bar in found:
        cells = [judged(v, bar if judge else None) for v, judge in zip(numbers, judges, strict=False)]
        yield f"| {name} | " + " | ".join(cells + [""] * (len(heads) - len(cells))) + " |"
    yield ""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def conditions() -> Iterator[str]:
    versions = [("torch", torch.__version__)]
    for name, library in (("torchsort", torchsort), ("entmax", entmax), ("softtorch", softtorch)):
        versions.append((name, importlib.metadata.version(name) if library is not None else "not installed"))
    named = ", ".join(f"{name} {version}" for name, version in versions)
    yield f"{datetime.date.today().isoformat()}; {cpu()}, {torch.get_num_threads()} threads, wall clock; {named}."
    yield ""


def report(quick: bool, results: Results) -> Iterator[str]:
    budget = 0.2 if quick else 4.0
    yield from conditions()
    for table in QUICK if quick else TABLES:
        yield from raced(table, budget, results)
    small = costs.small_rows(budget / 40)
    heads = ["1 x 10", "1 x 100", "StraightThrough / (soft + hard), 10", "the same, 100"]
    yield from listed("one row, microseconds with gradient", heads, [True, True, False, False], small, results)
    if quick:
        return
    heads = ["seconds", "MB"]
    yield from listed("first use in a process, after `import torch`", heads, [True, False], costs.start_up(5), results)
    heads = ["float32 numbers an entry"]
    yield from listed("peak memory at n = 1e6, forward and backward", heads, [True], costs.memory(), results)
    heads = ["1e3", "1e4", "1e5", "1e6", "exponent"]
    yield from listed("growth, ms", heads, [False] * 4 + [True], costs.growth(budget / 4), results)
    yield from listed("torch.compile / eager, 128 x 1 000", ["ratio"], [True], costs.compiled(budget), results)
    heads = ["512 x 64", "128 x 1 000"]
    yield from listed("plain torch / torchsort", heads, [False, False], costs.plain(budget / 4), results)


def draw(results: Results, path: Path) -> None:
    """Time against n for single rows, relative to nothing: seconds, log-log."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, (title, lines) in zip(axes, costs.curves().items(), strict=True):
        for name, (sizes, seconds) in lines.items():
            ours = name.startswith("smoothops")
            hard = name.startswith("torch.")
            style: dict[str, Any] = {"color": "black", "linestyle": "--"} if hard else {"linewidth": 2 if ours else 1}
            ax.loglog(sizes, [1e3 * s for s in seconds], marker="o", markersize=3, label=name, **style)
        ax.set(title=title, xlabel="n, one row of float32")
        ax.grid(alpha=0.3, which="major")
        ax.legend(fontsize=7)
        results[f"curves: {title}"] = lines
    axes[0].set_ylabel("ms")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: small shapes, printed only")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results: Results = {}
    lines: list[str] = []
    emit: Callable[[str], None] = lambda line: (print(line, flush=True), lines.append(line))[1]  # noqa: E731
    for line in report(options.quick, results):
        emit(line)
    if options.quick:
        return
    draw(results, DOCS / "img" / "benchmarks.png")
    page = DOCS / "benchmarks.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text("\n".join([head + BEGIN, "", *lines]) + END + rest.partition(END)[2])
    (DOCS / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
