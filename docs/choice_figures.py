"""The pictures of how_to_choose.md: what a strength does to training. Run by ``python docs/figures.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import smoothops as so

IMAGES = Path(__file__).parent / "img"
FAMILIES = {"Quadratic": so.Quadratic, "Entropy": so.Entropy, "Laplace": so.Laplace}
COLORS = {"Quadratic": "#1b6ca8", "Entropy": "#e08e2b", "Laplace": "#3a9d6e"}
DEFAULT, ANNEALED = "#3b3f46", "#c8553d"
SPREAD = torch.logspace(-2.5, 2, 19, dtype=torch.float64).tolist()  # eps over the standard deviation of the scores


def window() -> None:
    """Gradient that reaches the items, and error against the hard ranks, for eps over four decades."""
    x = torch.randn(100, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hard = so.rank(x, smoothing=so.Hard())
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    for name, family in FAMILIES.items():
        reached, error = [], []
        for eps in SPREAD:
            jacobian = [torch.func.jacrev(lambda v, f=family(eps): so.rank(v, smoothing=f))(row) for row in x[:10]]
            reached.append((torch.stack([j.diagonal() for j in jacobian]) > 1e-3).double().mean().item())
            error.append((so.rank(x, smoothing=family(eps)) - hard).abs().mean().item())
        axes[0].plot(SPREAD, reached, color=COLORS[name], label=name)
        axes[1].plot(SPREAD, error, color=COLORS[name])
    axes[0].set_title("share of items that receive a gradient", fontsize=10)
    axes[1].set_title("mean error of the soft rank (50 items)", fontsize=10)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlabel("eps / standard deviation of the scores")
    axes[1].axhline((hard - 25.5).abs().mean(), color="#999999", lw=1, ls=":")
    axes[1].text(SPREAD[0], (hard - 25.5).abs().mean() - 0.9, "all ranks equal", fontsize=8, color="#777777")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(IMAGES / "choose_window.png")
    plt.close(figure)


def lists(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Lists of 20 items with 8 features, and the ranks that a noisy linear score gives them."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, generator=torch.Generator().manual_seed(99))
    features = torch.randn(number, 20, 8, generator=generator)
    scores = features @ truth + torch.randn(number, 20, generator=generator)
    return features, so.rank(scores, smoothing=so.Hard())


def spearman_after(smoothing: Callable[[], so.Smoothing | float | None], seed: int, steps: int = 150) -> float:
    """Train a linear scorer on squared errors of soft ranks; the hard Spearman correlation on new lists."""
    torch.manual_seed(seed)
    features, ranks = lists(seed, 30)
    model = nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        scores = model(features).squeeze(-1)
        scores = scores / scores.std().detach().clamp(min=1e-6)  # so that eps has a meaning
        loss = (so.rank(scores, smoothing=smoothing()) - ranks).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, ranks = lists(seed + 100, 200)
    with torch.no_grad():
        return so.metrics.spearman(model(features).squeeze(-1), ranks).item()


def threshold_after(smoothing: Callable[[], so.Smoothing | float], start: float, steps: int = 300) -> float:
    """Fit t in ``3 if x > t else 1`` to 60 answers; the distance from where they change, 0.3."""
    x = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    answers = torch.where(x > 0.3, 3.0, 1.0)
    t = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.Adam([t], lr=0.05)
    for _ in range(steps):
        answer = so.cond(so.gt(x, t, smoothing=smoothing()), lambda: 3.0, lambda: 1.0)
        optimizer.zero_grad()
        (answer - answers).square().mean().backward()
        optimizer.step()
    below, above = x[x <= 0.3].max(), x[x > 0.3].min()  # between them, every t is right
    return max(0.0, (below - t).item(), (t - above).item())


def training() -> None:
    """What is learned at the end, for eps over four decades: a threshold in an ``if``, and a ranking."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained")
    strengths, least = SPREAD[::2], 1e-3
    for start, style in ((-2.0, "-"), (-0.5, "--"), (2.0, ":")):
        missed = [max(least, threshold_after(lambda e=eps: e, start)) for eps in strengths]
        axes[0].plot(strengths, missed, color=COLORS["Entropy"], ls=style, label=f"fixed, started at {start:g}")
        schedule = so.nn.Anneal(1.0, 0.01, 300)
        annealed = threshold_after(lambda s=schedule: (s.step(), s.eps)[1], start)
        axes[0].plot([0.01, 1.0], [max(least, annealed)] * 2, color=ANNEALED, lw=3, alpha=0.6)
    axes[0].plot([], [], color=ANNEALED, lw=3, alpha=0.6, label="annealed from 1 to 0.01, each start")
    axes[0].set_yscale("log")
    axes[0].set_ylim(least / 2, 200)
    axes[0].set_title("error of a learned threshold (1e-3: none)", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    for name, family in FAMILIES.items():
        found = [sum(spearman_after(lambda e=eps, f=family: f(e), s) for s in range(3)) / 3 for eps in strengths]
        axes[1].plot(strengths, found, color=COLORS[name], label=name)
    default = sum(spearman_after(lambda: None, s) for s in range(3)) / 3
    axes[1].axhline(default, color=DEFAULT, lw=1, ls="--", label="the default, Mixing(3)")
    axes[1].set_title("Spearman correlation on new lists", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlabel("eps / standard deviation")
    figure.savefig(IMAGES / "choose_training.png")
    plt.close(figure)
