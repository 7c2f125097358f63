"""soften: branches, logic and loops, each construct of the table in docs/soften.md."""

from __future__ import annotations

import pytest
import torch
from soften_tools import EPS, equal, real, soft, step

import smoothops as so

# --- branches ---------------------------------------------------------------------------------------------------------


@soft
def branch(x):
    if x > 1:
        y = 2 * x
    elif x > 0:
        y = x + 5
    else:
        y = 1.0
    return y


@soft
def ternary(x):
    y = 2 * x if x > 1 else 3.0
    return y + (1.0 if x > 0 else x)


def test_branches() -> None:
    x = real(0.3)
    p, q = step(x - 1), step(x)
    equal(branch(x), p * 2 * x + (1 - p) * (q * (x + 5) + (1 - q)))
    equal(ternary(x), p * 2 * x + (1 - p) * 3 + q + (1 - q) * x)


@soft
def truths(x, y):
    return x > 0 and y > 0, x > 0 or y > 0, not x > 0, x == y, x != y, x >= y, x <= y


@soft
def chains(x):
    return 0 < x < 1, 1 > x >= 0, 0 < x < 1 < 2, 0 < x > 0.2


def test_logic_and_comparisons() -> None:
    x, y = real(0.3), real(-0.2)
    p, q = step(x), step(y)
    equals = so.eq(x, y, smoothing=EPS)
    wanted = (p * q, p + q - p * q, 1 - p, equals, 1 - equals, step(x - y), step(y - x))
    for found, want in zip(truths(x, y), wanted, strict=True):
        equal(found, want)
    inside = step(x) - step(x - 1)
    for found, want in zip(chains(x), (inside, inside, inside, p * step(x - 0.2)), strict=True):
        equal(found, want)
    assert [bool(v) for v in truths.hard(x, y)] == [False, True, False, False, True, True, False]
    assert all(chains.hard(x))


@soft
def truth_of_numbers(x, n):
    return (1 if x else 0) + (2 if n else 0) + (4 if not x else 0)


@soft
def membership(x, items):
    return x in items, x not in items, 2 in [1, 2]


def test_truth_of_a_number_is_that_it_is_not_zero() -> None:
    p = so.ne(real(0.3), 0.0, smoothing=EPS)
    equal(truth_of_numbers(real(0.3), 3), p + 2 + 4 * (1 - p))
    assert truth_of_numbers.hard(real(0.0), 0) == 4


def test_membership() -> None:
    x = real(0.3)
    a, b = so.eq(x, 0.0, smoothing=EPS), so.eq(x, 1.0, smoothing=EPS)
    found = membership(x, [0.0, 1.0])
    equal(found[0], a + b - a * b)
    equal(found[1], 1 - found[0])
    assert found[2] is True
    equal(membership(x, torch.tensor([0.0, 1.0], dtype=torch.float64))[0], found[0])


@soft
def of_torch(x, flag):
    above = x > 0
    both = above & (x < 1)
    return (
        both, above | flag, ~above, above ^ (x > 1), torch.where(above, x, 0.0), torch.any(above), above.mean(),
        above[0], above.sum(), (1.0 if above.all() else 0.0), sum(above[i] for i in range(len(above))),
    )  # fmt: skip


def test_soft_booleans_in_the_words_of_torch() -> None:
    x = torch.tensor([0.3, -0.2], dtype=torch.float64)
    p, q = step(x), step(x - 1)
    wanted = (
        p * (1 - q), p, 1 - p, p + q - 2 * p * q, p * x, so.any(p), p.mean(), p[0], p.sum(), p.prod(), p.sum()
    )  # fmt: skip
    for found, want in zip(of_torch(x, False), wanted, strict=True):
        equal(found, want)


# --- loops ------------------------------------------------------------------------------------------------------------


@soft
def countdown(x):
    steps = 0
    while x > 0:
        x -= 1
        steps += 1
    return steps


def test_while_is_the_loop_of_the_combinators() -> None:
    x = real(3.5).requires_grad_()
    start = (x, real(0.0))
    (_, wanted), _ = so.while_loop(lambda s: step(s[0]), lambda s: (s[0] - 1, s[1] + 1), start, 100)
    found = countdown(x)
    equal(found, wanted)
    equal(*(torch.autograd.grad(y, x)[0] for y in (found, wanted)))
    # the constants of the logistic law at eps 1
    reference = so.soften(smoothing=1.0)(countdown.__wrapped__)
    equal(reference(x), 3.2639162367849024)


def test_worlds_of_an_integer() -> None:
    worlds = countdown.worlds(real(3.5))
    assert {value for _, value in worlds} == set(range(len(worlds)))
    assert sum(float(weight) for weight, _ in worlds) == pytest.approx(1.0, abs=1e-12)
    assert [float(weight) for weight, _ in worlds] == sorted((float(weight) for weight, _ in worlds), reverse=True)


@soft
def loops(rows, x):
    total = 0.0
    for i, row in enumerate(rows):
        if row > 2:
            continue
        for other in rows:
            if other > x:
                break
            total += other
        else:
            total += 10
        if i == 3:
            return total, i
    else:
        total += 100
    return total, -1


def test_for_with_break_continue_else_and_return() -> None:
    rows = torch.tensor([0.5, 2.5, 1.0, 1.5], dtype=torch.float64)
    for x in (0.7, 5.0):
        for given in (rows[:3], rows):
            wanted = loops.__wrapped__(given.tolist(), x)
            sharp = so.soften(smoothing=1e-4)(loops.__wrapped__)
            for found in (loops.hard(given, real(x)), loops.hard(list(given), real(x)), sharp(given, real(x))):
                equal(torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in found]), wanted)


@soft
def around(x):
    for i in range(3):
        for j in range(3):
            if x > i * j - 1:
                continue
            if x < -5:
                break
            x = x + 0.1
        else:
            x = x * 1.01
            if x > i:
                continue
        break
    return x


def test_continue_in_the_else_of_a_loop_is_of_the_loop_around() -> None:
    for x in (0.1, 1.7, -0.4, -6.0):
        assert float(around.hard(real(x))) == around.__wrapped__(x)
        equal(sum(weight for weight, _ in around.worlds(real(x))), 1.0)


def test_max_iter_reports_the_mass_that_is_left() -> None:
    @so.soften(smoothing=1.0, max_iter=10)
    def forever(x):
        while x > 0:
            x = x + 0.01
        return x

    with pytest.warns(
        RuntimeWarning, match=r"test_soften.py:\d+: the loop did not halt within max_iter=10 .* mass 0.8"
    ):
        forever(real(4.0))

    @so.soften(smoothing=so.Hard(), max_iter=10)
    def endless(x):
        while True:
            if x < 0:
                break
        return x

    with pytest.warns(RuntimeWarning, match="mass 1 is left"):
        endless(real(4.0))


def test_python_loops_have_no_bound() -> None:
    @so.soften(max_iter=3)
    def long(x):
        i = 0
        while i < 50:
            i += 1
            if x > 0:
                x = x * 1.0
        return i

    assert long(real(0.1)) == 50
