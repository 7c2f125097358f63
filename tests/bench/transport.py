"""Times entropic transport against POT and softtorch: ``python -m tests.bench.transport [--quick]``.

Forward and backward of a weighted sum of the plan, on one thread, in float64, to a marginal error of 1e-6. POT solves
one matrix a call (``ot.sinkhorn``) or all in one (``ot.solve_batch``), with autograd through its loop. Costs are
uniform random numbers, or squared distances of random points of the unit square, which take more sweeps. All
contestants take turns in one process; a time is a median over the turns, a ratio the median of the ratios within a
turn. Who takes less than a second may call twice: what the call before has left in the heap and the caches does not
count. The error of a gradient is relative to that of the same problem solved to rounding.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import smoothops as so

TOL = 1e-6
Plan = Callable[[Tensor], Tensor]


def costs(kind: str, batch: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "uniform":
        return torch.rand(batch, n, n, generator=generator, dtype=torch.float64)
    x, y = torch.rand(2, batch, n, 2, generator=generator, dtype=torch.float64)
    return torch.cdist(x, y).square()


def contestants(batch: int, n: int, eps: float) -> dict[str, Plan]:
    import ot

    a = torch.full((n,), 1 / n, dtype=torch.float64)
    polytope, many = so.Transport(a, a), a.expand(batch, n)

    def ours(solver: so.Sinkhorn | None) -> Plan:
        return lambda c: polytope.argmax(-c, so.Entropy(eps, solver=solver))

    def single(method: str) -> Plan:
        options = {"method": method, "stopThr": TOL, "numItermax": 100_000}
        return lambda c: torch.stack([ot.sinkhorn(a, a, part, eps, **options) for part in c])

    def batched(method: str) -> Plan:
        options = {"method": method, "tol": TOL, "max_iter": 100_000, "grad": "autodiff"}
        return lambda c: ot.solve_batch(c, eps, a=many, b=many, **options).plan

    return {
        "smoothops": ours(so.Sinkhorn(TOL)),
        "smoothops, default (1e-10)": ours(None),
        "POT sinkhorn": single("sinkhorn"),
        "POT sinkhorn_log": single("sinkhorn_log"),
        "POT solve_batch, sinkhorn": batched("sinkhorn"),
        "POT solve_batch, log_sinkhorn": batched("log_sinkhorn"),
    }


def gradient(plan: Plan, x: Tensor) -> tuple[float, Tensor]:
    x = x.detach().clone().requires_grad_()
    weights = torch.cos(1.7 * torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape)
    start = time.perf_counter()
    (plan(x) * weights).sum().backward()
    return time.perf_counter() - start, x.grad  # type: ignore[return-value]


def seconds(plan: Plan, x: Tensor) -> float:
    first = gradient(plan, x)[0]
    return first if first > 1 else min(first, gradient(plan, x)[0])


def contest(plans: dict[str, Plan], x: Tensor, exact: Tensor, turns: int) -> None:
    errors = {name: ((gradient(p, x)[1] - exact).norm() / exact.norm()).item() for name, p in plans.items()}
    spent = [{name: seconds(p, x) for name, p in plans.items()} for _ in range(turns)]
    first = next(iter(plans))
    for name in plans:
        ms = 1e3 * statistics.median(turn[name] for turn in spent)
        ratio = statistics.median(turn[name] / turn[first] for turn in spent)
        print(f"| {name} | {ms:.1f} | {ratio:.1f} | {errors[name]:.0e} |", flush=True)


HEADER = "| solver | ms | times the first | error of the gradient |\n|---|---:|---:|---:|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns, no logarithmic solvers at n = 500")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    exactly = so.Sinkhorn(1e-15)
    for batch, n in ((64, 50), (8, 500)):
        for kind in ("uniform", "squared distances"):
            for eps in (0.1, 0.02):
                x, plans = costs(kind, batch, n), contestants(batch, n, eps)
                if n == 500:
                    plans = {name: p for name, p in plans.items() if "log" not in name}
                a = torch.full((n,), 1 / n, dtype=torch.float64)
                known = lambda c, e=eps, a=a: so.Transport(a, a).argmax(-c, so.Entropy(e, solver=exactly))  # noqa: E731
                print(f"\n{batch} x ({n} x {n}), {kind}, eps {eps}\n\n{HEADER}")
                contest(plans, x, gradient(known, x)[1], 3 if options.quick else 7)
    orders(2 if options.quick else 4)


def orders(turns: int) -> None:
    """The sort of 128 rows of 64 numbers over Birkhoff's polytope, at a tolerance of 1e-5, which is softtorch's own.

    softtorch moves the numbers, squashed into [0, 1], to a grid: of the gradients only one can be compared with itself.
    """
    import softtorch

    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    print("\nsort of 128 x 64\n\n| solver | ms | times the first |\n|---|---:|---:|")
    plans: dict[str, Plan] = {
        f"smoothops sort, eps {eps}": lambda x, e=eps: so.sort(x, smoothing=so.Entropy(e, solver=so.Sinkhorn(1e-5)))
        for eps in (1.0, 0.1)
    }
    plans |= {
        f"softtorch sort, ot, softness {softness}": lambda x, s=softness: (
            softtorch.sort(x, softness=s, method="ot", mode="smooth").values
        )
        for softness in (0.1, 0.01)
    }
    for plan in plans.values():
        gradient(plan, x)
    spent = [{name: seconds(p, x) for name, p in plans.items()} for _ in range(turns)]
    first = next(iter(plans))
    for name in plans:
        ratio = statistics.median(turn[name] / turn[first] for turn in spent)
        print(f"| {name} | {1e3 * statistics.median(turn[name] for turn in spent):.1f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
