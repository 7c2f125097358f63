"""Sparse factorizations of J = [[P, A'], [-C_s A, C_y]], one a sample, also where J is singular."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# beyond this condition number J counts as singular: a redundant constraint, a constraint that is active with multiplier
# zero, or a solution that is not unique; the derivative is then the least-squares one of least norm
SINGULAR = 1e-11
DENSE = 800  # up to here a singular J gets its pseudo-inverse by singular values, beyond it a damped sparse one
DAMPING = 1e-5
LARGE = 2**24  # numbers in the dense matrices that are made at a time
ROUNDS = 30


class Pattern:
    """Where J may be other than zero, from the patterns of P and A and from blocks (1, k, d, d) that are full or zero.

    It does not depend on the numbers, so that a sample is factorized alike whatever samples it comes with.
    """

    def __init__(self, P: Tensor, A: Tensor, slopes: list[tuple[Tensor, Tensor]]) -> None:
        kept = dense_transposed(P, A, slopes)[0] != 0
        self.kept = kept
        self.indices = kept.nonzero()[:, 1].int().numpy()
        self.ends = torch.cat([torch.zeros(1, dtype=torch.int32), kept.sum(1).cumsum(0).int()]).numpy()

    def matrices(self, P: Tensor, A: Tensor, slopes: list[tuple[Tensor, Tensor]]) -> list[Any]:
        """J of each sample in compressed columns, from P (batch, n, n), A (batch, m, n) and the blocks of C_s, C_y."""
        from scipy import sparse

        shape = tuple(self.kept.shape)
        most = max(1, LARGE // max(1, self.kept.numel()))
        out: list[Any] = []
        for part in torch.arange(len(P)).split(most) if len(P) else []:
            dense = dense_transposed(P[part], A[part], [(u[part], v[part]) for u, v in slopes])
            out += [sparse.csc_matrix((d, self.indices, self.ends), shape) for d in dense[:, self.kept].numpy()]
        return out


def dense_transposed(P: Tensor, A: Tensor, slopes: list[tuple[Tensor, Tensor]]) -> Tensor:
    batch, m, n = A.shape
    out = P.new_zeros(batch, n + m, n + m)
    out[:, :n, :n] = P.mT
    out[:, n:, :n] = A
    at = 0
    for by_s, by_y in slopes:
        k, d = by_s.shape[1:3]
        here = A[:, at : at + k * d].unflatten(1, (k, d))
        out[:, :n, n + at : n + at + k * d] = -(by_s @ here).flatten(1, 2).mT
        square = out[:, n + at : n + at + k * d, n + at : n + at + k * d]
        index = torch.arange(k * d).view(k, d)
        square[:, index[:, None, :], index[:, :, None]] = by_y
        at += k * d
    return out


class Factors:
    """Solves with each of ``matrices``; None stands for 0."""

    def __init__(self, matrices: list[Any]) -> None:
        self.each = [None if m is None else factorize(m) for m in matrices]

    def replace(self, which: Tensor, others: Factors) -> None:
        for i, f in zip(which.nonzero().squeeze(-1).tolist(), others.each, strict=True):
            self.each[i] = f

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """J^-1 b or J'^-1 b for b (..., batch, N)."""
        import numpy as np

        if b.numel() == 0:
            return torch.zeros_like(b)
        right = b.detach().reshape(-1, len(self.each), b.shape[-1]).permute(1, 2, 0).contiguous().numpy()
        parts = [np.zeros_like(r) if f is None else f(r, transposed) for f, r in zip(self.each, right, strict=True)]
        # NaN, which belongs to samples without a solution, marks all of them
        out = np.stack([p + 0 * r.sum(0) for p, r in zip(parts, right, strict=True)])
        return torch.from_numpy(out).permute(2, 0, 1).reshape(b.shape)


def factorize(J: Any) -> Callable[[Any, bool], Any]:
    import warnings

    import numpy as np
    from scipy.sparse import linalg

    size = abs(J).sum(0).max() if J.shape[0] else 0.0
    probe = np.where(np.arange(J.shape[0]) % 3 == 0, -1.0, 1.0)
    if J.shape[0] == 0:
        return lambda b, transposed: b
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lu = linalg.splu(J)
            growth = size * np.abs(lu.solve(probe)).max()
        except RuntimeError:
            growth = np.inf
    if not growth * SINGULAR < 1:
        return pseudo(J) if J.shape[0] <= DENSE else damped(J, size)

    def solve(b: Any, transposed: bool) -> Any:
        M, how = (J.T, "T") if transposed else (J, "N")
        x = lu.solve(b, how)
        return x + lu.solve(b - M @ x, how)

    return solve


def pseudo(J: Any) -> Callable[[Any, bool], Any]:
    import numpy as np

    inverse = np.linalg.pinv(J.toarray(), rcond=SINGULAR)
    return lambda b, transposed: (inverse.T if transposed else inverse) @ b


def damped(J: Any, size: float) -> Callable[[Any, bool], Any]:
    """J^+ by iterated Tikhonov regularization, x <- x + (J'J + d^2)^-1 J'(b - Jx) from 0, for a singular sparse J.

    A step is a solve with [[I, J], [J', -d^2]]; the part along a singular value s converges like (1 + s^2/d^2)^-k.
    """
    import numpy as np
    from scipy import sparse
    from scipy.sparse import linalg

    n, d = J.shape[0], DAMPING * size
    made: dict[bool, Any] = {}

    def solve(b: Any, transposed: bool) -> Any:
        M = (J.T if transposed else J).tocsc() / size
        if transposed not in made:
            eye = sparse.eye(n)
            made[transposed] = linalg.splu(
                sparse.block_array([[eye, M], [M.T, -((d / size) ** 2) * eye]], format="csc")
            )
        lu, right, x = made[transposed], b / size, np.zeros_like(b)
        last = np.inf
        for _ in range(ROUNDS):
            rest = np.concatenate([right - M @ x, np.zeros_like(b)])
            step = lu.solve(rest)[n:]
            x = x + step
            moved = np.abs(step).max()
            if not moved > 1e-15 * np.abs(x).max() or moved > 0.9 * last:
                break
            last = moved
        return x

    return solve
