"""Prediction intervals calibrated without calibration rows: train the quantiles of leave-one-out residuals.

The interval of a new patient is the ridge prediction plus quantiles of the leave-one-out residuals of the training rows
(the jackknife), scaled by an estimate of their spread. Its width is a difference of two quantiles of all residuals, not
a sum of a loss over rows; ``so.quantile`` gives it a gradient in the penalty of each feature and in the spread. Beside
it on the diabetes data: pinball-loss quantile regression and a Gaussian likelihood, all linear.

What is due to what: leaving out is what calibrates (see the method without it). The soft quantiles train for the width
that is reported, but the Gaussian likelihood of the same leave-one-out residuals, followed by their quantiles, does as
well on this data (see the method without soft quantiles).

    python examples/quantile_regression.py               # three seeds of 40 splits each, a table and a figure

Sources: Koenker and Bassett 1978, "Regression quantiles"; Barber et al. 2021, "Predictive inference with the
jackknife+"; for the calibrated columns Romano et al. 2019, "Conformalized quantile regression".
"""

from __future__ import annotations

import argparse
import math
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
from torch import Generator, Tensor, nn
from tqdm import tqdm

import smoothops as so

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # nominal coverage of the intervals
TAUS = torch.cat([1 - torch.tensor(LEVELS), 1 + torch.tensor(LEVELS)]) / 2  # their lower and upper ends
MAIN = LEVELS.index(0.9)  # the one that is trained for, selected by and asserted
NEARER, LOWER = 0.4, 2.0  # claimed on each seed: points of coverage nearer to 90 %, and a lower interval score
LOOK_EVERY = 10  # steps between two looks at the validation rows

# --- data: many splits of the same 442 patients, side by side ---------------------------------------------------------


class Rows(NamedTuple):
    """Patients of each split: features (splits, rows, 10) and targets (splits, rows), both standardized."""

    features: Tensor
    targets: Tensor


class Splits(NamedTuple):
    """Disjoint rows for training (60 %), validation and test (20 % each); targets are level + unit * standardized."""

    train: Rows
    validation: Rows
    test: Rows
    level: Tensor  # (splits, 1), as unit
    unit: Tensor


def fold(total: int, repeats: int, generator: Generator) -> tuple[Tensor, ...]:
    """Indices (5 repeats, rows) of the three parts: each repeat deals the rows (but at most four) to five equal folds,
    of which each is once the test and once the validation part, so that the patients are tested equally often.
    """
    size = total // 5
    order = torch.stack([torch.randperm(total, generator=generator)[: 5 * size] for _ in range(repeats)])
    turned = torch.cat([order.roll(size * turn, 1) for turn in range(5)])
    return turned.split((3 * size, size, size), 1)


def make_splits(seed: int, repeats: int) -> Splits:
    """Standardized with the mean and deviation of the training rows of each split."""
    bunch = load_diabetes()
    features, targets = torch.tensor(bunch.data).float(), torch.tensor(bunch.target).float()
    parts = fold(len(targets), repeats, Generator().manual_seed(seed))
    deviation, mean = torch.std_mean(features[parts[0]], 1, keepdim=True)
    unit, level = torch.std_mean(targets[parts[0]], 1, keepdim=True)
    return Splits(*(Rows((features[i] - mean) / deviation, (targets[i] - level) / unit) for i in parts), level, unit)


def with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


# --- methods: modules with a loss for each split, and intervals (splits, rows, levels) --------------------------------


class Linear(nn.Module):
    """Linear functions of the features and one, (splits, rows, outputs); ``start`` are the constants to begin with."""

    start = torch.zeros(2)

    def __init__(self, train: Rows, decay: float) -> None:
        super().__init__()
        self.train_rows, self.decay = train, decay
        weights = self.start.repeat(len(train.targets), 11, 1)
        weights[:, :-1] = 0
        self.weights = nn.Parameter(weights)

    def forward(self, features: Tensor) -> Tensor:
        return with_one(features) @ self.weights

    def penalty(self) -> Tensor:
        return self.decay * self.weights[:, :-1].square().sum((1, 2))


class Pinball(Linear):
    """A linear function of the features for each of the quantiles, fitted with the pinball loss."""

    start = torch.special.ndtri(TAUS)

    def losses(self) -> Tensor:
        error = self.train_rows.targets.unsqueeze(-1) - self(self.train_rows.features)
        return torch.maximum(TAUS * error, (TAUS - 1) * error).mean(1).sum(-1) + self.penalty()

    def intervals(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self(features).chunk(2, -1)


class Gaussian(Linear):
    """A linear mean and a linear log deviation, fitted with the Gaussian likelihood."""

    def losses(self) -> Tensor:
        mean, log_scale = self(self.train_rows.features).unbind(-1)
        z = (self.train_rows.targets - mean) / log_scale.exp()
        return (z.square() / 2 + log_scale).mean(1) + self.penalty()

    def intervals(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self(features).split(1, -1)
        return (mean + log_scale.exp() * torch.special.ndtri(TAUS)).chunk(2, -1)


class Jackknife(nn.Module):
    """Ridge regression plus quantiles of its scaled leave-one-out residuals; the loss is the mean width at 90 %.

    Learned are the logarithm of each feature's penalty, and how fast the log spread grows with the prediction.
    """

    def __init__(self, train: Rows, penalty: float, mixing: float = 30.0, left_out: bool = True) -> None:
        super().__init__()
        self.train_rows, self.smoothing, self.left_out = train, so.Quadratic(so.Mixing(mixing)), left_out
        self.log_penalty = nn.Parameter(torch.full_like(train.features[:, 0], penalty).log())
        self.growth = nn.Parameter(torch.zeros_like(train.targets[:, :1]))

    def ridge(self) -> tuple[Tensor, Tensor]:
        """Coefficients (splits, 11, 1) and the prediction of each training row by a fit without it, (splits, rows).

        In closed form: the residual of row i in the fit without it is r_i / (1 - H_ii), H = X A^-1 X', A = X'X + D.
        """
        x, y = with_one(self.train_rows.features), self.train_rows.targets
        penalty = y.shape[1] * torch.cat([self.log_penalty.exp(), torch.zeros_like(self.growth)], -1)
        solved = torch.linalg.solve(x.mT @ x + torch.diag_embed(penalty), x.mT)
        coefficients = solved @ y.unsqueeze(-1)
        residual, leverage = y - (x @ coefficients).squeeze(-1), (x * solved.mT).sum(-1)
        return coefficients, y - residual / (1 - self.left_out * leverage)

    def residuals(self) -> tuple[Tensor, Tensor]:
        """The scaled residuals of the training rows and their log spreads."""
        prediction = self.ridge()[1]
        log_spread = self.growth * prediction
        return (self.train_rows.targets - prediction) / log_spread.exp(), log_spread

    def losses(self) -> Tensor:
        z, log_spread = self.residuals()
        low, high = so.quantile(z, TAUS[MAIN :: len(LEVELS)], dim=1, smoothing=self.smoothing)
        return (high - low) * log_spread.exp().mean(1)

    def intervals(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """With the hard quantiles, at levels corrected for n rows: at place (n + 1) q instead of (n - 1) q + 1."""
        z, rows = self.residuals()[0], self.train_rows.targets.shape[1]
        levels = ((rows + 1) * TAUS - 1) / (rows - 1)
        quantiles = so.quantile(z, levels, dim=1, smoothing=so.Hard()).T.unsqueeze(1)
        prediction = with_one(features) @ self.ridge()[0]
        return (prediction + (self.growth.unsqueeze(-1) * prediction).exp() * quantiles).chunk(2, -1)


class Likelihood(Jackknife):
    """The same intervals, but the Gaussian likelihood of the leave-one-out residuals in place of the soft quantiles."""

    def losses(self) -> Tensor:
        z, log_spread = self.residuals()
        return z.square().mean(1).log() / 2 + log_spread.mean(1)


class Method(NamedTuple):
    label: str
    colour: str
    make: Callable[..., nn.Module]  # of the training rows and ``strength``
    strength: float  # weight decay, or the penalty to begin with
    rate: float


# Tuned alike: strength, rate (and mixing) of the best interval score on the validation rows of seeds 100 to 102; the
# ablations have the settings of ours.
METHODS = {
    "ours": Method("soft quantiles, leave-one-out", "#1b6ca8", Jackknife, 0.8, 0.015),
    "pinball": Method("pinball regression", "#e08e2b", Pinball, 0.015, 0.2),
    "gaussian": Method("Gaussian likelihood", "#c8553d", Gaussian, 0.6, 0.03),
    "likelihood": Method("ours without soft quantiles", "#17a398", Likelihood, 0.8, 0.015),
    "in-sample": Method("ours without leave-one-out", "#8a8f98", partial(Jackknife, left_out=False), 0.8, 0.015),
}
BASELINES, ABLATIONS = ("pinball", "gaussian"), ("likelihood", "in-sample")

# --- what is measured -------------------------------------------------------------------------------------------------


def outside(low: Tensor, high: Tensor, targets: Tensor) -> Tensor:
    """How far each target (splits, rows) lies outside of its intervals (splits, rows, levels); negative inside."""
    return torch.maximum(low - targets.unsqueeze(-1), targets.unsqueeze(-1) - high)


def interval_score(low: Tensor, high: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of width + 2/alpha times the distance outside, (splits, levels); least for the true quantiles."""
    return (high - low + 2 / (1 - torch.tensor(LEVELS)) * outside(low, high, targets).relu()).mean(1)


def conformal_margin(low: Tensor, high: Tensor, targets: Tensor) -> Tensor:
    """(splits, 1): what to add at both ends for 90 % coverage of new rows, from rows that were not trained on."""
    rank = min(targets.shape[1], math.ceil(LEVELS[MAIN] * (targets.shape[1] + 1)))
    return so.kthvalue(outside(low, high, targets)[..., MAIN], rank, 1, keepdim=True, smoothing=so.Hard())


class Result(NamedTuple):
    """What a method gave on the test rows of all splits of a seed; widths and scores in the unit of the data."""

    coverage: list[float]  # in percent, by level; the rest is of the 90 % interval
    off_nominal: float  # mean distance of the coverage from nominal over the levels
    width: float
    score: float
    calibrated: float  # coverage after conformal calibration on the validation rows
    calibrated_width: float
    shown: Tensor  # low, high and target of the test rows of the first split, (3, rows)


def measure(model: nn.Module, data: Splits) -> Result:
    with torch.no_grad():
        margin = conformal_margin(*model.intervals(data.validation.features), data.validation.targets)
        low, high = model.intervals(data.test.features)
    misses, width = outside(low, high, data.test.targets), (high - low)[..., MAIN] * data.unit
    coverage = 100 * (misses <= 0).double().mean((0, 1))
    return Result(
        coverage.tolist(),
        (coverage - 100 * torch.tensor(LEVELS)).abs().mean().item(),
        width.mean().item(),
        (interval_score(low, high, data.test.targets) * data.unit)[:, MAIN].mean().item(),
        100 * (misses[..., MAIN] <= margin).double().mean().item(),
        (width + 2 * margin * data.unit).mean().item(),
        torch.stack([low[0, :, MAIN], high[0, :, MAIN], data.test.targets[0]]) * data.unit[0] + data.level[0],
    )


def fit(model: nn.Module, validation: Rows, rate: float, steps: int) -> list[float]:
    """Adam with a cosine schedule, all splits at once; each keeps its best look by the interval score at 90 %."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    best, looks = torch.full((len(validation.targets),), torch.inf), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.losses().sum().backward()  # splits share no parameter
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY == 0 or step == steps:
            with torch.no_grad():
                low, high = model.intervals(validation.features)
                score = interval_score(low, high, validation.targets)[:, MAIN]
                for old, new in zip(kept, model.parameters(), strict=True):
                    old[score < best] = new[score < best]
            best = torch.minimum(best, score)
            looks.append(score.mean().item())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(kept), model.parameters())
    return looks


Results = dict[str, list[Result]]  # of each method, one for each seed

# --- report and figure ------------------------------------------------------------------------------------------------


def table(results: Results, seeds: Sequence[int]) -> str:
    """Coverage of the 90 % intervals in percent, by seed; then means over seeds."""
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "levels", "width", "score", "   calibrated to"]
    lines = [f"{'coverage of the 90 % interval':32}" + "".join(f"{head:>8}" for head in heads)]
    for name, runs in results.items():
        coverage = [run.coverage[MAIN] for run in runs]
        rows = ((r.off_nominal, r.width, r.score, r.calibrated, r.calibrated_width) for r in runs)
        means = [fmean(coverage), *map(fmean, zip(*rows, strict=True))]
        cells = [f"{value:8.{2 if i <= len(runs) + 1 else 1}f}" for i, value in enumerate(coverage + means)]
        lines.append(f"{METHODS[name].label:32}{''.join(cells)}")
    lines.append(
        "levels: mean distance of coverage from nominal at 50 to 95 %; score: width + 20 times the distance outside"
    )
    lines.append("calibrated to: coverage and width after conformal calibration on the validation rows, seen by all")
    return "\n".join(lines)


def margins(results: Results, base: str) -> tuple[list[float], list[float]]:
    """By how many points the coverage of ours is nearer to 90 %, and by how much its score is lower, seed by seed."""
    pairs = list(zip(results["ours"], results[base], strict=True))
    gaps = [[abs(run.coverage[MAIN] - 100 * LEVELS[MAIN]) for run in pair] for pair in pairs]
    return [other - ours for ours, other in gaps], [other.score - ours.score for ours, other in pairs]


def draw_intervals(axes: Axes, method: Method, shown: Tensor) -> None:
    """The 90 % intervals of the test rows of one split by prediction; targets outside of theirs in red."""
    low, high, target = shown[:, (shown[0] + shown[1]).argsort()]
    place, inside = torch.arange(len(target)), (low <= target) & (target <= high)
    axes.vlines(place, low, high, color=method.colour, lw=3.4, alpha=0.35)
    axes.plot(place[inside], target[inside], "o", color="#3b4252", ms=3)
    axes.plot(place[~inside], target[~inside], "o", color="#d1495b", ms=5)
    axes.set(xlabel="test patients of one split, by the middle of the interval", ylim=(-40, 420), xticks=[])
    axes.set_title(f"{method.label}: {int(inside.sum())} of {len(inside)} inside, mean width {(high - low).mean():.0f}")


def draw_calibration(axes: Axes, results: Results) -> None:
    """Coverage less nominal by level: the mean over seeds, the range shaded."""
    for name, runs in results.items():
        error = torch.tensor([run.coverage for run in runs]) - 100 * torch.tensor(LEVELS)
        nominal, style = [100 * level for level in LEVELS], ":" if name in ABLATIONS else "-"
        label, colour = METHODS[name].label, METHODS[name].colour
        axes.plot(nominal, error.mean(0), style, marker="o", ms=4, color=colour, lw=2, label=label)
        axes.fill_between(nominal, error.amin(0), error.amax(0), color=colour, alpha=0.12, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(title="Coverage less nominal, points", xlabel="nominal coverage, %", xticks=nominal)


def draw_scores(axes: Axes, results: Results) -> None:
    """Coverage and interval score of the 90 % intervals: a small dot for each seed, a large one for the mean."""
    for name, runs in results.items():
        at = [run.coverage[MAIN] for run in runs], [run.score for run in runs]
        axes.plot(*at, "o", color=METHODS[name].colour, ms=4, alpha=0.55, mec="none")
        axes.plot(*map(fmean, at), "s" if name in ABLATIONS else "o", color=METHODS[name].colour, ms=10)
    axes.axvline(100 * LEVELS[MAIN], color="black", lw=0.8)
    axes.set(title="90 % intervals: interval score (lower is better)", xlabel="coverage, %")


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    panels = figure.subplot_mosaic([["ours", "pinball"], ["calibration", "scores"]], height_ratios=[1, 1.1])
    for name in ("ours", "pinball"):
        draw_intervals(panels[name], METHODS[name], results[name][0].shown)
    draw_calibration(panels["calibration"], results)
    draw_scores(panels["scores"], results)
    handles = panels["calibration"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--mixing", type=float, default=30.0, help="how many residuals an entry of the soft sort mixes")
    add("--repeats", type=int, default=8, help="of the five folds; each is five splits")
    add("--steps", type=int, default=300, help="training steps, on all training rows")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new choice of folds")
    add("--out", type=Path, default=Path("out/quantile_regression.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: Results = {name: [] for name in METHODS}
    with tqdm(total=len(args.seeds) * len(METHODS), unit="run", desc="training") as progress:
        for data in (make_splits(seed, args.repeats) for seed in args.seeds):
            for name, method in METHODS.items():
                options = {"mixing": args.mixing} if name in ("ours", "in-sample") else {}
                model = method.make(data.train, method.strength, **options)
                fit(model, data.validation, method.rate, args.steps)
                results[name].append(measure(model, data))
                progress.update()
    print(f"\n{table(results, args.seeds)}\n")
    draw(results, args.out)
    ahead = {base: margins(results, base) for base in BASELINES}
    for base, parts in ahead.items():
        nearer, lower = (" ".join(f"{value:+.2f}" for value in part) for part in parts)
        print(f"against {METHODS[base].label}: points of coverage nearer to 90 % {nearer}; score lower by {lower}")
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    if any(getattr(args, option) != parser.get_default(option) for option in ("mixing", "repeats", "steps", "seeds")):
        return 0
    won = all(min(nearer) >= NEARER and min(lower) >= LOWER for nearer, lower in ahead.values())
    claimed = f"on every seed at least {NEARER} points nearer to 90 % and a score lower by {LOWER} than both baselines"
    print(f"{'passed' if won else 'FAILED'}: {claimed}")
    return 0 if won else 1


if __name__ == "__main__":
    raise SystemExit(main())
