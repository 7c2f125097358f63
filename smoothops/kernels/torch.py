"""Reference kernels in plain torch, for any device. They run on detached rows and return the discrete structure.

``rule`` is how a block of pooled items is summed up: MEAN (Quadratic) or LOGSUMEXP (Entropy). A block B keeps its
first entries (a, b) of (theta, w) and, relative to them, MEAN: sums of weight * (theta - a), of weight * (w - b)
and of the weights; LOGSUMEXP: sums of exp((theta - a)/eps) and exp(w - b). Relative sums keep ties exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._axes import row_sum

MEAN, LOGSUMEXP = 0, 1
FAR = -1e300  # stands for -inf where inf would meet 0 * inf
SLOPE_FLOOR = 1e-150  # a flatter sum of slopes has no usable derivative: its inverse squared must not overflow
ROUNDS = 30  # of parallel pooling, then sequentially: one outlier can need n - 1 rounds
GROUPS = 16  # group numbers lie in 0..15
CHECK_EVERY = 4  # rounds between two looks at whether anything is left (a host synchronization on a GPU)


State = tuple[Tensor, ...]  # per block: a, sa, b, sb, m, eps, group, index of the first item


def _violates(state: State, rule: int) -> Tensor:
    """Whether each block must be pooled with the next one: its answer would be the smaller of the two."""
    a, sa, b, sb, m, eps, group, _ = state
    head, tail = slice(None, -1), slice(1, None)
    da, db = a[head] - a[tail], b[head] - b[tail]
    if rule == MEAN:
        lhs = da + (sa[head] / m[head] - sa[tail] / m[tail])
        rhs = eps[head] * (db + (sb[head] / m[head] - sb[tail] / m[tail]))
    else:
        lhs = da / eps[head] + (sa[head] / sa[tail]).log()
        rhs = db + (sb[head] / sb[tail]).log()
    return (lhs < rhs) & (group[head] == group[tail]) & (group[head] >= 0)


def _merge(state: State, violates: Tensor, rule: int) -> tuple[State, Tensor]:
    """Pools every maximal run of violating neighbours at once, and tells which blocks are left.

    Arrays keep their length, so that nothing need be known on the host; the dead blocks at their end get group -1.
    """
    a, sa, b, sb, m, eps, group, first = state
    opens = torch.cat([torch.ones_like(violates[:1]), ~violates])
    run = opens.cumsum(0) - 1
    index = torch.arange(len(run), device=run.device)
    lead = torch.full_like(run, len(run)).scatter_reduce_(0, run, index, "amin")
    live = lead < len(run)
    lead = torch.where(live, lead, 0)
    a_run, b_run, eps_run = a[lead], b[lead], eps[lead]
    da, db = a - a_run[run], b - b_run[run]
    if rule == MEAN:
        sa, sb = sa + m * da, sb + m * db
    else:
        sa, sb = sa * (da / eps).exp(), sb * db.exp()
    zero = torch.zeros_like(sa)
    sa, sb, m = (torch.where(live, zero.index_add(0, run, v), 1) for v in (sa, sb, m))
    group = torch.where(live, group[lead], -1)
    return (a_run, sa, b_run, sb, m, eps_run, group, first[lead]), live


def pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    """Pool-adjacent-violators on rows sorted so that theta and w do not increase: the first index of each item's block.

    theta, w, weights, group: (rows, n); eps: (rows, 1). Items of different groups are never pooled.
    """
    rows, n = theta.shape
    if n == 0 or rows == 0:
        return torch.zeros(rows, n, dtype=torch.long, device=theta.device)
    row = torch.arange(rows, device=theta.device).unsqueeze(1)
    one = torch.ones_like(theta)
    given = (
        theta,
        torch.zeros_like(theta) if rule == MEAN else one,
        w,
        torch.zeros_like(theta) if rule == MEAN else one,
        weights,
        eps.expand(rows, n),
        group.long() + GROUPS * row,
        torch.arange(rows * n, device=theta.device).view(rows, n),
    )
    state: State = tuple(v.reshape(-1) for v in given)
    for step in range(1, ROUNDS + 1):
        violates = _violates(state, rule)
        if step % CHECK_EVERY == 1 and not bool(violates.any()):
            break
        state, live = _merge(state, violates, rule)
        if step % CHECK_EVERY == 0:
            blocks = int(live.sum())
            state = tuple(v[:blocks] for v in state)
    else:
        state = _pool_sequentially(state, rule)
    first, group = state[7], state[6]
    opens = torch.zeros(rows * n, dtype=torch.long, device=theta.device)
    opens.scatter_(0, first, torch.where(group >= 0, first, 0))
    return (opens.cummax(0).values.view(rows, n) - n * row).contiguous()


def _pool_sequentially(state: State, rule: int) -> State:
    """The same pooling of the remaining blocks one after the other, on the host."""
    a, sa, b, sb, m, eps, group = (v.tolist() for v in state[:7])
    top: list[int] = []  # indices of open blocks; a block's sums live at its first index

    def violates(i: int, j: int) -> bool:
        if group[i] != group[j] or group[i] < 0:
            return False
        if rule == MEAN:
            lhs = (a[i] - a[j]) + (sa[i] / m[i] - sa[j] / m[j])
            return lhs < eps[i] * ((b[i] - b[j]) + (sb[i] / m[i] - sb[j] / m[j]))
        return (a[i] - a[j]) / eps[i] + math.log(sa[i] / sa[j]) < (b[i] - b[j]) + math.log(sb[i] / sb[j])

    for j in range(len(a)):
        top.append(j)
        while len(top) > 1 and violates(top[-2], top[-1]):
            last = top.pop()
            i = top[-1]
            if rule == MEAN:
                sa[i] += sa[last] + m[last] * (a[last] - a[i])
                sb[i] += sb[last] + m[last] * (b[last] - b[i])
                m[i] += m[last]
            else:
                sa[i] += sa[last] * math.exp((a[last] - a[i]) / eps[i])
                sb[i] += sb[last] * math.exp(b[last] - b[i])
    device = state[0].device
    lead = torch.tensor(top, device=device)
    return tuple(v[lead] for v in state)


def order_statistics(x: Tensor, m: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """The m-th and the j-th largest entry of each row, m and j (rows, 1) from 1 on."""
    n = x.shape[-1]
    if m.shape[0] == 1 and x.device.type == "cpu":
        ranks = (int(m), min(int(j), n))
        return tuple(x.kthvalue(n - r + 1, -1, keepdim=True).values for r in ranks)  # type: ignore[return-value]
    ordered = x.sort(-1, descending=True).values
    rows = (x.shape[0], 1)
    return ordered.gather(-1, (m - 1).expand(rows)), ordered.gather(-1, (j.clamp(max=n) - 1).expand(rows))


def threshold(
    x: Tensor, active: Tensor, eps: Tensor, k: Tensor, phi: Callable, dphi: Callable, phi_inverse: Callable,
    cap: Tensor | float | None, ordered: bool, log_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(ref, tau) with sum_i phi((x_i - ref)/eps - tau) = k over the active items; ref is an order statistic of x.

    Bracketed Newton; a row that has converged is frozen, so that rows do not depend on each other. ``ordered`` says
    that k > 1 is possible and the bracket needs order statistics; ``cap`` is where a bound of 1 on phi takes hold.
    """
    n_active = active.sum(-1, keepdim=True).to(x.dtype)
    lowered = torch.where(active, x, FAR)
    if ordered:
        m, j = k.ceil(), k.floor() + 1
        ref, lower = order_statistics(lowered, m.long(), j.long())
        high = -phi_inverse((k - m + 1) / (n_active - m + 1))
        low = (lower - ref) / eps - phi_inverse(k / j)
        tau = ((lower - ref) / eps) / 2
    else:
        ref = lowered.amax(-1, keepdim=True)
        high = -phi_inverse(k / n_active)
        low = -phi_inverse(k)
        tau = low
    u = torch.where(active, (x - ref) / eps, FAR)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    tau = torch.minimum(torch.maximum(tau, low), high)
    done = torch.zeros_like(tau, dtype=torch.bool)
    tolerance = 2 * torch.finfo(x.dtype).eps
    for step in range(200):
        z = u - tau
        y = phi(z)
        if cap is not None:
            y = torch.where(z < cap, y, 1)
        total = row_sum(y)
        residual = total - k
        done = done | (residual.abs() <= tolerance * k)
        if step % CHECK_EVERY == CHECK_EVERY - 1 and bool(done.all()):
            break
        low = torch.where(~done & (residual > 0), tau, low)
        high = torch.where(~done & (residual < 0), tau, high)
        slope = dphi(z)
        if cap is not None:
            slope = torch.where(z < cap, slope, 0)
        slope = row_sum(slope)
        newton = residual / slope
        if log_residual:
            rest = n_active - total
            below = (total / slope) * (total / k).log()
            above = (rest / slope) * ((n_active - k) / rest).log()
            newton = torch.where(k <= n_active / 2, below, above) if ordered else below
        proposal = tau + newton
        inside = (proposal > low) & (proposal < high)  # False for NaN too
        proposal = torch.where(inside, proposal, low + (high - low) / 2)
        done = done | (proposal == tau)
        tau = torch.where(done, tau, proposal)
    return ref, tau
