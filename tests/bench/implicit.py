"""Times implicit against unrolling, TorchOpt and torchdeq: ``python -m tests.bench.implicit [--quick]``.

The contestants of a line take turns in one run, on one thread, in float64 and processor time; a number is the median
of the ratios of neighbouring calls, ours over theirs, so that what else the machine does hardly counts. What is not
installed is left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from implicit import (
    CG,
    Anderson,
    Auto,
    GradientDescent,
    Implicit,
    Picard,
    Unroll,
    attach,
    conditions,
    fixed_point,
    linear_solve,
    minimize,
)
from implicit._jacobian import vectorized
from implicit.linear import LinearSolver
from implicit.operator import vjp

D = torch.float64
Run = Callable[[], Any]


def nothing() -> None:
    pass


def compare(ours: Run, theirs: Run, pairs: int, prepare: Run = nothing) -> tuple[float, float, float]:
    """(median seconds of ours, of theirs, median ratio of neighbouring calls); ours(prepare()), unless it is None."""

    def seconds(run: Callable[..., Any], *given: Any) -> float:
        start = time.process_time()
        run(*given)
        return time.process_time() - start

    def ours_once() -> float:
        given = prepare()
        return seconds(ours) if given is None else seconds(ours, given)

    times = [(ours_once(), seconds(theirs)) for _ in range(2)]
    gc.disable()
    try:
        times = [(ours_once(), seconds(theirs)) for _ in range(pairs)]
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


def backward_alone(problem: Ridge, linear: LinearSolver) -> tuple[Callable[[Tensor], Any], Run]:
    """(backward, what makes a fresh graph for it, outside of the clock)"""

    def prepare() -> Tensor:
        w = attach(problem.solution, problem.gradient, problem.l, linear=linear, check=False)
        return w @ problem.weights

    return lambda total: torch.autograd.grad(total, problem.l)[0], prepare


class Tanh:
    """z = tanh(W z + b), |W|_2 = 1: Picard's steps reach 1e-11 in 23 or 24."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(n, n, generator=generator, dtype=D)
        self.W = (W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
        self.b = torch.randn(n, generator=generator, dtype=D).requires_grad_()
        self.zero, self.weights = torch.zeros(n, dtype=D), torch.randn(n, generator=generator, dtype=D)

    def map(self, z: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(W @ z + b)

    def backward(self, z: Tensor) -> Any:
        return torch.autograd.grad(z @ self.weights, (self.W, self.b))

    def solve(self, method: Any, **options: Any) -> Tensor:
        return fixed_point(self.map, self.zero, self.W, self.b, method=method, on_fail="ignore", **options)

    def loop(self, steps: int = 25) -> Tensor:
        z = self.zero
        for _ in range(steps):
            z = self.map(z, self.W, self.b)
        return z

    def tested_loop(self) -> Tensor:
        z = self.zero
        for _ in range(25):
            z, last = self.map(z, self.W, self.b), z
            with torch.no_grad():
                if torch.linalg.vector_norm(z - last) <= 1e-11 * torch.linalg.vector_norm(z):
                    break
        return z


class Least(torch.autograd.Function):
    """The same derivative for this map alone: no test of a singular matrix, no search for closed-over tensors."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, graph: tuple[Tensor, ...], W: Tensor, b: Tensor) -> Tensor:
        ctx.graph = graph
        return z.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        r, z, *theta = ctx.graph
        J = vectorized(lambda u: vjp(r, z, u), torch.eye(len(z), dtype=D))
        return None, None, *torch.autograd.grad(r, theta, -torch.linalg.solve(J.mT, v))


def least(p: Tanh) -> Tensor:
    """Picard's steps with their test, and :class:`Least`."""
    with torch.no_grad():
        z = p.zero
        for _ in range(25):
            image = p.map(z, p.W, p.b)
            r = z - image
            z = image
            if torch.dot(r, r).item() ** 0.5 < 1e-11:
                break
    parts = [t.detach().requires_grad_() for t in (z, p.W, p.b)]
    return Least.apply(z, (parts[0] - p.map(*parts), *parts), p.W, p.b)


@torch.no_grad()
def quietly(run: Run) -> Any:
    return run()


def torchdeq_run(problem: Tanh) -> Run | None:
    """torchdeq's plain iteration to 1e-11 or 25 steps, without gradient."""
    try:
        torchdeq = importlib.import_module("torchdeq")
    except ImportError:
        return None
    deq = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=25, f_tol=1e-11, f_stop_mode="rel")
    return lambda: deq(lambda z: torch.tanh(z @ problem.W.mT + problem.b), problem.zero.unsqueeze(0))


Row = tuple[str, int, float, float, float]


def tanh_rows(n: int, pairs: int) -> list[Row]:
    p = Tanh(n)
    steps = {"25 steps": {"max_iter": 25}, "to 1e-11": {}}
    whole, bare = "forward + backward / 25 Picard steps unrolled", "forward / bare loop of 25 steps"
    unrolled, loop = lambda: p.backward(p.loop()), lambda: quietly(p.loop)
    rows: list[Row] = []
    same = "forward + backward / the same with grad=Unroll()"
    ours, live = (lambda g=g: p.backward(p.solve(Picard(), max_iter=25, grad=g)) for g in (Implicit(), Unroll()))
    rows.append((f"tanh, Picard, 25 steps, {same}", n, *compare(ours, live, pairs)))
    tested = lambda: p.backward(p.tested_loop())  # noqa: E731
    rows.append((f"tanh, Picard, 25 steps, {whole}, with a test of convergence", n, *compare(ours, tested, pairs)))
    if n == 100:  # the dense matrix is the least at small n only
        torch.testing.assert_close(p.backward(least(p)), unrolled(), rtol=1e-7, atol=1e-9)
        label = "tanh, the same by hand for this map alone, forward + backward / 25 Picard steps unrolled"
        rows.append((label, n, *compare(lambda: p.backward(least(p)), unrolled, pairs)))
    for method in (Picard(), Anderson()):
        name = type(method).__name__
        for label, options in steps.items():
            train = lambda m=method, o=options: p.backward(p.solve(m, **o))  # noqa: E731
            rows.append((f"tanh, {name}, {label}, {whole}", n, *compare(train, unrolled, pairs)))
        forward = lambda m=method: quietly(lambda: p.solve(m))  # noqa: E731
        rows.append((f"tanh, {name}, to 1e-11, {bare}", n, *compare(forward, loop, 4 * pairs)))
    theirs = torchdeq_run(p)
    if theirs is not None:
        rows.append(
            (f"tanh, torchdeq's fixed_point_iter, to 1e-11, {bare}", n, *compare(lambda: quietly(theirs), loop, pairs))
        )
    return rows


def ridge_rows(n: int, strength: float, pairs: int) -> list[Row]:
    problem = Ridge(n, strength)
    rows: list[Row] = []
    for name, linear in (("CG(rtol=1e-10)", CG(rtol=1e-10)), ("Auto(rtol=1e-10)", Auto(rtol=1e-10))):
        theirs, same = torchopt_run(problem, False), torchopt_run(problem, True)
        if theirs is None or same is None:
            continue
        backward, prepare = backward_alone(problem, linear)
        torch.testing.assert_close(backward(prepare()), same(), rtol=1e-7, atol=1e-9)
        whole = lambda linear=linear: attached(problem, linear, False)  # noqa: E731
        label = f"ridge, backward alone by {name} / TorchOpt solve_cg, 90 steps forward + backward"
        rows.append((label, n, *compare(backward, theirs, pairs, prepare)))
        label = f"ridge, solution given, attach + backward by {name} / TorchOpt solve_cg, the same"
        rows.append((label, n, *compare(whole, same, pairs)))
    label = "ridge, minimize(GradientDescent), 90 steps, forward + backward / unrolled"
    rows.append((label, n, *compare(lambda: descend(problem), lambda: unroll(problem, True), pairs)))
    label = "ridge, fixed_point(Picard), 90 steps, forward + backward / unrolled"
    rows.append((label, n, *compare(lambda: descend_by_map(problem), lambda: unroll(problem, False), pairs)))
    matrix = (problem.x.mT @ problem.x + strength * torch.eye(n, dtype=D)).requires_grad_()

    def solved(solve: Callable[[Tensor, Tensor], Tensor]) -> Any:
        return torch.autograd.grad(solve(matrix, problem.solution) @ problem.weights, matrix)

    label = "linear_solve of a tensor, forward + backward / torch.linalg.solve"
    rows.append((label, n, *compare(lambda: solved(linear_solve), lambda: solved(torch.linalg.solve), pairs)))
    return rows


def table(quick: bool, strength: float) -> Iterator[Row]:
    pairs = 5 if quick else 25
    for n in (100,) if quick else (100, 1000):
        yield from tanh_rows(n, pairs)
        yield from ridge_rows(n, strength, pairs if n == 100 else max(pairs // 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 100 alone, few pairs")
    parser.add_argument("--ridge", type=float, default=1.0, help="strength of the ridge: smaller is worse conditioned")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| ours / theirs | n | ours, ms | theirs, ms | ratio |")
    print("|---|---|---|---|---|")
    for name, n, a, b, ratio in table(options.quick, options.ridge):
        print(f"| {name} | {n} | {1e3 * a:.2f} | {1e3 * b:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
