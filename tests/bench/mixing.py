"""What the strength chosen from the data does at every length: writes docs/mixing.md.

Run as ``python tests/bench/mixing.py``; about a minute. For rank, sort and topk_mask it compares the default,
Quadratic(Mixing(3.0)), with a fixed eps of 0.1 on three distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import smoothops as so

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
ENTRIES = 100_000  # drawn at each length, in as many rows as that gives
FIXED = 0.1
PAGE = Path(__file__).parents[2] / "docs" / "mixing.md"

DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of a uniform number in (0, 1)
    "normal": lambda u: 2**0.5 * torch.erfinv(2 * u - 1),
    "uniform": lambda u: u,
    "Cauchy": lambda u: torch.tan(torch.pi * (u - 0.5)),
}


def k(x: Tensor) -> int:
    return x.shape[-1] // 10


OPERATORS: dict[str, Callable[[Tensor, so.Smoothing], Tensor]] = {
    "rank": lambda x, s: so.rank(x, smoothing=s),
    "sort": lambda x, s: so.sort(x, smoothing=s),
    "topk_mask": lambda x, s: so.topk_mask(x, k(x), smoothing=s),
}
STRENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda x: so.mixing_eps(so.rank, x),
    "sort": lambda x: so.mixing_eps(so.sort, x),
    "topk_mask": lambda x: so.mixing_eps(so.topk_mask, x, k=k(x)),
}


def block_size(fit: Tensor) -> Tensor:
    """The mean over the items of the number of items that share their value in a monotone fit."""
    flat = fit.reshape(-1, fit.shape[-1])
    sizes = []
    for row in flat:
        count = torch.unique_consecutive(row, return_counts=True)[1].double()
        sizes.append((count * count).sum() / count.sum())
    return torch.stack(sizes).mean()


def mixed(name: str, x: Tensor, eps: Tensor, y: Tensor) -> float:
    """How many inputs an output mixes, counted without the operator itself where that is possible."""
    if name == "topk_mask":  # Quadratic: the items strictly between 0 and 1 move the threshold, all alike
        return float(((y > 0) & (y < 1)).sum(-1).double().mean())
    s = x.sort(descending=True).values
    rho = torch.arange(x.shape[-1], 0, -1, dtype=x.dtype)
    return float(block_size(so.isotonic(s - eps * rho if name == "rank" else rho - eps * s, decreasing=True)))


class Row(NamedTuple):
    eps: float
    inputs: float
    share: float
    distance: float


def measure(name: str, x: Tensor, eps: Tensor) -> Row:
    """At this strength: eps, inputs mixed, share of entries whose gradient is not the hard one, distance to hard."""
    operator = OPERATORS[name]
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for smoothing in (so.Quadratic(eps), so.Hard()):
        leaf = x.clone().requires_grad_()
        y = operator(leaf, smoothing)
        # the hard rank and the hard mask are constants
        gradient = torch.autograd.grad(y, leaf, weights)[0] if y.requires_grad else torch.zeros_like(x)
        found.append((y.detach(), gradient))
    (soft, g), (hard, h) = found
    share, distance = (g != h).double().mean(), (soft - hard).abs().mean()
    return Row(float(eps.median()), mixed(name, x, eps, soft), float(share), float(distance))


def draw(distribution: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    u = torch.rand(max(1, ENTRIES // n), n, dtype=torch.float64, generator=generator)
    return DISTRIBUTIONS[distribution](u.clamp(min=1e-12))


def number(v: float) -> str:
    """Two digits, three from 100 on."""
    return f"{v:.2g}" if v < 100 else f"{float(f'{v:.3g}'):,.0f}".replace(",", " ")


def percent(share: float) -> str:
    return "> 99 %" if 0.995 <= share < 1 else number(100 * share) + " %"


def table(name: str, measured: dict[tuple[str, str, int], tuple[Row, Row]]) -> list[str]:
    lines = [
        "| | n | eps chosen | inputs mixed | softened | distance | inputs mixed at 0.1 | softened | distance |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for distribution in DISTRIBUTIONS:
        for n in SIZES:
            chosen, fixed = measured[name, distribution, n]
            cells = [number(chosen.eps)]
            for row in (chosen, fixed):
                cells += [number(row.inputs), percent(row.share), number(row.distance)]
            lines.append(f"| {distribution} | {n:,} | ".replace(",", " ") + " | ".join(cells) + " |")
    return lines


TEXT = """\
# Mixing: what the default strength does

The default of rank, sort, topk and topk_mask is `Quadratic(Mixing(3.0))`: each row gets the eps at which an output
mixes about three inputs. This page shows what that means from ten to a million entries, next to a fixed eps of 0.1.
How it is defined, and why it is the default, is told in [concept](concept.md#how-eps-is-chosen).

Columns: the eps chosen (the median over the rows); the number of inputs that an output mixes; the share of entries
that are softened, that is, whose gradient differs from the hard operator's (0 in rank and topk_mask, a permutation in
sort); the mean absolute distance to the hard answer. Normal is N(0, 1), uniform is on (0, 1), Cauchy has quartiles at
-1 and 1. Loss: a sum with random weights.

## rank

{rank}

eps has the unit of `x`. Neighbours whose gaps are small against eps are pooled into a block, in which the ranks are
linear: `rank = (x - mean x)/eps + mean rank`. The gradient of a loss is `(g - mean g)/eps` inside each block, and 0
for an item that stands alone: it compares an item with its neighbours in the order, and with nobody else.

A rank is about n times the distribution function of `x`; its slope is about n times the density. So the eps that
mixes a fixed number of items falls like 1/n, and no fixed eps is right for two lengths. On normal data 0.1 leaves
{dead} of the entries without any gradient at n = 10, and at n = 100 it already pools the whole row: all ranks are
linear in `x`, an output mixes all n inputs, and the distance to the hard ranks tends to n/4, as if all were tied.
Mixing keeps a distance of about a quarter of a position at every n.

The block size is an average over the items. Under heavy tails the blocks lie in the dense middle and the entries far
out stand alone: at n = 1 000 000, {cauchy_share} of the Cauchy entries have a gradient, and {uniform_share} of the
uniform ones.

## sort

{sort}

eps has the unit 1/`x`: the inputs are the polytope, and the positions are what is maximized over it. Neighbours are
pooled where their gaps exceed 1/eps, and a block answers `mean x + (position - mean position)/eps`. The gradient is
the mean of g over the block, handed to each of its members. It is never 0 for want of smoothing; the hard sort is the
case of blocks of one, and hands each entry the g of its own position.

A fixed 0.1 pools only where gaps exceed 10, which for normal and uniform data never happens: it is the hard sort, to
the bit, at every n and in the gradient too. The same 0.1 is about right for Cauchy data, whose extremes are far
apart.

Where the pooling happens depends on the distribution. Uniform gaps are alike, and {sort_uniform} of a million entries
are softened. In normal and Cauchy data the widest gaps are those at the two ends: there the mean of three is reached
by two large blocks of outliers, while the middle, where the gaps are small, stays as it was ({sort_normal} and
{sort_cauchy} of a million are softened). The distance of the Cauchy rows is made by these few outliers. For order
statistics in the middle of a long row, a median or a quantile, the default is therefore close to the hard one. An eps
of 0.6 n times the density of `x` at the quantile pools about three entries there:

```python
import torch
import smoothops as so

x = torch.randn(200, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def pooled(smoothing):
    (gradient,) = torch.autograd.grad(so.median(x, -1, smoothing=smoothing).sum(), x)
    return float((gradient != 0).sum(-1).double().mean())


assert pooled(None) == 1
assert 2 < pooled(so.Quadratic(0.6 * 1000 * 0.4)) < 6  # 0.4 is the density of N(0, 1) at its median
assert pooled(so.Quadratic(0.8 * 1000 * 0.4)) > 500  # the blocks from the two ends have met
```

## topk_mask

{topk_mask}

k = n/10, and eps has the unit of `x`. The mask is `clip((x - tau)/eps + 1/2, 0, 1)` with one threshold tau for the
row. Only the entries in the window of width eps at the threshold are strictly between 0 and 1, and only they have a
gradient, `(g - mean g)/eps` over the window. The number mixed is the number of entries in the window.

So with the default three entries at the border of the top k compete, in each row, at every n: at n = 1 000 000 these
are {mask_share} of the entries, at an eps of {mask_eps} on normal data, and their gradient, divided by it, is large.
A fixed 0.1 leaves the window of most rows empty at n = 10 ({mask_dead} of the entries have a gradient), is near the
default at n = 100, and then holds a share that does not depend on n, at a distance to the hard mask that does not
fall either. Neither is right for every purpose. Where many entries should learn from each step, ask for more of them,
or take a regularizer without edges, under which every entry has a gradient:

```python
x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
c = torch.linspace(-1, 1, 1000, dtype=torch.float64)


def softened(smoothing):
    (gradient,) = torch.autograd.grad(so.topk_mask(x, 100, smoothing=smoothing), x, c)
    return int((gradient != 0).sum())


assert softened(None) == 3
assert softened(so.Quadratic(so.Mixing(50.0))) == 50
assert softened(so.BinaryEntropy(so.Mixing(50.0))) == 1000
```

## The caveat: eps carries no gradient

The chosen eps is detached. The ranks do not change when `x` is multiplied by a constant, but their gradient is the
one at fixed eps, which has a part along `x`:

```python
x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
target = 50.5 + torch.linspace(-1, 1, 100, dtype=torch.float64)


def loss(x):
    return ((so.rank(x) - target) ** 2).mean()


torch.testing.assert_close(loss(x), loss(2 * x))  # the loss does not depend on the scale of x ...
(gradient,) = torch.autograd.grad(loss(x), x)
assert (gradient * x).sum().abs() > 1  # ... but its gradient has a part along it
```

Trained on raw scores, that part can shrink their scale without end. Let something else fix the scale (a normalization
layer, weight decay, the loss itself), or divide by the spread, which takes the part out:

```python
(gradient,) = torch.autograd.grad(loss(x / x.std()), x)
assert (gradient * x).sum().abs() < 1e-9
```

or freeze the number once the scale is known. That is also the fast way, as the search costs 10 to 30 solves:

```python
eps = so.mixing_eps(so.rank, x)
torch.testing.assert_close(so.rank(x, smoothing=so.Quadratic(eps)), so.rank(x))
```

Written by `python tests/bench/mixing.py`.
"""


def render(pieces: dict[str, str]) -> str:
    text = TEXT
    for key, value in pieces.items():
        text = text.replace("{" + key + "}", value)
    return text


def main() -> None:
    torch.set_num_threads(1)
    measured = {}
    for distribution in DISTRIBUTIONS:
        for n in SIZES:
            x = draw(distribution, n)
            fixed = torch.full((x.shape[0], 1), FIXED, dtype=x.dtype)
            for name in OPERATORS:
                eps = STRENGTHS[name](x)
                measured[name, distribution, n] = (measure(name, x, eps), measure(name, x, fixed))
        print(distribution, flush=True)
    last = SIZES[-1]
    tables = {name: "\n".join(table(name, measured)) for name in OPERATORS}

    def share(name: str, distribution: str, n: int, which: int = 0) -> float:
        return measured[name, distribution, n][which].share

    numbers = {
        "dead": percent(1 - share("rank", "normal", 10, 1)),
        "cauchy_share": percent(share("rank", "Cauchy", last)),
        "uniform_share": percent(share("rank", "uniform", last)),
        "sort_uniform": percent(share("sort", "uniform", last)),
        "sort_normal": percent(share("sort", "normal", last)),
        "sort_cauchy": percent(share("sort", "Cauchy", last)),
        "mask_share": percent(share("topk_mask", "normal", last)),
        "mask_dead": percent(share("topk_mask", "normal", 10, 1)),
        "mask_eps": number(measured["topk_mask", "normal", last][0].eps),
    }
    PAGE.write_text(render({**tables, **numbers}))


if __name__ == "__main__":
    main()
