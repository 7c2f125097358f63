"""The search for a strength as in ``polytopes._mixing._search`` (numba), for one row: whoever calls takes the measure.

State: the logarithms of low, high and the next strength (in a power of two as unit), their mixings, their counts.
"""

from __future__ import annotations

import math

from .cpu import jit

CLOSE = 1e-3  # as in polytopes._mixing


@jit
def start(ends, mixes, counts, low, high, mix_low, mix_high, count_low, count_high):  # type: ignore[no-untyped-def]
    """Fills the state; returns the unit."""
    unit = math.ldexp(1.0, math.frexp(high)[1])
    ends[0], ends[1] = math.log(low / unit), math.log(high / unit)
    mixes[0], mixes[1] = mix_low, mix_high
    counts[0], counts[1] = count_low, count_high
    return unit


@jit
def propose(ends, mixes, counts, goal, step):  # type: ignore[no-untyped-def]
    """Sets the next strength, ends[2]; True where the search has settled."""
    last = abs(counts[0] - counts[1]) <= 1  # with a single step left inside, its place need not be exact
    width = ends[1] - ends[0]
    near = mixes[1] - mixes[0] <= CLOSE * goal
    if width < 1e-9 or (last and width < 1e-2) or near or mixes[0] >= goal:
        return True
    # interpolate log mixing, and bisect every third time
    guess = math.log(goal / mixes[0]) / math.log(mixes[1] / mixes[0])
    blind = step % 3 == 0 or last or not math.isfinite(guess)
    ends[2] = ends[0] + (0.5 if blind else min(max(guess, 0.02), 0.98)) * width
    return False


@jit
def accept(ends, mixes, counts, goal, mix, count):  # type: ignore[no-untyped-def]
    """Moves the bound that the measure at ends[2] replaces."""
    to = 1 if mix >= goal else 0
    ends[to], mixes[to], counts[to] = ends[2], mix, count


@jit
def strength(ends, mixes, goal, unit):  # type: ignore[no-untyped-def]
    """The strength found."""
    if ends[1] - ends[0] < 1e-8:
        ends[1] += 1e-3  # several steps at one place, from equal gaps: off the kink where they lie
    return unit * math.exp(ends[0] if mixes[0] >= goal else ends[1])
