"""The threshold search compiled for the CPU (numba): one row at a time, on the items that can matter only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .torch import SLOPE_FLOOR

# the scalar functions of a regularizer, by number, as in smoothops.regularizers
QUADRATIC, ENTROPY, LOGISTIC, LAPLACE, TSALLIS = range(5)
CODES = {"Quadratic": QUADRATIC, "Entropy": ENTROPY, "BinaryEntropy": LOGISTIC, "Laplace": LAPLACE, "Tsallis": TSALLIS}
CHUNK = 256  # sums are taken in two levels, so that their error does not grow with n


@jit(inline="always")
def _phi(code, z, shape):  # type: ignore[no-untyped-def]
    """(phi, phi') at z."""
    if code == QUADRATIC:
        return (z, 1.0) if z > 0 else (0.0, 0.0)
    if code == ENTROPY:
        y = math.exp(z)
        return y, y
    if code == LOGISTIC:
        t = math.exp(-abs(z))
        d = t / (1 + t) ** 2
        return (t / (1 + t), d) if z < 0 else (1 / (1 + t), d)
    if code == LAPLACE:
        t = math.exp(-abs(z)) / 2
        return (t, t) if z < 0 else (1 - t, t)
    beta = shape - 1
    if shape == 1.5:
        t = 0.5 + 0.5 * z
        return (t * t, t) if t > 0 else (0.0, 0.0)
    t = beta * z if shape >= 2 else 1 + beta * (z - 1)
    if not t > 0 or z < -800:
        return 0.0, 0.0
    if shape >= 2:
        log_y = math.log(t) / beta
    elif beta > 0:
        log_y = math.log1p(beta * (z - 1)) / beta
    else:
        log_y = z - 1
    return math.exp(log_y), math.exp((2 - shape) * log_y)


@jit(inline="always")
def _phi_inverse(code, y, shape):  # type: ignore[no-untyped-def]
    if code == QUADRATIC:
        return y
    if code == ENTROPY:
        return math.log(y)
    if code == LOGISTIC:
        return math.log(y) - math.log1p(-y)
    if code == LAPLACE:
        return math.log(2 * y) if y < 0.5 else -math.log(2 * (1 - y))
    beta = shape - 1
    if shape >= 2:
        return math.exp(beta * math.log(y)) / beta
    return 1 + (math.expm1(beta * math.log(y)) / beta if beta > 0 else math.log(y))


@jit(inline="always")
def _edge(code, shape):  # type: ignore[no-untyped-def]
    """Below this z phi is 0 to any precision."""
    if code == QUADRATIC:
        return 0.0
    if code == TSALLIS and shape > 1:
        return 0.0 if shape >= 2 else 1 - 1 / (shape - 1)
    return -750.0


@jit
def _sums(code, u, count, tau, shape, cap):  # type: ignore[no-untyped-def]
    """Sums of min(phi, 1) and of its slope over the first ``count`` entries of u."""
    total, slope = 0.0, 0.0
    for begin in range(0, count, CHUNK):
        part, part_slope = 0.0, 0.0
        for i in range(begin, min(begin + CHUNK, count)):
            z = u[i] - tau
            if z >= cap:
                part += 1.0
            else:
                y, d = _phi(code, z, shape)
                part += y
                part_slope += d
        total += part
        slope += part_slope
    return total, slope


@jit
def _solve_row(x, active, eps, k, shape, cap, code, ordered, log_residual, u):  # type: ignore[no-untyped-def]
    """(ref, tau) of one row; ``u`` is scratch. See ``kernels.torch.threshold`` for the method."""
    n = 0
    for i in range(x.shape[0]):
        if active[i]:
            u[n] = x[i]
            n += 1
    if ordered:
        m, j = math.ceil(k), math.floor(k) + 1
        split = np.partition(u[:n], n - m)
        ref = split[n - m]
        lower = ref if j == m else split[: n - m].max()
        high = -_phi_inverse(code, (k - m + 1) / (n - m + 1), shape)
        low = (lower - ref) / eps - _phi_inverse(code, k / j, shape)
        tau = ((lower - ref) / eps) / 2
    else:
        ref = u[:n].max()
        high = -_phi_inverse(code, k / n, shape)
        low = -_phi_inverse(code, k, shape)
        tau = low
    low, high = min(low, high), max(low, high)
    tau = min(max(tau, low), high)
    # items that are 0 or at the cap for every tau in the bracket need no further look; a little slack for rounding
    slack = 1e-9 * (1 + abs(low) + abs(high))
    bottom, ceiling = low + _edge(code, shape) - slack, high + cap + slack
    count, full = 0, 0
    for i in range(n):
        v = (u[i] - ref) / eps
        if v >= ceiling:
            full += 1
        elif v > bottom:
            u[count] = v
            count += 1
    for _ in range(200):
        total, slope = _sums(code, u, count, tau, shape, cap)
        total += full
        residual = total - k
        if not abs(residual) > 4.5e-16 * k:
            break
        if residual > 0:
            low = tau
        else:
            high = tau
        step = math.nan
        if slope > 0:
            step = residual / slope
            if log_residual and ordered and k > n / 2:
                rest = n - total
                step = (rest / slope) * math.log((n - k) / rest) if rest > 0 else math.nan
            elif log_residual:
                step = (total / slope) * math.log(total / k) if total > 0 else math.nan
        proposal = tau + step
        if not (low < proposal < high):
            proposal = low + (high - low) / 2
        if proposal == tau:
            break
        tau = proposal
    return ref, tau


@jit
def _solve(x, active, eps, k, shape, cap, code, ordered, log_residual, ref, tau):  # type: ignore[no-untyped-def]
    u = np.empty(x.shape[1])
    for r in range(x.shape[0]):
        ref[r], tau[r] = _solve_row(
            x[r], active[r], eps[r], k[r], shape[r], cap[r], code, ordered, log_residual, u
        )  # fmt: skip


def threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, shape: Tensor, family: str, cap: Tensor | float | None,
    ordered: bool, log_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``kernels.torch.threshold``; the scalar functions are named, not passed."""
    rows = x.shape[0]
    caps = x.new_full((rows, 1), math.inf) if cap is None else x.new_ones(rows, 1) * cap
    columns = [v.expand(rows, 1).reshape(rows).contiguous().numpy() for v in (eps, k, shape, caps)]
    ref, tau = x.new_empty(rows, 1), x.new_empty(rows, 1)
    arrays = [np.ascontiguousarray(v.numpy()) for v in (x, active)]
    _solve(*arrays, *columns, CODES[family], ordered, log_residual, ref.numpy()[:, 0], tau.numpy()[:, 0])
    return ref, tau


@jit
def _answer(u, tau, shape, cap, code, y):  # type: ignore[no-untyped-def]
    for r in range(u.shape[0]):
        for i in range(u.shape[1]):
            z = u[r, i] - tau[r]
            y[r, i] = 1.0 if z >= cap[r] else _phi(code, z, shape[r])[0]


@jit
def _product(u, tau, shape, cap, code, v, out, mean):  # type: ignore[no-untyped-def]
    """out = d (v - mean), mean = <d, v> / S, with d = phi'(u - tau); sums in two levels, as in _sums.

    v is taken relative to its entry of largest d, so that a single item with slope has gradient 0 exactly.
    """
    n = u.shape[1]
    for r in range(u.shape[0]):
        largest, base = 0.0, 0.0
        for i in range(n):
            z = u[r, i] - tau[r]
            d = 0.0 if z >= cap[r] else _phi(code, z, shape[r])[1]
            out[r, i] = d
            if d > largest:
                largest, base = d, v[r, i]
        total, slope = 0.0, 0.0
        for begin in range(0, n, CHUNK):
            part, part_slope = 0.0, 0.0
            for i in range(begin, min(begin + CHUNK, n)):
                d = out[r, i]
                if d != 0:  # an item of no weight carries none, also where v is infinite
                    part += d * (v[r, i] - base)
                    part_slope += d
            total += part
            slope += part_slope
        usable = slope > SLOPE_FLOOR
        shift = total / slope if usable else 0.0
        mean[r] = base + shift if usable else 0.0
        for i in range(n):
            d = out[r, i]
            out[r, i] = d * ((v[r, i] - base) - shift) if usable and d != 0 else 0.0


def _matrix(v: Tensor) -> np.ndarray:
    return v.detach().reshape(-1, v.shape[-1]).contiguous().numpy()


def answer(u: Tensor, tau: Tensor, shape: Tensor, cap: Tensor, family: str) -> Tensor:
    """min(phi(u - tau), 1) for u (..., n) and tau, shape, cap (..., 1)."""
    y = torch.empty(u.shape, dtype=u.dtype)
    if u.numel():
        rows = _matrix(u)
        _answer(rows, *_spread(u, tau, shape, cap), CODES[family], y.view(rows.shape).numpy())
    return y


def product(u: Tensor, tau: Tensor, shape: Tensor, cap: Tensor, family: str, v: Tensor) -> tuple[Tensor, Tensor]:
    """(d (v - mean), mean), mean = <d, v>/S (..., 1): the Jacobian product in u, and the gradient in k."""
    out, mean = torch.empty(u.shape, dtype=u.dtype), torch.zeros((*u.shape[:-1], 1), dtype=u.dtype)
    if u.numel():
        rows = _matrix(u)
        columns = _spread(u, tau, shape, cap)
        _product(rows, *columns, CODES[family], _matrix(v), out.view(rows.shape).numpy(), mean.view(-1).numpy())
    return out, mean


def _spread(u: Tensor, *values: Tensor) -> list[np.ndarray]:
    """(..., 1) as one number for each row of u."""
    batch = (*u.shape[:-1], 1)
    return [v.detach().expand(batch).reshape(-1).contiguous().numpy() for v in values]
