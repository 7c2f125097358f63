"""The kernel of entropic transport, P_ij = a_i b_j E_ij with E = exp(z_ij - u_i - v_j), and its linear algebra.

u follows from v, since each row of E has mean 1 under b. What is left is a convex problem in v: its gradient is
b (1 - c), c_j = sum_i a_i E_ij, and its Hessian b J, J = diag(c) - E' diag(a) E diag(b). v is known up to a constant.
Masses may be 0: such rows and columns have potentials too, and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._axes import concrete

RIDGE = 500  # times the machine epsilon: what is added to J where P falls into blocks that hardly meet
DIRECT = 128  # columns up to which a factorization is cheaper than conjugate gradients
CG_STEPS, CG_LOOK = 60, 6  # conjugate gradients: at most, and between two looks at the residual


def scaled(z: Tensor, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """E and u, in plain torch: the mean of each row of E under b is 1."""
    x = z - v
    if concrete(b) and bool((b > 0).all()):
        top = x.detach().amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        e = (x - top).exp()
    else:
        top = x.detach().masked_fill(b == 0, -torch.inf).amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        e = torch.where((a == 0) & (b == 0), -torch.inf, x - top).exp()
    mean = (e * b).sum(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1)  # a row where all is forbidden
    return e / mean, top + mean.log()


class Kernel:
    """E (..., n, m) with its masses a (..., n, 1) and b (..., 1, m), all detached."""

    def __init__(self, e: Tensor, a: Tensor, b: Tensor) -> None:
        self.e, self.a, self.b = e, a, b
        self.columns = a.mT @ e

    @property
    def error(self) -> Tensor:
        """sum |P' 1 - b| / sum b; the rows are exact."""
        return (self.b * (1 - self.columns).abs()).sum((-2, -1))

    def inverse(self) -> Inverse:
        return Inverse(self)


class Inverse:
    """r (..., 1, m) to x with J x = r, by a Cholesky factor made at its first use, or by conjugate gradients."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.divisor = torch.where(kernel.columns > 0, kernel.columns, 1)
        self.factor: Tensor | None = None

    def __call__(self, r: Tensor) -> Tensor:
        if self.factor is None:
            if self.kernel.e.shape[-1] > DIRECT and r.ndim == 3 and concrete(r):
                x = self._conjugate_gradients(r)
                if x is not None:
                    return x
            self.factor = self._factor()
        root = self.kernel.b.sqrt()
        w = torch.cholesky_solve((root * r).mT, self.factor).mT
        k = self.kernel
        # one step of J x = r more: entries of mass 0 follow from the others
        return (r + (k.a.mT * ((w * root) @ k.e.mT)) @ k.e) / self.divisor

    def _factor(self) -> Tensor:
        """The Cholesky factor of sqrt(b) J / sqrt(b), symmetric, with 1 in place of its eigenvalue 0."""
        k = self.kernel
        root = k.b.sqrt()
        t = k.e * k.a.sqrt() * root
        s = root.mT * root - t.mT @ t
        ridge = RIDGE * torch.finfo(s.dtype).eps
        return torch.linalg.cholesky_ex(s + torch.diag_embed(k.columns.squeeze(-2) + ridge)).L

    def _conjugate_gradients(self, r: Tensor) -> Tensor | None:
        """In the inner product with weights b, in which J is symmetric; None where it takes too many steps."""
        k, a = self.kernel, self.kernel.a.mT
        turned = k.e.mT.contiguous()  # a row times a contiguous matrix is the fastest product

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return (k.b * x * y).sum(-1, keepdim=True)

        # the Jacobi-scaled problem: symmetric in the weights b c
        r = r - dot(r, torch.ones_like(r)) / k.b.sum(-1, keepdim=True)
        x, p = torch.zeros_like(r), r
        square = dot(r, r)
        goal = square * 1e-26
        for step in range(1, CG_STEPS + 1):
            image = k.columns * p - torch.bmm(a * torch.bmm(k.b * p, turned), k.e)
            curve = dot(p, image)
            length = torch.where((square > goal) & (curve > 0), square / curve, 0)
            x, r = x + length * p, r - length * image
            previous, square = square, dot(r, r)
            p = torch.where(length > 0, r + (square / previous) * p, 0)
            if step % CG_LOOK == 0 and bool((square <= goal).all()):
                return x
        return None
