"""Classify digits with a deep equilibrium layer, against an explicit network with as many parameters.

The layer is the fixed point of one map, as if it were applied infinitely often:

    z = tanh(W z + U x + b),   logits = V z + c,

with W scaled so that its spectral norm is at most 0.95: then the map contracts, and the fixed point exists and is
unique. ``implicit.Equilibrium`` finds it by Anderson's method and differentiates it by the implicit function theorem:
the backward pass needs one evaluation of the map, however many steps the forward pass took.

The explicit network has the same matrices as two hidden layers, tanh(W tanh(U x + b)). The unrolled one applies the
same map 30 times and differentiates all of them.

What is due to what: these small images ask for no more than two layers. The equilibrium is as accurate as they are,
within half a point and either way from seed to seed, and as the unrolled network. What it saves is memory; what it
costs is time: a training step takes as long as one through 30 unrolled steps, forty times that of the explicit network.

    python examples/equilibrium.py               # three seeds, a table and a figure
    python examples/equilibrium.py --width 64

Source: Bai, Kolter and Koltun 2019, "Deep equilibrium models".
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from tqdm import tqdm

import implicit

BATCH, STEPS = 64, 30  # images in a training step; applications of the map in the unrolled network
LARGEST = 0.95  # spectral norm of W
BEHIND = 0.5  # claimed: points of test accuracy, in the mean over seeds, by which ours is behind the others at most
LESS = 8.0  # claimed: how many times less memory than the unrolled network it keeps for the backward pass
TOLERANCES = [10.0**-exponent for exponent in range(1, 7)]
UNROLLED = (1, 5, 10, 20, STEPS, 45, 60)
AS_TRAINED = {"explicit": 0, "unrolled": UNROLLED.index(STEPS), "equilibrium": 2}  # place among the costs
LABELS = {
    "explicit": "explicit, two layers",
    "unrolled": f"unrolled, {STEPS} steps",
    "equilibrium": "equilibrium (ours)",
}
COLOURS = {"explicit": "#e08e2b", "unrolled": "#8a8f98", "equilibrium": "#1b6ca8"}

# --- data -------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images with values in [0, 1], (images, 64), and what they show."""

    images: Tensor
    labels: Tensor


def make_data(seed: int) -> tuple[Digits, Digits]:
    """Training (80 %) and test images. Nothing is selected: each network is tested as it is after its last epoch."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    train, test = (Digits(images[part], labels[part]) for part in order.tensor_split([len(order) * 4 // 5]))
    return train, test


# --- networks ---------------------------------------------------------------------------------------------------------


class Contraction(nn.Module):
    """z, u -> tanh(W z + u), W scaled down to a spectral norm of 0.95 where it is larger."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, width).weight.detach().clone())

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        scale = (LARGEST / torch.linalg.matrix_norm(self.weight, 2)).clamp(max=1)
        return torch.tanh(z @ (scale * self.weight).mT + u)


class Network(nn.Module, ABC):
    """The three networks differ in ``hidden`` alone: U x + b -> z. All have the same parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inject, self.map, self.head = nn.Linear(64, width), Contraction(width), nn.Linear(width, 10)

    @abstractmethod
    def hidden(self, u: Tensor) -> Tensor:
        """The last hidden layer z."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.inject(images)))


class Explicit(Network):
    """W is free here: nothing has to contract."""

    def hidden(self, u: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(u) @ self.map.weight.mT)


class Unrolled(Network):
    steps = STEPS

    def hidden(self, u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(self.steps):
            z = self.map(z, u)
        return z


class Equilibrium(Network):
    """``taken`` are the steps of each image in the last batch."""

    def __init__(self, width: int, tolerance: float = TOLERANCES[2]) -> None:
        super().__init__(width)
        self.layer = implicit.Equilibrium(
            self.map, rtol=tolerance, atol=tolerance, linear=implicit.GMRES(rtol=tolerance), info=True
        )

    def hidden(self, u: Tensor) -> Tensor:
        z, info = self.layer(u)
        self.taken = info.iterations
        return z


NETWORKS: dict[str, Callable[[int], Network]] = {
    "explicit": Explicit,
    "unrolled": Unrolled,
    "equilibrium": Equilibrium,
}


def loss(network: Network, data: Digits) -> Tensor:
    return nn.functional.cross_entropy(network(data.images), data.labels)


@torch.no_grad()
def accuracy(network: Network, data: Digits) -> float:
    """In percent."""
    return 100 * (network(data.images).argmax(1) == data.labels).double().mean().item()


# --- what is measured -------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A network after training: its test accuracy after each epoch, and the steps that its images took, if any."""

    accuracy: list[float]
    taken: list[float]
    network: Network


def train(name: str, seed: int, args: argparse.Namespace) -> Result:
    """AdamW with a cosine schedule; the settings are the same for all, and the starting values too."""
    data, test = make_data(seed)
    torch.manual_seed(seed)
    network, generator = NETWORKS[name](args.width), Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.rate)
    batches = len(data.labels) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * batches)
    result = Result([], [], network)
    for _ in range(args.epochs):
        order, taken = torch.randperm(len(data.labels), generator=generator), []
        for index in order.split(BATCH)[:batches]:
            optimizer.zero_grad()
            loss(network, Digits(data.images[index], data.labels[index])).backward()
            optimizer.step()
            schedule.step()
            if isinstance(network, Equilibrium):
                taken.append(network.taken.double().mean().item())
        result.accuracy.append(accuracy(network, test))
        result.taken.extend([fmean(taken)] if taken else [])
    return result


def kept(network: Network, data: Digits) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once; parameters and data do not count.

    Neither do the vectors of GMRES, which live during the backward pass alone: 8 kB for each of its steps.
    """
    old = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *data)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in old:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(network, data)
    total = sum(storage.nbytes() for storage in storages.values())
    value.backward()
    return total


def seconds(network: Network, data: Digits, repeats: int = 7) -> float:
    """The median time of a forward and a backward pass."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        loss(network, data).backward()
        times.append(time.perf_counter() - begun)
    return median(times)


class Cost(NamedTuple):
    """Of one training step, by the number of times that the map is applied."""

    steps: list[float]
    kilobytes: list[float]
    milliseconds: list[float]


def costs(networks: dict[str, Network], data: Digits) -> dict[str, Cost]:
    """The unrolled network with more and more steps; the equilibrium with smaller and smaller tolerances."""
    out = {name: Cost([], [], []) for name in LABELS}

    def add(name: str, network: Network, steps: float) -> None:
        values = (steps, kept(network, data) / 1024, 1000 * seconds(network, data))
        for part, value in zip(out[name], values, strict=True):
            part.append(value)

    add("explicit", networks["explicit"], 2)
    unrolled = networks["unrolled"]
    for unrolled.steps in UNROLLED:
        add("unrolled", unrolled, unrolled.steps)
    unrolled.steps = STEPS
    for tolerance in TOLERANCES:
        network = Equilibrium(unrolled.head.in_features, tolerance)
        network.load_state_dict(networks["equilibrium"].state_dict())
        network(data.images)
        add("equilibrium", network, network.taken.double().mean().item())
    return out


Results = dict[str, list[Result]]  # of each network, one for each seed

# --- report and figure ------------------------------------------------------------------------------------------------


def table(results: Results, spent: dict[str, Cost], seeds: Sequence[int]) -> str:
    """Test accuracy seed by seed; then what a training step costs, as trained (for ours at a tolerance of 1e-3)."""
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "parameters", "steps", "kept, kB", "ms a step"]
    lines = [f"{'test accuracy, %':24}" + "".join(f"{head:>{max(9, len(head) + 2)}}" for head in heads)]
    for name, runs in results.items():
        ends = [run.accuracy[-1] for run in runs]
        size = sum(parameter.numel() for parameter in runs[0].network.parameters())
        steps, kilobytes, milliseconds = (part[AS_TRAINED[name]] for part in spent[name])
        accuracies = "".join(f"{value:9.2f}" for value in (*ends, fmean(ends)))
        lines.append(f"{LABELS[name]:24}{accuracies}{size:12d}{steps:9.1f}{kilobytes:10.1f}{milliseconds:11.1f}")
    return "\n".join(lines)


def draw_accuracy(axes: Axes, results: Results) -> None:
    """The mean over seeds, their range shaded."""
    for name, runs in results.items():
        values = torch.tensor([run.accuracy for run in runs])
        epochs = torch.arange(1, values.shape[1] + 1)
        axes.plot(epochs, values.mean(0), color=COLOURS[name], lw=2.2, ls=":" if name == "unrolled" else "-")
        axes.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.13, lw=0)
    axes.set(title="Test accuracy, %", xlabel="epoch", ylim=(90, 99), xticks=epochs[4::5])


def draw_cost(axes: Axes, spent: dict[str, Cost], part: str) -> None:
    for name, cost in spent.items():
        at, values = cost.steps, getattr(cost, part)
        axes.plot(at, values, "-o", color=COLOURS[name], lw=2, ms=4, label=LABELS[name])
        axes.plot(at[AS_TRAINED[name]], values[AS_TRAINED[name]], "o", color=COLOURS[name], ms=9)
    axes.set(xlabel="applications of the map in the forward pass", ylim=(0, None), xlim=(0, None))


def draw(results: Results, spent: dict[str, Cost], path: Path) -> None:
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_accuracy(left, results)
    draw_cost(middle, spent, "kilobytes")
    middle.set_title(f"Kept for the backward pass, kB ({BATCH} images)")
    draw_cost(right, spent, "milliseconds")
    right.set_title("Time of a training step, ms")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=32, help="hidden units")
    add("--epochs", type=int, default=20, help="passes through the training images")
    add("--rate", type=float, default=0.01, help="learning rate at the start")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new split and new starting values")
    add("--out", type=Path, default=Path("out/equilibrium.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: Results = {name: [] for name in LABELS}
    with tqdm(total=len(args.seeds) * len(LABELS), unit="network", desc="training") as progress:
        for seed in args.seeds:
            for name, runs in results.items():
                runs.append(train(name, seed, args))
                progress.update()
    data, _ = make_data(args.seeds[0])
    spent = costs({name: runs[0].network for name, runs in results.items()}, Digits(*(part[:BATCH] for part in data)))
    print(f"\n{table(results, spent, args.seeds)}\n")
    draw(results, spent, args.out)
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    if any(getattr(args, option) != parser.get_default(option) for option in ("width", "epochs", "rate", "seeds")):
        return 0
    means = {name: fmean(run.accuracy[-1] for run in runs) for name, runs in results.items()}
    behind = max(means.values()) - means["equilibrium"]
    memory, less = spent["equilibrium"].kilobytes, spent["unrolled"].kilobytes[AS_TRAINED["unrolled"]]
    won = behind <= BEHIND and len(set(memory)) == 1 and less >= LESS * memory[0]
    print(f"{'passed' if won else 'FAILED'}: mean accuracy at most {BEHIND} points behind the others ({behind:.2f}),")
    print(f"kept memory the same at every tolerance, and {LESS:.0f} times less than unrolled ({less / memory[0]:.1f})")
    return 0 if won else 1


if __name__ == "__main__":
    raise SystemExit(main())
