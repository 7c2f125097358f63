"""Denoise images with a median filter whose window weights, rank weights and softness are learned.

A median filter ranks the pixels of a window and keeps the middle one. Here ``so.rank`` gives each pixel a soft weighted
rank, a learned curve over the ranks says how much a pixel of that rank counts (at first only the middle ones do), and
the output is the weighted mean. Because soft ranks have a gradient, the window weights, which decide the ranks, and the
strength eps, which decides how soft they are, are learned with the rest; 28 numbers in all.

    python examples/median_filter.py                     # three seeds, a table and a figure
    python examples/median_filter.py --impulses 0.2 --size 5

Sources: Brownrigg 1984, "The weighted median filter"; Palmieri and Boncelet 1989, "Ll-filters, a new class of order
statistic filters", for coefficients that depend on both place and rank.
"""

from __future__ import annotations

import argparse
import copy
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

BATCH, LOOK_EVERY = 32, 25  # images in a step; steps between two looks at the validation images
MARGIN = 1.0  # dB by which the learned filter must be ahead of every fixed and linear filter on each seed
SHOWN = 6  # test images in the figure
COLOURS = {"median": "#c8553d", "weighted": "#e08e2b", "gaussian": "#d9a441"}
COLOURS |= {"linear": "#8a8f98", "hard": "#17a398", "soft": "#1b6ca8"}

# --- data -------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Digit images with values in [0, 1], (images, 8, 8), and what is left of them."""

    clean: Tensor
    noisy: Tensor


def split(total: int, generator: Generator) -> tuple[Tensor, ...]:
    """Disjoint indices of the images for training (60 %), validation and test (20 % each)."""
    return torch.randperm(total, generator=generator).tensor_split((total * 3 // 5, total * 4 // 5))


def corrupt(clean: Tensor, deviation: float, impulses: float, generator: Generator) -> Tensor:
    """Gaussian noise, then a share of the pixels black or white (salt and pepper), clipped to [0, 1]."""
    noisy = clean + deviation * torch.randn(clean.shape, generator=generator)
    hit = torch.rand(clean.shape, generator=generator) < impulses
    salt = torch.rand(clean.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(clean), noisy).clamp(0, 1)


def make_data(seed: int, deviation: float, impulses: float) -> tuple[Images, Images, Images]:
    """Training, validation and test images, each with noise of its own."""
    generator = Generator().manual_seed(seed)
    clean = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    noisy = corrupt(clean, deviation, impulses, generator)
    train, validation, test = (Images(clean[part], noisy[part]) for part in split(len(clean), generator))
    return train, validation, test


def windows(images: Tensor, size: int) -> Tensor:
    """The size x size neighbourhood of each pixel, (images, 8, 8, size^2); the border is repeated outwards."""
    padded = nn.functional.pad(images.unsqueeze(1), (size // 2,) * 4, mode="replicate").squeeze(1)
    return padded.unfold(1, size, 1).unfold(2, size, 1).flatten(-2)


def psnr(clean: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, -10 log10 of the mean squared error; the peak is 1."""
    return -10 * (clean - image.clamp(0, 1)).square().mean((-2, -1)).log10()


# --- filters: functions of images (images, 8, 8) ----------------------------------------------------------------------

Filter = Callable[[Tensor], Tensor]


def median(copies: Tensor) -> Filter:
    """The median of a window of which each pixel counts as so many copies, (size, size) integers."""
    places = torch.arange(copies.numel()).repeat_interleave(copies.flatten())
    return lambda images: so.median(windows(images, len(copies))[..., places], -1, smoothing=so.Hard())


def gaussian(deviation: float, size: int = 7) -> Filter:
    weights = torch.exp(-(torch.arange(size) - size // 2).square() / (2 * deviation**2))
    kernel = torch.outer(weights, weights).flatten()
    return lambda images: windows(images, size) @ (kernel / kernel.sum())


def least_squares(train: Images, size: int) -> Filter:
    """The linear filter with a constant that has the least squared error on the training images."""

    def inputs(images: Tensor) -> Tensor:
        pixels = windows(images, size)
        return torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)

    design = inputs(train.noisy).flatten(0, -2).double()
    solution = torch.linalg.lstsq(design, train.clean.flatten().double().unsqueeze(-1)).solution
    return lambda images: inputs(images) @ solution.squeeze(-1).float()


class SoftMedian(nn.Module):
    """The learned filter: pixel j of a window counts w_j exp(curve(rank_j)), ranks taken with the weights w.

    The curve is linear between its values at ranks 1 to n; the middle pixel of the window has a curve of its own, so
    that the filter can leave it alone unless its rank is extreme. It begins as a median with equal weights.
    """

    def __init__(self, size: int = 3, smoothing: so.Smoothing | None = None) -> None:
        super().__init__()
        self.size, self.smoothing, n = size, smoothing, size * size
        ranks = torch.linspace(-1, 1, n)
        self.curves = nn.Parameter(-(ranks.expand(2, n) * 3).square())
        self.log_weights = nn.Parameter(torch.zeros(n))
        self.log_eps = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("row", (torch.arange(n) == n // 2).long())

    def weights(self) -> Tensor:
        """Positive, with mean 1."""
        return self.log_weights.softmax(0) * len(self.log_weights)

    def ranks(self, values: Tensor) -> Tensor:
        return so.rank(values, weights=self.weights(), smoothing=self.smoothing or so.Quadratic(self.log_eps.exp()))

    def scores(self, ranks: Tensor) -> Tensor:
        """The curves at the ranks, (..., n): linear interpolation, constant beyond 1 and n."""
        n = len(self.log_weights)
        place = (ranks - 1).clamp(0, n - 1)
        below = place.detach().floor().clamp(max=n - 2).long()
        low, high = self.curves[self.row, below], self.curves[self.row, below + 1]
        return low + (place - below) * (high - low)

    def forward(self, images: Tensor) -> Tensor:
        values = windows(images, self.size)
        return ((self.scores(self.ranks(values)) + self.log_weights).softmax(-1) * values).sum(-1)


def fit(model: SoftMedian, train: Images, validation: Images, steps: int, rate: float, seed: int) -> list[float]:
    """Adam with a cosine schedule on the squared error; the model as it was when best on the validation images."""
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    looks, best, kept = [], -torch.inf, copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        index = torch.randint(len(train.clean), (BATCH,), generator=generator)
        optimizer.zero_grad()
        (model(train.noisy[index]) - train.clean[index]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY == 0 or step == steps:
            looks.append(evaluate(model, validation))
            if looks[-1] > best:
                best, kept = looks[-1], copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return looks


@torch.no_grad()
def evaluate(denoise: Filter, images: Images) -> float:
    """The mean PSNR over images."""
    return psnr(images.clean, denoise(images.noisy)).mean().item()


# --- the experiment ---------------------------------------------------------------------------------------------------

CROSS, SQUARE, WIDE = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]), torch.ones(3, 3).long(), torch.ones(5, 5).long()
COPIES = {  # of the pixels in the weighted medians to choose from
    "cross": CROSS,
    "cross, centre x 3": CROSS + 2 * torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
    "3x3, cross x 2, centre x 3": SQUARE + CROSS + torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
    **{f"3x3, centre x {k}": SQUARE + (k - 1) * (torch.arange(9) == 4).long().view(3, 3) for k in (3, 5, 7)},
    "5x5": WIDE,
}
DEVIATIONS = [round(0.3 + 0.05 * i, 2) for i in range(15)]  # of the Gaussian filters to choose from
LABELS = {
    "noisy": "noisy image",
    "median": "median 3x3",
    "weighted": "best weighted median",
    "gaussian": "best Gaussian",
    "linear": "learned linear",
    "hard": "ours with hard ranks",
    "soft": "soft median (ours)",
}
HEADS = {  # of the columns in the figure
    "noisy": "noisy",
    "median": "median\n3x3",
    "weighted": "weighted\nmedian",
    "gaussian": "Gaussian",
    "linear": "learned\nlinear",
    "hard": "ours, hard\nranks",
    "soft": "ours",
}


class Result(NamedTuple):
    """The filters of a seed, their PSNR on the test images, and what was chosen on the validation images."""

    filters: dict[str, Filter]
    scores: dict[str, float]
    chosen: dict[str, str]
    test: Images


def choose(filters: dict[str, Filter], validation: Images) -> tuple[str, Filter]:
    """The one that is best on the validation images, with its name."""
    name = max(filters, key=lambda name: evaluate(filters[name], validation))
    return name, filters[name]


def run(seed: int, args: argparse.Namespace, advance: Callable[[], object]) -> Result:
    train, validation, test = make_data(seed, args.noise, args.impulses)
    tuned = {
        "weighted": choose({name: median(copies) for name, copies in COPIES.items()}, validation),
        "gaussian": choose({f"deviation {d}": gaussian(d) for d in DEVIATIONS}, validation),
        "linear": choose({f"{size}x{size}": least_squares(train, size) for size in (3, 5, 7)}, validation),
    }
    filters: dict[str, Filter] = {"noisy": lambda images: images, "median": median(SQUARE)}
    filters |= {name: denoise for name, (_, denoise) in tuned.items()}
    for name, smoothing in {"hard": so.Hard(), "soft": None}.items():
        filters[name] = SoftMedian(args.size, smoothing)
        fit(filters[name], train, validation, args.steps, args.rate, seed)
        advance()
    chosen = {name: best for name, (best, _) in tuned.items()}
    chosen["soft"] = f"eps {filters['soft'].log_eps.exp().item():.2f}"
    return Result(filters, {name: evaluate(denoise, test) for name, denoise in filters.items()}, chosen, test)


def table(results: dict[int, Result]) -> str:
    """PSNR on the test images, seed by seed, the mean, and by how much ours is ahead of each on the worst seed."""
    lines = [
        f"{'PSNR on test images, dB':26}" + "".join(f"{f'seed {s}':>9}" for s in results) + "     mean  ours ahead"
    ]
    for name, label in LABELS.items():
        scores = [result.scores[name] for result in results.values()]
        ahead = min(result.scores["soft"] - result.scores[name] for result in results.values())
        cells = "".join(f"{score:9.2f}" for score in (*scores, fmean(scores)))
        chosen = "; ".join(dict.fromkeys(result.chosen.get(name, "") for result in results.values()))
        lines.append(f"{label:26}{cells}" + (f"{ahead:+12.2f}  {chosen}" if name != "soft" else f"{'':14}{chosen}"))
    return "\n".join(lines)


# --- figure -----------------------------------------------------------------------------------------------------------


def draw_images(axes: Axes, result: Result) -> None:
    """A row for each test image: noisy, each filter, clean; the PSNR below each."""
    high, images = 1.14, Images(*(part[:SHOWN] for part in result.test))
    with torch.no_grad():
        columns = {HEADS[name]: denoise(images.noisy) for name, denoise in result.filters.items()}
    for x, (label, column) in enumerate((columns | {"clean": images.clean}).items()):
        axes.text(x + 0.5, -0.08, label, ha="center", va="bottom", fontsize=9)
        for y, picture in enumerate(column):
            extent = (x + 0.04, x + 0.96, high * y + 0.92, high * y)
            axes.imshow(
                picture.clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest"
            )
            axes.add_patch(Rectangle((x + 0.04, high * y), 0.92, 0.92, fill=False, ec="#d9dce1", lw=0.8))
            if label != "clean":
                score = f"{psnr(images.clean[y], picture).item():.1f}"
                axes.text(x + 0.5, high * y + 0.94, score, ha="center", va="top", fontsize=7.5, color="#5c6370")
    axes.set(xlim=(0, len(columns) + 1), ylim=(high * len(images.clean), 0), aspect="equal")
    axes.set_title("The first test images, with their PSNR in dB", pad=34)
    axes.set_axis_off()


def draw_gains(axes: Axes, results: dict[int, Result]) -> None:
    """Bars of the mean PSNR less that of the noisy images, a dot for each seed."""
    filtered = [name for name in LABELS if name != "noisy"]
    for y, name in enumerate(filtered):
        gains = [result.scores[name] - result.scores["noisy"] for result in results.values()]
        axes.barh(y, fmean(gains), color=COLOURS[name], height=0.7)
        axes.plot(gains, [y] * len(gains), "o", color="black", ms=2.5, alpha=0.6)
        axes.text(max(0, *gains) + 0.08, y, f"{fmean(gains):+.1f}", va="center", fontsize=9)
    axes.set(yticks=range(len(filtered)), yticklabels=[LABELS[name] for name in filtered])
    axes.set_title("Gain in PSNR over the noisy image, dB")
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.margins(x=0.09)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


@torch.no_grad()
def draw_window(axes: Axes, models: Sequence[SoftMedian]) -> None:
    """The learned window weights, the mean over seeds."""
    size = models[0].size
    weights = torch.stack([model.weights() for model in models]).mean(0)
    axes.imshow(weights.view(size, size).numpy(), cmap="Blues", vmin=0, vmax=1.4 * weights.max().item())
    for place, weight in enumerate(weights.tolist()):
        axes.text(place % size, place // size, f"{weight:.2f}", ha="center", va="center", fontsize=33 / size)
    axes.set(title="Learned window weights", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@torch.no_grad()
def draw_curves(axes: Axes, models: Sequence[SoftMedian]) -> None:
    """The learned log weights of the ranks, the mean over seeds and a thin line for each; 0 is the others' highest."""
    ranks = torch.arange(1, models[0].size ** 2 + 1)
    curves = torch.stack([model.curves - model.curves[0].max() for model in models])
    for row, (label, colour) in enumerate([("other pixels", "#8a8f98"), ("middle pixel", "#1b6ca8")]):
        axes.plot(ranks, curves[:, row].T, color=colour, lw=0.6, alpha=0.5)
        axes.plot(ranks, curves[:, row].mean(0), color=colour, lw=2.2, label=label)
    axes.plot(ranks, SoftMedian(models[0].size).curves[0], "--", color="#c8553d", lw=1.2, label="at the start")
    axes.set(
        title="Learned log weight of a rank", xlabel="soft rank in the window", xticks=ranks[:: models[0].size - 1]
    )
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[int, Result], path: Path) -> None:
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["images", "gains", "gains"], ["images", "window", "curves"]],
        width_ratios=[2.35, 0.75, 1],
        height_ratios=[1, 1],
    )
    models = [result.filters["soft"] for result in results.values()]
    draw_images(panels["images"], next(iter(results.values())))
    draw_gains(panels["gains"], results)
    draw_window(panels["window"], models)
    draw_curves(panels["curves"], models)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--noise", type=float, default=0.1, help="deviation of the Gaussian noise")
    add("--impulses", type=float, default=0.1, help="share of black and white pixels")
    add("--size", type=int, default=3, choices=(3, 5), help="of the window of the learned filter")
    add("--steps", type=int, default=600, help=f"training steps, on batches of {BATCH} images")
    add("--rate", type=float, default=0.1, help="learning rate, tuned on the validation images of seeds 100 and 101")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new split, new noise and a new training")
    add("--threads", type=int, default=1, help="torch threads")
    add("--out", type=Path, default=Path("out/median_filter.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tqdm(total=2 * len(args.seeds), unit="run", desc="training") as progress:
        results = {seed: run(seed, args, progress.update) for seed in args.seeds}
    print(f"\n{table(results)}\n")
    draw(results, args.out)
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    experiment = ("noise", "impulses", "size", "steps", "rate", "seeds")
    if any(getattr(args, option) != parser.get_default(option) for option in experiment):
        return 0
    rivals = [name for name in LABELS if name not in ("soft", "hard")]
    ahead = min(result.scores["soft"] - result.scores[name] for result in results.values() for name in rivals)
    word = "passed" if ahead >= MARGIN else "FAILED"
    print(
        f"{word}: at least {ahead:.2f} dB ahead of every fixed and linear filter on every seed; claimed is {MARGIN} dB"
    )
    return int(ahead < MARGIN)


if __name__ == "__main__":
    raise SystemExit(main())
