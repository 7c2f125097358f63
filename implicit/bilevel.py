"""Bilevel problems: the gradient of an outer objective through the solution of an inner problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._closure import eager
from .adjoint import attach
from .linear import Auto, LinearSolver


def hypergradient(
    outer: Callable[..., Tensor],
    inner_residual: Callable[..., Any],
    z: Any,
    *args: Any,
    linear: LinearSolver = Auto(),
    batch_dims: int = 0,
    check: bool = True,
) -> Any:
    """d/dargs outer(z(args), *args), where z solves inner_residual(z, *args) = 0, as numbers.

    Args:
        outer: the objective, one number, of the solution and the same arguments.
        inner_residual: the condition, for instance ``conditions.stationary(inner_objective)``.
        z: a solution for these arguments, computed by anything.
        linear, batch_dims, check: as for ``attach``. For higher orders, differentiate outer(attach(...), ...).

    Returns: a gradient shaped like each argument (alone if there is one): zeros where it has no influence, None for
        what is not a floating-point tensor.
    Complexity: one linear solve with the inner Hessian. Source: Bengio 2000; Pedregosa 2016.

    Example:
        >>> l = torch.tensor(1.0)
        >>> inner = implicit.conditions.stationary(lambda w, l: (w - 2).square() + l * w.square())
        >>> implicit.hypergradient(lambda w, l: (w - 1.5).square(), inner, torch.tensor(1.0), l)
        tensor(0.5000)
    """
    if not args:
        raise ValueError("there is nothing to differentiate: pass the hyperparameters after z")
    leaves, spec = tree_flatten(args)
    places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    if not places:
        raise TypeError("no argument is a floating-point tensor, so there is nothing to differentiate")

    def value(*tensors: Tensor) -> Tensor:
        filled = list(leaves)
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t
        inner = tree_unflatten(filled, spec)
        solution = attach(z, inner_residual, *inner, linear=linear, batch_dims=batch_dims, check=check)
        out = outer(solution, *inner)
        if not isinstance(out, Tensor) or out.numel() != 1:
            raise ValueError(f"outer must return one number, got {getattr(out, 'shape', type(out).__name__)}")
        return out.reshape(())

    given = [leaves[i].detach() for i in places]
    if eager():
        with torch.enable_grad():
            tensors = [t.requires_grad_() for t in given]
            gradients = torch.autograd.grad(value(*tensors), tensors, materialize_grads=True)
    else:
        gradients = torch.func.grad(value, argnums=tuple(range(len(given))))(*given)
    filled: list[Any] = [None] * len(leaves)
    for i, g in zip(places, gradients, strict=True):
        filled[i] = g
    out = tree_unflatten(filled, spec)
    return out[0] if len(args) == 1 else out
