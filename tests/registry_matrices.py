"""Lines of the registry: transport polytopes, and orders over Birkhoff's; a matrix is reduced to a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from oracles import present, repeated, rho, spread
from registry_more import LAW, placed
from registry_parts import ABSENT, WEIGHTS, Kind, Operator, item_sum, mean, rank_mean, rank_sum
from torch import Tensor

import smoothops as so

ROW = Kind(None, None, 0, symmetric_ties=False)
VALUE = Kind(None, None, 1, symmetric_ties=False)
SORTED = Kind("invariant", 1.0, 1, symmetric_ties=False)
FAR = {"extreme": "theta/eps beyond what float64 resolves raises; see test_transport_edges"}
ROUNDED = dict.fromkeys(("half", "precision"), "theta, and the matrix before it is reduced, are rounded first")
FIXED = {
    **LAW,
    **ROUNDED,
    **FAR,
    "scale": "the costs have a part that x does not scale",
    "bounded": "a product of two rows",
}
STEEP = {"bounded": "theta is a product with the positions"}


def costs(x: Tensor) -> Tensor:
    """theta (..., n, n) that is no outer product."""
    n = x.shape[-1]
    return x.unsqueeze(-2) * torch.cos(rho(n)).unsqueeze(-1).to(x) + torch.sin(1.7 * rho(n * n)).reshape(n, n).to(x)


def masses(n: int) -> tuple[Tensor, Tensor]:
    a, b = spread(n), repeated(n)
    return a, b * (a.sum() / b.sum())


def transport(n: int) -> so.Polytope:
    return so.Transport(*masses(n))


def unbalanced(n: int) -> so.Polytope:
    a, b = masses(n)
    return so.Transport(a, 0.7 * b, partial=True)


def birkhoff(n: int) -> so.Polytope:
    return so.Birkhoff()


def floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


def of_matrices(s: so.Smoothing) -> so.Smoothing:
    """A strength for each row is one for each matrix."""
    eps = getattr(s, "eps", None)
    return dataclasses.replace(s, eps=eps.unsqueeze(-1)) if isinstance(eps, Tensor) and eps.ndim else s


def reduced(polytope: Callable[[int], so.Polytope]) -> Callable[..., Tensor]:
    def call(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
        x = floating(x.movedim(d, -1))
        p = polytope(x.shape[-1]).argmax(costs(x), of_matrices(s))
        return (p * spread(x.shape[-1]).to(p)).sum(-1).movedim(-1, d)

    return call


def maximum(polytope: Callable[[int], so.Polytope]) -> Callable[..., Tensor]:
    def call(x: Tensor, s: so.Smoothing, d: int) -> Tensor:
        x = floating(x.movedim(d, -1))
        return polytope(x.shape[-1]).max(costs(x), of_matrices(s)).unsqueeze(d)

    return call


def softened(family: str) -> list[Operator]:
    """What takes either regularizer; a line each, since Entropy is a smoothing of its own kind there."""
    # fmt: off
    lines = [
        Operator("Birkhoff.argmax", reduced(birkhoff), ROW, (family,), exempt=FIXED),
        Operator("Birkhoff.max", maximum(birkhoff), VALUE, (family,), exempt=FIXED),
        Operator("Transport.argmax", reduced(transport), ROW, (family,), exempt=FIXED),
        Operator("Transport.max", maximum(transport), VALUE, (family,), exempt=FIXED),
        Operator("Transport.argmax-partial", reduced(unbalanced), ROW, (family,), exempt=FIXED),
        Operator("Transport.max-partial", maximum(unbalanced), VALUE, (family,), exempt=FIXED),
        Operator("argsort-birkhoff", placed, Kind(None, 0.0, 0, symmetric_ties=False), (family,),
                 exempt={**LAW, **STEEP, "half": "a difference of rounded cotangents"}),
    ]
    # fmt: on
    return lines


# fmt: off
MATRICES = [
    *softened("sinkhorn"),
    *softened("quadratic"),
    Operator("rank-birkhoff", lambda x, s, d: so.rank(x, d, smoothing=s), WEIGHTS, ("sinkhorn",), eps=0.7,
             total=rank_sum, centre=rank_mean, exempt={**LAW, **STEEP}),
    Operator("rank-where-birkhoff", lambda x, s, d: so.rank(x, d, where=present(x, d), smoothing=s), WEIGHTS,
             ("sinkhorn",), without=lambda x, s, d: so.rank(x, d, smoothing=s), exempt={**LAW, **STEEP, **ABSENT}),
    Operator("sort-birkhoff", lambda x, s, d: so.sort(x, d, smoothing=s), SORTED, ("sinkhorn",), total=item_sum,
             centre=mean, exempt={**LAW, **STEEP}),
    Operator("sort-where-birkhoff", lambda x, s, d: so.sort(x, d, where=present(x, d), fill=0.0, smoothing=s), SORTED,
             ("sinkhorn",), without=lambda x, s, d: so.sort(x, d, smoothing=s), exempt={**LAW, **STEEP, **ABSENT}),
    Operator("median-birkhoff", lambda x, s, d: so.median(x, d, True, smoothing=s), SORTED, ("sinkhorn",),
             exempt={**LAW, **STEEP, "row strength": "a reduction"}),
]
# fmt: on
