"""Times implicit.qp against qpth, moreau and cvxpylayers: ``python -m tests.bench.qp [--quick]``.

Forward and backward of a weighted sum of the solution; every datum is batched and differentiated, about half of the
rows are active. The contestants of a line take turns in one process, on one thread, in float64; a ratio is the median
of those of neighbouring calls, theirs over ours, in wall time. What is not installed is left out. A table of errors
follows: against the linear system of the active rows, refined in extended precision.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicit

D = torch.float64
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SIZES = [(n, n, batch) for n in (10, 50, 100) for batch in (1, 32, 128)]
MORE = [(20, 100, 64), (50, 150, 64)]
# at most this many turns against the slow ones
TURNS = {"qpth": 15, "moreau": 25, "cvxpylayers": 3}


def problem(n: int, m: int, batch: int) -> tuple[Tensor, ...]:
    """(Q, c, G, h, weights); x = 0 is feasible."""
    generator = torch.Generator().manual_seed(n + m + batch)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=D)  # noqa: E731
    root = normal(batch, n, n)
    Q = root @ root.mT / n + 0.5 * torch.eye(n, dtype=D)
    return Q, 3 * normal(batch, n), normal(batch, m, n) / n**0.5, 0.2 * normal(batch, m).abs(), normal(batch, n)


# --- the contestants --------------------------------------------------------------------------------------------------


def ours(n: int, m: int, batch: int) -> Layer:
    return lambda Q, c, G, h: implicit.qp(Q, c, G=G, h=h).x


def qpth(n: int, m: int, batch: int) -> Layer:
    from qpth.qp import QPFunction

    none = torch.empty(0, dtype=D)
    solve = QPFunction(verbose=-1)
    return lambda Q, c, G, h: solve(Q, c, G, h, none, none)


def moreau(n: int, m: int, batch: int) -> Layer:
    import moreau
    import moreau.torch

    def rows(count: int) -> tuple[Tensor, Tensor]:
        return torch.arange(0, n * count + 1, n), torch.arange(n).repeat(count)

    cones = moreau.Cones(num_nonneg_cones=m)
    settings = moreau.Settings(device="cpu", batch_size=batch, enable_grad=True)
    solver = moreau.torch.Solver(n, m, *rows(n), *rows(m), cones, settings)
    shape = (batch, -1) if batch > 1 else (-1,)

    def run(Q: Tensor, c: Tensor, G: Tensor, h: Tensor) -> Tensor:
        return solver.solve(*(v.reshape(shape) for v in (Q, G, c, h))).x.reshape(batch, n)

    return run


def cvxpylayers(n: int, m: int, batch: int) -> Layer:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    x, root, c = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    G, h = cp.Parameter((m, n)), cp.Parameter(m)
    whole = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + c @ x), [G @ x <= h])
    layer = CvxpyLayer(whole, parameters=[root, c, G, h], variables=[x])
    return lambda Q, c, G, h: layer(torch.linalg.cholesky(Q).mT, c, G, h)[0]


RIVALS = {"qpth": qpth, "moreau": moreau, "cvxpylayers": cvxpylayers}

# --- measuring --------------------------------------------------------------------------------------------------------


def gradients(layer: Layer, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *values, weights = data
    inputs = [v.clone().requires_grad_() for v in values]
    return torch.autograd.grad((layer(*inputs) * weights).sum(), inputs)


def seconds(layer: Layer, data: tuple[Tensor, ...]) -> float:
    *values, weights = data
    inputs = [v.detach().requires_grad_() for v in values]
    start = time.perf_counter()
    torch.autograd.grad((layer(*inputs) * weights).sum(), inputs)
    return time.perf_counter() - start


def compare(mine: Layer, other: Layer, data: tuple[Tensor, ...], turns: int) -> tuple[float, float, float]:
    """(median seconds of ours, of theirs, median ratio within a turn)."""
    seconds(mine, data), seconds(other, data)
    found = []
    gc.disable()
    try:
        for _ in range(turns):
            first = statistics.median(seconds(mine, data) for _ in range(3))
            found.append((first, seconds(other, data)))
    finally:
        gc.enable()
    a, b = zip(*found, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in found)


def exact(data: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Solution and gradients of the system of the active rows, by refinement in extended precision."""
    Q, c, G, h, weights = data
    active = (implicit.qp(Q, c, G=G, h=h).dual_ineq > 0).numpy()
    wide = [v.numpy().astype(np.longdouble) for v in (Q, c, G, h, weights)]
    out: list[list[Any]] = [[] for _ in range(5)]
    for i, on in enumerate(active):
        q, p, g, b, w = (v[i] for v in wide)
        n, a = len(p), on.sum()
        K = np.block([[q, g[on].T], [g[on], np.zeros((a, a), np.longdouble)]])
        inverse = np.linalg.inv(K.astype(float))

        def solve(right: Any, K: Any = K, inverse: Any = inverse) -> Any:
            z = inverse @ right
            for _ in range(4):
                z = z + inverse @ (right - K @ z).astype(float)
            return z

        z, r = solve(np.concatenate([-p, b[on]])), solve(np.concatenate([w, np.zeros(a)]))
        (x, lam), (u, v) = (z[:n], z[n:]), (r[:n], r[n:])
        dG, dh = np.zeros_like(g), np.zeros_like(b)
        dG[on], dh[on] = -np.outer(v, x) - np.outer(lam, u), v
        for column, value in zip(out, (x, -(np.outer(u, x) + np.outer(x, u)) / 2, -u, dG, dh), strict=True):
            column.append(value.astype(float))
    x, *grads = (torch.from_numpy(np.stack(v)) for v in out)
    return x, grads


def error(found: Tensor, true: Tensor) -> float:
    return (found - true).abs().max().item()


def symmetric(grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Only the symmetric part of Q is data."""
    return [(grads[0] + grads[0].mT) / 2, *grads[1:]]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(quick: bool) -> Iterator[str]:
    sizes = SIZES[:5] if quick else SIZES + MORE
    names = [name for name in RIVALS if importlib.util.find_spec(name) is not None]
    named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *names))
    threads = torch.get_num_threads()
    yield f"{datetime.date.today().isoformat()}; {processor()}, {threads} thread(s), wall clock; {named}."
    yield ""
    yield f"| n | m | batch | active | implicit.qp, ms |{''.join(f' {name}, ms | ratio |' for name in names)}"
    yield "|---:|---:|---:|---:|---:|" + "---:|---:|" * len(names)
    for n, m, batch in sizes:
        data = problem(n, m, batch)
        mine = ours(n, m, batch)
        share = (implicit.qp(data[0], data[1], G=data[2], h=data[3]).dual_ineq > 0).double().mean().item()
        times, cells = [], ""
        for name in names:
            turns = 3 if quick else TURNS[name] if n * batch < 3000 else max(2, TURNS[name] // 3)
            a, b, ratio = compare(mine, RIVALS[name](n, m, batch), data, turns)
            times.append(a)
            cells += f" {1e3 * b:.4g} | {ratio:.1f} |"
        yield f"| {n} | {m} | {batch} | {share:.2f} | {1e3 * statistics.median(times):.3g} |{cells}"
    yield ""
    yield "| n | m | largest error of x, of a gradient: implicit.qp |" + "".join(f" {name} |" for name in names)
    yield "|---:|---:|---|" + "---|" * len(names)
    for n, m, batch in [(10, 10, 32), (50, 50, 32)] + ([] if quick else [(100, 100, 8), (20, 100, 32)]):
        data = problem(n, m, batch)
        x, grads = exact(data)
        cells = ""
        for layer in (ours, *(RIVALS[name] for name in names)):
            made = layer(n, m, batch)
            found = symmetric(gradients(made, data))
            worst = max(error(a, b) for a, b in zip(found, grads, strict=True))
            cells += f" {error(made(*data[:4]).detach(), x):.0e}, {worst:.0e} |"
        yield f"| {n} | {m} |{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when moreau is imported
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in table(options.quick):
        print(line, flush=True)


if __name__ == "__main__":
    main()
