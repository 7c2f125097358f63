"""The strength at which a threshold answer mixes a given number of inputs (numba), as in ``polytopes._mixing``."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import jit
from .cpu_choice import column
from .cpu_search import FARTHEST, accept, propose, start, state, strength
from .cpu_threshold import CHUNK, CODES, ENTROPY, _point, one, several_items, special
from .threads import over_rows


@jit
def _measure(code, v, n, eps, k, shape, cap, several, log_residual, u, d, part, part_slope):  # type: ignore[no-untyped-def]
    """1 / sum p^2, p = d/S, for the first n entries of v: the number of inputs that move the threshold, 1 for none."""
    if k <= 0 or k >= n:
        return 0.0
    if several:
        ref, tau = several_items(code, v, n, eps, k, shape, cap, log_residual, u, part, part_slope)
    elif code == ENTROPY:
        ref, tau, total = v[0], 0.0, 0.0
        for i in range(n):
            total += math.exp((v[i] - ref) / eps)
        tau = math.log(total)
    else:
        ref, tau = one(code, v, n, eps, k, shape, cap, log_residual, u, part, part_slope)
    largest = 1e-300
    for i in range(n):
        d[i] = _point(code, (v[i] - ref) / eps - tau, shape, cap)[1]
        largest = max(largest, d[i])
    total, squares = 0.0, 0.0
    for i in range(n):
        total += d[i] / largest
        squares += (d[i] / largest) ** 2
    return max(total * total / max(squares, 1e-300), 1.0)


@jit
def _strengths(code, window, m, centre, k, shape, cap, several, log_residual, linear, inputs, eps):  # type: ignore[no-untyped-def]
    """eps of each row; ``window`` holds its m entries around the threshold, largest first, ``centre`` the k-th."""
    width = window.shape[1]
    u, d, part, part_slope = np.empty(width), np.empty(width), np.empty(CHUNK), np.empty(CHUNK)
    search = state()
    unit_of_count = 1.0 if linear else 1e3  # a smooth mixing settles within a thousandth of an input
    for r in range(window.shape[0]):
        v, n, own = window[r], m[r], special(code, shape[r])
        high, low = min(max(centre[r] - 2, 0), max(n - 1, 0)), min(max(centre[r] + 1, 0), max(n - 1, 0))
        spread, whole = v[high] - v[low], v[0] - v[max(n - 1, 0)]
        scale = spread if spread > 0 else whole if whole > 0 else 1.0
        if k[r] <= 0 or k[r] >= n:  # all or none are chosen: there is no threshold to soften
            eps[r] = scale
            continue
        goal = min(inputs, float(n) if linear else 0.99 * n)
        far = math.exp(FARTHEST)
        unit = start(search, scale / far, scale * far, 1.0, math.inf, 1.0, math.inf)
        for step in range(80):
            if propose(search, goal, step, math.log(scale / unit)):
                break
            e = unit * math.exp(search[0][2])
            mix = _measure(
                own, v, n, e, k[r], shape[r], cap[r], several, log_residual, u, d, part, part_slope
            )  # fmt: skip
            accept(search, goal, mix, mix * unit_of_count)
        eps[r] = strength(search, goal, unit)


def _window(x: np.ndarray, first: int, width: int) -> np.ndarray:
    """Entries first, first + 1, ... of each row in descending order."""
    n = x.shape[1]
    begin, end = n - first - width, n - first
    edges = sorted({p for p in (begin, end - 1) if 0 < p < n - 1})
    ordered = np.partition(x, edges, axis=-1) if edges else x
    return np.ascontiguousarray(np.sort(ordered[:, begin:end], axis=-1)[:, ::-1])


def mixing_threshold(
    x: Tensor, active: Tensor, k: Tensor, shape: Tensor, family: str, cap: Tensor | float, several: bool,
    log_residual: bool, linear: bool, inputs: float, half: int,
) -> Tensor:  # fmt: skip
    """See ``polytopes._mixing.mixing_threshold``; x (rows, n), -inf where not active; k counts active items."""
    rows, n = x.shape
    eps = torch.empty(rows, 1, dtype=torch.float64)
    items = active.sum(-1).numpy()
    ks, shapes, caps = (column(v, torch.Size((rows,))) for v in (k, shape, cap))
    centre = np.round(ks).astype(np.int64)
    skipped = np.maximum(centre - half, 0)
    width = min(2 * half, n)
    values, out = x.numpy(), eps.numpy()[:, 0]

    def task(begin: int, end: int) -> None:
        at = begin
        while at < end:  # runs of rows with the same k
            stop = at + 1
            while stop < end and skipped[stop] == skipped[at]:
                stop += 1
            first = min(int(skipped[at]), n - width)
            some, lead = slice(at, stop), int(skipped[at]) - first
            window = _window(values[some], first, width)[:, lead:]
            m = np.minimum(np.maximum(items[some] - skipped[at], 0), width - lead)
            window = np.ascontiguousarray(np.where(np.arange(width - lead) < m[:, None], window, 0.0))
            _strengths(
                CODES[family], window, m, centre[some] - skipped[some], ks[some] - skipped[some], shapes[some],
                caps[some], several, log_residual, linear, inputs, out[some],
            )  # fmt: skip
            at = stop

    over_rows(task, rows, 20 * rows * width + rows * n)
    return eps
