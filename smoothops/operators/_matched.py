"""The programme of an order over Birkhoff's polytope, argmax <rho x', P> - eps Omega(P), as a relaxation of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .._regularizer import Mixing, Regularizer
from ..polytopes.transport import Transport
from ..relaxations import Relaxation


class _Started(Transport):
    """A transport polytope for theta <= 0 that is 0 on a plan: the solution of the hard programme is known."""

    anneal = False


class Matched(Relaxation):
    """P(x), doubly stochastic, for a regularizer that softens Birkhoff's polytope; the sort is P x, the rank P' rho."""

    def __init__(self, reg: Regularizer) -> None:
        if isinstance(reg.eps, Mixing):
            raise ValueError("Mixing chooses no eps on Birkhoff's polytope; give a number or a tensor")
        object.__setattr__(self, "eps", reg.eps)
        object.__setattr__(self, "reg", reg)

    def matrix(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        place = torch.arange(x.shape[-1], device=x.device)
        taken = torch.ones_like(x[..., :1]).expand(x.shape) if m is None else (place < m).to(x.dtype)
        reg: Regularizer = self.reg.at(eps.unsqueeze(-1), 1.0)  # type: ignore[attr-defined]
        return _Started(taken, taken).argmax(_reduced(x, taken > 0), reg)

    def values(self, x: Tensor, eps: Tensor, m: Tensor | None) -> Tensor:
        return (self.matrix(x, eps, m) * x.unsqueeze(-2)).sum(-1)  # rounds each row alike, which @ does not


def _reduced(x: Tensor, taken: Tensor) -> Tensor:
    """rho_k x_i minus the potentials of the hard programme, which change no P.

    With r_i the rank of x_i and c_l = (x_(l) + x_(l+1))/2, what is left is -sum |x_i - c_l| over the steps l from r_i
    to k: <= 0, and 0 where k = r_i. A sum of terms of one sign keeps its digits at any scale.
    """
    held = x.detach()
    order = torch.where(taken, held, torch.inf).argsort(dim=-1, stable=True)
    s = torch.where(taken, held, 0).gather(-1, order)  # sorted, the items that are taken first
    r = order.argsort(dim=-1).unsqueeze(-1)
    steps = ((s[..., 1:] + s[..., :-1]) / 2).unsqueeze(-2) - held.unsqueeze(-1)  # (item, step), >= 0 from r_i on
    above = torch.arange(x.shape[-1] - 1, device=x.device) >= r
    none = torch.zeros_like(r, dtype=x.dtype)
    up = torch.cat([none, torch.where(above, steps, 0).cumsum(-1)], -1)
    down = torch.cat([torch.where(above, 0, -steps).flip(-1).cumsum(-1).flip(-1), none], -1)
    k = torch.arange(x.shape[-1], device=x.device)
    theta = (k - r) * (x - held).unsqueeze(-1) - (up + down)
    return theta.mT
