"""Soft booleans, and what counts as a soft number."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Rational, Real
from typing import Any

import torch
from torch import Tensor

from .. import logic
from .._axes import concrete, wide_dtype
from ..comparisons import ne
from ..regularizers import Entropy
from ..selection import where
from ..smoothing import SmoothingLike, as_smoothing
from .errors import cannot

FAR = 700.0  # exp of more leaves the range of float64
LOGIC: dict[Any, Callable[..., Tensor]] = {
    torch.any: logic.any,
    torch.all: logic.all,
    torch.where: where,
    torch.logical_and: logic.logical_and,
    torch.logical_or: logic.logical_or,
    torch.logical_not: logic.logical_not,
    torch.logical_xor: logic.logical_xor,
}
HARD = frozenset(("item", "tolist", "numpy", "bool", "int", "long", "nonzero", "argmax", "argmin"))


def soft(x: Any) -> bool:
    """Whether x is a number with gradient: a floating-point tensor or a soft boolean."""
    return isinstance(x, SoftBool) or (isinstance(x, Tensor) and x.is_floating_point())


def real(x: Any) -> bool:
    """Whether x is a floating-point number without gradient: Python's or numpy's."""
    return isinstance(x, float) or (isinstance(x, Real) and not isinstance(x, Rational | Tensor))


def numpy_bool(x: Any) -> bool:
    return type(x).__module__ == "numpy" and type(x).__name__ in ("bool", "bool_")


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.device))


def widened(*values: Any) -> list[Tensor]:
    """Tensors and Python numbers as wide tensors on one device; a number keeps all of its digits."""
    device = next(v.device for v in values if isinstance(v, Tensor))
    return [
        wide(v) if isinstance(v, Tensor) else torch.tensor(v, dtype=wide_dtype(device), device=device) for v in values
    ]


def logistic_eps(smoothing: SmoothingLike) -> float | None:
    """The eps of the logistic law, where the smoothing is that with a number."""
    reg = as_smoothing(smoothing, Entropy, 0.1)
    return float(reg.eps) if type(reg) is Entropy and isinstance(reg.eps, float | int) and reg.eps > 0 else None


def logistic(a: Any, b: Any, op: str, eps: float | None) -> Tensor | None:
    """so.gt and its kin between finite numbers under Entropy, in four small operations; None for anything else."""
    if eps is None or op not in ("<", "<=", ">", ">="):
        return None
    for v in (a, b):
        if isinstance(v, Tensor) and (v.ndim or not v.is_floating_point() or not concrete(v)):
            return None
    x, y = (wide(v) if isinstance(v, Tensor) else v for v in ((a, b) if op[0] == ">" else (b, a)))
    gap = x - y
    value = gap.item()
    if not math.isfinite(value) or abs(value) > FAR * eps:
        return None
    # the derivative of sigmoid is s (1 - s), which cancels where s is near 1
    return torch.sigmoid(gap / eps) if value <= 0 else 1 - torch.sigmoid(gap / -eps)


class SoftBool:
    """The truth of a comparison of tensors: true with probability p, in float64, and the number p in arithmetic."""

    __slots__ = ("dtype", "p")

    def __init__(self, p: Tensor, dtype: torch.dtype) -> None:
        self.p, self.dtype = p, dtype

    @property
    def number(self) -> Tensor:
        return self.p.to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.p.shape

    def certain(self, value: bool) -> bool:
        """Whether it is ``value`` for sure, in every row."""
        return concrete(self.p) and bool((self.p == float(value)).all())

    def __bool__(self) -> bool:
        for value in (True, False):
            if self.certain(value):
                return value
        raise TypeError(
            f"a soft boolean of probability {self.p.detach()} is neither true nor false; use it in if, while, and, or, "
            "not of a softened function, or as a number"
        )

    def __repr__(self) -> str:
        return f"SoftBool({self.number})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        ours = LOGIC.get(func, func)
        return ours(*number(args), **number(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in HARD:
            raise cannot(f".{name}() would make a soft boolean hard; use it in if, while, and, or, not, or as a number")
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.number, name)

    def __getitem__(self, index: Any) -> SoftBool:
        return SoftBool(self.p[index], self.dtype)

    def __len__(self) -> int:
        return len(self.p)

    def any(self, *args: Any, **kwargs: Any) -> SoftBool:
        return SoftBool(logic.any(self.p, *args, **kwargs), self.dtype)

    def all(self, *args: Any, **kwargs: Any) -> SoftBool:
        return SoftBool(logic.all(self.p, *args, **kwargs), self.dtype)

    def __invert__(self) -> SoftBool:
        return SoftBool(1 - self.p, self.dtype)

    def __and__(self, other: Any) -> SoftBool:
        return SoftBool(logic.logical_and(self.p, self.probability(other)), self.dtype)

    def __or__(self, other: Any) -> SoftBool:
        return SoftBool(logic.logical_or(self.p, self.probability(other)), self.dtype)

    def __xor__(self, other: Any) -> SoftBool:
        return SoftBool(logic.logical_xor(self.p, self.probability(other)), self.dtype)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def probability(self, other: Any) -> Tensor:
        if isinstance(other, SoftBool):
            return other.p
        if isinstance(other, bool) or (isinstance(other, Tensor) and other.dtype == torch.bool):
            return torch.as_tensor(other, device=self.p.device).to(self.p.dtype)
        raise cannot(f"&, | and ^ of a soft boolean take another boolean, got {type(other).__name__}")


def number(x: Any) -> Any:
    """x with the numbers of its soft booleans."""
    if isinstance(x, SoftBool):
        return x.number
    if type(x) in (list, tuple):
        return type(x)(number(item) for item in x)
    return {key: number(item) for key, item in x.items()} if type(x) is dict else x


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: SoftBool, *others: Any) -> Any:
        return getattr(self.number, name)(*number(list(others)))

    return operator


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _side in ("", "r"):
        setattr(SoftBool, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "pos", "abs"):
    setattr(SoftBool, f"__{_name}__", _operator(f"__{_name}__"))


def truth(x: Any, smoothing: SmoothingLike) -> Any:
    """The truth of x: a soft boolean where x is soft or a batch of booleans, else a bool."""
    if isinstance(x, SoftBool):
        return x
    if not isinstance(x, Tensor):
        return bool(x)
    if x.is_floating_point():
        return SoftBool(ne(wide(x), 0.0, smoothing=smoothing), x.dtype)
    if x.numel() == 1 and concrete(x):
        return bool(x)
    return SoftBool((x != 0).to(wide_dtype(x.device)), torch.get_default_dtype())
