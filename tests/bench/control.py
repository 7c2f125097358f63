"""Times soft loops and checkpoints, beside AlgoVision: ``python -m tests.bench.control [--quick]``.

AlgoVision (Petersen et al. 2021) is compared where it can be imported (``pip install --no-deps --target FOLDER
algovision`` and FOLDER on PYTHONPATH): its own examples, counting, bubble sort and shortest paths, errors against the
same equations in float64, and of the paths also against Dijkstra's. Times are medians of turns taken one after the
other, on one thread; a ratio is the median of the ratios within a turn. Memory is the growth of the peak of a fresh
process.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import importlib
import importlib.util
import itertools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import smoothops as so
from smoothops.smoothing import SmoothingLike

PLANS = {"none": None, "Sqrt()": so.Sqrt(), "Binomial(8)": so.Binomial(8)}
ROOM = 100_000  # float32 numbers of a state when memory is measured
UNREACHED = 1e12  # a distance
PLACES = [place for place in itertools.product((-1, 0, 1), repeat=2) if any(place)]  # of the cells beside one

# --- programs ---------------------------------------------------------------------------------------------------------


def bubble_sort(array: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """AlgoVision's example: sweeps over the array until one swaps nothing; the loss counts swaps."""
    n = array.shape[-1]
    swapped_at = [torch.tensor([*range(i), i + 1, i, *range(i + 2, n)]) for i in range(n - 1)]

    def sweep(state):
        array, _, swaps, t = state

        def compare(i: int, state):
            v, swapped, swaps = state
            p = so.heaviside(v[:, i] - v[:, i + 1], smoothing=1 / beta)

            def swap():
                return v.index_select(1, swapped_at[i]), torch.ones_like(swapped), swaps + 1

            return so.cond(p, swap, lambda: (v, swapped, swaps))

        return *so.fori_loop(0, n - 1 - t, compare, (array, array[:, 0] * 0, swaps)), t + 1

    zero = array[:, 0] * 0
    (array, _, swaps, _), _ = so.while_loop(lambda s: s[1], sweep, (array, zero + 1, zero, 0), n, on_fail="ignore")
    return array, swaps


def counting(x: Tensor, beta: float, *, plain: bool = False) -> Tensor:
    """AlgoVision's other example: while x < 5: x += 1. ``plain``: compared by torch.sigmoid, as AlgoVision does."""

    def below(x: Tensor) -> Tensor:
        return torch.sigmoid((5 - x) * beta) if plain else so.heaviside(5 - x, smoothing=1 / beta)

    return so.while_loop(below, lambda x: x + 1, x, 60, on_fail="ignore")[0]


def beside(x: Tensor, fill: float) -> Tensor:
    """x (b, h, w) at the eight places beside each cell, (b, h, w, 8)."""
    h, w = x.shape[1:]
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), value=fill)
    return torch.stack([wide[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i, j in PLACES], -1)


def moved(flow: Tensor) -> Tensor:
    """What arrives at each cell, (b, h, w), if flow (b, h, w, 8) leaves it for the places beside it."""
    h, w = flow.shape[1:3]
    wide = torch.nn.functional.pad(flow, (0, 0, 1, 1, 1, 1))
    return sum(wide[:, 1 - i : 1 - i + h, 1 - j : 1 - j + w, k] for k, (i, j) in enumerate(PLACES))


def shortest_paths(
    costs: Tensor, smoothing: SmoothingLike, steps: int, checkpoint: so.control.Checkpoint | None = None, *,
    until_seen: bool = False, stay: bool = False, logic: so.Logic = so.Product(),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """AlgoVision's third example, on maps (b, h, w): Bellman and Ford's distances from the first cell, then a walk back
    from the last one along the predecessors; (how surely each cell is on it, the distances).

    The example walks on when it has arrived, to and fro; ``stay`` halts it at the first cell. ``until_seen``: the walk
    is a while loop, until the first cell is known to be on the way, in place of a for loop.
    """
    start = torch.zeros_like(costs[0])
    start[0, 0] = 1
    away = 1 - start

    def sweep(i: int, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        near = beside(state[0], UNREACHED)
        before = so.argmin(near, -1, smoothing=smoothing)
        least = so.take_along_dim(near, before.unsqueeze(-2), -1).squeeze(-1)
        return away * (least + costs), before

    def back(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        on_path, here = state
        flow = (here * away if stay else here).unsqueeze(-1) * before
        return so.logical_or(on_path, here, logic=logic), moved(flow).clamp(max=1)  # a sum, rounded

    far = (away * UNREACHED).expand_as(costs)
    nowhere = costs.new_zeros(*costs.shape, len(PLACES))
    distance, before = so.fori_loop(0, steps, sweep, (far, nowhere), checkpoint=checkpoint)
    init = torch.zeros_like(costs), start.flip(0, 1).expand_as(costs)
    if until_seen:
        unseen = lambda s: so.heaviside(1 - s[0][:, 0, 0], smoothing=smoothing)  # noqa: E731
        (on_path, _), _ = so.while_loop(unseen, back, init, steps, checkpoint=checkpoint, on_fail="ignore")
    else:
        on_path, _ = so.fori_loop(0, steps, lambda i, state: back(state), init, checkpoint=checkpoint)
    return on_path, distance


def wave(x: Tensor, steps: int, checkpoint: so.control.Checkpoint | None) -> Tensor:
    """A loop that goes on with probability 1 - 1/steps: every step counts, each keeps a state or two."""
    chance = torch.full((len(x),), 1 - 1 / steps)
    return so.while_loop(
        lambda s: chance, lambda s: (s * 1.01).sin(), x, steps, checkpoint=checkpoint, on_fail="ignore"
    )[0]


def their_bubble_sort(beta: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    av = importlib.import_module("algovision")
    swap = [av.Let("array", [lambda i: i + 1], "a"), av.Let("array", ["i"], "b")]
    swap += [av.Let("swapped", 1.0), av.Let("loss", lambda loss: loss + 1.0)]
    compare = [
        av.Let("a", "array", ["i"]),
        av.Let("b", "array", [lambda i: i + 1]),
        av.If(av.GT("a", "b"), if_true=swap),
    ]
    loop = av.While(
        av.IsTrue("swapped"), av.Let("swapped", 0), av.For("i", "n", *compare), av.LetInt("n", lambda n: n - 1)
    )
    zeros = [
        av.Var(name, torch.tensor(start)) for name, start in (("a", 0.0), ("b", 0.0), ("swapped", 1.0), ("loss", 0.0))
    ]
    size = av.VarInt("n", lambda array: array.shape[1] - 1)
    return av.Algorithm(av.Input("array"), *zeros, size, loop, av.Output("array"), av.Output("loss"), beta=beta)


def their_counting(beta: float) -> Callable[[Tensor], Tensor]:
    av = importlib.import_module("algovision")
    loop = av.While(av.LT("x", 5), av.Let("x", lambda x: x + 1))
    return av.Algorithm(av.Input("x"), loop, av.Output("x"), beta=beta)


def their_shortest_paths(
    beta: float, steps: int, *, until_seen: bool = False
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    av = importlib.import_module("algovision")

    def sweep(d: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        beside = torch.nn.functional.unfold(d.unsqueeze(1), 3).mT.unflatten(1, cost.shape[1:])
        beside = torch.cat([beside[..., :4], beside[..., 5:]], -1)
        before = torch.nn.functional.softmin(beside * beta, -1)
        return torch.nn.functional.pad((before * beside).sum(-1) + cost, (1, 1, 1, 1), value=UNREACHED), before

    def zeros(*more: int) -> Callable[[Tensor], Tensor]:
        return lambda cost: torch.zeros(*cost.shape[1:], *more)

    walk = [
        av.Let("on_path", lambda on_path, here: on_path + here - on_path * here),
        av.Let("here", lambda here, before: moved(here.unsqueeze(-1) * before)),
    ]
    seen = av.LEq(lambda on_path: on_path[:, 0, 0], 1.0)
    return av.Algorithm(
        av.Input("cost"),
        av.Var("d", lambda cost: torch.full((cost.shape[1] + 2, cost.shape[2] + 2), UNREACHED)),
        av.Var("before", zeros(len(PLACES))), av.Var("here", zeros()), av.Var("on_path", zeros()),
        av.Let("d", [1, 1], 0.0), av.Let("here", [-1, -1], 1.0),
        av.For("i", steps, av.Let(["d", "before"], lambda d, cost: sweep(d, cost)), av.Let("d", [1, 1], 0.0)),
        av.While(seen, *walk, max_iter=steps, epsilon=0.0) if until_seen else av.For("k", steps, *walk),
        av.Output("on_path"), av.Output("d"), beta=beta,
    )  # fmt: skip


def their_wave(x: Tensor, steps: int) -> Tensor:
    av = importlib.import_module("algovision")
    chance = av.Var("go", torch.tensor(1 - 1 / steps))
    loop = av.While(av.IsTrue("go"), av.Let("x", lambda x: (x * 1.01).sin()))
    options = {"beta": 1.0, "max_iter": steps, "epsilon": 0.0}
    return av.Algorithm(av.Input("x"), chance, loop, av.Output("x"), **options)(x)


def exactly_counting(x: Tensor, beta: float) -> Tensor:
    x, left, total = x.double(), torch.ones(len(x)).double(), 0.0
    for _ in range(200):
        c = torch.sigmoid((5 - x) * beta)
        total, left, x = total + left * (1 - c) * x, left * c, x + 1
    return total + left * x


def dijkstra(costs: list[list[float]]) -> tuple[set[tuple[int, int]], float]:
    """The cells of the shortest path between the corners, and its length without the cost of the first cell."""
    last = len(costs) - 1, len(costs[0]) - 1
    queue, came = [(0.0, (0, 0), (0, 0))], {}
    while last not in came:
        length, cell, previous = heapq.heappop(queue)
        if cell in came:
            continue
        came[cell] = previous
        for i, j in PLACES:
            near = cell[0] + i, cell[1] + j
            if 0 <= near[0] <= last[0] and 0 <= near[1] <= last[1]:
                heapq.heappush(queue, (length + costs[near[0]][near[1]], near, cell))
    path = {last}
    while (0, 0) not in path:
        last = came[last]
        path.add(last)
    return path, length


def on_shortest_path(costs: Tensor) -> Tensor:
    """1 at the cells of the shortest path of each map, 0 elsewhere."""
    found = torch.zeros_like(costs)
    for one, row in zip(found, costs.tolist(), strict=True):
        for cell in dijkstra(row)[0]:
            one[cell] = 1
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    f(x).sum().backward()
    return time.perf_counter() - start


def turns(contestants: dict[str, Callable[[Tensor], Tensor]], x: Tensor, count: int) -> dict[str, tuple[float, float]]:
    """Milliseconds, and the ratio to the first contestant."""
    rows = [[seconds(f, x) for f in contestants.values()] for _ in range(count + 1)][1:]
    return {
        name: (1e3 * statistics.median(r[k] for r in rows), statistics.median(r[k] / r[0] for r in rows))
        for k, name in enumerate(contestants)
    }


def bodies() -> dict[str, tuple[Callable[[int, Tensor], Tensor], Tensor]]:
    torch.manual_seed(0)
    w = torch.randn(64, 64, requires_grad=True)
    return {
        "sin of 1 number": (lambda i, s: torch.sin(s) + 0.1, torch.randn(1)),
        "sin of 1000": (lambda i, s: torch.sin(s) + 0.1, torch.randn(1000)),
        "recurrent layer, 16 x 64": (lambda i, s: s + 0.01 * torch.tanh(s @ w) * torch.cos(s), torch.randn(16, 64)),
        "recurrent layer, 256 x 64": (lambda i, s: s + 0.01 * torch.tanh(s @ w) * torch.cos(s), torch.randn(256, 64)),
    }


def checkpoint_times(steps: int, count: int) -> None:
    print(f"\n| fori_loop, T = {steps} | {' | '.join(f'{p}, ms | ratio' for p in PLANS)} |")
    print("|---|" + "---:|---:|" * len(PLANS))
    for name, (body, x) in bodies().items():
        runs = {p: lambda x, b=body, c=c: so.fori_loop(0, steps, b, x, checkpoint=c) for p, c in PLANS.items()}
        found = turns(runs, x, count)
        print(f"| {name} | " + " | ".join(f"{ms:.0f} | {ratio:.2f}" for ms, ratio in found.values()) + " |", flush=True)


def peak() -> float:
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


MEMORY = {
    "while_loop on 100000 numbers": {
        "ours": lambda x, steps, plan: wave(x.reshape(1, -1), steps, plan),
        "AlgoVision": lambda x, steps: their_wave(x.reshape(1, -1), steps),
    },
    "shortest paths, a map of 100 x 100": {
        "ours": lambda x, steps, plan: shortest_paths(x[:10000].reshape(1, 100, 100), 0.1, steps, plan)[0],
        "AlgoVision": lambda x, steps: their_shortest_paths(10.0, steps)(x[:10000].reshape(1, 100, 100))[0],
    },
}


def grown(program: str, name: str, steps: int) -> float:
    """MB by which a program and its gradient raise the peak; Linux."""
    theirs, ours = MEMORY[program]["AlgoVision"], MEMORY[program]["ours"]
    run = theirs if name == "AlgoVision" else lambda x, steps: ours(x, steps, PLANS[name])
    x = torch.rand(ROOM)
    seconds(lambda x: run(x, 2), x)  # what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    seconds(lambda x: run(x, steps), x)
    return peak() - before


def memory(program: str, sizes: tuple[int, ...], theirs: bool) -> None:
    print(f"\n| {program}, MB | {' | '.join(f'T = {t}' for t in sizes)} |\n|---|" + "---:|" * len(sizes))
    for name in [*PLANS, *(["AlgoVision"] if theirs else [])]:
        row = []
        for t in sizes:
            command = [sys.executable, "-m", "tests.bench.control", "--grown", program, name, str(t)]
            row.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"| {name} | " + " | ".join(f"{mb:.1f}" for mb in row) + " |", flush=True)


def against_algovision(count: int) -> None:
    print("\n| AlgoVision's example | its error | ours | its ms | ours | ours / its |\n|---|---:|---:|---:|---:|---:|")
    torch.manual_seed(0)
    for beta in (1.25, 5.0, 20.0):
        x = torch.randn(1000) * 3
        run = {"its": their_counting(beta), "ours": lambda x, b=beta: counting(x, b)}
        line(f"counting to 5, beta {beta:g}, 1000 numbers", run, x, exactly_counting(x, beta), count)
        run["ours"] = lambda x, b=beta: counting(x, b, plain=True)
        line("the same, compared by torch.sigmoid", run, x, exactly_counting(x, beta), count)
    for beta in (5.0, 20.0):
        x = torch.randn(64, 8)
        run = {"its": lambda x, f=their_bubble_sort(beta): torch.cat([y.flatten() for y in f(x)])}
        run["ours"] = lambda x, b=beta: torch.cat([y.flatten() for y in bubble_sort(x, b)])
        line(f"bubble sort, beta {beta:g}, 64 x 8", run, x, run["ours"](x.double()), count)

    costs = torch.sigmoid(torch.randn(4, 12, 10) * 4) + 0.2
    for until_seen, loop in ((False, "for"), (True, "while")):
        run = {"its": lambda x, f=their_shortest_paths(10.0, 25, until_seen=until_seen): f(x)[0]}
        run["ours"] = lambda x, u=until_seen: shortest_paths(x, 0.1, 25, until_seen=u)[0]
        line(f"shortest paths ({loop}), beta 10, 4 x 12 x 10", run, costs, run["ours"](costs.double()), count)


def against_dijkstra() -> None:
    """The mean error in how surely a cell is on the path: the example halted on arrival, and as it is."""
    print(
        "\n| cells on the shortest path, 50 x 12 x 10, off by | AlgoVision | ours, halted on arrival |\n|---|---:|---:|"
    )
    torch.manual_seed(0)
    costs = torch.sigmoid(torch.randn(50, 12, 10) * 4) + 0.2  # as in the example
    exact = on_shortest_path(costs)
    for beta in (10.0, 100.0, 1000.0, 1e5):
        theirs = their_shortest_paths(beta, 25)(costs)[0]
        ours = shortest_paths(costs, 1 / beta, 25, stay=True, logic=so.Lukasiewicz())[0]
        print(f"| beta {beta:g} | {(theirs - exact).abs().mean():.1e} | {(ours - exact).abs().mean():.1e} |")


def line(name: str, run: dict[str, Callable[[Tensor], Tensor]], x: Tensor, exact: Tensor, count: int) -> None:
    errors = [(f(x) - exact).abs().max().item() for f in run.values()]
    found = turns(run, x, count)
    times = " | ".join(f"{found[who][0]:.1f}" for who in run)
    print(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} | {times} | {found['ours'][1]:.2f} |", flush=True)


def branches(count: int) -> None:
    x, y, p = torch.randn(100_000), torch.randn(100_000), torch.rand(100_000)
    print("\n| branches of 100000 | ms | ratio |\n|---|---:|---:|")
    for title, q in (("soft", p), ("a third of the weights 0", torch.where(p < 1 / 3, 0, p))):
        runs = {
            "lerp": lambda x, q=q: torch.lerp(y * x.cos(), x.exp(), q),
            "cond": lambda x, q=q: so.cond(q, torch.exp, lambda x: y * x.cos(), x),
            "switch": lambda x, q=q: so.switch(torch.stack([q, 1 - q], -1), [torch.exp, lambda x: y * x.cos()], x),
        }
        for name, (ms, ratio) in turns(runs, x, count).items():
            print(f"| {title}: {name} | {ms:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns, short loops")
    parser.add_argument("--grown", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grown:
        print(grown(*options.grown[:2], int(options.grown[2])))
        return
    theirs = importlib.util.find_spec("algovision") is not None
    print(f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, 1 thread")
    print("AlgoVision's own code" if theirs else "AlgoVision is not installed: ours alone")
    checkpoint_times(128 if options.quick else 1024, 3 if options.quick else 11)
    branches(5 if options.quick else 31)
    if theirs:
        against_algovision(3 if options.quick else 15)
        against_dijkstra()
    for program, sizes in zip(MEMORY, ((64, 256, 1024), (16, 64, 256)), strict=True):
        memory(program, sizes[: 1 if options.quick else 3], theirs)


if __name__ == "__main__":
    main()
