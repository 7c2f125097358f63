"""Draws the pictures of the documentation into docs/img. Run as ``python docs/figures.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import choice_figures
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import smoothops as so

IMAGES = Path(__file__).parent / "img"
STRENGTHS = (0.02, 0.3, 1.0, 3.0)
COLORS = plt.get_cmap("viridis")([0.0, 0.35, 0.65, 0.9])

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})


def sweep(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f and its derivative at each entry of x."""
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def two_rows(name: str, columns: dict[str, Callable[[Tensor, float], Tensor]], x: Tensor, unit: dict[str, str]) -> None:
    """Value above, derivative below, one column an operator, one curve an eps."""
    figure, axes = plt.subplots(2, len(columns), figsize=(3.6 * len(columns), 4.8), sharex=True, layout="constrained")
    for column, (title, f) in enumerate(columns.items()):
        for eps, color in zip(STRENGTHS, COLORS, strict=True):
            value, slope = sweep(lambda v, f=f, eps=eps: f(v, eps), x)
            axes[0, column].plot(x, value, color=color, label=f"eps = {eps:g}", lw=1.8)
            axes[1, column].plot(x, slope, color=color, lw=1.8)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel(f"$x_1$   (eps in {unit[title]})")
    # a jump of the hard limit would dwarf every other slope
    for ax in axes[1]:
        high = ax.get_ylim()[1]
        ax.set_ylim(-0.05 * min(high, 3), min(high, 3))
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("derivative in $x_1$")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / name)
    plt.close(figure)


def with_others(x: Tensor, others: tuple[float, ...]) -> Tensor:
    """Rows (x_i, others...)."""
    return torch.cat([x[:, None], torch.tensor(others, dtype=x.dtype).expand(len(x), -1)], 1)


def operators() -> None:
    x = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    others = (-1.0, 0.5)
    columns = {
        "argmax, Entropy: $y_1$": lambda v, e: so.argmax(with_others(v, others), 1, smoothing=so.Entropy(e))[:, 0],
        "argmax, Quadratic: $y_1$": lambda v, e: so.argmax(with_others(v, others), 1, smoothing=so.Quadratic(e))[:, 0],
        "rank, Quadratic: $y_1$": lambda v, e: so.rank(with_others(v, others), smoothing=so.Quadratic(e))[:, 0],
        "sort, Quadratic: middle": lambda v, e: so.sort(with_others(v, others), smoothing=so.Quadratic(e))[:, 1],
    }
    unit = dict.fromkeys(columns, "units of $x$")
    unit["sort, Quadratic: middle"] = "1/units of $x$"
    two_rows("operators.png", columns, x, unit)


def masks() -> None:
    x = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    others = (-1.0, 0.5, 1.5)
    regularizers = (so.Quadratic, so.Entropy, so.BinaryEntropy, so.Laplace)
    columns = {
        f"topk_mask, {r.__name__}": lambda v, e, r=r: so.topk_mask(with_others(v, others), 2, smoothing=r(e))[:, 0]
        for r in regularizers
    }
    two_rows("masks.png", columns, x, dict.fromkeys(columns, "units of $x$"))


def mixing() -> None:
    """Which share of the entries has a gradient, against n, for fixed eps and for Mixing."""
    sizes = [3, 10, 30, 100, 300, 1000, 3000]
    choices: dict[str, so.Smoothing] = {f"eps = {e:g}": so.Quadratic(e) for e in (0.001, 0.1, 10.0)}
    choices["Mixing(3), the default"] = so.Quadratic(so.Mixing(3.0))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
    torch.manual_seed(0)
    for (label, smoothing), color in zip(choices.items(), COLORS, strict=True):
        alive, error = [], []
        for n in sizes:
            x = torch.randn(max(4, 3000 // n), n, dtype=torch.float64, requires_grad=True)
            soft = so.rank(x, smoothing=smoothing)
            (slope,) = torch.autograd.grad((soft * torch.randn_like(soft)).sum(), x)
            alive.append((slope != 0).double().mean().item())
            error.append(((soft - so.rank(x, smoothing=so.Hard())).abs().mean() / n).item())
        style = {"color": color, "lw": 2.6 if "Mixing" in label else 1.6, "marker": "o", "ms": 3.5}
        axes[0].semilogx(sizes, alive, label=label, **style)
        axes[1].loglog(sizes, [max(e, 1e-8) for e in error], **style)
    axes[0].set(
        xlabel="n", ylabel="entries with a gradient", ylim=(-0.03, 1.03), title="dead where eps is too small ..."
    )
    axes[1].set(xlabel="n", ylabel="|soft - hard rank| / n", title="... blurred where it is too large")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=len(choices))
    figure.savefig(IMAGES / "mixing.png")
    plt.close(figure)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for draw in (operators, masks, mixing, choice_figures.window, choice_figures.training):
        draw()
        print("drew", draw.__name__)


if __name__ == "__main__":
    main()
