"""The eager fast path: an answer computed by one compiled pass over the rows, its gradient by another.

A backward pass under grad mode (a second derivative is wanted), or one over a batch of gradients, goes through the
plain path instead, and so has derivatives of every order; compiled code, torch.func and forward mode never come here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kernels
from .._axes import Rows, concrete
from .._regularizer import Mixing, Regularizer

Parameter = float | Tensor | None  # a number, or (..., 1)


class Job(Protocol):
    """One call on rows x (rows, n) of a compiled kernel."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The answer and what its gradient needs; None where a row is not fit for the kernel."""

    def fit(self, x: Tensor) -> Tensor:
        """Which rows (...) are fit for the kernel."""

    def strength(self) -> float | Tensor:
        """eps of the call that was done, a number or (..., 1)."""

    def backward(self, x: Tensor, state: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """The gradient in x, for the gradient g in the answer."""


def eager(x: Tensor) -> bool:
    """Whether a compiled pass may be used: eager, on the CPU, outside of every transform and of forward mode."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0


class _Fused(torch.autograd.Function):
    """The answer of a job that has been done already, with the gradient that the job knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, state: tuple[Tensor, ...], job: Job, plain: Any) -> Tensor:
        ctx.save_for_backward(x, *state)
        ctx.job, ctx.plain = job, plain
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *state), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            (grad,) = torch.autograd.grad(ctx.plain(x), x, g, create_graph=True)
        elif _wrapped(g):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(ctx.plain(x), x, g)
        else:
            grad = ctx.job.backward(x, tuple(state), g.contiguous())
        return grad, None, None, None, None


def _wrapped(v: Tensor) -> bool:
    """Whether v is a batch in disguise, of torch.func.vmap or of the older one of is_grads_batched."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(v) or functorch.is_legacy_batchedtensor(v)


def run(x: Tensor, job: Callable[..., Job], parameters: tuple[Parameter, ...], plain: Callable[..., Tensor]) -> Tensor:
    """The answer for x (..., n) with derivatives: ``job(*parameters)`` on rows that are fit for it, else ``plain``.

    ``plain(x, *parameters)`` is the same answer in plain torch; the first parameter is the strength, or None where the
    job finds it.
    """
    work = job(*parameters)
    done = work.forward(x.detach())
    if done is None:
        return _apart(x, work.fit(x.detach()), lambda v, *p: run(v, job, p, plain), plain, parameters)
    y, state = done
    if not (x.requires_grad and torch.is_grad_enabled()):
        return y
    return _Fused.apply(x, y, state, work, lambda v: plain(v, work.strength(), *parameters[1:]))


def _apart(
    x: Tensor, fit: Tensor, fast: Callable[..., Tensor], plain: Callable[..., Tensor], parameters: tuple[Parameter, ...]
) -> Tensor:
    """Each row by the path that is fit for it, so that no row depends on what another one holds."""
    batch, n = x.shape[:-1], x.shape[-1]
    rows, fit, y = x.reshape(-1, n), fit.reshape(-1), x.new_zeros(batch.numel(), n)
    for way, chosen in ((fast, fit), (plain, ~fit)):
        index = chosen.nonzero().squeeze(-1)
        if index.numel():
            own = (p.expand(*batch, 1).reshape(-1, 1)[index] if isinstance(p, Tensor) else p for p in parameters)
            y = y.index_copy(0, index, way(rows[index], *own).to(y.dtype))
    return y.reshape(x.shape)


def _applies(rows: Rows, *parameters: object) -> bool:
    free = not any(isinstance(p, Tensor) and p.requires_grad for p in parameters)
    return free and rows.input.numel() > 0 and eager(rows.input)


def _narrow(rows: Rows) -> Tensor:
    """The rows in a dtype that the kernels take."""
    x = rows.given
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _parameter(rows: Rows, value: Any, name: str) -> float | Tensor:
    return rows.parameter(value, name) if isinstance(value, Tensor) else float(value)


def order(
    name: str,
    rows: Rows,
    ranks: bool,
    descending: bool,
    reg: Regularizer,
    plain: Callable[[Tensor, Regularizer], Tensor],
) -> Tensor | None:  # fmt: skip
    """Ranks or sorted values of rows without a mask, or None where the compiled kernels ``name`` do not apply."""
    module = kernels.compiled_order(name) if rows.present is None and _applies(rows, reg.eps) else None
    if module is None:
        return None
    inputs = reg.eps.inputs if isinstance(reg.eps, Mixing) else None
    eps = None if isinstance(reg.eps, Mixing) else _parameter(rows, reg.eps, "eps")
    job = partial(module.OrderJob, ranks, descending, reg.pool_rule, inputs)
    return run(_narrow(rows), job, (eps,), lambda x, e: plain(x, reg if e is None else reg.at(e, reg.shape)))


def choice(
    rows: Rows,
    reg: Regularizer,
    k: Any,
    several: bool,
    plain: Callable[[Rows, Regularizer, Any], Tensor],
    strength: Callable[[], Tensor],
) -> Tensor | None:
    """Weights of k items of each row, or None where the compiled kernels do not apply; ``strength`` finds eps."""
    family = type(reg)
    if not _applies(rows, reg.eps, k, reg.shape):
        return None
    module = kernels.compiled_choice(family)
    if module is None:
        return None
    x = _narrow(rows)
    if rows.present is not None:
        x = x.masked_fill(~rows.present, -torch.inf)
    k, shape = (_parameter(rows, v, name) for v, name in ((k, "k"), (reg.shape, "alpha")))
    eps = float(reg.eps) if isinstance(reg.eps, (int, float)) else strength()
    wide = shape if isinstance(shape, Tensor) else torch.tensor(shape, dtype=torch.float64)
    cap = family.cap(wide) if several and not family.bounded else torch.inf
    job = partial(module.ChoiceJob, family.__name__, several, family.log_residual)
    return run(x, job, (eps, k, shape, cap), lambda x, e, k, a, _: plain(Rows(x), reg.at(e, a), k))


def softmax(rows: Rows, reg: Regularizer, plain: Callable[[Rows, Regularizer, Any], Tensor]) -> Tensor | None:
    """The Entropy weights of one item by torch's softmax, of rows whose maximum is finite; None where not eager."""
    if isinstance(reg.eps, Mixing) or not concrete(rows.input) or not rows.input.numel():
        return None
    x = rows.given.to(rows.wide)
    if rows.present is not None:
        x = x.masked_fill(~rows.present, -torch.inf)
    eps = _parameter(rows, reg.eps, "eps")
    fit = x.detach().amax(-1).isfinite()
    if isinstance(eps, Tensor) and (eps.requires_grad or not eager(eps)):  # the derivative in eps: 0 times inf
        fit = x.detach().isfinite().all(-1)

    def fast(x: Tensor, eps: Any) -> Tensor:
        return torch.softmax((x - x.detach().amax(-1, keepdim=True)) / eps, -1)

    if bool(fit.all()):
        return fast(x, eps)
    return _apart(x, fit, fast, lambda x, e: plain(Rows(x), reg.at(e, reg.shape), 1), (eps,))
