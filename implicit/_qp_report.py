"""What is said where a QP has no answer: which problem of the batch, which constraints, what to do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._qp_solve import Numbers
from ._qp_status import INACCURATE, INDEFINITE, INFEASIBLE, NOT_FINITE, NOT_UNIQUE, STOPPED, UNBOUNDED, Options
from .linear import ConvergenceError

NAMES = ("Q", "c", "A", "b", "G", "h")


def report(
    numbers: Numbers, data: tuple[Tensor | None, ...], batch: torch.Size, options: Options, on_fail: str
) -> None:
    """Raise or warn if a problem has no answer."""
    if not numbers.failed or on_fail not in ("raise", "warn"):
        return
    bad = (~numbers.converged).nonzero().squeeze(-1).tolist()
    row = bad[0]
    where = "" if not batch else f" {index_of(row, batch)} of the batch {tuple(batch)}"
    kind, text = describe(row, numbers, data, batch, options)
    more = f" ({len(bad)} problems have no answer: {[index_of(i, batch) for i in bad[:8]]})" if len(bad) > 1 else ""
    message = f"qp: problem{where} {text}{more}"
    if on_fail == "raise":
        raise kind(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def index_of(row: int, batch: torch.Size) -> Any:
    index = []
    for size in reversed(batch):
        index.append(row % size)
        row //= size
    return index[0] if len(index) == 1 else tuple(reversed(index))


def describe(
    row: int, numbers: Numbers, data: tuple[Tensor | None, ...], batch: torch.Size, options: Options
) -> tuple[type[Exception], str]:
    index = index_of(row, batch) if len(batch) != 1 else (index_of(row, batch),)
    for i, t in enumerate(data):
        if t is not None:
            event = 2 - i % 2
            own = t.detach().expand(*batch, *t.shape[t.ndim - event :])[index] if batch else t.detach()
            wrong = own.isnan() | (own == -torch.inf) if i == 5 else ~own.isfinite()
            if bool(wrong.any()):
                first = wrong.nonzero()[0].tolist()
                return ValueError, f"has {own[tuple(first)].item()} in {NAMES[i]} at {first}; all data must be finite"
    status = int(numbers.status[row])
    if status == INFEASIBLE:
        ray = numbers.ray[row]
        ray = ray / ray.abs().sum()
        rows = (ray.abs() > 1e-9).nonzero().squeeze(-1).tolist()
        names = ", ".join(f"A[{i}]" if i < options.free else f"G[{i - options.free}]" for i in rows[:12])
        names += ", ..." if len(rows) > 12 else ""
        weights = ", ".join(f"{ray[i].item():.3g}" for i in rows[:12])
        if len(rows) == 1:
            return ConvergenceError, f"is infeasible: the row {names} is zero, and its right side cannot be met"
        return ConvergenceError, (
            f"is infeasible: the constraints {names} contradict each other (weighted by {weights} their left sides "
            'cancel and their right sides add up to less than zero); loosen one of them, or pass on_fail="nan"'
        )
    if status == INDEFINITE:
        H = data[0].detach().expand(*batch, *data[0].shape[-2:])[index] if batch else data[0].detach()  # type: ignore[union-attr]
        low = torch.linalg.eigvalsh(((H + H.mT) / 2).double())[0].item()
        return ValueError, (
            f"has a Q that is not positive semidefinite: its least eigenvalue is {low:.3g}; "
            "add a multiple of the identity to Q"
        )
    if status == UNBOUNDED:
        return ConvergenceError, (
            "is unbounded below: c falls along a direction where Q is zero and no constraint ends it; bound x by "
            "constraints, or add a multiple of the identity to Q"
        )
    if status == NOT_UNIQUE:
        return ConvergenceError, (
            "has no unique solution, so that it has no derivative: Q is singular along a direction that the active "
            "constraints leave free; add a small multiple of the identity to Q"
        )
    if status == NOT_FINITE:
        return ValueError, "overflows: rescale the data"
    if status == STOPPED:
        return ConvergenceError, f"is not solved after {int(numbers.iterations[row])} steps; raise max_iter"
    assert status == INACCURATE
    return ConvergenceError, (
        f"is solved with a residual of {numbers.residual[row].item():.1e} only, above {options.tol:.1e}: "
        "it is badly conditioned; rescale it, or loosen rtol"
    )
