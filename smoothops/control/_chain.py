"""A chain of steps and its reversal with few states kept.

A chain is played forward without a tape, and attached to the graph as one autograd node. Its backward goes through the
stretches that the schedule names from right to left: each is played again from its kept state, with a tape, and the
gradient at its end becomes the gradient at its start. A second derivative tapes the chain as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint as taped_later

from ._guard import _Guard, forward_mode
from ._trees import flatten, unflatten
from .checkpoint import Checkpoint, _Again


class Chain(NamedTuple):
    """``step(i, state, feed) -> (state, out)`` for i = 0, 1, ...; ``feeds[i]`` is a list of tensors."""

    step: Callable[[int, Any, Any], tuple[Any, Any]]
    feeds: Sequence[list[Any]] | None = None
    halted: Callable[[int, Any], bool] | None = None  # after step i - 1, whether the rest may be left out
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


def run(chain: Chain, state: Any, steps: int, checkpoint: Checkpoint | None) -> tuple[Any, list[Any]]:
    """The final state and what each step put out."""
    outs: list[Any] = []
    if checkpoint is None:
        return chain.play(state, 0, steps, outs)[0], outs
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint must be None, so.Sqrt() or so.Binomial(slots), got {checkpoint!r}")
    if not torch.compiler.is_compiling():
        levels = torch._C._functorch.get_interpreter_stack() or []
        if any(level.key() == torch._C._functorch.TransformType.Grad for level in levels):
            raise ValueError(
                "checkpoint= works with backward() and torch.autograd.grad, not inside torch.func.grad, vjp, jacrev or "
                "hessian, which keep their own tape; pass checkpoint=None there"
            )
        if not levels and not forward_mode():
            return _reversible(chain, state, steps, checkpoint)
    return _nested(chain, state, 0, steps, checkpoint, outs), outs


def _nested(chain: Chain, state: Any, start: int, stop: int, checkpoint: Checkpoint, outs: list[Any]) -> Any:
    """The same schedule with torch's own checkpoints, which work under compilation, vmap and forward mode."""
    parts = checkpoint.parts(start, stop)
    for number, (a, b, inner) in enumerate(parts):
        if number == len(parts) - 1 and inner is None:
            return chain.play(state, a, b, outs)[0]

        def stretch(state: Any, a: int = a, b: int = b, inner: Any = inner) -> tuple[Any, list[Any]]:
            found: list[Any] = []
            if isinstance(inner, _Again) and b - a > 1:
                # the steps but the last, kept as one stretch in the same way
                state, made = taped_later(stretch, state, a, b - 1, inner, use_reentrant=False)
                found += made
                return chain.play(state, b - 1, b, found)[0], found
            if inner is None or b - a == 1:
                return chain.play(state, a, b, found)[0], found
            return _nested(chain, state, a, b, inner, found), found

        state, made = taped_later(stretch, state, use_reentrant=False)
        outs += made
    return state


# --- one node ---------------------------------------------------------------------------------------------------------


class _Recorder(TorchFunctionMode):
    """Notes what a chain closes over: without a tape, only tensors from outside require a gradient."""

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


class _Substitute(TorchFunctionMode):
    """Runs torch functions with other tensors in place of some."""

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


class _Surroundings:
    """The autocast modes and the guards under which the chain ran, to run it again."""

    def __init__(self, devices: set[str]) -> None:
        kinds = sorted({"cpu", *devices} - {"meta"})
        self.casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self.modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Guard)]

    @contextmanager
    def again(self) -> Iterator[None]:
        before = _random_state()
        with ExitStack() as stack:
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            for mode in self.modes:
                stack.enter_context(mode)
            try:
                yield
            finally:
                _set_random_state(before)


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class _Kept:
    """A state as its leaves, cut off from any graph, and the random state with which the next step began."""

    def __init__(self, state: Any, random: bool) -> None:
        leaves, self.spec = flatten(state)
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.versions = [_version(leaf) for leaf in self.leaves]
        self.random = _random_state() if random else None

    def state(self, *, tape: bool) -> tuple[Any, list[Any]]:
        """The state again, with the random numbers that followed it, and its leaves."""
        if self.versions != [_version(leaf) for leaf in self.leaves]:
            raise RuntimeError(
                "a state of the loop was modified by an inplace operation after its step; backward needs it again: "
                "let the body make new tensors (s = s + d), and clone what is changed after the loop"
            )
        if self.random is not None:
            _set_random_state(self.random)
        leaves = [leaf.detach().requires_grad_() if tape and differentiable(leaf) else leaf for leaf in self.leaves]
        return unflatten(leaves, self.spec), leaves


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _reversible(chain: Chain, state: Any, steps: int, checkpoint: Checkpoint) -> tuple[Any, list[Any]]:
    leaves, spec = flatten(state)
    first = unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    feeds = None if chain.feeds is None else [[leaf.detach() for leaf in feed] for feed in chain.feeds]
    reversal = _Reversal(chain, leaves)
    recorder, outs, before, cache = _Recorder(), [], _random_state(), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast kept from here would have no graph
    try:
        with torch.no_grad(), recorder:
            for a, b, inner in checkpoint.parts(0, steps):
                kept = _Kept(first, random=True)
                first, reached = chain.play(first, a, b, outs, feeds)
                if reached > a:
                    reversal.kept.append((a, reached, inner, kept))
                if reached < b:
                    break
    finally:
        torch.set_autocast_cache_enabled(cache)
    if all(torch.equal(x, y) for x, y in zip(before, _random_state(), strict=True)):
        for *_, kept in reversal.kept:
            kept.random = None
    reversal.closed = list(recorder.found.values())
    return reversal.attach(first, outs)


class _Reversal:
    """A chain that was played, with the states that were kept: its backward."""

    def __init__(self, chain: Chain, leaves: list[Any]) -> None:
        self.chain, self.leaves = chain._replace(halted=None, check=None), leaves
        self.kept: list[tuple[int, int, Checkpoint | None, _Kept]] = []
        self.closed: list[Tensor] = []
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        self.surroundings = _Surroundings(devices)
        self.checked = False

    def attach(self, state: Any, outs: list[Any]) -> tuple[Any, list[Any]]:
        ends, spec = flatten(state)
        rows = [flatten(out) for out in outs]
        found = [*ends, *(leaf for row, _ in rows for leaf in row)]
        self.given = [leaf for leaf in self.leaves if differentiable(leaf) and leaf.requires_grad]
        self.fed = (
            [] if self.chain.feeds is None else [t for f in self.chain.feeds[: len(outs)] for t in f if t.requires_grad]
        )
        inputs = [*self.given, *self.fed, *self.closed]
        if not torch.is_grad_enabled() or not inputs:
            return state, outs
        self.values = [leaf for leaf in found if differentiable(leaf)]
        nodes = iter(_Node.apply(self, *inputs))
        del self.values
        found = [next(nodes) if differentiable(leaf) else leaf for leaf in found]
        self.sizes = [len(ends), *(len(row) for row, _ in rows)]
        self.places = [differentiable(leaf) for leaf in found]
        sides = iter(found)
        state = unflatten([next(sides) for _ in ends], spec)
        return state, [unflatten([next(sides) for _ in row], row_spec) for row, row_spec in rows]

    def sort(self, grads: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The cotangents of the final state, and of what each step put out."""
        queue = iter(grads)
        flat = [next(queue) if place else None for place in self.places]
        rows, at = [], 0
        for size in self.sizes:
            rows.append(flat[at : at + size])
            at += size
        return rows

    # first derivative

    def reverse(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        end, *self.out_grads = self.sort(grads)
        self.sums: dict[int, Tensor] = {}
        # tensors that were computed from one another must each be cut off; leaves need not
        derived = any(t.grad_fn is not None for t in self.closed)
        self.stand_ins = [t.detach().requires_grad_() for t in self.closed] if derived else self.closed
        with self.surroundings.again():
            for a, b, inner, kept in reversed(self.kept):
                end = self.stretch(a, b, inner, kept, end)
        start = [g for leaf, g in zip(self.leaves, end, strict=True) if differentiable(leaf) and leaf.requires_grad]
        rest = [self.sums.get(id(t)) for t in (*self.fed, *self.closed)]
        del self.sums, self.out_grads, self.stand_ins
        return [*start, *rest]

    def stretch(self, a: int, b: int, inner: Checkpoint | None, kept: _Kept, end: list[Any]) -> list[Any]:
        """The cotangent at the start of [a, b), from that at its end."""
        if inner is None:
            return self.tape(a, b, kept, end)
        if isinstance(inner, _Again):
            for i in reversed(range(a, b)):
                end = self.tape(i, i + 1, self.forward(kept, a, i), end)
            return end
        parts, at, here = inner.parts(a, b), kept, []
        for number, (p, q, deeper) in enumerate(parts):
            here.append((p, q, deeper, at))
            if number < len(parts) - 1:
                at = self.forward(at, p, q)
        del at
        while here:
            end = self.stretch(*here.pop(), end)
        return end

    def forward(self, kept: _Kept, a: int, b: int) -> _Kept:
        if a == b:
            return kept
        with torch.no_grad():
            state, _ = self.chain.play(kept.state(tape=False)[0], a, b, [], self.feeds_of(a, b)[0])
            return _Kept(state, random=kept.random is not None)

    def feeds_of(self, a: int, b: int, *, tape: bool = False) -> tuple[dict[int, list[Any]] | None, list[Any]]:
        """The feeds of the steps a, ..., b - 1 cut off from their graph, and (given, cut off) of the differentiable."""
        if self.chain.feeds is None:
            return None, []
        feeds, pairs = {}, []
        for i in range(a, b):
            feeds[i] = [t.detach() for t in self.chain.feeds[i]]
            if tape:
                for given, cut in zip(self.chain.feeds[i], feeds[i], strict=True):
                    if given.requires_grad:
                        pairs.append((given, cut.requires_grad_()))
        return feeds, pairs

    def tape(self, a: int, b: int, kept: _Kept, end: list[Any]) -> list[Any]:
        outs: list[Any] = []
        feeds, pairs = self.feeds_of(a, b, tape=True)
        with torch.enable_grad(), ExitStack() as stack:
            state, leaves = kept.state(tape=True)
            if self.stand_ins is not self.closed:
                stack.enter_context(_Substitute(self.closed, self.stand_ins))
            state, _ = self.chain.play(state, a, b, outs, feeds)
        ends = [flatten(state)[0], *(flatten(out)[0] for out in outs)]
        cotangents = [end, *self.out_grads[a:b]]
        heads = [
            (y, g)
            for row, row_grads in zip(ends, cotangents, strict=True)
            for y, g in zip(row, row_grads, strict=True)
            if g is not None and differentiable(y) and y.requires_grad
        ]
        own = [leaf for leaf in leaves if differentiable(leaf)]
        inputs = [*own, *(cut for _, cut in pairs), *self.stand_ins]
        if not heads:
            return [None] * len(leaves)
        if not self.checked:
            check_known([y for y, _ in heads], inputs)
            self.checked = True
        found = torch.autograd.grad([y for y, _ in heads], inputs, [g for _, g in heads], allow_unused=True)
        for owner, g in zip([*(given for given, _ in pairs), *self.closed], found[len(own) :], strict=True):
            if g is not None:
                known = self.sums.get(id(owner))
                self.sums[id(owner)] = g if known is None else known + g
        queue = iter(found)
        return [next(queue) if differentiable(leaf) else None for leaf in leaves]

    # second derivative

    def taped(self, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same with a graph: the chain is taped as a whole, from its inputs with their graphs."""
        copies = [t.view_as(t) for t in inputs]
        table = {id(t): copy for t, copy in zip((*self.given, *self.fed), copies, strict=False)}
        leaves = [table.get(id(leaf), leaf) for leaf in self.leaves]
        feeds = None if self.chain.feeds is None else [[table.get(id(t), t) for t in feed] for feed in self.chain.feeds]
        kept, outs = self.kept[0][3], []
        with self.surroundings.again(), _Substitute(self.closed, copies[len(table) :]):
            if kept.random is not None:
                _set_random_state(kept.random)
            state, _ = self.chain.play(unflatten(leaves, kept.spec), 0, self.kept[-1][1], outs, feeds)
        ends = [*flatten(state)[0], *(leaf for out in outs for leaf in flatten(out)[0])]
        flat = [g for row in self.sort(grads) for g in row]
        heads = [(y, g) for y, g in zip(ends, flat, strict=True) if g is not None and y.requires_grad]
        return list(
            torch.autograd.grad(
                [y for y, _ in heads], copies, [g for _, g in heads], create_graph=True, allow_unused=True
            )
        )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reversal: _Reversal, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.reversal = reversal
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(t.detach() for t in reversal.values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # raises where one was changed in place
        if torch.is_grad_enabled():
            return None, *ctx.reversal.taped(inputs, grads)
        return None, *ctx.reversal.reverse(grads)


def check_known(heads: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise if the graph reaches a leaf that no recorded function took: its gradient would be lost."""
    known = {id(t) for t in inputs}
    stack, seen = [t.grad_fn for t in heads], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"the loop closes over a tensor of shape {tuple(leaf.shape)} through code that cannot be recorded "
                "(torch.jit, a custom autograd.Function), so that checkpoint= would lose its gradient; make it a part "
                "of the state or pass checkpoint=None"
            )
        stack += [following for following, _ in node.next_functions]
