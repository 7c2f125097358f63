"""Inputs, losses, and what Hard must equal from torch alone: shared by the laws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# --- inputs and losses -----------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """N(0, scale^2), the same numbers wherever it is called."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def cotangent(y: Tensor) -> Tensor:
    """Weights of a loss that no conserved sum hides: a plain sum of ranks has gradient 0."""
    return torch.cos(1 + torch.arange(y.numel(), dtype=torch.float64, device=y.device) * 1.7).reshape(y.shape)


def loss(y: Tensor) -> Tensor:
    return (y.to(torch.float64) * cotangent(y)).sum()


def value_and_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), and the gradient of its weighted sum."""
    x = x.detach().clone().requires_grad_()
    y = f(x)
    (gradient,) = torch.autograd.grad(loss(y), x)
    return y.detach(), gradient


# --- arguments of the registry's lines -------------------------------------------------------------------------------


def along(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """The vector ``v`` laid along ``dim`` of a tensor with as many dimensions as x."""
    shape = [1] * x.ndim
    shape[dim] = v.shape[0]
    return v.reshape(shape)


def present(x: Tensor, dim: int) -> Tensor:
    """A mask along ``dim`` that leaves out the second of every three items."""
    return along(torch.arange(x.shape[dim], device=x.device) % 3 != 1, x, dim)


def importance(x: Tensor, dim: int) -> Tensor:
    """Weights along ``dim``, none of them equal to its neighbour."""
    return along(1 + torch.arange(x.shape[dim], dtype=torch.float64, device=x.device) % 3 / 2, x, dim)


def spread(n: int, shift: float = 0.7) -> Tensor:
    """Values of a permutahedron: positive for shift > 0, unevenly spaced, not sorted."""
    return torch.arange(n, dtype=torch.float64).roll(n // 2) ** 1.2 * 0.6 + shift


def repeated(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) // 2 + 1


def rho(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


# --- what Hard must equal, from torch alone ---------------------------------------------------------------------------


def hard_one(x: Tensor, d: int) -> Tensor:
    return torch.zeros_like(x).scatter(d, x.argmax(d, keepdim=True), 1.0)


def hard_mask(x: Tensor, d: int, k: int, largest: bool = True) -> Tensor:
    return torch.zeros_like(x).scatter(d, x.topk(k, d, largest).indices, 1.0)


def hard_part(x: Tensor, d: int, k: float) -> Tensor:
    """Fractional k: the item after the first floor(k) has the rest."""
    place = x.argsort(dim=d, descending=True, stable=True).argsort(d)
    return (k - place).clamp(0, 1).to(x.dtype)


def hard_rank(x: Tensor, d: int, weights: Tensor | None = None) -> Tensor:
    """The weight below each item, and half the weight that ties with it."""
    x = x.movedim(d, -1)
    w = torch.ones_like(x).double() if weights is None else weights.movedim(d, -1).expand_as(x)
    below = (x.unsqueeze(-2) < x.unsqueeze(-1)).double() @ w.unsqueeze(-1)
    level = (x.unsqueeze(-2) == x.unsqueeze(-1)).double() @ w.unsqueeze(-1)
    return (below + level / 2 + 0.5).squeeze(-1).movedim(-1, d).to(x.dtype)
