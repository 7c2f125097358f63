"""Perturbed, SoftSort, NeuralSort and SortingNetwork through the operators that take them.

The laws of the relaxations are those of the registry; here are their infinities and masks. Perturbed is random, so it
is compared with closed forms, within five standard errors, and with itself at the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import cotangent, loss, normal, present, spread
from torch import Tensor

import smoothops as so

ROWS = 4000
INF = torch.inf
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NOISES = {"normal": so.Normal(), "gumbel": so.Gumbel(), "logistic": so.Logistic()}
CDF = {
    "normal": torch.special.ndtr,
    "gumbel": lambda z: torch.exp(-torch.exp(-z)),
    "logistic": torch.sigmoid,
}
RELAXATIONS = {"softsort": so.SoftSort(0.4), "neuralsort": so.NeuralSort(0.4), "network": so.SortingNetwork(0.2)}
X = torch.tensor([0.4, -0.3, 0.0, 0.9], dtype=torch.float64)
each_relaxation = pytest.mark.parametrize("name", RELAXATIONS)


def perturbed(eps: float | Tensor = 0.5, noise: so.Normal | so.Gumbel | so.Logistic | None = None, seed: int = 0):
    """A smoothing that draws the same noise at its first use, however often it is made."""
    return so.Perturbed(eps, noise, 20, generator=torch.Generator().manual_seed(seed))


def many(x: Tensor) -> Tensor:
    """(ROWS, n): every row is one independent replicate of the estimate."""
    return x.expand(ROWS, *x.shape).clone().requires_grad_()


def check_unbiased(estimates: Tensor, exact: Tensor, resolution: float = 0.1) -> None:
    """The mean over the rows is ``exact`` within 5 standard errors, which are small enough to tell."""
    error = estimates.detach().std(0) / len(estimates) ** 0.5
    assert (5 * error).max() < resolution * max(1.0, exact.abs().max().item())
    assert ((estimates.detach().mean(0) - exact).abs() <= 5 * error + 1e-12).all()


def check_closed_form(f: Callable[[Tensor], Tensor], want: Callable[[Tensor], Tensor], x: Tensor = X) -> None:
    """Value, and gradient of a weighted sum over the entries of an answer."""
    rows, one = many(x), x.clone().requires_grad_()
    y, exact = f(rows), want(one)
    check_unbiased(y, exact.detach())
    weights = cotangent(exact)
    (got,) = torch.autograd.grad((y * weights).sum(), rows)
    (slope,) = torch.autograd.grad((exact * weights).sum(), one)
    check_unbiased(got, slope)


# --- Perturbed: closed forms -----------------------------------------------------------------------------------------

GUMBEL = so.Perturbed(0.5, so.Gumbel(), 20)
NORMAL = so.Perturbed(0.5, samples=20)
LOGISTIC = so.Perturbed(0.5, so.Logistic(), 20)


def ndtr(gap: Tensor) -> Tensor:
    """P(a + eps Z > b + eps Z') for gap = a - b, eps = 0.5, Z and Z' standard normal."""
    return torch.special.ndtr(gap / (0.5 * math.sqrt(2)))


def mean_ranks(x: Tensor, w: Tensor | None = None) -> Tensor:
    """The expected weight below an item, and half its own."""
    w = torch.ones_like(x) if w is None else w
    below = ndtr(x.unsqueeze(-1) - x.unsqueeze(-2)) * (1 - torch.eye(x.shape[-1], dtype=x.dtype))
    return (below * w).sum(-1) + w / 2 + 0.5


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
HALF = torch.tensor([0.5], dtype=torch.float64)
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "argmax": (lambda x: so.argmax(x, -1, smoothing=GUMBEL), lambda x: torch.softmax(x / 0.5, -1)),
    "argmin": (lambda x: so.argmin(x, -1, smoothing=GUMBEL), lambda x: torch.softmax(-x / 0.5, -1)),
    "amax": (lambda x: so.amax(x, -1, smoothing=GUMBEL), lambda x: 0.5 * torch.logsumexp(x / 0.5, -1)),
    "amin": (lambda x: so.amin(x, -1, smoothing=GUMBEL), lambda x: -0.5 * torch.logsumexp(-x / 0.5, -1)),
    "max.values": (lambda x: so.max(x, -1, smoothing=GUMBEL).values, lambda x: 0.5 * torch.logsumexp(x / 0.5, -1)),
    "max.indices": (lambda x: so.max(x, -1, smoothing=GUMBEL).indices, lambda x: torch.softmax(x / 0.5, -1)),
    "max of two": (lambda x: so.max(x, x.flip(-1) / 2, smoothing=GUMBEL),
                   lambda x: 0.5 * torch.logaddexp(x / 0.5, x.flip(-1))),
    "maximum": (lambda x: so.maximum(x, x.flip(-1) / 2, smoothing=GUMBEL),
                lambda x: 0.5 * torch.logaddexp(x / 0.5, x.flip(-1))),
    "minimum": (lambda x: so.minimum(x, x.flip(-1) / 2, smoothing=GUMBEL),
                lambda x: -0.5 * torch.logaddexp(-x / 0.5, -x.flip(-1))),
    "topk_mask of 1": (lambda x: so.topk_mask(x, 1, smoothing=GUMBEL), lambda x: torch.softmax(x / 0.5, -1)),
    "topk_mask of 0.5": (lambda x: so.topk_mask(x, 0.5, smoothing=GUMBEL), lambda x: torch.softmax(x / 0.5, -1) / 2),
    "topk_mask of all but 1": (lambda x: so.topk_mask(x, 3, smoothing=NORMAL),
                               lambda x: 1 - least(x)),
    "rank": (lambda x: so.rank(x, smoothing=NORMAL), mean_ranks),
    "rank, descending": (lambda x: so.rank(x, descending=True, smoothing=NORMAL), lambda x: mean_ranks(-x)),
    "rank, weights": (lambda x: so.rank(x, weights=WEIGHTS, smoothing=NORMAL), lambda x: mean_ranks(x, WEIGHTS)),
    "argsort, the largest": (lambda x: so.argsort(x, descending=True, smoothing=GUMBEL)[..., 0, :],
                             lambda x: torch.softmax(x / 0.5, -1)),
    "argtopk": (lambda x: so.argtopk(x, 1, largest=False, smoothing=NORMAL)[..., 0, :], lambda x: least(x)),
    "heaviside": (lambda x: so.heaviside(x, smoothing=LOGISTIC), lambda x: torch.sigmoid(x / 0.5)),
    "sign": (lambda x: so.sign(x, smoothing=LOGISTIC), lambda x: torch.tanh(x)),
    "relu": (lambda x: so.relu(x, smoothing=LOGISTIC), lambda x: so.relu(x, smoothing=so.Entropy(0.5))),
    "abs": (lambda x: so.abs(x, smoothing=LOGISTIC), lambda x: 2 * so.relu(x, smoothing=so.Entropy(0.5)) - x),
    "clamp": (lambda x: so.clamp(x, -0.2, 0.5, smoothing=LOGISTIC),
              lambda x: so.clamp(x, -0.2, 0.5, smoothing=so.Entropy(0.5))),
    "floor": (lambda x: so.floor(3 * x, smoothing=LOGISTIC), lambda x: so.floor(3 * x, smoothing=so.Entropy(0.5))),
    "ceil": (lambda x: so.ceil(3 * x, smoothing=LOGISTIC), lambda x: so.ceil(3 * x, smoothing=so.Entropy(0.5))),
    "round": (lambda x: so.round(3 * x, smoothing=LOGISTIC), lambda x: so.round(3 * x, smoothing=so.Entropy(0.5))),
    "Simplex.max": (lambda x: so.Simplex().max(x, GUMBEL), lambda x: 0.5 * torch.logsumexp(x / 0.5, -1)),
    "Hypercube.argmax": (lambda x: so.Hypercube().argmax(x, LOGISTIC), lambda x: torch.sigmoid(x / 0.5)),
    "Hypercube.max": (lambda x: so.Hypercube().max(x, LOGISTIC),
                      lambda x: so.relu(x, smoothing=so.Entropy(0.5)).sum(-1)),
    "Permutahedron.argmax": (lambda x: so.Permutahedron(torch.arange(1.0, 5.0)).argmax(x, NORMAL), mean_ranks),
}  # fmt: skip


def least(x: Tensor) -> Tensor:
    """P(item i is the least) under normal noise of scale 0.5, by quadrature: int p(z) prod_j Phi(...) dz."""
    z = torch.linspace(-9, 9, 4001, dtype=x.dtype)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    gaps = (x.unsqueeze(-2) - x.unsqueeze(-1)) / 0.5  # x_j - x_i
    above = torch.special.ndtr(gaps.unsqueeze(-1) - z)
    own = torch.eye(x.shape[-1], dtype=torch.bool).unsqueeze(-1)
    return (torch.where(own, 1.0, above).prod(-2) * density).sum(-1)


@pytest.mark.parametrize("name", FORMS)
def test_closed_forms(name: str) -> None:
    check_closed_form(*FORMS[name])


@pytest.mark.parametrize("law", NOISES)
def test_a_step_is_the_distribution_function(law: str) -> None:
    """Gumbel noise is centred, and not symmetric: E 1[x + eps (Z - mean) > 0] = 1 - F(mean - x/eps)."""
    noise = NOISES[law]
    smoothing = so.Perturbed(0.5, noise, 20)
    check_closed_form(lambda x: so.heaviside(x, smoothing=smoothing), lambda x: 1 - CDF[law](noise.mean - x / 0.5))


def test_sort_perturbs_the_positions() -> None:
    """For two items: they trade places with probability Phi(-1/(eps sqrt 2)), whatever the gap."""
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    swap = torch.special.ndtr(torch.tensor(-1 / (0.5 * math.sqrt(2)), dtype=torch.float64))
    check_closed_form(
        lambda x: so.sort(x, smoothing=NORMAL),
        lambda x: torch.stack([x[1] + swap * (x[0] - x[1]), x[0] - swap * (x[0] - x[1])]),
        x,
    )


def test_strength_has_a_gradient() -> None:
    """d/d eps of softmax(x/eps), of a sort of two and of a step, one estimate a row."""
    cases: list[tuple[Callable[[Tensor, so.Smoothing], Tensor], Callable[[Tensor], Tensor], so.Gumbel | so.Normal]] = [
        (lambda x, s: so.argmax(x, -1, smoothing=s), lambda e: torch.softmax(X / e, -1), so.Gumbel()),
        (lambda x, s: so.heaviside(x, smoothing=s), lambda e: torch.special.ndtr(X / e), so.Normal()),
        (
            lambda x, s: so.sort(x[:, :2], smoothing=s)[:, :1],
            lambda e: -0.3 + 0.7 * torch.special.ndtr(-1 / (e * math.sqrt(2))),
            so.Normal(),
        ),
    ]
    for f, want, noise in cases:
        eps, one = torch.full((ROWS, 1), 0.5, dtype=torch.float64, requires_grad=True), HALF.clone().requires_grad_()
        y, exact = f(X.expand(ROWS, 4), so.Perturbed(eps, noise, 20)), want(one)
        weights = cotangent(exact)
        (got,) = torch.autograd.grad((y * weights).sum(), eps)
        (slope,) = torch.autograd.grad((exact * weights).sum(), one)
        check_unbiased(got, slope)


# --- Perturbed: what holds for every draw ----------------------------------------------------------------------------

CALLS: dict[str, Callable[[Tensor, so.Smoothing], Tensor]] = {
    "argmax": lambda x, s: so.argmax(x, -1, smoothing=s),
    "amax": lambda x, s: so.amax(x, -1, True, smoothing=s),
    "topk_mask": lambda x, s: so.topk_mask(x, 2, smoothing=s),
    "rank": lambda x, s: so.rank(x, smoothing=s),
    "rank, weights": lambda x, s: so.rank(x, weights=WEIGHTS, smoothing=s),
    "sort": lambda x, s: so.sort(x, smoothing=s),
    "sort, descending": lambda x, s: so.sort(x, descending=True, smoothing=s),
    "sort, where": lambda x, s: so.sort(x, where=present(x, -1), fill=0.0, smoothing=s),
    "argsort": lambda x, s: so.argsort(x, smoothing=s),
    "median": lambda x, s: so.median(x, -1, True, smoothing=s),
    "quantile": lambda x, s: so.quantile(x, 0.3, -1, True, smoothing=s),
    "heaviside": lambda x, s: so.heaviside(x, smoothing=s),
    "relu": lambda x, s: so.relu(x, smoothing=s),
    "maximum": lambda x, s: so.maximum(x, x.flip(-1) / 2, smoothing=s),
    "clamp": lambda x, s: so.clamp(x, -0.2, 0.5, smoothing=s),
    "Hypercube.max": lambda x, s: so.Hypercube().max(x, s),
    "Permutahedron.max": lambda x, s: so.Permutahedron(spread(4)).max(x, s),
}
each_call = pytest.mark.parametrize("name", CALLS)


def test_sums_and_bounds() -> None:
    x = normal(30, 5, seed=1)
    for k in (2, 1.5, torch.tensor(2.5)):
        mask = so.topk_mask(x, k, smoothing=perturbed())
        torch.testing.assert_close(mask.sum(-1), torch.full((30,), float(k), dtype=torch.float64), **EXACT)
        assert mask.min() >= 0
        assert mask.max() <= 1
    torch.testing.assert_close(so.rank(x, smoothing=perturbed()).sum(-1), torch.full((30,), 15.0).double(), **EXACT)
    for descending in (False, True):
        y = so.sort(x, descending=descending, smoothing=perturbed())
        torch.testing.assert_close(y.sum(-1), x.sum(-1), **EXACT)
        assert (y >= x.amin(-1, True) - 1e-12).all()
        assert (y <= x.amax(-1, True) + 1e-12).all()
        p = so.argsort(x, descending=descending, smoothing=perturbed())
        for side in (-1, -2):
            torch.testing.assert_close(p.sum(side), torch.ones(30, 5).double(), **EXACT)
        assert p.min() >= 0
    low, high = so.amin(x, -1, smoothing=perturbed()), so.amax(x, -1, smoothing=perturbed())
    assert (high >= x.amax(-1)).all()  # normal noise in mirrored pairs
    assert (low <= x.amin(-1)).all()


def test_sort_is_the_transposed_matrix_of_the_positions() -> None:
    """Position i holds the value that the rank of rho_i + eps Z picks: y = P(rho)' s, P the mean permutation."""
    x = normal(3, 6, seed=2).requires_grad_()
    p = so.argsort(torch.arange(1.0, 7.0).double().expand(3, 6), smoothing=perturbed(0.8))
    y, s = so.sort(x, smoothing=perturbed(0.8)), x.sort(-1).values
    want = (p.transpose(-1, -2) @ s.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(y, want, **EXACT)
    for got, expected in zip(
        torch.autograd.grad(loss(y), x), torch.autograd.grad((want * cotangent(want)).sum(), x), strict=True
    ):
        torch.testing.assert_close(got, expected, **EXACT)


def test_statistics_are_parts_of_the_sort() -> None:
    x = normal(3, 6, seed=3)
    y = so.sort(x, smoothing=perturbed())
    down = so.sort(x, descending=True, smoothing=perturbed())
    assert torch.equal(down, y.flip(-1))
    assert torch.equal(so.topk(x, 2, smoothing=perturbed()), down[:, :2])
    assert torch.equal(so.kthvalue(x, 2, smoothing=perturbed()), y[:, 1])
    assert torch.equal(so.median(x, -1, smoothing=perturbed()), y[:, 2])
    torch.testing.assert_close(so.quantile(x, 0.5, -1, smoothing=perturbed()), (y[:, 2] + y[:, 3]) / 2, **EXACT)


def test_gradient_of_the_maximum_is_the_argmax() -> None:
    x = normal(3, 5, seed=4).requires_grad_()
    for maximum, argmax in [
        (lambda s: so.amax(x, -1, smoothing=s), lambda s: so.argmax(x, -1, smoothing=s)),
        (lambda s: so.CappedSimplex(2).max(x, s), lambda s: so.topk_mask(x, 2, smoothing=s)),
        (lambda s: so.Permutahedron(spread(5)).max(x, s), lambda s: so.Permutahedron(spread(5)).argmax(x, s)),
        (lambda s: so.Hypercube().max(x, s), lambda s: so.Hypercube().argmax(x, s)),
    ]:
        (gradient,) = torch.autograd.grad(maximum(perturbed()).sum(), x)
        torch.testing.assert_close(gradient, argmax(perturbed()).detach(), **EXACT)


def test_gradients_in_bounds_and_vertices() -> None:
    """What the hard answer is made of keeps its own gradient: the bounds of a clamp, w of a permutahedron."""
    x, low = normal(50, seed=5), torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(so.clamp(x, low, smoothing=LOGISTIC).sum(), low)
    exact = torch.sigmoid((-0.2 - x) / 0.5).sum()
    assert abs(gradient - exact) < 5 * 50**0.5 * 0.5 / 20**0.5
    w = spread(4).requires_grad_()
    y = so.Permutahedron(w).argmax(X.expand(3, 4), perturbed())
    (got,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(got, torch.full((4,), 3.0).double(), **EXACT)


@each_call
def test_strength_0_is_hard_and_small_strength_nearly(name: str) -> None:
    x = normal(3, 4, seed=6)
    assert torch.equal(CALLS[name](x, so.Perturbed(0)), CALLS[name](x, so.Hard()))
    torch.testing.assert_close(CALLS[name](x, so.Perturbed(1e-9)), CALLS[name](x, so.Hard()), rtol=0, atol=1e-7)


@each_call
def test_forward_value_of_straight_through_is_hard(name: str) -> None:
    x = normal(3, 4, seed=7).requires_grad_()
    y = CALLS[name](x, so.StraightThrough(perturbed()))
    assert torch.equal(y, CALLS[name](x, so.Hard()))
    (gradient,) = torch.autograd.grad(loss(y), x)
    (want,) = torch.autograd.grad(loss(CALLS[name](x, perturbed())), x)
    torch.testing.assert_close(gradient, want, **EXACT)
    assert want.abs().max() > 0


@each_call
def test_nan_stays_in_its_row(name: str) -> None:
    x = normal(4, 4, seed=8)
    clean = CALLS[name](x, perturbed())
    bad = x.clone()
    bad[1, 0] = torch.nan
    bad.requires_grad_()
    y = CALLS[name](bad, perturbed())
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(y[keep], clean[keep])
    assert y[1].isnan().any()
    if name not in ("heaviside", "relu", "maximum", "clamp", "sort, where"):
        assert y[1].isnan().all()
    (gradient,) = torch.autograd.grad(loss(y), bad)
    assert not gradient[keep].isnan().any()


@each_call
def test_half_precision_integers_and_strengths_of_rows(name: str) -> None:
    x = normal(3, 4, seed=9)
    assert CALLS[name](x.half(), perturbed()).dtype == torch.float16
    assert CALLS[name]((4 * x).long(), perturbed()).dtype == torch.float32
    eps = torch.tensor([[0.1], [0.5], [2.0]], dtype=torch.float64)
    some = CALLS[name](x, perturbed(eps))
    for i in range(3):
        torch.testing.assert_close(some[i], CALLS[name](x, perturbed(eps[i].item()))[i], **EXACT)


def test_any_dim() -> None:
    x = normal(3, 4, seed=10)
    for f in (so.rank, so.sort, so.argmax, so.amax):
        along = f(x, 1, smoothing=perturbed())
        across = f(x.T, 0, smoothing=perturbed())
        assert torch.equal(across, along.T if along.ndim == 2 else along)
    assert torch.equal(so.max(x, smoothing=perturbed()), so.amax(x.flatten(), -1, smoothing=perturbed()))
    assert so.argmax(torch.tensor(2.0), smoothing=perturbed()) == 1
    assert so.rank(torch.zeros(0, 3), smoothing=perturbed()).shape == (0, 3)
    assert so.sort(torch.zeros(2, 0), smoothing=perturbed()).shape == (2, 0)


# --- Perturbed: infinities and absent items --------------------------------------------------------------------------


def test_absent_and_excluded_items_do_not_count() -> None:
    """A mask and -inf leave the closed form of the other items; neither has a gradient."""
    keep = torch.tensor([True, False, True, True])
    for where, x in ((keep, torch.where(keep, X, 99.0)), (None, torch.where(keep, X, -INF))):
        rows = many(x)
        y = so.argmax(rows, -1, where=where, smoothing=GUMBEL)
        check_unbiased(y[:, keep], torch.softmax(X[keep] / 0.5, -1))
        m = so.amax(rows, -1, where=where, smoothing=GUMBEL)
        check_unbiased(m, 0.5 * torch.logsumexp(X[keep] / 0.5, -1))
        gradient = torch.autograd.grad(loss(y), rows)[0] + torch.autograd.grad(loss(m), rows)[0]
        assert torch.equal(y[:, ~keep], torch.zeros(ROWS, 1).double())
        assert torch.equal(gradient[:, ~keep], torch.zeros(ROWS, 1).double())
        assert gradient.isfinite().all()
    rows = many(torch.where(keep, X, torch.nan))
    ranks = so.rank(rows, where=keep, smoothing=NORMAL)
    check_unbiased(ranks[:, keep], mean_ranks(X[keep]))
    assert torch.equal(ranks[:, ~keep], torch.zeros(ROWS, 1).double())
    (gradient,) = torch.autograd.grad(loss(ranks), rows)
    assert torch.equal(gradient[:, ~keep], torch.zeros(ROWS, 1).double())
    p = so.argsort(X, where=keep, smoothing=perturbed())
    assert not p[:, ~keep].any()
    assert not p[3].any()
    torch.testing.assert_close(p[:3].sum(-1), torch.ones(3).double(), **EXACT)
    y = so.sort(X, where=keep, smoothing=perturbed())
    assert y[3].isnan()
    torch.testing.assert_close(y[:3].sum(), X[keep].sum(), **EXACT)


def test_a_row_without_items_is_as_hard() -> None:
    x, none = normal(2, 4, seed=11), torch.tensor([[True] * 4, [False] * 4])
    for f in (
        lambda x, s: so.argmax(x, -1, where=none, smoothing=s),
        lambda x, s: so.amax(x, -1, where=none, smoothing=s),
        lambda x, s: so.topk_mask(x, 2, where=none, smoothing=s),
        lambda x, s: so.rank(x, where=none, smoothing=s),
        lambda x, s: so.sort(x, where=none, fill=0.0, smoothing=s),
        lambda x, s: so.argsort(x, where=none, smoothing=s),
    ):
        leaf = x.clone().requires_grad_()
        y = f(leaf, perturbed())
        assert torch.equal(y[1], f(x, so.Hard())[1])
        (gradient,) = torch.autograd.grad(loss(y[0]) + torch.where(y[1].isfinite(), y[1], 0).sum(), leaf)
        assert torch.equal(gradient[1], torch.zeros(4).double())
        assert not gradient.isnan().any()


def test_infinities_are_extremes() -> None:
    x = torch.tensor([0.3, INF, 0.5, -INF, -0.4, INF], dtype=torch.float64).requires_grad_()
    for descending in (False, True):
        y = so.sort(x, descending=descending, smoothing=perturbed())
        y = y.flip(0) if descending else y
        assert y[0] == -INF
        assert (y[4:] == INF).all()
        torch.testing.assert_close(y[1:4].sum(), x[[0, 2, 4]].sum(), **EXACT)
        (gradient,) = torch.autograd.grad(loss(y[1:4]), x)
        assert torch.equal(gradient[[1, 3, 5]], torch.zeros(3).double())
        assert gradient[[0, 2, 4]].isfinite().all()
    ranks = so.rank(x, smoothing=perturbed())
    assert ranks[3] == 1
    torch.testing.assert_close(ranks[[1, 5]].detach(), torch.full((2,), 5.5).double(), **EXACT)
    (gradient,) = torch.autograd.grad(loss(ranks), x)
    assert torch.equal(gradient[[1, 3, 5]], torch.zeros(3).double())
    weights = so.argmax(x, smoothing=perturbed())
    assert torch.equal(weights, so.argmax(x, smoothing=so.Hard()))
    assert so.amax(x, smoothing=perturbed()) == INF
    assert so.amax(torch.full((3,), -INF), smoothing=perturbed()) == -INF
    entries = torch.tensor([INF, -INF], dtype=torch.float64)
    for f in (so.heaviside, so.sign, so.relu, so.abs, so.floor, so.ceil, so.round):
        assert torch.equal(f(entries, smoothing=perturbed()), f(entries, smoothing=so.Hard()))
    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(so.maximum(entries, zero, smoothing=perturbed()), torch.maximum(entries, zero))


# --- Perturbed: transforms -------------------------------------------------------------------------------------------


@each_call
def test_modes_agree(name: str) -> None:
    """Forward and reverse mode, and vmap over rows with the noise of a single row."""
    x = normal(3, 4, seed=12)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return CALLS[name](x, so.Perturbed(0.5, samples=6))

    forward, reverse = torch.func.jacfwd(f, randomness="same")(x), torch.func.jacrev(f)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f(leaf)), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(f(x)))(x), gradient, rtol=1e-10, atol=1e-12)
    each = torch.func.vmap(f, randomness="same")(x)
    torch.testing.assert_close(each, torch.stack([f(row) for row in x]), **EXACT)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["amax", "topk_mask", "rank, weights", "sort, where", "argsort", "relu", "maximum"])
def test_compiled_is_eager(name: str) -> None:
    x = normal(3, 4, seed=13)

    def f(x: Tensor) -> Tensor:
        return CALLS[name](x, so.Perturbed(0.5, samples=6))

    results = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        y = g(leaf)
        results.append((y.detach(), torch.autograd.grad(loss(y), leaf)[0]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


# --- relaxations of a sort -------------------------------------------------------------------------------------------


@each_relaxation
@pytest.mark.parametrize("descending", [False, True])
def test_infinities_of_a_relaxed_sort(name: str, descending: bool) -> None:
    """Infinities at their ends, exact and without gradient; between them the sort of the finite items alone."""
    smoothing = RELAXATIONS[name]
    x = torch.tensor([0.3, INF, 0.5, -INF, -0.4, INF, 7.0], dtype=torch.float64).requires_grad_()
    for where in (None, torch.tensor([True] * 6 + [False])):
        count = 7 if where is None else 6
        finite = torch.tensor([0, 2, 4, 6][: count - 3])
        y = so.sort(x, descending=descending, where=where, fill=0.0, smoothing=smoothing)
        p = so.argsort(x, descending=descending, where=where, smoothing=smoothing)
        inner = slice(2, count - 1) if descending else slice(1, count - 2)
        low, high = (count - 1, [0, 1]) if descending else (0, [count - 2, count - 1])
        assert y[low] == -INF
        assert (y[high] == INF).all()
        assert torch.equal(y[count:], torch.zeros(7 - count).double())
        alone = x[finite]
        torch.testing.assert_close(y[inner], so.sort(alone, descending=descending, smoothing=smoothing), **EXACT)
        want = so.argsort(alone, descending=descending, smoothing=smoothing)
        torch.testing.assert_close(p[inner][:, finite], want, **EXACT)
        share = torch.zeros(7, 7, dtype=torch.float64)
        share[low, 3] = 1
        for position in high:
            share[position, [1, 5]] = 0.5
        share[inner] = torch.zeros(7, dtype=torch.float64).index_put((finite,), torch.ones(()).double()) * p[inner]
        assert torch.equal(p.detach(), share.detach())
        (gradient,) = torch.autograd.grad(loss(y[inner]) + loss(p), x)
        others = torch.ones(7, dtype=torch.bool).index_fill(0, finite, False)
        assert torch.equal(gradient[others], torch.zeros(int(others.sum())).double())
        assert gradient.isfinite().all()


@each_relaxation
def test_relaxed_rows_of_every_kind(name: str) -> None:
    """Rows with and without infinities, absent items and NaN stand side by side without seeing each other."""
    smoothing = RELAXATIONS[name]
    x = normal(5, 6, seed=14)
    x[1, 2], x[2, 0], x[3, 4] = INF, -INF, torch.nan
    where = torch.ones(5, 6, dtype=torch.bool)
    where[2, 3:], where[4] = False, False
    y, p = so.sort(x, where=where, smoothing=smoothing), so.argsort(x, where=where, smoothing=smoothing)
    for i in range(5):
        alone = so.sort(x[i], where=where[i], smoothing=smoothing)
        torch.testing.assert_close(y[i], alone, equal_nan=True, **EXACT)
        torch.testing.assert_close(p[i], so.argsort(x[i], where=where[i], smoothing=smoothing), equal_nan=True, **EXACT)
    assert y[3].isnan().all()
    assert p[3].isnan().all()
    assert y[4].isnan().all()
    assert not p[4].any()
    many = torch.func.vmap(lambda x, w: so.sort(x, where=w, smoothing=smoothing))(x, where)
    torch.testing.assert_close(many, y, equal_nan=True, **EXACT)


@each_relaxation
def test_straight_through_a_relaxation(name: str) -> None:
    x, smoothing = normal(3, 6, seed=15).requires_grad_(), RELAXATIONS[name]
    for f in (so.sort, so.argsort, lambda x, smoothing: so.median(x, -1, smoothing=smoothing)):
        y = f(x, smoothing=so.StraightThrough(smoothing))
        assert torch.equal(y, f(x, smoothing=so.Hard()))
        (got,) = torch.autograd.grad(loss(y), x)
        (want,) = torch.autograd.grad(loss(f(x, smoothing=smoothing)), x)
        torch.testing.assert_close(got, want, **EXACT)
    assert torch.equal(so.sort(x, smoothing=type(smoothing)(0)), x.sort(-1).values)


@each_relaxation
def test_argtopk_is_a_part_of_argsort(name: str) -> None:
    x, smoothing = normal(3, 6, seed=16), RELAXATIONS[name]
    p = so.argsort(x, descending=True, smoothing=smoothing)
    assert torch.equal(so.argtopk(x, 2, smoothing=smoothing), p[:, :2])
    values = (p * x.unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(so.sort(x, descending=True, smoothing=smoothing), values, **EXACT)
    low = so.quantile(x, 0.5, -1, smoothing=smoothing)
    torch.testing.assert_close(low, (values[:, 2] + values[:, 3]) / 2, **EXACT)


# --- what is not defined ---------------------------------------------------------------------------------------------


@each_relaxation
def test_a_relaxation_softens_sorts_only(name: str) -> None:
    smoothing = RELAXATIONS[name]
    for f in (
        lambda s: so.rank(X, smoothing=s),
        lambda s: so.argmax(X, smoothing=s),
        lambda s: so.amax(X, smoothing=s),
        lambda s: so.topk_mask(X, 2, smoothing=s),
        lambda s: so.heaviside(X, smoothing=s),
        lambda s: so.maximum(X, X, smoothing=s),
        lambda s: so.clamp(X, 0.0, smoothing=s),
        lambda s: so.OrderPolytope().argmax(X, s),
    ):
        with pytest.raises(ValueError, match=rf"{type(smoothing).__name__} softens sorts only.*so\.Quadratic"):
            f(smoothing)
    with pytest.raises(ValueError, match=rf"soft_permutation needs Laplace.*{type(smoothing).__name__}"):
        so.soft_permutation(X, smoothing=smoothing)


def test_what_cannot_be_perturbed() -> None:
    for f in (so.OrderPolytope().argmax, so.OrderPolytope().max):
        with pytest.raises(ValueError, match=r"Perturbed averages hard answers.*so\.Quadratic"):
            f(X, perturbed())
    with pytest.raises(ValueError, match=r"soft_permutation needs Laplace.*Perturbed"):
        so.soft_permutation(X, smoothing=perturbed())
    with pytest.raises(ValueError, match=r"Omega of Perturbed is not known; penalty needs one of .*Quadratic"):
        so.Simplex().penalty(X, perturbed())
    with pytest.raises(ValueError, match=r"eps of shape \(3,\)"):
        so.rank(X.expand(2, 4), smoothing=so.Perturbed(torch.ones(3)))
    with pytest.raises(ValueError, match=r"eps of shape \(3,\)"):
        so.relu(X, smoothing=so.Perturbed(torch.ones(3)))
