"""Pytrees as vectors: :class:`Unknown` lays a pytree of tensors out as one tensor (..., n)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Shape = tuple[int, ...]


def as_leaf(leaf: object) -> Tensor:
    """A leaf of the unknown: a floating-point tensor, or a number or array that some other library computed."""
    if isinstance(leaf, (np.ndarray, np.generic)) or (isinstance(leaf, Real) and not isinstance(leaf, bool)):
        leaf = torch.as_tensor(leaf, dtype=None if isinstance(leaf, (np.ndarray, np.generic)) else torch.float64)
    if not isinstance(leaf, Tensor):
        raise TypeError(f"the unknown must consist of tensors, got a {type(leaf).__name__}; pass it as an argument")
    if not leaf.is_floating_point():
        raise TypeError(f"the unknown must consist of real floating-point tensors, got {leaf.dtype}; use .double()")
    return leaf


def shapes(leaves: Sequence[Any]) -> list[Any]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]


LEAF = tree_flatten(0)[1]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """tree_flatten, whose general case takes longer than small functions."""
    return ([tree], LEAF) if isinstance(tree, Tensor) else tree_flatten(tree)


class Unknown:
    """The layout of a pytree as one tensor (..., n): the first ``batch_dims`` dims of every leaf are kept."""

    def __init__(self, tree: Any, batch_dims: int = 0) -> None:
        if isinstance(batch_dims, bool) or not isinstance(batch_dims, int) or batch_dims < 0:
            raise ValueError(f"batch_dims must be a non-negative int, got {batch_dims!r}")
        raw, self.spec = flatten(tree)
        if not raw:
            raise ValueError("the unknown has no tensors; pass at least one")
        leaves = [as_leaf(leaf) for leaf in raw]
        self.shapes = [tuple(leaf.shape) for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.batch: Shape = self.shapes[0][:batch_dims]
        if any(len(s) < batch_dims or s[:batch_dims] != self.batch for s in self.shapes):
            raise ValueError(
                f"the leaves of the unknown have shapes {self.shapes}: their first {batch_dims} dims differ"
            )
        self.batch_dims = batch_dims
        self.sizes = [math.prod(s[batch_dims:]) for s in self.shapes]
        self.n = sum(self.sizes)
        self.dtype, self.device = leaves[0].dtype, leaves[0].device
        for other in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, other)
        # the usual case, a single tensor: its shape where nothing else is to be done
        self.single = leaves[0].shape if self.spec.is_leaf() else None
        self.plain = len(leaves) == 1 and self.shapes[0] == (*self.batch, self.n)
        self.initial = self.join(leaves)

    def join(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves laid out as (..., n)."""
        if self.plain:
            return leaves[0]
        flat = [
            leaf.reshape(*self.batch, -1).to(self.dtype)
            if leaf.numel()
            else leaf.reshape(*self.batch, size).to(self.dtype)
            for leaf, size in zip(leaves, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def unpack(self, flat: Tensor) -> Any:
        """(..., n) as the pytree."""
        if self.single is not None:
            return flat if self.plain else flat.reshape(self.single)
        if self.plain:
            return tree_unflatten([flat], self.spec)
        parts = flat.split(self.sizes, -1) if len(self.sizes) > 1 else (flat,)
        return tree_unflatten(
            [p.reshape(s).to(d) for p, s, d in zip(parts, self.shapes, self.dtypes, strict=True)], self.spec
        )

    def pack(self, tree: Any, function: Any, same: bool) -> Tensor:
        """A function's answer as (..., n). ``same``: its leaves must have the unknown's shapes, else only its size."""
        if isinstance(tree, Tensor) and tree.shape == self.single:
            flat = tree if self.plain else tree.reshape(*self.batch, self.n)
            if flat.dtype == self.dtype:
                return flat
        leaves = tree_flatten(tree)[0]
        fits = all(isinstance(leaf, Tensor) for leaf in leaves)
        name = getattr(function, "__name__", type(function).__name__)
        if fits and not all(leaf.is_floating_point() for leaf in leaves):
            raise TypeError(f"{name} returned {[leaf.dtype for leaf in leaves]}, expected real floating-point tensors")
        if fits and [tuple(leaf.shape) for leaf in leaves] == self.shapes:
            return self.join(leaves)
        if fits and not same:
            k = len(self.batch)
            if all(tuple(leaf.shape[:k]) == self.batch for leaf in leaves):
                flat = torch.cat([leaf.reshape(*self.batch, math.prod(leaf.shape[k:])) for leaf in leaves], -1)
                if flat.shape[-1] == self.n:
                    return flat.to(self.dtype)
        want = f"the unknown's shapes {self.shapes}" if same else f"{self.n} numbers for each of batch {self.batch}"
        raise ValueError(f"{name} returned {shapes(leaves)}, expected {want}; return one equation for each unknown")
