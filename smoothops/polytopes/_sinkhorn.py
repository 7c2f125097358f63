"""Potentials of entropic transport, found without gradient: Sinkhorn sweeps, annealing, Newton steps where slow.

With z = theta/eps, P_ij = a_i b_j E_ij, E = exp(z_ij - u_i - v_j). u follows from v, since each row of E has mean 1
under b; what is left is a convex problem in v, whose gradient is b (1 - c), c_j = sum_i a_i E_ij, and whose Hessian is
b J, J = diag(c) - E' diag(a) E diag(b). The error is sum b |1 - c|. v is known up to a constant.

Masses may be 0: such rows and columns have potentials too, and count for nothing.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._opaque import batch_shape, opaque
from ._assignment import feasible

SPAN = 50.0  # the range of z at which annealing starts: kernels within e^-50 need few sweeps
ANNEAL = 5.0  # the factor from one temperature to the next
COARSE = 1e-2  # the error at which the next temperature is entered
SWEEPS = 10  # between two looks at the error
PATIENCE = 20  # sweeps expected to be left from which on Newton steps are cheaper
NEAR = 0.5  # the error below which Newton steps are tried
TRUST = 3.0  # the largest change of a potential in a Newton step
RIDGE = 500  # times the machine epsilon: what is added to J where P falls into blocks that hardly meet
UNRESOLVED = 1e-6  # rounding of the potentials above which their matrix would be meaningless


class Kernel:
    """E at potentials v, for matrices (..., n, m): a (..., n, 1), b (..., 1, m), v (..., 1, m), all detached."""

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> None:
        self.a, self.b = a, b
        self.e, self.u = scaled(z, a, b, v)
        self.columns = a.mT @ self.e

    parts = ("a", "b", "e", "u", "columns")

    @property
    def error(self) -> Tensor:
        return (self.b * (1 - self.columns).abs()).sum((-2, -1))

    def factor(self) -> Tensor:
        """The Cholesky factor of sqrt(b) J / sqrt(b), symmetric, with 1 in place of its eigenvalue 0."""
        root = self.b.sqrt()
        t = self.e * self.a.sqrt() * root
        s = root.mT * root - t.mT @ t
        ridge = RIDGE * torch.finfo(s.dtype).eps
        return torch.linalg.cholesky_ex(s + torch.diag_embed(self.columns.squeeze(-2) + ridge)).L

    def solve(self, factor: Tensor, r: Tensor) -> Tensor:
        """x with J x = r, (..., 1, m); entries of mass 0 follow from the others."""
        root = self.b.sqrt()
        w = torch.cholesky_solve((root * r).mT, factor).mT
        return (r + (self.a.mT * ((w * root) @ self.e.mT)) @ self.e) / self._divisor()

    def _divisor(self) -> Tensor:
        return torch.where(self.columns > 0, self.columns, 1)


def scaled(z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """E and u, in plain torch: the mean of each row of E under b is 1."""
    x = z - v
    top = x.detach().masked_fill(b == 0, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0)
    e = torch.where((a == 0) & (b == 0), -torch.inf, x - top).exp()
    mean = (e * b).sum(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1)  # a row where all is forbidden
    return e / mean, top + mean.log()


class Solved(NamedTuple):
    """v (rows, 1, m); for each matrix the error, the bound on it, and the number of sweeps."""

    v: Tensor
    error: Tensor
    tol: Tensor
    sweeps: Tensor


def solve(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int) -> Solved:
    """For z (rows, n, m), and masses (rows, n, 1), (rows, 1, m) that sum to 1."""
    if not z.numel():
        none = z.new_zeros(len(z))
        return Solved(z.new_zeros(len(z), 1, z.shape[-1]), none, none + tol, none)
    rows = _Rows(z, a, b, tol)
    while rows.live.numel() and rows.steps < max_iter:
        rows.sweep(min(SWEEPS, max_iter - rows.steps))
    rows.settle(torch.ones_like(rows.live, dtype=torch.bool))
    v = rows.found.v
    if bool((b == 0).any()):  # such columns have the potentials that make their means under a exact
        _, u = scaled(z, a, b, v)
        x = torch.where(a > 0, z - u + a.log(), -torch.inf).logsumexp(-2, keepdim=True)
        v = torch.where(b > 0, v, torch.where(x.isfinite(), x, 0))
    return rows.found._replace(v=v)


class _Rows:
    """The matrices that have not converged yet, each at its own temperature ``sigma``: E is that of z/sigma."""

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, tol: float) -> None:
        rows, _, m = z.shape
        counts = z.isfinite() & (a > 0) & (b > 0)
        high = torch.where(counts, z, -torch.inf).flatten(1).amax(-1)
        low = torch.where(counts, z, torch.inf).flatten(1).amin(-1)
        high = torch.where(high.isfinite(), high, 0)
        span = (high - low).clamp(min=0)
        rounding = torch.finfo(z.dtype).eps * (1 + span)
        resolved = rounding < UNRESOLVED
        self.tol = (8 * rounding).clamp(min=tol)
        self.found = Solved(
            z.new_zeros(rows, 1, m), torch.full_like(span, torch.inf), self.tol.clone(), torch.zeros_like(span)
        )
        self.live = torch.arange(rows, device=z.device)
        self.z, self.a, self.b = z - high.reshape(-1, 1, 1), a, b
        self.sigma = (span / SPAN).clamp(min=1)
        self.v = torch.zeros_like(self.found.v)
        self.last = torch.full_like(span, torch.inf)
        self.newton = torch.zeros_like(span)
        self.steps = 0
        self.kernel = self._kernel(slice(None), self.v)
        nothing = (b == 0).all(-1).flatten()
        self.last[nothing] = 0
        self.settle(~resolved | nothing)

    def _kernel(self, i: Any, v: Tensor) -> Kernel:
        return Kernel(self.z[i] / self.sigma[i].reshape(-1, 1, 1), self.a[i], self.b[i], v)

    def sweep(self, number: int) -> None:
        e = self.kernel.e
        turned, a, b = e.mT.contiguous(), self.a.mT, self.b  # a row times a contiguous matrix is the fastest product
        t, tiny = torch.ones_like(b), torch.finfo(e.dtype).tiny
        for _ in range(number):
            s = 1 / torch.bmm(b * t, turned).clamp(min=tiny)
            columns = torch.bmm(a * s, e)
            t = torch.where(columns > 0, 1 / columns, 1)
        self.steps += number
        self.v = self.v - t.log()
        self.kernel = self._kernel(slice(None), self.v)
        self._judge(number)

    def _judge(self, number: int) -> None:
        """Decides what comes next for each matrix: more sweeps, Newton steps, a lower temperature, or nothing."""
        error, coarse = self.kernel.error, self.sigma > 1
        target = torch.where(coarse, COARSE, self.tol)
        rate = (error / self.last).log() / number
        left = (target / error).log() / rate.clamp(max=-1e-9)
        self.last = error
        slow = ((error >= target) & (error < NEAR) & (left > PATIENCE)).nonzero().squeeze(-1)
        for _ in range(3):
            if not slow.numel():
                break
            slow = self._newton(slow, target)
        reached = self.last < target
        self._cool(reached & coarse)
        self.settle(reached & ~coarse)

    def _newton(self, i: Tensor, target: Tensor) -> Tensor:
        """A Newton step for the matrices ``i`` where it lowers the error; those for which another one makes sense."""
        kernel = self._kernel(i, self.v[i])
        step = kernel.solve(kernel.factor(), kernel.columns - 1)
        step = torch.where((self.b[i] > 0) & step.isfinite(), step, 0)
        v = self.v[i] + step * (TRUST / step.abs().amax(-1, keepdim=True)).clamp(max=1)
        kernel = self._kernel(i, v)
        better = kernel.error < self.last[i]
        self.newton[i] += 1
        i, kept = i[better], better.nonzero().squeeze(-1)
        self.v[i], self.last[i] = v[kept], kernel.error[kept]
        for name in Kernel.parts:
            getattr(self.kernel, name)[i] = getattr(kernel, name)[kept]
        return i[self.last[i] >= target[i]]

    def _cool(self, which: Tensor) -> None:
        if not bool(which.any()):
            return
        sigma = torch.where(which, (self.sigma / ANNEAL).clamp(min=1), self.sigma)
        self.v = self.v * (self.sigma / sigma).reshape(-1, 1, 1)
        self.sigma = sigma
        self.last = torch.where(which, torch.inf, self.last)
        self.kernel = self._kernel(slice(None), self.v)

    def settle(self, which: Tensor) -> None:
        """Hands out the matrices in ``which`` and drops them."""
        if not bool(which.any()):
            return
        at, keep, found = self.live[which], ~which, self.found
        found.v[at], found.error[at], found.sweeps[at] = (
            self.v[which],
            self.last[which],
            self.steps + self.newton[which],
        )
        for name in ("live", "z", "a", "b", "v", "sigma", "tol", "last", "newton"):
            setattr(self, name, getattr(self, name)[keep])
        for name in Kernel.parts:
            setattr(self.kernel, name, getattr(self.kernel, name)[keep])


def as_matrices(*tensors: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Tensors (..., n or 1, m or 1) as (rows, n or 1, m or 1) with their batch dims broadcast."""
    batch = batch_shape(*(t.flatten(-2) for t in tensors))
    return batch, [t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in tensors]


def _fake(z: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return z.new_empty(*batch_shape(*(t.flatten(-2) for t in (z, a, b))), 1, z.shape[-1])


@opaque("sinkhorn(Tensor z, Tensor a, Tensor b, float tol, int max_iter, str on_fail) -> Tensor", _fake)
def sinkhorn(z: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int, on_fail: str) -> Tensor:
    """v (..., 1, m), as an operator that torch.compile and vmap carry."""
    batch, given = as_matrices(z, a, b)
    found = solve(*given, tol, max_iter)
    report(found, *given, on_fail)
    return found.v.reshape(*batch, 1, z.shape[-1])


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
