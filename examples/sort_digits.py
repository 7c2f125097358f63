"""Learn to sort handwritten numbers from nothing but the order of small sets.

A number is a few digit images side by side; a small network scores each number of a set, and the only supervision is
the set's true order. ``so.rank`` turns the scores into soft ranks, whose squared error to the true ranks has a useful
gradient; a Fenchel-Young loss over the permutahedron is a convex alternative. Beside them: two regressions of the rank
that need no ranking operator, and a reader trained on the labels of single digits, as an upper bound.

    python examples/sort_digits.py                       # three seeds of every method, a table and a figure
    python examples/sort_digits.py --smoothing entropy:1 --loss squared --seeds 7

Source of the experiment: Grover et al. 2019, "Stochastic optimization of sorting networks via continuous relaxations".
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from tqdm import tqdm

import smoothops as so

TEST_SIZES, SHOWN = (3, 5, 7, 9), 9  # the figure draws the first test set of the size SHOWN
EVALUATED = 1000  # validation sets, and test sets of each size
BATCH, LOOK_EVERY = 64, 50  # sets in a step; steps between two looks at the validation sets

# --- data: sets of numbers made of digit images -----------------------------------------------------------------------


class Sets(NamedTuple):
    """Labelled sets: pixels (sets, n, digits, 64), digit labels (sets, n, digits), ranks 1..n (sets, n)."""

    images: Tensor
    digits: Tensor
    ranks: Tensor

    def take(self, index: Tensor | int) -> Sets:
        return Sets(*(part[index] for part in self))


def draw_images(images: Tensor, labels: Tensor, digits: Tensor, generator: Generator) -> Tensor:
    """For each entry of ``digits`` a random one of the images (m, 64) with that label: (..., 64)."""
    by_label, counts = labels.argsort(stable=True), labels.bincount(minlength=10)
    nth = (torch.rand(digits.shape, generator=generator) * counts[digits]).long()
    return images[by_label[(counts.cumsum(0) - counts)[digits] + nth]]


def split(total: int, generator: Generator) -> tuple[Tensor, ...]:
    """Disjoint indices of the images for training (60 %), validation and test (20 % each)."""
    return torch.randperm(total, generator=generator).tensor_split((total * 3 // 5, total * 4 // 5))


def draw_numbers(count: int, n: int, digits: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sets of n distinct numbers, (count, n), and the window (first, width) that each lies in, (count, 2).

    The width is log-uniform in [max(10, 2n), 10^digits] and the offset uniform: were all windows wide, a number by
    itself would tell its rank.
    """
    top = 10**digits
    narrowest = min(max(10, 2 * n), top)
    u = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    width = (narrowest * (top / narrowest) ** u[:, :1]).round()
    first = ((top - width + 1) * u[:, 1:]).floor()
    number = torch.arange(top)
    inside = (number >= first) & (number < first + width)
    keys = torch.rand(count, top, generator=generator).masked_fill(~inside, -1)
    return keys.topk(n).indices, torch.cat([first, width], -1).long()


def draw_sets(images: Tensor, labels: Tensor, count: int, n: int, digits: int, generator: Generator) -> Sets:
    numbers, _ = draw_numbers(count, n, digits, generator)
    written = numbers.unsqueeze(-1) // 10 ** torch.arange(digits - 1, -1, -1) % 10
    pictures = draw_images(images, labels, written, generator)
    return Sets(pictures, written, so.rank(numbers.float(), smoothing=so.Hard()))


# --- methods: a network, a loss of its output, and the scores that its output means -----------------------------------


def encoder() -> tuple[nn.Module, ...]:
    return nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU()


def scorer(digits: int) -> nn.Sequential:
    """(sets, n, digits, 64) -> a score for each number, (sets, n), from the encodings of its digits side by side."""
    head = nn.Linear(16 * digits, 64), nn.ReLU(), nn.Linear(64, 1)
    return nn.Sequential(*encoder(), nn.Flatten(-2), *head, nn.Flatten(-2))


def reader(digits: int) -> nn.Sequential:
    """(sets, n, digits, 64) -> logits of each digit, (sets, n, digits, 10)."""
    return nn.Sequential(*encoder(), nn.Linear(16, 10))


def expected_number(logits: Tensor) -> Tensor:
    return logits.softmax(-1) @ torch.arange(10.0) @ 10.0 ** torch.arange(logits.shape[-2] - 1, -1, -1)


def squared_error(scores: Tensor, sets: Sets, smoothing: so.Smoothing) -> Tensor:
    return (so.rank(scores, smoothing=smoothing) - sets.ranks).square().mean()


def fenchel_young(scores: Tensor, sets: Sets, smoothing: so.Smoothing) -> Tensor:
    """max_C(theta) - <theta, y>, with gradient soft ranks - y; never negative, as Omega is 0 at the vertices."""
    orders = so.Permutahedron(torch.arange(1.0, scores.shape[-1] + 1))
    return (orders.max(scores, smoothing) - (scores * sets.ranks).sum(-1)).mean()


def rank_regression(scores: Tensor, sets: Sets, _: None) -> Tensor:
    return (scores - sets.ranks).square().mean()


def centred_regression(scores: Tensor, sets: Sets, _: None) -> Tensor:
    return (scores - sets.ranks).var(-1, correction=0).mean()  # a constant of the set does not matter


def digit_cross_entropy(logits: Tensor, sets: Sets, _: None) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), sets.digits.flatten())


@dataclass(frozen=True)
class Method:
    """A way to learn an order: a loss of what a model gives, with learning rate and weight decay."""

    label: str
    colour: str
    loss: Callable[[Tensor, Sets, so.Smoothing | None], Tensor]
    rate: float
    decay: float
    smoothing: so.Smoothing | None = None
    model: Callable[[int], nn.Module] = scorer
    standardize: bool = False  # give the loss scores of unit deviation in each set

    def scores(self, output: Tensor) -> Tensor:
        return output if self.model is scorer else expected_number(output)


# Tuned alike: rate, decay (and smoothing) of the best exact match on the validation sets of other seeds, 100 to 106.
METHODS = {
    "squared": Method("soft rank, squared error", "#1b6ca8", squared_error, 0.01, 0.1, so.Quadratic(0.1)),
    "fenchel-young": Method("soft rank, Fenchel-Young", "#17a398", fenchel_young, 0.01, 0.01, so.Quadratic(0.1)),
    "centred": Method("centred rank regression", "#e08e2b", centred_regression, 0.02, 0.3),
    "plain": Method("rank regression", "#c8553d", rank_regression, 0.003, 0.01),
    "labels": Method("digit labels (bound)", "#8a8f98", digit_cross_entropy, 0.05, 0.01, None, reader),
}
OURS, BASELINES = ("squared", "fenchel-young"), ("centred", "plain")


@dataclass(frozen=True)
class Job:
    """One method on one seed. The data depend on the seed alone: all methods of a seed see the same sets."""

    name: str
    method: Method
    seed: int
    digits: int = 2
    n: int = 5
    sets: int = 1000
    steps: int = 1500


class Result(NamedTuple):
    """What a run gave. Rates are pairs: exact match, element-wise."""

    job: Job
    rates: dict[int, tuple[float, float]]  # by the size of the test sets
    shown: list[float]  # scores of the test set that the figure draws
    losses: list[float]  # mean training loss since the last look
    looks: list[float]  # exact match on the validation sets at each look


def make_data(seed: int, digits: int, n: int, sets: int) -> tuple[Sets, Sets, dict[int, Sets]]:
    """Training sets, validation sets, and test sets by size."""
    bunch, generator = load_digits(), Generator().manual_seed(seed)
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    train, validation, test = ((images[part], labels[part]) for part in split(len(labels), generator))
    return (
        draw_sets(*train, sets, n, digits, generator),
        draw_sets(*validation, EVALUATED, n, digits, generator),
        {size: draw_sets(*test, EVALUATED, size, digits, generator) for size in sorted({*TEST_SIZES, n})},
    )


def match_rates(scores: Tensor, ranks: Tensor) -> tuple[float, float]:
    """The share of sets ordered without a mistake, and of items in their right place. A tie is a mistake."""
    right = so.rank(scores, smoothing=so.Hard()) == ranks
    return right.all(-1).double().mean().item(), right.double().mean().item()


def fit(job: Job, train: Sets, validation: Sets) -> tuple[nn.Module, list[float], list[float]]:
    """AdamW with a cosine schedule: the model as it was when best on the validation sets; losses; validation rates."""
    torch.manual_seed(job.seed)
    method, model = job.method, job.method.model(job.digits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.rate, weight_decay=method.decay, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    best, kept, losses, looks = (-1.0, -1.0), model.state_dict(), [], []
    for step in range(1, job.steps + 1):
        batch = train.take(torch.randint(job.sets, (BATCH,)))
        output = model(batch.images)
        if method.standardize:
            output = output / output.std(-1, keepdim=True).clamp(min=1e-6)
        loss = method.loss(output, batch, method.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % LOOK_EVERY == 0 or step == job.steps:
            with torch.no_grad():
                rates = match_rates(method.scores(model(validation.images)), validation.ranks)
            looks.append(rates[0])
            if rates > best:
                best, kept = rates, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model, [part.mean().item() for part in torch.tensor(losses).split(LOOK_EVERY)], looks


def run(job: Job) -> Result:
    train, validation, tests = make_data(job.seed, job.digits, job.n, job.sets)
    model, losses, looks = fit(job, train, validation)
    with torch.no_grad():
        scores = {size: job.method.scores(model(sets.images)) for size, sets in tests.items()}
    rates = {size: match_rates(scores[size], sets.ranks) for size, sets in tests.items()}
    return Result(job, rates, scores[SHOWN][0].tolist(), losses, looks)


def run_all(jobs: Sequence[Job], workers: int, threads: int) -> dict[str, list[Result]]:
    """The results of each method, one for each seed; ``workers`` runs at a time, each in a process of its own."""
    torch.set_num_threads(threads)
    spawn = multiprocessing.get_context("spawn")
    pool = spawn.Pool(min(workers, len(jobs)), torch.set_num_threads, (threads,)) if workers > 1 else nullcontext()
    results: dict[str, list[Result]] = {job.name: [] for job in jobs}
    with pool as processes:
        done = processes.imap(run, jobs) if processes else map(run, jobs)
        for result in tqdm(done, total=len(jobs), unit="run", desc="training"):
            results[result.job.name].append(result)
    return results


# --- report and figure ------------------------------------------------------------------------------------------------


def rates_table(results: dict[str, list[Result]]) -> str:
    """Exact match and element-wise rates by set size, the mean over seeds, in percent."""
    sizes = list(results["labels"][0].rates)
    rows = {"exact match / element-wise, %": [f"n = {n}" for n in sizes]}
    for runs in results.values():
        means = [(fmean(run.rates[n][0] for run in runs), fmean(run.rates[n][1] for run in runs)) for n in sizes]
        rows[runs[0].job.method.label] = [f"{100 * exact:4.1f} / {100 * items:4.1f}" for exact, items in means]
    rows["chance"] = [f"{100 / math.factorial(n):4.1f} / {100 / n:4.1f}" for n in sizes]
    return "\n".join(f"{label:30}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows.items())


def margins(results: dict[str, list[Result]], n: int) -> dict[str, list[float]]:
    """By how many points of exact match on test sets of n each of ours is ahead of each baseline, seed by seed."""
    exact = {name: torch.tensor([100 * run.rates[n][0] for run in runs]) for name, runs in results.items()}
    pairs = [(ours, base) for ours in OURS for base in BASELINES if ours in exact]
    return {f"{METHODS[a].label} over {METHODS[b].label}": (exact[a] - exact[b]).tolist() for a, b in pairs}


def margins_table(ahead: dict[str, list[float]], seeds: Sequence[int], n: int) -> str:
    rows = {f"points of exact match ahead, n = {n}": [*(f"seed {seed}" for seed in seeds), "mean"]}
    rows |= {pair: [f"{value:+.1f}" for value in (*points, fmean(points))] for pair, points in ahead.items()}
    return "\n".join(f"{label:52}" + "".join(f"{cell:>9}" for cell in cells) for label, cells in rows.items())


def draw_curve(axes: Axes, at: Sequence[int], curves: Sequence[Sequence[float]], method: Method) -> None:
    """The mean over seeds as a line, the range between them shaded."""
    values, style = np.array(curves), "-" if method.model is scorer else "--"
    axes.plot(at, values.mean(0), style, color=method.colour, lw=2, label=method.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.fill_between(at, values.min(0), values.max(0), color=method.colour, alpha=0.15, lw=0)


def draw_orders(axes: Axes, sets: Sets, orders: dict[str, Tensor]) -> None:
    """One set in several orders, a row each, from the lowest score to the highest."""
    n, digits, wide, high = *sets.digits.shape, 0.9, 0.84
    for row, (label, scores) in enumerate(orders.items()):
        order = scores.argsort()
        right = sets.ranks[order] == torch.arange(1, n + 1)
        for place, item in enumerate(order.tolist()):
            picture, left, top = np.hstack(sets.images[item].reshape(-1, 8, 8).numpy()), place + 0.05, row + 0.08
            axes.imshow(picture, cmap="gray_r", extent=(left, left + wide, top + high, top), interpolation="nearest")
            edge, width = ("#d9dce1", 1.0) if right[place] else ("#d1495b", 2.4)
            axes.add_patch(Rectangle((left, top), wide, high, fill=False, ec=edge, lw=width, zorder=3))
        axes.text(-0.1, row + 0.5, label, ha="right", va="center")
        axes.text(n + 0.1, row + 0.5, f"{int(right.sum())} of {n}" if row else "", ha="left", va="center")
    axes.set(xlim=(0, n), ylim=(len(orders), 0), aspect=wide / high / digits)
    axes.set_title(f"The first test set of {n}, lowest to highest; misplaced numbers framed in red")
    axes.set_axis_off()


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """The figure: rates by set size, training curves, and a test set of the first seed as each method orders it."""
    figure = Figure(figsize=(13, 9.2), layout="constrained")
    panels = figure.subplot_mosaic([["rates", "looks", "losses"], ["orders"] * 3], height_ratios=[1, 1.15])
    job, sizes = results["labels"][0].job, list(results["labels"][0].rates)
    steps = [min(start + LOOK_EVERY, job.steps) for start in range(0, job.steps, LOOK_EVERY)]
    sets = make_data(job.seed, job.digits, job.n, job.sets)[2][SHOWN].take(0)
    orders = {"true order": sets.ranks}
    for runs in results.values():
        method = runs[0].job.method
        draw_curve(panels["rates"], sizes, [[100 * run.rates[n][0] for n in sizes] for run in runs], method)
        draw_curve(panels["looks"], steps, [[100 * rate for rate in run.looks] for run in runs], method)
        draw_curve(panels["losses"], steps, [[loss / run.losses[0] for loss in run.losses] for run in runs], method)
        orders[method.label] = torch.tensor(runs[0].shown)
    panels["rates"].plot(sizes, [100 / math.factorial(n) for n in sizes], ":", color="black", label="chance")
    panels["rates"].set(title="Test sets fully sorted, %", xlabel="numbers in a set", xticks=sizes, ylim=(0, 100))
    panels["looks"].set(title=f"Validation sets of {job.n} fully sorted, %", xlabel="training step", ylim=(0, 100))
    panels["losses"].set(title="Training loss, relative to its start", xlabel="training step", yscale="log")
    draw_orders(panels["orders"], sets, orders)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    figure.legend(*panels["rates"].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


SMOOTHINGS: dict[str, Callable[[float], so.Smoothing]] = {
    "quadratic": so.Quadratic,
    "entropy": so.Entropy,
    "laplace": so.Laplace,
    "mixing": lambda inputs: so.Quadratic(so.Mixing(inputs)),
    "straight-through": lambda eps: so.StraightThrough(so.Quadratic(eps)),
}


def parse_smoothing(text: str) -> so.Smoothing:
    """``name:number``, such as quadratic:0.1."""
    name, _, number = text.partition(":")
    if name not in SMOOTHINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:NUMBER with a name of {', '.join(SMOOTHINGS)}")
    return SMOOTHINGS[name](float(number))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--digits", type=int, default=2, choices=(1, 2, 3, 4), help="digits of a number")
    add("--n", type=int, default=5, help="numbers in a training set")
    add("--sets", type=int, default=1000, help="training sets")
    add("--smoothing", type=parse_smoothing, help=f"of the soft ranks: {', '.join(SMOOTHINGS)}, such as entropy:1")
    add("--standardize", action="store_true", help="the scores of a set, or mixing and straight-through collapse them")
    add("--loss", choices=(*OURS, "both"), default="both", help="on the soft ranks")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new split and a run of every method")
    add("--steps", type=int, default=1500, help=f"training steps, on batches of {BATCH} sets")
    add("--workers", type=int, default=2, help="processes")
    add("--threads", type=int, default=1, help="torch threads of each process")
    add("--out", type=Path, default=Path("out/sort_digits.png"), help="where the figure goes")
    return parser


def make_jobs(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Job]:
    """The runs that the options ask for; the baselines and the bound are always among them."""
    if not 2 <= args.n <= 10**args.digits:
        parser.error(f"--n must lie in [2, {10**args.digits}] for the numbers of a set to differ, got {args.n}")
    methods = {name: method for name, method in METHODS.items() if name not in OURS or args.loss in (name, "both")}
    if args.loss != "squared" and not isinstance(args.smoothing, so.Quadratic | so.Entropy | None):
        parser.error("the Fenchel-Young loss needs Quadratic or Entropy as its smoothing; add --loss squared")
    for name in methods.keys() & OURS:
        smoothing = args.smoothing or METHODS[name].smoothing
        methods[name] = replace(METHODS[name], smoothing=smoothing, standardize=args.standardize)
    size = (args.digits, args.n, args.sets, args.steps)
    return [Job(name, method, seed, *size) for name, method in methods.items() for seed in args.seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    results = run_all(make_jobs(args, parser), args.workers, args.threads)
    ahead = margins(results, args.n)
    print(f"\n{rates_table(results)}\n\n{margins_table(ahead, args.seeds, args.n)}\n")
    draw(results, args.out)
    print(f"{time.perf_counter() - begun:.0f} s ({sum(os.times()[:4]):.0f} s of CPU); the figure is {args.out}")
    experiment = ("digits", "n", "sets", "smoothing", "standardize", "loss", "seeds", "steps")
    if any(getattr(args, option) != parser.get_default(option) for option in experiment):
        return 0
    lost = [f"{pair}: {min(points):+.1f}" for pair, points in ahead.items() if min(points) <= 0]
    print(f"FAILED, not ahead on every seed: {'; '.join(lost)}" if lost else "passed: ahead of both on every seed")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
