"""Reading, writing and counting at the positions that a soft integer names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import selection
from ._soft_boolean import SoftBoolean, as_soft_boolean
from ._soft_integer import Each, Law, SoftInteger, as_soft_integer, over_support, rule, weighted
from ._soft_values import SoftValue, plain


def over(x: SoftInteger, m: int) -> Tensor:
    """The distribution as weights (..., m) of the positions 0, ..., m - 1."""
    weights, support = x.law
    support = torch.where(support < 0, support + m, support)
    out = weights.new_zeros(*weights.shape[:-1], m)
    return out.scatter_add(-1, support, weights)


@rule("one_hot")
def _one_hot(func: Any, x: Any, num_classes: int = -1) -> Tensor:
    return over(x, x.law[0].shape[-1] if num_classes == -1 else num_classes)


def _found(
    x: Tensor, hard: Tensor, read: Callable[[Tensor], Any], soft: Callable[[], Tensor], law: Law, before: int = 0
) -> Any:
    """What lies in x at soft positions: averages of floats, probabilities of booleans, soft integers of integers.

    ``read`` reads at hard positions, ``before`` dims of its answer lie before those of the position.
    """
    if x.is_floating_point():
        return as_soft_boolean(soft()) if isinstance(x, SoftBoolean) else soft()
    values = over_support(read, Each(law[1]))
    weights = _aligned(law[0], values, before)
    if x.dtype == torch.bool:
        p = weighted(weights, values.to(weights.dtype))
        return as_soft_boolean(p + (p.clamp(0, 1) - p).detach())
    return as_soft_integer(hard, lambda: (weights.broadcast_to(values.shape), values))


def _aligned(weights: Tensor, values: Tensor, before: int) -> Tensor:
    """Weights (..., n) of positions as they lie in values: dims before, those of the position, dims after, n."""
    after = values.ndim - before - weights.ndim
    return weights.reshape((*weights.shape[:-1], *(1,) * after, weights.shape[-1]))


@rule("gather", "take_along_dim", "take", "index_select")
def _pick(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__
    at = {"gather": 1, "index_select": 1}.get(name, 0)
    names = _ARGUMENTS[name]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    given = [named[n] for n in names if n in named]
    index = given[at]
    if not isinstance(index, SoftInteger) or isinstance(x, SoftInteger) or x.ndim == 0:
        return NotImplemented
    if name == "take_along_dim" and named.get("dim") is None:
        flat = [v.reshape(-1, v.shape[-1]) for v in index.law]
        return _pick(torch.take, x, as_soft_integer(plain(index).reshape(-1), lambda: (flat[0], flat[1])))
    dim = {"gather": 0, "index_select": 0, "take_along_dim": 1}.get(name)
    m = x.numel() if dim is None else x.shape[given[dim]]
    numbers = plain(x)
    replaced = lambda v: [v if i == at else g for i, g in enumerate(given)]  # noqa: E731
    if not numbers.is_floating_point() and name == "index_select":
        return _read(Tensor.__getitem__, x, (*(slice(None),) * (given[0] % x.ndim), index))
    return _found(
        x, func(numbers, *replaced(plain(index))),
        # torch.vmap knows no take
        lambda s: numbers.reshape(-1)[s] if name == "take" else func(numbers, *replaced(s)),
        lambda: getattr(selection, name)(numbers, *replaced(over(index, m))),
        index.law,
    )  # fmt: skip


_ARGUMENTS = {
    "gather": ("dim", "index"), "index_select": ("dim", "index"), "take": ("index",),
    "take_along_dim": ("indices", "dim"),
}  # fmt: skip


@rule("scatter", "scatter_")
def _scatter(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = {**dict(zip(("dim", "index", "src"), args, strict=False)), **kwargs}
    dim, index, src = (named.get(name) for name in ("dim", "index", "src"))
    src = named.get("value") if src is None else src
    exact = isinstance(x, SoftValue) or not x.is_floating_point() or "reduce" in named
    if not isinstance(index, SoftInteger) or exact or x.ndim == 0 or not isinstance(dim, int) or src is None:
        return NotImplemented
    written = selection.scatter(x, dim, over(index, x.shape[dim]), src)
    return x.copy_(written) if func.__name__.endswith("_") else written


@rule("embedding")
def _embedding(func: Any, table: Tensor, index: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(index, SoftInteger):
        return NotImplemented
    return _rows(table, index)


def _rows(x: Tensor, index: SoftInteger) -> Tensor:
    w = over(index, x.shape[0])
    return selection.index_select(x, 0, w.reshape(-1, x.shape[0])).reshape((*index.shape, *x.shape[1:]))


@rule("__getitem__")
def _read(func: Any, x: Any, index: Any) -> Any:
    if isinstance(x, SoftInteger):
        return _part(x, index)
    entries = index if isinstance(index, tuple) else (index,)
    soft = [i for i, e in enumerate(entries) if isinstance(e, SoftInteger)]
    if len(soft) != 1:
        return NotImplemented
    at = soft[0]
    position, numbers, others = entries[at], plain(x), (*entries[:at], *entries[at + 1 :])
    put = lambda v: (*entries[:at], v, *entries[at + 1 :])  # noqa: E731
    hard = numbers[put(plain(position))]
    if all(e is None or e is Ellipsis or isinstance(e, slice) for e in others):
        law = position.law
        before = _dims_before(entries, at, x.ndim)
    elif all(_is_position(e) for e in others):  # they broadcast against each other and come first
        shape = torch.broadcast_shapes(*(e.shape for e in put(plain(position)) if isinstance(e, Tensor)))
        law = tuple(v.broadcast_to(*shape, v.shape[-1]) for v in position.law)
        before = 0
    else:
        return NotImplemented

    def soft_read() -> Tensor:
        if not others:
            return _rows(numbers, position)
        values = over_support(lambda s: numbers[put(s)], Each(law[1]))
        return weighted(_aligned(law[0], values, before), values).to(numbers.dtype)

    return _found(x, hard, lambda s: numbers[put(s)], soft_read, law, before)


def _is_position(e: Any) -> bool:
    return (isinstance(e, int) and not isinstance(e, bool)) or (isinstance(e, Tensor) and e.dtype == torch.long)


def _dims_before(entries: tuple[Any, ...], at: int, ndim: int) -> int:
    """The number of dims that slices, None and ... before entry ``at`` leave in the answer."""
    rest = ndim - sum(e is not None and e is not Ellipsis for e in entries)
    return sum(rest if e is Ellipsis else 1 for e in entries[:at])


def _part(x: SoftInteger, index: Any) -> Any:
    entries = index if isinstance(index, tuple) else (index,)
    if any(isinstance(e, SoftValue) for e in entries):
        return NotImplemented
    whole = (*entries, slice(None)) if any(e is Ellipsis for e in entries) else entries
    return as_soft_integer(plain(x)[index], lambda: (x.law[0][whole], x.law[1][whole]))


@rule("bincount")
def _bincount(func: Any, x: Any, weights: Any = None, minlength: int = 0) -> Any:
    """The expected counts."""
    if not isinstance(x, SoftInteger):
        return NotImplemented
    m = max(minlength, int(x.law[1].max()) + 1 if x.law[1].numel() else 0)
    counts = over(x, m)
    return (counts if weights is None else counts * weights.unsqueeze(-1)).sum(0)
