"""Minimizers: gradient descent, FISTA, L-BFGS, Newton, mirror descent; their condition is one of conditions.py.

A method sees r = F(z), the condition, and through :class:`Objective` the value and the gradient. Every length is chosen
for each sample by itself: a sample whose step is good keeps it while others still search.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ._closure import raw
from ._loop import Method, Problem, samples, step_samples
from ._pytree import Unknown
from .adjoint import Gradient, Implicit, check_count
from .conditions import Mirror, Projected, Proximal, Stationary
from .iterate import Common, solve
from .linear import Auto, LinearSolver
from .operator import apply_matrix, dot, norm
from .root import Newton

ARMIJO = 1e-4


class Objective:
    """The objective behind a condition, on z: (..., n)."""

    def __init__(self, f: Problem) -> None:
        self.free = type(f.system.function) is Stationary  # neither proj nor prox
        self.system, self.unknown = f.system, f.system.unknown
        self.condition: Stationary = f.system.function  # type: ignore[assignment]
        self.args, self.kwargs = f.system.args, f.system.kwargs

    @staticmethod
    def of(f: Problem) -> Objective:
        """The objective behind f, made once."""
        if not hasattr(f, "objective"):
            f.objective = Objective(f)  # type: ignore[attr-defined]
        return f.objective  # type: ignore[attr-defined]

    def quietly(self) -> AbstractContextManager[None]:
        """Evaluations beside those of F leave no trace on buffers and random state."""
        effects = self.system.effects
        return nullcontext() if effects is None else effects.repeated()

    def pack(self, tree: Any, name: str) -> Tensor:
        return self.unknown.pack(tree, name, True)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(value, gradient) for each sample."""
        with self.quietly():
            value, gradient, _ = self.condition.evaluate(self.unknown.unpack(z), *self.args, **self.kwargs)
        return value, self.pack(gradient, "the gradient")

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, g = self.evaluate(z)
        if not bool(raw(value.isfinite()).all()):
            raise ValueError(f"the objective at z0 is not finite{samples(raw(~value.isfinite()))}; start elsewhere")
        return value, g

    def step(self, z: Tensor, g: Tensor, t: Tensor) -> Tensor:
        """z moved by t along -g, projected or shrunk."""
        if self.free:
            return z - t.unsqueeze(-1) * g
        leaves = tree_flatten(self.unknown.unpack(z))[0]
        if len(leaves) == 1:  # so that a prox can multiply by it
            t = t.reshape(*t.shape, *(1,) * (leaves[0].ndim - t.ndim))
        with self.quietly():
            moved = self.condition.step(self.unknown.unpack(z), self.unknown.unpack(g), t)
        return self.pack(moved, "proj or prox")

    def dual(self, z: Tensor) -> Tensor:
        """grad phi of a mirror map."""
        with self.quietly():
            return self.pack(self.condition.phi_grad(self.unknown.unpack(z)), "phi_grad")  # type: ignore[attr-defined]

    def residual(self, z: Tensor, g: Tensor) -> Tensor:
        if self.free:
            return g
        with self.quietly():
            return self.pack(self.condition.residual(self.unknown.unpack(z), self.unknown.unpack(g)), "proj or prox")


def search(f: Problem, z: Tensor, value: Tensor, g: Tensor, d: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z + t d, value, gradient) with t halved until the value falls enough, each sample by itself.

    Where the value moves by rounding alone its fall is read off the slopes: the approximate Wolfe condition of Hager
    and Zhang (2005), without which no gradient would get below the square root of the machine epsilon. A sample that
    finds no step before t d is lost in the rounding of z gets a gradient of NaN, which ends its iteration.
    """
    objective, slope, eps = Objective.of(f), dot(g, d), torch.finfo(z.dtype).eps
    good = f.settled(torch.zeros_like(value, dtype=torch.bool))
    z_new, value_new, g_new = z, value, g
    for _ in range(60):
        trial = z + t.unsqueeze(-1) * d
        v, h = objective.evaluate(trial)
        rounding = (v - value).abs() <= 10 * eps * value.abs()
        fine = (v <= value + ARMIJO * t * slope) | (rounding & (dot(h, d) <= (2 * ARMIJO - 1) * slope))
        moves = (trial != z).any(-1)
        now = ~good & fine & moves & h.isfinite().all(-1)
        z_new, g_new = step_samples(now, trial, z_new), step_samples(now, h, g_new)
        value_new = torch.where(now, v, value_new)
        good = good | now
        if bool(raw(good).all()):
            return z_new, value_new, g_new
        if bool(raw(good | ~moves).all()):
            break
        t = torch.where(good, t, t / 2)
    still = (norm(d) == 0) | (norm(g) == 0)
    return z_new, value_new, torch.where((good | still).unsqueeze(-1), g_new, torch.nan)


class Descent(Method):
    """A method of minimization; ``constrained`` says whether it takes steps through proj or prox."""

    constrained = False

    def condition(self, proj: Any, prox: Any) -> Callable[..., Stationary]:
        """The condition that the method's answer satisfies."""
        if proj is not None and prox is not None:
            raise ValueError("give proj or prox, not both: the prox of an indicator is the projection")
        if (proj is not None or prox is not None) and not self.constrained:
            raise ValueError(f"{type(self).__name__} takes neither proj nor prox; use FISTA() or GradientDescent()")
        if proj is not None:
            return lambda objective, **options: Projected(objective, proj, **options)
        if prox is not None:
            return lambda objective, **options: Proximal(objective, prox, **options)
        return Stationary


@dataclass(frozen=True, eq=False)
class FISTA(Descent):
    """Accelerated (proximal, projected) gradient descent for convex f: z = prox(y - t g(y)), y = z + momentum.

    Args:
        step_size: t; ``None`` starts at 1/L measured along the gradient and halves where f bends more.

    The momentum restarts where it points uphill, which makes strongly convex problems converge linearly.
    Complexity: two gradients for each step. Source: Beck, Teboulle 2009; O'Donoghue, Candes 2015.

    Example:
        >>> y = torch.tensor([3.0, 0.5])
        >>> soft = lambda v, t: v.sign() * (v.abs() - t).relu()
        >>> implicit.minimize(lambda z: (z - y).square().sum() / 2, y, prox=soft, method=implicit.FISTA())
        tensor([2., 0.])
    """

    step_size: float | None = None
    steps = 10000
    constrained = True
    accelerated = True

    def __post_init__(self) -> None:
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size!r}")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        objective = Objective.of(f)
        g = r if objective.free else objective.start(z)[1]
        if self.step_size is not None:
            t = torch.full_like(r[..., 0], self.step_size)
        else:
            size = norm(g)
            h = 1e-4 * norm(z).clamp(min=1.0) / torch.where(size > 0, size, 1)
            bend = norm(objective.evaluate(z - h.unsqueeze(-1) * g)[1] - g) / (h * torch.where(size > 0, size, 1))
            t = torch.where((bend > 0) & bend.isfinite(), 1 / bend, 1.0).detach()
        return z, g, t, torch.ones_like(t)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        if not self.accelerated and self.step_size is not None and Objective.of(f).free:
            z = torch.sub(z, r, alpha=self.step_size)
            return z, f(z), state
        objective = Objective.of(f)
        y, g, t, momentum = state
        for _ in range(60):
            z_new = objective.step(y, g, t)
            _, g_new = objective.evaluate(z_new)
            if self.step_size is not None:
                break
            d = z_new - y
            # t <= 1/L along the step, by gradients: differences of values drown in rounding near the solution
            good = f.settled(dot(g_new - g, d) <= (1 + 1e-6) * dot(d, d) / t)
            if bool(raw(good).all()):
                break
            t = torch.where(good, t, t / 2)
        if not self.accelerated:
            return z_new, objective.residual(z_new, g_new), (z_new, g_new, t, momentum)
        uphill = dot(y - z_new, z_new - z) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        weight = torch.where(uphill, 0.0, (momentum - 1) / following)
        y = z_new + weight.unsqueeze(-1) * (z_new - z)
        return z_new, objective.residual(z_new, g_new), (y, objective.evaluate(y)[1], t, following)


@dataclass(frozen=True, eq=False)
class GradientDescent(FISTA):
    """z <- z - t grad f(z), projected or shrunk if there is a proj or prox.

    Args:
        step_size: t; ``None`` starts at 1/L measured along the gradient and halves where f bends more.

    Complexity: one gradient for each step; O(condition number) steps.

    Example:
        >>> b = torch.tensor([1.0, 2.0])
        >>> implicit.minimize(lambda z: (z - b).square().sum(), torch.zeros(2), method=implicit.GradientDescent())
        tensor([1.0000, 2.0000])
    """

    accelerated = False


@dataclass(frozen=True, eq=False)
class LBFGS(Descent):
    """Quasi-Newton with the last ``memory`` differences of z and of the gradient, and a backtracking line search.

    Complexity: one gradient and O(n memory) for each step, superlinear in practice.
    Source: Nocedal 1980, "Updating quasi-Newton matrices with limited storage".

    Example:
        >>> rosenbrock = lambda z: (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2
        >>> implicit.minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), method=implicit.LBFGS())
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    memory: int = 10
    steps = 2000

    def __post_init__(self) -> None:
        check_count(self.memory, "memory")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return Objective.of(f).start(z)[0], (), (), (), torch.zeros_like(r[..., :1])

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        value, s, y, rho, scale = state
        d, coefficients = -r, []
        for si, yi, ri in zip(reversed(s), reversed(y), reversed(rho), strict=True):
            a = ri * dot(si, d).unsqueeze(-1)
            coefficients.append(a)
            d = d - a * yi
        # without a pair the first trial moves by 1 at most
        d = torch.where(scale > 0, scale * d, d / norm(r).clamp(min=1.0).unsqueeze(-1))
        for si, yi, ri, a in zip(s, y, rho, reversed(coefficients), strict=True):
            d = d + (a - ri * dot(yi, d).unsqueeze(-1)) * si
        downhill = dot(d, r) < 0
        d = step_samples(downhill, d, -r)
        z_new, value, r_new = search(f, z, value, r, d, torch.ones_like(value))
        ds, dy = z_new - z, r_new - r
        curvature = dot(ds, dy).unsqueeze(-1)
        # a pair without positive curvature would make the model indefinite: it counts as absent, for that sample
        good = curvature > torch.finfo(z.dtype).eps * (norm(ds) * norm(dy)).unsqueeze(-1)
        scale = torch.where(good, curvature / dot(dy, dy).unsqueeze(-1), scale)
        keep = slice(1, None) if len(s) == self.memory else slice(None)
        inverse = torch.where(good, 1 / curvature, 0)
        return z_new, r_new, (value, (*s[keep], ds), (*y[keep], dy), (*rho[keep], inverse), scale)


@dataclass(frozen=True, eq=False)
class NewtonDescent(Descent):
    """Newton with a line search on the objective; what ``Newton()`` means for minimize.

    Where the Newton step goes uphill the eigenvalues of the Hessian are replaced by their absolute values, so that
    saddle points repel. Source: Nocedal, Wright 2006, section 3.4.
    """

    line_search: bool = True
    steps = 200

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return Objective.of(f).start(z)[0]

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        d = f.direction(z, r)
        if not self.line_search:
            return z + d, f(z + d), state
        downhill = (dot(d, r) < 0) | (norm(r) == 0)
        if not bool(raw(downhill).all()):
            d = step_samples(downhill, d, -apply_matrix(absolute(f.jacobian(z)), r))
        z, value, r = search(f, z, state, r, d, torch.ones_like(state))
        return z, r, value


def absolute(hessian: Tensor) -> Tensor:
    """|H|^-1, eigenvalues near 0 replaced by a small part of the largest."""
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    size = values.abs()
    floor = 1e-8 * size.amax(-1, keepdim=True)
    size = torch.where(floor == 0, 1.0, torch.maximum(size, floor))
    return (vectors / size.unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True, eq=False)
class MirrorDescent(Descent):
    """z <- proj(phi_grad(z) - t grad f(z)), t doubled until f bends more than phi / t, and halved where it does.

    Args:
        proj: from the dual space to the set, argmin_u phi(u) - <u, v>; the softmax over the last dim by default.
        phi_grad: gradient of the mirror map; the logarithm by default: together the simplex and the entropy.

    Source: Beck, Teboulle 2003, "Mirror descent and nonlinear projected subgradient methods".

    Example:
        >>> c = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> f = lambda z: (z * (z.log() - c)).sum()
        >>> implicit.minimize(f, torch.full_like(c, 0.5), method=implicit.MirrorDescent())
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    proj: Callable[[Any], Any] | None = None
    phi_grad: Callable[[Any], Any] | None = None
    steps = 10000

    def condition(self, proj: Any, prox: Any) -> Callable[..., Stationary]:
        super().condition(proj, prox)
        to_set = (lambda v: v.softmax(-1)) if self.proj is None else self.proj
        phi_grad = torch.log if self.phi_grad is None else self.phi_grad
        return lambda objective, **options: Mirror(objective, to_set, phi_grad, **options)

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        objective = Objective.of(f)
        g = objective.start(z)[1]
        t = torch.ones_like(r[..., 0])
        return g, objective.dual(z), t, t > 0

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        objective = Objective.of(f)
        g, dual, t, growing = state
        for _ in range(60):
            z_new = objective.step(z, g, t)
            _, g_new = objective.evaluate(z_new)
            d, dual_new = z_new - z, objective.dual(z_new)
            # f bends less than phi / t along the step, by gradients: differences of values drown in rounding
            bound = dot(torch.where(d == 0, 0, dual_new - dual), d) / t
            good = f.settled(dot(g_new - g, d) <= bound + 10 * torch.finfo(z.dtype).eps * norm(g) * norm(d))
            if bool(raw(good).all()):
                break
            t, growing = torch.where(good, t, t / 2), growing & good
        # once f has bent more, t only falls: growing again would let the steps go to and fro
        return z_new, objective.residual(z_new, g_new), (g_new, dual_new, torch.where(growing, 2 * t, t), growing)


def minimize(
    objective: Callable[..., Any],
    z0: Any,
    *args: Any,
    method: Method = LBFGS(),
    proj: Callable[[Any], Any] | None = None,
    prox: Callable[[Any, Any], Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_iter: int | None = None,
    linear: LinearSolver = Auto(),
    grad: Gradient = Implicit(),
    on_fail: str = "raise",
    batch_dims: int = 0,
    has_aux: bool = False,
    info: bool = False,
    **kwargs: Any,
) -> Any:
    """z = argmin f(z, *args, **kwargs), differentiable in all that f reads: dz = -H^-1 d(grad f).

    Args:
        objective: f, one number or one for each sample; with ``has_aux`` it returns (value, aux).
        method: LBFGS, Newton, GradientDescent, FISTA or MirrorDescent.
        proj, prox: z -> nearest feasible point, or (v, t) -> argmin_u g(u) + |u - v|^2 / 2t, for the last two but one.
        rtol, atol: converged where |F(z)| <= atol + rtol |F(z0)|, F the gradient, or z - prox(z - grad f, 1).
        max_iter, linear, grad, on_fail, batch_dims, info: as for ``fixed_point``.

    Returns: z, then aux (constant) with ``has_aux``, then Info with ``info``.
    Raises: ConvergenceError: not converged, or a singular Hessian. Source: Blondel et al. 2022.

    Example:
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> z = implicit.minimize(lambda z, a: (z - a).square().sum() + z.square().sum(), torch.zeros(2), a)
        >>> torch.autograd.grad(z.sum(), a)
        (tensor(1.),)
    """
    if isinstance(method, Newton):
        method = NewtonDescent(method.line_search)
    if not isinstance(method, Descent):
        known = "LBFGS, Newton, GradientDescent, FISTA, MirrorDescent"
        raise TypeError(f"the method of minimize must be one of {known}, got {method!r}")
    common = Common(linear, grad, rtol, atol, max_iter, on_fail, batch_dims, has_aux, info)
    condition = method.condition(proj, prox)(objective, has_aux=has_aux, batch=Unknown(z0, batch_dims).batch)
    return solve(condition, z0, args, kwargs, method, (Descent,), common, "minimize")
