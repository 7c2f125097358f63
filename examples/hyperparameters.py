"""Tune 30 regularization strengths at once: by hypergradients, against grid and random search at the same cost.

Diabetes progression is predicted from 10 measurements and from 20 decoys, copies of them whose rows are shuffled. Each
predictor enters as a cubic polynomial, and has a ridge strength of its own, which decides how much it counts:

    w(s) = argmin_w |X w - y|^2 / 2n + sum_p exp(s_p) |w_p|^2 / 2,      minimize over s the error of w(s) on other rows.

The fit is done by a Cholesky solver that knows nothing of gradients; ``implicit.attach`` gives its answer w(s) the
derivative in all 30 strengths for one more linear solve. That solve is counted: a step of the hypergradient search
costs two, a try of the others one. Selection is by four-fold cross-validation within the 80 % of the rows that are not
test rows; these are looked at only to report.

What is due to what: where all predictors are real (no decoys), one shared strength is a little better; the advantage
grows with the number of strengths that have to differ. The more a search has to choose from, the more it overfits the
validation rows: its error there is far below that on the test rows.

    python examples/hyperparameters.py               # three seeds of 20 splits each, a table and a figure
    python examples/hyperparameters.py --solves 200  # longer

Sources: Bengio 2000, "Gradient-based optimization of hyperparameters"; Bergstra and Bengio 2012, "Random search for
hyper-parameter optimization".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from torch import Generator, Tensor
from tqdm import tqdm

import implicit

FOLDS, DEGREE = 4, 3
LOW, HIGH = -6.0, 4.0  # logarithms of the strengths that grid and random search try
MOST = 2  # shuffled copies of each measurement, in the experiment that is claimed
MARGIN = 50.0  # of the mean squared error, by which hypergradients are claimed to be ahead on each seed
LABELS = {"grid": "grid, one shared strength", "random": "random search", "gradient": "hypergradients (ours)"}
COLOURS = {"grid": "#e08e2b", "random": "#8a8f98", "gradient": "#1b6ca8"}

# --- data: many splits of the same 442 patients, side by side ---------------------------------------------------------


class Rows(NamedTuple):
    """Patients: columns (..., rows, columns), and targets (..., rows) less the mean of the rows that are fitted."""

    columns: Tensor
    targets: Tensor


class Data(NamedTuple):
    """For each split: folds to fit and to validate (splits, folds, ...), all of their rows to fit, and test rows."""

    train: Rows
    validation: Rows
    all: Rows
    test: Rows
    predictor: Tensor  # of each column


def polynomials(fitted: Tensor, others: Tensor) -> list[Tensor]:
    """Powers 1 to 3 of each predictor, (..., rows, 3 predictors), standardized by the rows that are fitted."""

    def standardized(pair: Sequence[Tensor]) -> list[Tensor]:
        deviation, mean = torch.std_mean(pair[0], -2, keepdim=True)
        return [(values - mean) / deviation.clamp(min=1e-9) for values in pair]

    first = standardized((fitted, others))
    # orthogonal for a normal distribution; the power of a predictor with two values is a constant or the same again
    powers = [standardized([z**power - 3 * (power - 2) * z for z in first]) for power in range(2, DEGREE + 1)]
    return [torch.cat(parts, -1) for parts in zip(first, *powers, strict=True)]


def make_data(seed: int, repeats: int, copies: int) -> Data:
    """Each repeat deals the rows to five parts, of which each is once the test part; the decoys are the same in all."""
    generator, bunch = Generator().manual_seed(seed), load_diabetes()
    measured, targets = torch.tensor(bunch.data), torch.tensor(bunch.target)
    rows, size = len(targets), len(targets) // 5
    shuffled = [measured[torch.randperm(rows, generator=generator)] for _ in range(MOST)]
    values = torch.cat([measured, *shuffled[:copies]], 1)
    order = torch.stack([torch.randperm(rows, generator=generator)[: 5 * size] for _ in range(repeats)])
    order = torch.cat([order.roll(size * turn, 1) for turn in range(5)])
    known, test = order[:, size:], order[:, :size]
    folds = known.unflatten(1, (FOLDS, -1))
    rest = torch.stack([folds[:, torch.arange(FOLDS) != k].flatten(1) for k in range(FOLDS)], 1)

    def rows_of(fitted: Tensor, others: Tensor) -> list[Rows]:
        level = targets[fitted].mean(-1, keepdim=True)
        columns = polynomials(values[fitted], values[others])
        return [Rows(x, targets[index] - level) for x, index in zip(columns, (fitted, others), strict=True)]

    return Data(*rows_of(rest, folds), *rows_of(known, test), torch.arange(values.shape[1]).repeat(DEGREE))


# --- the inner problem ------------------------------------------------------------------------------------------------


class Ridge:
    """The coefficients w(s) of many ridge regressions, for logarithms of strengths s: (..., predictors)."""

    def __init__(self, rows: Rows, predictor: Tensor) -> None:
        x, n = rows.columns, rows.targets.shape[-1]
        self.gram = x.mT @ x / n
        self.moment = (x.mT @ rows.targets.unsqueeze(-1) / n).squeeze(-1)
        self.predictor, self.solves = predictor, 0

    def gradient(self, w: Tensor, s: Tensor) -> Tensor:
        """Of the objective in w: zero at w(s), which is all that the derivative of w(s) needs to know."""
        return (self.gram @ w.unsqueeze(-1)).squeeze(-1) - self.moment + s.exp()[..., self.predictor] * w

    @torch.no_grad()
    def fit(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """w(s) as numbers, and the Cholesky factor that gave it."""
        self.solves += 1
        factor = torch.linalg.cholesky(self.gram + torch.diag_embed(s.exp()[..., self.predictor]))
        return solve(factor, self.moment), factor

    def coefficients(self, s: Tensor) -> Tensor:
        """w(s), with its derivative where one is asked for."""
        w, factor = self.fit(s)
        if not s.requires_grad:
            return w
        self.solves += 1  # in backward: the factor preconditions it, so that it takes a step or two
        linear = implicit.CG(preconditioner=partial(solve, factor))
        return implicit.attach(w, self.gradient, s, linear=linear, batch_dims=w.ndim - 1)


def solve(factor: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)


def error(w: Tensor, rows: Rows) -> Tensor:
    """Mean squared error, (...)."""
    return ((rows.columns @ w.unsqueeze(-1)).squeeze(-1) - rows.targets).square().mean(-1)


class Task:
    """What the searches see, validation errors (splits,) for s: (splits, predictors); and what they are judged by."""

    def __init__(self, data: Data) -> None:
        self.data, self.shape = data, (len(data.test.targets), int(data.predictor.max()) + 1)
        self.folds, self.final = Ridge(data.train, data.predictor), Ridge(data.all, data.predictor)

    def validate(self, s: Tensor) -> Tensor:
        everywhere = s.unsqueeze(1).expand(-1, FOLDS, -1)
        return error(self.folds.coefficients(everywhere), self.data.validation).mean(1)

    def judge(self, s: Tensor) -> Tensor:
        """The error on the test rows of a fit to all others."""
        return error(self.final.fit(s)[0], self.data.test)


# --- three searches: each gives its tries in turn ---------------------------------------------------------------------

Report = Callable[[Tensor, Tensor], None]  # is told each s that was tried and its validation errors


def grid(task: Task, solves: int, seed: int, report: Report) -> None:
    """The same strength for all predictors, equally spaced logarithms; in random order, as it may end at any time."""
    for k in torch.randperm(solves, generator=Generator().manual_seed(seed)).tolist():
        s = torch.full(task.shape, LOW + (HIGH - LOW) * k / max(solves - 1, 1), dtype=torch.float64)
        report(s, task.validate(s))


def random(task: Task, solves: int, seed: int, report: Report) -> None:
    """Strengths drawn independently, log-uniform, for each split anew."""
    generator = Generator().manual_seed(seed)
    for _ in range(solves):
        s = LOW + (HIGH - LOW) * torch.rand(task.shape, generator=generator, dtype=torch.float64)
        report(s, task.validate(s))


def gradient(task: Task, solves: int, seed: int, report: Report, rate: float = 0.5) -> None:
    """Adam on the logarithms, all from 0; the rate is the best of four on the validation rows of seeds 100 to 102."""
    s = torch.zeros(task.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=rate)
    for _ in range(solves // 2):
        optimizer.zero_grad()
        errors = task.validate(s)
        report(s.detach().clone(), errors.detach())
        errors.sum().backward()  # splits share no strength
        optimizer.step()


SEARCHES = {"grid": grid, "random": random, "gradient": gradient}


class Result(NamedTuple):
    """The search so far after each try: solves, and the mean errors of what is best on the validation rows."""

    solves: list[int]
    validation: list[float]
    test: list[float]
    strengths: Tensor  # the mean over splits of the logarithms that were chosen, (predictors,)
    seconds: list[float]


def search(name: str, task: Task, solves: int, seed: int) -> Result:
    task.folds.solves = 0
    best, test = torch.full(task.shape[:1], torch.inf, dtype=torch.float64), torch.zeros(task.shape[0]).double()
    chosen, out = (
        torch.zeros(task.shape, dtype=torch.float64),
        Result([], [], [], torch.zeros(task.shape[1]).double(), []),
    )

    def report(s: Tensor, errors: Tensor) -> None:
        better = errors < best
        best[better], chosen[better], test[better] = errors[better], s[better], task.judge(s)[better]
        for part, value in zip(out[:3], (task.folds.solves, best.mean().item(), test.mean().item()), strict=True):
            part.append(value)

    begun = time.perf_counter()
    SEARCHES[name](task, solves, seed, report)
    out.seconds.append(time.perf_counter() - begun)
    out.strengths.copy_(chosen.mean(0))
    return out


Results = dict[int, dict[str, list[Result]]]  # for each number of copies and search, one for each seed

# --- report and figure ------------------------------------------------------------------------------------------------


def table(results: Results, seeds: Sequence[int]) -> str:
    heads = "".join(f"{f'seed {seed}':>9}" for seed in seeds)
    lines = [
        f"{'mean squared error, test rows':38}{heads}{'mean':>9}{'':3}{'validation':>10}{'solves':>8}{'seconds':>9}"
    ]
    for copies, by_name in results.items():
        lines.append(f"{10 * (1 + copies)} strengths, {10 * copies} of them of decoys")
        for name, runs in by_name.items():
            test = [run.test[-1] for run in runs]
            cells = "".join(f"{value:9.0f}" for value in (*test, fmean(test)))
            validation, solves = fmean(run.validation[-1] for run in runs), runs[0].solves[-1]
            seconds = fmean(run.seconds[0] for run in runs)
            lines.append(f"    {LABELS[name]:34}{cells}{validation:13.0f}{solves:8d}{seconds:9.1f}")
    return "\n".join(lines)


def draw_searches(axes: Axes, by_name: dict[str, list[Result]]) -> None:
    """Test error by cost: the mean over seeds, their range shaded."""
    for name, runs in by_name.items():
        test, at = torch.tensor([run.test for run in runs]), runs[0].solves
        axes.plot(at, test.mean(0), color=COLOURS[name], lw=2.2, label=LABELS[name])
        axes.fill_between(at, test.amin(0), test.amax(0), color=COLOURS[name], alpha=0.15, lw=0)
    axes.set(title="Test error of what is best in validation so far", xlabel="linear solves, adjoints included")
    last = [run.test[-1] for runs in by_name.values() for run in runs]
    axes.set_ylim(min(last) - 80, max(last) + 2.2 * (max(last) - min(last)))


def draw_copies(axes: Axes, results: Results) -> None:
    """Test errors in the end for each number of decoys: a small dot for each seed, a large one for the mean."""
    for shift, name in enumerate(LABELS):
        for place, by_name in enumerate(results.values()):
            x, test = place + 0.24 * (shift - 1), [run.test[-1] for run in by_name[name]]
            axes.plot([x, x], [min(test), max(test)], color=COLOURS[name], lw=1.4, alpha=0.6)
            axes.plot([x] * len(test), test, "o", color=COLOURS[name], ms=4, alpha=0.55, mec="none")
            axes.plot(x, fmean(test), "o", color=COLOURS[name], ms=10)
            axes.annotate(
                f"{fmean(test):.0f}", (x, max(test)), (0, 7), textcoords="offset points", ha="center", fontsize=9
            )
    axes.set(title="Test error in the end (mean squared)", xlim=(-0.6, len(results) - 0.4))
    axes.set_xticks(range(len(results)), [f"{10 * (1 + c)} strengths,\n{10 * c} of decoys" for c in results])
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.1)


def draw_strengths(axes: Axes, runs: list[Result]) -> None:
    """The logarithms of the learned strengths, a dot for each seed; decoys at the right."""
    names = [name.upper() if name in ("bmi", "bp") else name for name in load_diabetes().feature_names]
    strengths = torch.stack([run.strengths for run in runs])
    real = strengths[:, :10].mean(0).argsort()
    order = torch.cat([real, 10 + strengths[:, 10:].mean(0).argsort()])
    for place, index in enumerate(order.tolist()):
        colour, values = "#1b6ca8" if index < 10 else "#c8553d", strengths[:, index]
        axes.plot([place, place], [values.min(), values.max()], color=colour, lw=1, alpha=0.5)
        axes.plot([place] * len(values), values, "o", color=colour, ms=3, alpha=0.55, mec="none")
        axes.plot(place, values.mean(), "o", color=colour, ms=6)
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.text(len(order) - 0.5, 0.15, "at the start", ha="right", fontsize=9)
    axes.axvline(9.5, color="#d9dce1", lw=1)
    axes.set_xticks([*range(10), (9 + len(order)) / 2], [*(names[index] for index in real.tolist()), "decoys"])
    axes.tick_params(axis="x", length=0)
    axes.set(title="Learned log strength of each predictor (low: it counts)", xlim=(-0.8, len(order) - 0.2))


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    panels = figure.subplot_mosaic([["searches", "copies"], ["strengths", "strengths"]])
    most = results[max(results)]
    draw_searches(panels["searches"], most)
    draw_copies(panels["copies"], results)
    draw_strengths(panels["strengths"], most["gradient"])
    handles = panels["searches"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--solves", type=int, default=40, help="linear solves that each search may use")
    add("--repeats", type=int, default=4, help="of dealing the rows to five parts; each is five splits")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new choice of splits and decoys")
    add("--out", type=Path, default=Path("out/hyperparameters.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: Results = {copies: {name: [] for name in LABELS} for copies in range(MOST + 1)}
    with tqdm(total=len(args.seeds) * len(results) * len(LABELS), unit="search", desc="searching") as progress:
        for copies, by_name in results.items():
            for seed in args.seeds:
                task = Task(make_data(seed, args.repeats, copies))
                for name, runs in by_name.items():
                    runs.append(search(name, task, args.solves, seed))
                    progress.update()
    print(f"\n{table(results, args.seeds)}\n")
    draw(results, args.out)
    ours, *others = (results[MOST][name] for name in ("gradient", "grid", "random"))
    ahead = [base.test[-1] - run.test[-1] for runs in others for base, run in zip(runs, ours, strict=True)]
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    if any(getattr(args, option) != parser.get_default(option) for option in ("solves", "repeats", "seeds")):
        return 0
    won = min(ahead) >= MARGIN
    print(
        f"{'passed' if won else 'FAILED'}: with {10 * (1 + MOST)} strengths, hypergradients are ahead of both others by"
    )
    print(f"at least {MARGIN:.0f} on every seed; the least is {min(ahead):.0f}")
    return 0 if won else 1


if __name__ == "__main__":
    raise SystemExit(main())
