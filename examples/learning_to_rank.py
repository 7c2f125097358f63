"""Learn to rank: train on a soft NDCG, and compare with the losses that learning to rank usually trains on.

A query is the image of a handwritten digit, seen with noise and with a quarter missing. Its documents are 40 other
images, 10 of them of the same digit, and their relevance is graded: 0 for another digit, else 1 to 3 by how near the
clean images are. A small network embeds queries and documents, the score is their product, and the question is how
high the relevant documents come: NDCG@10 on queries and documents never trained on.

    python examples/learning_to_rank.py                    # three seeds, a table and a figure
    python examples/learning_to_rank.py --documents 80 --noise 0.5
    python examples/learning_to_rank.py --tune             # how the options of every loss were chosen

The network, the batches and the optimizer are the same for every loss. Each has two options, tuned over nine
combinations on the validation queries of two other seeds: the learning rate, and the scale of the scores that go into
the loss (the inverse of its temperature); for soft NDCG, which does not depend on the scale, how many items its ranks
mix.
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
COLOURS |= {"regression": "#8a8f98"}
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


# --- losses of scores and grades, (queries, documents) ------------------------------------------------------------------

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
}
RATES, SCALES, MIXINGS = (0.002, 0.005, 0.015), (0.3, 1.0, 3.0), (3.0, 8.0, 20.0)
# the learning rate, and the scale of the scores or the number of items mixed: what --tune prints
TUNED = {name: (0.005, 8.0 if name == "soft ndcg" else 1.0) for name in LOSSES}

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
    """For each loss the nine combinations, by NDCG@10 on the validation queries of two seeds that are not reported."""
    data = {seed: make_data(seed, args.documents, args.noise)[:2] for seed in (100, 101)}
    for name, make in LOSSES.items():
        options = itertools.product(RATES, MIXINGS if name == "soft ndcg" else SCALES)
        found = {
            option: fmean(fit(make(option[1]), option[0], *parts, args.steps, s)[1] for s, parts in data.items())
            for option in tqdm(list(options), desc=name)
        }
        for option, score in sorted(found.items(), key=lambda item: -item[1]):
            print(
                f"{name:12} rate {option[0]:<6} {'mixing' if name == 'soft ndcg' else 'scale'} {option[1]:<4} {score:.4f}"
            )


# --- experiment -------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Networks and their NDCG@10 on the test queries, by loss."""

    models: dict[str, Matcher]
    scores: dict[str, float]
    test: Queries


def run(seed: int, args: argparse.Namespace, advance: Callable[[], object]) -> Result:
    train, validation, test = make_data(seed, args.documents, args.noise)
    models = {}
    for name, (rate, option) in TUNED.items():
        models[name] = fit(LOSSES[name](option), rate, train, validation, args.steps, seed)[0]
        advance()
    return Result(models, {name: evaluate(model, test) for name, model in models.items()}, test)
