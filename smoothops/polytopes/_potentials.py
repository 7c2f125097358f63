"""The dual potentials of a transport problem, and how its solver went."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._opaque import batch_shape

SOLVED = 2  # numbers a matrix that a solver hands on: whether it has converged, steps


class TransportInfo(NamedTuple):
    """How the solver went, for each matrix (...): ``converged``, bool; ``iterations``, its sweeps and Newton steps;

    ``residual``, sum |P 1 - a| + sum |P' 1 - b| of the plan of the potentials, relative to sum a.
    """

    converged: Tensor
    iterations: Tensor
    residual: Tensor


class Potentials(NamedTuple):
    """Dual potentials f (..., n) of the rows and g (..., m) of the columns, and a :class:`TransportInfo`."""

    f: Tensor
    g: Tensor
    info: TransportInfo


def centred(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """u (..., n, 1) and v (..., 1, m), of which only the sum counts, with the same mean, under a and under b."""
    mass = a.sum((-2, -1), keepdim=True)
    rows, columns = ((w * t).sum((-2, -1), keepdim=True) for w, t in ((a, u), (b, v)))
    shift = (rows - columns) / torch.where(mass > 0, 2 * mass, 1)
    return u - shift, v + shift


def judged(plan: Tensor, a: Tensor, b: Tensor, solved: Tensor) -> TransportInfo:
    """For the plan (..., n, m), a (..., n, 1), b (..., 1, m) and what the solver says, (..., 1, SOLVED)."""
    plan, a, b = (t.detach() for t in (plan, a, b))
    error = (plan.sum(-1, keepdim=True) - a).abs().sum((-2, -1)) + (plan.sum(-2, keepdim=True) - b).abs().sum((-2, -1))
    mass = a.sum((-2, -1))
    converged, steps = solved.squeeze(-2).unbind(-1)
    residual = error / torch.where(mass > 0, mass, 1)
    return TransportInfo(converged > 0, steps.to(torch.int64), residual)


def solved(error: Tensor, bound: Tensor, steps: Tensor, batch: torch.Size) -> Tensor:
    """(..., 1, SOLVED) from numbers for each matrix of a flattened batch."""
    return torch.stack([(error < bound).to(steps.dtype), steps], -1).reshape(*batch, 1, SOLVED)


def solved_like(x: Tensor, *others: Tensor) -> Tensor:
    """An empty tensor shaped as :func:`solved` for matrices of these batch dims."""
    return x.new_empty(*batch_shape(*(t.flatten(-2) for t in (x, *others))), 1, SOLVED)
