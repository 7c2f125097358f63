"""Vertices of transport polytopes that maximize a linear function, one matrix at a time on the CPU, by scipy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._opaque import batch_shape, opaque


def _constraints(n: int, m: int) -> Any:
    """The matrix that takes P, flattened, to its row and column sums."""
    from scipy import sparse

    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    return sparse.vstack([rows, columns]).tocsc()


def _flow(theta: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """argmax <theta, P> over the transport polytope without the pairs where theta is -inf; None where that is empty."""
    from scipy import optimize

    n, m = theta.shape
    allowed = np.isfinite(theta).ravel()
    scale = np.abs(theta[np.isfinite(theta)]).max(initial=0) or 1.0
    # the last equation follows from the others: without it, rounding of the sums leaves no contradiction
    equations, sums = _constraints(n, m)[:-1][:, allowed], np.concatenate([a, b])[:-1]
    found = optimize.linprog(-theta.ravel()[allowed] / scale, A_eq=equations, b_eq=sums, method="highs-ds")
    if found.status == 2 or found.x is None:
        return None
    p = np.zeros(n * m)
    p[allowed] = found.x.clip(min=0)
    return p.reshape(n, m)


def _matching(theta: np.ndarray) -> np.ndarray | None:
    """The permutation matrix that maximizes <theta, P>, ties as scipy breaks them."""
    from scipy import optimize

    try:
        rows, columns = optimize.linear_sum_assignment(theta, maximize=True)
    except ValueError:  # "cost matrix is infeasible"
        return None
    p = np.zeros(theta.shape)
    p[rows, columns] = 1
    return p


def feasible(allowed: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether some P >= 0 on the allowed pairs (n, m) has the marginals a (n,) and b (m,)."""
    theta = np.where(allowed.cpu().numpy(), 0.0, -np.inf)
    return _flow(theta, a.double().cpu().numpy(), b.double().cpu().numpy()) is not None


def _vertex(theta: np.ndarray, a: np.ndarray, b: np.ndarray, partial: bool) -> np.ndarray | None:
    """``partial``: the last row and column take what the others leave."""
    own = slice(0, -1) if partial else slice(None)
    if not a[own].size or (not partial and a.size != b.size) or not (np.append(a[own], b[own]) == a[0]).all():
        return _flow(theta, a, b)
    p = _matching(theta[own, own])
    if p is None or not partial:
        return p if p is None else p * a[0]
    whole = np.zeros(theta.shape)
    whole[own, own] = p * a[0]
    whole[own, -1], whole[-1, own] = a[own] - whole[own].sum(1), b[own] - whole[:, own].sum(0)
    return whole


def _fake(theta: Tensor, a: Tensor, b: Tensor, *_: bool) -> Tensor:
    return theta.new_empty(*batch_shape(*(t.flatten(-2) for t in (theta, a, b))), *theta.shape[-2:])


@opaque("transport_vertex(Tensor theta, Tensor a, Tensor b, bool partial) -> Tensor", _fake)
def vertex(theta: Tensor, a: Tensor, b: Tensor, partial: bool) -> Tensor:
    """argmax <theta, P> for theta (..., n, m), a (..., n, 1), b (..., 1, m): an operator without derivative."""
    shape = _fake(theta, a, b).shape
    batch = shape[:-2]
    given = [
        t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]).double().cpu().numpy()
        for t in (theta, a, b)
    ]
    answers = np.zeros((batch.numel(), *shape[-2:]))
    for i, (t, row, column) in enumerate(zip(*given, strict=True)):
        p = _vertex(t, row[:, 0], column[0], partial)
        if p is None:
            raise ValueError(f"theta = -inf leaves no P >= 0 with the marginals a and b (matrix {i} of the batch)")
        answers[i] = p
    return torch.from_numpy(answers).to(theta).reshape(shape)


def all_vertices(a: Tensor, b: Tensor) -> Tensor:
    """All vertices (number, n, m) for a (n,), b (m,): feasible solutions of n + m - 1 equations. For tiny n and m."""
    n, m = len(a), len(b)
    equations = torch.from_numpy(_constraints(n, m).toarray())[:-1]
    sums = torch.cat([a, b]).double()[:-1]
    found: dict[tuple[float, ...], Tensor] = {}
    for basis in itertools.combinations(range(n * m), n + m - 1):
        square = equations[:, list(basis)]
        if abs(torch.linalg.det(square)) < 0.5:  # its minors are 0, 1 or -1
            continue
        p = torch.zeros(n * m, dtype=torch.float64)
        p[list(basis)] = torch.linalg.solve(square, sums)
        if (p >= -1e-12).all():
            p = p.clamp(min=0)
            found[tuple(((p * 1e9).round() / 1e9).tolist())] = p
    return torch.stack([p for _, p in sorted(found.items(), reverse=True)]).reshape(-1, n, m)
