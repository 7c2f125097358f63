"""Random small programs: integer and float state, a list, branches, loops, break, continue and return."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from itertools import count
from typing import Any

from hypothesis import strategies as st

FLOATS, INTS = ("x", "y", "z"), ("k", "m")
NUMBER = count()


@st.composite
def floating(draw, depth: int = 1) -> str:
    kind = draw(st.integers(0, 6 if depth else 2))
    if kind < 2:
        return draw(st.sampled_from(FLOATS))
    if kind == 2:
        return draw(st.sampled_from(("0.5", "-1.0", "2.0", "a[k % 3]", "a[m % 3]", "a[-1]")))
    if kind == 6:
        return f"({draw(floating(0))} if {draw(condition(0))} else {draw(floating(0))})"
    return f"({draw(floating(0))} {draw(st.sampled_from(('+', '-')))} {draw(floating(0))}) * 0.5"


@st.composite
def condition(draw, depth: int = 1) -> str:
    kind = draw(st.integers(0, 7 if depth else 4))
    if kind < 3:
        return f"{draw(floating(0))} {draw(st.sampled_from(('<', '<=', '>', '>=')))} {draw(floating(0))}"
    if kind == 3:
        return f"{draw(st.sampled_from(INTS))} {draw(st.sampled_from(('<', '>=', '==')))} {draw(st.integers(0, 3))}"
    if kind == 4:
        return f"-1.0 {draw(st.sampled_from(('<', '<=')))} {draw(floating(0))} < 1.5"
    if kind == 5:
        return f"not ({draw(condition(0))})"
    return f"({draw(condition(0))}) {draw(st.sampled_from(('and', 'or')))} ({draw(condition(0))})"


@st.composite
def statement(draw, depth: int, loop: bool) -> list[str]:
    kind = draw(st.integers(0, 11 if depth else 4))
    if kind == 0:
        return [f"{draw(st.sampled_from(FLOATS))} = {draw(floating())}"]
    if kind == 1:
        return [f"{draw(st.sampled_from(FLOATS))} {draw(st.sampled_from(('+', '-')))}= {draw(floating())}"]
    if kind == 2:
        return [f"{draw(st.sampled_from(INTS))} = ({draw(st.sampled_from(INTS))} + {draw(st.integers(1, 2))}) % 4"]
    if kind == 3:
        return [f"a[{draw(st.sampled_from(INTS))} % 3] {draw(st.sampled_from(('=', '+=')))} {draw(floating(0))}"]
    if kind == 4:
        i, j = draw(st.sampled_from(INTS)), draw(st.integers(0, 2))
        return [f"a[{i} % 3], a[{j}] = a[{j}], a[{i} % 3]"]
    if kind < 8:
        lines = [f"if {draw(condition())}:", *draw(block(depth - 1, loop))]
        if draw(st.booleans()):
            lines += [f"elif {draw(condition())}:", *draw(block(depth - 1, loop))]
        return lines + (["else:", *draw(block(depth - 1, loop))] if draw(st.booleans()) else [])
    if kind == 8:
        lines = [f"for i{depth} in {draw(st.sampled_from(('range(2)', 'range(k)', 'a', '(z, 0.5)')))}:"]
    elif kind == 9:
        name = f"i{depth}"
        lines = [f"{name} = 0", f"while {name} < 2 and {draw(condition(0))}:", f"    {name} += 1"]
    elif loop:
        leave = draw(st.sampled_from(("break", "continue")))
        return [f"if {draw(condition(0))}:", f"    {leave}"]
    else:
        return [f"if {draw(condition(0))}:", f"    return {draw(floating())}, k, a"]
    lines += draw(block(depth - 1, True))
    if draw(st.integers(0, 2)):
        return lines
    lines += ["else:", *draw(block(0, False))]
    if loop and draw(st.booleans()):  # of the loop around
        lines += [f"    if {draw(condition(0))}:", f"        {draw(st.sampled_from(('break', 'continue')))}"]
    return lines


@st.composite
def block(draw, depth: int, loop: bool) -> list[str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        lines += draw(statement(depth, loop))
    return ["    " + line for line in lines]


@st.composite
def programs(draw, depth: int = 3) -> str:
    body = draw(block(depth, False)) + draw(block(depth, False))
    return "\n".join(["def program(x, y, z, a, k=1, m=2):", *body, "    return x, y, z, k, m, a", ""])


def made(source: str) -> Callable[..., Any]:
    """The function, its source where inspect finds it."""
    name = f"<random program {next(NUMBER)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace)
    return namespace["program"]
