"""Fixed points f(z) = z: Picard, Anderson, Broyden. A method sees the residual r = z - f(z)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import Method, Problem, some, step_samples
from .adjoint import Gradient, Implicit, check_count
from .iterate import Common, decorate, solve
from .linear import Auto, LinearSolver
from .operator import dot
from .root import Broyden, Chord, LevenbergMarquardt, Newton


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

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return z - r  # f(z)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        z = state if self.damping == 1 else z - self.damping * r
        image = f.image(z)
        return z, z - image, image


@dataclass(frozen=True, eq=False)
class Anderson(Method):
    """Picard steps, extrapolated: the affine combination of the last ones with the smallest linear prediction of |r|.

    Args:
        memory: how many earlier z and r are combined with the present ones.
        damping: of the step from the combination.
        ridge: added to the diagonal of the Gram matrix of the differences of r, relative to its entries.
        switch: as long as each step lowers |r| to this fraction by itself, nothing is extrapolated.

    Complexity: one evaluation and O(n memory) for each step. On affine maps as fast as GMRES.
    Source: Anderson 1965; Walker, Ni 2011, "Anderson acceleration for fixed-point iterations".

    Example:
        >>> implicit.fixed_point(torch.cos, torch.tensor(1.0), method=implicit.Anderson(memory=3))
        tensor(0.7391)
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-12
    switch: float = 0.4

    def __post_init__(self) -> None:
        check_count(self.memory, "memory")
        check_damping(self.damping)
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}")
        if not self.switch >= 0:
            raise ValueError(f"switch must be at least 0, got {self.switch!r}")

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        return (), (), float("inf"), z - r  # f(z)

    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        images, rs, before, image = state
        size = f.size(r)
        slow = size > self.switch * before
        z_new = image = image if self.damping == 1 else z - self.damping * r
        if rs and some(slow):
            # r + r - r is r, exactly: one tensor for the differences and r
            falls = torch.stack((*rs, r + r), -2) - r.unsqueeze(-2)
            mixed = image - self._combined(torch.stack(images, -2) - image.unsqueeze(-2), falls, f.live)
            z_new = mixed if slow is True else step_samples(slow, mixed, image)
        keep = slice(1, None) if len(rs) == self.memory else slice(None)
        following = f.image(z_new)
        return z_new, z_new - following, ((*images[keep], image), (*rs[keep], r), size, following)

    def _combined(self, moves: Tensor, falls: Tensor, live: bool) -> Tensor:
        """gamma moves with gamma = argmin |r - gamma falls|, from the normal equations; r is the last row of falls."""
        numbers, number = falls.detach(), torch.finfo(falls.dtype)
        products = gram(numbers[..., :-1, :], numbers)
        # where the differences of r depend on one another gamma is free: its derivative needs more ridge than its value
        ridge = max(self.ridge, number.eps**0.5 if live else 10 * number.eps)
        # relative to each entry of the diagonal: the differences of r may be many orders of magnitude apart
        products.diagonal(dim1=-2, dim2=-1).mul_(1 + ridge).add_(number.tiny)
        inverse = torch.linalg.inv_ex(products[..., :-1])[0]
        gamma = inverse @ products[..., -1:]
        if live:  # each correction of the constant gamma adds an order of its derivative
            moved, falls, r = gamma, falls[..., :-1, :], falls[..., -1:, :]
            for _ in range(2):
                moved = moved + inverse @ gram(falls, r - gram(moved.mT, falls.mT))
            gamma = gamma + (moved - moved.detach())
        return gram(gamma.mT, moves.mT).squeeze(-2)


def gram(a: Tensor, b: Tensor) -> Tensor:
    """a b' for a: (..., i, n), b: (..., j, n); in a batch by sums, whose rounding does not depend on the batch."""
    return a @ b.mT if a.ndim == 2 else dot(a.unsqueeze(-2), b.unsqueeze(-3))


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
    in_dims: tuple[int | None, ...] | None = None,
    has_aux: bool = False,
    info: bool = False,
    **kwargs: Any,
) -> Any:
    """z = f(z, *args, **kwargs), differentiable in everything that f reads: dz = (I - f_z)^-1 f_theta dtheta.

    Args:
        f, z0: a map from the pytree z to one of the same shapes; where to start. With ``has_aux``, f gives (f(z), aux).
        method: Anderson, Picard, Broyden; or one that ``root`` has for z - f(z): Newton, Chord, LevenbergMarquardt.
        rtol, atol: |f(z) - z| <= atol + rtol |z|, in the Euclidean norm; 1e-11 by default, 1e-5 in float32.
        max_iter, linear, grad, batch_dims: steps; adjoint solver; derivative; leading dims that number samples.
        in_dims: the dim of each of ``args`` that numbers samples, or None: finished ones are then left out.
        on_fail: "raise", "warn", "nan" (for the samples that failed), "ignore"; also for the adjoint.

    Returns: z, then aux (constant) with ``has_aux``, then Info with ``info``.
    Raises: ConvergenceError; ValueError where the shapes of f(z) are not those of z.

    Example:
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> torch.autograd.grad(implicit.fixed_point(lambda z, a: torch.cos(a * z), torch.tensor(1.0), a), a)
        (tensor(-0.3218),)
    """
    common = Common(linear, grad, rtol, atol, max_iter, on_fail, batch_dims, has_aux, info, in_dims)
    methods = (Anderson, Picard, Broyden, Newton, Chord, LevenbergMarquardt)
    return solve(f, z0, args, kwargs, method, methods, common, "fixed_point")


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
