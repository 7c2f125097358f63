"""Times implicit against unrolling and TorchOpt: ``python -m tests.bench.implicit [--quick]``.

The contestants of a line take turns in one run, on one thread, in float64; a number is the median of the ratios of
neighbouring calls, ours over theirs, so that what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit import CG, Auto, Picard, attach, conditions, fixed_point, linear_solve
from implicit.linear import LinearSolver
from implicit.minimize import GradientDescent, minimize

D = torch.float64
Run = Callable[[], Any]


def seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(ours: Run, theirs: Run, pairs: int) -> tuple[float, float, float]:
    """(median seconds of ours, of theirs, median ratio of neighbouring calls)"""
    for run in (ours, theirs):
        run()
    gc.disable()
    try:
        times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    finally:
        gc.enable()
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


class Ridge:
    """min |X w - y|^2 / 2 + l |w|^2 / 2 with n unknowns and 2n samples, of condition 4 for l = 1, 30 for l = 0.1."""

    def __init__(self, n: int, strength: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2 * n, n, generator=generator, dtype=D) / (2 * n) ** 0.5
        self.y = torch.randn(2 * n, generator=generator, dtype=D)
        self.l = torch.tensor(strength, dtype=D, requires_grad=True)
        self.zero = torch.zeros(n, dtype=D)
        h = self.x.mT @ self.x + self.l.detach() * torch.eye(n, dtype=D)
        self.step = 1 / torch.linalg.eigvalsh(h)[-1].item()
        self.solution = torch.linalg.solve(h, self.x.mT @ self.y)
        self.weights = torch.randn(n, generator=generator, dtype=D)

    def objective(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        r = self.x @ w - self.y
        return (r @ r + l * (w @ w)) / 2

    def gradient(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return self.x.mT @ (self.x @ w - self.y) + l * w

    def backward(self, w: Tensor) -> Tensor:
        return torch.autograd.grad(w @ self.weights, self.l)[0]


STEPS = 90


def descend(problem: Ridge) -> Tensor:
    w = minimize(
        problem.objective,
        problem.zero,
        problem.l,
        method=GradientDescent(step_size=problem.step),
        max_iter=STEPS,
        on_fail="ignore",
    )
    return problem.backward(w)


def descend_by_map(problem: Ridge) -> Tensor:
    w = fixed_point(
        lambda w, l: w - problem.step * problem.gradient(w, l),  # noqa: E741
        problem.zero,
        problem.l,
        method=Picard(),
        max_iter=STEPS,
        on_fail="ignore",
    )
    return problem.backward(w)


def unroll(problem: Ridge, automatic: bool) -> Tensor:
    """The same steps with the graph kept; the gradient by autograd, as in minimize, or written by hand."""
    w = problem.zero.clone().requires_grad_()
    for _ in range(STEPS):
        if automatic:
            (g,) = torch.autograd.grad(problem.objective(w, problem.l), w, create_graph=True)
        else:
            g = problem.gradient(w, problem.l)
        w = w - problem.step * g
    return problem.backward(w)


def attached(problem: Ridge, linear: LinearSolver, automatic: bool) -> Tensor:
    """The exact solution is given: what remains is the derivative."""
    residual = conditions.stationary(problem.objective) if automatic else problem.gradient
    return problem.backward(attach(problem.solution, residual, problem.l, linear=linear, check=False))


def torchopt_run(problem: Ridge, given: bool) -> Callable[[], Tensor] | None:
    """TorchOpt's custom_root, forward (90 steps, or the solution is given) and backward by its conjugate gradients."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchopt = importlib.import_module("torchopt")
    except ImportError:
        return None

    def optimality(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return problem.gradient(w, l)

    solver = torchopt.linear_solve.solve_cg(rtol=1e-10, atol=0.0, maxiter=1000)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solver)
    def solve(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        if given:
            return problem.solution.clone()
        for _ in range(STEPS):
            w = w - problem.step * problem.gradient(w, l)
        return w

    return lambda: problem.backward(solve(problem.zero, problem.l))


def ours_backward(problem: Ridge, linear: LinearSolver) -> Run:
    """Backward alone: the graph is made anew for each call, outside of the clock."""
    w = attach(problem.solution, problem.gradient, problem.l, linear=linear, check=False)
    total = w @ problem.weights
    return lambda: torch.autograd.grad(total, problem.l, retain_graph=True)[0]


def table(quick: bool, strength: float) -> list[tuple[str, int, float, float, float]]:
    rows = []
    pairs = 5 if quick else 25
    for n in (100,) if quick else (100, 1000):
        problem = Ridge(n, strength)
        for name, linear in (("CG(rtol=1e-10)", CG(rtol=1e-10)), ("Auto(rtol=1e-10)", Auto(rtol=1e-10))):
            theirs, same = torchopt_run(problem, False), torchopt_run(problem, True)
            if theirs is None or same is None:
                print("TorchOpt is not installed: its lines are left out")
                continue
            torch.testing.assert_close(ours_backward(problem, linear)(), same(), rtol=1e-7, atol=1e-9)
            whole = lambda linear=linear, problem=problem: attached(problem, linear, False)  # noqa: E731
            label = f"ridge, backward by {name} / TorchOpt solve_cg, 90 steps forward + backward"
            rows.append((label, n, *compare(ours_backward(problem, linear), theirs, pairs)))
            label = f"ridge, solution given, attach + backward by {name} / TorchOpt solve_cg, the same"
            rows.append((label, n, *compare(whole, same, pairs)))
        few = max(pairs // 2, 3)
        by_value = lambda problem=problem: descend(problem)  # noqa: E731
        by_map = lambda problem=problem: descend_by_map(problem)  # noqa: E731
        rows.append(("ridge, minimize(GradientDescent), 90 steps / unrolled", n,
                     *compare(by_value, lambda p=problem: unroll(p, True), few)))  # fmt: skip
        rows.append(("ridge, fixed_point(Picard), 90 steps / unrolled", n,
                     *compare(by_map, lambda p=problem: unroll(p, False), few)))  # fmt: skip
        matrix = problem.x.mT @ problem.x + strength * torch.eye(n, dtype=D)
        matrix.requires_grad_()

        def ours(m: Tensor = matrix, p: Ridge = problem) -> Tensor:
            return torch.autograd.grad(linear_solve(m, p.solution) @ p.weights, m)[0]

        def plain(m: Tensor = matrix, p: Ridge = problem) -> Tensor:
            return torch.autograd.grad(torch.linalg.solve(m, p.solution) @ p.weights, m)[0]

        rows.append(
            ("linear_solve of a tensor, forward + backward / torch.linalg.solve", n, *compare(ours, plain, pairs))
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 100 alone, few pairs")
    parser.add_argument("--ridge", type=float, default=1.0, help="strength of the ridge: smaller is worse conditioned")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| ours / theirs | n | ours, ms | theirs, ms | ratio |")
    print("|---|---|---|---|---|")
    for name, n, a, b, ratio in table(options.quick, options.ridge):
        print(f"| {name} | {n} | {1e3 * a:.2f} | {1e3 * b:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
