"""Fit the constants of an existing rule program to data: the function as it is, made differentiable by one decorator.

A tax office has a function with brackets, a surcharge for the rich, a benefit below a limit and a relief for each child
that falls from child to child: if, elif and while on seven constants. We see incomes, children and noisy payments, and
look for the constants. The function is ordinary Python and stays so. Its gradient is 0 in every limit where
the payment jumps; under ``so.soften``, with an eps that falls from stage to stage, all constants have one.

    python examples/learn_a_program.py                   # three seeds, a table and a figure
    python examples/learn_a_program.py --people 1000 --noise 0.5

Random search gets as many runs of the program, and so does gradient descent on the ordinary program.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import smoothops as so

# name: (truth, start, deviation of the random search)
CONSTANTS = {
    "free": (11.0, 20.0, 5.0),
    "upper": (40.0, 50.0, 8.0),
    "low": (0.15, 0.25, 0.1),
    "high": (0.40, 0.30, 0.1),
    "rich": (72.0, 60.0, 8.0),
    "poor": (24.0, 33.0, 6.0),
    "relief": (2.0, 1.0, 0.6),
}
SURCHARGE, BENEFIT = 6.0, 3.0  # thousands, as the incomes
FIRST, LAST = 6.0, 0.1  # eps at the beginning and at the end
CLAIM = 0.05  # of the way from the start to the truth that is left in each constant
COLOURS = {"soft": "#1b6ca8", "random": "#e08e2b", "hard": "#c8553d", "truth": "#3b3f46"}
LABELS = {"soft": "soften, gradient", "random": "random search", "hard": "as written, gradient"}


# --- the program, as it was found -------------------------------------------------------------------------------------


def tax(income, children, free, upper, low, high, rich, poor, relief):
    if income <= free:
        due = 0.0
    elif income <= upper:
        due = low * (income - free)
    else:
        due = low * (upper - free) + high * (income - upper)
    if income > rich:
        due += SURCHARGE
    if income < poor:
        due -= BENEFIT
    while children > 0:
        due -= relief
        relief = relief / 2
        children -= 1
    return due


# --- learning ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Incomes in thousands, numbers of children, payments: (people,) each."""

    income: Tensor
    children: Tensor
    paid: Tensor


def column(k: int) -> Tensor:
    """Truth, start or deviation of all constants."""
    return torch.tensor([row[k] for row in CONSTANTS.values()], dtype=torch.float64)


def make_data(people: int, noise: float, seed: int) -> Data:
    g = torch.Generator().manual_seed(seed)
    income = 100 * torch.rand(people, generator=g, dtype=torch.float64)
    children = torch.randint(0, 4, (people,), generator=g)
    paid = so.soften(tax).hard(income, children, *column(0))
    return Data(income, children, paid + noise * torch.randn(people, generator=g, dtype=torch.float64))


def cost(program, data: Data, constants: Tensor) -> Tensor:
    return (program(data.income, data.children, *constants.unbind(0)) - data.paid).square().mean()


class Fit(NamedTuple):
    """Constants, and the runs of the program that they took."""

    constants: Tensor
    runs: int


def descend(data: Data, stages: int, soft: bool) -> Fit:
    """L-BFGS in units of the deviations, at each of a falling sequence of eps."""
    position = torch.zeros(len(CONSTANTS), dtype=torch.float64, requires_grad=True)
    runs = 0
    for stage in range(stages):
        eps = FIRST * (LAST / FIRST) ** (stage / (stages - 1))
        softened = so.soften(smoothing=eps)(tax)
        program = softened if soft else softened.hard
        optimizer = torch.optim.LBFGS([position], max_iter=20, line_search_fn="strong_wolfe")

        def closure(program=program, optimizer=optimizer) -> Tensor:
            nonlocal runs
            runs += 1
            optimizer.zero_grad()
            value = cost(program, data, column(1) + position * column(2))
            value.backward()
            return value

        optimizer.step(closure)
    return Fit((column(1) + position * column(2)).detach(), runs)


def search(data: Data, runs: int, seed: int) -> Fit:
    """The best of random steps around the best so far, their size falling from the deviations to a hundredth."""
    g = torch.Generator().manual_seed(seed)
    program = so.soften(tax).hard
    best = column(1)
    least = cost(program, data, best)
    for k in range(runs - 1):
        size = 0.01 ** (k / runs)
        there = best + size * column(2) * torch.randn(len(best), generator=g, dtype=torch.float64)
        value = cost(program, data, there)
        if value < least:
            best, least = there, value
    return Fit(best, runs)


def left(fit: Fit) -> Tensor:
    """How much of the way from the start to the truth is left, constant by constant."""
    return (fit.constants - column(0)).abs() / (column(1) - column(0)).abs()


# --- the experiment ---------------------------------------------------------------------------------------------------


def run(seed: int, args: argparse.Namespace, advance=lambda: None) -> dict[str, Fit]:
    data = make_data(args.people, args.noise, seed)
    fits = {"soft": descend(data, args.stages, True)}
    advance()
    fits["random"] = search(data, fits["soft"].runs, seed)
    advance()
    fits["hard"] = descend(data, args.stages, False)
    advance()
    return fits


def table(results: dict[int, dict[str, Fit]]) -> str:
    lines = [f"{'constant':10}{'truth':>8}{'start':>8}" + "".join(f"{LABELS[name]:>22}" for name in LABELS)]
    for k, (name, (true, start, _)) in enumerate(CONSTANTS.items()):
        found = [
            " ".join(f"{float(fits[key].constants[k]):6.2f}" for fits in results.values()).rjust(22) for key in LABELS
        ]
        lines.append(f"{name:10}{true:8.2f}{start:8.2f}" + "".join(found))
    worst = {key: max(left(fits[key]).max().item() for fits in results.values()) for key in LABELS}
    lines.append(f"{'worst, part of the way':26}" + "".join(f"{worst[key]:22.3f}" for key in LABELS))
    runs = {key: max(fits[key].runs for fits in results.values()) for key in LABELS}
    return "\n".join([*lines, f"{'runs of the program':26}" + "".join(f"{runs[key]:22d}" for key in LABELS)])


# --- figure -----------------------------------------------------------------------------------------------------------


def draw_constants(axes: Axes, results: dict[int, dict[str, Fit]]) -> None:
    for shift, (name, label) in enumerate(LABELS.items()):
        for k in range(len(CONSTANTS)):
            parts = [max(left(fits[name])[k].item(), 1e-5) for fits in results.values()]
            height = [k + 0.22 * (shift - 1)] * len(parts)
            axes.plot(parts, height, "o", color=COLOURS[name], ms=5, label=None if k else label)
    axes.axvline(1, color=COLOURS["truth"], lw=1, ls=":")
    axes.set(xscale="log", yticks=range(len(CONSTANTS)), yticklabels=list(CONSTANTS))
    axes.set(xlim=(1e-5, 5), xlabel="error, 1 at the start")
    axes.invert_yaxis()
    axes.set_title("Constants of the program")
    axes.legend(frameon=False, fontsize=9, loc="center left")


@torch.no_grad()
def draw_program(axes: Axes, data: Data) -> None:
    income = torch.linspace(0, 100, 800, dtype=torch.float64)
    none = torch.zeros(len(income), dtype=torch.int64)
    childless = data.children == 0
    axes.plot(data.income[childless], data.paid[childless], ".", color="#c9ced6", ms=3)
    for eps, shade in ((FIRST, 0.35), (1.5, 0.65), (LAST, 1.0)):
        paid = so.soften(smoothing=eps)(tax)(income, none, *column(0))
        axes.plot(income, paid, color=COLOURS["soft"], alpha=shade, lw=2, label=f"eps {eps:g}")
    axes.set(xlabel="income, thousands", ylabel="payment")
    axes.set_title("The program without children, softer and harder")
    axes.legend(frameon=False, fontsize=9)


def draw(results: dict[int, dict[str, Fit]], data: Data, path: Path) -> None:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    first, second = figure.subplots(1, 2)
    draw_constants(first, results)
    draw_program(second, data)
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--people", type=int, default=2000, help="with a known payment")
    add("--noise", type=float, default=0.3, help="deviation of the error of a payment, thousands")
    add("--stages", type=int, default=10, help="values of eps")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new set of people")
    add("--threads", type=int, default=1, help="torch threads")
    add("--out", type=Path, default=Path("out/learn_a_program.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tqdm(total=3 * len(args.seeds), unit="fit", desc="learning") as progress:
        results = {seed: run(seed, args, progress.update) for seed in args.seeds}
    print(f"\n{table(results)}\n")
    draw(results, make_data(args.people, args.noise, args.seeds[0]), args.out)
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    if any(getattr(args, o) != parser.get_default(o) for o in ("people", "noise", "stages", "seeds")):
        return 0
    worst = {key: [left(fits[key]).max().item() for fits in results.values()] for key in LABELS}
    won = max(worst["soft"]) <= CLAIM and min(worst["random"]) > 5 * max(worst["soft"])
    print(
        f"{'passed' if won else 'FAILED'}: every constant is within {max(worst['soft']):.3f} of its way on every seed "
        f"(claimed: {CLAIM}), by random search at as many runs {min(worst['random']):.2f} or more, as written "
        f"{min(worst['hard']):.2f} or more"
    )
    return int(not won)


if __name__ == "__main__":
    raise SystemExit(main())
