"""What it takes to run a stretch of a loop again: closed-over tensors, surroundings, the states that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ._guard import Guard
from ._trees import flatten, unflatten


class Recorder(TorchFunctionMode):
    """Notes what a chain closes over: without a tape, only tensors from outside require a gradient."""

    replaces = True  # read where an autograd.Function would hide what it is given

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def look(self, items: Any) -> None:
        for item in items:
            if isinstance(item, Tensor):
                if item.requires_grad:
                    self.found[id(item)] = item
            elif isinstance(item, (tuple, list)):
                self.look(item)
            elif isinstance(item, dict):
                self.look(item.values())

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.look(args)
        if kwargs:
            self.look(kwargs.values())
        return func(*args, **(kwargs or {}))


class Substitute(TorchFunctionMode):
    """Runs torch functions with other tensors in place of some."""

    replaces = True  # read where an autograd.Function would hide what it is given

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        super().__init__()
        self.old = old  # held, so that their ids stay theirs
        self.table = {id(a): b for a, b in zip(old, new, strict=True)}

    def swap(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.table.get(id(item), item)
        if type(item) in (tuple, list):
            return type(item)(self.swap(i) for i in item)
        if type(item) is dict:
            return {key: self.swap(value) for key, value in item.items()}
        return item

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*self.swap(args), **self.swap(kwargs or {}))


class Surroundings:
    """The autocast modes and the guards under which the chain ran, to run it again."""

    def __init__(self, devices: set[str]) -> None:
        kinds = sorted({"cpu", *devices} - {"meta"})
        self.casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self.modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Guard)]

    @contextmanager
    def again(self) -> Iterator[None]:
        before = random_state()
        with ExitStack() as stack:
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            for mode in self.modes:
                stack.enter_context(mode)
            try:
                yield
            finally:
                set_random_state(before)


def random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class Kept:
    """A state as its leaves, cut off from any graph, and the random state with which the next step began."""

    def __init__(self, state: Any, random: bool) -> None:
        leaves, self.spec = flatten(state)
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.versions = [_version(leaf) for leaf in self.leaves]
        self.random = random_state() if random else None

    def state(self, *, tape: bool) -> tuple[Any, list[Any]]:
        """The state again, with the random numbers that followed it, and its leaves."""
        if self.versions != [_version(leaf) for leaf in self.leaves]:
            raise RuntimeError(
                "a state of the loop was modified by an inplace operation after its step; backward needs it again: "
                "let the body make new tensors (s = s + d), and clone what is changed after the loop"
            )
        if self.random is not None:
            set_random_state(self.random)
        leaves = [leaf.detach().requires_grad_() if tape and differentiable(leaf) else leaf for leaf in self.leaves]
        return unflatten(leaves, self.spec), leaves


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
