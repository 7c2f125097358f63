"""The one loop: every iterative method is a start and a step; convergence and freezing are handled here.

A sample is one of the problems that ``batch_dims`` numbers. Each converges by its own test and is frozen from then on;
one whose residual is no longer finite is stopped where it last was, and has converged only if that is as near to a
solution as rounding allows. No reduction runs over samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._closure import System, eager, raw
from ._jacobian import Jacobian, distance, jacobian
from ._pytree import Unknown
from .linear import LinearReport, LinearSolver
from .operator import apply_matrix, norm, units

# a residual that no longer falls, this many units in the last place of z from a solution: rounding, not failure
ROUNDING = 1e3
PATIENCE = 3


@dataclass(eq=False)
class Info:
    """How a solver went, for each sample.

    Attributes:
        converged: bool.
        iterations: steps taken.
        residual: |F(z)|, or |f(z) - z|.
        adjoint: the LinearReport of the last adjoint solve: None before a backward, and in modes without one.

    Example:
        >>> z, info = implicit.fixed_point(torch.cos, torch.tensor(1.0), info=True)
        >>> info.converged
        tensor(True)
    """

    converged: Tensor
    iterations: Tensor
    residual: Tensor
    adjoint: LinearReport | None = None


class Problem:
    """F as a method sees it: numbers, or with ``live`` differentiable, on z of shape (..., n)."""

    def __init__(self, system: System, linear: LinearSolver, live: bool = False, in_dims: Any = None) -> None:
        self.system, self.linear, self.live, self.in_dims = system, linear, live, in_dims
        self.fixed_point = system.fixed_point
        # in plain eager mode the loop runs without a graph anyway; elsewhere tangents must be cut off
        self.keep = live or eager()
        self.single = self.keep and not live and not system.unknown.batch_dims and system.unknown.device.type == "cpu"
        self.plain = False
        self.sized: Tensor | None = None
        self.length = 0.0
        self.done: Tensor | None = None  # the samples that are frozen

    def __call__(self, z: Tensor) -> Tensor:
        if self.plain:
            return self.system.live(z)
        r = self.system.first(z)
        # without side effects to undo nothing needs to be done around the user's function
        self.plain = self.keep and self.system.effects is not None and not self.system.effects.any
        return r if self.keep else r.detach()

    def rows(self, keep: Tensor) -> Problem:
        """The problem of the samples ``keep`` alone: ``in_dims`` says which dim of which argument numbers samples."""
        old, take = self.system, lambda t, d: t.index_select(d, keep) if isinstance(t, Tensor) and d is not None else t
        unknown = Unknown(tree_map(lambda t: t[keep], old.unknown.unpack(old.unknown.initial.detach())), 1)
        args = tuple(tree_map(lambda t, d=d: take(t, d), a) for a, d in zip(old.args, self.in_dims, strict=True))
        system = System(old.function, unknown, args, old.kwargs, fixed_point=old.fixed_point, has_aux=old.has_aux)
        system.effects = old.effects
        part = Problem(system, self.linear, in_dims=self.in_dims)
        part.plain = self.plain
        return part

    def settled(self, good: Tensor) -> Tensor:
        """``good``, or frozen already: nobody searches a step for such a sample."""
        return good if self.done is None else good | self.done

    def image(self, z: Tensor) -> Tensor:
        """f(z) of a fixed point."""
        return self.system.image(z) if self.plain else z - self(z)

    def size(self, v: Tensor) -> Any:
        """|v| without a derivative: a tensor for each sample, or a Python number where there is only one."""
        if not self.single:
            return norm(v.detach())
        if v is not self.sized:  # the loop and the method ask for the same one
            self.sized, self.length = v, torch.dot(v, v).item() ** 0.5
        return self.length

    def operator(self, z: Tensor) -> Jacobian:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return Jacobian(self.system.again(z), z)

    def jacobian(self, z: Tensor) -> Tensor:
        """J: (..., n, n)."""
        if eager() and not self.live:
            return self.operator(z).dense()
        if eager():  # torch.func cannot run inside a checkpoint
            z = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
            r = self.system.again(z)
            return torch.autograd.grad(r, z, units(z), create_graph=True, is_grads_batched=True)[0].movedim(0, -2)
        J = jacobian(self.system.again, z)
        return J if self.live else J.detach()

    def distance(self, z: Tensor, r: Tensor) -> Tensor:
        """A lower bound of the distance to a solution; half the step for a fixed point, as if f did not expand."""
        if self.fixed_point:
            return norm(r) / 2
        if eager():
            return distance(r, self.operator(z).rmatvec(r))
        return distance(r, apply_matrix(self.jacobian(z).mT, r))

    def rounded(self, z: Tensor, r: Tensor, size: Any) -> Tensor:
        """Whether z, whose size has been up to ``size``, may differ from a solution by rounding alone."""
        return self.distance(z, r) <= ROUNDING * torch.finfo(z.dtype).eps * size

    def direction(self, z: Tensor, r: Tensor) -> Tensor:
        """The Newton step -J^-1 r; where J is singular, the least-squares step of least norm."""
        if eager() and not self.live:
            op = self.operator(z)
            with torch.no_grad():
                d, report = self.linear.solve(op, -r)
            regular = report.converged & d.isfinite().all(-1)
        else:
            # not torch.linalg.solve: its second derivatives are wrong in forward mode
            J, op = self.jacobian(z), None
            inv, info = torch.linalg.inv_ex(J)
            d = -apply_matrix(inv, r)
            regular = (info == 0) & d.isfinite().all(-1)
        if not bool(raw(regular).all()):
            J = self.jacobian(z) if op is None else op.dense()
            J = torch.where(J.isfinite(), J, 0)
            safe = -(torch.linalg.pinv(J, rtol=1e-10 if J.dtype == torch.float64 else 1e-5) @ r.unsqueeze(-1))
            d = torch.where(regular.unsqueeze(-1), d, safe.squeeze(-1))
        return d


class Method(ABC):
    """An iterative method: a frozen object that holds only its parameters."""

    steps: ClassVar[int] = 1000  # max_iter where the user gives none
    by_residual: ClassVar[bool] = True  # whether a small residual at z0 is enough
    differentiable: ClassVar[bool] = True  # whether the steps depend on the arguments smoothly

    def start(self, f: Problem, z: Tensor, r: Tensor) -> Any:
        """The state before the first step: a pytree of tensors whose first dims are those of the batch."""
        return ()

    @abstractmethod
    def step(self, f: Problem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The next z, F there, and the next state, from z and r = F(z)."""

    def finished(self, z: Tensor, state: Any, tolerance: Tolerance) -> Tensor | None:
        """The method's own test of convergence for each sample; None: that of the residual."""
        return None


@dataclass(frozen=True, eq=False)
class Tolerance:
    """Converged where |r| <= absolute + rtol * scale. The scale is |z| for a fixed point, |F(z0)| for a root."""

    rtol: float
    atol: float | None
    fixed_point: bool

    @staticmethod
    def make(rtol: float | None, atol: float | None, dtype: torch.dtype, fixed_point: bool) -> Tolerance:
        default = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
        for name, value in (("rtol", rtol), ("atol", atol)):
            if value is not None and (isinstance(value, bool) or not value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        atol = default if atol is None and fixed_point else atol
        return Tolerance(default if rtol is None else float(rtol), atol, fixed_point)

    def __call__(self, z: Tensor, first: Tensor) -> Tensor:
        return self.number(norm(z) if self.fixed_point else first, first)

    def number(self, size: Any, first: Any) -> Any:
        return self.rtol * (size if self.fixed_point else first) + (self.atol or 0.0)


def some(mask: Any) -> bool:
    """Whether it holds for any sample."""
    return mask if isinstance(mask, bool) else bool(raw(mask).any())


def step_samples(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``mask``, a bool for each sample, else ``old``."""
    return torch.where(mask.unsqueeze(-1), new, old)


def iterate(f: Problem, method: Method, z: Tensor, tolerance: Tolerance, max_iter: int) -> tuple[Tensor, Info, Tensor]:
    """(z, info, tolerance of each sample) after at most ``max_iter`` steps from z."""
    r = f(z)
    size = norm(r)
    if some(~size.isfinite()):
        raise ValueError(f"the residual at z0 is not finite{samples(raw(~size.isfinite()))}; start from another z0")
    first, best, largest = size, size, norm(z)
    tol = tolerance(z, first)
    done = converged = size <= (tol if method.by_residual else -1)
    iterations = stalled = torch.zeros_like(size, dtype=torch.int64)
    state = method.start(f, z, r) if some(~done) else ()
    out, rows = [z, converged, iterations, size, tol], None
    for _ in range(max_iter):
        if not some(~done):
            break
        if f.in_dims is not None and 2 * int(done.sum()) >= len(done) and f.plain:
            # half of the evaluation would be for nothing: go on with the others alone
            out = write(out, rows, [z, converged, iterations, size, tol])
            keep = (~done).nonzero().squeeze(-1)
            rows = keep if rows is None else rows[keep]
            f = f.rows(keep)
            z, r, size, first, best, largest, tol, done, converged, iterations, stalled, state = tree_map(
                lambda t, keep=keep: t[keep] if isinstance(t, Tensor) else t,
                (z, r, size, first, best, largest, tol, done, converged, iterations, stalled, state),
            )
        f.done = done
        z_new, r_new, state = method.step(f, z, r, state)
        size_new, length = norm(r_new), norm(z_new)
        iterations = iterations + ~done
        finite = size_new.isfinite() & length.isfinite()
        active, moving, done = ~done, ~done & finite, done | ~finite
        z, r, size = step_samples(moving, z_new, z), step_samples(moving, r_new, r), torch.where(moving, size_new, size)
        stalled = torch.where(size < best, 0, stalled + 1)
        best, largest = torch.minimum(best, size), torch.where(moving, torch.maximum(largest, length), largest)
        tol = tolerance(z, first)
        now = method.finished(z, state, tolerance)
        converged = converged | (moving & (size <= tol if now is None else now))
        if now is None:
            waiting = active & ~converged & (~finite | (stalled >= PATIENCE))
            if some(waiting):
                converged = converged | (waiting & f.rounded(z, r, largest))
        done = done | converged
    z, converged, iterations, size, tol = write(out, rows, [z, converged, iterations, size, tol])
    return z, Info(converged, iterations, size), tol


def write(out: list[Tensor], rows: Tensor | None, values: list[Tensor]) -> list[Tensor]:
    """``values``, which belong to the samples ``rows``, among those of all samples."""
    return values if rows is None else [o.index_copy(0, rows, v) for o, v in zip(out, values, strict=True)]


def iterate_one(
    f: Problem, method: Method, z: Tensor, tolerance: Tolerance, max_iter: int
) -> tuple[Tensor, Info, float]:
    """:func:`iterate` for a single sample on the CPU, where Python's numbers are faster than torch's."""

    r = f(z)
    best = first = size = f.size(r)
    if not size < float("inf"):
        raise ValueError("the residual at z0 is not finite; start from another z0")
    largest = reach = f.size(z)
    tol = tolerance.number(largest, first)
    converged, iterations, stalled = size <= (tol if method.by_residual else -1), 0, 0
    state = () if converged else method.start(f, z, r)
    while not converged and iterations < max_iter:
        z_new, r_new, state = method.step(f, z, r, state)
        iterations += 1
        size_new = f.size(r_new)
        if not size_new < float("inf"):
            converged = method.by_residual and bool(f.rounded(z, r, largest))
            break
        z, r, size = z_new, r_new, size_new
        stalled = 0 if size < best else stalled + 1
        best = min(best, size)
        reach += 10 * size
        if stalled or size <= tolerance.number(reach, first):  # else |z| need not be known
            reach = f.size(z)
            if not reach < float("inf"):
                break
            largest, tol = max(largest, reach), tolerance.number(reach, first)
        now = method.finished(z, state, tolerance)
        converged = size <= tol if now is None else bool(now)
        if now is None and not converged and stalled >= PATIENCE:
            converged = bool(f.rounded(z, r, largest))
    info = Info(torch.tensor(converged), torch.tensor(iterations), torch.tensor(size, dtype=z.dtype))
    return z, info, tol


def unroll(f: Problem, method: Method, z: Tensor, iterations: Tensor, checkpoint: int | None) -> Tensor:
    """The steps that the solver took, once more and differentiable: ``checkpoint`` of them are recomputed at a time."""
    counts = raw(iterations)
    total = int(counts.max()) if counts.numel() else 0
    length = checkpoint or max(total, 1)
    r = f(z)
    state = method.start(f, z, r) if total else ()

    def segment(z: Tensor, r: Tensor, state: Any, begin: int, end: int) -> tuple[Tensor, Tensor, Any]:
        for k in range(begin, end):
            z_new, r_new, state = method.step(f, z, r, state)
            z, r = step_samples(iterations > k, z_new, z), step_samples(iterations > k, r_new, r)
        return z, r, state

    for begin in range(0, total, length):
        part = (z, r, state, begin, min(begin + length, total))
        if checkpoint is None:
            z, r, state = segment(*part)
        else:
            from torch.utils.checkpoint import checkpoint as recompute

            z, r, state = recompute(segment, *part, use_reentrant=False)
    return z


def samples(bad: Tensor) -> str:
    """Which samples, in words; nothing where there is only one."""
    if bad.ndim == 0:
        return ""
    which = bad.nonzero()
    shown = ", ".join(str(i[0] if len(i) == 1 else tuple(i)) for i in which[:8].tolist())
    return f" in {len(which)} of {bad.numel()} samples ({shown}{', ...' if len(which) > 8 else ''})"
