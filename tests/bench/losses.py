"""Times the ranking losses against ApproxNDCG and NeuralNDCG: ``python -m tests.bench.losses [--quick]``.

They are allRank's own functions where its code is there (``pip install --no-deps allRank``; what its loss files import
from its data loader and storage clients is replaced by the one name each that they use), else the same formulations
written below. All run in one process, on one thread, in float32, forward and backward, and take turns: a few calls of
ours, of which the median counts, then one of theirs. A time is a median over the turns, a ratio the median of the
ratios within a turn. Memory is the growth of the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import smoothops as so

Loss = Callable[[Tensor, Tensor], Tensor]

# --- the contestants --------------------------------------------------------------------------------------------------


def ideal_dcg(gains: Tensor) -> Tensor:
    places = torch.arange(1, gains.shape[-1] + 1, dtype=gains.dtype)
    return (gains.sort(-1, descending=True).values / torch.log2(1 + places)).sum(-1).clamp(min=1e-10)


def approx_ndcg(scores: Tensor, labels: Tensor) -> Tensor:
    """allRank's approxNDCGLoss: sort by score, all differences, sigmoids summed into positions. alpha = 1."""
    s, order = scores.sort(descending=True, dim=-1)
    y = labels.gather(-1, order)
    pairs = torch.isfinite(y[:, :, None] - y[:, None, :])
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    gains = (torch.exp2(y) - 1) / ideal_dcg(torch.exp2(labels) - 1)[:, None]
    gaps = s[:, :, None] - s[:, None, :]
    gaps[~pairs] = 0
    places = 1 + (pairs.float() * torch.sigmoid(-gaps).clamp(min=1e-10)).sum(-1)
    return -(gains / torch.log2(1 + places)).sum(-1).mean()


def sinkhorn(p: Tensor, rounds: int = 50, tol: float = 1e-6) -> Tensor:
    for _ in range(rounds):
        p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-10)
        p = p / p.sum(dim=2, keepdim=True).clamp(min=1e-10)
        if (p.sum(dim=2) - 1).abs().max() < tol and (p.sum(dim=1) - 1).abs().max() < tol:
            break
    return p


def neural_ndcg(scores: Tensor, labels: Tensor) -> Tensor:
    """allRank's neuralNDCG: the deterministic NeuralSort matrix at temperature 1, scaled by Sinkhorn, on the gains."""
    n, s = scores.shape[1], scores.unsqueeze(-1)
    distances = (s - s.mT).abs()
    b = distances @ torch.ones(n, 1).expand(n, n)
    scaling = (n + 1 - 2 * torch.arange(1, n + 1)).to(s.dtype)
    p = torch.softmax((s @ scaling.unsqueeze(0) - b).mT, -1)
    gains = torch.exp2(labels) - 1
    placed = (sinkhorn(p) @ gains.unsqueeze(-1)).squeeze(-1)
    discounts = 1 / torch.log2(torch.arange(n, dtype=s.dtype) + 2)
    return -((placed * discounts).sum(-1) / ideal_dcg(gains)).mean()


def allrank() -> dict[str, Loss]:
    """allRank's own functions by name, {} where it is not installed."""
    if importlib.util.find_spec("allrank") is None:
        return {}
    for module, name, value in (
        ("allrank.data.dataset_loading", "PADDED_Y_VALUE", -1),
        ("allrank.models.model_utils", "get_torch_device", lambda: torch.device("cpu")),
    ):
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, value)
    losses = importlib.import_module("allrank.models.losses")
    return {"ApproxNDCG": losses.approxNDCGLoss, "NeuralNDCG": losses.neuralNDCG}


FORMULATIONS = {"ApproxNDCG": approx_ndcg, "NeuralNDCG": neural_ndcg}


def with_exponential_gain(loss: Callable[..., Tensor], **options: object) -> Loss:
    return lambda s, y: loss(s, y, gain=so.metrics.exponential_gain, **options)


OURS: dict[str, Loss] = {
    "ndcg": with_exponential_gain(so.losses.ndcg),
    "ndcg, k=10": with_exponential_gain(so.losses.ndcg, k=10),
    "ndcg, eps 0.1": with_exponential_gain(so.losses.ndcg, smoothing=0.1),
    "average_precision": so.losses.average_precision,
    "reciprocal_rank": so.losses.reciprocal_rank,
    "spearman": so.losses.spearman,
    "auc": so.losses.auc,
    "list_net": so.losses.list_net,
    "list_mle": so.losses.list_mle,
    "rank_net": so.losses.rank_net,
    "lambda_rank": so.losses.lambda_rank,
    "approx_ndcg": with_exponential_gain(so.losses.approx_ndcg, temperature=1.0),
    "kendall": so.losses.kendall,
    "pairwise_accuracy": so.losses.pairwise_accuracy,
}

# --- measuring --------------------------------------------------------------------------------------------------------


def lists(batch: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(batch, n, generator=generator, dtype=dtype).requires_grad_()
    return scores, torch.randint(0, 5, (batch, n), generator=generator).to(dtype)


def seconds(loss: Loss, scores: Tensor, labels: Tensor) -> float:
    scores.grad = None
    start = time.perf_counter()
    loss(scores, labels).backward()
    return time.perf_counter() - start


def check(rivals: dict[str, Loss]) -> None:
    """The contestants and the losses of the package by the same names give the same numbers."""
    scores, labels = lists(3, 20, torch.float64)
    ours = {"ApproxNDCG": OURS["approx_ndcg"], "NeuralNDCG": with_exponential_gain(so.losses.neural_ndcg)}
    with torch.no_grad():
        for name, loss in ours.items():
            for theirs in (rivals[name], FORMULATIONS[name]):
                found = 1 + theirs(scores.float(), labels.float()).double()
                torch.testing.assert_close(found, loss(scores, labels), rtol=0, atol=1e-5)


def contest(n: int, batch: int, turns: int, rivals: dict[str, Loss]) -> Iterator[tuple[str, str, list[float]]]:
    """(ours, theirs, [seconds of ours, seconds of ours straight after theirs, seconds of theirs, ratio])."""
    scores, labels = lists(batch, n)
    for rival, theirs in rivals.items():
        for name in ("ndcg", "ndcg, eps 0.1", "ndcg, k=10"):
            seconds(OURS[name], scores, labels)
            seconds(theirs, scores, labels)
            found = []
            for _ in range(turns if rival == "ApproxNDCG" else max(2, turns // 8)):
                first, *warm = (seconds(OURS[name], scores, labels) for _ in range(7))
                mine, other = statistics.median(warm), seconds(theirs, scores, labels)
                found.append((mine, first, other, other / mine))
            yield name, rival, [statistics.median(column) for column in zip(*found, strict=True)]


def alone(n: int, batch: int, calls: int) -> Iterator[tuple[str, float]]:
    scores, labels = lists(batch, n)
    for name, loss in OURS.items():
        seconds(loss, scores, labels)
        yield name, statistics.median(seconds(loss, scores, labels) for _ in range(calls))


def peak() -> float:
    """MB held at most since :func:`forget`; Linux. ru_maxrss would carry over that of the parent process."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def grown(name: str, n: int) -> tuple[float, float]:
    """MB by which one call, forward and backward on a list of n, raises the peak; and its seconds."""
    loss = OURS[name]
    loss(*lists(1, 1000)).backward()
    scores, labels = lists(1, n)
    forget()
    before = peak()
    spent = seconds(loss, scores, labels)
    return peak() - before, spent


def in_a_fresh_process(name: str, n: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.losses", "--grown", name, str(n)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(found[0]), float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls, no lists of 100 000")
    parser.add_argument(
        "--pairwise", action="store_true", help="the O(n^2) losses at 100 000 items too: many minutes each"
    )
    parser.add_argument("--grown", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grown:
        print(*grown(options.grown[0], int(options.grown[1])))
        return
    rivals = allrank()
    print("allRank's own functions" if rivals else "allRank is not installed: its formulations, written here")
    rivals = rivals or FORMULATIONS
    check(rivals)
    print("\n| ours | theirs | ours, ms | first call after theirs, ms | theirs, ms | theirs / ours |")
    print("|---|---|---:|---:|---:|---:|")
    for name, rival, (mine, first, other, ratio) in contest(800, 8, 4 if options.quick else 24, rivals):
        times = f"{1e3 * mine:.2f} | {1e3 * first:.2f} | {1e3 * other:.0f}"
        print(f"| {name} | {rival} | {times} | {ratio:.0f} |", flush=True)
    print("\n| 8 lists of 800 | ms |\n|---|---:|")
    for name, spent in alone(800, 8, 3 if options.quick else 15):
        print(f"| {name} | {1e3 * spent:.2f} |", flush=True)
    if options.quick:
        return
    quadratic = ("rank_net", "lambda_rank", "approx_ndcg", "kendall", "pairwise_accuracy")
    print("\n| one list | items | MB | s | twice the items, MB |\n|---|---:|---:|---:|---:|")
    for name in OURS:
        n = 100_000 if name not in quadratic or options.pairwise else 10_000
        memory, spent = in_a_fresh_process(name, n)
        double = in_a_fresh_process(name, 2 * n)[0]
        print(f"| {name} | {n} | {memory:.0f} | {spent:.2f} | {double:.0f} |", flush=True)


if __name__ == "__main__":
    main()
