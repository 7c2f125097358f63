"""Pytrees of tensors with weights: which dims a weight stands for, and sums in which weight 0 means absent."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

LEAF = tree_flatten(0)[1]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """tree_flatten, whose general case takes longer than small functions."""
    return ([tree], LEAF) if isinstance(tree, Tensor) else tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    return leaves[0] if spec is LEAF else tree_unflatten(leaves, spec)


def describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, (Real, str, type(None))) else type(leaf).__name__


def number(leaf: Any) -> bool:
    return isinstance(leaf, Real) and not isinstance(leaf, Tensor)


def check_same(found: Any, wanted: Any, who: str, reference: str, *, numbers: bool) -> list[Any]:
    """The leaves of ``found``, which must have the structure, shapes and dtypes of ``wanted``.

    ``numbers``: whether a Python number goes with a tensor.
    """
    leaves, spec = flatten(found)
    others, other_spec = flatten(wanted)
    if spec is not other_spec and spec != other_spec:
        raise ValueError(
            f"{who} returned the structure {spec}, {reference} {other_spec}; both must be the same pytree"
        )
    for i, (a, b) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.shape == b.shape and a.dtype == b.dtype
        elif number(a) and (number(b) or (numbers and isinstance(b, Tensor))):
            same = True
        elif numbers and isinstance(a, Tensor) and number(b):
            same = True
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
    if leaf.ndim < k or any(d != s and 1 not in (d, s) for d, s in zip(w.shape, leaf.shape, strict=False)):
        raise ValueError(
            f"{name} of shape {tuple(w.shape)} does not fit a result of shape {tuple(leaf.shape)}: its dims stand for "
            f"the leading dims of every result; add dims of size 1 to one of them"
        )
    return w.reshape(w.shape + (1,) * (leaf.ndim - k)) if leaf.ndim > k else w


def result_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype of a weighted mean of such leaves."""
    return leaf.dtype if leaf.is_floating_point() else torch.get_default_dtype()


def work_dtype(leaf: Tensor, w: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, w.dtype) if leaf.is_floating_point() else torch.float64
