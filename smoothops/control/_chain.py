"""A chain of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Chain(NamedTuple):
    """``step(i, state, feed) -> (state, out)`` for i = 0, 1, ...; ``feeds[i]`` is a list of tensors."""

    step: Callable[[int, Any, Any], tuple[Any, Any]]
    feeds: Sequence[list[Any]] | None = None
    halted: Callable[[int, Any], bool] | None = None  # after step i - 1, whether the rest may be left out
    guards: bool = False  # whether each step enters some
    check: Callable[[Any, Any], Any] | None = None  # of the new state and the old one, the first time only

    def play(self, state: Any, start: int, stop: int, outs: list[Any], feeds: Any = None) -> tuple[Any, int]:
        """The state after the steps start, ..., stop - 1, or at the earlier step that is returned with it."""
        feeds = self.feeds if feeds is None else feeds
        for i in range(start, stop):
            if self.halted is not None and i and self.halted(i, state):
                return state, i
            old = state
            state, out = self.step(i, old, None if feeds is None else feeds[i])
            if self.check is not None:
                self.check(state, old)
            outs.append(out)
        return state, stop
