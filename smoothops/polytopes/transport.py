"""Transport polytopes: matrices P >= 0 with given row and column sums; Birkhoff's, of doubly stochastic matrices."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._axes import Rows, check_tensor, concrete, wide_dtype
from .._regularizer import Mixing, Regularizer
from ..regularizers import Entropy, Quadratic
from ..smoothing import SmoothingLike, as_smoothing
from ..solvers import Sinkhorn
from ._assignment import all_vertices, vertex
from ._entropic import plan, potentials, value
from ._potentials import Potentials
from ._semidual import Sparse
from .base import Polytope

MISMATCH = 1e-5  # sums of the two marginals this close are the same number, rounded


@dataclass(frozen=True, eq=False)
class Transport(Polytope):
    """{P >= 0 : P 1 = a, P' 1 = b}: ways to move masses a to masses b; theta (..., n, m) is minus the cost.

    argmax is the plan, max minus the regularized cost, with gradient P. Omega is shifted by the mean of its values at
    a and at b, so that max >= the hard maximum: Entropy is sum P log P - (sum a log a + sum b log b)/2.

    Args:
        a, b: (..., n) and (..., m), >= 0, of the same sum (rounding is evened out), with gradient.
        partial: {P >= 0 : P 1 <= a, P' 1 <= b, sum P = min(sum a, sum b)} instead. What is left of the larger side goes
            to a point of score 0, whose pairs count in Omega.

    A number means Entropy: Sinkhorn, O(n m) a sweep. Quadratic: sparse plans, by Newton on the semi-dual. Hard: an
    exact vertex, by scipy, without gradient. theta = -inf forbids a pair. ValueError where no plan exists.
    Source: Cuturi 2013, "Sinkhorn distances"; Blondel, Seguy, Rolet 2018, "Smooth and sparse optimal transport".

    Example:
        >>> so.Transport(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])).argmax(torch.eye(2), so.Entropy(0.5))
        tensor([[0.2416, 0.2584],
                [0.0084, 0.4916]])
    """

    a: Tensor
    b: Tensor
    partial: bool = False

    role: ClassVar[str] = "transport"
    default: ClassVar[type[Regularizer]] = Entropy
    default_eps: ClassVar[Any] = 0.1
    event_dims = (-2, -1)
    anneal: ClassVar[bool] = True  # whether theta may be anything: start from a large eps

    def __post_init__(self) -> None:
        if not isinstance(self.partial, bool):
            raise TypeError(f"partial must be True or False, got {self.partial!r}")
        for name, mass in (("a", check_tensor(self.a, "a")), ("b", check_tensor(self.b, "b"))):
            if mass.ndim == 0:
                raise ValueError(f"{name} must have at least one dimension: the masses (..., n)")
            if concrete(mass) and not bool(((mass >= 0) & mass.isfinite()).all()):
                raise ValueError(f"{name} must be finite and >= 0: masses, got a minimum of {mass.min().item()}")
        if concrete(self.a) and concrete(self.b) and not self.partial:
            sums = [mass.detach().double().sum(-1) for mass in (self.a, self.b)]
            gap, scale = (sums[0] - sums[1]).abs(), torch.maximum(*sums)
            if bool((gap > MISMATCH * scale).any()):
                worst = int((gap / scale).argmax())
                given = [s.expand(gap.shape).reshape(-1)[worst].item() for s in sums]
                raise ValueError(
                    f"a and b must have the same sum, got {given[0]} and {given[1]}; rescale one of them, or let mass "
                    "of the larger side stay where it is: partial=True"
                )

    # --- the marginals ------------------------------------------------------------------------------------------------

    def _masses(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """a (..., n) and b (..., m) as given, in the wide dtype."""
        masses = []
        for name, mass, size in zip("ab", (self.a, self.b), rows.sizes, strict=True):
            if mass.shape[-1] != size:
                raise ValueError(
                    f"theta of shape {tuple(rows.shape)} has matrices {rows.sizes[0]} x {rows.sizes[1]}, "
                    f"but {name} has {mass.shape[-1]} entries"
                )
            mass = check_tensor(mass, name).to(device=rows.device, dtype=rows.wide)
            try:
                mass.expand(*rows.batch, size)
            except RuntimeError:
                raise ValueError(
                    f"{name} of shape {tuple(mass.shape)} does not broadcast to the batch {rows.batch} of theta"
                ) from None
            masses.append(mass[(None,) * (len(rows.batch) + 1 - mass.ndim)])  # as many dims as theta has rows
        return masses[0], masses[1]

    def _ends(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The masses of the balanced problem; of a partial one with one more row and column, for what is left over."""
        a, b = self._masses(rows)
        if not self.partial:
            return a, b
        sums = [mass.sum(-1, keepdim=True) for mass in (a, b)]
        gap = sums[0] - sums[1]
        large = gap.abs() > MISMATCH * torch.maximum(*sums)  # smaller ones are rounding
        left = [torch.where(large & (side > 0), side, 0) for side in (-gap, gap)]
        a, b = (torch.cat([mass.expand(*r.shape[:-1], -1), r], -1) for mass, r in zip((a, b), left, strict=True))
        return a, b

    def _matrices(self, x: Tensor, rows: Rows) -> Tensor:
        """x (..., n m) as matrices, with a row and a column of 0 more where the transport is partial."""
        x = x.unflatten(-1, rows.sizes)
        return pad(x, (0, 1, 0, 1)) if self.partial else x

    def _vectors(self, p: Tensor) -> Tensor:
        """The way back of :meth:`_matrices`."""
        return (p[..., :-1, :-1] if self.partial else p).flatten(-2)

    def _marginals(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """a (..., n, 1) and b (..., 1, m), each of sum 1, and the mass (..., 1, 1) of which they are the shares."""
        a, b = self._ends(rows)
        a, b = a.unsqueeze(-1), b.unsqueeze(-2)
        sums = [mass.sum((-2, -1), keepdim=True) for mass in (a, b)]
        shares = [mass / torch.where(s > 0, s, 1) for mass, s in zip((a, b), sums, strict=True)]
        return shares[0], shares[1], (sums[0] + sums[1]) / 2

    def _vertex_energy(self, rows: Rows, family: type[Regularizer], shape: Tensor) -> Tensor:
        return sum(family.omega(mass, shape).sum(-1, keepdim=True) for mass in self._ends(rows)) / 2  # type: ignore[return-value]

    # --- the answers --------------------------------------------------------------------------------------------------

    def _hard(self, rows: Rows) -> Tensor:
        a, b, mass = self._marginals(rows)
        x = self._matrices(rows.x.detach(), rows)
        return self._vectors(vertex(x, (a * mass).detach(), (b * mass).detach(), self.partial))

    def strength(self, rows: Rows, reg: Regularizer) -> Tensor:
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing counts the inputs of a vector, which a matrix is not; give a number or a tensor")
        return rows.parameter(reg.eps, "eps")

    def _given(self, x: Tensor, rows: Rows, reg: Regularizer) -> tuple[Any, ...]:
        """What the solver takes: theta as matrices, eps, the marginals and the mass, and options."""
        solver = reg.solver if reg.solver is not None else Sinkhorn()
        tol = solver.tol if solver.tol is not None else 1e-10 if rows.dtype == torch.float64 else 1e-7
        options = (tol, solver.max_iter, solver.on_fail, self.anneal)
        x, (a, b, mass) = self._matrices(x, rows), self._marginals(rows)
        eps = self.strength(rows, reg).unsqueeze(-1)
        if isinstance(reg, Quadratic):  # |P|^2 does not scale as P
            return x, eps, mass * a, mass * b, options
        return x, eps, a, b, mass, options

    def _finite(self, rows: Rows) -> bool:
        """Whether nothing needs care; a look at the numbers, where they may be looked at."""
        x = rows.given.detach()
        if not concrete(x) or not x.numel():
            return False
        low, high = torch.aminmax(x)
        if high == torch.inf:
            raise ValueError("theta holds +inf, which no plan can follow; forbid the other pairs with -inf")
        return not (bool(high.isnan()) or bool(low.isnan()))

    def _fused(self, rows: Rows, reg: Regularizer) -> Tensor | None:
        if not self._finite(rows):
            return None
        return self._plan(rows.given.to(rows.wide), rows, reg)

    def _soft(self, rows: Rows, reg: Regularizer) -> Tensor:
        return self._plan(rows.x, rows, reg)

    def _plan(self, x: Tensor, rows: Rows, reg: Regularizer) -> Tensor:
        given = self._given(x, rows, reg)
        return self._vectors(Sparse(*given).plan if isinstance(reg, Quadratic) else plan(*given))

    def _soft_max(self, rows: Rows, reg: Regularizer) -> Tensor:
        self._finite(rows)
        given = self._given(rows.x, rows, reg)
        return (Sparse(*given).value() if isinstance(reg, Quadratic) else value(*given)).flatten(-2)

    def potentials(self, theta: Tensor, smoothing: SmoothingLike = None) -> Potentials:
        """The dual potentials f (..., n), g (..., m), and an ``info``: converged, iterations, residual (...).

        Entropy: P_ij = a_i b_j exp((theta_ij - f_i - g_j)/eps). Quadratic: P_ij = max(theta_ij - f_i - g_j, 0)/eps.

        f + c, g - c are potentials, too; these have <a, f> = <b, g>. With Entropy max is
        <a, f> + <b, g> - eps (sum a log a + sum b log b)/2. Differentiable as the plan is. ``info.residual`` is
        sum |P 1 - a| + sum |P' 1 - b|, relative to sum a. Raises: ValueError unless Entropy or Quadratic.
        Complexity: as ``argmax``. Source: Cuturi, Peyre 2016, "A smoothed dual approach for variational Wasserstein
        problems".

        Example:
            >>> so.Birkhoff().potentials(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), so.Entropy(1.0)).f
            tensor([0.9870, 0.4870])
        """
        rows = Rows(theta, self.event_dims)
        reg = as_smoothing(smoothing, self.default, self.default_eps)
        if not isinstance(reg, Regularizer):
            raise ValueError(f"{type(reg).__name__} has no dual potentials; use Entropy or Quadratic")
        self._finite(rows)
        given = self._given(rows.x, rows, self.check(reg))
        f, g, info = Sparse(*given).potentials() if isinstance(reg, Quadratic) else potentials(*given)
        f, g = f[..., : rows.sizes[0], 0], g[..., 0, : rows.sizes[1]]
        f, g = (rows.poisoned_value(t).to(rows.dtype) for t in (f, g))
        return Potentials(f, g, info)

    # --- what the set is ----------------------------------------------------------------------------------------------

    def contains(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        rows = Rows(y, self.event_dims)
        p = rows.x.unflatten(-1, rows.sizes)
        a, b = self._masses(rows)
        scale = tol * max(1, *rows.sizes) * torch.maximum(a.amax(-1), b.amax(-1)).clamp(max=1)
        inside = (p >= -tol).flatten(-2).all(-1)
        over = p.sum(-1) - a, p.sum(-2) - b
        for excess in over if self.partial else [e.abs() for e in over]:
            inside = inside & (excess.amax(-1) <= scale)
        if self.partial:
            all_of_it = torch.minimum(a.sum(-1), b.sum(-1))
            inside = inside & ((p.sum((-2, -1)) - all_of_it).abs() <= scale * min(rows.sizes))
        return inside

    def penalty(self, y: Tensor, smoothing: SmoothingLike = None) -> Tensor:
        """eps Omega(y) for y in C, shape (...), with the mean of its values at a and at b taken off."""
        if not self.partial:
            return super().penalty(y, smoothing)
        rows = Rows(y, self.event_dims)
        (a, b), p = self._ends(rows), rows.x.unflatten(-1, rows.sizes)
        stay = (a[..., :-1] - p.sum(-1)).unsqueeze(-1), (b[..., :-1] - p.sum(-2)).unsqueeze(-2)
        last = [torch.where(mass[..., -1:, None] > 0, s, 0) for mass, s in zip((b, a), stay, strict=True)]
        whole = torch.cat([torch.cat([p, last[0]], -1), pad(last[1], (0, 1))], -2).clamp(min=0)
        value = Transport(a, b).penalty(whole, smoothing)
        return rows.reduced(rows.poisoned_value(value.unsqueeze(-1)), False)

    def vertices(self, n: int | None = None) -> Tensor:
        """All vertices, (number, n, m): for tests and tiny n and m."""
        if self.a.ndim != 1 or self.b.ndim != 1:
            raise ValueError(f"vertices needs single masses, got {tuple(self.a.shape)} and {tuple(self.b.shape)}")
        a, b = self.a, self.b
        if not self.partial:
            return all_vertices(a, b)
        left = (a.sum() - b.sum()).item()
        if abs(left) <= MISMATCH * max(a.sum().item(), b.sum().item()):
            return all_vertices(a, b)
        a, b = (torch.cat([mass, mass.new_tensor([r])]) if r > 0 else mass for mass, r in ((a, -left), (b, left)))
        return all_vertices(a, b)[:, : len(self.a), : len(self.b)]


@dataclass(frozen=True, eq=False, init=False)
class Birkhoff(Transport):
    """{P >= 0 : P 1 = 1, P' 1 = 1}: doubly stochastic matrices, with the permutations as vertices; theta (..., n, n).

    argmax is a soft matching, max its value; as :class:`Transport` with masses 1, where Omega is 0 at the vertices.
    Source: Adams, Zemel 2011, "Ranking via Sinkhorn propagation"; Mena et al. 2018, "Learning latent permutations".

    Example:
        >>> so.Birkhoff().argmax(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), so.Entropy(1.0))
        tensor([[0.6225, 0.3775],
                [0.3775, 0.6225]])
    """

    def __init__(self) -> None:
        one = torch.ones(1, dtype=torch.float64)
        object.__setattr__(self, "a", one)
        object.__setattr__(self, "b", one)

    def __repr__(self) -> str:
        return "Birkhoff()"

    def _masses(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if rows.sizes[0] != rows.sizes[1]:
            raise ValueError(f"Birkhoff needs square matrices, got theta of shape {tuple(rows.shape)}; see Transport")
        one = torch.ones(rows.sizes[0], dtype=wide_dtype(rows.device), device=rows.device)
        return one, one

    def vertices(self, n: int | None = None) -> Tensor:
        if n is None:
            raise ValueError("Birkhoff does not know its dimension; call vertices(n)")
        return torch.stack([torch.eye(n, dtype=torch.float64)[list(p)] for p in itertools.permutations(range(n))])
