"""Who plays a chain: a plain loop, the reversal with few kept states, or torch's own checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as taped_later

from ._chain import Chain
from ._guard import forward_mode
from ._reversal import reversible
from .checkpoint import Again, Checkpoint


def run(chain: Chain, state: Any, steps: int, checkpoint: Checkpoint | None) -> tuple[Any, list[Any]]:
    """The final state and what each step put out."""
    outs: list[Any] = []
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint must be None, so.Sqrt() or so.Binomial(slots), got {checkpoint!r}")
    if checkpoint is not None and steps:
        if torch.compiler.is_compiling():
            if not chain.guards:  # which torch.compile does not trace inside of a checkpoint
                return _nested(chain, state, 0, steps, checkpoint, outs), outs
        else:
            levels = torch._C._functorch.get_interpreter_stack() or []
            if any(level.key() == torch._C._functorch.TransformType.Grad for level in levels):
                raise ValueError(
                    "checkpoint= works with backward() and torch.autograd.grad, not inside torch.func.grad, vjp, "
                    "jacrev or hessian, which keep their own tape; pass checkpoint=None there"
                )
            # a state of vmap or of forward mode is gone when backward would start from it again
            if not levels and not forward_mode():
                return reversible(chain, state, steps, checkpoint)
    return chain.play(state, 0, steps, outs)[0], outs


def _nested(chain: Chain, state: Any, start: int, stop: int, checkpoint: Checkpoint, outs: list[Any]) -> Any:
    """The same schedule with torch's own checkpoints, which can be compiled."""
    parts = checkpoint.parts(start, stop)
    for number, (a, b, inner) in enumerate(parts):
        if number == len(parts) - 1 and inner is None:
            return chain.play(state, a, b, outs)[0]

        def stretch(state: Any, a: int = a, b: int = b, inner: Any = inner) -> tuple[Any, list[Any]]:
            found: list[Any] = []
            if isinstance(inner, Again) and b - a > 1:
                # the steps but the last, kept as one stretch in the same way
                state, made = taped_later(stretch, state, a, b - 1, inner, use_reentrant=False)
                found += made
                return chain.play(state, b - 1, b, found)[0], found
            if inner is None or b - a == 1:
                return chain.play(state, a, b, found)[0], found
            return _nested(chain, state, a, b, inner, found), found

        state, made = taped_later(stretch, state, use_reentrant=False)
        outs += made
    return state
