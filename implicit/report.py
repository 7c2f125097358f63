"""What can be known about a gradient before trusting it: residuals, conditioning, contraction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._closure import System, eager
from ._jacobian import Jacobian
from ._pytree import Unknown
from .linear import Auto, LinearReport, LinearSolver
from .operator import dot, norm, signs

DENSE = 512  # unknowns up to which the singular values are computed, not estimated


@dataclass(frozen=True, eq=False)
class GradientReport:
    """How far a gradient can be trusted, for each sample.

    Attributes:
        residual: |F(z)|.
        adjoint: the LinearReport of J' r = v for a fixed random v; its residual is relative.
        condition: of J, in the 2-norm: exact up to 512 unknowns, beyond that a lower bound. Relative errors of the
            residual and of rounding reach the gradient multiplied by at most this.
        contraction: the spectral radius of the map z - F(z), or of z + F(z) where that is smaller: above 1 plain
            iteration diverges, and OneStep, Phantom, Truncated and Neumann are no approximations.

    Example:
        >>> report = implicit.gradient_report(lambda z: z - 0.5 * torch.cos(z), torch.tensor(0.450184))
        >>> round(report.contraction.item(), 4)
        0.2176
    """

    residual: Tensor
    adjoint: LinearReport
    condition: Tensor
    contraction: Tensor


def gradient_report(
    residual: Callable[..., Any],
    z: Any,
    *args: Any,
    linear: LinearSolver = Auto(),
    batch_dims: int = 0,
    **kwargs: Any,
) -> GradientReport:
    """Numbers that say how far the implicit gradient at ``z`` can be trusted; see ``GradientReport``.

    Args:
        residual: F(z, *args, **kwargs), as for ``attach``; for a fixed point z - f(z).
        z: the computed solution; it is not required to be exact.
        linear: the solver whose adjoint residual is reported.
        batch_dims: leading dims of every leaf of z that number independent problems.

    The contraction is the largest modulus of a Ritz value after at most 64 steps of Arnoldi's method, which, unlike a
    power iteration, sees rotations. Complexity: O(64) products with J, and O(n^3) for the condition up to n = 512.
    Source: Arnoldi 1951; Golub, Kahan 1965.

    Example:
        >>> report = implicit.gradient_report(lambda z: z * z - torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        >>> report.condition
        tensor(2.)
    """
    if not eager():
        raise RuntimeError("gradient_report looks at numbers: call it outside torch.func and torch.compile")
    unknown = Unknown(z, batch_dims)
    graph = System(residual, unknown, args, kwargs).graph(unknown.initial)
    op = Jacobian(graph.r, graph.z)
    with torch.no_grad():
        v = signs(graph.z)
        adjoint = linear.T.solve(op.T, v)[1]
        maps = (lambda u: u - op.matvec(u), lambda u: u + op.matvec(u))
        contraction = torch.minimum(*(spectral_radius(m, v) for m in maps))
        return GradientReport(norm(graph.r.detach()), adjoint, condition(op, v), contraction)


def orthogonalized(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """w without its components along ``basis``, and these: twice, as once is not enough."""
    parts = [torch.zeros_like(w[..., 0]) for _ in basis]
    for _ in range(2):
        for i, q in enumerate(basis):
            part = dot(q, w)
            w, parts[i] = w - part.unsqueeze(-1) * q, parts[i] + part
    return w, parts


def next_vector(w: Tensor, size: Tensor, scale: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """w / |w|, and |w|; where w is rounding, the Krylov space is complete: a new direction, and 0."""
    over = size <= 100 * torch.finfo(w.dtype).eps * scale
    fresh = orthogonalized(signs(w, len(basis)), basis)[0]
    unit = torch.where(over.unsqueeze(-1), fresh, w)
    return unit / norm(unit).clamp(min=torch.finfo(w.dtype).tiny).unsqueeze(-1), torch.where(over, 0, size)


def spectral_radius(product: Callable[[Tensor], Tensor], v: Tensor, steps: int = 64) -> Tensor:
    """The largest modulus of an eigenvalue, by Arnoldi's method: exact where ``steps`` reach the size."""
    steps = min(steps, v.shape[-1])
    if steps == 0:
        return torch.zeros(v.shape[:-1], dtype=v.dtype, device=v.device)
    basis = [v / norm(v).unsqueeze(-1)]
    H = torch.zeros(*v.shape[:-1], steps, steps, dtype=v.dtype, device=v.device)
    for k in range(steps):
        w = product(basis[k])
        scale = norm(w)
        w, parts = orthogonalized(w, basis)
        H[..., : k + 1, k] = torch.stack(parts, -1)
        if k + 1 < steps:
            q, H[..., k + 1, k] = next_vector(w, norm(w), scale, basis)
            basis.append(q)
    return torch.linalg.eigvals(H).abs().amax(-1)


def condition(op: Jacobian, v: Tensor, steps: int = 64) -> Tensor:
    """|J| |J^-1|; beyond DENSE unknowns from the bidiagonalization of Golub and Kahan, a lower bound."""
    if v.shape[-1] == 0:
        return torch.ones(v.shape[:-1], dtype=v.dtype, device=v.device)
    if v.shape[-1] <= DENSE:
        values = torch.linalg.svdvals(op.dense())
    else:
        right, left = [v / norm(v).unsqueeze(-1)], list[Tensor]()
        B = torch.zeros(*v.shape[:-1], steps, steps, dtype=v.dtype, device=v.device)
        for k in range(steps):
            u = op.matvec(right[k])
            scale = norm(u)
            u, parts = orthogonalized(u, left)
            if k:
                B[..., k - 1, k] = parts[-1]
            q, B[..., k, k] = next_vector(u, norm(u), scale, left)
            left.append(q)
            if k + 1 < steps:
                w = op.rmatvec(q)
                scale = norm(w)
                w = orthogonalized(w, right)[0]
                right.append(next_vector(w, norm(w), scale, right)[0])
        values = torch.linalg.svdvals(B)
    return values[..., 0] / values[..., -1]
