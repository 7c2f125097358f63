"""Roots F(z) = 0: Newton, Chord, Levenberg-Marquardt, Broyden, Bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ._closure import raw
from ._loop import Method, Problem, Tolerance, samples, step_samples
from ._pytree import shapes
from .adjoint import Gradient, Implicit, check_count
from .iterate import Common, decorate, solve
from .linear import Auto, LinearSolver
from .operator import apply_matrix, dot, norm


@dataclass(frozen=True, eq=False)
class Newton(Method):
    """z <- z - t J^-1 F(z), the linear system solved by ``linear=``; a singular J is replaced by its pseudo-inverse.

    Args:
        line_search: halve t from 1 until |F| falls enough (Armijo), each sample by itself; otherwise t = 1.

    Complexity: one linear solve for each step; quadratic convergence. Source: Nocedal, Wright 2006, chapter 11.

    Example:
        >>> implicit.root(lambda z: z**3 - 8, torch.tensor(1.0), method=implicit.Newton())
        tensor(2.)
    """

    line_search: bool = True
    steps = 100

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        d = f.direction(z, r)
        z_new = z + d
        r_new = f(z_new)
        if not self.line_search:
            return z_new, r_new, state
        size, t = norm(r.detach()), torch.ones_like(r[..., 0])
        # a full step of the order of rounding is taken as it is: |F| cannot fall any more
        tiny = norm(d) <= 1e3 * torch.finfo(z.dtype).eps * norm(z)
        for _ in range(40):
            good = f.settled(tiny) | (norm(r_new.detach()) <= (1 - 1e-4 * t) * size)
            if bool(raw(good).all()):
                break
            t = torch.where(good, t, t / 2)
            z_new = step_samples(good, z_new, z + t.unsqueeze(-1) * d)
            r_new = step_samples(good, r_new, f(z_new))
        return z_new, r_new, state


@dataclass(frozen=True, eq=False)
class Chord(Method):
    """z <- z - J(z0)^-1 F(z): Newton with one Jacobian for all steps. Linear convergence near a solution.

    Example:
        >>> implicit.root(lambda z: z**3 - 8, torch.tensor(2.1), method=implicit.Chord())
        tensor(2.0000)
    """

    steps = 200

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return inverse_jacobian(f, z)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        z = z - apply_matrix(state, r)
        return z, f(z), state


@dataclass(frozen=True, eq=False)
class LevenbergMarquardt(Method):
    """z <- z - (J'J + m I)^-1 J'F(z): between Newton and gradient descent; m falls when |F| does, rises otherwise.

    Args:
        damping: the first m, relative to the mean of the diagonal of J'J.

    Converges from farther away than Newton, and where J is singular. Source: Marquardt 1963; Moré 1978.

    Example:
        >>> implicit.root(lambda z: z**3 - 8, torch.tensor(1.0), method=implicit.LevenbergMarquardt())
        tensor(2.)
    """

    damping: float = 1e-3
    steps = 300

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping!r}")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return torch.full_like(r[..., 0], self.damping)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        m, J = state, f.jacobian(z)
        gram = J.mT @ J
        scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / z.shape[-1]
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        inv = torch.linalg.inv_ex(gram + (m * scale)[..., None, None] * eye)[0]
        z_new = z - apply_matrix(inv, apply_matrix(J.mT, r))
        r_new = f(z_new)
        better = norm(r_new) < norm(r)
        least = torch.finfo(z.dtype).eps
        m = torch.where(better, (m / 10).clamp(min=least), (m * 5).clamp(max=1e8)).detach()
        return step_samples(better, z_new, z), step_samples(better, r_new, r), m


@dataclass(frozen=True, eq=False)
class Broyden(Method):
    """Quasi-Newton: the inverse Jacobian, corrected by one rank each step so that it maps the last dF to the last dz.

    Args:
        memory: corrections kept; when they are full the method starts anew from where it is.

    The inverse Jacobian at the start is the exact one for a root, and the identity for a fixed point.
    Complexity: one evaluation and O(n memory) for each step. Source: Broyden 1965 ("good" update).

    Example:
        >>> implicit.root(lambda z: z**3 - 8, torch.tensor(2.5), method=implicit.Broyden())
        tensor(2.)
    """

    memory: int = 20
    steps = 500

    def __post_init__(self) -> None:
        check_count(self.memory, "memory")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return (None if f.fixed_point else inverse_jacobian(f, z)), (), ()

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        base, left, right = state if len(state[1]) < self.memory else self.start(f, z, r)

        def apply(matrix: Tensor | None, v: Tensor, a: tuple, b: tuple) -> Tensor:
            out = v if matrix is None else apply_matrix(matrix, v)
            for u, w in zip(a, b, strict=True):
                out = out + u * dot(w, v).unsqueeze(-1)
            return out

        s = -apply(base, r, left, right)
        z_new = z + s
        r_new = f(z_new)
        hy = apply(base, r_new - r, left, right)
        hs = apply(None if base is None else base.mT, s, right, left)  # H' s
        curvature = dot(s, hy)
        # a correction that would make H singular is left out, as in Dennis, Schnabel 1996
        safe = curvature.abs() > 1e-8 * dot(s, s)
        u = (s - hy) / torch.where(safe, curvature, 1).unsqueeze(-1)
        u = torch.where(safe.unsqueeze(-1), u, 0)
        return z_new, r_new, (base, (*left, u), (*right, hs))


@dataclass(frozen=True, eq=False)
class Bisection(Method):
    """Halve brackets [lower, upper], every element by itself: element i of F may depend on element i of z only.

    Args:
        lower, upper: numbers, or pytrees like z (tensors broadcast to it); F must change its sign between them.

    rtol and atol are for the width of the brackets, relative to z. z0 gives shape and dtype.
    Raises ValueError where F has the same sign at both ends.

    Example:
        >>> implicit.root(lambda z: z**3 - 8, torch.zeros(2), method=implicit.Bisection(0.0, 10.0))
        tensor([2.0000, 2.0000])
    """

    lower: Any
    upper: Any
    steps = 1100
    by_residual = False
    differentiable = False

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        low, high = (self._ends(f, z, end, name) for end, name in ((self.lower, "lower"), (self.upper, "upper")))
        if bool(raw(~(low <= high)).any()):
            raise ValueError("Bisection needs lower <= upper in every element")
        at_low, at_high = f(low), f(high)
        outside = raw(~(at_low.sign() * at_high.sign() <= 0))
        if bool(outside.any()):
            raise ValueError(
                f"F has the same sign at lower and upper{samples(outside.any(-1))}: "
                f"{int(outside.sum())} of {outside.numel()} elements have no bracket; widen [lower, upper]"
            )
        # an end that is a root already closes the bracket
        low, high = torch.where(at_high == 0, high, low), torch.where(at_low == 0, low, high)
        return low, high, torch.where(at_low == 0, -at_high.sign(), at_low.sign())

    def _ends(self, f: Problem, z: Tensor, end: Any, name: str) -> Tensor:
        if isinstance(end, (int, float)):
            return torch.full_like(z, float(end))
        unknown = f.system.unknown
        given, wanted = tree_flatten(end)[0], tree_flatten(unknown.unpack(z))[0]
        try:
            parts = [e.detach().to(w).expand(w.shape) for e, w in zip(given, wanted, strict=True)]
        except (ValueError, RuntimeError, AttributeError):
            raise ValueError(
                f"{name} must be a number or broadcast to the unknown's {shapes(wanted)}, got {shapes(given)}"
            ) from None
        return unknown.join(parts)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        low, high, sign = state
        middle = low + (high - low) / 2
        r = f(middle)
        side = r.sign() * sign
        return middle, r, (torch.where(side >= 0, middle, low), torch.where(side <= 0, middle, high), sign)

    def finished(self, z: Tensor, state: Any, tolerance: Tolerance) -> Tensor | None:
        low, high, _ = state
        number = torch.finfo(z.dtype)
        relative, absolute = max(tolerance.rtol, 2 * number.eps), max(tolerance.atol or 0.0, 2 * number.smallest_normal)
        return (high - low <= relative * torch.maximum(low.abs(), high.abs()) + absolute).all(-1)


def inverse_jacobian(f: Problem, z: Tensor) -> Tensor:
    J = f.jacobian(z)
    inv, info = torch.linalg.inv_ex(J)
    singular = raw((info != 0) | ~inv.isfinite().flatten(-2).all(-1))
    if bool(singular.any()):
        raise ValueError(f"singular Jacobian at z0{samples(singular)}: start elsewhere, or use LevenbergMarquardt()")
    return inv


METHODS = (Newton, Broyden, Chord, Bisection, LevenbergMarquardt)


def root(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    method: Method = Newton(),
    rtol: float | None = None,
    atol: float | None = None,
    max_iter: int | None = None,
    linear: LinearSolver = Auto(),
    grad: Gradient = Implicit(),
    on_fail: str = "raise",
    batch_dims: int = 0,
    in_dims: tuple[int | None, ...] | None = None,
    has_aux: bool = False,
    info: bool = False,
    **kwargs: Any,
) -> Any:
    """z with f(z, *args, **kwargs) = 0, differentiable in everything that f reads: dz = -J^-1 f_theta dtheta.

    Args:
        f, z0: as many equations as unknowns, pytrees both; where to start. With ``has_aux``, f gives (value, aux).
        method: Newton, Broyden, Chord, Bisection or LevenbergMarquardt.
        rtol, atol: |f(z)| <= atol + rtol |f(z0)|; by default 0 and 1e-11 (1e-5 in float32), or down to rounding.
        max_iter, linear, grad, batch_dims: steps; linear solver; derivative; leading dims that number samples.
        in_dims: the dim of each of ``args`` that numbers samples, or None: finished ones are then left out.
        on_fail: "raise", "warn", "nan" (for the samples that failed), "ignore"; also for the adjoint.

    Returns: z, then aux (constant) with ``has_aux``, then Info with ``info``.
    Raises: ConvergenceError; ValueError where the equations are not as many as the unknowns.

    Example:
        >>> a = torch.tensor(8.0, requires_grad=True)
        >>> torch.autograd.grad(implicit.root(lambda z, a: z**3 - a, torch.tensor(1.0), a), a)
        (tensor(0.0833),)
    """
    common = Common(linear, grad, rtol, atol, max_iter, on_fail, batch_dims, has_aux, info, in_dims)
    return solve(f, z0, args, kwargs, method, METHODS, common, "root")


def custom_root(
    residual: Callable[..., Any],
    *,
    linear: LinearSolver = Auto(),
    has_aux: bool = False,
    grad: Gradient = Implicit(),
    batch_dims: int = 0,
    check: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``solver(z0, *args, **kwargs)``, of any make, with the derivatives of the root of ``residual``.

    Args:
        residual: the equation residual(z, *args, **kwargs) = 0 that the answer z satisfies.
        linear, batch_dims, check: see ``attach``.
        has_aux: the solver returns (z, aux), and so does the decorated one; aux is constant.
        grad: Implicit(), or Unroll() to differentiate the solver itself.

    The solver sees tensors without gradient, so it may leave torch. z0 may be anything, None too; it is not
    differentiated. Source: Blondel et al. 2022, "Efficient and modular implicit differentiation".

    Example:
        >>> @implicit.custom_root(lambda z, a: z * z - a)
        ... def square_root(z0, a):
        ...     return a.sqrt()
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(square_root(None, a), a)
        (tensor(0.2500),)
    """
    return decorate(residual, linear, has_aux, grad, batch_dims, check, fixed_point=False)
