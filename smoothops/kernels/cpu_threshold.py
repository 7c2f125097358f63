"""The threshold search compiled for the CPU (numba): one row at a time, on the items that can matter only."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .cpu import jit
from .cpu_math import exp

# the scalar functions of a regularizer, by number, as in smoothops.regularizers
QUADRATIC, ENTROPY, LOGISTIC, LAPLACE, TSALLIS, SQUARE, CUBE, FOURTH = range(8)
CODES = {"Quadratic": QUADRATIC, "Entropy": ENTROPY, "BinaryEntropy": LOGISTIC, "Laplace": LAPLACE, "Tsallis": TSALLIS}
CHUNK = 256  # sums are taken in two levels, so that their error does not grow with n
FUSED = {"contract"}  # multiply and add in one rounding, where the processor can: exp twice as fast
SUMS = {"reassoc", "contract", "nsz"}  # lets a sum use vector lanes; nothing is assumed of inf and nan
SAMPLE = 512  # entries that the first guess looks at, at most
SATURATED = 45.0  # beyond this z a bounded phi is 1 to any precision


@jit(inline="always")
def special(code, shape):  # type: ignore[no-untyped-def]
    """The code of a Tsallis regularizer whose power needs no logarithm, else ``code``."""
    if code == TSALLIS:
        return SQUARE if shape == 1.5 else CUBE if shape == 4 / 3 else FOURTH if shape == 1.25 else code
    return code


@jit(inline="always")
def _phi(code, z, shape):  # type: ignore[no-untyped-def]
    """(phi, phi') at z."""
    if code == QUADRATIC:
        return max(z, 0.0), 1.0 if z > 0 else 0.0
    if code == ENTROPY:
        y = exp(min(z, 0.0))  # always capped
        return y, y
    if code == LOGISTIC:
        t = exp(-abs(z))
        return (t if z < 0 else 1.0) / (1 + t), t / ((1 + t) * (1 + t))
    if code == LAPLACE:
        t = exp(-abs(z)) / 2
        return t if z < 0 else 1 - t, t
    if code == SQUARE:
        t = max(0.5 + 0.5 * z, 0.0)
        return t * t, t
    if code == CUBE:
        t = max(1 + (z - 1) / 3, 0.0)
        return t * t * t, t * t
    if code == FOURTH:
        t = max(0.75 + 0.25 * z, 0.0)
        return (t * t) * (t * t), t * t * t
    beta = shape - 1
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
    if code >= TSALLIS and shape > 1:
        return 0.0 if shape >= 2 else 1 - 1 / (shape - 1)
    return -750.0


@jit(inline="always")
def _point(code, z, shape, cap):  # type: ignore[no-untyped-def]
    """(min(phi, 1), its slope) at z."""
    y, d = _phi(code, z, shape)
    return 1.0 if z >= cap else y, 0.0 if z >= cap else d


@jit(inline="always")
def _points(code, u, tau, shape, cap, y, d):  # type: ignore[no-untyped-def]
    for i in range(u.shape[0]):
        y[i], d[i] = _point(code, u[i] - tau, shape, cap)


@jit(fastmath=SUMS)
def _add(y, d, count):  # type: ignore[no-untyped-def]
    total, slope = 0.0, 0.0
    for i in range(count):
        total += y[i]
        slope += d[i]
    return total, slope


@jit(fastmath=FUSED)
def _sums(code, u, count, tau, shape, cap, y, d):  # type: ignore[no-untyped-def]
    """Sums of min(phi, 1) and of its slope over the first ``count`` entries of u; y, d: scratch of CHUNK."""
    total, slope = 0.0, 0.0
    for begin in range(0, count, CHUNK):
        some = u[begin : min(begin + CHUNK, count)]  # a slice: an index with an offset is not vectorized
        # a constant code for each loop, so that it is compiled to vector instructions
        if code == QUADRATIC:
            _points(QUADRATIC, some, tau, shape, cap, y, d)
        elif code == ENTROPY:
            _points(ENTROPY, some, tau, shape, cap, y, d)
        elif code == LOGISTIC:
            _points(LOGISTIC, some, tau, shape, cap, y, d)
        elif code == LAPLACE:
            _points(LAPLACE, some, tau, shape, cap, y, d)
        elif code == SQUARE:
            _points(SQUARE, some, tau, shape, cap, y, d)
        elif code == CUBE:
            _points(CUBE, some, tau, shape, cap, y, d)
        elif code == FOURTH:
            _points(FOURTH, some, tau, shape, cap, y, d)
        else:
            _points(TSALLIS, some, tau, shape, cap, y, d)
        part, part_slope = _add(y, d, some.shape[0])
        total += part
        slope += part_slope
    return total, slope


@jit
def _drop(u, count, bottom, top):  # type: ignore[no-untyped-def]
    """Moves the entries between bottom and top to the front; their number, and that of those above."""
    kept, above = 0, 0
    for i in range(count):
        z = u[i]
        if z >= top:
            above += 1
        elif z > bottom:
            u[kept] = z
            kept += 1
    return kept, above


@jit
def newton(code, u, count, n, k, tau, shape, cap, several, log_residual, y, d):  # type: ignore[no-untyped-def]
    """tau with sum min(phi(u - tau), 1) = k over the first ``count`` entries of u, which is rearranged.

    Bracketed Newton. Where it leaves the bracket, or nothing has a slope, the next tau is one at which an entry picked
    from the middle has one, as in quickselect; entries that are 0 or 1 for all tau left are dropped then.
    """
    edge, ceiling = _edge(code, shape), min(cap, SATURATED)
    many = several and k > n / 2
    least = 1e-8 if code in (LOGISTIC, LAPLACE, ENTROPY) else 0.0 if shape > 2 else 1e-17
    low, high, full = -math.inf, math.inf, 0
    for step in range(300):
        total, slope = _sums(code, u, count, tau, shape, cap, y, d)
        total += full
        residual = total - k
        if not abs(residual) > 4.5e-16 * k:
            tau += residual / slope if abs(residual) < 1e-12 * slope else 0.0
            break
        if residual > 0:
            low = tau
        else:
            high = tau
        change = math.nan
        if slope > 1e-12 * abs(residual):  # from less of a slope the step would only lose the way
            change = residual / slope
            if log_residual and many:
                rest = n - total
                change = (rest / slope) * math.log((n - k) / rest) if rest > 0 else math.nan
            elif log_residual:
                change = (total / slope) * math.log(total / k) if total > 0 else math.nan
        # a step so small that Newton's next would be none, or that rounding cannot tell from none: near the solution
        # (a step far from it can be as small, where few items have a slope or tau has lost its digits)
        if abs(residual) <= 1e-7 * k and abs(change) <= max(4e-16 * abs(tau), least):
            tau += change
            break
        if abs(change) <= 4e-16 * abs(tau):
            change = math.nan
        proposal = tau + change
        if not (low < proposal < high) or not abs(proposal) < math.inf:
            if low == -math.inf or high == math.inf:
                centre = _phi_inverse(code, k / n, shape)  # the mean of phi at tau
                smallest, largest = math.inf, -math.inf
                for i in range(count):
                    smallest, largest = min(smallest, u[i]), max(largest, u[i])
                low, high = max(low, smallest - centre), min(high, largest - centre)
                if k < 1 and full == 0:  # the largest one alone does not exceed k
                    low = max(low, largest - _phi_inverse(code, k, shape))
            if step % 3 == 2:
                slack = 1e-9 * (1 + abs(low) + abs(high))
                count, above = _drop(u, count, low + edge - slack, high + ceiling + slack)
                full += above
            proposal = low + (high - low) / 2
            if count > 0 and step % 4 != 3:
                pivot = u[(step * 7919 + count // 2) % count] - (max(edge, -1.0) + min(cap, 1.0)) / 2
                proposal = pivot if low < pivot < high else proposal
        if proposal == tau:
            break
        tau = proposal
    return tau


@jit
def one(code, v, n, eps, k, shape, cap, log_residual, u, y, d):  # type: ignore[no-untyped-def]
    """(ref, tau) on the simplex, where only items near the largest one can matter and Newton starts below tau."""
    largest = v[0]
    for i in range(1, n):
        largest = max(largest, v[i])
    high, low = -_phi_inverse(code, k / n, shape), -_phi_inverse(code, k, shape)
    low, high = min(low, high), max(low, high)
    bottom = low + _edge(code, shape) - 1e-9 * (1 + abs(low) + abs(high))
    count = 0
    for i in range(n):
        z = (v[i] - largest) / eps
        if z > bottom:
            u[count] = z
            count += 1
    return largest, newton(code, u, count, n, k, low, shape, cap, False, log_residual, y, d)


@jit
def nearest_entry(v, ref, eps, tau):  # type: ignore[no-untyped-def]
    """The entry of v nearest to the threshold."""
    best, nearest = math.inf, ref
    for i in range(v.shape[0]):
        distance = abs((v[i] - ref) / eps - tau)
        if distance < best:
            best, nearest = distance, v[i]
    return nearest


@jit
def several_items(code, v, n, eps, k, shape, cap, log_residual, u, y, d):  # type: ignore[no-untyped-def]
    """(ref, tau) on the capped simplex, 0 < k < n; the first guess is the solution for a sample."""
    ref, tau = v[0], 0.0
    m = min(max(n // 16, 32), SAMPLE)
    if m < n:
        sample = np.empty(m)
        for i in range(m):
            sample[i] = v[(2 * i + 1) * n // (2 * m)]
            u[i] = (sample[i] - ref) / eps
        tau = newton(code, u, m, m, k * m / n, tau, shape, cap, True, log_residual, y, d)
        near = nearest_entry(sample, ref, eps, tau)
        tau, ref = tau - (near - ref) / eps, near
    for _ in range(3):
        for i in range(n):
            u[i] = (v[i] - ref) / eps
        tau = newton(code, u, n, n, k, tau, shape, cap, True, log_residual, y, d)
        if abs(tau) < 1 and not (code == TSALLIS and shape > 2):
            break
        # digits are lost where ref is far from the threshold, and where phi is infinitely steep there
        near = nearest_entry(v[:n], ref, eps, tau)
        if near == ref:
            break
        tau, ref = tau - (near - ref) / eps, near
    return ref, tau


@jit
def _load(x, v):  # type: ignore[no-untyped-def]
    """v = x, and how many of them are finite."""
    fit = 0
    for i in range(x.shape[0]):
        t = np.float64(x[i])
        v[i] = t
        fit += abs(t) < math.inf
    return fit


@jit
def solve_row(code, x, present, masked, eps, k, shape, cap, several, log_residual, v, u, y, d):  # type: ignore[no-untyped-def]
    """(ref, tau, items) with sum_i min(phi((x_i - ref)/eps - tau), 1) = k over the present items above -inf.

    items is their number, -1 where one of them is nan or inf; for k <= 0 or k >= items there is no tau. Scratch: v, u
    as long as x; y, d of CHUNK.
    """
    n = x.shape[0]
    if masked or _load(x, v) < n:
        n = 0
        for i in range(x.shape[0]):
            t = np.float64(x[i])
            if masked and not present[i]:
                continue
            if not t < math.inf:
                return 0.0, 0.0, -1
            if t > -math.inf:
                v[n] = t
                n += 1
    if k <= 0 or k >= n:
        return 0.0, 0.0, n
    if several:
        ref, tau = several_items(code, v, n, eps, k, shape, cap, log_residual, u, y, d)
    else:
        ref, tau = one(code, v, n, eps, k, shape, cap, log_residual, u, y, d)
    return ref, tau, n


@jit
def _solve(code, x, active, eps, k, shape, cap, several, log_residual, ref, tau):  # type: ignore[no-untyped-def]
    v, u, y, d = np.empty(x.shape[1]), np.empty(x.shape[1]), np.empty(CHUNK), np.empty(CHUNK)
    for r in range(x.shape[0]):
        own = special(code, shape[r])
        ref[r], tau[r], _ = solve_row(
            own, x[r], active[r], True, eps[r], k[r], shape[r], cap[r], several, log_residual, v, u, y, d
        )  # fmt: skip


def threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, shape: Tensor, family: str, cap: Tensor | float | None,
    ordered: bool, log_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``kernels.torch.threshold``; the scalar functions are named, not passed, and ref is some entry near by."""
    rows = x.shape[0]
    caps = x.new_full((rows, 1), math.inf) if cap is None else x.new_ones(rows, 1) * cap
    columns = [v.expand(rows, 1).reshape(rows).contiguous().numpy() for v in (eps, k, shape, caps)]
    ref, tau = x.new_empty(rows, 1), x.new_empty(rows, 1)
    arrays = [np.ascontiguousarray(v.numpy()) for v in (x, active)]
    _solve(CODES[family], *arrays, *columns, ordered, log_residual, ref.numpy()[:, 0], tau.numpy()[:, 0])
    return ref, tau
