"""soften: state, mutation, aliases and calls, each construct of the table in docs/soften.md."""

from __future__ import annotations

import math
import pickle
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from soften_tools import EPS, equal, real, soft, step

import smoothops as so

Point = namedtuple("Point", "x y")

# --- state ------------------------------------------------------------------------------------------------------------


@soft
def machine(xs):
    state, count = "low", 0
    for x in xs:
        if state == "low" and x > 1:
            state = "high"
            count += 1
        elif state == "high" and x < 0:
            state = "low"
    return count


def test_a_state_machine_is_a_markov_chain() -> None:
    xs = torch.tensor([0.8, 1.3, 0.2, -0.4, 1.1], dtype=torch.float64)
    chances = {("low", 0): real(1.0)}
    for x in xs:
        new: dict = {}
        for (state, count), p in chances.items():
            up = step(x - 1) if state == "low" else step(-x)
            other = ("high", count + 1) if state == "low" else ("low", count)
            for key, mass in ((other, p * up), ((state, count), p * (1 - up))):
                new[key] = new.get(key, 0) + mass
        chances = new
    equal(machine(xs), sum(count * p for (_, count), p in chances.items()))


@soft
def squared(x):
    y = 1.0 if x > 0 else -1.0
    return y * y


@soft
def kept_apart(x):
    y = 1 if x > 0 else -1
    return y * y


def test_the_mean_field_bias_and_its_remedy() -> None:
    equal(squared(real(0.0)), 0.0)
    equal(kept_apart(real(0.0)), 1.0)


@soft
def growing(xs):
    kept = []
    for x in xs:
        if x > 0:
            kept.append(x)
    return len(kept), sum(kept)


def test_lists_of_different_length_are_different_worlds() -> None:
    xs = torch.tensor([0.8, -0.3, 0.2], dtype=torch.float64)
    for found, want in zip(growing(xs), (step(xs).sum(), (step(xs) * xs).sum()), strict=True):
        equal(found, want)


def test_max_worlds_reports_what_is_lost() -> None:
    few = so.soften(smoothing=EPS, max_worlds=2)(growing.__wrapped__)
    with pytest.warns(RuntimeWarning, match=r"max_worlds=2 heaviest .* lost the mass 0.2"):
        few(torch.tensor([0.8, -0.3, 0.2], dtype=torch.float64))


# --- mutation and aliases ---------------------------------------------------------------------------------------------


@soft
def aliased(x, rows):
    row = rows[0]
    pair = {"first": row}
    if x > 0:
        row[1] = 5.0
        rows[1][0] += x
        pair["first"][0] *= 2
        del rows[1][1]
    return rows[0], rows[1][0]


def test_aliases_of_lists() -> None:
    rows = [[real(1.0), real(2.0)], [real(3.0), real(4.0)]]
    x = real(0.3)
    p = step(x)
    (first, second), last = aliased(x, rows)
    equal(first, 1 + p)
    equal(second, 2 + 3 * p)
    equal(last, 3 + p * x)
    assert [[float(v) for v in row] for row in rows] == [[1, 2], [3, 4]]


@soft
def written(a, x):
    b = a
    c = a.clone()
    if x > 0:
        b[1] += 10
        b[0, 0] = x
        b[:, 1] = 7.0
        b += 1
    return a, c


def test_tensors_change_for_all_their_names_but_not_for_the_caller() -> None:
    a = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
    x = real(0.3)
    p = step(x)
    changed = torch.tensor([[1.3, 8.0], [13.0, 8.0]], dtype=torch.float64)
    found, copied = written(a, x)
    equal(found, p * changed + (1 - p) * a)
    equal(copied, a)
    assert a.tolist() == [[0, 1], [2, 3]]
    equal(written.hard(a, x)[0], changed)


@soft
def soft_index(items, weights):
    before = items[weights]
    items[weights] = 0.0
    return before, items[0], items[1]


def test_a_soft_index_reads_and_writes_by_weight() -> None:
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for items in ([2.0, 4.0], torch.tensor([2.0, 4.0], dtype=torch.float64)):
        equal(torch.stack(soft_index(items, weights)), [3.5, 1.5, 1.0])


@soft
def structures(x, p):
    first, *rest = p
    low, high = (x, 0.0) if x < 0 else (0.0, x)
    q = Point(low, high)
    (u, [v, w]) = q.x, [q.y, len(rest)]
    names = [k + "!" for k in {"b": 1, "a": 2}]
    return {"sum": u + v, "point": Point(first, w), "names": names}


def test_structures() -> None:
    found = structures(real(0.3), Point(1.0, 2.0))
    equal(found["sum"], (1 - step(0.3)) * 0.3 + step(0.3) * 0.3)
    assert found["point"] == Point(1.0, 1)
    assert found["names"] == ["b!", "a!"]


# --- calls ------------------------------------------------------------------------------------------------------------


@soft
def builtins_(x):
    return (
        max(x), min(x[0], 0.2), abs(x[0]), round(x[1]), sum(v > 0 for v in x), any(v > 0 for v in x),
        all(v > 0 for v in x), max(1, 2), float(x[0]), math.exp(x[0]), len(x), sum(x),
    )  # fmt: skip


def test_builtins() -> None:
    x = torch.tensor([0.3, -0.2, 1.4], dtype=torch.float64)
    wanted = (
        so.amax(x, smoothing=EPS), so.minimum(x[0], real(0.2), smoothing=EPS), so.abs(x[0], smoothing=EPS),
        so.round(x[1], smoothing=EPS), step(x).sum(), so.any(step(x)), so.all(step(x)), 2, x[0], x[0].exp(), 3, x.sum(),
    )  # fmt: skip
    for found, want in zip(builtins_(x), wanted, strict=True):
        equal(found, want)


@soft
def sorting(xs):
    ys = list(xs)
    ys.sort(reverse=True)
    return sorted(xs), ys


def test_sorting() -> None:
    x = torch.tensor([0.3, -0.2, 1.4], dtype=torch.float64)
    rising, falling = sorting(x)
    equal(torch.stack(rising), so.sort(x, smoothing=EPS))
    equal(torch.stack(falling), so.sort(x, descending=True, smoothing=EPS))


@soft
def side(x):
    return "right" if x > 0 else "left"


@soft
def walk(xs):
    position = 0
    for x in xs:
        position += 1 if side(x) == "right" else -1
    return position


def test_nested_calls_keep_discrete_answers_apart() -> None:
    xs = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    equal(walk(xs), (2 * step(xs) - 1).sum())
    assert {value for _, value in walk.worlds(xs)} == {-3, -1, 1, 3}


@soft
def power(x):
    return x * power(x - 1) if x > 1 else 1.0


def test_recursion() -> None:
    equal(power.hard(real(3.5)), 3.5 * 2.5 * 1.5)
    x, product, wanted = real(3.5), real(1.0), real(0.0)
    for _ in range(60):
        p = step(x - 1)
        wanted, product, x = wanted + product * (1 - p), product * p * x, x - 1
    equal(power(real(3.5)), wanted)


class Shop:
    rate = 2.0

    @so.soften(smoothing=EPS)
    def price(self, x):
        return self.rate * x if x > 0 else 0.0


def test_methods_and_closures() -> None:
    equal(Shop().price(real(0.3)), step(0.3) * 0.6)
    assert float(Shop().price.hard(real(0.3))) == 0.6
    limit = real(0.1)

    @soft
    def inner(x):
        return 1.0 if x > limit else 0.0

    equal(inner(real(0.3)), step(0.2))
    assert inner.__name__ == "inner"


def test_contexts_and_comprehensions() -> None:
    @soft
    def f(xs, x):
        with torch.no_grad():
            scale = 1.0 * x
            if x > 0:
                scale = 2.0 * x
        return sum([scale * v for v in xs if v is not None])

    xs = [real(1.0).requires_grad_(), None]
    x = real(0.3).requires_grad_()
    y = f(xs, x)
    equal(y, 0.3 * (1 + step(0.3)))
    assert torch.autograd.grad(y, x, allow_unused=True)[0] is None


def test_dtypes_and_pickling() -> None:
    x = torch.tensor(0.3)
    assert squared(x).dtype == torch.float32
    assert machine([x, x]).dtype == torch.float32
    torch.testing.assert_close(squared(x), squared(x.double()).float())
    assert pickle.loads(pickle.dumps(squared)) is squared


def test_source_shows_the_generated_code() -> None:
    assert squared.source.startswith("def squared(_so):")
    assert "_so.decide(_so.compare(_w.x, '>', 0))" in squared.source


def test_every_test_that_the_table_names_is_there() -> None:
    here = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (here.parent / "docs" / "soften.md").read_text()))
    assert len(named) > 20
    there = {name for path in here.glob("test_soften*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named <= there, named - there


@pytest.mark.parametrize(("chance", "value", "slope"), [(0.5, 1e-14, 2e-13), (0.95, 1e-12, 2e-11)])
def test_long_loops_of_soft_exits(chance: float, value: float, slope: float) -> None:
    """Weights are products in float64: the geometric law of the number of steps, to rounding."""

    @so.soften(smoothing=1.0, max_iter=5000)
    def waiting(x):
        steps = 0.0
        while x < 0:
            steps = steps + 1.0
        return steps

    x = real(math.log((1 - chance) / chance)).requires_grad_()
    found = waiting(x)
    (gradient,) = torch.autograd.grad(found, x)
    assert found.item() == pytest.approx(chance / (1 - chance), rel=value)
    assert gradient.item() == pytest.approx(-chance / (1 - chance), rel=slope)


def test_weights_do_not_lose_their_gradient_in_no_grad() -> None:
    @soft
    def f(x):
        n = 0
        with torch.no_grad():
            if x > 0:
                n = 1
        if x > 1:
            n = 2
        return n

    x = real(0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    p, q = step(x.detach()), step(x.detach() - 1)
    equal(gradient, (2 - p) * q * (1 - q) / EPS)
