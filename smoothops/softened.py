"""``with softened(smoothing):`` replaces torch's own hard operations inside code that cannot be changed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _soft_reading  # noqa: F401  - its rules
from . import logic as _logic
from ._composites import COMPOSITES
from ._replaced import NAMES, OPTIONAL, REPLACED, Replacement
from ._soft_boolean import RULES as BOOLEAN_RULES
from ._soft_boolean import SoftBoolean, hard_boolean
from ._soft_integer import RULES as INTEGER_RULES
from ._soft_integer import SoftInteger
from ._soft_masks import PREPARED
from ._soft_values import CONTEXTS, SoftValue, checkpoints, context, own_work, plain
from .regularizers import Entropy
from .smoothing import Hard, SmoothingLike, StraightThrough, as_smoothing

F = TypeVar("F", bound=Callable[..., Any])
COMPOSITE_NAMES = tuple(dict.fromkeys(name for name, _ in COMPOSITES.values()))
ALL_NAMES = (*NAMES, *COMPOSITE_NAMES)


class softened(TorchFunctionMode, contextlib.ContextDecorator):
    """Context in which torch's hard operations on floating-point tensors are soft, in code that you cannot change.

    Comparisons give soft booleans (``& | ~ any all sum where masked_fill`` understand them), argmax and indices give
    soft integers; sign, round, clamp, max, sort, topk, ... are replaced by the operators of this package.

    Args:
        smoothing: of all but the orders, in the unit of x, as for :func:`gt` and :func:`argmax`; ``Hard()`` or 0:
            nothing is replaced.
        order: of sort, argsort, msort, topk, kthvalue, median, quantile; None: their own default (``Hard`` and
            ``StraightThrough`` are taken over from ``smoothing``).
        also: operations that are replaced only if named: "abs", "relu".
        keep: operations, by torch's name, that are left as they are.
        logic: for soft booleans, Product() by default.

    Also a decorator. Raises: ValueError for the truth value of a soft boolean strictly between 0 and 1; RuntimeError
    when entered inside torch.compile. Everything that is replaced, and the limits: docs/softened.md.

    Example:
        >>> with so.softened(0.5): (torch.tensor([0.0, 1.0]) > 0.5).float().mean()
        tensor(0.5000)
    """

    def __init__(
        self, smoothing: SmoothingLike = 0.1, *, order: SmoothingLike = None, also: Iterable[str] = (),
        keep: Iterable[str] = (), logic: _logic.Logic | None = None,
    ) -> None:  # fmt: skip
        _refuse_compiling()
        super().__init__()
        for given in (smoothing, order):
            as_smoothing(given, Entropy, 0.1)  # raises for what is none
        self.smoothing, self.order = smoothing, _order(smoothing, order)
        self.logic = _logic._logic(_logic.INDEPENDENT if logic is None else logic)
        also, keep = _names(also, "also", OPTIONAL), _names(keep, "keep", ALL_NAMES)
        kept = {*keep, *OPTIONAL} - {*also}
        self._kept = kept | {r.name for r in REPLACED.values() if _is_hard(self.order if r.order else smoothing)}
        if _is_hard(smoothing):
            self._kept |= {*COMPOSITE_NAMES}

    def __enter__(self) -> Any:
        _refuse_compiling()
        super().__enter__()
        CONTEXTS.entered.append((self, checkpoints()))
        return self

    def __exit__(self, *error: Any) -> None:
        left, _ = CONTEXTS.entered.pop()
        super().__exit__(*error)
        if left is not self and (not error or error[0] is None):  # an error that passes through is the better message
            raise RuntimeError(
                "so.softened contexts were left in another order than they were entered, as when one is held across a "
                "yield or await while another is entered: what ran between may have used the wrong one"
            )

    def __call__(self, func: F) -> F:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{func.__name__} would run after so.softened is left; enter it inside, with so.softened()")
        return super().__call__(func)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # the innermost context decides; there is none in the threads of a backward pass, where nothing is replaced
        if context() is not self:
            return func(*args, **kwargs)
        _refuse_compiling()
        # torch has left this context for the time of this call, so that nothing below is replaced a second time
        prepare = PREPARED.get(func)
        if prepare is not None:
            done, args, kwargs = prepare(func, args, kwargs)
            if done is not None:
                return done
        found = REPLACED.get(func)
        if found is not None:
            if found.name in self._kept or not _applies(found, func, args, kwargs) or own_work():
                return func(*args, **kwargs)
            return self._replace(found, func, args, kwargs)
        composite = COMPOSITES.get(func)
        written_out = None
        if composite is not None and composite[0] not in self._kept and _holds_floats(args, kwargs):
            written_out = composite[1]
        elif isinstance(func, FunctionType) and func.__module__ in _WRITTEN_IN_PYTHON:
            written_out = _body(func)  # None where another function asks in its name
        if written_out is None or own_work():
            return func(*args, **kwargs)
        super().__enter__()
        CONTEXTS.entered.append(CONTEXTS.entered[-1])
        try:
            return written_out(*args, **kwargs)
        finally:
            self.__exit__(None, None, None)

    def _replace(self, found: Replacement, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            raise TypeError(f"{found.name}(out=...) has no soft form inside so.softened; add keep=({found.name!r},)")
        # a reentrant checkpoint runs without grad, and again in the backward pass: there its hard twin would run
        if not torch.is_grad_enabled() and checkpoints() > CONTEXTS.entered[-1][1]:
            raise RuntimeError(
                "so.softened is left when torch.utils.checkpoint(use_reentrant=True) computes again in the backward "
                "pass; enter it inside: checkpoint(so.softened(...)(function), ...)"
            )
        args = plain(args)
        kwargs = {_NUMPY_NAMES.get(name, name): plain(value) for name, value in kwargs.items() if name != "out"}
        if not found.in_place:
            return found.soft(self, *args, **kwargs)
        target, *rest = args
        if not target.is_floating_point():
            made = found.soft(self, target.clone(), *rest, **kwargs)
            if isinstance(made, SoftBoolean):
                return target.copy_(hard_boolean(made, f"{found.name}_ on a tensor of {target.dtype}"))
            return func(*args, **kwargs)
        # of a copy: what the soft operator saves for the backward pass must not be overwritten
        return target.copy_(plain(found.soft(self, target.clone(), *rest, **kwargs)))


_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "self": "input", "a": "input", "x": "input", "x2": "other"}


def _refuse_compiling() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "so.softened cannot be used inside torch.compile, nor around a compiled function with fullgraph=True: it "
            "replaces operations as they are called. Run this part uncompiled, or call the operators of smoothops"
        )


def _is_hard(smoothing: SmoothingLike) -> bool:
    return isinstance(smoothing, Hard) or (isinstance(smoothing, (int, float)) and smoothing == 0)


def _order(smoothing: SmoothingLike, order: SmoothingLike) -> SmoothingLike:
    if order is not None:
        return order
    if _is_hard(smoothing):
        return Hard()
    return StraightThrough(None) if isinstance(smoothing, StraightThrough) else None


def _names(given: Iterable[str], argument: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given)
    for name in given:
        if name not in allowed:
            raise ValueError(f"{argument} takes names among {', '.join(allowed)}; got {name!r}")
    return given


def _holds_floats(args: Any, kwargs: Any) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in (*args, *kwargs.values()))


def _applies(found: Replacement, func: Any, args: Any, kwargs: Any) -> bool:
    """Floating-point tensors are softened; integers and booleans are exact already, soft values have their rules."""
    if found.when is not None and not found.when(*args, *kwargs.values()):
        return False
    operands = [v for v in (*args[:3], *kwargs.values()) if isinstance(v, Tensor)]
    if any(v.is_complex() for v in operands) or not any(v.is_floating_point() for v in operands):
        return False
    if any(v.layout is not torch.strided or v.is_nested for v in operands):
        return False
    if found.order and (operands[0].ndim == 0 or operands[0].numel() == 0):
        return False
    ruled = {SoftBoolean: BOOLEAN_RULES, SoftInteger: INTEGER_RULES}
    return not any(isinstance(v, SoftValue) and func in ruled[type(v)] for v in operands)


# --- functions of torch that are written in Python -------------------------------------------------------------------

_WRITTEN_IN_PYTHON = ("torch.nn.functional", "torch.functional")
_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def _body(func: FunctionType) -> Callable[..., Any] | None:
    """``func`` without its question at the entry whether somebody overrides it: the same code, other globals.

    Called as it is, it would ask again, for ever; with the context left, what it calls would not be replaced.
    """
    no = {name: (lambda *a: False) for name in _ASKS if name in func.__code__.co_names}
    if not no:
        return None
    twin = FunctionType(func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin
