"""A QP of any batch dims as rows for ``_qp_solve``; and as one operator for torch.compile and torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._qp_kkt import stack_rows
from ._qp_report import report
from ._qp_solve import Numbers, solve_numbers
from ._qp_status import Options

Data = tuple[Tensor | None, ...]
LIBRARY = torch.library.Library("implicit", "FRAGMENT")
SIGNATURE = (
    "qp(Tensor Q, Tensor c, Tensor? A, Tensor? b, Tensor? G, Tensor? h, float tol, int max_iter, str on_fail)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def rows_of(t: Tensor, batch: torch.Size, event: int, spread: bool) -> Tensor:
    """t as (rows, *event), or as (1, *event) where all problems share it and they need not be ``spread``."""
    t = t.detach()
    if t.dtype != torch.float64:
        t = t.double()
    head, tail = t.shape[: t.ndim - event], t.shape[t.ndim - event :]
    if head != batch:
        if not spread and head.numel() == 1:
            return t.reshape(1, *tail)
        t = t.expand(*batch, *tail)
    return t if len(batch) == 1 else t.reshape(batch.numel(), *tail)


def flatten(data: Data, batch: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Q, c, M, t): numbers in float64, equalities first."""
    Q, c, A, b, G, h = data
    Q, c = rows_of(Q, batch, 2, False), rows_of(c, batch, 1, True)  # type: ignore[arg-type]
    A, G = (None if v is None else rows_of(v, batch, 2, False) for v in (A, G))
    b, h = (None if v is None else rows_of(v, batch, 1, True) for v in (b, h))
    return Q, c, *stack_rows(Q, A, b, G, h)


def solve_batch(rows: tuple[Tensor, Tensor, Tensor, Tensor], options: Options) -> Numbers:
    Q, c, M, t = rows
    if M.ndim == 2:
        M, t = M.unsqueeze(0), t.expand(len(c), 0)
    return solve_numbers(Q, c, M, t, options)


def solve_eagerly(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    tol: float,
    max_iter: int,
    on_fail: str,
) -> tuple[Tensor, ...]:
    data = (Q, c, A, b, G, h)
    batch = batch_of(data)
    options = Options(0 if A is None else A.shape[-2], tol, max_iter)
    numbers = solve_batch(flatten(data, batch), options)
    if on_fail != "ignore":
        report(numbers, data, batch, options, on_fail)
    n, k = numbers.x.shape[-1], numbers.lam.shape[-1]
    vectors = numbers.x.reshape(*batch, n), numbers.lam.reshape(*batch, k), numbers.active.reshape(*batch, k)
    each = (numbers.converged, numbers.iterations, numbers.residual, numbers.margin)
    return tuple(v.clone() for v in (*vectors, *(v.reshape(batch) for v in each)))


def batch_of(data: Data) -> torch.Size:
    heads = [t.shape[: t.ndim - (2 - i % 2)] for i, t in enumerate(data) if t is not None]
    return torch.broadcast_shapes(*heads)


def fake(Q: Tensor, c: Tensor, A: Any, b: Any, G: Any, h: Any, tol: float, max_iter: int, on_fail: str) -> Any:
    batch, n = batch_of((Q, c, A, b, G, h)), Q.shape[-1]
    k = (0 if A is None else A.shape[-2]) + (0 if G is None else G.shape[-2])
    new = lambda *shape, dtype=torch.float64: Q.new_empty((*batch, *shape), dtype=dtype)  # noqa: E731
    return new(n), new(k), new(k, dtype=torch.bool), new(dtype=torch.bool), new(dtype=torch.int64), new(), new()


def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """The rule of vmap: all tensors have the same number of batch dims, one more comes first."""
    moved = [
        a if not isinstance(a, Tensor) else a.unsqueeze(0) if d is None else a.movedim(d, 0)
        for a, d in zip(args, in_dims, strict=True)
    ]
    return torch.ops.implicit.qp(*moved), (0,) * 7


# not torch.library.custom_op, whose first call imports the compiler
LIBRARY.define(SIGNATURE, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("qp", solve_eagerly, "CompositeExplicitAutograd")
torch.library.register_fake("implicit::qp", fake, lib=LIBRARY)
torch.library.register_vmap("implicit::qp", batched, lib=LIBRARY)


def solve_opaque(data: Data, batch: torch.Size, options: Options, on_fail: str) -> Any:
    """(x, lam, active, status, iterations, residual, margin), numbers of the batch's shape."""
    aligned = []
    for i, t in enumerate(data):
        event = 2 - i % 2
        if t is not None:
            t = t.detach()
            t = t.reshape(*[1] * (len(batch) + event - t.ndim), *t.shape)
        aligned.append(t)
    return torch.ops.implicit.qp(*aligned, options.tol, options.max_iter, on_fail)
