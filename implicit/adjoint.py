"""The implicit function theorem, once for the whole package.

With F(z, theta) = 0 at a solution z(theta), and J = dF/dz there,

    J dz + (dF/dtheta) dtheta = 0,   so   z' = -J^-1 F_theta theta',   theta-bar = -F_theta' r  with  J' r = z-bar.

Plain autograd (reverse mode): the solution is a Function of every tensor that F reads. Its backward solves for r and
pulls r back through one stored evaluation of F. Where derivatives of that are wanted, F is evaluated at the solution
itself, whose derivatives are known, and r is once more the solution of an equation, J' r - z-bar = 0: the rule applied
to itself gives every order.

Forward mode, torch.func and torch.compile see the steps z <- z - J^-1 F(z, theta) from the solution as a constant, with
J a constant too: each step corrects one more order of the Taylor series in theta, so k steps have exact derivatives up
to order k, in any mix of modes, by plain torch operations alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._closure import Graph, System, dual, eager, raw, transforms
from ._jacobian import Adjoint, Jacobian, distance, inverse, jacobian
from ._pytree import Unknown
from .linear import Auto, ConvergenceError, LinearOperator, LinearSolver
from .operator import apply_matrix, norm, unwrapped

# derivatives by plain autograd on top of torch.func or forward mode are exact up to this order; so are compiled ones
OUTER_ORDER = 3


def check_count(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


# --- reverse mode: one Function, applied to itself --------------------------------------------------------------------


class Attached(torch.autograd.Function):
    """z as a function of theta, where ``evaluate(z, *theta)`` is F and ``graph`` one evaluation of it."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, evaluate: Callable, graph: Callable[[], Graph], op: Any, adjoint: Adjoint, *theta: Tensor
    ) -> Tensor:
        ctx.evaluate, ctx.graph, ctx.op, ctx.adjoint = evaluate, graph, op, adjoint
        z = z.clone()
        ctx.save_for_backward(z, *theta)
        return z

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[5:]) if need]
        out: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        r = ctx.adjoint.solve(ctx.op, v, transposed=True)
        if torch.is_grad_enabled():
            z, *theta = ctx.saved_tensors
            grads = pull_back(ctx, z, theta, v, r, needed)
        else:
            graph = ctx.graph()
            inputs = [graph.inputs[i] for i in needed]
            grads = torch.autograd.grad(graph.r, inputs, -r, retain_graph=True, allow_unused=True)
        for i, g in zip(needed, grads, strict=True):
            out[i] = g
        return None, None, None, None, None, *out


def pull_back(ctx: Any, z: Tensor, theta: list[Tensor], v: Tensor, r: Tensor, needed: list[int]) -> tuple:
    """-F_theta' r with its own derivatives: z and r are solutions too."""
    evaluate = ctx.evaluate

    def balance(r: Tensor, z: Tensor, v: Tensor, *theta: Tensor) -> Tensor:
        """J(z, theta)' r - v"""
        z = z.view_as(z)
        (pulled,) = torch.autograd.grad(evaluate(z, *theta), z, r, create_graph=True, materialize_grads=True)
        return pulled - v

    r = attach_known(r, balance, [z, v, *theta], ctx.op.T, ctx.adjoint)
    # views: derivatives in them are partial, although z depends on theta
    views = [t.view_as(t) for t in theta]
    value = evaluate(z.view_as(z), *views)
    return torch.autograd.grad(value, [views[i] for i in needed], -r, create_graph=True, allow_unused=True)


def attach_known(z: Tensor, evaluate: Callable, theta: list[Tensor], op: LinearOperator, adjoint: Adjoint) -> Tensor:
    """Numbers z with F(z, *theta) = evaluate(z, *theta) = 0 and a known Jacobian, as a function of theta."""
    if not eager():
        return correct(z, lambda z: evaluate(z, *theta), adjoint, op)

    made: list[Graph] = []

    def graph() -> Graph:  # made when a backward first asks for it
        if not made:
            with torch.enable_grad():
                copies = [t.detach().requires_grad_(t.requires_grad) for t in theta]
                zc = z.detach().requires_grad_()
                made.append(Graph(evaluate(zc, *copies), zc, copies, theta))
        return made[0]

    return Attached.apply(z, evaluate, graph, op, adjoint, *theta)


# --- forward mode, torch.func and torch.compile: plain operations -----------------------------------------------------


def correct(z: Tensor, f: Callable[[Tensor], Tensor], adjoint: Adjoint, op: LinearOperator | None = None) -> Tensor:
    """The value z with derivatives: chord steps z <- z - J^-1 F(z), one for each order."""
    z = z.detach()
    r = f(z)
    if torch.compiler.is_compiling():
        order = OUTER_ORDER
    else:
        order = sum(level.key().name in ("Grad", "Jvp") for level in transforms()) + dual()
        order += OUTER_ORDER if unwrapped(r).requires_grad else 0
    if order == 0:
        return z
    J = jacobian(f, z) if op is None else op.dense()
    inv = inverse(adjoint.linear, J.detach())
    moved = z
    for k in range(order):
        r = f(moved) if k else r
        moved = moved - apply_matrix(inv, r)
    return z + (moved - moved.detach())


# --- how a computed solution gets its derivatives ---------------------------------------------------------------------


class Gradient(ABC):
    """How the answer of a solver is differentiated: exactly by default, approximately only by name."""

    @abstractmethod
    def attach(self, z: Tensor, system: System, adjoint: Adjoint) -> Tensor:
        """Numbers z: (..., n), the solution of ``system``, with derivatives."""


class Steps(Gradient):
    """Differentiate some steps of the map from the solution, a constant."""

    @abstractmethod
    def weights(self) -> list[float]:
        """The damping of each step z <- z + weight * (f(z) - z)."""

    def attach(self, z: Tensor, system: System, adjoint: Adjoint) -> Tensor:
        if not system.fixed_point:
            raise ValueError(f"{self!r} repeats the map of a fixed point: use fixed_point, or grad=Implicit()")
        y = z.detach()
        for weight in self.weights():
            y = y - weight * system.again(y)
        return z.detach() + (y - y.detach())


@dataclass(frozen=True, eq=False)
class Implicit(Gradient):
    """The exact derivative, by the implicit function theorem: z' = -J^-1 F_theta theta'.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z = implicit.fixed_point(lambda z, a: a * z + 1, torch.zeros(()), a, grad=implicit.Implicit())
        >>> torch.autograd.grad(z, a)
        (tensor(4.0000),)
    """

    def attach(self, z: Tensor, system: System, adjoint: Adjoint) -> Tensor:
        return attach_system(z, system, adjoint)


@dataclass(frozen=True, eq=False)
class OneStep(Steps):
    """Differentiate one step z <- f(z) from the solution: J^-1 is replaced by I. Only for fixed points.

    The error is of the order of the contraction factor. Source: Fung et al. 2022, "JFB: Jacobian-free backpropagation".

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z = implicit.fixed_point(lambda z, a: a * z + 1, torch.zeros(()), a, grad=implicit.OneStep())
        >>> torch.autograd.grad(z, a)
        (tensor(2.0000),)
    """

    def weights(self) -> list[float]:
        return [1.0]


@dataclass(frozen=True, eq=False)
class Phantom(Steps):
    """Differentiate k damped steps z <- (1 - tau) z + tau f(z) from the solution. Only for fixed points.

    Source: Geng et al. 2021, "On training implicit models".

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z = implicit.fixed_point(lambda z, a: a * z + 1, torch.zeros(()), a, grad=implicit.Phantom(2, 0.5))
        >>> torch.autograd.grad(z, a)
        (tensor(1.7500),)
    """

    k: int = 5
    tau: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.k, "k")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau!r}")

    def weights(self) -> list[float]:
        return [self.tau] * self.k


@dataclass(frozen=True, eq=False)
class Truncated(Steps):
    """Differentiate the last k steps z <- f(z): the first k terms of the Neumann series of J^-1. Only for fixed points.

    The error falls like the k-th power of the contraction factor. Source: Shaban et al. 2019.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z = implicit.fixed_point(lambda z, a: a * z + 1, torch.zeros(()), a, grad=implicit.Truncated(3))
        >>> torch.autograd.grad(z, a)
        (tensor(3.5000),)
    """

    k: int = 5

    def __post_init__(self) -> None:
        check_count(self.k, "k")

    def weights(self) -> list[float]:
        return [1.0] * self.k


@dataclass(frozen=True, eq=False)
class Unroll(Gradient):
    """Differentiate every step of the solver from z0 on; memory grows with the number of steps.

    The derivative converges more slowly than the value.

    Args:
        checkpoint: steps that are recomputed together in backward, which divides the memory by as much.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> unroll, picard = implicit.Unroll(checkpoint=10), implicit.Picard()
        >>> z = implicit.fixed_point(lambda z, a: a * z + 1, torch.zeros(()), a, method=picard, grad=unroll)
        >>> torch.autograd.grad(z, a)
        (tensor(3.9990),)
    """

    checkpoint: int | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            check_count(self.checkpoint, "checkpoint")

    def attach(self, z: Tensor, system: System, adjoint: Adjoint) -> Tensor:
        raise TypeError("Unroll() needs the steps of a solver, and is handled where they are")


# --- what users call --------------------------------------------------------------------------------------------------


def attach_system(z: Tensor, system: System, adjoint: Adjoint, check: bool = False) -> Tensor:
    """Numbers z: (..., n), a solution of ``system``, with their derivatives."""
    if not eager() or not torch.is_grad_enabled():
        if check:
            verify(z, system)
        return z.detach().clone() if eager() else correct(z, system.first, adjoint)
    if not system.closes and not system.given and not check and not system.again(z.detach()).requires_grad:
        return z.detach()
    graph = system.graph(z)
    op = Jacobian(graph.r, graph.z)
    if check:
        check_residual(graph.z.detach(), graph.r.detach(), op)
    if not graph.theta:
        return z.detach().clone()
    return Attached.apply(z.detach(), system.checked, lambda: graph, op, adjoint, *graph.theta)


def verify(z: Tensor, system: System) -> None:
    """Raise where z does not solve ``system``. Compiled code cannot look, and does not."""
    if torch.compiler.is_compiling():
        return
    z = z.detach()
    r = system.value(z)
    if not eager() or torch.is_inference_mode_enabled():
        return check_residual(z, r, None)
    with torch.enable_grad():
        z = z.requires_grad_()
        return check_residual(z.detach(), r, Jacobian(system.again(z), z))


def check_residual(z: Tensor, r: Tensor, op: LinearOperator | None) -> None:
    """Raise where F(z) is too large for a solution: compared with how much F changes when z does.

    Without the Jacobian at hand (``op``) the units of F stand for those of z.
    """
    z, r = raw(z), raw(r)
    size, eps = norm(r), torch.finfo(z.dtype).eps
    away = size if op is None else distance(r, op.rmatvec(r))
    bad = ~(away <= eps**0.5 * norm(z).clamp(min=1.0))
    if bool(bad.any()):
        where = "" if bad.ndim == 0 else f" in samples {bad.nonzero().squeeze(-1).tolist()[:8]}"
        raise ConvergenceError(
            f"z is not a solution{where}: its residual is {size.max().item():.1e}, which is {away.max().item():.1e} "
            f"or more away from one, above {eps**0.5:.1e} times |z|; solve more accurately, or pass check=False"
        )


def attach(
    z: Any,
    residual: Callable[..., Any],
    *args: Any,
    linear: LinearSolver = Auto(),
    batch_dims: int = 0,
    check: bool = True,
    **kwargs: Any,
) -> Any:
    """Give a solution z of ``residual(z, *args, **kwargs) = 0``, computed by anything, its derivatives: z' = -J^-1 F'.

    Args:
        z: pytree of tensors (numpy arrays and numbers are converted); what made it is not differentiated.
        residual: as many equations as unknowns; closed-over tensors and module parameters get gradients too.
        linear: solver of the adjoint system. In forward mode, torch.func and torch.compile J is always a dense matrix.
        batch_dims: leading dims of every leaf of z that number independent problems.
        check: raise unless z solves the equation to sqrt(machine epsilon), relative to |z|; not when compiled.

    Returns: z, differentiable any number of times (compiled, or by autograd on top of torch.func: three times).
    Raises: ConvergenceError, at once or in backward: not a solution, or a singular Jacobian.
    Complexity: one evaluation, and one linear solve for each backward. Source: Blondel et al. 2022.

    Example:
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> z = implicit.attach(2.0, lambda z, a: z * z - a, a)
        >>> torch.autograd.grad(z, a)
        (tensor(0.2500),)
    """
    unknown = Unknown(z, batch_dims)
    system = System(residual, unknown, args, kwargs)
    return unknown.unpack(attach_system(unknown.initial, system, Adjoint(linear), check))
