"""Times programmes against cvxpylayers, and polytopes against both: ``python -m tests.bench.program [--quick]``.

Forward and backward, float64, one thread, all in one process taking turns; a time is the median over the turns. The
gradient error is relative to the gradient by closed form or, without one, to central differences of our own values.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import implicit
import smoothops as so

Call = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """One programme in theta (n,), with its closed form where there is one."""

    name: str
    problem: Any
    theta: Any
    y: Any
    n: int
    closed: Call | None = None
    ordered: bool = False


def simplex(n: int, kind: str) -> Case:
    import cvxpy as cp

    y, theta = cp.Variable(n), cp.Parameter(n)
    omega = {"Quadratic": cp.sum_squares(y) / 2, "Entropy": -cp.sum(cp.entr(y))}[kind]
    reg = {"Quadratic": so.Quadratic(1.0), "Entropy": so.Entropy(1.0)}[kind]
    problem = cp.Problem(cp.Maximize(theta @ y - omega), [y >= 0, cp.sum(y) == 1])
    return Case(f"Simplex, {kind}", problem, theta, y, n, lambda t: so.Simplex().argmax(t, reg))


def capped(n: int, kind: str) -> Case:
    import cvxpy as cp

    y, theta, k = cp.Variable(n), cp.Parameter(n), n // 5
    omega = {"Quadratic": cp.sum_squares(y) / 2, "Entropy": -cp.sum(cp.entr(y))}[kind]
    reg = {"Quadratic": so.Quadratic(1.0), "Entropy": so.Entropy(1.0)}[kind]
    problem = cp.Problem(cp.Maximize(theta @ y - omega), [y >= 0, y <= 1, cp.sum(y) == k])
    return Case(f"CappedSimplex, {kind}", problem, theta, y, n, lambda t: so.CappedSimplex(k).argmax(t, reg))


def monotone(n: int, kind: str) -> Case:
    import cvxpy as cp

    y, theta = cp.Variable(n), cp.Parameter(n)
    problem = cp.Problem(cp.Maximize(theta @ y - cp.sum_squares(y) / 2), [cp.diff(y) >= 0])
    own = so.OrderPolytope()
    return Case("OrderPolytope, Quadratic", problem, theta, y, n, lambda t: own.argmax(t, so.Quadratic(1.0)))


def permutations(n: int, kind: str) -> Case:
    """Of a sorted theta, which n prefix sums suffice for; in general there are n(n - 1)/2 auxiliary variables."""
    import cvxpy as cp

    y, theta = cp.Variable(n), cp.Parameter(n)
    w = torch.arange(float(n), 0, -1, dtype=torch.float64)
    tops = w.cumsum(0).numpy()
    problem = cp.Problem(
        cp.Maximize(theta @ y - cp.sum_squares(y) / 2), [cp.cumsum(y)[:-1] <= tops[:-1], cp.sum(y) == tops[-1]]
    )
    own = so.Permutahedron(w)
    return Case("Permutahedron, Quadratic", problem, theta, y, n, lambda t: own.argmax(t, so.Quadratic(1.0)), True)


def ball(n: int, kind: str) -> Case:
    import cvxpy as cp

    y, theta = cp.Variable(n), cp.Parameter(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - theta)), [cp.norm(y) <= 1, y >= 0])

    def closed(t: Tensor) -> Tensor:
        p = t.clamp(min=0)
        return p / p.norm(dim=-1, keepdim=True).clamp(min=1)

    return Case("second-order cone", problem, theta, y, n, closed)


def semidefinite(n: int, kind: str) -> Case:
    import cvxpy as cp

    y, theta = cp.Variable((n, n), symmetric=True), cp.Parameter((n, n), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - theta)), [y >> 0])

    def closed(t: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((t + t.mT) / 2)
        return vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT

    return Case("semidefinite cone", problem, theta, y, n, closed)


def run(f: Call, theta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    t = theta.clone().requires_grad_()
    y = f(t)
    return y.detach(), torch.autograd.grad((y * weight).sum(), t)[0]


def timed(f: Call, theta: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    run(f, theta, weight)
    return time.perf_counter() - start


def measure(case: Case, batch: int, turns: int) -> list[str]:
    from cvxpylayers.torch import CvxpyLayer

    torch.manual_seed(0)
    theta = 2 * torch.randn(batch, *case.theta.shape, dtype=torch.float64)
    theta = theta + theta.mT if theta.ndim == 3 else theta
    theta = theta.sort(-1, descending=True).values if case.ordered else theta
    weight = torch.randn_like(theta)
    program = implicit.program(case.problem, [case.theta], [case.y])
    layer = CvxpyLayer(case.problem, parameters=[case.theta], variables=[case.y])
    calls: list[Call | None] = [lambda t: program(t)[0], lambda t: layer(t)[0], case.closed]
    answers = [None if f is None else run(f, theta, weight) for f in calls]
    times: list[list[float]] = [[], [], []]
    for _ in range(turns):
        for f, kept in zip(calls, times, strict=True):
            if f is not None:
                kept.append(timed(f, theta, weight))
    ours, theirs, closed = (statistics.median(t) if t else float("nan") for t in times)
    exact = answers[2]
    assert exact is not None
    symmetric = (lambda g: (g + g.mT) / 2) if theta.ndim == 3 else (lambda g: g)
    errors = [
        f"{((a[0] - exact[0]).abs().max() / exact[0].abs().max()).item():.0e} / "
        f"{((symmetric(a[1]) - symmetric(exact[1])).abs().max() / exact[1].abs().max()).item():.0e}"
        for a in answers[:2]
        if a is not None
    ]
    return [
        case.name, str(case.n), str(batch), f"{closed * 1e3:.2f}", f"{ours * 1e3:.1f}", f"{theirs * 1e3:.0f}",
        f"{theirs / ours:.1f} x", f"{theirs / closed:.0f} x", errors[0], errors[1],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    n, batch, turns = (6, 2, 1) if quick else (50, 32, 5)
    cases = [
        simplex(n, "Quadratic"), simplex(n, "Entropy"), capped(n, "Quadratic"), capped(n, "Entropy"),
        monotone(n, ""), permutations(n, ""), ball(n, ""), semidefinite(4 if quick else 8, ""),
    ]  # fmt: skip
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread\n"
    )
    head = (
        "programme | n | batch | closed form ms | program ms | cvxpylayers ms | program faster | closed form faster | "
        "program's error, value / gradient | cvxpylayers'"
    )
    print(f"| {head} |\n|{'---|' * 10}")
    for case in cases:
        print(f"| {' | '.join(measure(case, batch, turns))} |", flush=True)


if __name__ == "__main__":
    main()
