"""while_loop: a loop that goes on with a soft probability, and the distribution of the step at which it halts."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._axes import wide_dtype
from ._chain import Chain
from ._guard import Zeros, guarded, some
from ._run import run
from ._trees import add, check_range, check_same, describe, flatten, number, result_dtype, unflatten, weight
from .branches import check_callable, name_of
from .checkpoint import Checkpoint

# a mass below this changes no digit of a mean of states of one size: the row halts there, however long others go on
ROUNDING = 2.0**-53
Gate = Callable[[Tensor, Tensor, Tensor], Tensor | None]


class LoopInfo(NamedTuple):
    """How a soft loop halted: mean and variance of the steps, the mass that never did, the weights or None."""

    steps: Tensor
    variance: Tensor
    residual: Tensor
    halting: Tensor | None


class Mean(ABC):
    """What a soft loop returns of its states: :class:`FinalState`, :class:`Readout` or :class:`Sample`."""

    @abstractmethod
    def read(self, state: Any) -> Any:
        """What is averaged."""

    def gate(self) -> Gate:
        """For one call of a loop: (w, survival before, after) -> the weight in place of w, or None for w itself."""
        return lambda w, before, after: None


@dataclass(frozen=True, eq=False)
class FinalState(Mean):
    """The expected final state, sum_t w_t s_t + R s_T.

    A mean of states need not be a state: the mean of x^2 is not the square of the mean of x (:class:`Readout`).

    Example:
        >>> count = lambda s: so.while_loop(lambda s: s < 3, lambda s: s + 1, s, 10, mean=so.FinalState())[0]
        >>> count(torch.tensor(0.5))
        tensor(3.5000)
    """

    def read(self, state: Any) -> Any:
        return state


@dataclass(frozen=True, eq=False)
class Readout(Mean):
    """The expected readout, sum_t w_t fn(s_t) + R fn(s_T), in place of the expected final state.

    Args: fn: state -> pytree of tensors whose leading dims are those of the condition.

    Example:
        >>> grow = lambda mean: so.while_loop(lambda s: 0.5 + 0 * s, lambda s: s + 1, torch.tensor(0.0), 60, mean=mean)
        >>> grow(so.FinalState())[0], grow(so.Readout(lambda s: s * s))[0]
        (tensor(1.), tensor(3.))
    """

    fn: Callable[[Any], Any]

    def __post_init__(self) -> None:
        check_callable(self.fn, "fn")

    def read(self, state: Any) -> Any:
        return self.fn(state)


@dataclass(frozen=True, eq=False)
class Sample(Mean):
    """The state at one step drawn from the halting distribution, for each element of the batch: always a true state.

    The gradient is that of the mean with the drawn state in place of the mean of states, sum_t h_t ds_t + dw_t s_t:
    unbiased for the derivative of the expected final state, straight-through for functions of it that are not linear.

    Args: generator: of the random numbers, ``None`` for torch's own.

    Example:
        >>> go = lambda s: so.while_loop(lambda s: 0.5 + 0 * s, lambda s: s + 1, s, 60, mean=so.Sample())[0]
        >>> bool((go(torch.zeros(1000)) % 1 == 0).all())
        True
    """

    generator: torch.Generator | None = None

    def read(self, state: Any) -> Any:
        return state

    def gate(self) -> Gate:
        drawn: list[Tensor] = []  # once, also where backward runs the loop again

        def gate(w: Tensor, before: Tensor, after: Tensor) -> Tensor:
            if not drawn:  # in (0, 1]: P(survival >= u) is the survival
                drawn.append(1 - torch.rand(w.shape, generator=self.generator, dtype=w.dtype, device=w.device))
            here = (before >= drawn[0]) & (after < drawn[0])
            return here.to(w.dtype) + (w - w.detach())

        return gate


class _Carry(NamedTuple):
    """State s_t, log and value of the survival prod_{i<t} c_i, the sums so far; ``None`` before the first step."""

    state: Any
    log: Tensor
    survival: Tensor
    totals: Any
    steps: Tensor
    squares: Tensor


def while_loop(
    cond_fn: Callable[[Any], Any],
    body_fn: Callable[[Any], Any],
    init: Any,
    max_iter: int,
    *,
    mean: Mean = FinalState(),
    checkpoint: Checkpoint | None = None,
    halting: bool = False,
    tol: float = 1e-6,
    on_fail: str = "warn",
) -> tuple[Any, LoopInfo]:
    """The expected final state sum_t w_t s_t + R s_T of ``while cond_fn(s): s = body_fn(s)``.

    c_t = cond_fn(s_t), w_t = (1 - c_t) prod_{i<t} c_i, R = prod c_i. Where c is 0 or 1 it is the ordinary loop.

    Args:
        cond_fn: state -> values in [0, 1] or bool; its dims stand for the leading dims of every leaf of the state.
        body_fn: state -> state of the same form. init: a pytree of tensors and numbers. max_iter: T, at least 1.
        mean: FinalState(), Readout(fn) or Sample(generator). checkpoint: as for ``fori_loop``.
        halting: whether info.halting holds w_0, ..., w_{T-1}, R, shape (T + 1, ...).
        tol, on_fail: what to do where R > tol: "warn", "raise" or "ignore"; not under transforms or compilation.

    Returns: (state, LoopInfo(steps, variance, residual, halting)).
    Raises: ValueError, TypeError; RuntimeError for a residual above ``tol`` and on_fail="raise".
    Complexity: T steps at most; eager loops end once no mass is left, looked up at each step on the CPU.

    Example:
        >>> x, info = so.while_loop(lambda s: so.heaviside(s, smoothing=1.0), lambda s: s - 1, torch.tensor(3.5), 50)
        >>> x, info.steps
        (tensor(0.2361), tensor(3.2639))
    """
    check_callable(cond_fn, "cond_fn")
    check_callable(body_fn, "body_fn")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive int, got {max_iter!r}")
    if not isinstance(mean, Mean):
        raise TypeError(f"mean must be so.FinalState(), so.Readout(fn) or so.Sample(generator), got {mean!r}")
    if on_fail not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_fail must be one of 'raise', 'warn', 'ignore', got {on_fail!r}")
    device = next((leaf.device for leaf in flatten(init)[0] if isinstance(leaf, Tensor)), torch.device("cpu"))
    one = torch.ones((), dtype=wide_dtype(device), device=device)
    loop = _Loop(cond_fn, body_fn, mean, halting, device, max_iter, checkpoint)
    chain = Chain(loop.step, halted=loop.halted, guards=True)
    start = _Carry(init, one * 0, one, None, one * 0, one * 0)
    end, weights = run(chain, start, max_iter, checkpoint)
    result = loop.finish(end)
    check_residual(end.survival, tol, on_fail, max_iter, cond_fn)

    def out(t: Tensor) -> Tensor:
        return t.to(loop.dtype)

    kept = None
    if halting:
        missing = torch.zeros_like(end.survival).expand(max_iter - len(weights), *end.survival.shape)
        kept = out(torch.cat([torch.stack(weights), missing, end.survival.unsqueeze(0)]))
    variance = end.squares - end.steps.square()
    return result, LoopInfo(out(end.steps), out(variance), out(end.survival), kept)


class _Loop:
    """One call of :func:`while_loop`."""

    def __init__(
        self, cond_fn: Any, body_fn: Any, mean: Mean, halting: bool, device: torch.device, max_iter: int,
        checkpoint: Checkpoint | None,
    ) -> None:  # fmt: skip
        self.cond_fn, self.body_fn, self.mean, self.halting = cond_fn, body_fn, mean, halting
        self.gate = mean.gate()
        self.dtype = torch.get_default_dtype()
        # a look waits for an accelerator: once in a stretch there
        self.stride = 1 if device.type == "cpu" else math.isqrt(max_iter - 1) + 1
        self.asked, self.made = f"{name_of(cond_fn)}(state)", name_of(body_fn)
        self.seen: tuple[Tensor, _Mass] | None = None

    def step(self, t: int, carry: _Carry, _: None) -> tuple[_Carry, Tensor | None]:
        before, mass = carry.survival, self.look(carry.survival)
        c = self.chance(t, carry, mass.zeros)
        low, high = check_range(c, self.asked, mass.zeros.mask if mass.zeros.some else None)
        stop = mass.small if mass.some else None
        tiny = torch.finfo(c.dtype).tiny
        if not low >= tiny:
            # (below tiny 1/c would overflow; NaN goes on)
            stop = mass.small | (c.detach() < tiny)
        if stop is None:
            log = carry.log + c.log()
            after, w = log.exp(), before * (1 - c)
        else:  # the loop halts there, without derivative: what would follow is not there
            alive = (~stop).to(c.dtype)
            c = torch.where(stop, 1, c)
            log = carry.log + c.log()
            after, w = log.exp() * alive, before * ((2 - alive) - c)
        absent = mass.zeros if high < 1 else Zeros(w == 0)
        totals = self.total(carry, w, absent, self.gate(w, before, after))
        with guarded(self.look(after).zeros):
            state = self.body_fn(carry.state)
        check_same(state, carry.state, self.made, "its state was", numbers=False)
        # E N = sum of P(N > t), E N^2 = sum of (2 t + 1) P(N > t)
        squares = torch.add(carry.squares, after, alpha=2 * t + 1)
        return _Carry(state, log, after, totals, carry.steps + after, squares), w if self.halting else None

    def look(self, survival: Tensor) -> _Mass:
        """That after a step is that before the next."""
        if self.seen is None or self.seen[0] is not survival:
            self.seen = survival, _Mass(survival)
        return self.seen[1]

    def chance(self, t: int, carry: _Carry, halted: Zeros) -> Tensor:
        """c_t."""
        with guarded(halted):
            given = weight(self.cond_fn(carry.state), self.asked)
        if t and given.shape != carry.survival.shape:
            raise ValueError(
                f"{name_of(self.cond_fn)} returned shape {tuple(given.shape)}, at first {tuple(carry.survival.shape)}"
            )
        self.dtype = given.dtype
        return given.to(carry.log.dtype)

    def total(self, carry: _Carry, w: Tensor, absent: Zeros, scale: Tensor | None) -> list[Tensor]:
        with guarded(absent):
            leaves = flatten(self.mean.read(carry.state))[0]
        totals = carry.totals or [None] * len(leaves)
        return [
            add(sum_, w, as_tensor(x, w), "the condition", scale, absent)
            for sum_, x in zip(totals, leaves, strict=True)
        ]

    def finish(self, end: _Carry) -> Any:
        """The sums with the mass that is left on the last state."""
        absent = self.look(end.survival).zeros
        scale = self.gate(end.survival, end.survival, torch.zeros_like(end.survival))
        sums = self.total(end, end.survival, absent, scale)
        with guarded(absent):
            leaves, spec = flatten(self.mean.read(end.state))
        dtypes = [result_dtype(x) if isinstance(x, Tensor) else self.dtype for x in leaves]
        return unflatten([s.to(d) for s, d in zip(sums, dtypes, strict=True)], spec)

    def halted(self, t: int, carry: _Carry) -> bool:
        if t % self.stride or not visible(carry.survival):
            return False
        zeros = self.look(carry.survival).zeros
        return zeros.mask is not None and zeros.some and bool(zeros.mask.all())


class _Mass:
    """What is known of a survival: where it is as good as 0, and where it is 0."""

    def __init__(self, survival: Tensor) -> None:
        self.small = survival.detach() <= ROUNDING
        self.some = some(self.small)
        self.zeros = Zeros(survival == 0) if self.some else Zeros(None)


def as_tensor(leaf: Any, w: Tensor) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if not number(leaf):
        raise TypeError(f"the state of a soft loop must consist of tensors and numbers, got {describe(leaf)}")
    return torch.full((), float(leaf), dtype=w.dtype, device=w.device)


def visible(t: Tensor) -> bool:
    """Whether the numbers of t can be looked at, on whatever device."""
    if torch.compiler.is_compiling() or t.device.type == "meta":
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def check_residual(residual: Tensor, tol: float, on_fail: str, max_iter: int, cond_fn: Any) -> None:
    if on_fail == "ignore" or not visible(residual) or not residual.numel():
        return
    worst = residual.detach().max().item()
    if worst <= tol:
        return
    message = (
        f"the loop did not halt within max_iter={max_iter} steps: mass {worst:.3g} is left, more than tol={tol:g}; "
        f"raise max_iter, or make {name_of(cond_fn)} fall below 1 sooner (a smaller eps)"
    )
    if on_fail == "raise":
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
