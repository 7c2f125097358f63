"""The run of a softened function: the worlds that stand at the present line, and where the others went.

Generated code goes through the program once for all worlds: a statement runs in each of the running ones, ``if`` and
``while`` split them by the weight of their condition, ``break``, ``continue`` and ``return`` take them out of the
running ones, and where paths meet they are merged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..control._guard import guarded
from ..smoothing import SmoothingLike
from .errors import cannot, here
from .expressions import Expressions
from .frames import Frame, copied, frozen
from .merging import merged
from .values import SoftBool, truth
from .weights import ROUNDING, Weight, absent, carried, heaviest, negligible, outlook, sides


class Opaque:
    """What a loop goes through, read once and cached, where none of it can change."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.items = iterator, []  # type: ignore[var-annotated]

    def has(self, i: int) -> bool:
        while len(self.items) <= i:
            try:
                self.items.append(next(self.iterator))
            except StopIteration:
                return False
        return True

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Loop:
    """Where the worlds of one loop went, and how far it is."""

    def __init__(self, mass: float) -> None:
        self.exits: list[Frame] = []
        self.breaks: list[Frame] = []
        self.continued: list[Frame] = []
        self.mass, self.position, self.counted, self.seen = mass, -1, 0, 0
        self.tested = False  # whether a condition on tensors decided on this iteration


class Options(NamedTuple):
    """How a softened function runs; ``aliases``: whether it writes to items, so that names of one tensor matter."""

    smoothing: SmoothingLike
    max_iter: int
    max_worlds: int
    aliases: bool


class Run(Expressions):
    """One call of a softened function."""

    def __init__(self, variables: dict[str, Any], options: Options, caller: Expressions | None = None) -> None:
        self.smoothing, self.max_iter, self.max_worlds, self.aliases = options
        self.depth = 0 if caller is None else caller.depth + 1
        frame = Frame(variables, (), 1.0 if caller is None else caller.frame._so_mass)
        self.partial = caller is not None and (caller.partial or bool(caller.frame._so_weight))
        self.running = [frame]
        self.frame = frame  # the world in which a statement runs just now
        self.branches: list[tuple[list[Frame], list[Frame], bool]] = []
        self.loops: list[Loop] = []
        self.broken: list[list[Frame]] = []  # worlds that left a loop by break while its else runs
        self.returned: list[Frame] = []
        self.decisions: list[tuple[Frame, Any]] = []
        self.soft_decisions = 0
        self.lost = 0.0
        self.script: tuple[Any, ...] = ()
        self.at = 0
        self.pending: list[tuple[Frame, tuple[Any, ...]]] = []
        self.changed = False

    # --- statements ---------------------------------------------------------------------------------------------------

    def each(self) -> Iterator[Frame]:
        """The running worlds one by one; one whose statement makes a choice comes again for each other outcome."""
        done = []
        self.compared = {}
        for world in self.running:
            self.pending = [(world, ())]
            while self.pending:
                self.frame, self.script = self.pending.pop()
                self.at, self.changed = 0, False
                dead = absent(self.frame._so_weight, self.frame._so_mass)
                if dead is None:
                    yield self.frame
                else:
                    with guarded(dead):
                        yield self.frame
                done.append(self.frame)
        self.running = done

    def choose(self, outcomes: Sequence[tuple[Weight, Any]]) -> Any:
        """One of several outcomes of an expression; the statement runs again for the others, each with its weight."""
        if self.at < len(self.script):
            self.at += 1
            return copied(self.script[self.at - 1], {})
        if len(outcomes) > 1 and self.changed:
            raise cannot("a list is changed and a soft choice is made in one statement; make it two statements")
        weight, mass = self.frame._so_weight, self.frame._so_mass
        forks = [self.frame, *(self.frame._so_fork() for _ in outcomes[1:])]
        for fork, (more, value) in zip(forks, outcomes, strict=True):
            fork._so_weight = weight + more
            fork._so_mass = mass
            for factor in more:
                fork._so_mass = carried(fork._so_mass, factor.value)
            if fork is not self.frame:
                self.pending.append((fork, (*self.script, value)))
        self.script = (*self.script, outcomes[0][1])
        self.at += 1
        return outcomes[0][1]

    # --- branches -----------------------------------------------------------------------------------------------------

    def decide(self, condition: Any) -> None:
        """The condition of the present world."""
        self.decisions.append((self.frame, condition))

    def split(self) -> tuple[list[Frame], list[Frame], bool]:
        """The running worlds by their conditions, and whether one of them was soft."""
        yes: list[Frame] = []
        no: list[Frame] = []
        was_soft = False
        for frame, condition in self.decisions:
            value = truth(condition, self.smoothing)
            if not isinstance(value, SoftBool):
                (yes if value else no).append(frame)
                continue
            was_soft = True
            self.soft_decisions += 1
            self.fork(frame, value, yes, no)
        self.decisions = []
        return yes, no, was_soft

    def fork(self, frame: Frame, value: SoftBool, yes: list[Frame], no: list[Frame]) -> None:
        p = value.p.reshape(()) if value.p.numel() == 1 else value.p
        certain, masses = outlook(frame._so_mass, p)
        if certain is not None:
            (yes if certain else no).append(frame)
            return
        weight = frame._so_weight
        both = zip(sides(p, value.dtype), masses, (yes, no), strict=True)
        taken = sorted(both, key=lambda side: -heaviest(side[1]))
        taken = taken[: 1 if negligible(taken[1][1]) else 2]
        worlds = [frame, *(frame._so_fork() for _ in taken[1:])]
        for world, (factor, mass, to) in zip(worlds, taken, strict=False):
            world._so_weight, world._so_mass = (*weight, factor), mass
            to.append(world)

    def then(self) -> bool:
        yes, no, was_soft = self.split()
        self.branches.append((no, [], was_soft))
        self.running = yes
        return bool(yes)

    def orelse(self) -> bool:
        no, _, was_soft = self.branches.pop()
        self.branches.append(([], self.running, was_soft))
        self.running = no
        return bool(no)

    def join(self, dead: Sequence[str] = ()) -> None:
        no, done, was_soft = self.branches.pop()
        self.running = done + self.running + no
        if was_soft:
            self.merge(dead)

    def merge(self, dead: Sequence[str] = ()) -> None:
        """Unites the running worlds that agree, and keeps the heaviest."""
        if len(self.running) < 2:
            return
        for world in self.running:
            for name in dead:
                world.__dict__.pop(name, None)
        self.running = merged(self.running, aliases=self.aliases)
        self.bound()

    def bound(self) -> None:
        if len(self.running) > self.max_worlds:
            if any(world._so_mass is None for world in self.running):
                raise cannot(
                    f"more than max_worlds={self.max_worlds} worlds of different discrete state, and under transforms "
                    "their weights may not be looked up to keep the heaviest; raise max_worlds"
                )
            self.running.sort(key=lambda world: -heaviest(world._so_mass))
            lost = self.running[self.max_worlds :]
            self.running = self.running[: self.max_worlds]
            self.lost += math.fsum(heaviest(world._so_mass) for world in lost)

    # --- loops --------------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        self.loops.append(Loop(self.mass()))
        self.loops[-1].seen = self.soft_decisions

    def mass(self) -> float:
        return math.fsum(heaviest(world._so_mass) for world in self.running)

    def more(self, endless: bool = False) -> bool:
        """Whether a while loop goes on; steps count towards max_iter where soft weights decide on it."""
        loop = self.loops[-1]
        if not self.running:
            return False
        left = self.mass()
        if left < ROUNDING:
            return self.end_loop()
        decided = self.soft_decisions > loop.seen
        loop.seen = self.soft_decisions
        blind = any(world._so_mass is None for world in self.running) and (loop.exits or loop.breaks or self.returned)
        if loop.tested or (decided and (endless or blind)) or left < loop.mass * (1 - 1e-9):
            loop.counted += 1
        loop.tested = False
        if loop.counted >= self.max_iter or not math.isfinite(left):
            self.warn_of(left)
            return self.end_loop()
        return True

    def end_loop(self) -> bool:
        self.loops[-1].exits += self.running
        self.running = []
        return False

    def warn_of(self, left: float) -> None:
        known = all(world._so_mass is not None for world in self.running)
        file, line = here()
        warnings.warn(
            f"{file}:{line}: the loop did not halt within max_iter={self.max_iter} soft steps: "
            f"{f'mass {left:.3g}' if known else 'an unknown mass'} is left and goes on behind the loop as it is; raise "
            "max_iter, or use a smaller eps",
            RuntimeWarning,
            stacklevel=3,
        )

    def stay(self) -> bool:
        loop = self.loops[-1]
        yes, no, was_soft = self.split()
        loop.exits += no
        self.running = yes
        loop.tested = was_soft
        return bool(yes)

    def iterate(self, key: str, iterable: Any) -> None:
        """What the present world loops over: lists as they are, also where the body changes them."""
        if isinstance(iterable, Tensor):
            iterable = iterable.unbind(0)
        if not isinstance(iterable, range | list | str):
            items = Opaque(iter(iterable))
            if isinstance(iterable, dict | set | frozenset | tuple | zip | enumerate | reversed):
                kept = tuple(items.iterator)
                iterable = Opaque(iter(kept)) if frozen(kept) else kept
            else:
                iterable = items
        self.frame.__dict__[key] = iterable

    def next(self, key: str) -> bool:
        loop = self.loops[-1]
        loop.position += 1
        staying = []
        for world in self.running:
            items = world.__dict__[key]
            left = items.has(loop.position) if isinstance(items, Opaque) else loop.position < len(items)
            if left:
                staying.append(world)
            else:
                loop.exits.append(world)
        self.running = staying
        return bool(staying)

    def item(self, key: str) -> Any:
        return self.frame.__dict__[key][self.loops[-1].position]

    def again(self, dead: Sequence[str] = ()) -> None:
        """The end of an iteration."""
        loop = self.loops[-1]
        self.running += loop.continued
        loop.continued = []
        self.merge(dead)

    def leave(self, key: str = "") -> None:
        """Behind the loop, for the worlds that its end let go; break and continue there belong to the loop around."""
        loop = self.loops.pop()
        self.broken.append(loop.breaks)
        self.running = loop.exits
        for world in self.running + loop.breaks:
            world.__dict__.pop(key, None)

    def rejoin(self, dead: Sequence[str] = ()) -> None:
        self.running = self.running + self.broken.pop()
        self.merge(dead)

    def break_(self) -> None:
        self.loops[-1].breaks += self.running
        self.running = []

    def continue_(self) -> None:
        self.loops[-1].continued += self.running
        self.running = []

    # --- the end ------------------------------------------------------------------------------------------------------

    def give(self, value: Any) -> None:
        """What the present world returns; nothing else of it is kept."""
        self.returned.append(Frame({"value": value}, self.frame._so_weight, self.frame._so_mass))

    def return_(self) -> None:
        self.running = []

    def results(self) -> list[Frame]:
        rest = [Frame({"value": None}, world._so_weight, world._so_mass) for world in self.running]
        self.running = merged(self.returned + rest, aliases=False)
        self.bound()
        return self.running
