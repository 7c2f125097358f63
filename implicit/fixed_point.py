"""Fixed points f(z) = z: Picard, Anderson, Broyden. A method sees the residual r = z - f(z)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adjoint import Gradient, Implicit, check_count
from .iterate import Common, Method, Problem, decorate, solve
from .linear import Auto, LinearSolver
from .operator import dot


def check_damping(damping: object) -> None:
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {damping!r}")


@dataclass(frozen=True, eq=False)
class Picard(Method):
    """z <- z + damping * (f(z) - z). Converges where f, so damped, is a contraction.

    Example:
        >>> implicit.fixed_point(torch.cos, torch.tensor(1.0), method=implicit.Picard())
        tensor(0.7391)
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        z = z - r if self.damping == 1 else z - self.damping * r
        return z, f(z), state


@dataclass(frozen=True, eq=False)
class Anderson(Method):
    """Picard steps, extrapolated: the affine combination of the last ones with the smallest linear prediction of |r|.

    Args:
        memory: how many past differences of z and r are kept.
        damping: of the step from the combination.
        ridge: added to the diagonal of the Gram matrix of the differences of r, relative to its entries.

    Complexity: one evaluation and O(n memory) for each step. On affine maps as fast as GMRES.
    Source: Anderson 1965; Walker, Ni 2011, "Anderson acceleration for fixed-point iterations".

    Example:
        >>> implicit.fixed_point(torch.cos, torch.tensor(1.0), method=implicit.Anderson(memory=3))
        tensor(0.7391)
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-12

    def __post_init__(self) -> None:
        check_count(self.memory, "memory")
        check_damping(self.damping)
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return ((), ())

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        dz, dr = state
        step = -self.damping * r
        if dz:
            Z, R = torch.stack(dz, -2), torch.stack(dr, -2)
            # rows of unit length: the Gram matrix then has ones on its diagonal, and the ridge is relative to it
            length = dot(R, R).clamp(min=torch.finfo(r.dtype).tiny).rsqrt().unsqueeze(-1)
            unit = R * length
            gram = dot(unit.unsqueeze(-2), unit.unsqueeze(-3))
            eye = torch.eye(len(dz), dtype=r.dtype, device=r.device)
            gram, b = gram + max(self.ridge, 10 * torch.finfo(r.dtype).eps) * eye, dot(unit, r.unsqueeze(-2))
            inv = torch.linalg.inv_ex(gram)[0]
            gamma = dot(inv, b.unsqueeze(-2)).unsqueeze(-1) * length
            step = step - (gamma * (Z - self.damping * R)).sum(-2)
        z_new = z + step
        r_new = f(z_new)
        keep = slice(1, None) if len(dz) == self.memory else slice(None)
        return z_new, r_new, ((*dz[keep], step), (*dr[keep], r_new - r))


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    method: Method = Anderson(),
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
    """z = f(z, *args, **kwargs), differentiable in everything that f reads: dz = (I - f_z)^-1 f_theta dtheta.

    Args:
        f: a map from the pytree z to one of the same shapes; with ``has_aux`` it returns (f(z), aux).
        z0: where to start.
        method: Anderson, Picard or Broyden.
        rtol, atol: |f(z) - z| <= atol + rtol |z|, in the Euclidean norm; 1e-11 by default, 1e-5 in float32.
        max_iter, linear, grad, batch_dims: steps; adjoint solver; derivative; leading dims that number problems.
        on_fail: "raise", "warn", "nan" (for the samples that failed), "ignore"; also for the adjoint.

    Returns: z, then aux (constant) with ``has_aux``, then Info with ``info``.
    Raises: ConvergenceError; ValueError where the shapes of f(z) are not those of z.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> torch.autograd.grad(implicit.fixed_point(lambda z, a: torch.cos(a * z), torch.tensor(1.0), a), a)
        (tensor(-0.3218),)
    """
    common = Common(linear, grad, rtol, atol, max_iter, on_fail, batch_dims, has_aux, info)
    return solve(f, z0, args, kwargs, method, common, fixed_point=True)


def custom_fixed_point(
    f: Callable[..., Any],
    *,
    linear: LinearSolver = Auto(),
    has_aux: bool = False,
    grad: Gradient = Implicit(),
    batch_dims: int = 0,
    check: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``solver(z0, *args, **kwargs)``, of any make, with the derivatives of z = f(z, *args, **kwargs).

    Args: as for ``custom_root``, with the map ``f`` in place of the residual; ``grad`` may be any of the gradients.

    Example:
        >>> @implicit.custom_fixed_point(lambda z, a: (z + a / z) / 2)
        ... def square_root(z0, a):
        ...     return a.sqrt()
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(square_root(None, a), a)
        (tensor(0.2500),)
    """
    return decorate(f, linear, has_aux, grad, batch_dims, check, fixed_point=True)
