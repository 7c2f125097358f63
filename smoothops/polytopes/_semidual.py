"""Quadratic transport: P = max(z - u - v, 0) with z = theta/eps, by Newton on the semi-dual, and its derivatives.

u follows from v: one threshold a row, as on a simplex. What is left is convex and piecewise quadratic in v,

    min_v  sum_i max_{p >= 0, sum p = a_i} (<z_i - v, p> - |p|^2/2) + <b, v>,

with gradient b - P' 1 and generalized Hessian S = diag(M' 1) - M' diag(1/(M 1)) M, M the support of P. Newton steps,
with a ridge that vanishes with the gradient, end exactly once the support is found; they start at a large eps.
With the support known P is linear in z, a and b: one Newton step in plain torch carries all derivatives.

Source: Blondel, Seguy, Rolet 2018, "Smooth and sparse optimal transport"; Li, Sun, Toh 2020, "On the efficient
computation of a generalized Jacobian of the projector over the Birkhoff polytope".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._opaque import batch_shape, opaque
from ._kernel import factor, factor_solve, product
from ._potentials import TransportInfo, centred, judged, solved, solved_like
from ._sinkhorn import UNRESOLVED, Options, as_matrices, fail

SPAN = 50.0  # the range of z, in units of the mean mass, at which annealing starts
ANNEAL = 4.0  # the factor from one eps to the next
COARSE = 1e-2  # the error sum |P' 1 - b| / sum b at which the next eps is entered
EXACT = 1e-12  # the error that Newton's last step leaves, rounding aside
MAX_ITER = 400
HALVINGS = 25
ARMIJO = 1e-4


def _threshold(x: Tensor, a: Tensor, u: Tensor) -> Tensor:
    """u with sum_j max(x_ij - u_i, 0) = a_i; Newton from ``u``: from its second step on it only grows, and ends."""
    lowest = x.amax(-1, keepdim=True) - a
    lowest = torch.where(lowest > -torch.inf, lowest, 0)
    for step in range(x.shape[-1] + 2):
        rest = (x - u).clamp(min=0)
        number = (rest > 0).sum(-1, keepdim=True)
        new = torch.where(number > 0, u + (rest.sum(-1, keepdim=True) - a) / number.clamp(min=1), lowest)
        if step and not bool((new > u).any()):
            break
        u = torch.where(new > u, new, u) if step else new
    return u


class _Rows:
    """The matrices that have not converged yet, each at its own eps: ``sigma`` times the one asked for."""

    def __init__(self, z: Tensor, a: Tensor, b: Tensor, anneal: bool) -> None:
        counts = (z > -torch.inf) & (a > 0) & (b > 0)
        high = torch.where(counts, z, -torch.inf).flatten(1).amax(-1)
        low = torch.where(counts, z, torch.inf).flatten(1).amin(-1)
        self.mass, positive = b.sum((1, 2)), (b > 0).sum((1, 2)).clamp(min=1)
        span = torch.where(high.isfinite(), high - low, 0)
        span = span * positive / torch.where(self.mass > 0, self.mass, 1)
        if not anneal:
            span = span.clamp(max=SPAN)
        rounding = torch.finfo(z.dtype).eps * (1 + span)
        self.tol = (8 * rounding).clamp(min=EXACT)
        self.live = torch.arange(len(z), device=z.device)
        self.z, self.a, self.b = torch.where(b > 0, z, -torch.inf), a, b
        self.sigma = (span / SPAN).clamp(min=1)
        self.v = torch.zeros_like(z[:, :1])
        self.steps = torch.zeros_like(span)
        self.found = [torch.zeros_like(x) for x in (z[..., :1], z[:, :1], span, span, span)]
        self.error = torch.full_like(span, torch.inf)
        self._renew(torch.zeros_like(a))
        self.error = torch.where(rounding < UNRESOLVED, self.error, torch.inf)
        self._settle((self.error.isinf()) | (self.mass == 0))

    def _at(self, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, P and the objective at v."""
        x = self.scaled - v
        u = _threshold(x, self.a, u)
        p = (x - u).clamp_(min=0)
        value = (self.a * u).sum((1, 2)) + p.square().sum((1, 2)) / 2 + (self.b * v).sum((1, 2))
        return u, p, value

    def _renew(self, u: Tensor) -> None:
        self.scaled = self.z / self.sigma.reshape(-1, 1, 1)
        self.u, self.p, self.value = self._at(self.v, u)
        self.error = self._error(self.p)

    def _error(self, p: Tensor) -> Tensor:
        return (self.b - p.sum(-2, keepdim=True)).abs().sum((1, 2)) / torch.where(self.mass > 0, self.mass, 1)

    def step(self) -> None:
        target = torch.where(self.sigma > 1, COARSE, self.tol)
        residual = self.b - self.p.sum(-2, keepdim=True)
        s = support_laplacian((self.p > 0).to(self.p.dtype))
        ridge = self.error.clamp(max=1) + torch.finfo(s.dtype).eps * self.p.shape[-2]
        cholesky = factor(s + torch.diag_embed(ridge.unsqueeze(-1).expand(s.shape[:-1])))
        step = -factor_solve(cholesky, residual.mT).mT
        slope = (residual * step).sum((1, 2))
        length = torch.ones_like(self.error)
        for _ in range(HALVINGS):
            v = self.v + length.reshape(-1, 1, 1) * step
            u, p, value = self._at(v, self.u)
            error = self._error(p)
            good = (value <= self.value + ARMIJO * length * slope) | (error < self.error / 2) | (error < target)
            if bool(good.all()):
                break
            length = torch.where(good, length, length / 3)
        self.v, self.u, self.p, self.value, self.error = v, u, p, value, error
        self.steps += 1
        reached, coarse = error < target, self.sigma > 1
        if bool((reached & coarse).any()):
            sigma = torch.where(reached & coarse, (self.sigma / ANNEAL).clamp(min=1), self.sigma)
            ratio = (self.sigma / sigma).reshape(-1, 1, 1)
            self.sigma, self.v = sigma, self.v * ratio
            self._renew(self.u * ratio)
        self._settle((reached & ~coarse) | (self.steps >= MAX_ITER))

    def finish(self) -> None:
        self._settle((self.error < self.tol) & (self.sigma == 1))
        while self.live.numel():
            self.step()

    def _settle(self, which: Tensor) -> None:
        if not bool(which.any()):
            return
        for out, x in zip(self.found, (self.u, self.v, self.error, self.tol, self.steps), strict=True):
            out[self.live[which]] = x[which]
        keep = ~which
        for name in ("live", "z", "scaled", "a", "b", "mass", "u", "v", "p", "value", "error", "sigma", "tol", "steps"):
            setattr(self, name, getattr(self, name)[keep])


def support_laplacian(m: Tensor) -> Tensor:
    """S for the support M as numbers 0 and 1, (..., n, m)."""
    number = m.sum(-1, keepdim=True).clamp(min=1)
    return torch.diag_embed(m.sum(-2)) - product(m.mT, m / number)


def _components(support: Tensor) -> Tensor:
    """For each column (rows, 1, m) the number of the first column to which a path of the support leads."""
    m = support.shape[-1]
    label = torch.arange(m, device=support.device).expand(len(support), 1, m)
    while True:
        row = torch.where(support, label, m).amin(-1, keepdim=True)
        new = torch.minimum(label, torch.where(support, row, m).amin(-2, keepdim=True))
        new = torch.minimum(new, new.gather(-1, new))
        if bool((new == label).all()):
            return label
        label = new


def _fake(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, (n, m) = batch_shape(*(t.flatten(-2) for t in (x, eps, a, b))), x.shape[-2:]
    column = x.new_empty(*batch, 1, m)
    return x.new_empty(*batch, n, 1), column, torch.empty_like(column, dtype=torch.int64), solved_like(x, eps, a, b)


@opaque(
    "semidual(Tensor x, Tensor eps, Tensor a, Tensor b, str on_fail, bool anneal) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def semidual(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, on_fail: str, anneal: bool) -> tuple[Tensor, ...]:
    """u (..., n, 1), v (..., 1, m), the components of the support as labels of the columns, how it went."""
    if not x.numel():
        u, v, label, report = (t.new_zeros(t.shape) for t in _fake(x, eps, a, b))
        return u, v, label, report + 1
    batch, (x, eps, a, b) = as_matrices(x, eps, a, b)
    z = x / eps
    rows = _Rows(z, a, b, anneal)
    rows.finish()
    u, v, error, bound, steps = rows.found
    fail(error, bound, steps, x, a, b, on_fail)
    # columns without mass: the least potential that leaves them empty
    edge = torch.where((a > 0) | (b > 0), z - u, -torch.inf).amax(-2, keepdim=True)
    v = torch.where(b > 0, v, torch.where(edge.isfinite(), edge, 0))
    label = _components((z - u - v > 0) & (a > 0) & (b > 0))
    found = u.reshape(*batch, -1, 1), v.reshape(*batch, 1, -1), label.reshape(*batch, 1, -1)
    return *found, solved(error, bound, steps, batch)


class Sparse:
    """The plan at the solved potentials, in plain torch: z (..., n, m), a (..., n, 1), b (..., 1, m)."""

    def __init__(self, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, options: Options) -> None:
        given = [t.detach() for t in (x, eps, a, b)]
        u, v, label, self.report = semidual(*given, *options[2:])
        allowed = x > -torch.inf
        z = torch.where(allowed, x, 0) / eps
        support = allowed & (z.detach() - u - v > 0) & (a > 0) & (b > 0)
        m = support.to(z.dtype)
        number = m.sum(-1, keepdim=True)
        together = (label == label.mT).to(z.dtype)
        cholesky = factor(support_laplacian(m) + together / together.sum(-1, keepdim=True))

        def rows(v: Tensor) -> Tensor:
            return torch.where(number > 0, ((m * (z - v)).sum(-1, keepdim=True) - a) / number.clamp(min=1), u)

        excess = (m * (z - rows(v) - v)).sum(-2, keepdim=True) - b
        v = v + factor_solve(cholesky, excess.mT).mT
        self.a, self.b, self.u, self.v, self.eps = a, b, rows(v), v, eps
        self.plan = torch.where(support, z - self.u - v, 0)

    def value(self) -> Tensor:
        """The maximum (..., 1, 1), by duality: stationary in u and v."""
        a, b = self.a, self.b
        rows = (a * self.u + a.square() / 4).sum((-2, -1), keepdim=True)
        columns = (b * self.v + b.square() / 4).sum((-2, -1), keepdim=True)
        return self.eps * (rows + columns + self.plan.square().sum((-2, -1), keepdim=True) / 2)

    def potentials(self) -> tuple[Tensor, Tensor, TransportInfo]:
        """f and g with P = max(theta - f - g, 0)/eps, and how the solver went."""
        u, v = centred(self.u, self.v, self.a, self.b)
        return self.eps * u, self.eps * v, judged(self.plan, self.a, self.b, self.report)
