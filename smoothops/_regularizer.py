"""What a regularizer eps * Omega supplies to the algorithms, which are generic in it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ._axes import check_number, concrete
from .kernels.torch import MEAN
from .smoothing import Problem, Smoothing

# not abstract: a set described to cvxpy, say, asks for omega alone
MISSING = "this regularizer supplies no {}, which the polytope it was given to needs; see docs/extending.md"
FAMILIES: dict[str, type[Regularizer]] = {}


@dataclass(frozen=True, eq=False)
class Mixing:
    """A strength that adapts to the data: eps, one a row, such that an output mixes about ``inputs`` inputs.

    A fixed eps is dead or hard at some length and scale; ``Quadratic(Mixing(3.0))`` is neither. See
    :func:`mixing_eps` for what is counted. The chosen eps carries no gradient: train on scores whose scale something
    else fixes (a normalization), or the gradient at fixed eps may shrink them without end.

    Example:
        >>> so.rank(torch.tensor([0.1, 0.2, 1e6]), smoothing=so.Quadratic(so.Mixing(3.0))).shape
        torch.Size([3])
    """

    inputs: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.inputs, (Tensor, bool)) or not self.inputs >= 1:
            raise ValueError(f"Mixing needs a number of inputs >= 1, got {self.inputs!r}")


@dataclass(frozen=True, eq=False)
class Regularizer(Smoothing):
    """eps * Omega. ``eps``: a number, a positive tensor (0-d, or of x's dims with size 1 along dim), or ``Mixing``."""

    eps: float | Tensor | Mixing

    solver: ClassVar[Any] = None  # how a programme without closed form is solved; None: the default of the set
    roles: ClassVar[frozenset[str]] = frozenset()  # the kinds of polytope that it softens
    bounded: ClassVar[bool] = False  # phi lies in [0, 1] by itself
    newton_steps: ClassVar[int] = 2  # plain steps that carry derivatives: 1 is exact where phi'' = 0
    log_residual: ClassVar[bool] = False  # Newton on log sum phi converges faster than on sum phi
    pair_scale: ClassVar[float] = 1.0  # the simplex of (x, 0) at eps is the hypercube at this multiple of eps
    pool_rule: ClassVar[int] = MEAN  # how a block of a permutahedron is summed up
    closed_form: ClassVar[bool] = False  # on the simplex: supplies simplex_argmax and simplex_max; dphi = phi

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FAMILIES[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.eps, Mixing):
            check_positive(self.eps, f"{type(self).__name__} eps", zero=not isinstance(self.eps, Tensor))

    @property
    def shape(self) -> float | Tensor:
        """The parameter of phi beside eps; 1 where there is none."""
        return 1.0

    def at(self, eps: float | Tensor | Mixing, shape: float | Tensor) -> Regularizer:
        """The same with another strength and shape."""
        return dataclasses.replace(self, eps=eps)

    @classmethod
    def make(cls, eps: float | Tensor | Mixing, shape: float | Tensor) -> Regularizer:
        """One of this family, of that strength and shape."""
        return cls(eps)

    @classmethod
    def on_box(cls) -> type[Regularizer]:
        """The scalar functions that this regularizer stands for where no sum couples the items."""
        return cls

    def solve(self, problem: Problem) -> Tensor:
        if not isinstance(self.eps, (Tensor, Mixing)) and self.eps == 0:
            return problem.hard()
        return problem.soft(self)

    @staticmethod
    def phi(z: Tensor, shape: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("phi"))

    @staticmethod
    def dphi(z: Tensor, shape: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("dphi"))

    @staticmethod
    def psi(z: Tensor, shape: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("psi"))

    @staticmethod
    def phi_inverse(y: Tensor, shape: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("phi_inverse"))

    @staticmethod
    def omega(y: Tensor, shape: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("omega"))

    @staticmethod
    def cap(shape: Tensor) -> Tensor | float:
        raise NotImplementedError(MISSING.format("cap"))

    @staticmethod
    def vertex(shape: Tensor) -> Tensor | float:
        return 0.0

    @staticmethod
    def to_pool(w: Tensor) -> Tensor:
        """The vertex w of a permutahedron in the coordinates in which its blocks are pooled."""
        return w

    @staticmethod
    def from_pool(y: Tensor) -> Tensor:
        return y

    @staticmethod
    def simplex_argmax(u: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("simplex_argmax"))

    @staticmethod
    def simplex_max(u: Tensor) -> Tensor:
        raise NotImplementedError(MISSING.format("simplex_max"))


def check_positive(value: float | Tensor, name: str, *, zero: bool) -> None:
    """Raise unless a number, or every entry of a tensor that may be looked at, is positive (or zero, if allowed)."""
    check_number(value, name)
    if isinstance(value, Tensor):
        if concrete(value) and not bool((value > 0).all()):
            raise ValueError(f"{name} must be positive everywhere, got a minimum of {value.min().item()}")
    elif math.isnan(value) or value < 0 or (value == 0 and not zero) or math.isinf(value):
        raise ValueError(f"{name} must be positive{' or 0 (hard)' if zero else ''} and finite, got {value}")
