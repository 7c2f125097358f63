"""A cvxpy problem as the maps from its parameters to (P, q, A, b) of

    min x'Px/2 + q'x   subject to   s = b - Ax in K.

cvxpy makes these maps once; they are affine, so here they are a few sparse products that torch differentiates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sparse:
    """theta (..., p) -> M (theta, 1), the entries of M in coordinates; a constant map is made only once."""

    def __init__(self, matrix: Any, shape: tuple[int, ...], order: Any = None) -> None:
        matrix = matrix.tocoo()
        rows = torch.as_tensor(matrix.row, dtype=torch.long)
        self.shape, self.size = shape, int(torch.Size(shape).numel())
        self.rows = rows if order is None else order(rows)
        self.cols = torch.as_tensor(matrix.col, dtype=torch.long)
        self.values = torch.as_tensor(matrix.data, dtype=torch.float64)
        self.constant = bool((self.cols == matrix.shape[1] - 1).all())

    def __call__(self, theta: Tensor) -> Tensor:
        """theta (..., p + 1), the last entry 1: (..., *shape), without the leading dims where the map is constant."""
        batch = () if self.constant else theta.shape[:-1]
        entries = self.values if self.constant else theta[..., self.cols] * self.values
        out = entries.new_zeros(*batch, self.size).index_add(-1, self.rows, entries)
        return out.reshape(*batch, *self.shape)


class Form:
    """The canonical form of ``problem``, its parameters and variables, for a solver that cvxpy calls ``name``."""

    def __init__(self, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], name: str) -> None:
        from cvxpy import settings

        with quadratic_scope():
            data, chain, _ = problem.get_problem_data(name)
        cone = data[settings.PARAM_PROB]
        n, m = cone.x.size, cone.constr_size
        self.n, self.m, self.dims = n, m, cone.cone_dims
        if self.dims.pnd:
            raise ValueError("the power cone of more than three dimensions is not supported; use products of PowCone3D")
        m = self.m = cone.A.shape[0] // (n + 1)
        # cvxpy stacks [A | b] by columns, for A x + b in K
        both = Sparse(cone.A, (m, n + 1), lambda r: (r % max(m, 1)) * (n + 1) + r // max(m, 1))
        self.maps = both
        self.q = Sparse(cone.q, (n + 1,))
        self.P = None if cone.P is None or cone.P.nnz == 0 else Sparse(cone.P, (n, n))
        names = {k: v[0] for k, v in chain.compose_param_id_map().items()}
        self.size = cone.total_param_size
        self.inputs = [self._input(p, cone.param_id_to_col[names.get(p.id, p.id)]) for p in parameters]
        names = {k: v[0] for k, v in chain.compose_var_id_map().items()}
        self.outputs = [self._output(v, cone.var_id_to_col[names.get(v.id, v.id)]) for v in variables]

    @staticmethod
    def _input(parameter: Any, start: int) -> tuple[Tensor, Tensor]:
        """Which entries of the flat parameter go where in theta; both triangles of a symmetric one count half."""
        import numpy as np
        from cvxpy.reductions.cvx_attr2constr import lower_value

        index = np.arange(parameter.size).reshape(parameter.shape)
        lowered = lower_value(parameter, index) if parameter._has_dim_reducing_attr else index
        take = torch.as_tensor(np.asarray(lowered).ravel(order="F").copy(), dtype=torch.long)
        return take, torch.arange(start, start + len(take))

    @staticmethod
    def _output(variable: Any, start: int) -> Tensor:
        """For each entry of the variable its place in (0, x)."""
        import numpy as np
        from cvxpy.reductions.cvx_attr2constr import recover_value_for_leaf

        reduced = any(variable.attributes[a] for a in ("diag", "symmetric", "PSD", "NSD", "sparsity"))
        size = variable.size
        if reduced:
            if variable.attributes["diag"]:
                size = variable.shape[0]
            elif variable.attributes["sparsity"]:
                size = len(variable.sparse_idx[0])
            else:
                size = variable.shape[0] * (variable.shape[0] + 1) // 2
        places = np.arange(1, size + 1)
        if reduced:
            places = recover_value_for_leaf(variable, places, project=False)
            places = places.toarray() if hasattr(places, "toarray") else places
        else:
            places = places.reshape(variable.shape, order="F")
        index = torch.as_tensor(np.asarray(places).astype(np.int64).copy())
        return torch.where(index > 0, index + start, 0)

    def pattern(self) -> tuple[Tensor, Tensor]:
        """Where P and A may be other than zero, as (1, n, n) and (1, m, n) of zeros and ones."""
        mask = torch.zeros(self.m * (self.n + 1), dtype=torch.float64)
        mask[self.maps.rows] = 1.0
        P = torch.zeros(self.n * self.n, dtype=torch.float64)
        if self.P is not None:
            P[self.P.rows] = 1.0
        P = P.reshape(1, self.n, self.n)
        return torch.maximum(P, P.mT), mask.reshape(1, self.m, self.n + 1)[..., :-1]

    def theta(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameters (batch, *shape) or (1, *shape) as (batch, p + 1), the last entry 1."""
        batch = 1
        for t in tensors:
            batch = batch if len(t) == 1 else len(t)
        out = torch.zeros(batch, self.size + 1, dtype=torch.float64)
        out[:, -1] = 1.0
        for t, (take, place) in zip(tensors, self.inputs, strict=True):
            flat = t.reshape(len(t), t[0].numel() if len(t) else len(take))[:, take].expand(batch, len(take))
            out = out.index_copy(1, place, flat)
        return out

    def data(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(P, q, A, b), each with one batch dim of size batch or 1."""
        full = lambda t, dims: t if t.ndim > dims else t.unsqueeze(0)  # noqa: E731
        both, q = full(self.maps(theta), 2), full(self.q(theta), 1)
        P = theta.new_zeros(1, self.n, self.n) if self.P is None else full(self.P(theta), 2)
        return (P + P.mT) / 2, q[..., :-1], -both[..., :-1], both[..., -1]

    def recover(self, x: Tensor, index: Tensor) -> Tensor:
        """A variable (batch, *shape) out of x (batch, n)."""
        padded = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
        return padded[:, index.flatten()].reshape(len(x), *index.shape)


def quadratic_scope() -> Any:
    """In which cvxpy takes quad_form(x, P) with a parameter P for a quadratic objective."""
    from cvxpy.utilities import scopes

    return getattr(scopes, "quad_form_dpp_scope", contextlib.nullcontext)()
