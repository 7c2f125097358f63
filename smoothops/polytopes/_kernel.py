"""The kernel of entropic transport, P_ij = a_i b_j E_ij with E = exp(z_ij - u_i - v_j), and its linear algebra.

u follows from v, since each row of E has mean 1 under b. What is left is a convex problem in v: its gradient is
b (1 - c), c_j = sum_i a_i E_ij, and its Hessian b J, J = diag(c) - E' diag(a) E diag(b). v is known up to a constant.
Masses may be 0: such rows and columns have potentials too, and count for nothing.

All products are of a row and a contiguous matrix, which is several times faster than of a matrix and a column. So two
matrices are kept: ``to_columns`` = diag(a) E, and ``to_rows`` = diag(b) E', transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._axes import concrete

RIDGE = 8  # times the size and the machine epsilon: what is added to J where P falls into blocks that hardly meet
DIRECT = 100  # columns up to which a factorization is cheaper than conjugate gradients
COMPILED_DIRECT = 256  # columns up to which the compiled factorization, which is simple, is not too slow
CG_STEPS, CG_LOOK = 60, 4  # conjugate gradients: at most, and between two looks at the residual
CG_GOAL = 1e-13  # the residual, relative to the right side


def cg_steps(m: int) -> int:
    """Steps of conjugate gradients that cost less than a factorization, where there may be one."""
    return 10 + m // 3 if m <= DIRECT else CG_STEPS


def plain(t: Tensor) -> bool:
    """Whether t may be looked at, and is no batch in disguise, of is_grads_batched."""
    return concrete(t) and not torch._C._functorch.is_legacy_batchedtensor(t)


def massive(*masses: Tensor) -> bool:
    """Whether all masses are known to be positive."""
    return all(concrete(mass) and bool((mass > 0).all()) for mass in masses)


def scaled(z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """E and u, in plain torch: the mean of each row of E under b is 1."""
    x = z - v
    if massive(b):
        top = x.detach().amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
    else:
        top = x.detach().masked_fill(b == 0, -torch.inf).amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        x = torch.where((a == 0) & (b == 0), -torch.inf, x)
    e = (x - top).exp()
    mean = (e * b).sum(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1)  # a row where all is forbidden
    return e / mean, top + mean.log()


# torch's products and triangular solves of odd sizes round as a matrix happens to lie in memory, so that the matrices
# of a batch would depend on each other: what is solved here is padded to an even size


def _padding(n: int) -> int:
    return n % 2


def even(t: Tensor, value: float = 0.0, *, rows: bool = True, columns: bool = True) -> Tensor:
    """t (..., n, m) with a row and a column of ``value`` more where their number is odd."""
    more = (_padding(t.shape[-1]) if columns else 0, _padding(t.shape[-2]) if rows else 0)
    return pad(t, (0, more[0], 0, more[1]), value=value) if any(more) else t


def cut(t: Tensor, n: int, m: int) -> Tensor:
    """The first n rows and m columns; batched gradients know no slice of all."""
    t = t if t.shape[-2] == n else t.narrow(-2, 0, n)
    return t if t.shape[-1] == m else t.narrow(-1, 0, m)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for x (..., m, n) and y (..., n, m)."""
    m = x.shape[-2]
    return cut(even(x) @ even(y), m, m)


def factor(s: Tensor) -> Tensor:
    """The Cholesky factor of s (..., m, m), for :func:`factor_solve`."""
    more = _padding(s.shape[-1])
    if more:
        end = pad(torch.ones(more, dtype=s.dtype, device=s.device), (s.shape[-1], 0))
        s = pad(s, (0, more, 0, more)) + torch.diag_embed(end)
    return torch.linalg.cholesky_ex(s).L


def factor_solve(factor: Tensor, r: Tensor) -> Tensor:
    """(L L')^-1 r for r (..., m, 1)."""
    m = r.shape[-2]
    r = pad(r, (0, 0, 0, factor.shape[-1] - m)) if factor.shape[-1] > m else r
    return cut(torch.cholesky_solve(r, factor), m, r.shape[-1])


class Kernel:
    """E with the masses b (..., 1, m), all detached: to_columns (..., n, m), to_rows (..., m, n)."""

    def __init__(self, to_columns: Tensor, to_rows: Tensor, b: Tensor) -> None:
        self.to_columns, self.to_rows, self.b = to_columns, to_rows, b
        self.columns = to_columns.sum(-2, keepdim=True)
        self._factored: Tensor | None = None

    @property
    def error(self) -> Tensor:
        """sum |P' 1 - b| / sum b; the rows are exact."""
        return (self.b * (1 - self.columns).abs()).sum((-2, -1))

    def solve(self, r: Tensor, goal: float = CG_GOAL) -> Tensor:
        """x with J x = r, (..., 1, m), by a Cholesky factor that is made once, or by conjugate gradients."""
        if self._factored is None:
            if self.b.shape[-1] > DIRECT and r.ndim == 3 and plain(r) and not r.requires_grad:
                x = self._conjugate_gradients(r, goal)
                if x is not None:
                    return x
            self._factored = self._factor()
        root = self.b.sqrt()
        w = factor_solve(self._factored, (root * r).mT).mT
        w = torch.where(root > 0, w / torch.where(root > 0, root, 1), 0)
        # one step of J x = r more: entries of mass 0 follow from the others
        return (r + (w @ self.to_rows) @ self.to_columns) / torch.where(self.columns > 0, self.columns, 1)

    def _factor(self) -> Tensor:
        """The Cholesky factor of sqrt(b) J / sqrt(b), symmetric, with 1 in place of its eigenvalue 0."""
        root = self.b.sqrt()
        ridge = RIDGE * root.shape[-1] * torch.finfo(root.dtype).eps
        s = product(self.to_rows, self.to_columns) * (-root / torch.where(root > 0, root, 1).mT)
        s = s.add_(root.mT * root).add_(torch.diag_embed(self.columns.squeeze(-2) + ridge))
        return factor(s)

    def _conjugate_gradients(self, r: Tensor, goal: float) -> Tensor | None:
        """In the inner product with weights b, in which J is symmetric; None where it takes too many steps."""
        b, columns = self.b, self.columns

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return torch.bmm(x * b, y.mT)

        r = r - (b * r).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
        x, p = torch.zeros_like(r), r
        square = dot(r, r)
        least = square * goal**2
        for step in range(1, CG_STEPS + 1):
            image = columns * p - torch.bmm(torch.bmm(p, self.to_rows), self.to_columns)
            curve = dot(p, image)
            length = torch.where((square > least) & (curve > 0), square / curve, 0)
            x, r = x + length * p, r - length * image
            previous, square = square, dot(r, r)
            p = r + torch.where(length > 0, square / previous, 0) * p
            if step % CG_LOOK == 0 and bool((square <= least).all()):
                return x
        return None
