"""What soften refuses, by file, line and reason; and that exceptions of the program stay what they are."""

from __future__ import annotations

import contextlib
import heapq
import linecache
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import smoothops as so
from smoothops.soften import SoftenError

soft = so.soften(smoothing=0.5)
X = torch.tensor(0.3, dtype=torch.float64)
TOTAL = [0.0]

AT_DECORATION = {
    "a generator": ("yield x", "generator would stop"),
    "global": ("global TOTAL\n    TOTAL = x", "global variable would be written"),
    "an item of a global": ("TOTAL[0] = x", "an item of TOTAL, which is no local variable"),
    "a method of a global": ("TOTAL.append(x)", r"TOTAL.append\(\) changes what is no local variable"),
    "try": ("try:\n        x = 1\n    except ValueError:\n        pass", "an exception has no weight"),
    "an inner function": ("def inner():\n        y = x\n        return y", "may only return an expression"),
    "a kept generator expression": ("y = (v for v in x)", "a generator expression that is kept"),
    "an attribute": ("x.value = 1", "the attribute .value of an object"),
    "locals()": ("y = locals()", "reaches around the local variables"),
    "next()": ("y = next(x)", "changes an iterator"),
    "a walrus in a comprehension": ("y = [(z := v) for v in x]", "inside of a comprehension"),
    "with as": ("with x as y:\n        pass", "with ... as name"),
    "a reserved name": ("_so_1 = x", "used by the generated code"),
}


def define(body: str, number: int = 0):
    source = f"def program(x):\n    z = 0\n    {body}\n    return z\n"
    name = f"<program {number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"TOTAL": TOTAL}
    exec(compile(source, name, "exec"), namespace)
    return namespace["program"]


@pytest.mark.parametrize("case", AT_DECORATION)
def test_refused_at_decoration(case: str) -> None:
    body, reason = AT_DECORATION[case]
    with pytest.raises(SoftenError, match=rf"<program 0>:3: program: .*{reason}"):
        soft(define(body))


def test_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="got type"):
        so.soften(int)
    with pytest.raises(SoftenError, match="not a lambda"):
        soft(lambda x: x)
    with pytest.raises(SoftenError, match="async"):

        @soft
        async def f(x):
            return x

    for bad in ({"max_iter": 0}, {"max_worlds": 2.5}):
        with pytest.raises(ValueError, match="must be a positive int"):
            so.soften(**bad)
    with pytest.raises(TypeError, match="smoothing must be"):
        so.soften(smoothing="soft")
    with pytest.raises(ValueError, match="only the taken path runs"):
        so.soften(smoothing=so.StraightThrough(0.1))
    namespace: dict = {}
    exec("def f(x): return x", namespace)
    with pytest.raises(SoftenError, match="source of f cannot be read"):
        soft(namespace["f"])


def test_patterns_are_refused() -> None:
    with pytest.raises(SoftenError, match=r"<program 0>:4: program: case takes values"):
        soft(define("match x:\n        case [a, b]:\n            z = a"))


AT_CALL = {
    "print": ("if x > 0:\n        print(x)", "4", "print cannot be softened"),
    "item": ("y = x.item()", "3", r".item\(\) takes the number out of its gradient"),
    "int": ("y = int(x)", "3", "an integer is discrete"),
    "in place": ("x.add_(1)", "3", r".add_\(\) changes a tensor in place"),
    "long": ("y = (x > 0).long()", "3", "would make a soft boolean hard"),
    "a number and a boolean": ("y = (x > 0) & 2", "3", "take another boolean"),
    "a filter": ("y = [v for v in [x, x] if v > 0]", "3", "its length would be soft"),
    "assert": ("assert x > 0", "3", "assert on a tensor"),
    "a mask": ("y = [1.0, 2.0][x > 0]", "3", "a mask that depends on a tensor"),
    "a number as index": ("y = [1.0, 2.0][x * 1]", "3", "a soft index holds one weight for each item"),
    "sort by key": ("y = sorted([x, x], key=abs)", "3", "sorting by key= on tensors"),
    "index": ("y = [x, x].index(x)", "3", "its answer would be soft"),
    "a look-up": ("y = x in {1.0: 2}", "3", "cannot be looked up in a dict"),
    "a view": (
        "t = x * TENSOR\n    row = t[0]\n    row[0] = 1", "5", "writes to a tensor that another variable is a view of"
    ),
    "dtype": ("y = LONG * 1\n    y[0] = x", "4", "a floating-point value is written to a tensor of dtype torch.int64"),
    "tuples": ("y = min([(x, 1), (x, 2)])", "3", "tuples that hold soft numbers"),
    "order of tuples": ("y = (x, 1) < (x, 2)", "3", "compare the numbers one by one"),
    "equal dicts": ("y = {1: x} == {1: x}", "3", "compare the numbers one by one"),
    "a heap": ("HEAP([x], x)", "3", r"heapq.heappush\(\) compares tensors"),
    "long of a number": ("y = x.long()", "3", "an integer is discrete"),
    "out=": ("TORCH.neg(x, out=x)", "3", "changes a tensor in place"),
    "in place by a function": ("TORCH.relu_(x)", "3", "changes a tensor in place"),
    "in place on an array": ("y = ARRAY\n    y += 1", "4", "would change a ndarray for all worlds"),
    "a list of the module": ("y = LIST\n    y.append(x)", "4", r"append\(\) changes LIST, which is no local variable"),
    "a row of the module": ("for row in LIST[0]:\n        row[0] = x", "4", "changes LIST"),
    "a list of an object": ("y = OBJECT.items\n    y[0] += x", "4", "changes .items"),
    "print in and": ("x > 0 and print(x)", "3", "print cannot be softened"),
    "append in and": ("y = [1]\n    x > 0 and y.append(1)", "4", "write an if statement"),
    "a name in a soft part": ("y = 1 + ((z := 3) if x > 0 else 4)", "3", "write an if statement"),
    "a change and a choice": ("y = [2]\n    y = [y.pop(), 'a' if x > 0 else 'b']", "4", "make it two statements"),
    "a name and a choice": ("y = [(z := 1), 'a' if x > 0 else 'b']", "3", "make it two statements"),
    "a function that changes": ("y = []\n    y = [CHANGE(y), 'a' if x > 0 else 'b']", "4", "make it two statements"),
    "an iterator": (
        "y = iter([1, 2])\n    if x > 0:\n        z = 1\n    for v in y:\n        z = v", "6", "make a list of it"
    ),
    "several lines": ("y = [\n        1,\n        int(\n        x),\n    ]", "5", "an integer is discrete"),
    "a returned lambda": ("y = lambda: x\n    return [y]", "4", "would outlive the worlds"),
    "a choice while a loop reads": (
        "for y in map(lambda v: 'a' if v > 0 else 'b', [x, x]):\n        z = y", "3", "make a list of it first"
    ),
    "suppress": ("with SUPPRESS(KeyError):\n        raise KeyError", "", "a context that suppresses exceptions"),
    "a context of a world": (
        "if x > 0:\n        z = 1\n    with CONTEXT(z):\n        z = z + 1", "5", "may differ between soft paths"
    ),
    "deep recursion": ("z = DEEP(x)", "", "80 calls deep"),
}  # fmt: skip


@soft
def deep(x):
    if x * 0 + 1 > 0:
        return deep(x)
    return x


@soft
def harmless(x):
    return x


@pytest.mark.parametrize("case", AT_CALL)
def test_refused_at_the_call(case: str) -> None:
    body, line, reason = AT_CALL[case]
    program = define(body, 1)
    values = {
        "TENSOR": torch.ones(2, 2), "LONG": torch.ones(2).long(), "DEEP": deep, "HEAP": heapq.heappush, "TORCH": torch,
        "ARRAY": np.zeros(2), "LIST": [[[1.0]]], "OBJECT": SimpleNamespace(items=[1.0]),
        "CHANGE": lambda y: y.append(1), "SUPPRESS": contextlib.suppress, "CONTEXT": contextlib.nullcontext,
    }  # fmt: skip
    program.__globals__.update(values)
    with pytest.raises(SoftenError, match=reason) as caught:
        soft(program)(X)
    if line:
        assert str(caught.value).startswith(f"<program 1>:{line}: ")


def test_answers_that_have_no_mean() -> None:
    @soft
    def f(x):
        return "yes" if x > 0 else "no"

    with pytest.raises(SoftenError, match=r"'yes' with weight 0.646, 'no' with weight 0.354; .* .worlds"):
        f(X)
    assert f.hard(X) == "yes"
    assert [value for _, value in f.worlds(X)] == ["yes", "no"]


def test_print_runs_where_the_weight_is_one(capsys) -> None:
    program = define(AT_CALL["print"][0], 2)
    soft(program)(100 * X)
    assert "30" in capsys.readouterr().out


def broken(x):
    if x > 0:
        y = [1.0][3]
        x = x + y
    return x


def test_exceptions_keep_type_and_line_and_tell_the_weight() -> None:
    with pytest.raises(IndexError, match="list index out of range") as caught:
        soft(broken)(torch.full((2,), 0.3, dtype=torch.float64))
    assert caught.value.__notes__ == ["raised on a soft path of weight 0.646 of <softened broken>"]
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.name) == (__file__, broken.__code__.co_firstlineno + 2, "broken")
    assert last.line == "y = [1.0][3]"


def test_exceptions_leave_no_mode_behind() -> None:
    before = len(_get_current_function_mode_stack())
    with pytest.raises(IndexError):
        so.soften(smoothing=so.Hard())(broken)(torch.tensor([1.0, -1.0]))
    assert len(_get_current_function_mode_stack()) == before


def test_a_variable_that_only_some_paths_bind() -> None:
    @soft
    def f(x):
        if x > 0:
            y = 1.0
        return y

    with pytest.raises(UnboundLocalError, match=r"'y'.*only some of the soft paths bind"):
        f(X)
    assert f.hard(X) == 1.0


def test_raise_and_assert_on_python_values() -> None:
    @soft
    def f(x, n):
        assert n > 0, "n must be positive"
        if n > 5:
            raise KeyError(n)
        return x

    assert f(X, 3) == X
    with pytest.raises(AssertionError, match="n must be positive"):
        f(X, 0)
    with pytest.raises(KeyError, match="7"):
        f(X, 7)


def test_a_soft_boolean_outside_of_the_program() -> None:
    def hard_library(p):
        return 1 if p else 0

    @soft
    def f(x):
        return hard_library(x > 0)

    with pytest.raises(TypeError, match="neither true nor false"):
        f(X)
    assert f(100 * X) == 1


def test_compile_refuses() -> None:
    with pytest.raises(Exception, match=r"cannot trace|Observed exception"):
        torch.compile(harmless, fullgraph=True, backend="eager")(X)


def test_wrong_arguments_are_pythons_error() -> None:
    with pytest.raises(TypeError, match=r"missing .*'x'"):
        harmless()
