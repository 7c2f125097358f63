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


State = tuple[Tensor, Tensor]  # (a, b, sa, sb, m, eps) and (group, index of the first item), one column a block


def _violates(state: State, rule: int) -> Tensor:
    """Whether each block must be pooled with the next one: its answer would be the smaller of the two."""
    (ab, sums, m, eps), group = (state[0][0:2], state[0][2:4], state[0][4], state[0][5, :-1]), state[1][0]
    head, tail = slice(None, -1), slice(1, None)
    gap = ab[:, head] - ab[:, tail]
    if rule == MEAN:
        mean = sums / m
        lhs, rhs = gap + (mean[:, head] - mean[:, tail])
        rhs = eps * rhs
    else:
        lhs, rhs = (sums[:, head] / sums[:, tail]).log()
        lhs, rhs = gap[0] / eps + lhs, gap[1] + rhs
    return (lhs < rhs) & (group[head] == group[tail]) & (group[head] >= 0)


def _violates_alone(theta: Tensor, w: Tensor, eps: Tensor, group: Tensor, rule: int) -> Tensor:
    """:func:`_violates` where each item is a block, without most of the work; the end of a row violates nothing."""
    lhs, rhs = theta[:, :-1] - theta[:, 1:], w[:, :-1] - w[:, 1:]
    lhs, rhs = (lhs, eps * rhs) if rule == MEAN else (lhs / eps, rhs)
    found = torch.zeros(theta.shape, dtype=torch.bool, device=theta.device)
    found[:, :-1] = (lhs < rhs) & (group[:, :-1] == group[:, 1:]) & (group[:, :-1] >= 0)
    return found.view(-1)[:-1]


def _merge(state: State, violates: Tensor, rule: int, compact: bool) -> tuple[State, Tensor]:
    """Pools every maximal run of violating neighbours at once, and tells which blocks are left.

    Unless ``compact``, arrays keep their length, so that nothing need be known on the host; the dead blocks at their
    end get group -1.
    """
    numbers, places = state
    opens = torch.cat([torch.ones_like(violates[:1]), ~violates])
    run = opens.cumsum(0).sub_(1)
    if compact:
        lead = opens.nonzero().squeeze(1)
        live = torch.ones_like(lead, dtype=torch.bool)
    else:
        index = torch.arange(len(run), device=run.device)
        lead = torch.full_like(run, len(run)).scatter_reduce_(0, run, index, "amin")
        live = lead < len(run)
        lead = torch.where(live, lead, 0)
    merged, places = numbers.index_select(1, lead), places.index_select(1, lead)
    gap = numbers[:2] - merged[:2].gather(1, run.expand(2, -1))  # an index_select of two rows is slower
    if rule == MEAN:
        relative = torch.cat([numbers[2:4] + numbers[4] * gap, numbers[4:5]])
    else:
        gap[0] /= numbers[5]
        relative = torch.cat([numbers[2:4] * gap.exp(), numbers[4:5]])
    merged[2:5] = 0
    merged[2:5].index_add_(1, run, relative)
    if not compact:
        merged[2:5] = torch.where(live, merged[2:5], 1)
        places[0] = torch.where(live, places[0], -1)
    return (merged, places), live


def pool(theta: Tensor, w: Tensor, weights: Tensor, group: Tensor, eps: Tensor, rule: int) -> Tensor:
    """Pool-adjacent-violators on rows sorted so that theta and w do not increase: the first index of each item's block.

    theta, w, weights, group: (rows, n); eps: (rows, 1). Items of different groups are never pooled.
    """
    rows, n = theta.shape
    if n == 0 or rows == 0:
        return torch.zeros(rows, n, dtype=torch.long, device=theta.device)
    index = torch.arange(rows * n, device=theta.device).view(rows, n)
    start = torch.zeros_like(theta) if rule == MEAN else torch.ones_like(theta)
    apart = group.long() + GROUPS * (index // n)
    given = (theta, w, start, start, weights, eps.expand(rows, n))
    state = torch.stack([v.reshape(-1) for v in given]), torch.stack([apart.view(-1), index.view(-1)])
    on_host = theta.device.type == "cpu"
    for step in range(1, ROUNDS + 1):
        violates = _violates(state, rule) if step > 1 else _violates_alone(theta, w, eps, group, rule)
        if (on_host or step % CHECK_EVERY == 1) and not bool(violates.any()):
            break
        state, live = _merge(state, violates, rule, on_host)
        if not on_host and step % CHECK_EVERY == 0:
            blocks = int(live.sum())
            state = state[0][:, :blocks], state[1][:, :blocks]
    else:
        state = _pool_sequentially(state, rule)
    group, first = state[1]
    opens = torch.zeros(rows * n, dtype=torch.long, device=theta.device)
    opens.scatter_(0, first, torch.where(group >= 0, first, 0))
    return (opens.cummax(0).values.view(rows, n) - index[:, :1]).contiguous()


def _pool_sequentially(state: State, rule: int) -> State:
    """The same pooling of the remaining blocks one after the other, on the host."""
    a, b, sa, sb, m, eps, group = (v.tolist() for v in (*state[0], state[1][0]))
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
    lead = torch.tensor(top, device=state[0].device)
    return state[0][:, lead], state[1][:, lead]


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
