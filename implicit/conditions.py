"""Optimality conditions as residuals F(z, *args) = 0: what a minimizer satisfies, as attach and root take it.

Every factory returns a function of the unknown, of the same shape as its answer. An objective returns one number, or
one for each sample. ``proj``, ``prox`` and constraints may close over tensors; these get their gradients too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ._closure import eager
from ._pytree import Unknown
from .linear import Auto, LinearSolver, linear_solve
from .operator import units

__all__ = ["kkt", "mirror", "newton", "projected", "proximal", "stationary"]


def subtract(a: Any, b: Any) -> Any:
    return tree_map(lambda x, y: x - y, a, b)


def value_and_gradient(objective: Callable[[Any], Any], z: Any, has_aux: bool = False) -> tuple[Tensor, Any, Any]:
    """(objective(z), its gradient for each sample, aux); differentiable where z or what objective reads is."""

    def evaluate(z: Any) -> tuple[Tensor, Any]:
        out = objective(z)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with has_aux=True the objective must return (value, aux), got {type(out).__name__}")
        value, aux = out if has_aux else (out, None)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"the objective must return a floating-point tensor, got {got}")
        return value, aux

    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return value_and_gradient(objective, tree_map(torch.clone, z), has_aux)
    if not eager():
        if not has_aux:

            def alone(z: Any) -> tuple[Tensor, Tensor]:
                value, _ = evaluate(z)
                return value.sum(), value  # samples do not depend on each other

            gradient, value = torch.func.grad(alone, has_aux=True)(z)
            return value, gradient, None
        kept: list[Any] = []  # torch.func.grad hands on tensors alone

        def tensors(z: Any) -> tuple[Tensor, Any]:
            value, aux = evaluate(z)
            leaves, spec = tree_flatten(aux)
            kept[:] = leaves, spec
            return value.sum(), (value, {i: t for i, t in enumerate(leaves) if isinstance(t, Tensor)})

        gradient, (value, parts) = torch.func.grad(tensors, has_aux=True)(z)
        return value, gradient, tree_unflatten([parts.get(i, t) for i, t in enumerate(kept[0])], kept[1])
    live = torch.is_grad_enabled()
    leaves, spec = ([z], None) if isinstance(z, Tensor) else tree_flatten(z)
    # a leaf that nobody differentiates is cut off: its own graph would only cost
    leaves = [t if live and t.requires_grad else t.detach().requires_grad_() for t in leaves]
    with torch.enable_grad():
        value, aux = evaluate(leaves[0] if spec is None else tree_unflatten(leaves, spec))
        if not value.requires_grad:
            raise ValueError("the objective does not depend on the unknown through torch operations")
        ones = torch.ones_like(value) if value.ndim else None
        found = torch.autograd.grad(value, leaves, ones, create_graph=live, allow_unused=True)
        parts = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return (value if live else value.detach()), (parts[0] if spec is None else tree_unflatten(parts, spec)), aux


class Stationary:
    """F = grad f. ``step`` and ``residual`` are what methods of minimization need; subclasses constrain them."""

    def __init__(
        self, objective: Callable[..., Any], has_aux: bool = False, batch: tuple[int, ...] | None = None
    ) -> None:
        if not callable(objective):
            raise TypeError(f"the objective must be a function of the unknown, got {type(objective).__name__}")
        self.objective, self.has_aux, self.batch = objective, has_aux, batch

    def evaluate(self, z: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        """(value, gradient, aux)"""
        out = value_and_gradient(lambda z: self.objective(z, *args, **kwargs), z, self.has_aux)
        if self.batch is not None and tuple(out[0].shape) != self.batch:
            raise ValueError(
                f"the objective returned shape {tuple(out[0].shape)}, expected one number for each sample: {self.batch}"
            )
        return out

    def step(self, z: Any, gradient: Any, t: Any) -> Any:
        """The point that a step of length t leads to."""

        def moved(x: Tensor, g: Tensor) -> Tensor:
            if isinstance(t, Tensor) and t.ndim < x.ndim:
                return x - t.reshape(*t.shape, *(1,) * (x.ndim - t.ndim)) * g
            return x - t * g

        return tree_map(moved, z, gradient)

    def residual(self, z: Any, gradient: Any) -> Any:
        return gradient

    def __call__(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        _, gradient, aux = self.evaluate(z, *args, **kwargs)
        r = self.residual(z, gradient)
        return (r, aux) if self.has_aux else r


class Projected(Stationary):
    """F = z - proj(z - grad f)"""

    def __init__(self, objective: Callable[..., Any], proj: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(objective, **options)
        if not callable(proj):
            raise TypeError(f"proj must be a function z -> nearest feasible point, got {type(proj).__name__}")
        self.proj = proj

    def step(self, z: Any, gradient: Any, t: Any) -> Any:
        return self.proj(super().step(z, gradient, t))

    def residual(self, z: Any, gradient: Any) -> Any:
        return subtract(z, self.step(z, gradient, 1.0))


class Proximal(Stationary):
    """F = z - prox(z - grad f, 1)"""

    def __init__(self, objective: Callable[..., Any], prox: Callable[[Any, Any], Any], **options: Any) -> None:
        super().__init__(objective, **options)
        if not callable(prox):
            raise TypeError(f"prox must be a function (z, step) -> z, got {type(prox).__name__}")
        self.prox = prox

    def step(self, z: Any, gradient: Any, t: Any) -> Any:
        return self.prox(super().step(z, gradient, t), t)

    def residual(self, z: Any, gradient: Any) -> Any:
        return subtract(z, self.step(z, gradient, 1.0))


class Mirror(Stationary):
    """F = z - proj(phi_grad(z) - grad f)"""

    def __init__(
        self, objective: Callable[..., Any], proj: Callable[[Any], Any], phi_grad: Callable[[Any], Any], **options: Any
    ) -> None:
        super().__init__(objective, **options)
        if not (callable(proj) and callable(phi_grad)):
            raise TypeError("proj and phi_grad must be functions of the unknown")
        self.proj, self.phi_grad = proj, phi_grad

    def step(self, z: Any, gradient: Any, t: Any) -> Any:
        return self.proj(super().step(self.phi_grad(z), gradient, t))

    def residual(self, z: Any, gradient: Any) -> Any:
        return subtract(z, self.step(z, gradient, 1.0))


def stationary(objective: Callable[..., Any]) -> Callable[..., Any]:
    """F(z) = grad f(z): the condition of an unconstrained minimizer, for ``f(z, *args)``.

    Returns: residual(z, *args, **kwargs), shaped like z.

    Example:
        >>> b = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> z = implicit.attach(b.detach() / 2, implicit.conditions.stationary(lambda z, b: (z * (z - b)).sum()), b)
        >>> torch.autograd.grad(z.sum(), b)[0]
        tensor([0.5000, 0.5000])
    """
    return Stationary(objective)


def projected(objective: Callable[..., Any], proj: Callable[[Any], Any]) -> Callable[..., Any]:
    """F(z) = z - proj(z - grad f(z)): the condition of a minimizer over a convex set, proj the projection on it.

    At a weakly active constraint the derivative is the one that torch gives proj at its kink.

    Example:
        >>> c = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> F = implicit.conditions.projected(lambda z, c: ((z - c) ** 2).sum() / 2, torch.relu)
        >>> torch.autograd.grad(implicit.attach(torch.tensor([0.0, 2.0]), F, c).sum(), c)[0]
        tensor([0., 1.])
    """
    return Projected(objective, proj)


def proximal(objective: Callable[..., Any], prox: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """F(z) = z - prox(z - grad f(z), 1): the condition of a minimizer of f + g.

    Args:
        objective: the smooth part f(z, *args).
        prox: (v, t) -> argmin_u g(u) + |u - v|^2 / 2t.

    Source: Parikh, Boyd 2014, "Proximal algorithms".

    Example:
        >>> l = torch.tensor(0.5, requires_grad=True)
        >>> soft = lambda v, t: v.sign() * (v.abs() - t * l).relu()
        >>> F = implicit.conditions.proximal(lambda z: (z - 2).square().sum() / 2, soft)
        >>> torch.autograd.grad(implicit.attach(torch.tensor([1.5]), F), l)
        (tensor(-1.),)
    """
    return Proximal(objective, prox)


def mirror(
    objective: Callable[..., Any], proj: Callable[[Any], Any], phi_grad: Callable[[Any], Any]
) -> Callable[..., Any]:
    """F(z) = z - proj(phi_grad(z) - grad f(z)): a minimizer in the geometry of a mirror map phi.

    Args:
        objective: f(z, *args).
        proj: from the dual space to the set, argmin_u phi(u) - <u, v>; softmax for the simplex and phi = sum z log z.
        phi_grad: grad phi; ``torch.log`` for it (a constant more or less cancels).

    Example:
        >>> c = torch.zeros(2, requires_grad=True)
        >>> f = lambda z, c: (z * (z.log() - c)).sum()
        >>> F = implicit.conditions.mirror(f, lambda v: v.softmax(-1), torch.log)
        >>> torch.autograd.grad(implicit.attach(torch.tensor([0.5, 0.5]), F, c)[0], c)[0]
        tensor([ 0.2500, -0.2500])
    """
    return Mirror(objective, proj, phi_grad)


def kkt(
    objective: Callable[..., Any],
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The Karush-Kuhn-Tucker conditions of min f(x) with g(x) = 0 and h(x) <= 0.

    The unknown is (x, dual_eq, dual_ineq) without the duals of absent constraints; all functions take the same
    arguments after x. F = (grad f + dual_eq' dg + dual_ineq' dh, g(x), min(dual_ineq, -h(x))). Where a constraint is
    weakly active (dual_ineq = h = 0) the minimum's derivative is the mean of its two sides.

    Example:
        >>> total = torch.tensor(2.0, requires_grad=True)
        >>> F = implicit.conditions.kkt(lambda x, s: (x**2).sum(), lambda x, s: x.sum() - s)
        >>> x, dual = implicit.attach((torch.ones(2), torch.tensor(-2.0)), F, total)
        >>> torch.autograd.grad(dual, total)
        (tensor(-1.),)
    """
    if not callable(objective):
        raise TypeError(f"the objective must be a function of the unknown, got {type(objective).__name__}")
    if equality is None and inequality is None:
        raise ValueError("kkt needs constraints: equality=, inequality=, or both; without them use stationary")
    count = 1 + (equality is not None) + (inequality is not None)

    def residual(z: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(z, (tuple, list)) or len(z) != count:
            raise ValueError(f"the unknown of these conditions is a tuple of {count}: (x, a dual for each constraint)")
        x, *duals = z
        constraints = [c for c in (equality, inequality) if c is not None]

        def lagrangian(x: Any) -> tuple[Tensor, Any]:
            values = [c(x, *args, **kwargs) for c in constraints]
            total = objective(x, *args, **kwargs).sum()
            for dual, value in zip(duals, values, strict=True):
                for d, v in zip(tree_flatten(dual)[0], tree_flatten(value)[0], strict=True):
                    if d.shape != v.shape:
                        raise ValueError(f"a constraint has shape {tuple(v.shape)} and its dual {tuple(d.shape)}")
                    total = total + (d * v).sum()
            return total, values

        _, gradient, values = value_and_gradient(lagrangian, x, has_aux=True)
        if inequality is not None:
            values[-1] = tree_map(lambda d, h: torch.minimum(d, -h), duals[-1], values[-1])
        return (gradient, *values)

    return residual


def newton(residual: Callable[..., Any], *, linear: LinearSolver = Auto(), batch_dims: int = 0) -> Callable[..., Any]:
    """J(z)^-1 F(z) for a residual F: the same roots, and a Jacobian that is the identity there.

    z - newton(F)(z) is the Newton map: one step of it, as in OneStep or one term of Neumann, has the exact derivative.

    Args:
        residual: F(z, *args), as many equations as unknowns.
        linear, batch_dims: solver for the dense J; leading dims that number independent problems.

    Example:
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> F = implicit.conditions.newton(lambda z, a: z**2 - a)
        >>> torch.autograd.grad(implicit.attach(torch.tensor(2.0), F, a, linear=implicit.Neumann(max_iter=1)), a)
        (tensor(0.2500),)
    """
    if not callable(residual):
        raise TypeError(f"expected a residual F(z, *args), got {type(residual).__name__}")

    def scaled(z: Any, *args: Any, **kwargs: Any) -> Any:
        unknown = Unknown(z, batch_dims)

        def f(v: Tensor) -> Tensor:
            return unknown.pack(residual(unknown.unpack(v), *args, **kwargs), "the residual", False)

        r, matrix = value_and_jacobian(f, unknown.initial)
        return unknown.unpack(linear_solve(matrix, r, method=linear))

    return scaled


def value_and_jacobian(f: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """f(v) and df/dv for each sample, (..., n, n), both differentiable."""
    n = v.shape[-1]
    if not eager():
        result: Any = torch.func.vjp(f, v)
        r, pull = result
        return r, torch.func.vmap(lambda u: pull(u)[0])(units(v)).movedim(0, -2)
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        v = v if live and v.requires_grad else v.detach().requires_grad_()
        r = f(v)
        rows = [
            torch.autograd.grad(r[..., i].sum(), v, create_graph=live, retain_graph=True, materialize_grads=True)[0]
            for i in range(n)
        ]
        matrix = torch.stack(rows, -2)
    return (r, matrix) if live else (r.detach(), matrix.detach())
