"""Pytrees of tensors with weights: which dims a weight stands for, and means in which weight 0 means absent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .._axes import concrete
from .._blend import blend, known_finite
from ._guard import Zeros

LEAF = tree_flatten(0)[1]
TUPLES = [tree_flatten((0,) * n)[1] for n in range(9)]
PLAIN = (int, float, bool)
WIDE = (torch.float32, torch.float64)  # the dtypes that arithmetic is done in


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """tree_flatten, whose general case takes longer than small functions."""
    if tree is None or isinstance(tree, Tensor):
        return [tree], LEAF
    if type(tree) is tuple and len(tree) < len(TUPLES) and all(isinstance(x, Tensor) or type(x) in PLAIN for x in tree):
        return list(tree), TUPLES[len(tree)]
    return tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    if spec is LEAF:
        return leaves[0]
    if len(leaves) < len(TUPLES) and spec is TUPLES[len(leaves)]:
        return tuple(leaves)
    return tree_unflatten(leaves, spec)


def describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, (Real, str, type(None))) else type(leaf).__name__


def number(leaf: Any) -> bool:
    return isinstance(leaf, Real) and not isinstance(leaf, Tensor)


def check_same(found: Any, wanted: Any, who: str, reference: str, *, numbers: bool) -> list[Any]:
    """The leaves of ``found``, which must have the structure, shapes and dtypes of ``wanted``.

    ``numbers``: whether a Python number or a 0-d tensor goes with any tensor.
    """
    if torch.compiler.is_compiling():
        return _check_same(found, wanted, who, reference, numbers)
    with torch._C.DisableTorchFunction():  # a mode would see every look at a shape
        return _check_same(found, wanted, who, reference, numbers)


def _check_same(found: Any, wanted: Any, who: str, reference: str, numbers: bool) -> list[Any]:
    leaves, spec = flatten(found)
    others, other_spec = flatten(wanted)
    if spec is not other_spec and spec != other_spec:
        raise ValueError(f"{who} returned the structure {spec}, {reference} {other_spec}; both must be the same pytree")
    for i, (a, b) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.dtype == b.dtype and (a.shape == b.shape or (numbers and 0 in (a.ndim, b.ndim)))
        elif number(a) or number(b):
            same = (number(a) and number(b)) or (numbers and isinstance(a if number(b) else b, Tensor))
        else:
            same = type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
        if not same:
            where = keystr(tree_flatten_with_path(found)[0][i][0])
            raise ValueError(
                f"{who} returned {describe(a)}{' at ' + where if where else ''}, {reference} {describe(b)}; "
                "shapes and dtypes must agree, convert with .expand or .to"
            )
    return leaves


def weight(p: Any, name: str) -> Tensor:
    """A soft boolean as a floating-point tensor."""
    if isinstance(p, Real) and not isinstance(p, Tensor):
        p = torch.tensor(float(p))
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor of values in [0, 1], got {type(p).__name__}")
    if p.is_complex():
        raise TypeError(f"{name} has dtype {p.dtype}, expected values in [0, 1]; pass p.abs() or p.real")
    return p if p.is_floating_point() else p.to(torch.get_default_dtype())


def lead(w: Tensor, leaf: Tensor, name: str) -> Tensor:
    """w with its dims at the leading dims of the leaf."""
    k = w.ndim
    if k == 0 or leaf.ndim == 0:
        return w
    if leaf.shape == w.shape:
        return w
    if leaf.ndim < k or any(d != s and 1 not in (d, s) for d, s in zip(w.shape, leaf.shape, strict=False)):
        raise ValueError(
            f"{name} of shape {tuple(w.shape)} does not fit a result of shape {tuple(leaf.shape)}: its dims stand for "
            f"the leading dims of every result; add dims of size 1 to one of them"
        )
    return w.reshape(w.shape + (1,) * (leaf.ndim - k)) if leaf.ndim > k else w


def result_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype of a weighted mean of such leaves."""
    if leaf.is_complex():
        raise TypeError(f"a soft decision mixes real tensors, got {leaf.dtype}; return torch.view_as_real of it")
    return leaf.dtype if leaf.is_floating_point() else torch.get_default_dtype()


def work_dtype(leaf: Tensor, w: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: exact for integers, never a half type."""
    dtype = result_dtype(leaf) if leaf.is_floating_point() or leaf.is_complex() else torch.float64
    return torch.promote_types(torch.promote_types(dtype, w.dtype), torch.float32)


def check_range(p: Tensor, name: str, absent: Tensor | None = None) -> tuple[float, float]:
    """The least and the largest value, NaN where they may not be looked up; what is not absent must be in [0, 1]."""
    if not concrete(p) or not p.numel():
        return math.nan, math.nan
    p = p.detach()
    low, high = (v.item() for v in p.aminmax())
    if not (low >= 0 and high <= 1):  # or NaN, which goes on
        p = p if absent is None else torch.where(absent, 0, p)
        if bool(((p < 0) | (p > 1)).any()):
            low, high = (v.item() for v in p[~p.isnan()].aminmax())
            raise ValueError(
                f"{name} has values in [{low:.4g}, {high:.4g}], expected [0, 1]; use so.heaviside or so.gt"
            )
    return low, high


def add(
    total: Tensor | None, w: Tensor, leaf: Tensor, name: str, scale: Tensor | None = None, zeros: Zeros | None = None
) -> Tensor:
    """total + w leaf (or total + scale leaf), where what has w = 0 adds 0, also when it is inf or nan.

    ``zeros`` of w, where they are known already.
    """
    dtype = work_dtype(leaf, w)
    zeros = Zeros(w == 0) if zeros is None else zeros
    w, leaf = lead(w, leaf, name).to(dtype), leaf.to(dtype)
    if zeros.mask is not None and zeros.some and not known_finite(leaf):
        # no tangent of what is absent either: 0 times an infinite one is NaN
        kept = torch.where(leaf.isfinite(), leaf.detach(), 0)
        leaf = torch.where(lead(zeros.mask, leaf, name), kept, leaf)
    part = (w if scale is None else lead(scale, leaf, name).to(dtype)) * leaf
    return part if total is None else total + part


def mix(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """p x + (1 - p) y; what has weight 0 contributes 0, also when it is inf or nan."""
    if p.dtype == x.dtype == y.dtype and x.dtype in WIDE:
        return blend(p, x, y)
    dtype, work = result_dtype(x), work_dtype(x, p)
    return blend(p.to(work), x.to(work), y.to(work)).to(dtype)
