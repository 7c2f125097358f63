"""Laws of the noise for stochastic smoothing: density, draws, mirrored draws and mean, of one coordinate at scale 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Noise(ABC):
    """The law of one coordinate of the noise, at scale 1: its mean, and ``mirror`` unless it is symmetric about 0."""

    mean: ClassVar[float] = 0.0

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), with derivatives of every order."""

    @abstractmethod
    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Independent draws, all finite."""

    def mirror(self, z: Tensor) -> Tensor:
        """Q(1 - F(z)), F the distribution function and Q its inverse: of the same law, as small as z is large."""
        return -z


def _uniform(
    shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniform on (0, 1): torch's 0, one draw in 2^53, becomes half the next value."""
    u = torch.rand(shape, generator=generator, dtype=dtype, device=device)
    return u.clamp(min=torch.finfo(dtype).eps / 4)


@dataclass(frozen=True, eq=False)
class Normal(Noise):
    """Standard normal noise: p(z) = exp(-z^2/2)/sqrt(2 pi), standard deviation 1.

    Example:
        >>> so.Normal().log_prob(torch.tensor(0.0))
        tensor(-0.9189)
    """

    def log_prob(self, z: Tensor) -> Tensor:
        return -z.square() / 2 - math.log(2 * math.pi) / 2

    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Gumbel(Noise):
    """Gumbel noise: F(z) = exp(-exp(-z)), standard deviation pi/sqrt(6) = 1.28, mean 0.5772 (Euler's constant).

    The perturbed argmax is softmax(theta/eps), and the perturbed maximum, of centred noise, eps logsumexp(theta/eps).

    Example:
        >>> so.Gumbel().mirror(torch.tensor(0.0))
        tensor(0.7794)
    """

    mean = 0.5772156649015329

    def log_prob(self, z: Tensor) -> Tensor:
        return -z - (-z).exp()

    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return -(-_uniform(shape, generator, dtype, device).log()).log()

    def mirror(self, z: Tensor) -> Tensor:
        # t = -log F(z) becomes -log(1 - e^-t): through expm1 where e^-t is near 1, through log1p where it is small
        t = (-z).exp()
        near = t < math.log(2)
        mirrored = torch.where(near, (-torch.expm1(-torch.where(near, t, 1))).log(), torch.log1p(-(-t).exp()))
        return -(-mirrored).log()


@dataclass(frozen=True, eq=False)
class Logistic(Noise):
    """The logistic law, F(z) = 1/(1 + exp(-z)): noise for ``Perturbed``, a sigmoid for ``SortingNetwork``.

    As noise it is the law of log(U/(1 - U)), of standard deviation pi/sqrt(3) = 1.81; a step becomes the sigmoid:
    E 1[u + eps Z > 0] = F(u/eps). In a network a compare-exchange errs by at most 0.279 eps, and its minimum may fall
    as an input rises. Source: Petersen, Borgelt, Kuehne, Deussen 2021, "Differentiable sorting networks for scalable
    sorting and ranking".

    Example:
        >>> so.Logistic().log_prob(torch.tensor(0.0))
        tensor(-1.3863)
        >>> so.sort(torch.tensor([1.0, 0.0]), smoothing=so.SortingNetwork(0.5, so.Logistic()))
        tensor([0.1192, 0.8808])
    """

    def log_prob(self, z: Tensor) -> Tensor:
        t = torch.where(z < 0, z, -z)  # not -|z|, whose derivative at 0 is 0
        return t - 2 * torch.log1p(t.exp())

    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        u = _uniform(shape, generator, dtype, device)
        return u.log() - torch.log1p(-u)

    def tail(self, s: Tensor) -> Tensor:
        """F(-s) for s >= 0, accurate where it is small."""
        t = (-s).exp()
        return t / (1 + t)
