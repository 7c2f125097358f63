"""The compiled kernels inside torch.compile: an answer is one operator, its gradient another.

What a job remembers between the two are the tensors that the first operator gives besides the answer. A row that is not
fit for the kernel is answered eagerly; so is a call whose second derivative is wanted.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._opaque import LIBRARY

Parameter = float | Tensor | None

# what a specification "kind word word ..." stands for, by kind
JOBS: dict[str, Callable[..., Any]] = {}  # (eps, k, alpha, *words) -> Job
ANSWERS: dict[str, Callable[..., Tensor]] = {}  # (x, eps, k, alpha, *words) -> the eager answer with derivatives

STATES = 3  # tensors that the first operator gives besides the answer and eps
LIBRARY.define(
    "fused(Tensor x, Tensor?[] tensors, float[] numbers, str spec) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "fused_backward(Tensor x, Tensor g, Tensor y, Tensor[] state, Tensor?[] tensors, float[] numbers, str spec)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def once_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which would import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@once_traced
def plainly_traced() -> bool:
    """Whether the code being traced stands outside of every transform and of forward mode."""
    _register()
    return torch._C._functorch.peek_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0


def node(x: Tensor, parameters: tuple[Parameter, ...], spec: str) -> Tensor:
    """The answer for x (..., n), at (eps, k, alpha): numbers, (..., 1), or None for an eps that the job finds."""
    tensors = [p if isinstance(p, Tensor) else None for p in parameters]
    numbers = [0.0 if p is None or isinstance(p, Tensor) else float(p) for p in parameters]
    if parameters[0] is None:
        numbers[0] = -1.0
    return torch.ops.smoothops.fused.default(x, tensors, numbers, spec)[0]


def _parameters(tensors: list[Tensor | None], numbers: list[float]) -> list[Parameter]:
    both = [number if tensor is None else tensor for tensor, number in zip(tensors, numbers, strict=True)]
    return [None if isinstance(both[0], float) and both[0] < 0 else both[0], *both[1:]]


def _answer(x: Tensor, tensors: list[Tensor | None], numbers: list[float], spec: str) -> Tensor:
    name, *words = spec.split()
    return ANSWERS[name](x, *_parameters(tensors, numbers), *words)


def _job(tensors: list[Tensor | None], numbers: list[float], spec: str) -> Any:
    name, *words = spec.split()
    return JOBS[name](*_parameters(tensors, numbers), *words)


def _layout(job: Any, shape: torch.Size) -> list[tuple[Any, torch.dtype]]:
    """Of the three tensors of state; those that a job has no use for are empty."""
    known = job.layout(shape)
    return known + [((0,), torch.int8)] * (STATES - len(known))


def _fake(x: Tensor, tensors: list[Tensor | None], numbers: list[float], spec: str) -> tuple[Tensor, ...]:
    job = _job(tensors, numbers, spec)
    state = [x.new_empty(shape, dtype=dtype) for shape, dtype in _layout(job, x.shape)]
    eps = x.new_empty(*x.shape[:-1], 1, dtype=torch.float64)
    return torch.empty_like(x, memory_format=torch.contiguous_format), eps, *state


def _forward(x: Tensor, tensors: list[Tensor | None], numbers: list[float], spec: str) -> tuple[Tensor, ...]:
    x = x.contiguous()
    job = _job(tensors, numbers, spec)
    done = job.forward(x)
    if done is None:  # nan says so to the backward pass
        y, eps = _answer(x, tensors, numbers, spec), torch.nan
        state = [x.new_zeros(shape, dtype=dtype) for shape, dtype in _layout(job, x.shape)]
    else:
        (y, state), eps = done, job.strength()
        state = [v for v in state if v is not y]
        state += [x.new_empty(0, dtype=torch.int8) for _ in range(STATES - len(state))]
    return y.contiguous(), torch.as_tensor(eps, dtype=torch.float64).expand(*x.shape[:-1], 1).clone(), *state


def _backward(
    x: Tensor, g: Tensor, y: Tensor, state: list[Tensor], tensors: list[Tensor | None], numbers: list[float], spec: str
) -> Tensor:
    x, g, (eps, *rest) = x.contiguous(), g.contiguous(), state
    if bool(eps.isnan().any()):
        return _elsewhere(lambda: _gradient(x, g, tensors, numbers, spec))
    job = _job([eps, *tensors[1:]], numbers, spec)
    job.resume(x.shape[:-1])
    own = tuple(rest[: len(job.layout(x.shape))])
    return job.backward(x, (*own, y) if job.keeps_answer else own, g)


def _gradient(x: Tensor, g: Tensor, tensors: list[Tensor | None], numbers: list[float], spec: str) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(_answer(x, tensors, numbers, spec), x, g)[0]


def _elsewhere(call: Callable[[], Tensor]) -> Tensor:
    """The result of a call in a thread of its own: inside an operator autograd records nothing."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.tensors, ctx.numbers, ctx.spec = inputs
    ctx.save_for_backward(x, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: Tensor | None, *others: Tensor) -> tuple[Any, ...]:
    if g is None:
        return None, None, None, None
    x, y, *state = ctx.saved_tensors
    parameters = ctx.tensors, ctx.numbers, ctx.spec
    return torch.ops.smoothops.fused_backward.default(x, g, y, state, *parameters), None, None, None


def _remember_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, g, _, _, *ctx.parameters = inputs
    ctx.save_for_backward(x, g)


def _differentiate_again(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    x, g = ctx.saved_tensors
    with torch.enable_grad():
        x, g = x.view_as(x), g.view_as(g)  # g may depend on x: that is not of this operator
        (v,) = torch.autograd.grad(_answer(x, *ctx.parameters), x, g, create_graph=True)
        wanted = [t for t in (x, g) if t.requires_grad]
        found = iter(torch.autograd.grad(v, wanted, u, create_graph=True, allow_unused=True))
    of_state = [None] * (STATES + 1)  # a list is asked for where a list came
    return *(next(found) if t.requires_grad else None for t in (x, g)), None, of_state, None, None, None


@functools.cache
def _register() -> None:
    """The operators' kernels, at first use: this imports what is imported anyway by who compiles."""
    for name, kernel, fake, remember, differentiate in (
        ("fused", _forward, _fake, _remember, _differentiate),
        ("fused_backward", _backward, lambda x, *rest: torch.empty_like(x), _remember_again, _differentiate_again),
    ):
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"smoothops::{name}", fake, lib=LIBRARY)
        torch.library.register_autograd(f"smoothops::{name}", differentiate, setup_context=remember, lib=LIBRARY)
