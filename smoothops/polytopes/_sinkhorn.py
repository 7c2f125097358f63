"""Potentials of entropic transport, found without gradient: Sinkhorn sweeps, annealing, Newton steps where slow.

Notation and masses as in ``_kernel``. A sweep scales the rows, then the columns of E; it is two products of a vector
and a matrix, and lowers the error sum b |1 - c| by a factor that tends to 1 as eps -> 0. So the temperature comes down
in steps, from a z of small range, the potentials of one being the start of the next; and where sweeps are slow, Newton
steps on v, quadratic, take over. On the CPU ``kernels.cpu_sinkhorn`` does the same with one matrix after the other, and
leaves to torch what it cannot finish.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .._opaque import batch_shape, opaque
from ._assignment import feasible
from ._kernel import COMPILED_DIRECT, Kernel, cg_steps, cut, even, massive
from ._potentials import solved, solved_like

SPAN = 50.0  # the range of z at which annealing starts: kernels within e^-50 need few sweeps
ANNEAL = 5.0  # the factor from one temperature to the next
COARSE = 1e-2  # the error at which the next temperature is entered
SWEEPS = 5  # between two looks at the error
NEAR = 0.5  # the error below which Newton steps are tried
INEXACT = 1e-4  # the relative residual of the linear system of a Newton step
TRUST = 3.0  # the largest change of a potential in a Newton step
SAME = 1 + 1e-9  # parts that hardly meet: Newton steps must move them far before the error shows it
DRIFT = 50.0  # the change of a potential from which on E is made anew: less loses none of its digits
PATIENCE = 25.0  # compiled sweeps that take as long as a Newton step
BLOCK = 2**18  # entries of the matrices that are swept together: two such kernels stay in the cache
UNRESOLVED = 1e-6  # rounding of the potentials above which their matrix would be meaningless


Options = tuple[float, int, str, bool]  # tol, max_iter, on_fail, anneal


class Solved(NamedTuple):
    """The plan and the potentials of each matrix, its error, the bound on that, and the number of sweeps."""

    plan: Tensor
    u: Tensor
    v: Tensor
    error: Tensor
    bound: Tensor
    sweeps: Tensor


class Start(NamedTuple):
    """Where a matrix comes from: potentials at the temperature ``sigma``, 0 for none, their error, sweeps done."""

    v: Tensor
    sigma: Tensor
    error: Tensor
    sweeps: Tensor


def solve(
    z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, anneal: bool, start: Start | None = None
) -> Solved:
    """For z (rows, n, m), and masses (rows, n, 1), (rows, 1, m) that sum to 1; from a large eps on if ``anneal``."""
    rows = _Rows(z, a, b, tol, anneal, start)
    budget = max_iter if start is None else max_iter - int(start.sweeps.max())
    while rows.live.numel() and rows.steps < budget:
        rows.sweep(min(SWEEPS, budget - rows.steps))
    rows.stop()
    rows.settle(torch.ones_like(rows.live, dtype=torch.bool))
    found: Solved = rows.found
    return found


def _unmoved(z: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """v, where columns without mass have the potentials that make their means under a exact."""
    x = torch.where(a > 0, z - u + a.log(), -torch.inf).logsumexp(-2, keepdim=True)
    return torch.where(b > 0, v, torch.where(x.isfinite(), x, 0))


class _Rows:
    """The matrices that have not converged yet, each at its own temperature ``sigma``.

    The kernel is that of z/sigma, u and v; t is the scaling of its columns since it was made.
    """

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, tol: float, anneal: bool, start: Start | None) -> None:
        low, high = z.amin((1, 2)).unsqueeze(-1), z.amax((1, 2)).unsqueeze(-1)
        self.massive = massive(a, b)
        if not self.massive or not bool(low.isfinite().all()):
            counts = (z > -torch.inf) & (a > 0) & (b > 0)
            high = torch.where(counts, z, -torch.inf).flatten(1).amax(-1, True)
            low = torch.where(counts, z, torch.inf).flatten(1).amin(-1, True)
            high, low = (torch.where(end.isfinite(), end, 0) for end in (high, low))
        span = (high - low).squeeze(-1)
        if not anneal:  # the pairs that matter lie close to 0
            span = span.clamp(max=SPAN)
        rounding = torch.finfo(z.dtype).eps * (1 + span)
        self.tol = (2 * rounding).clamp(min=tol)
        self.live = torch.arange(len(z), device=z.device)
        self.z, self.a, self.b = z, a, b
        self.sigma = (span / SPAN).clamp(min=1)
        self.v = torch.zeros_like(z[:, :1])
        self.last = torch.full_like(span, torch.inf)
        self.more = torch.zeros_like(span)  # sweeps done before, and Newton steps
        self.steps = 0
        self.found: Any = None  # a Solved, made when the first matrix is done
        if start is not None:
            begun = start.sigma > 0
            self.v, self.more = start.v.clone(), start.sweeps.clone()
            self.sigma, self.last = (
                torch.where(begun, start.sigma, self.sigma),
                torch.where(begun, start.error, self.last),
            )
        self._renew(None, self._kernel(None, None if start is None else self.v))
        nothing = (b == 0).all(-1).flatten()
        self.last[nothing] = 0
        self.settle((rounding >= UNRESOLVED) | nothing)

    def _kernel(self, i: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """to_columns, to_rows and u of the matrices ``i`` (None: all) at v (None: 0)."""
        z, a, b, sigma = (x if i is None else x[i] for x in (self.z, self.a, self.b, self.sigma))
        x = z if bool((sigma == 1).all()) else z / sigma.reshape(-1, 1, 1)
        x = x if v is None else x - v
        if not self.massive:
            x = torch.where(b > 0, x, -torch.inf)
        u = x.amax(-1, keepdim=True)
        u = torch.where(u > -torch.inf, u, 0)
        to_columns = (x - u).exp_()
        to_rows = to_columns.mT.contiguous()
        mean = torch.bmm(b, to_rows)
        mean = torch.where(mean > 0, mean, 1)  # a row where all is forbidden
        return to_columns.mul_(a / mean.mT), to_rows.mul_(b.mT / mean), u + mean.mT.log()

    def _renew(self, i: Tensor | None, kernel: tuple[Tensor, Tensor, Tensor]) -> None:
        """Takes a new kernel for the matrices ``i``, those at their v."""
        if i is None or len(i) == len(self.live):
            self.to_columns, self.to_rows, self.u = kernel
            self.t = torch.ones_like(self.v)
        else:
            self.to_columns[i], self.to_rows[i], self.u[i] = kernel
            self.t[i] = 1

    def sweep(self, number: int) -> None:
        t, tiny = self.t, torch.finfo(self.t.dtype).tiny
        for _ in range(number):
            before, columns = t, torch.bmm(torch.bmm(t, self.to_rows).clamp_(min=tiny).reciprocal_(), self.to_columns)
            t = columns.clamp(min=tiny).reciprocal_()
            if not self.massive:
                t = torch.where(self.b > 0, t, 1)
        self.t = t
        self.steps += number
        # the error before the last step, which lowers it
        self._judge((self.b * (1 - before * columns).abs()).sum((1, 2)), number)

    def _judge(self, error: Tensor, number: int) -> None:
        """Decides what comes next for each matrix: more sweeps, Newton steps, a lower temperature, or nothing."""
        coarse = self.sigma > 1
        target = torch.where(coarse, COARSE, self.tol)
        rate = (error / self.last).log() / number
        left = (target / error).log() / rate.clamp(max=-1e-9)
        self.last = error
        patience = 10 + self.z.shape[-1] / 6  # sweeps that take as long as a Newton step
        slow = (error >= target) & (error < NEAR) & (left > patience)
        far = self.t.log().abs().amax((1, 2)) > DRIFT
        reached = error < target
        if bool((slow | far).any()):
            i = (slow | far).nonzero().squeeze(-1)
            self.v[i] = self.v[i] - self.t[i].log()
            self._renew(i, self._kernel(i, self.v[i]))
            i = slow.nonzero().squeeze(-1)
            for _ in range(3):
                if not i.numel():
                    break
                i = self._newton(i, target)
            reached = self.last < target
        self._cool((reached & coarse).nonzero().squeeze(-1))
        self.settle(reached & ~coarse)

    def _newton(self, i: Tensor, target: Tensor) -> Tensor:
        """A Newton step for the matrices ``i`` where it lowers the error; those for which another one makes sense."""
        b = self.b[i]
        kernel = Kernel(self.to_columns[i], self.to_rows[i], b)
        step = kernel.solve(kernel.columns - 1, INEXACT)
        step = torch.where((b > 0) & step.isfinite(), step, 0)
        v = self.v[i] + step * (TRUST / step.abs().amax(-1, keepdim=True)).clamp(max=1)
        moved = self._kernel(i, v)
        error = Kernel(*moved[:2], b).error
        better = error < self.last[i] * SAME
        self.more[i] += 1
        i = i[better]
        self.v[i], self.last[i] = v[better], error[better]
        self._renew(i, (moved[0][better], moved[1][better], moved[2][better]))
        return i[self.last[i] >= target[i]]

    def stop(self) -> None:
        """Leaves the plans of the potentials that there are, at the temperature asked for."""
        i = (self.sigma > 1).nonzero().squeeze(-1)
        if i.numel():
            self._cool(i, torch.inf)
            self.last[i] = Kernel(self.to_columns[i], self.to_rows[i], self.b[i]).error

    def _cool(self, i: Tensor, factor: float = ANNEAL) -> None:
        if not i.numel():
            return
        sigma = (self.sigma[i] / factor).clamp(min=1)
        self.v[i] = (self.v[i] - self.t[i].log()) * (self.sigma[i] / sigma).reshape(-1, 1, 1)
        self.sigma[i], self.last[i] = sigma, torch.inf
        self._renew(i, self._kernel(i, self.v[i]))

    def settle(self, which: Tensor) -> None:
        """Hands out the matrices in ``which`` and drops them."""
        if not bool(which.any()):
            return
        s = torch.bmm(self.t, self.to_rows).clamp_(min=torch.finfo(self.t.dtype).tiny).reciprocal_().mT
        u, v, sweeps = self.u - s.log(), self.v - self.t.log(), self.steps + self.more
        like, columns = (u, v, self.last, self.tol, sweeps), self.t * self.b
        whole = self.found is None and bool(which.all())
        if whole:
            self.found = Solved(self.to_columns.mul_(s).mul_(columns), *like)
        else:
            if self.found is None:
                self.found = Solved(*(torch.empty_like(x) for x in (self.to_columns, *like)))
            given = (self.to_columns[which].mul_(s[which]).mul_(columns[which]), *(x[which] for x in like))
            for out, x in zip(self.found, given, strict=True):
                out[self.live[which]] = x
        keep = ~which
        for name in ("live", "z", "a", "b", "u", "v", "to_columns", "to_rows", "t", "sigma", "tol", "last", "more"):
            setattr(self, name, getattr(self, name)[keep])


def as_matrices(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n or 1, m or 1) as (rows, n or 1, m or 1) with their batch dims broadcast."""
    batch = batch_shape(*(t.flatten(-2) for t in tensors))
    return batch, [t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in tensors]


def _fake(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    v = x.new_empty(*batch_shape(*(t.flatten(-2) for t in (x, eps, a, b))), 1, x.shape[-1])
    return v, solved_like(x, eps, a, b)


@opaque(
    "sinkhorn(Tensor x, Tensor eps, Tensor a, Tensor b, float tol, int max_iter, str on_fail, bool anneal) "
    "-> (Tensor, Tensor)",
    _fake,
)
def sinkhorn(
    x: Tensor, eps: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, on_fail: str, anneal: bool
) -> tuple[Tensor, Tensor]:
    """v (..., 1, m) and how it went, as an operator that torch.compile and vmap carry."""
    batch, given = as_matrices(x, eps, a, b)
    found = transported([*given, torch.ones_like(given[1])], (tol, max_iter, on_fail, anneal))
    return found.v.reshape(*batch, 1, x.shape[-1]), solved(found.error, found.bound, found.sweeps, batch)


def block_size(x: Tensor) -> int:
    """How many matrices torch sweeps together."""
    return max(1, BLOCK // max(1, x.shape[-2:].numel())) if x.device.type == "cpu" else max(1, len(x))


def transported(given: Sequence[Tensor], options: Options) -> Solved:
    """The solutions for theta, eps, a, b and the mass (rows, ...), by the compiled sweeps as far as these go."""
    x, eps, a, b, mass = given
    tol, max_iter, on_fail, anneal = options
    if not x.numel():
        none = x.new_zeros(len(x))
        return Solved(x, x.new_zeros(*x.shape[:-1], 1), x.new_zeros(len(x), 1, x.shape[-1]), none, none + tol, none)
    fast = kernels.compiled_sinkhorn() if x.device.type == "cpu" and x.dtype == torch.float64 else None
    if fast is None:
        parts = [_swept([t[i] for t in given], options, None) for i in _parts(x, len(x))]
        found = Solved(*(torch.cat(t) for t in zip(*parts, strict=True)))
    else:
        drift = float(torch.tensor(DRIFT).exp())
        rules = (ANNEAL, COARSE, NEAR, PATIENCE, drift, INEXACT, cg_steps(x.shape[-1]), TRUST)
        *known, sigma, done = fast.solve(
            x, eps, a, b, mass, tol, max_iter, anneal, SPAN, UNRESOLVED, COMPILED_DIRECT, rules
        )
        found = Solved(*known)
        left = (~done).nonzero().squeeze(-1)
        for part in _parts(x, len(left)):
            i = left[part]
            start = Start(found.v[i], sigma[i], found.error[i], found.sweeps[i])
            for out, t in zip(found, _swept([t[i] for t in given], options, start), strict=True):
                out[i] = t
    if not massive(b):
        found = found._replace(v=_unmoved(x / eps, a, b, found.u, found.v))
    fail(found.error, found.bound, found.sweeps, x, a, b, on_fail)
    return found


def _parts(x: Tensor, number: int) -> list[slice]:
    size = block_size(x)
    return [slice(first, min(first + size, number)) for first in range(0, number, size)]


def _swept(given: Sequence[Tensor], options: Options, start: Start | None) -> Solved:
    """:func:`solve` on matrices of even size."""
    x, eps, a, b, mass = given
    tol, max_iter, _, anneal = options
    n, m = x.shape[-2:]
    if start is not None:
        start = start._replace(v=even(start.v, rows=False))
    found = solve(
        even(x / eps, -torch.inf), even(a, columns=False), even(b, rows=False), tol, max_iter, anneal, start
    )  # fmt: skip
    return found._replace(plan=cut(found.plan, n, m) * mass, u=cut(found.u, n, 1), v=cut(found.v, 1, m))


def fail(error: Tensor, bound: Tensor, sweeps: Tensor, x: Tensor, a: Tensor, b: Tensor, on_fail: str) -> None:
    """Raises or warns where the error of a matrix is not below its bound."""
    failed = ~(error < bound)
    if on_fail == "ignore" or not bool(failed.any()):
        return
    i = int(failed.nonzero()[0])
    message = f"{int(failed.sum())} of {len(failed)} matrices, the first at index {i} of the flattened batch, "
    message += _cause(x[i] > -torch.inf, a[i, :, 0], b[i, 0], error[i].item(), bound[i].item(), int(sweeps[i]))
    if on_fail == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _cause(allowed: Tensor, a: Tensor, b: Tensor, error: float, bound: float, sweeps: int) -> str:
    """Why a matrix has not converged, and what to do."""
    if not feasible(allowed, a, b):
        return "forbid too much: theta = -inf leaves no P >= 0 with the marginals a and b"
    if error == float("inf"):
        return "span a range of theta/eps beyond what float64 resolves; use a larger eps, or so.Hard()"
    return (
        f"have not converged: marginal error {error:.1e} after {sweeps} steps, wanted {bound:.1e}; use a larger eps, "
        "or Sinkhorn(tol=..., max_iter=..., on_fail=...) as solver of Entropy"
    )
