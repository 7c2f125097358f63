"""Branches: all are run, their results are mixed by soft weights, and what has weight 0 leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._axes import concrete
from ._guard import Zeros, guarded
from ._trees import (
    add,
    check_range,
    check_same,
    describe,
    flatten,
    lead,
    mix,
    number,
    result_dtype,
    unflatten,
    weight,
)


def check_callable(fn: object, name: str) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be a function, got {type(fn).__name__}")


def name_of(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def cond(
    p: Tensor | float, true_fn: Callable[..., Any], false_fn: Callable[..., Any], *args: Any, prune: bool = False
) -> Any:
    """p true_fn(*args) + (1 - p) false_fn(*args): the ordinary ``if`` where p is 0 or 1.

    A branch of weight exactly 0 leaves no trace in value or gradient, whatever inf or nan it makes of its arguments,
    of tensors that it closes over, or of module parameters. Without soft weights both branches still run.

    Args:
        p: values in [0, 1], or bool; its dims stand for the leading dims of every result (sizes 1 broadcast).
        true_fn, false_fn: return the same pytree of tensors of equal shapes and dtypes; numbers go with any.
        *args: handed to both.
        prune: leave a branch out if its weight is 0 for the whole batch; a look at p, on the CPU and eager only.

    Returns: the pytree; integers become the default dtype. Raises: ValueError, TypeError for what does not fit.
    Complexity: both branches. Source: Petersen et al. 2021, "Learning with algorithmic supervision".

    Example:
        >>> so.cond(torch.tensor([0.0, 0.25]), torch.sqrt, lambda x: 2 * x, torch.tensor([-1.0, 4.0]))
        tensor([-2.0000,  6.5000])
    """
    p = weight(p, "p")
    check_range(p, "p")
    check_callable(true_fn, "true_fn")
    check_callable(false_fn, "false_fn")
    absent = [p == 0, p == 1]
    if prune and concrete(p):
        for fn, gone in ((false_fn, absent[0]), (true_fn, absent[1])):
            if bool(gone.all()):
                columns, spec = common([fn(*args)], [name_of(fn)], p)
                return unflatten([add(None, torch.ones_like(p), x, "p").to(result_dtype(x)) for (x,) in columns], spec)
    results = []
    for fn, gone in zip((true_fn, false_fn), absent, strict=True):
        with guarded(gone):
            results.append(fn(*args))
    columns, spec = common(results, ["true_fn", "false_fn"], p)
    return unflatten([mix(lead(p, x, "p"), x, y) for x, y in columns], spec)


def switch(weights: Tensor, branches: Sequence[Callable[..., Any]], *args: Any, prune: bool = False) -> Any:
    """``sum_k weights_k branches[k](*args)``: the ordinary choice of a branch where the weights are 0 and 1.

    Args:
        weights: (..., len(branches)), nonnegative, summing to 1 along the last dim, as argmax and bucketize give them;
            their other dims stand for the leading dims of every result.
        branches: functions that return the same pytree, as for ``cond``.
        *args: handed to each.
        prune: leave out the branches that have weight 0 in the whole batch, as for ``cond``.

    Returns: the pytree; a branch of weight 0 leaves no trace in value or gradient, as in ``cond``.
    Raises: ValueError, TypeError for weights that are no distribution, and for results that differ in form.
    Complexity: all branches.

    Example:
        >>> w = so.argmax(torch.tensor([2.0, 0.0, 1.0]), smoothing=so.Quadratic(2.0))
        >>> so.switch(w, [torch.exp, torch.log, torch.neg], torch.tensor(0.0))
        tensor(0.7500)
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"weights must be a floating-point tensor (..., {len(branches)}), got {found}; for an integer index use "
            "torch.nn.functional.one_hot(index, n).float()"
        )
    if not branches or weights.ndim == 0 or weights.shape[-1] != len(branches):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} do not fit {len(branches)} branches along their last dim"
        )
    for k, fn in enumerate(branches):
        check_callable(fn, f"branches[{k}]")
    check_distribution(weights)
    columns = weights.unbind(-1)
    taken = list(range(len(branches)))
    if prune and concrete(weights):
        used = (weights != 0).reshape(-1, len(branches)).any(0).tolist()
        taken = [k for k in taken if used[k]] or taken[:1]
    results, zeros = [], [Zeros(columns[k] == 0) for k in taken]
    for k, gone in zip(taken, zeros, strict=True):
        with guarded(gone):
            results.append(branches[k](*args))
    leaves, spec = common(results, [f"branches[{k}]" for k in taken], weights)
    totals = []
    for column in leaves:
        total = None
        for k, leaf, gone in zip(taken, column, zeros, strict=True):
            total = add(total, columns[k], leaf, "weights[..., k]", zeros=gone)
        assert total is not None
        totals.append(total.to(result_dtype(column[0])))
    return unflatten(totals, spec)


def check_distribution(weights: Tensor) -> None:
    if not concrete(weights) or not weights.numel():
        return
    w = weights.detach()
    off, low = (w.sum(-1) - 1).abs().max().item(), w.min().item()
    if low < 0 or off > torch.finfo(w.dtype).eps ** 0.5:
        raise ValueError(
            f"weights must be nonnegative and sum to 1 along their last dim: the least is {low:.4g}, a sum is off by "
            f"{off:.2g}; pass so.argmax(logits, -1), so.bucketize(x, edges) or logits.softmax(-1)"
        )


def common(trees: Sequence[Any], names: Sequence[str], like: Tensor) -> tuple[list[list[Tensor]], Any]:
    """The leaves of the results, column by column; numbers and 0-d tensors in the form of what they stand beside."""
    for tree, name in zip(trees[1:], names[1:], strict=True):
        check_same(tree, trees[0], name, f"{names[0]} returned", numbers=True)
    spec = flatten(trees[0])[1]
    rows = [flatten(tree)[0] for tree in trees]
    return [alike(column, names, like) for column in zip(*rows, strict=True)], spec


def alike(column: Sequence[Any], names: Sequence[str], like: Tensor) -> list[Tensor]:
    tensors = [leaf for leaf in column if isinstance(leaf, Tensor)]
    if not tensors and not number(column[0]):
        raise TypeError(f"{names[0]} returned {describe(column[0])}; results must consist of tensors and numbers")
    dtype, device = (result_dtype(tensors[0]), tensors[0].device) if tensors else (like.dtype, like.device)
    leaves = [x if isinstance(x, Tensor) else torch.full((), float(x), dtype=dtype, device=device) for x in column]
    shape = next((leaf.shape for leaf in leaves if leaf.ndim), leaves[0].shape)
    for leaf, name in zip(leaves, names, strict=True):
        if leaf.ndim and leaf.shape != shape:
            raise ValueError(
                f"{name} returned shape {tuple(leaf.shape)}, another branch {tuple(shape)}; they must agree"
            )
    return [leaf if leaf.shape == shape else leaf.expand(shape) for leaf in leaves]
