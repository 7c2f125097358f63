"""Potentials of entropic transport, found without gradient: Sinkhorn sweeps, annealing, Newton steps where slow.

Notation and masses as in ``_kernel``. A sweep scales the rows, then the columns of E; it is two products of a vector
and a matrix, and lowers the error sum b |1 - c| by a factor that tends to 1 as eps -> 0. So the temperature comes down
in steps, from a z of small range, the potentials of one being the start of the next; and where sweeps are slow, Newton
steps on v, quadratic, take over.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._opaque import batch_shape, opaque
from ._assignment import feasible
from ._kernel import Kernel, even, massive, scaled

SPAN = 50.0  # the range of z at which annealing starts: kernels within e^-50 need few sweeps
ANNEAL = 5.0  # the factor from one temperature to the next
COARSE = 1e-2  # the error at which the next temperature is entered
SWEEPS = 5  # between two looks at the error
NEAR = 0.5  # the error below which Newton steps are tried
INEXACT = 1e-4  # the relative residual of the linear system of a Newton step
TRUST = 3.0  # the largest change of a potential in a Newton step
DRIFT = 50.0  # the change of a potential from which on E is made anew: less loses none of its digits
BLOCK = 2**18  # entries of the matrices that are swept together: two such kernels stay in the cache
UNRESOLVED = 1e-6  # rounding of the potentials above which their matrix would be meaningless


Options = tuple[float, int, str, bool]  # tol, max_iter, on_fail, anneal


class Solved(NamedTuple):
    """The potentials and the kernel of each matrix, its error, the bound on that, and the number of sweeps."""

    u: Tensor
    v: Tensor
    to_columns: Tensor
    to_rows: Tensor
    error: Tensor
    tol: Tensor
    sweeps: Tensor


def solve(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, anneal: bool) -> Solved:
    """For z (rows, n, m), and masses (rows, n, 1), (rows, 1, m) that sum to 1; from a large eps on if ``anneal``."""
    if not z.numel():
        none, (number, n, m) = z.new_zeros(len(z)), z.shape
        return Solved(z.new_zeros(number, n, 1), z.new_zeros(number, 1, m), z, z.mT, none, none + tol, none)
    rows = _Rows(z, a, b, tol, anneal)
    while rows.live.numel() and rows.steps < max_iter:
        rows.sweep(min(SWEEPS, max_iter - rows.steps))
    rows.settle(torch.ones_like(rows.live, dtype=torch.bool))
    found: Solved = rows.found
    if not massive(b):  # columns without mass have the potentials that make their means under a exact
        x = torch.where(a > 0, z - found.u + a.log(), -torch.inf).logsumexp(-2, keepdim=True)
        v = torch.where(b > 0, found.v, torch.where(x.isfinite(), x, 0))
        e, u = scaled(z, a, b, v)
        found = found._replace(u=u, v=v, to_columns=a * e, to_rows=(b * e).mT.contiguous())
    return found


class _Rows:
    """The matrices that have not converged yet, each at its own temperature ``sigma``.

    The kernel is that of z/sigma, u and v; t is the scaling of its columns since it was made.
    """

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, tol: float, anneal: bool) -> None:
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
        self.newton = torch.zeros_like(span)
        self.steps = 0
        self.found: Any = None  # a Solved, made when the first matrix is done
        self._renew(None, self._kernel(None, None))
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
        better = error < self.last[i]
        self.newton[i] += 1
        i = i[better]
        self.v[i], self.last[i] = v[better], error[better]
        self._renew(i, (moved[0][better], moved[1][better], moved[2][better]))
        return i[self.last[i] >= target[i]]

    def _cool(self, i: Tensor) -> None:
        if not i.numel():
            return
        sigma = (self.sigma[i] / ANNEAL).clamp(min=1)
        self.v[i] = (self.v[i] - self.t[i].log()) * (self.sigma[i] / sigma).reshape(-1, 1, 1)
        self.sigma[i], self.last[i] = sigma, torch.inf
        self._renew(i, self._kernel(i, self.v[i]))

    def settle(self, which: Tensor) -> None:
        """Hands out the matrices in ``which`` and drops them."""
        if not bool(which.any()):
            return
        s = torch.bmm(self.t, self.to_rows).clamp_(min=torch.finfo(self.t.dtype).tiny).reciprocal_()
        u, v, sweeps = self.u - s.mT.log(), self.v - self.t.log(), self.steps + self.newton
        like = (u, v, self.to_columns, self.to_rows, self.last, self.tol, sweeps)
        whole = self.found is None and bool(which.all())
        given = like if whole else tuple(x[which] for x in like)
        given[2].mul_(s.mT if whole else s[which].mT).mul_(self.t if whole else self.t[which])
        given[3].mul_(s if whole else s[which]).mul_(self.t.mT if whole else self.t[which].mT)
        if whole:
            self.found = Solved(*given)
        elif self.found is None:
            self.found = Solved(*(torch.empty_like(x) for x in like))
        if not whole:
            for out, x in zip(self.found, given, strict=True):
                out[self.live[which]] = x
        keep = ~which
        for name in ("live", "z", "a", "b", "u", "v", "to_columns", "to_rows", "t", "sigma", "tol", "last", "newton"):
            setattr(self, name, getattr(self, name)[keep])


def as_matrices(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n or 1, m or 1) as (rows, n or 1, m or 1) with their batch dims broadcast."""
    batch = batch_shape(*(t.flatten(-2) for t in tensors))
    return batch, [t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in tensors]


def _fake(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*batch_shape(*(t.flatten(-2) for t in (x, eps, a, b))), 1, x.shape[-1])


@opaque(
    "sinkhorn(Tensor x, Tensor eps, Tensor a, Tensor b, float tol, int max_iter, str on_fail, bool anneal) -> Tensor",
    _fake,
)
def sinkhorn(
    x: Tensor, eps: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, on_fail: str, anneal: bool
) -> Tensor:
    """v (..., 1, m), as an operator that torch.compile and vmap carry."""
    batch, given = as_matrices(x, eps, a, b)
    v = torch.cat([found.v for found in blocks(given, (tol, max_iter, on_fail, anneal))])[..., : x.shape[-1]]
    return v.reshape(*batch, 1, x.shape[-1])


def block_size(x: Tensor) -> int:
    """How many matrices are swept together."""
    return max(1, BLOCK // max(1, x.shape[-2:].numel())) if x.device.type == "cpu" else max(1, len(x))


def blocks(given: list[Tensor], options: Options) -> Iterator[Solved]:
    """The solutions for theta, eps, a and b (rows, ...), :func:`block_size` of them at a time.

    Odd sizes come back padded by a row or a column without mass.
    """
    x, eps, a, b = given
    tol, max_iter, on_fail, anneal = options
    size, judged = block_size(x), []
    for i in (slice(first, first + size) for first in range(0, max(1, len(x)), size)):
        z = even(x[i] / eps[i], -torch.inf)
        found = solve(z, even(a[i], columns=False), even(b[i], rows=False), tol, max_iter, anneal)
        judged.append((found.error, found.tol, found.sweeps))
        yield found
    error, bound, sweeps = (torch.cat(parts) for parts in zip(*judged, strict=True))
    fail(error, bound, sweeps, x, a, b, on_fail)


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
