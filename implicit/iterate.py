"""What all solvers share: options, failure policy, how the answer gets its derivatives. The loop is in ``_loop``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._closure import System, eager, own_casts, raw
from ._jacobian import Adjoint, check_on_fail
from ._loop import Info, Method, Problem, Tolerance, iterate, iterate_one, samples, some, unroll
from ._pytree import Unknown
from .adjoint import Gradient, Unroll, check_count, verify
from .linear import ConvergenceError, LinearReport, LinearSolver


def report(info: Info, tol: Tensor | float, name: str, on_fail: str, max_iter: int) -> None:
    """Raise or warn if a sample did not converge."""
    if on_fail not in ("raise", "warn") or not some(~info.converged):
        return
    bad = ~raw(info.converged)
    tols = raw(tol) if isinstance(tol, Tensor) else torch.tensor(tol)
    residual, tolerance, count = (t.expand(bad.shape)[bad] for t in (raw(info.residual), tols, raw(info.iterations)))
    worst = int(residual.argmax())
    stopped = int(count[worst]) < max_iter
    hint = (
        "its residual was no longer finite, or no step was left to try: start nearer to a solution, damp the steps, or "
        "loosen rtol"
        if stopped
        else ("raise max_iter, loosen rtol and atol, start nearer to a solution, or try another method")
    )
    message = (
        f"{name} did not converge{samples(bad)}: residual {residual[worst].item():.2e}, tolerance "
        f"{tolerance[worst].item():.2e}, after {int(count[worst])} iterations; {hint}"
    )
    if on_fail == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@dataclass(frozen=True, eq=False)
class Common:
    """The options that all solvers share."""

    linear: LinearSolver
    grad: Gradient
    rtol: float | None = None
    atol: float | None = None
    max_iter: int | None = None
    on_fail: str = "raise"
    batch_dims: int = 0
    has_aux: bool = False
    info: bool = False
    in_dims: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        check_on_fail(self.on_fail)
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(f"linear must be a linear solver such as Auto(), got {self.linear!r}")
        if not isinstance(self.grad, Gradient):
            raise TypeError(
                f"grad must be Implicit(), OneStep(), Phantom(), Truncated() or Unroll(), got {self.grad!r}"
            )
        if self.max_iter is not None:
            check_count(self.max_iter, "max_iter")


@own_casts()
def solve(
    function: Callable[..., Any],
    z0: Any,
    args: tuple,
    kwargs: dict[str, Any],
    method: Method,
    methods: tuple[type[Method], ...],
    common: Common,
    name: str,
) -> Any:
    """Run ``method``, one of ``methods``, and give its answer the derivatives that ``common.grad`` names."""
    if not isinstance(method, methods):
        known = ", ".join(kind.__name__ for kind in methods)
        raise TypeError(f"the method of {name} must be one of {known}, got {method!r}")
    if isinstance(common.grad, Unroll) and not method.differentiable:
        raise ValueError(f"the steps of {method!r} are constant, there is nothing to unroll: use grad=Implicit()")
    fixed_point = name == "fixed_point"
    unknown = Unknown(z0, common.batch_dims)
    system = System(function, unknown, args, kwargs, fixed_point=fixed_point, has_aux=common.has_aux)
    tolerance = Tolerance.make(common.rtol, common.atol, unknown.dtype, fixed_point)
    max_iter = common.max_iter or method.steps
    start = unknown.initial.detach()
    problem = Problem(system, common.linear, in_dims=checked_dims(common, args))
    loop = iterate_one if problem.single else iterate
    with torch.no_grad():
        z, info, tol = loop(problem, method, start, tolerance, max_iter)
        z = z.detach()
    report(info, tol, f"{name} ({type(method).__name__})", common.on_fail, max_iter)

    def on_report(adjoint: LinearReport) -> None:
        info.adjoint = adjoint

    if isinstance(common.grad, Unroll):
        live = Problem(system, common.linear, True)
        z = unroll(live, method, unknown.initial, info.iterations, common.grad.checkpoint)
    else:
        z = common.grad.attach(z, system, Adjoint(common.linear, common.on_fail, on_report if common.info else None))
    if common.on_fail == "nan":
        # not torch.where: the gradient of a sample that failed must be NaN too
        z = z * torch.where(info.converged, 1.0, torch.nan).to(z.dtype).unsqueeze(-1)
    out = [unknown.unpack(z)]
    if common.has_aux:
        out.append(detached(system.aux))
    if common.info:
        out.append(info)
    return out[0] if len(out) == 1 else tuple(out)


def checked_dims(common: Common, args: tuple) -> tuple[int | None, ...] | None:
    """``in_dims``, where samples may be dropped; under torch.func all are evaluated to the end."""
    dims = common.in_dims
    if dims is None:
        return None
    fits = isinstance(dims, tuple) and len(dims) == len(args) and all(d is None or isinstance(d, int) for d in dims)
    if not fits or common.batch_dims != 1 or common.has_aux:
        raise ValueError(
            f"in_dims names, for each of the {len(args)} arguments, the dim that numbers samples or None, "
            f"and needs batch_dims=1 and has_aux=False; got {dims!r}, batch_dims={common.batch_dims}"
        )
    return dims if eager() else None


def decorate(
    function: Callable[..., Any],
    linear: LinearSolver,
    has_aux: bool,
    grad: Gradient,
    batch_dims: int,
    check: bool,
    fixed_point: bool,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What custom_root and custom_fixed_point do."""
    Common(linear, grad)
    if not callable(function):
        raise TypeError(f"expected the function that defines the solution, got {type(function).__name__}")

    def decorator(solver: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solver)
        def wrapper(z0: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(grad, Unroll):
                return solver(z0, *args, **kwargs)
            with torch.no_grad():
                z = solver(*detached((z0, *args)), **detached(kwargs))
            z, aux = z if has_aux else (z, None)
            unknown = Unknown(z, batch_dims)
            system = System(function, unknown, args, kwargs, fixed_point=fixed_point)
            if check:
                verify(unknown.initial, system)
            out = unknown.unpack(grad.attach(unknown.initial, system, Adjoint(linear)))
            return (out, aux) if has_aux else out

        return wrapper

    return decorator


def detached(tree: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
