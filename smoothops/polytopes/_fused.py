"""The eager fast path: an answer computed by one compiled pass over the rows, its gradient by another.

A backward pass under grad mode (a second derivative is wanted), or one over a batch of gradients, goes through the
plain path instead, and so has derivatives of every order; torch.func and forward mode never come here. In torch.compile
the same passes are two operators of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kernels
from .._axes import Rows, concrete, row_sum
from .._regularizer import FAMILIES, Mixing, Regularizer
from . import _traced

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

    keeps_answer: bool  # whether the answer is the last tensor of the state

    def layout(self, shape: torch.Size) -> list[tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the state but for the answer."""

    def resume(self, batch: torch.Size) -> None:
        """Prepares another job of the same parameters for ``backward``."""


def eager(x: Tensor) -> bool:
    """Whether a compiled pass may be used: on the CPU, outside of every transform and of forward mode."""
    if x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        return _traced.plainly_traced()
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
        elif torch._C._functorch.is_functorch_wrapped_tensor(g):
            (grad,) = torch.func.vjp(ctx.plain, x.detach())[1](g)
        elif torch._C._functorch.is_legacy_batchedtensor(g):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(ctx.plain(x), x, g)
        else:
            grad = ctx.job.backward(x, tuple(state), g.contiguous())
        return grad, None, None, None, None


def attach(x: Tensor, y: Tensor, state: tuple[Tensor, ...], job: Any, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """``y`` with the gradient in x that the job knows, and the other derivatives of ``plain``."""
    if torch._C._len_torch_function_stack() and _recorded():
        x = x.view_as(x)  # no mode sees the Function, but a recording one must see that x is used
    return _Fused.apply(x, y, state, job, plain)


def _recorded() -> bool:
    """Whether a mode puts other tensors in place of some, or notes which to replace later: see control._replay."""
    number = torch._C._len_torch_function_stack()
    return any(getattr(torch._C._get_function_stack_at(i), "replaces", False) for i in range(number))


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
    return attach(x, y, state, work, lambda v: plain(v, work.strength(), *parameters[1:]))


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
    if rows.present is not None or not _applies(rows, reg.eps) or not _has_order(name):
        return None
    inputs = reg.eps.inputs if isinstance(reg.eps, Mixing) else None
    eps = None if isinstance(reg.eps, Mixing) else _parameter(rows, reg.eps, "eps")
    if torch.compiler.is_compiling():
        spec = f"order {name} {int(ranks)} {int(descending)} {type(reg).__name__} {inputs or 0.0}"
        return _traced.node(_narrow(rows), (eps, 0.0, 0.0), spec)
    job = partial(kernels.compiled_order(name).OrderJob, ranks, descending, reg.pool_rule, inputs)
    return run(_narrow(rows), job, (eps,), lambda x, e: plain(x, reg if e is None else reg.at(e, reg.shape)))


@_traced.once_traced
def _has_order(name: str) -> bool:
    return kernels.compiled_order(name) is not None


@_traced.once_traced
def _has_choice(family: type[Regularizer]) -> bool:
    return kernels.compiled_choice(family) is not None


def _order_job(
    eps: Parameter, k: Parameter, alpha: Parameter, name: str, ranks: str, descending: str, family: str, inputs: str
) -> Job:
    flags = ranks == "1", descending == "1", FAMILIES[family].pool_rule, float(inputs) or None
    job: Job = kernels.compiled_order(name).OrderJob(*flags, eps)
    return job


def _choice_job(eps: Parameter, k: Parameter, alpha: Parameter, family: str, several: str) -> Job:
    reg = FAMILIES[family]
    return _choice(reg, several == "1")(eps, k, alpha, _cap(reg, alpha, several == "1"))


def _choice(family: type[Regularizer], several: bool) -> Callable[..., Job]:
    job: Callable[..., Job] = kernels.compiled_choice(family).ChoiceJob
    return partial(job, family.__name__, several, family.log_residual)


def _cap(family: type[Regularizer], shape: Parameter, several: bool) -> float | Tensor:
    """Where the bound of 1 takes hold."""
    if not several or family.bounded:
        return torch.inf
    return family.cap(shape if isinstance(shape, Tensor) else torch.tensor(shape, dtype=torch.float64))


_traced.JOBS |= {"order": _order_job, "choice": _choice_job}


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
    if not _applies(rows, reg.eps, k, reg.shape) or not _has_choice(family):
        return None
    x = _lowered(rows, _narrow(rows))
    k, shape = (_parameter(rows, v, name) for v, name in ((k, "k"), (reg.shape, "alpha")))
    eps = float(reg.eps) if isinstance(reg.eps, (int, float)) else strength()
    if torch.compiler.is_compiling():
        return _traced.node(x, (eps, k, shape), f"choice {family.__name__} {int(several)}")
    parameters = eps, k, shape, _cap(family, shape, several)
    return run(x, _choice(family, several), parameters, lambda x, e, k, a, _: plain(Rows(x), reg.at(e, a), k))


def softmax(rows: Rows, reg: Regularizer, plain: Callable[[Rows, Regularizer, Any], Tensor]) -> Tensor | None:
    """The Entropy weights of one item by torch's softmax; None where that gives no derivatives in eps."""
    if isinstance(reg.eps, Mixing) or not rows.input.numel():
        return None
    if torch.compiler.is_compiling():
        return None if isinstance(reg.eps, Tensor) else rows.poisoned(_softmax(_lowered(rows, rows.x), float(reg.eps)))
    if not concrete(rows.input):
        return None
    x, eps, fit = _exponents(rows, reg)

    def fast(x: Tensor, eps: Any) -> Tensor:
        return torch.softmax((x - x.detach().amax(-1, keepdim=True)) / eps, -1)

    if bool(fit.all()):
        return fast(x, eps)
    return _apart(x, fit, fast, lambda x, e: plain(Rows(x), reg.at(e, reg.shape), 1), (eps,))


def _exponents(rows: Rows, reg: Regularizer) -> tuple[Tensor, float | Tensor, Tensor]:
    """x with -inf for absent items, eps, and the rows in which e^(x/eps) gives all derivatives."""
    x = _lowered(rows, rows.given.to(rows.wide))
    eps = _parameter(rows, reg.eps, "eps")
    if isinstance(eps, Tensor) and (eps.requires_grad or not eager(eps)):  # the derivative in eps: 0 times inf
        return x, eps, x.detach().isfinite().all(-1)
    return x, eps, x.detach().amax(-1).isfinite()


def log_sum_exp(rows: Rows, reg: Regularizer, plain: Callable[[], Tensor]) -> Tensor:
    """eps log sum e^(x/eps) of each row, ``plain()`` where the maximum is not finite or rows cannot be looked at."""
    if isinstance(reg.eps, Mixing) or not rows.input.numel() or not concrete(rows.input):
        return plain()
    x, eps, fit = _exponents(rows, reg)
    fit = fit.unsqueeze(-1)
    x = x if bool(fit.all()) else torch.where(fit, x, 0)
    top = x.detach().amax(-1, keepdim=True)
    value = top + eps * row_sum(((x - top) / eps).exp()).log()
    return value if bool(fit.all()) else torch.where(fit, value, plain())


def _lowered(rows: Rows, x: Tensor) -> Tensor:
    return x if rows.present is None else x.masked_fill(~rows.present, -torch.inf)


def _softmax(x: Tensor, eps: float) -> Tensor:
    """softmax(x/eps) of rows without nan, without looking at them: +inf takes all, -inf everywhere gives 0."""
    top = x.detach().amax(-1, keepdim=True)
    z = torch.where(top.isfinite(), (x - top) / eps, torch.where(x == torch.inf, 0, -torch.inf))
    empty = top == -torch.inf
    return torch.where(empty, 0, torch.softmax(torch.where(empty, 0, z), -1))
