"""What a function reads and changes besides its arguments.

:class:`Recorder` notes the tensors that a function closes over while it runs, :class:`Substitute` runs it with others
in their place, :class:`Effects` undoes what repeated evaluations do to buffers and to the random state.
:class:`System` joins them: the residual of a condition as a function of one tensor (..., n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._pytree import Unknown, flatten
from .operator import unwrapped


def collect(tree: Any, found: list[Tensor]) -> None:
    """Append the tensors among the arguments of a torch function."""
    for item in tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            collect(item, found)
        elif isinstance(item, dict):
            collect(item.values(), found)


# functions that write to buffers among their arguments without a change of version
WRITES = {"batch_norm", "instance_norm"}


class Recorder(TorchFunctionMode):
    """Notes each tensor that comes from outside, with its version when it was first seen."""

    replaces = True  # read where an autograd.Function would hide what it is given

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.inside: dict[int, Tensor] = {}
        self.outside: dict[int, tuple[Tensor, int]] = {}
        self.watched: list[tuple[Tensor, Tensor]] = []
        self.begin(given)

    def begin(self, given: Sequence[Tensor]) -> None:
        """These are not from outside."""
        self.inside.update((id(t), t) for t in given)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found: list[Tensor] = []
        collect(args, found)
        collect(kwargs.values(), found)
        for t in found:
            if id(t) not in self.inside and id(t) not in self.outside:
                self.outside[id(t)] = (t, 0 if t.is_inference() else t._version)
        if getattr(func, "__name__", "") in WRITES:
            with torch.no_grad():
                self.watched += [(t, t.clone()) for t in found if id(t) in self.outside and not t.requires_grad]
        out = func(*args, **kwargs)
        made: list[Tensor] = []
        collect((out,), made)
        for t in made:
            if id(t) not in self.outside:
                self.inside[id(t)] = t  # held, so that no id is used twice
        return out

    def differentiable(self) -> list[Tensor]:
        return [t for t, _ in self.outside.values() if t.requires_grad]

    def mutated(self) -> list[Tensor]:
        found = {id(t): t for t, version in self.outside.values() if not t.is_inference() and t._version != version}
        found.update((id(t), t) for t, before in self.watched if not torch.equal(t, before))
        return list(found.values())


class Substitute(TorchFunctionMode):
    """Runs torch functions with other tensors in place of some."""

    replaces = True  # read where an autograd.Function would hide what it is given

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        super().__init__()
        self.old = old  # held, so that their ids stay theirs
        self.table = {id(a): b for a, b in zip(old, new, strict=True)}

    def _swap(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.table.get(id(tree), tree)
        if type(tree) in (tuple, list):
            return type(tree)(self._swap(item) for item in tree)
        if type(tree) is dict:
            return {key: self._swap(item) for key, item in tree.items()}
        return tree

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*self._swap(args), **self._swap(kwargs or {}))


def random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class Effects:
    """What one evaluation did to the random state and to buffers; later evaluations repeat it and leave no trace."""

    def __init__(self) -> None:
        self.start = random_state()
        self.random = self.any = False
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def done(self, mutated: Sequence[Tensor]) -> None:
        """Called after the first evaluation, the one that counts."""
        self.random = any(not torch.equal(a, b) for a, b in zip(self.start, random_state(), strict=False))
        self.buffers = [(t, t.detach().clone()) for t in mutated]
        self.any = self.random or bool(self.buffers)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """The same random numbers as before, and copies of the buffers as they were left."""
        if not self.any:
            yield
            return
        states = random_state()
        if self.random:
            set_random_state(self.start)
        try:
            # copies, not values put back: autograd may have saved a buffer for backward
            with Substitute([t for t, _ in self.buffers], [v.clone() for _, v in self.buffers]):
                yield
        finally:
            if self.random:
                set_random_state(states)


def transforms() -> list[Any]:
    """The levels of torch.func that are active, outermost first."""
    return torch._C._functorch.get_interpreter_stack() or []


def dual() -> bool:
    """Whether a level of forward-mode AD is active."""
    return torch.autograd.forward_ad._current_level >= 0


def eager() -> bool:
    """Plain reverse-mode autograd or none: no compiler, no torch.func, no forward mode."""
    return not torch.compiler.is_compiling() and not transforms() and not dual()


def raw(t: Tensor) -> Tensor:
    """The numbers under the wrappers of torch.func, which alone may be looked at; a vmapped dim is one more dim."""
    return unwrapped(t).detach()


@contextmanager
def own_casts() -> Iterator[None]:
    """Autocast makes its casts of parameters anew: one that it keeps may have been made without a graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def stranger(r: Tensor, start: int, known: Sequence[Tensor]) -> Any:
    """A node of the graph of ``r`` that belongs to a tensor from outside which is not known, or None.

    Nodes are numbered as they are made: those before ``start`` belong to tensors from outside.
    """
    leaves, nodes = {id(t) for t in known}, {t.grad_fn for t in known if t.grad_fn is not None}
    seen, stack = set(), [r.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in nodes:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # a leaf's AccumulateGrad
        if (variable is not None and id(variable) not in leaves) or (variable is None and node._sequence_nr() < start):
            return node
        stack += [following for following, _ in node.next_functions]
    return None


def check_recorded(r: Tensor, start: int, known: Sequence[Tensor]) -> None:
    """Raise if the graph of ``r`` reaches a tensor that no recorded torch function took, as in torch.jit modules."""
    node = stranger(r, start, known)
    if node is not None:
        shape = f" of shape {tuple(node.variable.shape)}" if hasattr(node, "variable") else ""
        raise ValueError(
            f"the function closes over a tensor{shape} through code that cannot be recorded (torch.jit, a custom "
            "autograd.Function), so that its gradient would be lost; pass it as an argument of the function"
        )


class Graph:
    """One evaluation of F with its autograd graph: r = F(z, theta), z and theta cut off from what made them."""

    def __init__(self, r: Tensor, z: Tensor, inputs: list[Tensor], theta: list[Tensor]) -> None:
        self.r, self.z, self.inputs, self.theta = r, z, inputs, theta


class System:
    """F(z) = 0 for z: (..., n): ``function`` of a pytree and other arguments, or z - function for a fixed point."""

    def __init__(
        self,
        function: Callable[..., Any],
        unknown: Unknown,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        fixed_point: bool = False,
        has_aux: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"expected a function of the unknown, got {type(function).__name__}")
        self.function, self.unknown, self.fixed_point, self.has_aux = function, unknown, fixed_point, has_aux
        self.args, self.kwargs = args, kwargs or {}
        # tensors alone, the usual case, need no pytree
        flat = not kwargs and all(isinstance(a, Tensor) for a in args)
        self.leaves: list[Any] = list(args)
        self.spec: Any = None
        if not flat:
            self.leaves, self.spec = tree_flatten((args, self.kwargs))
        self.given = [
            i for i, a in enumerate(self.leaves) if isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad
        ]
        self.closed: list[Tensor] = []
        self.effects: Effects | None = None
        self.closes = True  # whether the first evaluation may have read closed-over tensors that need a gradient
        self.aux: Any = None

    def live(self, z: Tensor, given: Sequence[Tensor] | None = None, recorder: Recorder | None = None) -> Tensor:
        """F(z) in plain torch operations, the arguments that need a gradient replaced by ``given``."""
        y = self.image(z, given, recorder)
        return z - y if self.fixed_point else y

    def image(self, z: Tensor, given: Sequence[Tensor] | None = None, recorder: Recorder | None = None) -> Tensor:
        """What the user's function makes of z, as (..., n)."""
        args, kwargs = self.args, self.kwargs
        if given is not None and self.given:
            leaves = list(self.leaves)
            for i, t in zip(self.given, given, strict=True):
                leaves[i] = t
            args, kwargs = (leaves, {}) if self.spec is None else tree_unflatten(leaves, self.spec)
        parts = self.unknown.unpack(z)
        if recorder is None:
            y = self.function(parts, *args, **kwargs)
        else:
            recorder.begin([*flatten(parts)[0], *(given or ())])
            with recorder:
                y = self.function(parts, *args, **kwargs)
        if self.has_aux:
            if not (isinstance(y, tuple) and len(y) == 2):
                raise TypeError(f"with has_aux=True the function must return (value, aux), got {type(y).__name__}")
            y, self.aux = y
        return self.unknown.pack(y, self.function, self.fixed_point)

    def once(self, z: Tensor, given: Sequence[Tensor] | None = None) -> tuple[Tensor, Recorder | None]:
        """F(z), recorded. The first evaluation is the one whose effects on buffers and random state remain."""
        if torch.compiler.is_compiling():
            return self.live(z, given), None
        first = self.effects is None
        effects = self.effects or Effects()
        recorder, version = Recorder(), None if z.is_inference() else z._version
        with effects.repeated() if effects.any else nullcontext():
            r = self.live(z, given, recorder)
        if version is not None and z._version != version:
            raise ValueError("the function changes the unknown in place; let it make a new tensor (z = z + d)")
        if first:
            effects.done(recorder.mutated())
            self.effects = effects
            known = {id(self.leaves[i]) for i in self.given}
            self.closes = any(id(t) not in known for t in recorder.differentiable())
        return r, recorder

    def again(self, z: Tensor, given: Sequence[Tensor] | None = None) -> Tensor:
        """F(z) without a trace on buffers and random state."""
        if self.effects is None or not self.effects.any:
            return self.live(z, given)
        with self.effects.repeated():
            return self.live(z, given)

    def first(self, z: Tensor) -> Tensor:
        """F(z), with its effects the first time, without them later."""
        if self.effects is None:
            return self.once(z)[0]
        return self.again(z) if self.effects.any else self.live(z)

    def value(self, z: Tensor) -> Tensor:
        """The numbers of F(z): no graph, no tangent."""
        with torch.no_grad():
            return self.first(z).detach()

    def graph(self, z: Tensor) -> Graph:
        """F at the numbers of z with the graph to z and to every tensor that needs a gradient, found by recording."""
        with torch.enable_grad(), own_casts():
            z = z.detach().requires_grad_()
            start = z.view_as(z).grad_fn._sequence_nr()  # type: ignore[union-attr]
            given = [self.leaves[i] for i in self.given]
            copies = [t.detach().requires_grad_() for t in given]
            if not self.closes:  # as far as the first evaluation went: the graph tells whether it still holds
                r = self.again(z, copies)
                if stranger(r, start, [z, *copies]) is None:
                    self.closed = []
                    return Graph(r, z, copies, given)
            r, recorder = self.once(z, copies)
            assert recorder is not None
            self.closed = [
                t for t in recorder.differentiable() if t.grad_fn is None or t.grad_fn._sequence_nr() < start
            ]
            check_recorded(r, start, [z, *copies, *self.closed])
            inputs = [*copies, *self.closed]
            if any(t.grad_fn is not None for t in self.closed):
                # derived tensors may depend on one another: partial derivatives need each cut off
                inputs = [*copies, *(t.detach().requires_grad_() for t in self.closed)]
                r = self.checked(z, *inputs)
        return Graph(r, z, inputs, [*given, *self.closed])

    def checked(self, z: Tensor, *theta: Tensor) -> Tensor:
        """:meth:`substituted`, where every theta must have been found wherever F reads it."""
        start = z.view_as(z).grad_fn._sequence_nr()  # type: ignore[union-attr]
        r = self.substituted(z, *theta)
        check_recorded(r, start, [z, *theta])
        return r

    def substituted(self, z: Tensor, *theta: Tensor) -> Tensor:
        """F(z) with ``theta`` in place of the arguments and closed-over tensors that need a gradient."""
        k = len(self.given)
        if not self.closed:
            return self.again(z, theta[:k])
        with Substitute(self.closed, theta[k:]):
            return self.again(z, theta[:k])
