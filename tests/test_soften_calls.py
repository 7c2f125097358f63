"""soften: softened functions that call each other see what changes, as Python does."""

from __future__ import annotations

import copy

import pytest
import torch
from soften_paths import expected, found
from soften_tools import EPS, equal, real, soft, step

import smoothops as so


@soft
def swap(a, i, j):
    a[i], a[j] = a[j], a[i]


@soft
def partition(a, low, high):
    pivot, i = a[high], low
    for j in range(low, high):
        if a[j] < pivot:
            swap(a, i, j)
            i += 1
    swap(a, i, high)
    return i


@soft
def quicksort(a, low, high):
    if low < high:
        middle = partition(a, low, high)
        quicksort(a, low, middle - 1)
        quicksort(a, middle + 1, high)
    return a


def test_quicksort_in_place() -> None:
    numbers = [3.0, 1.0, 2.0, 5.0, 4.0]
    x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    for given in (x, list(x.unbind(0))):
        for run in (so.soften(smoothing=so.Hard())(quicksort.__wrapped__), quicksort.hard):
            assert [torch.as_tensor(v).item() for v in run(given, 0, 4)] == sorted(numbers)
        assert [v.item() for v in given] == numbers
    assert quicksort(list(numbers), 0, 4) == sorted(numbers)
    sharp = so.soften(smoothing=0.02)(quicksort.__wrapped__)
    y = torch.stack([torch.as_tensor(v) for v in sharp(list(x.unbind(0)), 0, 4)])
    torch.testing.assert_close(y, x.sort().values)


def push(a, x, d):
    if x > 0:
        a.append(1)
        d["n"] = d.get("n", 0) + 1
        return a
    return [a, a]


push_softly = soft(push)


def outer(push):
    """A program that calls push twice by two names of one list."""

    def program(x, y):
        a = [0]
        b, d = a, {}
        first = push(a, x, d)
        second = push(b, y, d)
        n = 1 if first is a else 2
        if second is a and first is second:
            n += 10
        return n, a, b, d.get("n", 0), 1 if a is b else 2

    return program


def test_what_a_call_changes_and_returns_is_the_callers() -> None:
    args = (0.3, -0.2)
    (mean, masses), (got, worlds) = expected(outer(push), args), found(outer(push_softly), args)
    assert got == pytest.approx(mean, rel=1e-12)
    assert worlds == pytest.approx(masses, abs=1e-12)
    assert len(masses) == 4


@soft
def write(a, x):
    if x > 0:
        a[0] = 5.0


@soft
def writes(a, x):
    b = a
    write(a, x)
    return b


def test_tensors_change_for_the_caller() -> None:
    a, x = torch.tensor([1.0, 2.0], dtype=torch.float64), real(0.3)
    p = step(x)
    equal(writes(a, x), torch.stack([1 + 4 * p, real(2.0)]))
    assert a.tolist() == [1.0, 2.0]
    assert writes.hard(a, x).tolist() == [5.0, 2.0]


def test_the_largest_by_a_key() -> None:
    @soft
    def leader(scores, names):
        return max(range(len(scores)), key=lambda i: scores[i]), min(names, key=lambda name: scores[len(name)])

    scores = torch.tensor([0.5, 0.7, -0.3], dtype=torch.float64)
    worlds = leader.worlds(scores, ["", "a", "bb"])
    largest, smallest = so.argmax(scores, smoothing=EPS), so.argmin(scores, smoothing=EPS)
    for weight, (i, name) in worlds:
        equal(weight, largest[i] * smallest[len(name)])
    assert len(worlds) == 9
    assert leader.hard(scores, ["", "a", "bb"]) == (1, "bb")


def test_calls_of_python_values_run_as_written() -> None:

    @soft
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    assert fibonacci(15) == 610
    given = [[2.0, 1.0]]
    assert quicksort(copy.deepcopy(given)[0], 0, 1) == [1.0, 2.0]
