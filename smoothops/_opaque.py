"""Functions that solve for a discrete structure, as operators that torch.compile and vmap carry as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("smoothops", "DEF")


def opaque(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator that torch.compile and vmap carry as one node, without derivative.

    Not torch.library.custom_op, whose first call imports the compiler (a second).
    All tensor arguments must have the same number of dims and broadcast; ``fake`` gives the outputs' shapes.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = signature.split("(")[0]
        LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.smoothops, name).default
        torch.library.register_fake(f"smoothops::{name}", fake, lib=LIBRARY)
        outputs = signature.count("Tensor") - signature.split("->")[0].count("Tensor")
        torch.library.register_vmap(f"smoothops::{name}", _vmap_rule(operator, outputs), lib=LIBRARY)
        return operator

    return register


def _vmap_rule(operator: Any, outputs: int) -> Callable[..., Any]:
    """The vmap rule of an operator whose tensors all have the same number of dims and broadcast."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        moved = [
            a if not isinstance(a, Tensor) else a.unsqueeze(0) if d is None else a.movedim(d, 0)
            for a, d in zip(args, in_dims, strict=True)
        ]
        return operator(*moved), 0 if outputs == 1 else (0,) * outputs

    return rule


def batch_shape(*args: Any) -> torch.Size:
    """The batch dims of the tensors among ``args``, broadcast."""
    # not torch.broadcast_shapes, whose first call imports sympy
    heads = (t[..., :1] if t.shape[-1] else t.new_empty(*t.shape[:-1], 1) for t in args if isinstance(t, Tensor))
    return torch.broadcast_tensors(*heads)[0].shape[:-1]


def one_a_row(*args: Any) -> Tensor:
    return args[0].new_empty(*batch_shape(*args), 1)


def as_rows(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n) or (..., 1) as (rows, n) or (rows, 1) with their batch dims broadcast."""
    batch = batch_shape(*tensors)
    return batch, [t.expand(*batch, t.shape[-1]).reshape(batch.numel(), t.shape[-1]) for t in tensors]
