"""soften against brute force: Python runs once for each sequence of decisions, with the weight of that sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from soften_paths import expected, found

CASES: dict[str, tuple[Callable[..., Any], tuple]] = {}


def case(*args: Any) -> Callable[..., Any]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__] = f, args
        return f

    return register


# --- loops over what the body changes ---------------------------------------------------------------------------------


@case(0.3, [1.0, 2.0])
def append_while_enumerating(x, a):
    total = 0.0
    for i, v in enumerate(a):
        if x > i and len(a) < 4:
            a.append(3.0)
        total = total + v
    return total, len(a)


@case(0.3)
def dict_items_see_new_values(x):
    d = {"a": 1.0, "b": 1.0}
    total, n = 0.0, 0
    for _, v in d.items():
        if x > 0:
            d["b"] = 5.0
            n += 1
        total += v
    for v in d.values():
        total += v
    return total, n


@case(0.3)
def zip_and_reversed_see_new_items(x):
    n, a = 0, [1.0, 2.0, 3.0]
    for i, (u, v) in enumerate(zip(a, reversed(a), strict=True), start=1):
        if x > i:
            a[2] = 7.0
            n += 1
        n += i
        a[0] = u + v
    return n, a


@case(0.3, -0.1)
def breaks_and_elses(x, y):
    n = 0
    for i in range(3):
        for j in range(2):
            if x > i:
                n += 1
                break
            if y > j:
                continue
            n += 10
        else:
            n += 100
            continue
        if y > i:
            break
    else:
        n += 1000
    return n


@case(0.3, -0.1)
def while_with_else(x, y):
    n = 0
    while n < 3:
        n += 1
        if x > n:
            continue
        if y > 0:
            break
    else:
        return "else", n
    return "break", n


# --- the value of and, or, if else ------------------------------------------------------------------------------------


@case(0.3, 2.0)
def or_is_one_of_its_operands(x, y):
    return 2 * (x or y), (0 or x)


@case(0.3, 2.0)
def and_is_one_of_its_operands(x, y):
    return 2 * (x > 0 and y)


@case(0.3)
def and_or_idiom(x):
    return (x > 0 and "yes") or "no"


@case(0.3)
def default_of_a_string(x):
    name = "" if x > 0 else "a"
    return name or "default"


@case(0.3, [1.0], [2.0])
def a_chosen_list_is_the_list(x, a, b):
    chosen = [a if x > 0 else b][0]
    chosen.append(5.0)
    return a, b


@case(0.3, [1.0], [2.0])
def a_chosen_list_is_not_changed(x, a, b):
    total = sum(a if x > 0 else b)
    return a, b, total


@case([0.3, 0.5], 0.4)
def equality_of_lists(a, y):
    return 1 if [a[0], 1] == [y, 1] else 2


# --- aliases and what is bound ----------------------------------------------------------------------------------------


@case(0.3)
def one_name_for_one_of_two_lists(x):
    a, b = [1.0], [1.0]
    c = a
    if x > 0:
        c = b
    c[0] = 5.0
    return a, b, 1 if c is a else 2


@case(0.3)
def a_list_in_a_tuple(x):
    a, b = [1.0], [1.0]
    pair = (a, b)
    if x > 0:
        pair = (b, a)
    pair[0].append(2.0)
    return a, b


@case(0.3)
def augmented_assignment_extends(x):
    a = [1.0]
    b = a
    if x > 0:
        b += [2.0]
    if x > 1:
        a = [*a, 3.0]
    return a, b


@case(0.3, -0.2)
def bound_where_the_state_says_so(x, y):
    s = 0
    if x > 0:
        s, z = 1, 2
        if y > 0:
            z = 3
    if s == 0:
        return 7
    return z


@case(0.3)
def sets_and_dicts(x):
    s, d = {1}, {"a": 1, "b": 2}
    t, e = s, d
    if x > 0:
        t.add(2)
        del e["a"]
    if x > 1:
        s = {5}
    return len(s), len(t), len(d)


@case(0.3, [1, 2, 3])
def slices_by_integers(x, a):
    k = 2 if x > 0 else 1
    b = a[:k]
    a[k:] = [9]
    del a[0]
    return a, b, a[-1]


@case(0.3)
def numbers_of_numpy(x):
    y, z, k = np.float64(1.0), np.float32(2.0), np.int64(1)
    if x > 0:
        y, z, k = np.float64(2.5), np.float32(2.5), np.int64(2)
    if x > 1:
        k = np.int64(2)
    return float(y), float(z), int(k)


# --- calls ------------------------------------------------------------------------------------------------------------


@case(0.3)
def functions_that_are_handed_on(x):
    return 1 if functools.partial(lambda a, b: a < b, 0)(x) else 2


@case(0.3)
def a_kept_function_reads_late(x):
    kept, k = [], 1
    kept.append(lambda: k)
    if x > 0:
        k = 2
    if x > 1:
        k = 3
    return kept[0]()


@case(0.3, -0.2)
def match_on_values(x, y):
    state, n = "low", 0
    for z in (x, y, 0.4):
        match state:
            case "low" | "start" if z > 0:
                state = "high"
            case "low":
                n += 1
                if z > 1:
                    break
            case None:
                return "none"
            case other if n > 5:
                state = other
            case other:
                state = None if z > 0.2 else "low"
                n += len(other)
    return state, n, 1 if n > 3 else 2


@case(0.3)
def match_on_a_number(x):
    match x:
        case 0.0:
            y = 1
        case 0.5 | 1.0:
            y = 2
        case _:
            y = 3
    return y


@case(0.3)
def contexts(x):
    context = torch.no_grad()
    with context:
        if x > 0:
            return 1
        for i in range(3):
            if x > i:
                break
        else:
            return 7
    return i


@case(0.3)
def inner_functions(x):
    scale = 1

    def scaled(v, power=2):
        """Reads scale when it is called."""
        return scale * v**power

    def larger(u, v):
        return "u" if u > v else "v"

    kept = lambda v: v + scale  # noqa: E731
    if x > 0.5:
        scale = 3
    return scaled(2), scaled(2, power=1), kept(1), larger(x, 0.1)


@case(0.3, -0.2)
def generator_expressions(x, y):
    n = 0
    for i, s in enumerate("a" if v > 0 else "b" for v in (x, y)):
        if s == "a":
            n += 1 + i
    for s in ("a" if v > 0 else "b" for v in (x, y)):
        n += 10 * (s == "a")
    return n


@case(0.3)
def named_expressions(x):
    n = 0
    while (y := x - n) > 0 and n < 3:
        n += 1
    return n, y


@pytest.mark.parametrize("name", CASES)
def test_worlds_are_the_paths_of_python(name: str) -> None:
    program, args = CASES[name]
    (mean, masses), (got, worlds) = expected(program, args), found(program, args)
    assert got == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert worlds == pytest.approx(masses, abs=1e-12)
    assert len(masses) > 1 or mean != 0
