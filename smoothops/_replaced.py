"""What a softened context puts in the place of torch's hard operations on floating-point tensors."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import comparisons, elementwise, operators, selection
from ._soft_boolean import RULES as BOOLEAN_RULES
from ._soft_boolean import as_soft_boolean
from ._soft_integer import chosen
from ._soft_values import ordered, spelled


@dataclass(frozen=True)
class Replacement:
    """``soft(context, *torch's arguments)`` in the place of the function ``name`` of torch."""

    name: str
    soft: Callable[..., Any]
    order: bool  # whether the context's ``order`` softens it, rather than its ``smoothing``
    in_place: bool = False
    when: Callable[..., bool] | None = None  # of the arguments; None: always


REPLACED: dict[Any, Replacement] = {}
OPTIONAL = ("abs", "relu")  # they have a useful gradient everywhere already


def replaces(
    *names: str, order: bool = False, spellings: tuple[str, ...] = (), when: Callable[..., bool] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The first name is torch's main one, the others are aliases; each has its in-place form too, where torch has."""

    def register(soft: Callable[..., Any]) -> Callable[..., Any]:
        for name in spellings or names:
            REPLACED.update(dict.fromkeys(spelled(name), Replacement(names[0], soft, order, when=when)))
            if not name.startswith("__"):
                REPLACED.update(dict.fromkeys(spelled(name + "_"), Replacement(names[0], soft, order, True, when)))
        return soft

    return register


# --- comparisons -----------------------------------------------------------------------------------------------------


def _comparison(compare: Callable[..., Tensor]) -> Callable[..., Any]:
    def soft(s: Any, input: Any, other: Any) -> Any:
        if input is other:  # `x != x` asks for NaN
            return getattr(torch, compare.__name__)(input, other)
        other = int(other) if isinstance(other, bool) else other
        return as_soft_boolean(compare(input, other, smoothing=s.smoothing))

    return soft


for _name, *_aliases in (
    ("gt", "greater", "__gt__"), ("ge", "greater_equal", "__ge__"), ("lt", "less", "__lt__"),
    ("le", "less_equal", "__le__"), ("eq", "__eq__"), ("ne", "not_equal", "__ne__"),
):  # fmt: skip
    replaces(_name, *_aliases)(_comparison(getattr(comparisons, _name)))


@replaces("isclose")
def _isclose(
    s: Any, input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Any:
    near = comparisons.isclose(input, other, rtol=rtol, atol=atol, equal_nan=equal_nan, smoothing=s.smoothing)
    return as_soft_boolean(near)


# --- a float as a boolean is x != 0 ----------------------------------------------------------------------------------


def _nonzero(s: Any, x: Tensor) -> Any:
    return as_soft_boolean(comparisons.ne(x, 0, smoothing=s.smoothing))


def _as_boolean(name: str) -> Callable[..., Any]:
    """The function of that name on the soft booleans x != 0."""
    (func, *_) = spelled(name)

    def soft(s: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = ordered(func, args, kwargs)
        booleans = (_nonzero(s, v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args)
        return BOOLEAN_RULES[func](func, *booleans, **kwargs)

    return soft


for _name in (
    "__bool__", "is_nonzero", "bool", "any", "all", "count_nonzero", "nonzero", "argwhere", "logical_not",
    "logical_and", "logical_or", "logical_xor",
):  # fmt: skip
    replaces("ne", spellings=(_name,))(_as_boolean(_name))


def _asks_for_bool(*given: Any) -> bool:
    return any(
        v is torch.bool or v is torch.BoolTensor or (isinstance(v, str) and v == "torch.BoolTensor")
        or (isinstance(v, Tensor) and v.dtype == torch.bool)
        for v in given
    )  # fmt: skip


@replaces("ne", spellings=("to", "type", "type_as"), when=_asks_for_bool)
def _to_bool(s: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _nonzero(s, input)


# --- elementwise -----------------------------------------------------------------------------------------------------


@replaces("sign", "sgn")
def _sign(s: Any, input: Tensor) -> Tensor:
    return elementwise.sign(input, smoothing=s.smoothing)


@replaces("heaviside")
def _heaviside(s: Any, input: Tensor, values: Tensor) -> Tensor:
    input, values = torch.broadcast_tensors(input, values)
    return elementwise.heaviside(input, values, smoothing=s.smoothing)


@replaces("round")
def _round(s: Any, input: Tensor, *, decimals: int = 0) -> Tensor:
    return elementwise.round(input, decimals=decimals, smoothing=s.smoothing)


@replaces("floor")
def _floor(s: Any, input: Tensor) -> Tensor:
    return elementwise.floor(input, smoothing=s.smoothing)


@replaces("ceil")
def _ceil(s: Any, input: Tensor) -> Tensor:
    return elementwise.ceil(input, smoothing=s.smoothing)


@replaces("clamp", "clip")
def _clamp(s: Any, input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is not None and max is not None:  # where they cross, torch's answer is max
        low, high = torch.as_tensor(min, device=input.device), torch.as_tensor(max, device=input.device)
        if not isinstance(min, Tensor) and not isinstance(max, Tensor):
            min = builtins.min(min, max)
        else:
            min = torch.minimum(low, high)
    for bound in (min, max):
        if isinstance(bound, Tensor):
            dtype = torch.result_type(input, bound)
            input = torch.broadcast_tensors(input, bound)[0].to(dtype)
    return elementwise.clamp(input, min, max, smoothing=s.smoothing)


@replaces("clamp", spellings=("clamp_min",))
def _clamp_min(s: Any, input: Tensor, min: Any) -> Tensor:
    return _clamp(s, input, min)


@replaces("clamp", spellings=("clamp_max",))
def _clamp_max(s: Any, input: Tensor, max: Any) -> Tensor:
    return _clamp(s, input, None, max)


@replaces("maximum")
def _maximum(s: Any, input: Tensor, other: Tensor) -> Tensor:
    dtype = torch.result_type(input, other)
    return elementwise.maximum(input.to(dtype), other.to(dtype), smoothing=s.smoothing)


@replaces("minimum")
def _minimum(s: Any, input: Tensor, other: Tensor) -> Tensor:
    dtype = torch.result_type(input, other)
    return elementwise.minimum(input.to(dtype), other.to(dtype), smoothing=s.smoothing)


def _without_nan(extreme: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Where one of the two is NaN, the other."""

    def soft(s: Any, input: Tensor, other: Tensor) -> Tensor:
        dtype = torch.result_type(input, other)
        x, y = torch.broadcast_tensors(input.to(dtype), other.to(dtype))
        either = x.isnan() | y.isnan()
        both = extreme(s, torch.where(either, 0, x), torch.where(either, 0, y))
        return torch.where(x.isnan(), y, torch.where(y.isnan(), x, both))

    return soft


replaces("maximum", spellings=("fmax",))(_without_nan(_maximum))
replaces("minimum", spellings=("fmin",))(_without_nan(_minimum))


@replaces("abs", "absolute", "__abs__")
def _abs(s: Any, input: Tensor) -> Tensor:
    return elementwise.abs(input, smoothing=s.smoothing)


@replaces("relu")
def _relu(s: Any, input: Tensor) -> Tensor:
    return elementwise.relu(input, smoothing=s.smoothing)


# --- choices ---------------------------------------------------------------------------------------------------------


@replaces("amax")
def _amax(s: Any, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return operators.amax(input, dim, keepdim, smoothing=s.smoothing)


@replaces("amin")
def _amin(s: Any, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return operators.amin(input, dim, keepdim, smoothing=s.smoothing)


@replaces("aminmax")
def _aminmax(s: Any, input: Tensor, *, dim: Any = None, keepdim: bool = False) -> Any:
    dim = () if dim is None else dim
    return torch.return_types.aminmax((_amin(s, input, dim, keepdim), _amax(s, input, dim, keepdim)))


def _choice(hard: Callable[..., Tensor], weigh: Callable[..., Tensor]) -> Callable[..., Any]:
    def soft(s: Any, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        weights = weigh(input, dim, smoothing=s.smoothing)
        if dim is None:
            weights = weights.reshape(*(1,) * (input.ndim if keepdim else 0), -1)
        elif input.ndim == 0:
            weights = weights.unsqueeze(-1)
        else:
            weights = weights.movedim(dim, -1)
            if keepdim:
                weights = weights.unsqueeze(dim if dim >= 0 else dim - 1)
        return chosen(hard(input.detach(), dim, keepdim), lambda: weights)

    return soft


_argmax = replaces("argmax")(_choice(torch.argmax, operators.argmax))
_argmin = replaces("argmin")(_choice(torch.argmin, operators.argmin))


@replaces("max")
def _max(s: Any, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None) -> Any:
    other = dim if isinstance(dim, Tensor) else other
    if other is not None:
        return _maximum(s, input, other)
    if dim is None:
        return _amax(s, input)
    return torch.return_types.max((_amax(s, input, dim, keepdim), _argmax(s, input, dim, keepdim)))


@replaces("min")
def _min(s: Any, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None) -> Any:
    other = dim if isinstance(dim, Tensor) else other
    if other is not None:
        return _minimum(s, input, other)
    if dim is None:
        return _amin(s, input)
    return torch.return_types.min((_amin(s, input, dim, keepdim), _argmin(s, input, dim, keepdim)))


# --- orders ----------------------------------------------------------------------------------------------------------


def _places(s: Any, input: Tensor, dim: int, descending: bool, at: slice | int, keepdim: bool = False) -> Any:
    """The items at some positions of the sort: hard ones, with the rows of the soft argsort, made when asked for."""
    order = torch.sort(input.detach(), dim=dim, descending=descending, stable=True).indices
    pick = lambda v, d: v[(*(slice(None),) * (d % v.ndim), at)]  # noqa: E731
    hard = pick(order, dim)
    if isinstance(at, int) and keepdim:
        hard = hard.unsqueeze(dim)
    x = input.clone()  # what is asked for later must not depend on what became of the input

    def weights() -> Tensor:
        place = dim % max(x.ndim, 1)
        rows = pick(operators.argsort(x, dim, descending, smoothing=s.order), place)
        return rows.unsqueeze(place) if isinstance(at, int) and keepdim else rows

    return chosen(hard, weights)


@replaces("sort", order=True)
def _sort(s: Any, input: Tensor, dim: int = -1, descending: bool = False, stable: bool | None = False) -> Any:
    if isinstance(dim, bool):  # torch.sort(x, stable, dim, descending)
        stable, dim, descending = dim, -1 if descending is False else int(descending), bool(stable)
    values = operators.sort(input, dim, descending, smoothing=s.order)
    return torch.return_types.sort((values, _places(s, input, dim, descending, slice(None))))


@replaces("msort", order=True)
def _msort(s: Any, input: Tensor) -> Tensor:
    return operators.sort(input, 0, smoothing=s.order)


@replaces("argsort", order=True)
def _argsort(s: Any, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return _places(s, input, dim, descending, slice(None))


@replaces("topk", order=True)
def _topk(s: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values = operators.topk(input, k, dim, largest, smoothing=s.order)
    return torch.return_types.topk((values, _places(s, input, dim, largest, slice(0, k))))


@replaces("kthvalue", order=True)
def _kthvalue(s: Any, input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    values = operators.kthvalue(input, k, dim, keepdim, smoothing=s.order)
    return torch.return_types.kthvalue((values, _places(s, input, dim, False, k - 1, keepdim)))


@replaces("median", order=True)
def _median(s: Any, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    values = operators.median(input, dim, keepdim, smoothing=s.order)
    if dim is None:
        return values
    indices = _places(s, input, dim, False, (input.shape[dim] - 1) // 2, keepdim)
    return torch.return_types.median((values, indices))


@replaces("quantile", order=True)
def _quantile(
    s: Any, input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    return operators.quantile(input, q, dim, keepdim, interpolation=interpolation, smoothing=s.order)


# --- buckets ---------------------------------------------------------------------------------------------------------


@replaces("bucketize")
def _bucketize(s: Any, input: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Any:
    hard = torch.bucketize(torch.as_tensor(input).detach(), boundaries.detach(), out_int32=out_int32, right=right)
    weights = selection.bucketize(torch.as_tensor(input), boundaries, right=right, smoothing=s.smoothing)
    return chosen(hard, lambda: weights)


@replaces("searchsorted")
def _searchsorted(
    s: Any, sorted_sequence: Tensor, input: Any, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None,
) -> Any:  # fmt: skip
    if sorter is not None:
        sorted_sequence = sorted_sequence.gather(-1, sorter)
    x = torch.as_tensor(input)
    hard = torch.searchsorted(sorted_sequence.detach(), x.detach(), out_int32=out_int32, right=right, side=side)
    right = right if side is None else side == "right"
    dtype = torch.result_type(sorted_sequence, x)
    sorted_sequence, x = sorted_sequence.to(dtype), x.to(dtype)
    weights = selection.searchsorted(sorted_sequence, x, right=right, smoothing=s.smoothing)
    return chosen(hard, lambda: weights)


NAMES = tuple(dict.fromkeys(r.name for r in REPLACED.values()))
