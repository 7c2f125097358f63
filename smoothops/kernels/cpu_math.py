"""An exponential and a logarithm that loops over vectors can be compiled with: no branch, no call."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cpu import jit

LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.6931471803691238, 1.9082149292705877e-10
ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer in the low bits


@intrinsic
def _as_float(typing: Any, bits: Any) -> Any:
    return types.float64(types.int64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@intrinsic
def _as_int(typing: Any, number: Any) -> Any:
    return types.int64(types.float64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(64)
    )


@jit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """e^x for x <= 0 to 1 ulp: 2^k times a polynomial in r = x - k log 2, |r| <= log(2)/2."""
    x = max(x, -746.0)  # 0 from there on; nan stays nan only where max keeps its first argument
    shifted = x * LOG2E + ROUND
    k = shifted - ROUND
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = 1 / 6227020800
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = (p * r) * r + r + 1.0
    power = _as_int(shifted) - _as_int(ROUND)
    half = power >> 1  # in two steps, so that subnormal answers come out right
    return (p * _as_float((half + 1023) << 52)) * _as_float((power - half + 1023) << 52)


SPLIT = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)


@jit(inline="always")
def log(x):  # type: ignore[no-untyped-def]
    """The logarithm of a normal x > 0 to 2 ulp: k log 2 + 2 atanh(s), s = (f - 1)/(f + 1), x = 2^k f, f near 1."""
    bits = _as_int(x)
    power = (bits - SPLIT) >> 52
    f = _as_float(bits - (power << 52))
    s = (f - 1) / (f + 1)
    q = s * s
    p = 1 / 21
    p = p * q + 1 / 19
    p = p * q + 1 / 17
    p = p * q + 1 / 15
    p = p * q + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return power * LN2_HIGH + (2 * s + (2 * s * q * p + power * LN2_LOW))
