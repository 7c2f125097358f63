"""Regularizers: the objects eps * Omega in y = argmax_{y in C} <theta, y> - eps * Omega(y).

Each is separable, Omega(y) = sum_i omega(y_i), and supplies a few scalar functions of z = theta/eps - tau:

    psi(z)  = max_y  z y - omega(y)      the conjugate
    phi(z)  = psi'(z)                    the coordinate of the answer, nondecreasing
    dphi(z) = psi''(z)
    phi_inverse(y)                       where phi is invertible
    cap     = phi_inverse(1)             where an upper bound y <= 1 takes hold; bounded ones need none
    vertex  = omega(1)                   so that Omega can be shifted to be 0 at the vertices of C

Every algorithm of the library is generic in them. A shift of z is absorbed by tau: each phi is placed where it loses no
digits. One with an edge of support and a slope there (Quadratic, Tsallis from alpha = 2 on) has the edge at z = 0, so
that small y are differences of small numbers. Quadratic and Entropy are Tsallis(2) and Tsallis(1) up to a shift.

They use only exp, expm1, log, log1p and exact arithmetic: torch's sigmoid and logaddexp round differently in the tail
of a vector, so that the answer for one row would depend on where the row lies in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._axes import check_number, concrete
from ._regularizer import Mixing, Regularizer
from .kernels.torch import LOGSUMEXP
from .solvers import Sinkhorn


def log_ratio(z: Tensor, beta: Tensor) -> Tensor:
    """log(1 + beta z) / beta, z at beta = 0, with accurate derivatives in both for beta z > -1."""
    t = beta * z
    small = t.abs() < 1e-2
    s = torch.where(small, t, 0)
    series = 1 - s * (1 / 2 - s * (1 / 3 - s * (1 / 4 - s * (1 / 5 - s * (1 / 6 - s * (1 / 7 - s * (1 / 8 - s / 9)))))))
    safe_beta = torch.where(small, 1, beta)
    return torch.where(small, z * series, torch.log1p(torch.where(small, 0, t)) / safe_beta)


@dataclass(frozen=True, eq=False, init=False)
class Tsallis(Regularizer):
    """Tsallis entropies: Omega(y) = sum (y^alpha - y) / (alpha (alpha - 1)), so that argmax is entmax_alpha.

    alpha = 1 is Entropy (softmax), 2 Quadratic (sparsemax). phi(z) = max(b z, 0)^(1/b), b = alpha - 1.
    On CappedSimplex the answer is clipped at 1; the p-norm relaxation of strength eps is Tsallis(p, eps (p - 1)).

    Args:
        alpha: >= 1; a number or a tensor shaped as eps may be, with gradient.
        eps: strength, in the unit of x; a number, a positive tensor with gradient, or ``Mixing``.

    Source: Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models".

    Example:
        >>> so.argmax(torch.tensor([1.0, 0.3, -0.2, 0.8]), smoothing=so.Tsallis(1.5, 1.0))
        tensor([0.4970, 0.1260, 0.0110, 0.3660])
    """

    alpha: float | Tensor

    roles = frozenset({"simplex", "capped"})

    def __init__(self, alpha: float | Tensor, eps: float | Tensor | Mixing) -> None:
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "eps", eps)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.alpha, "Tsallis alpha")
        if isinstance(self.alpha, Tensor):
            if concrete(self.alpha) and not bool((self.alpha >= 1).all()):
                raise ValueError(f"Tsallis alpha must be >= 1 everywhere, got a minimum of {self.alpha.min().item()}")
        elif not 1 <= self.alpha < math.inf:
            raise ValueError(f"Tsallis alpha must be a finite number >= 1, got {self.alpha}")

    @property
    def shape(self) -> float | Tensor:
        return self.alpha

    def at(self, eps: float | Tensor | Mixing, shape: float | Tensor) -> Tsallis:
        return Tsallis(shape, eps)

    @classmethod
    def make(cls, eps: float | Tensor | Mixing, shape: float | Tensor) -> Tsallis:
        return cls(shape, eps)

    def cvxpy(self, y: Any) -> Any:
        """eps Omega(y) as an expression of cvxpy, for ``ConvexSet``; a constant eps and alpha."""
        import cvxpy as cp

        if self.alpha == 1:
            return -cp.sum(cp.entr(y)) * self.eps
        return self.eps * (cp.sum(cp.power(y, self.alpha)) - cp.sum(y)) / (self.alpha * (self.alpha - 1))

    @staticmethod
    def cap(shape: Tensor) -> Tensor | float:
        return torch.where(shape >= 2, 1 / (shape - 1).clamp(min=1), 1)

    @staticmethod
    def _log_phi(z: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        """The support, and log phi on it: log(b z)/b from b = 1 on, log(1 + b (z - 1))/b below."""
        beta, steep = shape - 1, shape >= 2
        # phi <= e^(z - 1), which is 0 below -800 whatever alpha; there z^2, the derivative in alpha, may overflow
        support = (torch.where(steep, beta * z, 1 + beta * (z - 1)) > 0) & (z > -800)
        z = torch.where(support, z, 1)
        steep_log = torch.where(steep, beta * z, 1).log() / beta.clamp(min=1)
        return support, torch.where(steep, steep_log, log_ratio(torch.where(steep, 0, z - 1), beta))

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        support, log_y = Tsallis._log_phi(z, shape)
        return torch.where(support, log_y.exp(), 0)

    @staticmethod
    def dphi(z: Tensor, shape: Tensor) -> Tensor:
        support, log_y = Tsallis._log_phi(z, shape)
        return torch.where(support, ((2 - shape) * log_y).exp(), 0)

    @staticmethod
    def psi(z: Tensor, shape: Tensor) -> Tensor:
        support, log_y = Tsallis._log_phi(z, shape)
        return torch.where(support, (shape * log_y).exp() / shape, 0)

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        beta, steep, log_y = shape - 1, shape >= 2, y.log()
        gentle = torch.where(beta == 0, log_y, torch.expm1(beta * log_y) / torch.where(beta == 0, 1, beta))
        return torch.where(steep, (beta * log_y).exp() / beta.clamp(min=1), gentle + 1)

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        # by parts, with psi(phi_inverse(y)) = y^alpha/alpha
        positive = y > 0
        safe = torch.where(positive, y, 1)
        power = ((shape - 1) * safe.log()).exp()
        return torch.where(positive, safe * (Tsallis.phi_inverse(safe, shape) - power / shape), 0)

    @staticmethod
    def vertex(shape: Tensor) -> Tensor | float:
        return Tsallis.cap(shape) - 1 / shape


@dataclass(frozen=True, eq=False)
class Quadratic(Regularizer):
    """Squared Euclidean norm: Omega(y) = |y|^2 / 2, 0 at the vertices; argmax is the projection of theta/eps onto C.

    Sparse and piecewise linear: argmax is sparsemax, rank and sort are those of Blondel et al. 2020.

    Args:
        eps: strength, in the unit of theta/y; a number, a positive tensor with gradient, or ``Mixing``.

    Source: Martins, Astudillo 2016; Blondel, Teboul, Berthet, Djolonga 2020, "Fast differentiable sorting and ranking".

    Example:
        >>> so.rank(torch.tensor([5.0, 1.0, 2.0]), smoothing=so.Quadratic(2.0))
        tensor([3.0000, 1.2500, 1.7500])
    """

    roles = frozenset({"simplex", "capped", "box", "step", "order", "permutahedron", "transport"})
    pair_scale = 2.0
    newton_steps = 1

    def cvxpy(self, y: Any) -> Any:
        """eps Omega(y) as an expression of cvxpy, for ``ConvexSet``; a constant eps."""
        import cvxpy as cp

        return self.eps * cp.sum_squares(y) / 2

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0)

    @staticmethod
    def dphi(z: Tensor, shape: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), 0)

    @staticmethod
    def psi(z: Tensor, shape: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0).square() / 2

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        return y

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        return y.square() / 2

    @staticmethod
    def cap(shape: Tensor) -> Tensor | float:
        return 1.0

    @staticmethod
    def vertex(shape: Tensor) -> Tensor | float:
        return 0.5


@dataclass(frozen=True, eq=False)
class Entropy(Regularizer):
    """Shannon's negative entropy: Omega(y) = sum y log y, 0 at the vertices; argmax is softmax(theta/eps).

    On CappedSimplex phi = min(e^z, 1); on the Hypercube it means BinaryEntropy; on a sort it means
    log argmax over the permutahedron of e^x, so that negative values can be sorted too.

    Args:
        eps: strength, in the unit of theta; a number, a positive tensor with gradient, or ``Mixing``.
        solver: :class:`Sinkhorn` with options, for Birkhoff and Transport; in rank and sort it asks for Birkhoff.

    Source: Blondel, Roulet 2024, "The elements of differentiable programming".

    Example:
        >>> so.argmax(torch.tensor([0.0, 1.0]), smoothing=so.Entropy(1.0))
        tensor([0.2689, 0.7311])
    """

    solver: Sinkhorn | None = None  # type: ignore[misc]

    roles = frozenset({"simplex", "capped", "box", "step", "permutahedron", "transport"})
    log_residual = True
    pool_rule = LOGSUMEXP
    closed_form = True

    def cvxpy(self, y: Any) -> Any:
        """eps Omega(y) as an expression of cvxpy, for ``ConvexSet``; a constant eps."""
        import cvxpy as cp

        return -cp.sum(cp.entr(y)) * self.eps

    @classmethod
    def on_box(cls) -> type[Regularizer]:
        return BinaryEntropy

    @staticmethod
    def to_pool(w: Tensor) -> Tensor:
        return w.log()

    @staticmethod
    def from_pool(y: Tensor) -> Tensor:
        return y.exp()

    @staticmethod
    def simplex_argmax(u: Tensor) -> Tensor:
        return torch.softmax(u, -1)

    @staticmethod
    def simplex_max(u: Tensor) -> Tensor:
        return torch.logsumexp(u, -1, keepdim=True)

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        return z.exp()

    dphi = phi
    psi = phi

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        return y.log()

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        return torch.special.xlogy(y, y) - y

    @staticmethod
    def cap(shape: Tensor) -> Tensor | float:
        return 0.0

    @staticmethod
    def vertex(shape: Tensor) -> Tensor | float:
        return -1.0


@dataclass(frozen=True, eq=False)
class BinaryEntropy(Regularizer):
    """Fermi-Dirac entropy: Omega(y) = sum y log y + (1 - y) log(1 - y); phi is the logistic sigmoid.

    The Fermi-Dirac k-subset: the optimal-transport top-k of Xie et al. 2020 at strength e is this one at e/2.

    Args:
        eps: strength, in the unit of theta; a number, a positive tensor with gradient, or ``Mixing``.

    Source: Blondel, Roulet 2024; Sander et al. 2023, "Fast, differentiable and sparse top-k".

    Example:
        >>> so.topk_mask(torch.tensor([1.0, 0.3, -0.2, 0.8]), 2, smoothing=so.BinaryEntropy(0.25))
        tensor([0.8776, 0.3036, 0.0557, 0.7631])
    """

    roles = frozenset({"capped", "box", "step"})
    bounded = True
    log_residual = True

    def cvxpy(self, y: Any) -> Any:
        """eps Omega(y) as an expression of cvxpy, for ``ConvexSet``; a constant eps."""
        import cvxpy as cp

        return -(cp.sum(cp.entr(y)) + cp.sum(cp.entr(1 - y))) * self.eps

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        t = torch.where(z < 0, z, -z).exp()
        return torch.where(z < 0, t, 1) / (1 + t)

    @staticmethod
    def dphi(z: Tensor, shape: Tensor) -> Tensor:
        t = torch.where(z < 0, z, -z).exp()
        return t / (1 + t).square()  # not s (1 - s), which cancels for large z

    @staticmethod
    def psi(z: Tensor, shape: Tensor) -> Tensor:
        return torch.log1p(torch.where(z < 0, z, -z).exp()) + torch.where(z < 0, 0, z)

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        return y.log() - torch.log1p(-y)

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        return torch.special.xlogy(y, y) + torch.special.xlogy(1 - y, 1 - y)


@dataclass(frozen=True, eq=False)
class Laplace(Regularizer):
    """The regularizer whose phi is the distribution function of the Laplace law (LapSum).

    phi(z) = e^z / 2 for z < 0, 1 - e^-z / 2 else; omega(y) = y log 2y - y for y <= 1/2, mirrored above.

    Args:
        eps: strength, in the unit of theta; a number, a positive tensor with gradient, or ``Mixing``.

    Source: Struski et al. 2025, "LapSum: one method to differentiate them all".

    Example:
        >>> so.topk_mask(torch.tensor([1.0, 0.0, -1.0]), 1, smoothing=so.Laplace(0.1)).sum()
        tensor(1.)
    """

    roles = frozenset({"capped", "step", "cdf"})
    bounded = True
    log_residual = True

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        tail = Laplace.dphi(z, shape)
        return torch.where(z < 0, tail, 1 - tail)

    @staticmethod
    def dphi(z: Tensor, shape: Tensor) -> Tensor:
        return torch.where(z < 0, z, -z).exp() / 2  # not -|z|, whose derivative at 0 is 0

    @staticmethod
    def psi(z: Tensor, shape: Tensor) -> Tensor:
        return Laplace.dphi(z, shape) + torch.where(z < 0, 0, z)

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        return torch.where(y < 0.5, torch.log(2 * y), -torch.log(2 * (1 - y)))

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        low = torch.minimum(y, 1 - y)
        return torch.special.xlogy(low, 2 * low) - low
