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
    """rho_k x_i minus the potentials of the hard programme, which change no P: (k - r_i) x_i - (f_k - f_(r_i)).

    r_i is the rank of x_i, and f any sum of c_k in [x_(k), x_(k+1)], here the midpoints: what is left is <= 0, and 0
    where k = r_i.
    """
    known = torch.where(taken, x.detach(), torch.inf)
    order = known.argsort(dim=-1, stable=True)
    s = torch.where(taken, known.gather(-1, order), 0)  # sorted, the items that are taken first
    f = torch.cat([torch.zeros_like(s[..., :1]), (s[..., 1:] + s[..., :-1]) / 2], -1)[..., : s.shape[-1]].cumsum(-1)
    r = order.argsort(dim=-1)
    k = torch.arange(x.shape[-1], device=x.device)
    steps = (k.unsqueeze(-1) - r.unsqueeze(-2)).to(x.dtype)
    return steps * x.unsqueeze(-2) - (f.unsqueeze(-1) - f.gather(-1, r).unsqueeze(-2))
