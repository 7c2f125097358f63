"""Batched dense quadratic programmes, exact, differentiable in all of their data and in the multipliers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._closure import eager
from ._jacobian import check_on_fail
from ._qp_batch import flatten, solve_batch, solve_opaque
from ._qp_kkt import Attached, differentiate, shaped, stack_rows
from ._qp_report import report
from ._qp_status import DEPENDENT, SOLVED
from .adjoint import check_count


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


def check_data(data: dict[str, Tensor | None]) -> torch.Size:
    """Raise for what is no QP; returns the batch's shape."""
    Q = data["Q"]
    for name, t in data.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be real floating point, got {t.dtype}; convert it")
        if t.dtype != Q.dtype or t.device != Q.device:  # type: ignore[union-attr]
            raise TypeError(f"{name} must be {Q.dtype} on {Q.device} as Q is, got {t.dtype} on {t.device}")  # type: ignore[union-attr]
    for matrix, vector in (("A", "b"), ("G", "h")):
        if (data[matrix] is None) != (data[vector] is None):
            raise ValueError(f"{matrix} and {vector} must be given together, or both be None")
    if Q is None or Q.ndim < 2 or Q.shape[-1] != Q.shape[-2]:
        raise ValueError(f"Q must have shape (..., n, n), got {None if Q is None else tuple(Q.shape)}")
    n = Q.shape[-1]
    heads = [Q.shape[:-2]]
    for name, event, form in (
        ("c", (n,), "(..., n)"),
        ("A", (None, n), "(..., p, n)"),
        ("b", (None,), "(..., p)"),
        ("G", (None, n), "(..., m, n)"),
        ("h", (None,), "(..., m)"),
    ):
        t = data[name]
        if t is None and name == "c":
            raise TypeError("c must be a tensor, got NoneType")
        if t is None:
            continue
        if name in "bh":
            event = (data["A" if name == "b" else "G"].shape[-2],)  # type: ignore[union-attr]
        if t.ndim < len(event) or any(e not in (None, s) for e, s in zip(event, t.shape[-len(event) :], strict=True)):
            size = f", here {name}.shape[-1] = {event[-1]}" if event[-1] is not None else ""
            raise ValueError(f"{name} must have shape {form} with n = {n}{size}; got {tuple(t.shape)}")
        heads.append(t.shape[: t.ndim - len(event)])
    if all(head == heads[0] for head in heads):
        return heads[0]
    try:
        return torch.broadcast_shapes(*heads)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in data.items() if t is not None)
        raise ValueError(f"the batch dims must broadcast; got {shapes}") from None


def tolerance(rtol: float | None, atol: float | None, dtype: torch.dtype) -> float:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and (isinstance(value, bool) or not value >= 0):
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    default = 1e-11
    return max(default if rtol is None else float(rtol), atol or 0.0, 4 * 2.0**-52)


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
        tensor([0.1500, 0.8500], grad_fn=<AttachedBackward>)
    """
    data = {"Q": Q, "c": c, "A": A, "b": b, "G": G, "h": h}
    batch = check_data(data)
    check_on_fail(on_fail)
    if max_iter is not None:
        check_count(max_iter, "max_iter")
    tol = tolerance(rtol, atol, Q.dtype)
    free = 0 if A is None else A.shape[-2]
    k = free + (0 if G is None else G.shape[-2])
    steps = max_iter or 10 * (Q.shape[-1] + k) + 100
    values = (Q, c, A, b, G, h)
    if eager():
        numbers = solve_batch(flatten(values, batch), free, tol, steps)
        if on_fail != "ignore":
            report(numbers, values, batch, free, tol, on_fail)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in values):
            x, dual_eq, dual_ineq = Attached.apply(numbers, batch, free, *values)
        else:
            x, dual_eq, dual_ineq = shaped(numbers, batch, free, Q.dtype)
        fields: Any = (numbers.status, numbers.iterations, numbers.residual, numbers.margin)
        status, iterations, residual, margin = (v.reshape(batch) for v in fields)
    else:
        x, lam, active, status, iterations, residual, margin = solve_opaque(values, batch, free, tol, steps, on_fail)
        x, dual_eq, dual_ineq = differentiate(values, x, lam, active, free, k)
    converged = (status == SOLVED) | (status == DEPENDENT)
    if on_fail == "nan":
        # not torch.where: the gradient of a problem that failed must be NaN too
        scale = torch.where(converged, 1.0, torch.nan).to(x.dtype).unsqueeze(-1)
        x, dual_eq, dual_ineq = x * scale, dual_eq * scale, dual_ineq * scale
    info = QPInfo(converged, iterations, residual.to(x.dtype), margin.to(x.dtype))
    return QPSolution(x, dual_eq, dual_ineq, info)
