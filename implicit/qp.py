"""Batched dense quadratic programmes, exact, differentiable in all of their data and in the multipliers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._closure import eager
from ._jacobian import check_on_fail
from ._qp_batch import Data, flatten, solve_batch, solve_opaque
from ._qp_kkt import ActiveSet, differentiate, shaped
from ._qp_report import NAMES, report
from ._qp_status import Options
from .adjoint import check_count

RTOL = 1e-11  # in float64, in which everything is done


class QPInfo(NamedTuple):
    """How the problems of a :func:`qp` went.

    Attributes:
        converged: bool.
        iterations: steps of the active-set method.
        residual: violation of the optimality conditions, relative to the size of their terms.
        margin: min over the inequalities of |dual| where it is active and |slack| where it is not; as far as it is
            above rounding, the solution is differentiable. Infinite without inequalities.
    """

    converged: Tensor
    iterations: Tensor
    residual: Tensor
    margin: Tensor


class QPSolution(NamedTuple):
    """The solution of a :func:`qp`: x (..., n), dual_eq (..., p), dual_ineq (..., m) >= 0, and a QPInfo."""

    x: Tensor
    dual_eq: Tensor
    dual_ineq: Tensor
    info: QPInfo


def check_data(data: Data) -> torch.Size:
    """Raise for what is no QP; returns the batch's shape."""
    Q, _, A, b, G, h = data
    for name, t in zip(NAMES, data, strict=True):
        if t is None and name not in "Qc":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype != Q.dtype or t.device != Q.device:  # type: ignore[union-attr]
            raise TypeError(f"{name} must be {Q.dtype} on {Q.device} as Q is, got {t.dtype} on {t.device}")  # type: ignore[union-attr]
    assert Q is not None
    if not Q.is_floating_point():
        raise TypeError(f"Q must be real floating point, got {Q.dtype}; convert all data")
    if (A is None) != (b is None) or (G is None) != (h is None):
        raise ValueError("A and b must be given together or both be None, and so must G and h")
    if Q.ndim < 2 or Q.shape[-1] != Q.shape[-2]:
        raise ValueError(f"Q must have shape (..., n, n), got {tuple(Q.shape)}")
    n = Q.shape[-1]
    heads = [Q.shape[:-2]]
    rows = n  # of the matrix before the vector
    for i, t in enumerate(data):
        if t is None or i == 0:
            continue
        shape, event = t.shape, 2 - i % 2
        if len(shape) < event or shape[-1] != (rows if event == 1 else n):
            form = f"(..., {rows})" if event == 1 else f"(..., rows, {n})"
            raise ValueError(f"{NAMES[i]} must have shape {form} to go with {NAMES[i - 1]}, got {tuple(shape)}")
        rows = shape[-2] if event == 2 else n
        heads.append(shape[:-event])
    first = heads[0]
    if all(head == first for head in heads):
        return first
    try:
        return torch.broadcast_shapes(*heads)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(NAMES, data, strict=True) if t is not None)
        raise ValueError(f"the batch dims must broadcast; got {shapes}") from None


def tolerance(rtol: float | None, atol: float | None) -> float:
    if rtol is None and atol is None:
        return RTOL
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and (isinstance(value, bool) or not value >= 0):
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return max(RTOL if rtol is None else float(rtol), atol or 0.0, 4 * 2.0**-52)


def qp(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_iter: int | None = None,
    on_fail: str = "raise",
) -> QPSolution:
    """argmin_x x'Qx/2 + c'x subject to Ax = b, Gx <= h, with exact derivatives in all six and of the multipliers.

    Args:
        Q, c, A, b, G, h: (..., n, n), (..., n), (..., p, n), (..., p), (..., m, n), (..., m); batch dims broadcast.
            Of Q only the symmetric part counts. An infinite h is no bound.
        rtol, atol: largest violation of the optimality conditions, relative to their terms; 1e-11.
        max_iter: of rows that enter or leave the active set; ten times the number of rows and unknowns.
        on_fail: ``"raise"``, ``"warn"``, ``"nan"`` (in the problems that failed) or ``"ignore"``.

    Returns: QPSolution(x, dual_eq, dual_ineq, info).
    Raises: ConvergenceError: infeasible, unbounded, not unique. ValueError: Q is not positive semidefinite, NaN.
    Complexity: O(n^3 + n^2 m + n m^2). Source: Goldfarb, Idnani 1983; Amos, Kolter 2017.

    Example:
        >>> y = torch.tensor([0.8, 1.5], requires_grad=True)
        >>> implicit.qp(torch.eye(2), -y, G=torch.ones(1, 2), h=torch.ones(1)).x
        tensor([0.1500, 0.8500], grad_fn=<ActiveSetBackward>)
    """
    data = (Q, c, A, b, G, h)
    batch = check_data(data)
    check_on_fail(on_fail)
    if max_iter is not None:
        check_count(max_iter, "max_iter")
    free = 0 if A is None else A.shape[-2]
    k = free + (0 if G is None else G.shape[-2])
    options = Options(free, tolerance(rtol, atol), max_iter or 10 * (Q.shape[-1] + k) + 100)
    if eager():
        numbers = solve_batch(flatten(data, batch), options)
        failed = numbers.failed > 0
        if failed:
            report(numbers, data, batch, options, on_fail)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in data):
            x, dual_eq, dual_ineq = ActiveSet.apply(numbers, batch, free, *data)
        else:
            x, dual_eq, dual_ineq = shaped(numbers, batch, free, Q.dtype)
        each = [numbers.converged, numbers.iterations, numbers.residual, numbers.margin]
        if len(batch) != 1:
            each = [v.reshape(batch) for v in each]
    else:
        failed = True  # perhaps: nobody can look
        x, lam, active, *each = solve_opaque(data, batch, options, on_fail)
        x, dual_eq, dual_ineq = differentiate(data, x, lam, active, free, k)
    if failed and on_fail == "nan":
        # not torch.where: the gradient of a problem that failed must be NaN too
        scale = torch.where(each[0], 1.0, torch.nan).to(x.dtype).unsqueeze(-1)
        x, dual_eq, dual_ineq = x * scale, dual_eq * scale, dual_ineq * scale
    return QPSolution(x, dual_eq, dual_ineq, QPInfo(each[0], each[1], each[2].to(Q.dtype), each[3].to(Q.dtype)))
