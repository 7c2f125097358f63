"""Learn what terrain costs from the ways that travellers took: a softened Bellman-Ford, written as in a textbook.

Maps of 6 x 6 cells, each road, grass, forest or swamp. On every map somebody went from one corner to the other
along a shortest path (where several tie, their mean). The paths are seen, the costs are not (a road is 1, to set the
unit). The program computes the least cost of a map by Bellman and Ford's recursion, ``best = min(best, distance)``;
the gradient of its answer in the cell costs is the path. Under ``so.soften`` the minimum is soft, and the gradient is
a mean of paths. What is minimized,

    <costs, observed path> - least cost(costs),

has the gradient "observed path minus mean path": a Fenchel-Young loss, by Danskin's theorem. The strength falls from
0.5 to 0.05, so that at the end the mean is nearly the shortest path itself.

With the program as written the same loss is that of the structured perceptron. It stops as soon as the paths agree,
wherever that is: on new maps its costs give fewer of the true paths, and they are farther from the truth.

    python examples/shortest_path.py                 # three seeds, a table and a figure, some minutes
    python examples/shortest_path.py --maps 30
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import smoothops as so

KINDS = {"road": 1.0, "grass": 2.3, "forest": 4.1, "swamp": 7.6}
SIDE, SWEEPS, FAR = 6, 12, 1000.0
FIRST, LAST = 0.5, 0.05  # eps at the first and at the last step
CLAIM = 0.96  # of new maps on which the learned costs give the true path, on each seed
OFF = 0.2  # claimed: no learned cost is farther from the truth, relatively
COLOURS = ["#dcdcdc", "#a9cf8f", "#4d8b57", "#6b6fa8"]
LABELS = {"soft": "soften", "hard": "as written"}


# --- the program, as a textbook has it --------------------------------------------------------------------------------


def bellman_ford(cost):
    """The least sum of cell costs from the first to the last corner; cost[i][j] of a cell."""
    n = len(cost)
    distance = [[FAR] * n for _ in range(n)]
    distance[0][0] = cost[0][0]
    for _ in range(SWEEPS):
        before = [list(row) for row in distance]
        for i in range(n):
            for j in range(n):
                if i + j > 0:
                    best = FAR
                    for k, m in ((i - 1, j), (i, j - 1), (i, j + 1), (i + 1, j)):
                        if 0 <= k < n and 0 <= m < n:
                            best = min(best, before[k][m])
                    distance[i][j] = cost[i][j] + best
    return distance[-1][-1]


# --- learning ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Kinds of the cells and the cells of the shortest paths: (maps, SIDE, SIDE) each."""

    kinds: Tensor
    paths: Tensor


def least(program, costs: Tensor) -> Tensor:
    """(maps, SIDE, SIDE) -> (maps,): all maps at once, a cell is a vector of its costs."""
    return program([list(row.unbind(-1)) for row in costs.unbind(-2)])


def shortest(kinds: Tensor, costs: Tensor) -> Tensor:
    """The shortest paths, the mean of those that tie: the gradient of the ordinary program."""
    cells = costs[kinds].detach().requires_grad_()
    return torch.autograd.grad(least(so.soften(bellman_ford).hard, cells).sum(), cells)[0]


def make_data(maps: int, seed: int) -> Data:
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, len(KINDS), (maps, SIDE, SIDE), generator=g)
    return Data(kinds, shortest(kinds, torch.tensor(list(KINDS.values()), dtype=torch.float64)))


def fit(data: Data, steps: int, soft: bool, advance=lambda: None) -> Tensor:
    """Adam on the logarithms of all costs but the road's, from the same cost everywhere."""
    logs = torch.full((len(KINDS) - 1,), 1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=0.15 if soft else 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        eps = FIRST * (LAST / FIRST) ** (step / steps)
        softened = so.soften(smoothing=so.Entropy(eps))(bellman_ford)
        costs = torch.cat([torch.ones(1, dtype=torch.float64), logs.exp()])[data.kinds]
        d = least(softened if soft else softened.hard, costs)
        loss = ((costs * data.paths).sum((-2, -1)) - d).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    return torch.cat([torch.ones(1, dtype=torch.float64), logs.exp()]).detach()


def accuracy(costs: Tensor, test: Data) -> float:
    """The share of maps on which the path that the learned costs give is a shortest one; many maps have several."""
    truth = torch.tensor(list(KINDS.values()), dtype=torch.float64)[test.kinds]
    more = (truth * (shortest(test.kinds, costs) - test.paths)).sum((-2, -1))
    return (more < 1e-9).double().mean().item()


# --- the experiment ---------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    costs: dict[str, Tensor]
    accuracy: dict[str, float]


def run(seed: int, args: argparse.Namespace, advance=lambda: None) -> Result:
    data, test = make_data(args.maps, seed), make_data(500, seed + 1000)
    costs = {name: fit(data, args.steps, name == "soft", advance) for name in LABELS}
    return Result(costs, {name: accuracy(costs[name], test) for name in LABELS})


def table(results: dict[int, Result]) -> str:
    lines = [f"{'cost':8}{'truth':>7}" + "".join(f"{label:>24}" for label in LABELS.values())]
    for k, (kind, true) in enumerate(KINDS.items()):
        found = [" ".join(f"{r.costs[name][k]:6.2f}" for r in results.values()).rjust(24) for name in LABELS]
        lines.append(f"{kind:8}{true:7.2f}" + "".join(found))
    shares = [" ".join(f"{r.accuracy[name]:6.3f}" for r in results.values()).rjust(24) for name in LABELS]
    return "\n".join([*lines, f"{'true paths':15}" + "".join(shares)])


# --- figure -----------------------------------------------------------------------------------------------------------


def draw_map(axes: Axes, seed: int, eps: float) -> None:
    """One map, and the mean of paths that the softened program goes."""
    kinds = make_data(1, seed).kinds
    cells = torch.tensor(list(KINDS.values()), dtype=torch.float64)[kinds].requires_grad_()
    program = so.soften(smoothing=so.Entropy(eps))(bellman_ford)
    path = torch.autograd.grad(least(program, cells).sum(), cells)[0][0]
    axes.imshow(kinds[0], cmap=ListedColormap(COLOURS), vmin=0, vmax=3)
    for i in range(SIDE):
        for j in range(SIDE):
            axes.plot(j, i, "o", color="black", ms=13 * float(path[i, j].clamp(0, 1)) ** 0.5)
    axes.set(xticks=[], yticks=[], title=f"path at eps {eps:g}")


def draw(results: dict[int, Result], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    seed = next(iter(results))
    draw_map(first, seed, 0.01)
    draw_map(second, seed, 1.0)
    for shift, name in ((-0.1, "soft"), (0.1, "hard")):
        for k in range(1, len(KINDS)):
            costs = [float(r.costs[name][k]) for r in results.values()]
            colour = "#1b6ca8" if name == "soft" else "#c8553d"
            third.plot([k + shift] * len(costs), costs, "o", color=colour, ms=6, label=LABELS[name] if k == 1 else None)
            third.plot([k - 0.3, k + 0.3], [list(KINDS.values())[k]] * 2, color="black", lw=1)
    third.set(xticks=range(1, len(KINDS)), xticklabels=list(KINDS)[1:], ylabel="cost, a road is 1")
    third.set_title("Learned costs; lines: the truth")
    third.legend(frameon=False)
    third.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- main -------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--maps", type=int, default=200, help="with an observed path")
    add("--steps", type=int, default=60, help="of Adam")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each is a new set of maps")
    add("--threads", type=int, default=1, help="torch threads")
    add("--out", type=Path, default=Path("out/shortest_path.png"), help="where the figure goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, begun = make_parser(), time.perf_counter()
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tqdm(total=2 * args.steps * len(args.seeds), unit="step", desc="learning") as progress:
        results = {seed: run(seed, args, progress.update) for seed in args.seeds}
    print(f"\n{table(results)}\n")
    draw(results, args.out)
    print(f"{time.perf_counter() - begun:.0f} s; the figure is {args.out}")
    if any(getattr(args, o) != parser.get_default(o) for o in ("maps", "steps", "seeds")):
        return 0
    return check(results)


def check(results: dict[int, Result]) -> int:
    """0 if what is claimed holds on each seed, else 1."""
    soft, hard = ([r.accuracy[name] for r in results.values()] for name in LABELS)
    truth = torch.tensor(list(KINDS.values()), dtype=torch.float64)
    off = max(float((r.costs["soft"] / truth - 1).abs().max()) for r in results.values())
    won = min(soft) >= CLAIM and off <= OFF and all(s > h for s, h in zip(soft, hard, strict=True))
    print(
        f"{'passed' if won else 'FAILED'}: the true path on {min(soft):.3f} of new maps or more (claimed: {CLAIM}), "
        f"as written on {min(hard):.3f} or more; costs at most {100 * off:.0f} % off (claimed: {100 * OFF:.0f})"
    )
    return int(not won)


if __name__ == "__main__":
    raise SystemExit(main())
