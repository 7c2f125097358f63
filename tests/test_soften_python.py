"""What Python does, soften does: the rewritten program under Hard() and ``.hard`` on constructs of the language."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import soften_programs as programs
import torch
from hypothesis import given, settings
from soften_paths import converted
from soften_random import made
from soften_random import programs as random_programs
from test_soften_programs import CASES as PROGRAMS
from test_soften_random import HALVES, arguments, leaves
from torch import Tensor

import smoothops as so
from smoothops.soften import SoftenError

CASES: dict[str, tuple[Callable[..., Any], tuple]] = {}


def case(*args: Any) -> Callable[..., Any]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__] = f, args
        return f

    return register


@case([1.0, 2.0, 3.0])
def prefix_sums(a):
    for i, v in enumerate(a):
        if i + 1 < len(a):
            a[i + 1] += v
    return a


@case([1.0, 2.0, 3.0])
def loops_over_what_grows(a):
    for v in a:
        if v > 2.5 and len(a) < 6:
            a.append(v - 1)
    return a


@case([3.0, 1.0, 2.0])
def views_of_lists(a):
    out = []
    for u, v in zip(a, a[:2], strict=False):
        a[1] = 9.0
        if u > v:
            out.append(u)
    for u in reversed(a):
        a[0] = 8.0
        out.append(u)
    return out


@case(-1.0, [])
def chains_stop(x, a):
    return 1 if 0 < x < a[3] else 2


@case(0.5)
def named_expressions(x):
    n = 0
    if (y := x + 1) > 1:
        n = (m := 3) + n
    while (n := n + 1) < 10 and x > -1.2:
        x = x - 1
    return y, n, x, m


@case(1.0)
def lambdas(x):
    k = 2.0
    return list(map(lambda v, w=x, *, scale=k: (v + w) * scale, [1.0, 2.0])), max([1, 3, 2], key=lambda v: -v)


@case([1.0, 2.0, 3.0])
def augmented_assignment_of_lists(a):
    b = a
    a += [4.0]
    if a[0] > 0:
        b += [5.0]
    b *= 2
    return a, b, a is b


@case([[1.0, 2.0], [3.0]])
def lists_in_lists(a):
    r = a[0]
    d, t = {"k": r}, (r,)
    if r[0] > 0:
        r.append(7.0)
    d["k"][0] = 9.0
    t[0][1] += 1
    a[1:] = [r]
    return a


@case([1.0, 2.0, 3.0, 4.0])
def starred_targets(a):
    f, *m, last = a
    (p, *q), r = a[:2], a[2]
    if f > 0:
        m[0] = last
    a[0], *a[1:], b = last, f, m[1], 8.0
    i = 0
    i, a[i] = 1, 9.0
    return f, m, last, p, q, r, a, b, i


@case([1.0, 2.0, 3.0])
def else_of_loops(a):
    out = []
    for v in a:
        if v > 1.5:
            break
    else:
        out.append("no")
    for v in a:
        if v > 5:
            break
    else:
        out.append("none")
    i = 0
    while i < 3:
        if a[i] > 2.5:
            break
        i += 1
    else:
        out.append("no")
    while a[0] < 1.5:
        a[0] += 1
    else:
        out.append("ended")
    return out, i, v, a


@case([1.0, 2.0, 3.0])
def return_from_within(a):
    for v in a:
        for w in a:
            if v > 1.5:
                if w > 2.5:
                    return v, w
                continue
    return None


@case(1.0)
def iterators(x):
    it = iter([1.0, 2.0, 3.0, 4.0])
    total = 0.0
    for v in it:
        if v > x:
            break
    for v in it:
        total += v
    return total


@case(1.0)
def strings(x):
    n, text = 3, ""
    for c in "abc":
        text = text + c if x > 0 else c + text
    return f"{n:>{n}}" + (f"{text!r}" if x > 0 else "")


@case(1.0)
def deletion(x):
    a = [1, 2, 3]
    b, d = a, {1: 2, 3: 4}
    if x > 0:
        del a[0]
    del d[1], b[-1]
    return a, d


@case([1.0, 2.0])
def scopes_of_comprehensions(a):
    x = 5
    squares = [x * x for x in a if x is not None]
    table = {k: v + x for k, v in zip("ab", a, strict=True)}
    pairs = [(i, j) for i in range(3) for j in range(i) if i != 2]
    return x, squares, table, pairs


@case(2.0)
def several_targets(x):
    a = b = [x]
    b.append(1.0)
    if x > 1:
        a.append(2.0)
    for _ in []:
        x = x + 1
    for _ in range(0):
        x = x + 1
    else:
        x = x * 2
    return a, b, x


@case([0.5, 2.0, 1.0], [4, 2])
def keys(a, b):
    return max(range(3), key=lambda i: a[i]), min(range(3), key=lambda i: a[i]), sorted(b, key=lambda v: -v)


@case([3.0, 1.0, 2.0])
def methods_of_lists(a):
    b = a
    b.sort()
    a.reverse()
    return a, a.pop(), a.pop(0), b


@case(0.5)
def arguments_of_all_kinds(x, /, y=2.0, *rest, scale=3.0, **named):
    return (scale * y if x > 0 else x), len(rest), sorted(named)


def numbers(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {k: numbers(v) for k, v in x.items()}
    return type(x)(map(numbers, x)) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("name", CASES)
def test_hard_is_python(name: str) -> None:
    program, args = CASES[name]
    wanted = program(*copy.deepcopy(args))
    for f in (so.soften(smoothing=so.Hard())(program), so.soften(program).hard):
        tensors = converted(args, lambda v: torch.tensor(v, dtype=torch.float64), {})
        assert numbers(f(*tensors)) == wanted
        assert numbers(tensors) == args  # copies
    assert so.soften(program)(*copy.deepcopy(args)) == wanted


@pytest.mark.parametrize("name", PROGRAMS)
def test_hard_is_the_rewritten_program_under_hard(name: str) -> None:
    program, args = PROGRAMS[name]
    x = converted(args, lambda v: torch.tensor(v, dtype=torch.float64), {})
    soft = so.soften(smoothing=so.Hard())(program)
    assert numbers(soft.hard(*x)) == numbers(soft(*x)) == numbers(program(*copy.deepcopy(args)))


@settings(max_examples=100)
@given(random_programs(), HALVES)
def test_random_programs_run_as_written(source: str, values: list[float]) -> None:
    tensors = torch.tensor(values, dtype=torch.float64)
    soft = so.soften(smoothing=so.Hard())(made(source))
    for given_ in (arguments(tensors.unbind(0)), (*tensors[:3].unbind(0), tensors[3:])):
        found, wanted = (leaves(f(*given_)) for f in (soft.hard, soft))
        assert [torch.as_tensor(v).tolist() for v in found] == [torch.as_tensor(v).tolist() for v in wanted], source
    assert tensors.tolist() == values


def test_hard_on_a_tensor_takes_numbers_as_values() -> None:
    x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for program in (programs.bubble_sort, prefix_sums):
        soft = so.soften(smoothing=so.Hard())(program)
        assert soft.hard(x).tolist() == soft(x).tolist() == program(x.tolist())
    (gradient,) = torch.autograd.grad(so.soften(prefix_sums).hard(x).sum(), x)
    assert gradient.tolist() == [3.0, 2.0, 1.0]
    assert x.tolist() == [3.0, 1.0, 2.0]


def test_hard_keeps_aliases_among_the_arguments() -> None:
    def f(a, b, t, u):
        a.append(1)
        t[0] = 5.0
        t += 1
        return len(b), u[0], a is b

    rows, vector = [torch.tensor(1.0)], torch.zeros(2)
    for run in (so.soften(f).hard, so.soften(smoothing=so.Hard())(f)):
        length, first, same = run(rows, rows, vector, vector)
        assert (length, float(first), same) == (2, 6.0, True)
    assert len(rows) == 1
    assert vector.tolist() == [0, 0]


def test_hard_of_what_python_has_no_meaning_for() -> None:
    soft = so.soften(smoothing=0.3)(programs.root_or_zero)
    x = torch.tensor([-1.0, 4.0])
    assert soft.hard(x).tolist() == [0.0, 2.0]
    assert torch.vmap(soft.hard)(x).tolist() == [0.0, 2.0]
    weighted = so.soften(lambda_free)
    for items in ([2.0, 4.0], torch.tensor([2.0, 4.0])):
        assert float(weighted.hard(items, torch.tensor([0.25, 0.75]))) == 3.5


def lambda_free(items, weights):
    return items[weights]


class Counter:
    def __init__(self) -> None:
        self.__step = 2.0

    @so.soften(smoothing=0.5)
    def count(self, x):
        __twice = 2 * self.__step
        return __twice if x > 0 else 0.0

    @classmethod
    @so.soften(smoothing=0.5)
    def made(cls, x):
        return cls.__name__ if x > 0 else "none"

    @staticmethod
    @so.soften(smoothing=0.5)
    def free(x):
        return 1 if x > 0 else 2


def test_methods_of_all_kinds() -> None:
    x = torch.tensor(1.0)
    assert float(Counter().count.hard(x)) == 4.0
    assert float(so.soften(smoothing=so.Hard())(Counter.count.__wrapped__)(Counter(), x)) == 4.0

    @so.soften(smoothing=so.Hard())
    def calls(x):
        return Counter.made(x), Counter().made(-x), Counter.free(x), functools.partial(Counter.free, x)()

    assert calls(x) == calls.hard(x) == ("Counter", "none", 1, 1)


def test_decorators() -> None:
    def twice(f):
        @functools.wraps(f)
        def wrapper(*args):
            return 2 * f(*args)

        return wrapper

    @twice
    @so.soften(smoothing=so.Hard())
    def above(x):
        return 1.0 if x > 0 else 0.0

    assert above(torch.tensor(1.0)) == 2.0
    with pytest.raises(SoftenError, match="below the other decorators"):

        @so.soften
        @twice
        def below(x):
            return x


def test_errors_of_python_stay() -> None:
    def outside(a):
        a[len(a)] = 1.0
        return a

    def shorter(a):
        for pair in zip(a, [1.0], strict=True):
            a = [pair]
        return a

    def resized(x):
        d = {"a": x}
        for key in d:
            d[key + "b"] = x
        return d

    x = torch.tensor([1.0, 2.0])
    for f, args, error in (
        (outside, (x,), IndexError),
        (outside, (list(x),), IndexError),
        (shorter, (list(x),), ValueError),
    ):
        with pytest.raises(error):
            so.soften(f)(*args)
    with pytest.raises(RuntimeError, match="changed size during iteration"):
        so.soften(resized)(x[0])
