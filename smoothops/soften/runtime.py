"""The run of a softened function: the worlds that stand at the present line, and where the others went.

Generated code goes through the program once for all worlds: a statement runs in each of the running ones, ``if`` and
``while`` split them by the weight of their condition, ``break``, ``continue`` and ``return`` take them out of the
running ones, and where paths meet they are merged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from ..control._guard import guarded
from ..smoothing import SmoothingLike
from .errors import cannot, here
from .expressions import Expressions
from .frames import ATOMS, Frame, copied
from .iteration import VIEWS, Entries, Enumerated, Fixed, Reversed, Zipped, at, has, view
from .merging import merged
from .outcomes import Context, Loop, of_worlds, result, weigh
from .values import SoftBool, logistic_eps, truth
from .weights import ROUNDING, Weight, absent, heaviest, negligible, outlook, sides


class Options(NamedTuple):
    """How a softened function runs; ``aliases``: whether it writes to items, so that names of one tensor matter;
    ``outside``: containers that it reads from its module or from the function around it."""

    smoothing: SmoothingLike
    max_iter: int
    max_worlds: int
    aliases: bool
    outside: list[tuple[str, Any]]


class Run(Expressions):
    """One call of a softened function."""

    def __init__(self, variables: dict[str, Any], options: Options, caller: Expressions | None = None) -> None:
        self.eps = logistic_eps(options.smoothing)
        self.smoothing, self.max_iter, self.max_worlds, self.aliases, _ = options
        self.depth = 0 if caller is None else caller.depth + 1
        frame = Frame(variables, None, 1.0 if caller is None else caller.frame._so_mass)
        self.partial = caller is not None and (caller.partial or caller.frame._so_weight is not None)
        self.running = [frame]
        self.frame = frame  # the world in which a statement runs just now
        self.branches: list[bool | tuple[list[Frame], list[Frame], bool]] = []
        self.loops: list[Loop] = []
        self.broken: list[list[Frame]] = []  # worlds that left a loop by break while its else runs
        self.returned: list[Frame] = []
        self.decisions: list[tuple[Frame, Any]] = []
        self.soft_decisions = 0
        self.lost = 0.0
        self.script: tuple[Any, ...] = ()
        self.at = 0
        self.changed = False
        self.outside = list(options.outside)
        self.choosing = False  # whether the present statement may go on in several worlds

    # --- statements ---------------------------------------------------------------------------------------------------

    def each(self) -> Iterable[Frame]:
        """The running worlds one by one; one whose statement makes a choice forks, and its forks come behind them."""
        self.compared = {}
        running = self.running
        if len(running) == 1 and running[0]._so_weight is None:
            return running
        if any(world._so_weight is not None and not isinstance(world._so_mass, float) for world in running):
            return self.guarded(running)
        return running

    def guarded(self, running: list[Frame]) -> Iterator[Frame]:
        """The worlds of batches: what is absent in a row leaves no NaN in it."""
        for world in running:
            dead = absent(world._so_weight, world._so_mass)
            with nullcontext() if dead is None else guarded(dead):
                yield world

    def begin(self, world: Frame) -> None:
        """The statement of ``each`` in one world, with the choices that are made already in a fork."""
        self.frame, self.script, world._so_script = world, world._so_script, ()
        self.at, self.changed, self.choosing = 0, False, True

    def step(self) -> Iterable[Frame]:
        """The running worlds for a statement of one outcome; one world of weight 1 costs next to nothing."""
        running = self.running
        if len(running) == 1 and running[0]._so_weight is None:
            self.frame, self.compared, self.choosing = running[0], {}, False
            return running
        return self.one_by_one()

    def one_by_one(self) -> Iterator[Frame]:
        for world in self.each():
            self.frame, self.choosing = world, False
            yield world

    def replaying(self) -> bool:
        """Whether the next choice of this statement is made already."""
        return self.at < len(self.script)

    def choose(self, outcomes: Sequence[tuple[Weight | None, Any]]) -> Any:
        """One of several outcomes of an expression; the statement runs again for the others, each with its weight."""
        if self.replaying():
            self.at += 1
            return self.script[self.at - 1]
        if len(outcomes) > 1 and not self.choosing:
            raise cannot(
                "a function that is handed on makes a soft choice where none can be made; make a list of it first"
            )
        if len(outcomes) > 1 and self.changed:
            raise cannot(
                "a variable or item is changed and a soft choice is made in one statement; make it two statements"
            )
        weight, mass = self.frame._so_weight, self.frame._so_mass
        known: dict[int, Weight] = {}
        for more, value in outcomes[1:]:
            memo: dict[Any, Any] = {}
            fork = self.frame._so_fork(memo)
            weigh(fork, weight, mass, more, known)
            # a list among the outcomes of this statement is the fork's own, with its aliases
            fork._so_script = tuple(copied(v, memo) for v in (*self.script, value))
            self.running.append(fork)
        weigh(self.frame, weight, mass, outcomes[0][0], known)
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
        p = value.p.reshape(()) if value.p.ndim and value.p.numel() == 1 else value.p
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
            world._so_weight, world._so_mass = Weight(weight, factor), mass
            to.append(world)

    # where one world meets a bool of Python, the branch is that bool, and the running worlds stay as they are

    def then(self) -> bool:
        if len(self.decisions) == 1:
            certain = self.decisions[0][1]
            if type(certain) is bool:
                self.decisions = []
                self.branches.append(certain)
                return certain
        yes, no, was_soft = self.split()
        self.branches.append((no, [], was_soft))
        self.running = yes
        return bool(yes)

    def orelse(self) -> bool:
        branch = self.branches[-1]
        if isinstance(branch, bool):
            return not branch
        no, _, was_soft = branch
        self.branches.pop()
        self.branches.append(([], self.running, was_soft))
        self.running = no
        return bool(no)

    def join(self, dead: Sequence[str] = ()) -> None:
        branch = self.branches.pop()
        if isinstance(branch, bool):
            return
        no, done, was_soft = branch
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

    def context(self, make: Callable[[Frame], Any], of_world: bool) -> Any:
        """The context of a with block, made once for all running worlds."""
        if of_world and len(self.running) > 1:
            raise cannot("the context of this with block depends on variables that may differ between soft paths")
        if not self.running:
            return nullcontext()
        self.begin(self.running[0])
        forks = len(self.running)
        made = make(self.frame)
        if len(self.running) > forks:
            raise cannot("the context of a with block is chosen softly; choose by if before it")
        return Context(made)

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
        if len(self.decisions) == 1 and self.decisions[0][1] is True:
            self.decisions = []
            loop.tested = False
            return True
        yes, no, was_soft = self.split()
        loop.exits += no
        self.running = yes
        loop.tested = was_soft
        return bool(yes)

    def iterate(self, key: str, iterable: Any) -> None:
        """What the present world loops over."""
        self.frame.__dict__[key] = view(iterable, self.aliases)

    def enumerated(self, items: Any, start: Any = 0) -> Any:
        return Enumerated(view(items, self.aliases), start)

    def zipped(self, *parts: Any, strict: Any = False) -> Any:
        return Zipped(tuple(view(part, self.aliases) for part in parts), bool(strict))

    def reversed(self, items: Any) -> Any:
        found = view(items, self.aliases)
        if isinstance(found, Fixed):
            return Reversed(found.items, len(found.items))
        known = isinstance(found, range | list | str | tuple | Tensor) and not isinstance(found, VIEWS)
        return Reversed(found, len(found)) if known else reversed(items)

    def entries(self, owner: Any, kind: str) -> Any:
        """owner.keys(), .values() or .items()."""
        if isinstance(owner, dict) and getattr(type(owner), kind) is getattr(dict, kind):
            return Entries(tuple(owner), owner, kind)
        return self.call(getattr(owner, kind))

    def next(self, key: str, name: str = "") -> bool:
        """The next iteration of a for loop, for the worlds that have one; ``name``: of a target that is a variable."""
        loop = self.loops[-1]
        loop.position += 1
        self.choosing = False
        i, running = loop.position, self.running
        if len(running) == 1:
            variables = running[0].__dict__
            items = variables[key]
            if has(items, i):
                if name:
                    variables[name] = at(items, i)
                return True
        self.running = []
        for world in running:
            (self.running if has(world.__dict__[key], i) else loop.exits).append(world)
        if name:
            for world in self.running:
                world.__dict__[name] = at(world.__dict__[key], i)
        return bool(self.running)

    def item(self, key: str) -> Any:
        return at(self.frame.__dict__[key], self.loops[-1].position)

    def again(self, dead: Sequence[str] = ()) -> None:
        """The end of an iteration."""
        loop = self.loops[-1]
        if loop.continued:
            self.running = self.running + loop.continued
            loop.continued = []
        if len(self.running) > 1:
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
        if not isinstance(value, ATOMS) and of_worlds(value):
            raise cannot("a function made here would outlive the worlds whose variables it reads; return what it gives")
        self.returned.append(result(self.frame, value))

    def return_(self) -> None:
        self.running = []

    def results(self) -> list[Frame]:
        rest = [result(world, None) for world in self.running]
        self.running = merged(self.returned + rest, aliases=False)
        self.bound()
        return self.running
