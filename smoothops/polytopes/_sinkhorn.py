"""Potentials of entropic transport, found without gradient: Sinkhorn sweeps, annealing, Newton steps where slow.

Notation and masses as in ``_kernel``. A sweep scales the rows, then the columns of E; it is two products of a vector
and a matrix, and lowers the error sum b |1 - c| by a factor that tends to 1 as eps -> 0. So the temperature comes down
in steps, from a z of small range, the potentials of one being the start of the next; and where sweeps are slow, Newton
steps on v, quadratic, take over.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._opaque import batch_shape, opaque
from ._assignment import feasible
from ._kernel import Kernel, scaled

SPAN = 50.0  # the range of z at which annealing starts: kernels within e^-50 need few sweeps
ANNEAL = 5.0  # the factor from one temperature to the next
COARSE = 1e-2  # the error at which the next temperature is entered
SWEEPS = 10  # between two looks at the error
NEAR = 0.5  # the error below which Newton steps are tried
TRUST = 3.0  # the largest change of a potential in a Newton step
DRIFT = 50.0  # the change of a potential from which on E is made anew: less loses none of its digits
UNRESOLVED = 1e-6  # rounding of the potentials above which their matrix would be meaningless


class Solved(NamedTuple):
    """u, v, E of each matrix, its error, the bound on it, and the number of sweeps."""

    u: Tensor
    v: Tensor
    e: Tensor
    error: Tensor
    tol: Tensor
    sweeps: Tensor


def solve(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int) -> Solved:
    """For z (rows, n, m), and masses (rows, n, 1), (rows, 1, m) that sum to 1."""
    if not z.numel():
        none = z.new_zeros(len(z))
        return Solved(torch.zeros_like(z[..., :1]), torch.zeros_like(z[:, :1]), z, none, none + tol, none)
    rows = _Rows(z, a, b, tol)
    while rows.live.numel() and rows.steps < max_iter:
        rows.sweep(min(SWEEPS, max_iter - rows.steps))
    rows.settle(torch.ones_like(rows.live, dtype=torch.bool))
    found: Solved = rows.found
    if not bool((b > 0).all()):  # columns without mass have the potentials that make their means under a exact
        x = torch.where(a > 0, z - found.u + a.log(), -torch.inf).logsumexp(-2, keepdim=True)
        v = torch.where(b > 0, found.v, torch.where(x.isfinite(), x, 0))
        e, u = scaled(z, a, b, v)
        found = found._replace(u=u, v=v, e=e)
    return found


class _Rows:
    """The matrices that have not converged yet, each at its own temperature ``sigma``.

    E is exp(z/sigma - u - v) scaled by s and t, which are absorbed into the potentials when they grow.
    """

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, tol: float) -> None:
        low, high = (f.flatten(1) for f in (z.flatten(1).amin(-1, True), z.flatten(1).amax(-1, True)))
        self.massless = bool((a == 0).any()) or bool((b == 0).any())
        if self.massless or not bool(low.isfinite().all()):
            counts = (z > -torch.inf) & (a > 0) & (b > 0)
            high = torch.where(counts, z, -torch.inf).flatten(1).amax(-1, True)
            low = torch.where(counts, z, torch.inf).flatten(1).amin(-1, True)
            high, low = (torch.where(end.isfinite(), end, 0) for end in (high, low))
        span = (high - low).squeeze(-1)
        rounding = torch.finfo(z.dtype).eps * (1 + span)
        self.tol = (8 * rounding).clamp(min=tol)
        self.live = torch.arange(len(z), device=z.device)
        self.z, self.a, self.b = z, a, b
        self.sigma = (span / SPAN).clamp(min=1)
        self.v = torch.zeros_like(z[:, :1])
        self.last = torch.full_like(span, torch.inf)
        self.newton = torch.zeros_like(span)
        self.steps = 0
        self.found: Any = None  # a Solved, made when the first matrix is done
        self._renew(None)
        nothing = (b == 0).all(-1).flatten()
        self.last[nothing] = 0
        self.settle((rounding >= UNRESOLVED) | nothing)

    def _kernel(self, i: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        z = self.z if i is None else self.z[i]
        sigma = self.sigma if i is None else self.sigma[i]
        z = z if bool((sigma == 1).all()) else z / sigma.reshape(-1, 1, 1)
        a, b = (self.a, self.b) if i is None else (self.a[i], self.b[i])
        return scaled(z, a, b, v)

    def _renew(self, i: Tensor | None, e: Tensor | None = None, u: Tensor | None = None) -> None:
        """Makes E of the matrices ``i`` (None: all) anew at their v, and s = t = 1."""
        if e is None or u is None:
            e, u = self._kernel(i, self.v if i is None else self.v[i])
        if i is None or len(i) == len(self.live):
            self.e, self.u, self.t = e, u, torch.ones_like(self.v)
            self.turned = e.mT.contiguous()  # a row times a contiguous matrix is the fastest product
        else:
            self.e[i], self.u[i], self.t[i], self.turned[i] = e, u, 1, e.mT

    def _rows_scale(self) -> Tensor:
        """s, such that the rows of s E t have mean 1."""
        return 1 / torch.bmm(self.b * self.t, self.turned).clamp(min=torch.finfo(self.t.dtype).tiny)

    def sweep(self, number: int) -> None:
        a, b, t = self.a.mT, self.b, self.t
        tiny = torch.finfo(t.dtype).tiny
        columns = t
        for _ in range(number):
            s = 1 / torch.bmm(b * t, self.turned).clamp(min=tiny)
            columns, before = torch.bmm(a * s, self.e), t
            t = 1 / columns.clamp(min=tiny)
            if self.massless:
                t = torch.where(b > 0, t, 1)
        self.t = t
        self.steps += number
        # the error before the last step, which lowers it
        self._judge((b * (1 - before * columns).abs()).sum((1, 2)), number)

    def _judge(self, error: Tensor, number: int) -> None:
        """Decides what comes next for each matrix: more sweeps, Newton steps, a lower temperature, or nothing."""
        coarse = self.sigma > 1
        target = torch.where(coarse, COARSE, self.tol)
        rate = (error / self.last).log() / number
        left = (target / error).log() / rate.clamp(max=-1e-9)
        self.last = error
        patience = 10 + self.e.shape[-1] / 6  # sweeps that take as long as a Newton step
        slow = (error >= target) & (error < NEAR) & (left > patience)
        far = self.t.log().abs().amax((1, 2)) > DRIFT
        reached = error < target
        if bool((slow | far).any()):
            i = (slow | far).nonzero().squeeze(-1)
            self.v[i] = self.v[i] - self.t[i].log()
            self._renew(i)
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
        a, b = self.a[i], self.b[i]
        kernel = Kernel(self.e[i], a, b)
        step = kernel.inverse()(kernel.columns - 1)
        step = torch.where((b > 0) & step.isfinite(), step, 0)
        v = self.v[i] + step * (TRUST / step.abs().amax(-1, keepdim=True)).clamp(max=1)
        e, u = self._kernel(i, v)
        error = Kernel(e, a, b).error
        better = error < self.last[i]
        self.newton[i] += 1
        i, kept = i[better], better.nonzero().squeeze(-1)
        self.v[i], self.last[i] = v[kept], error[kept]
        self._renew(i, e[kept], u[kept])
        return i[self.last[i] >= target[i]]

    def _cool(self, i: Tensor) -> None:
        if not i.numel():
            return
        sigma = (self.sigma[i] / ANNEAL).clamp(min=1)
        self.v[i] = (self.v[i] - self.t[i].log()) * (self.sigma[i] / sigma).reshape(-1, 1, 1)
        self.sigma[i], self.last[i] = sigma, torch.inf
        self._renew(i)

    def settle(self, which: Tensor) -> None:
        """Hands out the matrices in ``which`` and drops them."""
        if not bool(which.any()):
            return
        s = 1 / torch.bmm(self.b * self.t, self.turned).clamp(min=torch.finfo(self.t.dtype).tiny).mT
        parts = (self.u - s.log(), self.v - self.t.log())
        sweeps = self.steps + self.newton
        if bool(which.all()) and self.found is None:
            self.found = Solved(*parts, self.e.mul_(self.t).mul_(s), self.last, self.tol, sweeps)
            self.live = self.live[:0]
            return
        if self.found is None:
            like = (*parts, self.e, self.last, self.tol, sweeps)
            self.found = Solved(*(torch.empty_like(x) for x in like))
        at, keep = self.live[which], ~which
        given = (*(x[which] for x in parts), self.e[which] * self.t[which] * s[which], self.last[which])
        for out, x in zip(self.found, (*given, self.tol[which], sweeps[which]), strict=True):
            out[at] = x
        for name in ("live", "z", "a", "b", "u", "v", "e", "turned", "t", "sigma", "tol", "last", "newton"):
            setattr(self, name, getattr(self, name)[keep])


def as_matrices(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n or 1, m or 1) as (rows, n or 1, m or 1) with their batch dims broadcast."""
    batch = batch_shape(*(t.flatten(-2) for t in tensors))
    return batch, [t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in tensors]


def _fake(z: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return z.new_empty(*batch_shape(*(t.flatten(-2) for t in (z, a, b))), 1, z.shape[-1])


@opaque("sinkhorn(Tensor z, Tensor a, Tensor b, float tol, int max_iter, str on_fail) -> Tensor", _fake)
def sinkhorn(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, on_fail: str) -> Tensor:
    """v (..., 1, m), as an operator that torch.compile and vmap carry."""
    return potentials(z, a, b, tol, max_iter, on_fail).v


def potentials(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, on_fail: str) -> Solved:
    """The solution for matrices (..., n, m); raises or warns where one has not converged."""
    batch, (z, a, b) = as_matrices(z, a, b)
    found = solve(z, a, b, tol, max_iter)
    report(found, z, a, b, on_fail)
    return Solved(*(x.reshape(batch + x.shape[1:]) for x in found))


def report(found: Solved, z: Tensor, a: Tensor, b: Tensor, on_fail: str) -> None:
    """Raises or warns where a matrix has not converged."""
    failed = ~(found.error < found.tol)
    if on_fail == "ignore" or not bool(failed.any()):
        return
    i = int(failed.nonzero()[0])
    where = f"{int(failed.sum())} of {failed.numel()} matrices (the first at index {i} of the flattened batch)"
    if not feasible(z[i].isneginf().logical_not(), a[i, :, 0], b[i, 0]):
        message = f"{where} forbid too much: theta = -inf leaves no P >= 0 with the marginals a and b"
    elif found.error[i].isinf():
        message = f"{where} have a range of theta/eps beyond what float64 resolves; use a larger eps, or so.Hard()"
    else:
        message = (
            f"Sinkhorn has not converged for {where}: marginal error {found.error[i].item():.1e} after "
            f"{int(found.sweeps[i])} sweeps, wanted {found.tol[i].item():.1e}; use a larger eps, "
            "Sinkhorn(tol=..., max_iter=...), or on_fail='warn'"
        )
    if on_fail == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
