"""Textbook programs under soften: Python's answer under Hard() and as eps -> 0, true derivatives when soft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import soften_programs as programs
import torch
from oracles import loss
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import smoothops as so

GLIDER = [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
BOARD = [[float(cell) for cell in row] for row in GLIDER]
SMALL = [[float(cell) for cell in row[:3]] for row in GLIDER[:3]]
CASES: dict[str, tuple[Callable[..., Any], tuple]] = {
    "bubble sort": (programs.bubble_sort, ([3.0, 1.0, 2.0, 0.5, 1.7],)),
    "insertion sort": (programs.insertion_sort, ([3.0, 1.0, 2.0, 0.5, 1.7],)),
    "quickselect": (programs.quickselect, ([3.0, 1.0, 2.0, 0.5, 4.0], 2)),
    "median by counting": (programs.median_by_counting, ([3.0, 1.0, 2.0, 0.5, 4.0],)),
    "binary search": (programs.binary_search, ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 4.4)),
    "Levenshtein": (programs.levenshtein, ([1.0, 2.0, 3.0, 4.0], [2.1, 3.1, 5.1], 0.5)),
    "Bellman-Ford": (programs.bellman_ford, ([4.0, 1.0, 2.0, 5.0, 8.0, 2.0, 6.0, 3.0],)),
    "thermostat": (programs.thermostat, (18.05, 17.0, 19.0)),
    "bouncing ball": (programs.bouncing_ball, (1.03, 0.02, 0.87)),
    "tax brackets": (programs.tax, (4.5, 0.1)),
    "tokenizer": (programs.tokens, ([0.1, 2.0, 3.0, 0.2, 1.5, 0.1, 0.2, 4.0], 1.0)),
    "Newton's square root": (programs.newton_sqrt, (7.3,)),
    "game of life": (programs.life, (BOARD, 1)),
}
# Entropy makes every path possible: programs with many paths are checked on a compact law
SLOW = {"bouncing ball": (programs.bouncing_ball, (0.3, 0.02, 0.87, 14)), "game of life": (programs.life, (SMALL, 1))}


def with_tensors(x: Any, tensors: Iterator[Tensor]) -> Any:
    """x with its floats replaced."""
    if isinstance(x, float):
        return next(tensors)
    return type(x)(with_tensors(item, tensors) for item in x) if isinstance(x, (list, tuple)) else x


def numbers(x: Any) -> list:
    return [leaf for item in x for leaf in numbers(item)] if isinstance(x, (list, tuple)) else [x]


def floats(args: tuple) -> Tensor:
    return torch.tensor([v for v in numbers(args) if isinstance(v, float)], dtype=torch.float64)


def flat(result: Any, x: Tensor) -> Tensor:
    """What a program returns, as one vector that depends on x."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) + 0 * x.sum() for v in numbers(result)])


@pytest.mark.parametrize("name", CASES)
def test_hard_runs_and_the_limit_are_pythons(name: str) -> None:
    program, args = CASES[name]
    wanted = numbers(program(*copy.deepcopy(args)))
    x = floats(args)
    for smoothing in (so.Hard(), 1e-6, so.Quadratic(1e-6)):
        found = numbers(so.soften(smoothing=smoothing)(program)(*with_tensors(args, iter(x.unbind(0)))))
        assert [float(v) for v in found] == pytest.approx([float(v) for v in wanted], rel=1e-5, abs=1e-5)
    soft = so.soften(smoothing=0.1)(program)
    hard = numbers(soft.hard(*with_tensors(args, iter(x.unbind(0)))))
    for got, want in zip(hard, wanted, strict=True):
        assert float(got) == want
        assert type(got) is type(want) or (isinstance(got, Tensor) and isinstance(want, float))
    assert numbers(soft(*args)) == wanted


@pytest.mark.parametrize("smoothing", [so.Entropy(0.1), so.Quadratic(0.3)], ids=["Entropy", "Quadratic"])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str, smoothing: so.Smoothing) -> None:
    program, args = SLOW.get(name, CASES[name])
    soft = so.soften(smoothing=smoothing)(program)
    x = floats(args)
    x = (x + 0.0137 * torch.randn_like(x)).requires_grad_()

    def value(v: Tensor) -> Tensor:
        return loss(flat(soft(*with_tensors(args, iter(v.unbind(0)))), v))

    assert gradcheck(value, (x,), check_forward_ad=True)


def test_a_tensor_in_place_of_a_list() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for program in (programs.bubble_sort, programs.insertion_sort):
        soft = so.soften(smoothing=0.3)(program)
        torch.testing.assert_close(soft(x), torch.stack(soft(list(x))))
        assert torch.equal(soft.hard(x), x.sort().values)
        assert x.tolist() == [3.0, 1.0, 2.0, 0.5]
        assert gradcheck(soft, (x,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(soft, (x,))


def test_transforms() -> None:
    soft = so.soften(smoothing=0.3)(programs.bubble_sort)
    x = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(soft)(x), torch.stack([soft(row) for row in x]))
    one_by_one = torch.stack([torch.autograd.functional.jacobian(soft, row) for row in x])
    torch.testing.assert_close(vmap(jacrev(soft))(x), one_by_one)
    torch.testing.assert_close(vmap(jacfwd(soft))(x), one_by_one)
    second = torch.autograd.functional.hessian(lambda v: loss(soft(v)), x[0])
    torch.testing.assert_close(hessian(lambda v: loss(soft(v)))(x[0]), second)


def test_a_batch_of_conditions() -> None:
    incomes = torch.linspace(0.2, 8, 7, dtype=torch.float64, requires_grad=True)
    for smoothing in (0.2, so.Quadratic(0.3), so.Hard()):
        soft = so.soften(smoothing=smoothing)(programs.tax)
        together, apart = soft(incomes, 0.1), [soft(v, 0.1) for v in incomes]
        torch.testing.assert_close(together, torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in apart]))
        alone = torch.stack([v + 0 * incomes[0] for v in apart])
        (a,), (b,) = (torch.autograd.grad(loss(v), incomes, retain_graph=True) for v in (together, alone))
        torch.testing.assert_close(a, b)


def test_an_untaken_path_leaves_no_nan() -> None:
    y = torch.tensor([-1.0, 2.0, 0.04, -30.0], dtype=torch.float64, requires_grad=True)
    for smoothing in (so.Hard(), so.Quadratic(0.02), so.Quadratic(0.1)):
        soft = so.soften(smoothing=smoothing)(programs.root_or_zero)
        for given in (y, *y.unbind(0)):
            (gradient,) = torch.autograd.grad(soft(given).sum(), y)
            assert gradient.isfinite().all()
    assert torch.equal(so.soften(programs.root_or_zero).hard(y), torch.where(y > 0, y, 0).sqrt())


def test_ten_generations_of_life() -> None:
    wanted = programs.life(BOARD, 10)
    soft = so.soften(smoothing=so.Quadratic(0.4))(programs.life)
    board = torch.tensor(BOARD, dtype=torch.float64)
    cells = [list(row.unbind(0)) for row in board]
    assert [[float(v) for v in row] for row in soft(cells, 10)] == wanted
    assert [[float(v) for v in row] for row in soft.hard(cells, 10)] == wanted
    # far from 0 and 1, where ten generations still depend on the first
    given = (0.2 + 0.5 * torch.rand(3, 3, dtype=torch.float64)).requires_grad_()
    wide = so.soften(smoothing=so.Entropy(0.5))(programs.life)

    def end(v: Tensor) -> Tensor:
        return loss(flat(wide([list(row.unbind(0)) for row in v], 10), v))

    (gradient,) = torch.autograd.grad(end(given), given)
    assert gradient.abs().max() > 0.01
    assert gradcheck(end, (given,), fast_mode=True)


def test_collatz_is_a_program_of_integers_and_stays_python() -> None:
    soft = so.soften(programs.collatz)
    assert [soft(n) for n in range(1, 30)] == [programs.collatz(n) for n in range(1, 30)]
    assert soft(torch.tensor(27)) == 111  # an integer tensor is discrete too
