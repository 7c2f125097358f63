"""The only place that handles ``dim``, ``keepdim``, ``where`` and dtypes.

An operator works on the last dimension, in a wide floating dtype. :class:`Axes` brings a tensor there and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Dim = int | Sequence[int] | None


def lazy(method: Callable[[Any], Any]) -> Any:
    """A property made at its first use; functools.cached_property takes a lock that torch.compile cannot trace."""
    name = f"_made_{method.__name__}"

    def get(self: Any) -> Any:
        if not hasattr(self, name):
            setattr(self, name, method(self))
        return getattr(self, name)

    def put(self: Any, value: Any) -> None:
        setattr(self, name, value)

    return property(get, put, doc=method.__doc__)


def check_tensor(x: object, name: str = "x") -> Tensor:
    """``x`` as a floating-point tensor; integers and bools promote to the default dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; wrap it in torch.as_tensor")
    if x.is_complex():
        raise TypeError(f"{name} has dtype {x.dtype}: complex numbers have no order; pass x.abs() or x.real")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def check_number(value: object, name: str) -> None:
    """Raise unless ``value`` is a Python number or a real tensor."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real tensor, got dtype {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def concrete(value: Tensor) -> bool:
    """Whether the numbers in ``value`` may be looked at: eager, outside transforms, on the CPU."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" and torch._C._functorch.peek_interpreter_stack() is None


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of all inner arithmetic: float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensor_like(value: Any, like: Tensor) -> Tensor:
    """A tensor or number in the dtype and on the device of ``like``; a number without a detour through float32."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def floating_dtype(*values: object) -> torch.dtype:
    """The floating dtype that tensors and numbers promote to: ``torch.result_type``, which cannot be traced."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    dtypes = [v.dtype for v in tensors if v.ndim > 0] or [v.dtype for v in tensors]
    if not dtypes:
        return torch.get_default_dtype()
    return functools.reduce(torch.promote_types, dtypes)


# torch splits the sum of a single long row over its threads, but not those of several rows: where a row is that long it
# is summed here in two levels, so that its answer and its gradient do not depend on the number of rows or threads
LONG, CHUNK = 32768, 1024


def row_sum(v: Tensor) -> Tensor:
    """Sums over the last dim, kept, in an order that depends on its length only."""
    n = v.shape[-1]
    if n < LONG:
        return v.sum(-1, keepdim=True)
    whole = n - n % CHUNK
    parts = v[..., :whole].reshape(*v.shape[:-1], whole // CHUNK, CHUNK).sum(-1)
    return torch.cat([parts, v[..., whole:].sum(-1, keepdim=True)], -1).sum(-1, keepdim=True)


def spread(v: Tensor, n: int) -> Tensor:
    """(..., 1) such that it broadcasts to (..., n), its gradient summed as by :func:`row_sum`."""
    if n < LONG or v.shape[-1] != 1:
        return v
    chunks = -(-n // CHUNK)
    wide = v.expand(*v.shape[:-1], chunks).unsqueeze(-1).expand(*v.shape[:-1], chunks, CHUNK)
    return wide.reshape(*v.shape[:-1], chunks * CHUNK)[..., :n]


def normalize_dims(dim: Dim, ndim: int) -> tuple[int, ...]:
    """``dim`` as a tuple of distinct non-negative ints; ``None`` and ``()`` mean all dimensions."""
    if dim is None:
        dims: tuple[int, ...] = tuple(range(ndim))
    elif isinstance(dim, int) and not isinstance(dim, bool):
        dims = (dim,)
    elif isinstance(dim, (tuple, list)) and all(isinstance(d, int) and not isinstance(d, bool) for d in dim):
        dims = tuple(dim) or tuple(range(ndim))
    else:
        raise TypeError(f"dim must be an int, a tuple of ints or None, got {dim!r}")
    reach = max(ndim, 1)
    for d in dims:
        if not -reach <= d < reach:
            raise IndexError(
                f"dim {d} is out of range for a tensor of {ndim} dimensions; expected {-reach}..{reach - 1}"
            )
    if ndim == 0:
        return ()
    dims = tuple(d % ndim for d in dims)
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim {dim!r} names a dimension twice")
    return dims


class Axes:
    """Brings tensors shaped like ``x`` to ``(..., n)``, the chosen dims flattened last, and back."""

    def __init__(self, x: Tensor, dim: Dim = -1) -> None:
        self.shape, self.ndim = x.shape, x.ndim
        self.dtype, self.device = x.dtype, x.device
        self.wide = wide_dtype(x.device)
        self.dims = normalize_dims(dim, x.ndim)
        self.kept = tuple(d for d in range(x.ndim) if d not in self.dims)
        self.order = self.kept + self.dims
        self.last = x.ndim > 0 and self.dims == (x.ndim - 1,)  # the rows lie as they are needed
        self.batch = tuple(x.shape[d] for d in self.kept)
        self.sizes = tuple(x.shape[d] for d in self.dims)
        self.n = 1
        for size in self.sizes:
            self.n *= size

    def load(self, x: Tensor) -> Tensor:
        """``x`` as ``(..., n)`` in the wide dtype."""
        return self._last(x).to(self.wide)

    def _last(self, x: Tensor) -> Tensor:
        if self.last and x.is_contiguous():
            return x
        # contiguous rows: torch sums a strided row in an order that depends on where it lies
        return x.permute(self.order).reshape(*self.batch, self.n).contiguous()

    def mask(self, where: Tensor | None) -> Tensor | None:
        """A bool mask, broadcast to ``x``, as ``(..., n)``."""
        if where is None:
            return None
        if not isinstance(where, Tensor) or where.dtype != torch.bool:
            raise TypeError(f"where must be a bool tensor, got {getattr(where, 'dtype', type(where).__name__)}")
        return self._last(self._broadcast(where, "where"))

    def like(self, values: Tensor, name: str) -> Tensor:
        """A real tensor, broadcast to ``x``, as ``(..., n)`` in the wide dtype."""
        return self.load(self._broadcast(check_tensor(values, name), name))

    def _broadcast(self, values: Tensor, name: str) -> Tensor:
        try:
            return values.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} of shape {tuple(values.shape)} does not broadcast to x of shape {tuple(self.shape)}"
            ) from None

    def parameter(self, value: float | Tensor, name: str) -> Tensor:
        """A number, 0-d tensor, or tensor of ``x.ndim`` dims with size 1 along dim, as ``(..., 1)``."""
        check_number(value, name)
        ones = (1,) * (len(self.kept) + 1)
        if not isinstance(value, Tensor):
            return torch.full(ones, float(value), dtype=self.wide, device=self.device)
        if value.ndim == 0:
            return value.to(device=self.device, dtype=self.wide).reshape(ones)
        fits = value.ndim == self.ndim and all(value.shape[d] == 1 for d in self.dims)
        if not fits or any(value.shape[d] not in (1, self.shape[d]) for d in self.kept):
            want = tuple(1 if d in self.dims else s for d, s in enumerate(self.shape))
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} does not fit x of shape {tuple(self.shape)} along dim "
                f"{self.dims}; pass a number, a 0-d tensor, or shape {want} (any of its sizes may be 1)"
            )
        moved = value.permute(self.order)
        return moved.reshape(*moved.shape[: len(self.kept)], 1).to(self.wide)

    def restore(self, y: Tensor) -> Tensor:
        """``(..., n)`` back to the shape and dtype of ``x``."""
        if self.last and y.dtype == self.dtype != self.wide:
            return y
        inverse = [self.order.index(d) for d in range(self.ndim)]
        flat = y.reshape(-1)  # so that the backward pass makes its rows contiguous too
        return flat.reshape((*self.batch, *self.sizes)).permute(inverse).to(self.dtype)

    def restore_last(self, y: Tensor) -> Tensor:
        """``(..., m)`` with a new length ``m`` back to where the single dim stood."""
        if self.ndim == 0:
            return y.reshape(y.shape[-1:]).to(self.dtype)
        return y.movedim(-1, self.dims[0]).to(self.dtype)

    def restore_parameter(self, p: Tensor) -> Tensor:
        """``(..., 1)`` back to the dims of ``x``, with size 1 along the chosen dims: what :meth:`parameter` takes."""
        dtype = torch.promote_types(self.dtype, torch.float32)  # a strength may leave the range of a half type
        p = p.expand(*self.batch, 1).reshape(self.batch).to(dtype)
        for d in sorted(self.dims):
            p = p.unsqueeze(d)
        return p

    def reduced(self, y: Tensor, keepdim: bool) -> Tensor:
        """``(..., 1)``, one number a row, back, as torch's reductions shape it."""
        y = y.reshape(self.batch).to(self.dtype)
        if keepdim:
            for d in sorted(self.dims):
                y = y.unsqueeze(d)
        return y


def single_dim(dim: int) -> int:
    """``dim`` for the operators that order one dimension."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}; an order runs along one dimension, flatten the others first")
    return dim


class Rows(Axes):
    """``x`` as rows ``(..., n)`` ready for arithmetic: absent items 0, rows with a NaN 0 until :meth:`poisoned`.

    Everything is made at its first use: a compiled kernel takes the rows as given and never asks for more.
    """

    def __init__(self, x: Tensor, dim: Dim = -1, where: Tensor | None = None, *, together: bool = True) -> None:
        self.input = check_tensor(x)
        super().__init__(self.input, dim)
        self.present = self.mask(where)
        self.together = together

    @lazy
    def given(self) -> Tensor:
        """x as contiguous rows in its own dtype."""
        return self._last(self.input)

    @lazy
    def _masked(self) -> Tensor:
        values = self.given.to(self.wide)
        return values if self.present is None else torch.where(self.present, values, 0)

    @lazy
    def bad(self) -> Tensor:
        """Where the answer is NaN: (..., 1), or (..., n) where each item stands alone."""
        bad = self._masked.isnan()
        return bad.any(-1, keepdim=True) if self.together else bad

    @lazy
    def x(self) -> Tensor:
        return torch.where(self.bad, 0, self._masked)

    @lazy
    def poison(self) -> Tensor:
        """NaN in the answer, and in the gradient, of the rows that hold a NaN; 0 elsewhere."""
        return torch.where(self.bad, torch.nan, 0.0) * torch.where(self.bad, self._masked, 0)

    def at(self, x: Tensor) -> Rows:
        """The same rows with other numbers, x (samples, ..., n), none of them NaN."""
        rows = Rows(self.input, self.dims, together=self.together)
        rows._masked = x
        rows.present = None if self.present is None else self.present.expand_as(x)
        return rows

    def lowered(self) -> Tensor:
        """x with -inf in place of absent items."""
        return self.x if self.present is None else torch.where(self.present, self.x, -torch.inf)

    def poisoned(self, y: Tensor) -> Tensor:
        """``y`` of shape ``(..., n)`` with NaN in the rows that hold one."""
        return torch.where(self.bad, y + self.poison, y)  # not a sum everywhere: -0 + 0 is 0

    def poisoned_value(self, value: Tensor) -> Tensor:
        """``value`` of shape ``(..., 1)`` with NaN in the rows that hold one."""
        return torch.where(self.bad.any(-1, keepdim=True), value + self.poison.sum(-1, keepdim=True), value)
