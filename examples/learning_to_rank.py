"""Learn to rank: train on soft NDCG, and compare with the losses that learning to rank usually trains on.

A query is the image of a handwritten digit, seen with noise and with a quarter missing. Its documents are 40 other
images, 10 of them of the same digit, and their relevance is graded: 0 for another digit, else 1 to 3 by how near the
clean images are. A small network embeds queries and documents, the score is their product, and the question is how
high the relevant documents come: NDCG@10 on queries and documents never trained on.

    python examples/learning_to_rank.py                    # three seeds, a table and a figure
    python examples/learning_to_rank.py --documents 80 --noise 0.5
    python examples/learning_to_rank.py --tune             # how the options of every loss were chosen

The network, the batches and the optimizer are the same for every loss. Each has two options, tuned over 18
combinations on the validation queries of two other seeds: the learning rate, and the scale of the scores that go into
the loss (the inverse of its temperature); for soft NDCG, which does not depend on the scale, how many items its ranks
mix.

What comes out: as tuned, the convex losses are ahead, ListNet most; from a random start NDCG is hard to climb, for soft
NDCG as for ApproxNDCG. But their options hold for one scale of the scores. Every loss is trained a second time with
the network's scores times 1000: soft NDCG, whose strength follows the scores, does not notice; all others fall behind.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from tqdm import tqdm

import smoothops as so

BATCH, LOOK_EVERY, CUT = 32, 25, 10  # queries in a step; steps between two looks at the validation queries; the k
ALIKE = 10  # documents of the query's digit
COLOURS = {"soft ndcg": "#1b6ca8", "list_net": "#17a398", "lambda_rank": "#e08e2b", "rank_net": "#c8553d"}
COLOURS |= {"regression": "#8a8f98", "approx_ndcg": "#8d6cab"}
GRADES = ["#e4e6ea", "#bcd7ea", "#6fa8d0", "#1b6ca8"]

# --- data -------------------------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """Query images as seen, (queries, 64), their documents (queries, documents, 64), grades (queries, documents)."""

    seen: Tensor
    documents: Tensor
    grades: Tensor


def degrade(images: Tensor, noise: float, generator: Generator) -> Tensor:
    """Noise, and one of the four quarters of each image black."""
    corner = torch.randint(0, 2, (2, len(images), 1, 1), generator=generator)
    row, column = torch.arange(8).view(1, 8, 1) // 4, torch.arange(8).view(1, 1, 8) // 4
    noisy = images.view(-1, 8, 8) + noise * torch.randn(len(images), 8, 8, generator=generator)
    return torch.where((row == corner[0]) & (column == corner[1]), 0, noisy).flatten(1)


def grade(distances: Tensor, alike: Tensor) -> Tensor:
    """0 for another digit; 3, 2, 1 for the nearest three, the next three and the others of the same digit."""
    place = torch.where(alike, distances, torch.inf).argsort(-1).argsort(-1)
    return torch.where(alike, (3 - place // 3).clamp(min=1), 0).float()


def make_queries(images: Tensor, digits: Tensor, documents: int, noise: float, generator: Generator) -> Queries:
    """Each image once as a query, with ``ALIKE`` documents of its digit and others, drawn from the same images."""
    alike = digits.unsqueeze(0) == digits.unsqueeze(1)
    alike.fill_diagonal_(False)
    other = digits.unsqueeze(0) != digits.unsqueeze(1)
    chosen = [
        torch.rand(alike.shape, generator=generator).where(mask, -1).topk(count, -1).indices
        for mask, count in ((alike, ALIKE), (other, documents - ALIKE))
    ]
    index = torch.cat(chosen, -1)
    index = index.gather(-1, torch.rand(index.shape, generator=generator).argsort(-1))  # in no order
    shown = images[index]
    distances = (shown - images.unsqueeze(1)).norm(dim=-1)
    same = digits[index] == digits.unsqueeze(1)
    return Queries(degrade(images, noise, generator), shown, grade(distances, same))


def make_data(seed: int, documents: int, noise: float) -> tuple[Queries, Queries, Queries]:
    """Training (60 %), validation and test (20 % each) queries, each with documents from its own images."""
    generator = Generator().manual_seed(seed)
    data = load_digits()
    images, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    total = len(images)
    parts = torch.randperm(total, generator=generator).tensor_split((total * 3 // 5, total * 4 // 5))
    train, validation, test = (make_queries(images[p], digits[p], documents, noise, generator) for p in parts)
    return train, validation, test


# --- losses of scores and grades, (queries, documents) ----------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]


def soft_ndcg(mixing: float) -> Loss:
    return so.losses.RankingLoss(so.losses.ndcg, smoothing=so.Quadratic(so.Mixing(mixing)))


def scaled(loss: Loss) -> Callable[[float], Loss]:
    return lambda scale: lambda scores, grades: loss(scale * scores, grades)


def regression(scores: Tensor, grades: Tensor) -> Tensor:
    return (scores - grades).square().mean()


LOSSES: dict[str, Callable[[float], Loss]] = {
    "soft ndcg": soft_ndcg,
    "list_net": scaled(so.losses.list_net),
    "lambda_rank": scaled(so.losses.lambda_rank),
    "rank_net": scaled(so.losses.rank_net),
    "regression": scaled(regression),
    "approx_ndcg": scaled(lambda scores, grades: so.losses.approx_ndcg(scores, grades, temperature=1.0)),
}
RATES = (0.002, 0.005, 0.015)
SCALES, MIXINGS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), (2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
# the learning rate, and the scale of the scores or the number of items mixed: what --tune prints
TUNED = {
    "soft ndcg": (0.005, 8.0),
    "list_net": (0.015, 0.3),
    "lambda_rank": (0.005, 10.0),
    "rank_net": (0.005, 10.0),
    "regression": (0.005, 1.0),
    "approx_ndcg": (0.002, 100.0),
}

# --- model ------------------------------------------------------------------------------------------------------------


class Matcher(nn.Module):
    """The score of a document: the product of two embeddings, of the query as seen and of the document."""

    def __init__(self, width: int = 64, size: int = 24) -> None:
        super().__init__()
        self.query, self.document = (
            nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, size)) for _ in range(2)
        )

    def forward(self, seen: Tensor, documents: Tensor) -> Tensor:
        return (self.document(documents) @ self.query(seen).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def evaluate(model: nn.Module, queries: Queries) -> float:
    """NDCG@10, the mean over the queries."""
    return so.metrics.ndcg(model(queries.seen, queries.documents), queries.grades, k=CUT).item()


def fit(loss: Loss, rate: float, train: Queries, validation: Queries, steps: int, seed: int) -> tuple[Matcher, float]:
    """The network as it was when it ranked the validation queries best, and how well."""
    torch.manual_seed(seed)
    model, generator = Matcher(), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, state = -1.0, copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        batch = torch.randint(0, len(train.seen), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model(train.seen[batch], train.documents[batch]), train.grades[batch]).backward()
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY == 0 or step == steps:
            score = evaluate(model, validation)
            if score > best:
                best, state = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return model, best


def tune(args: argparse.Namespace) -> None:
    """For each loss all combinations, by NDCG@10 on the validation queries of two seeds that are not reported."""
    data = {seed: make_data(seed, args.documents, args.noise)[:2] for seed in (100, 101)}
    for name, make in LOSSES.items():
        options = itertools.product(RATES, MIXINGS if name == "soft ndcg" else SCALES)
        found = {
            option: fmean(fit(make(option[1]), option[0], *parts, args.steps, s)[1] for s, parts in data.items())
            for option in tqdm(list(options), desc=name)
        }
        second = "mixing" if name == "soft ndcg" else "scale"
        for option, score in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{name:12} rate {option[0]:<6} {second:6} {option[1]:<4} {score:.4f}")


# --- experiment -------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Networks and their NDCG@10 on the test queries, by loss: as tuned, and on scores times --factor."""

    models: dict[str, Matcher]
    scores: dict[str, float]
    magnified: dict[str, float]
    test: Queries


def run(seed: int, args: argparse.Namespace, advance: Callable[[], object]) -> Result:
    train, validation, test = make_data(seed, args.documents, args.noise)
    models, magnified = {}, {}
    for name, (rate, option) in TUNED.items():
        loss = LOSSES[name](option)
        models[name] = fit(loss, rate, train, validation, args.steps, seed)[0]
        advance()
        other = fit(lambda s, y, loss=loss: loss(args.factor * s, y), rate, train, validation, args.steps, seed)[0]
        magnified[name] = evaluate(other, test)
        advance()
    return Result(models, {name: evaluate(model, test) for name, model in models.items()}, magnified, test)


# --- results ----------------------------------------------------------------------------------------------------------


def table(results: dict[int, Result], factor: float) -> str:
    """NDCG@10 on the test queries, seed by seed and the mean, as tuned and on magnified scores."""
    seeds = "".join(f"{f'seed {s}':>9}" for s in results)
    lines = [f"{'NDCG@10 on test queries':24}{seeds}     mean | scores times {factor:g}: mean of the same"]
    for name in ordered(results):
        scores, magnified = ([getattr(r, kind)[name] for r in results.values()] for kind in ("scores", "magnified"))
        left, right = ("".join(f"{score:9.4f}" for score in (*part, fmean(part))) for part in (scores, magnified))
        lines.append(f"{name:24}{left} |{right}")
    return "\n".join(lines)


def ordered(results: dict[int, Result]) -> list[str]:
    """The losses, the best as tuned first."""
    return sorted(LOSSES, key=lambda name: -fmean(r.scores[name] for r in results.values()))


def lead(results: dict[int, Result]) -> float:
    """By how much soft NDCG is ahead of the best other loss on magnified scores, on the seed where it is least so."""
    return min(
        result.magnified["soft ndcg"] - max(score for name, score in result.magnified.items() if name != "soft ndcg")
        for result in results.values()
    )


def drift(results: dict[int, Result]) -> float:
    """By how much the magnification changes soft NDCG, at most."""
    return max(abs(result.magnified["soft ndcg"] - result.scores["soft ndcg"]) for result in results.values())


def draw_bars(axes: Axes, results: dict[int, Result], factor: float) -> None:
    """Bars of the mean, a dot for each seed; below each the same on magnified scores, paler."""
    names = ordered(results)
    for y, name in enumerate(names):
        for shift, kind, alpha in ((-0.2, "scores", 1.0), (0.2, "magnified", 0.45)):
            scores = [getattr(result, kind)[name] for result in results.values()]
            axes.barh(y + shift, fmean(scores), color=COLOURS[name], alpha=alpha, height=0.38)
            axes.plot(scores, [y + shift] * len(scores), "o", color="black", ms=2.5, alpha=0.6)
            axes.text(max(scores) + 0.01, y + shift, f"{fmean(scores):.3f}", va="center", fontsize=8)
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.set_title(f"NDCG@10 on test queries; paler: scores times {factor:g}")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


@torch.no_grad()
def draw_lists(axes: Axes, result: Result, shown: int = 4) -> None:
    """A few test queries, and the first ten documents by soft NDCG; the darker the frame, the more relevant."""
    model, test = result.models["soft ndcg"], result.test
    order = model(test.seen, test.documents).argsort(-1, descending=True)
    for row in range(shown):
        pictures = [test.seen[row], *test.documents[row, order[row, :CUT]]]
        grades = [None, *test.grades[row, order[row, :CUT]].int().tolist()]
        for column, (picture, relevance) in enumerate(zip(pictures, grades, strict=True)):
            x, y = column + (0.5 if column else 0), 1.15 * row
            axes.imshow(picture.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1, extent=(x, x + 0.9, y + 0.9, y))
            if relevance is not None:
                axes.add_patch(Rectangle((x, y), 0.9, 0.9, fill=False, ec=GRADES[relevance], lw=3))
    axes.set(xlim=(-0.1, CUT + 1.6), ylim=(1.15 * shown, -0.1), aspect="equal")
    axes.set_title("Query as seen, and its first ten documents by soft NDCG (the bluer the frame, the more relevant)")
    axes.set_axis_off()


def draw(results: dict[int, Result], factor: float, path: Path) -> None:
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
    draw_bars(left, results, factor)
    draw_lists(right, next(iter(results.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------

MARGIN, DRIFT = 0.1, 0.03  # on magnified scores soft NDCG must be so far ahead, and so near to what it is without


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=40, help=f"in a list, {ALIKE} of them of the query's digit")
    add("--noise", type=float, default=0.3, help="deviation of the noise on the query, where white is 1")
    add("--steps", type=int, default=400, help=f"training steps, on batches of {BATCH} queries")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new split, new lists and a new training")
    add("--factor", type=float, default=1000.0, help="of the scores in the second training of each loss")
    add("--threads", type=int, default=1, help="torch threads")
    add("--tune", action="store_true", help="try all combinations of the options of every loss instead")
    add("--out", type=Path, default=Path("out/learning_to_rank.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.documents <= ALIKE:
        parser.error(f"--documents must be more than the {ALIKE} of the query's digit, got {args.documents}")
    if args.tune:
        tune(args)
        return 0
    with tqdm(total=2 * len(LOSSES) * len(args.seeds), unit="run", desc="training") as progress:
        results = {seed: run(seed, args, progress.update) for seed in args.seeds}
    print(f"\n{table(results, args.factor)}\n")
    draw(results, args.factor, args.out)
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    experiment = ("documents", "noise", "steps", "seeds", "factor")
    if any(getattr(args, option) != parser.get_default(option) for option in experiment):
        return 0
    ahead, moved = lead(results), drift(results)
    held = ahead >= MARGIN and moved <= DRIFT
    print(
        f"{'passed' if held else 'FAILED'}: on scores times {args.factor:g} soft NDCG is at least {ahead:.3f} ahead of "
        f"every other loss on every seed (claimed: {MARGIN}), and within {moved:.3f} of itself (claimed: {DRIFT})"
    )
    return int(not held)


if __name__ == "__main__":
    raise SystemExit(main())
