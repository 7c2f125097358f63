"""The search for a strength as in ``polytopes._mixing._search`` (numba), for one row: whoever calls takes the measure.

State: the logarithms of low, high and the next strength (in a power of two as unit); at low and high their mixings,
counts and values log((mixing - 1)/(goal - 1)); which of the two was measured, and which was last.
"""

from __future__ import annotations

import math

import numpy as np

from .cpu import jit

CLOSE, REACH, FARTHEST = 1e-2, 0.4, 160.0  # as in polytopes._mixing
SAMPLE, TYPICAL = 64, 0.5
LAST = 2


@jit
def state():  # type: ignore[no-untyped-def]
    return np.empty(3), np.empty(2), np.empty(2), np.empty(2), np.empty(3, np.int64)


@jit
def start(search, low, high, mix_low, mix_high, count_low, count_high):  # type: ignore[no-untyped-def]
    """Fills the state; returns the unit."""
    ends, mixes, counts, values, found = search
    unit = math.ldexp(1.0, math.frexp(high)[1])
    ends[0], ends[1] = math.log(low / unit), math.log(high / unit)
    mixes[0], mixes[1] = mix_low, mix_high
    counts[0], counts[1] = count_low, count_high
    values[0], values[1] = -math.inf, math.inf
    found[:] = 0
    return unit


@jit
def propose(search, goal, step, first):  # type: ignore[no-untyped-def]
    """Sets the next strength, ends[2], the logarithm ``first`` at step 0; True where the search has settled."""
    ends, mixes, counts, values, found = search
    last = abs(counts[0] - counts[1]) <= 1  # with a single step left inside, its place need not be exact
    width = ends[1] - ends[0]
    near = mixes[1] - mixes[0] <= CLOSE * goal
    if width < 1e-9 or (last and width < 1e-2) or near or mixes[0] >= goal:
        return True
    if step == 0:
        ends[2] = min(max(first, ends[0]), ends[1])
    elif found[0] and found[1]:
        guess = values[0] / (values[0] - values[1]) if values[0] != values[1] else math.nan
        blind = step % 4 == 3 or last or not math.isfinite(guess)
        ends[2] = ends[0] + (0.5 if blind else min(max(guess, 0.02), 0.98)) * width
    elif found[0]:
        ends[2] = min(ends[0] + REACH * 2.0 ** (step - 1), ends[1])
    else:
        ends[2] = max(ends[1] - REACH * 2.0 ** (step - 1), ends[0])
    return False


@jit
def accept(search, goal, mix, count):  # type: ignore[no-untyped-def]
    """Moves the bound that the measure at ends[2] replaces."""
    ends, mixes, counts, values, found = search
    to = 1 if mix >= goal else 0
    if found[0] and found[1] and found[LAST] == to:
        values[1 - to] /= 2
    ends[to], mixes[to], counts[to] = ends[2], mix, count
    values[to] = math.log((mix - 1) / (goal - 1)) if mix > 1 else -math.inf
    found[to], found[LAST] = 1, to


@jit
def strength(search, goal, unit):  # type: ignore[no-untyped-def]
    """The strength found."""
    ends, mixes, _, _, _ = search
    if ends[1] - ends[0] < 1e-8:
        ends[1] += 1e-3  # several steps at one place, from equal gaps: off the kink where they lie
    return unit * math.exp(ends[0] if mixes[0] >= goal else ends[1])
