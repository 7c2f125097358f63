"""The eager fast path of a threshold answer: one compiled pass forward, one backward.

The derivative is the Jacobian product of ``_dual``, u = d (v - <d, v>/S). A backward pass under grad mode (a second
derivative is wanted) goes through the plain value path instead, and so has derivatives of every order; compiled code,
torch.func and forward mode never come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .._axes import row_sum
from .._regularizer import Regularizer
from ..kernels.torch import SLOPE_FLOOR


def fusible(family: type[Regularizer], *tensors: Tensor) -> bool:
    """Whether the compiled pass may be used: eager, on the CPU, outside of every transform and of forward mode."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float64 for t in tensors)
    return on_cpu and kernels.compiled_threshold(family) is not None


class FusedThreshold(torch.autograd.Function):
    """phi(u - tau) with sum k, u (..., n) and k (..., 1); ``dual`` holds tau and gives the same in plain torch."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, dual: Any) -> Tensor:
        ctx.save_for_backward(u, k)
        ctx.dual = dual
        kernel = kernels.compiled_threshold(dual.family)
        return kernel.answer(u, dual.tau, dual.shape, dual.cap(), dual.family.__name__)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (u, k), (g,), dual = ctx.saved_tensors, gradients, ctx.dual
        if torch.is_grad_enabled():
            wanted = [t for t, need in zip((u, k), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(dual.answer(u, k), wanted, g, create_graph=True))
            grad_u, grad_k = (next(found) if need else None for need in ctx.needs_input_grad[:2])
        elif _wrapped(g):  # a batched gradient
            d = dual.dphi(u - dual.tau)
            total = row_sum(d)
            usable = total > SLOPE_FLOOR
            grad_k = torch.where(usable, row_sum(d * g) / torch.where(usable, total, 1), 0)
            grad_u = torch.where(usable, d * (g - grad_k), 0)
        else:
            kernel = kernels.compiled_threshold(dual.family)
            grad_u, grad_k = kernel.product(u, dual.tau, dual.shape, dual.cap(), dual.family.__name__, g)
        return grad_u, grad_k, None


def _wrapped(v: Tensor) -> bool:
    """Whether v is a batch in disguise, of torch.func.vmap or of the older one of is_grads_batched."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(v) or functorch.is_legacy_batchedtensor(v)
