"""The backward of a loop that keeps few states.

The loop is played forward without a tape and attached to the graph as one autograd node. Its backward goes through the
stretches that the schedule names from right to left: each is played again from its kept state, with a tape, and the
cotangent at its end becomes that at its start. A second derivative tapes the loop as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ._chain import Chain
from ._replay import Kept, Recorder, Substitute, Surroundings, differentiable, random_state, set_random_state
from ._trees import flatten, unflatten
from .checkpoint import Again, Checkpoint


def reversible(chain: Chain, state: Any, steps: int, checkpoint: Checkpoint) -> tuple[Any, list[Any]]:
    leaves, spec = flatten(state)
    first = unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    feeds = None if chain.feeds is None else [[leaf.detach() for leaf in feed] for feed in chain.feeds]
    reversal = Reversal(chain, leaves, checkpoint)
    outs: list[Any] = []
    recorder, before, cache = Recorder(), random_state(), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast kept from here would have no graph
    try:
        with torch.no_grad(), recorder:
            for a, b, inner in checkpoint.parts(0, steps):
                kept = Kept(first, random=True)
                first, reached = chain.play(first, a, b, outs, feeds)
                if reached > a:
                    reversal.kept.append((a, reached, inner, kept))
                if reached < b:
                    break
    finally:
        torch.set_autocast_cache_enabled(cache)
    if all(torch.equal(x, y) for x, y in zip(before, random_state(), strict=True)):
        for *_, kept in reversal.kept:
            kept.random = None
    reversal.first, reversal.steps = reversal.kept[0][3], reversal.kept[-1][1]
    for leaf in leaves_of(first, outs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:  # from outside, and no function has taken it
            recorder.found[id(leaf)] = leaf
    reversal.closed = list(recorder.found.values())
    return reversal.attach(first, outs)


def leaves_of(state: Any, outs: list[Any]) -> list[Any]:
    return [*flatten(state)[0], *(leaf for out in outs for leaf in flatten(out)[0])]


class Reversal:
    """A chain that was played, with the states that were kept: its backward."""

    first: Kept
    steps = 0

    def __init__(self, chain: Chain, leaves: list[Any], checkpoint: Checkpoint) -> None:
        self.chain, self.leaves, self.checkpoint = chain._replace(halted=None, check=None), leaves, checkpoint
        self.kept: list[tuple[int, int, Checkpoint | None, Kept]] = []
        self.closed: list[Tensor] = []
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        self.surroundings = Surroundings(devices)
        self.checked = False

    def attach(self, state: Any, outs: list[Any]) -> tuple[Any, list[Any]]:
        ends, spec = flatten(state)
        rows = [flatten(out) for out in outs]
        found = leaves_of(state, outs)
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
            # each state goes once what follows it is reversed; a second backward has the first one only
            kept, self.kept = self.kept or [(0, self.steps, self.checkpoint, self.first)], []
            while kept:
                end = self.stretch(*kept.pop(), end)
        start = [g for leaf, g in zip(self.leaves, end, strict=True) if differentiable(leaf) and leaf.requires_grad]
        rest = [self.sums.get(id(t)) for t in (*self.fed, *self.closed)]
        del self.sums, self.out_grads, self.stand_ins
        return [*start, *rest]

    def stretch(self, a: int, b: int, inner: Checkpoint | None, kept: Kept, end: list[Any]) -> list[Any]:
        """The cotangent at the start of [a, b), from that at its end."""
        if inner is None:
            return self.tape(a, b, kept, end)
        if isinstance(inner, Again):
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

    def forward(self, kept: Kept, a: int, b: int) -> Kept:
        if a == b:
            return kept
        with torch.no_grad():
            state, _ = self.chain.play(kept.state(tape=False)[0], a, b, [], self.feeds_of(a, b)[0])
            return Kept(state, random=kept.random is not None)

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

    def tape(self, a: int, b: int, kept: Kept, end: list[Any]) -> list[Any]:
        outs: list[Any] = []
        feeds, pairs = self.feeds_of(a, b, tape=True)
        with torch.enable_grad(), ExitStack() as stack:
            state, leaves = kept.state(tape=True)
            if self.stand_ins is not self.closed:
                stack.enter_context(Substitute(self.closed, self.stand_ins))
            state, _ = self.chain.play(state, a, b, outs, feeds)
        table = {id(t): other for t, other in zip(self.closed, self.stand_ins, strict=True)}
        found = [table.get(id(leaf), leaf) for leaf in leaves_of(state, outs)]
        cotangents = [*end, *(g for row in self.out_grads[a:b] for g in row)]
        heads = [
            (y, g)
            for y, g in zip(found, cotangents, strict=True)
            if g is not None and differentiable(y) and y.requires_grad
        ]
        own = [leaf for leaf in leaves if differentiable(leaf)]
        inputs = [*own, *(cut for _, cut in pairs), *self.stand_ins]
        if not heads:
            return [None] * len(leaves)
        if not self.checked:
            check_known([y for y, _ in heads], inputs)
            self.checked = True
        grads = torch.autograd.grad([y for y, _ in heads], inputs, [g for _, g in heads], allow_unused=True)
        for owner, g in zip([*(given for given, _ in pairs), *self.closed], grads[len(own) :], strict=True):
            if g is not None:
                known = self.sums.get(id(owner))
                self.sums[id(owner)] = g if known is None else known + g
        queue = iter(grads)
        return [next(queue) if differentiable(leaf) else None for leaf in leaves]

    # second derivative

    def taped(self, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same with a graph: the chain is taped as a whole, from its inputs with their graphs."""
        copies = [t.view_as(t) for t in inputs]
        table = {id(t): copy for t, copy in zip((*self.given, *self.fed), copies, strict=False)}
        leaves = [table.get(id(leaf), leaf) for leaf in self.leaves]
        feeds = None if self.chain.feeds is None else [[table.get(id(t), t) for t in feed] for feed in self.chain.feeds]
        kept, outs = self.first, list[Any]()
        closed = copies[len(table) :]
        with self.surroundings.again(), Substitute(self.closed, closed):
            if kept.random is not None:
                set_random_state(kept.random)
            state, _ = self.chain.play(unflatten(leaves, kept.spec), 0, self.steps, outs, feeds)
        table = {id(t): copy for t, copy in zip(self.closed, closed, strict=True)}
        ends = [table.get(id(leaf), leaf) for leaf in leaves_of(state, outs)]
        flat = [g for row in self.sort(grads) for g in row]
        heads = [(y, g) for y, g in zip(ends, flat, strict=True) if g is not None and y.requires_grad]
        return list(
            torch.autograd.grad(
                [y for y, _ in heads], copies, [g for _, g in heads], create_graph=True, allow_unused=True
            )
        )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reversal: Reversal, *inputs: Tensor) -> tuple[Tensor, ...]:
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
