"""Published numbers, closed forms, other libraries on random input, and inputs on which other libraries fail.

The packages compared with are optional: torchsort, entmax, softtorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

import smoothops as so


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(ours: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype), rtol=0, atol=atol)


# --- published values ------------------------------------------------------------------------------------------------

NINE = t(8, 0, 5, 3, 2, 1, 6, 7, 9)
Z = t(1, 0.3, -0.2, 0.8)
W = t(2.9, 0.1, 1.2)
LOG_MEAN_EXP = 1.7103188623271  # of W

GOLDENS: list[tuple[str, Callable[[], Tensor], list[float], float]] = [
    # README of fast-soft-sort, by the authors of Blondel, Teboul, Berthet, Djolonga 2020; printed to 8 digits
    ("soft sort, eps 1", lambda: so.sort(t(5, 1, 2), smoothing=1.0), [5 / 3, 8 / 3, 11 / 3], 1e-12),
    ("soft sort, eps 0.1", lambda: so.sort(t(5, 1, 2), smoothing=0.1), [1, 2, 5], 1e-12),
    ("soft rank, eps 2", lambda: so.rank(t(5, 1, 2), smoothing=2.0), [3, 1.25, 1.75], 1e-12),
    ("soft rank, eps 1", lambda: so.rank(t(5, 1, 2), smoothing=1.0), [3, 1, 2], 1e-12),
    # README of torchsort 0.1
    ("nine, sort, eps 1", lambda: so.sort(NINE, smoothing=1.0), [5 / 9 + i for i in range(9)], 1e-12),
    ("nine, sort, eps 0.1", lambda: so.sort(NINE, smoothing=0.1), [0, 1, 2, 3, 5, 6, 7, 8, 9], 1e-12),
    ("nine, rank, eps 1", lambda: so.rank(NINE, smoothing=1.0), [8, 1, 5, 4, 3, 2, 6, 7, 9], 1e-12),
    # README of entmax 1.x, printed to 4 digits
    ("softmax", lambda: so.argmax(t(-2, 0, 0.5), smoothing=1.0), [0.0486, 0.3592, 0.5922], 5e-5),
    ("sparsemax", lambda: so.sparsemax(t(-2, 0, 0.5)), [0, 0.25, 0.75], 1e-12),
    ("entmax-1.5", lambda: so.entmax(t(-2, 0, 0.5)), [0, 0.3260, 0.6740], 5e-5),
    # computed by hand from the closed forms of Blondel et al. 2020, section 3 and 4
    ("rank, one block", lambda: so.rank(W, smoothing=2.0), [2.75, 1.35, 1.9], 1e-12),
    (
        "rank, entropy",
        lambda: so.rank(W, smoothing=so.Entropy(3.0)),
        [3, 1.2280401518973423, 1.771959848102657],
        1e-13,
    ),
    (
        "sort, entropy: log argmax over P(e^x), not what torchsort calls KL",
        lambda: so.sort(W, smoothing=so.Entropy(1.0)),
        [LOG_MEAN_EXP - 1, LOG_MEAN_EXP, LOG_MEAN_EXP + 1],
        1e-13,
    ),
    # sparsemax: Martins, Astudillo 2016; entmax-1.5: Peters, Niculae, Martins 2019, by bisection in long double
    ("sparsemax of z", lambda: so.sparsemax(Z), [0.6, 0, 0, 0.4], 1e-12),
    (
        "entmax-1.5 of z",
        lambda: so.entmax(Z),
        [0.496985169018, 0.126004943661, 0.011019068405, 0.365990818916],
        1e-12,
    ),
    ("sparsemax, two in the support", lambda: so.sparsemax(t(0.5, 0, -1)), [0.75, 0.25, 0], 1e-12),
    (
        "its maximum, Omega = (|y|^2 - 1)/2",
        lambda: so.amax(t(0.5, 0, -1), smoothing=so.Quadratic(1.0)),
        0.5625,  # type: ignore[list-item]
        1e-12,
    ),
    # k-subsets: Euclidean projection on the capped simplex, and the Fermi-Dirac distribution
    (
        "top-2, quadratic",
        lambda: so.topk_mask(Z, 2, smoothing=so.Quadratic(1.0)),
        [0.9 + 2 / 30, 0.2 + 2 / 30, 0, 0.7 + 2 / 30],
        1e-12,
    ),
    (
        "top-2, Fermi-Dirac",
        lambda: so.topk_mask(Z, 2, smoothing=so.BinaryEntropy(0.25)),
        [0.877586682374, 0.303596982495, 0.055712431719, 0.763103903412],
        1e-12,
    ),
]


@pytest.mark.parametrize(("compute", "expected", "atol"), [pytest.param(*g[1:], id=g[0]) for g in GOLDENS])
def test_published(compute: Callable[[], Tensor], expected: list[float], atol: float) -> None:
    close(compute(), expected, atol)


def spearman(pred: Tensor, target: Tensor, rank: Callable[[Tensor], Tensor]) -> Tensor:
    centred = [r - r.mean() for r in (rank(pred), rank(target))]
    a, b = (r / r.norm() for r in centred)
    return (a * b).sum()


def test_spearman_of_the_torchsort_readme() -> None:
    """Value and gradient as printed there, to 4 digits; the target has a tie."""
    pred, target = t(1, 2, 3, 4, 5).requires_grad_(), t(5, 6, 7, 8, 7)
    value = spearman(pred, target, lambda x: so.rank(x, smoothing=1.0 + 1e-9))  # at 1 each gap is at the kink
    close(value.detach(), 0.8321, 5e-5)
    (gradient,) = torch.autograd.grad(value, pred)
    close(gradient, [-5.5470e-02, 0, 5.5470e-02, 1.1094e-01, -1.1094e-01], 1e-6)


def test_gradient_of_the_torchsort_readme() -> None:
    x = NINE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(so.sort(x, smoothing=1.0)[0], x)
    close(gradient, [1 / 9] * 9)


def test_soft_spearman_of_one_block_is_pearson() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 30, dtype=torch.float64)
    pearson = spearman(a, b, lambda x: x)
    close(spearman(a, b, lambda x: so.rank(x, smoothing=1e3)), pearson)


# --- derivatives in closed form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8])
@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_second_derivative_of_entmax(alpha: float, eps: float) -> None:
    """y = phi(z), d = y^(2 - alpha)/eps, e = (2 - alpha) y^(3 - 2 alpha)/eps^2; J = diag d - d d'/S and its derivative.

    J is as in Peters, Niculae, Martins 2019; the second order by differentiating <c, J v> once more. entmax itself has
    no second derivative.
    """
    torch.manual_seed(1)
    x = torch.randn(8, dtype=torch.float64).requires_grad_()
    v, c = torch.randn(2, 8, dtype=torch.float64)
    y = so.argmax(x, smoothing=so.Tsallis(alpha, eps))
    (u,) = torch.autograd.grad(y, x, v, create_graph=True)
    (second,) = torch.autograd.grad(u, x, c)
    with torch.no_grad():
        support = y > 0
        safe = torch.where(support, y, 1)
        d = torch.where(support, safe ** (2 - alpha), 0) / eps
        e = torch.where(support, (2 - alpha) * safe ** (3 - 2 * alpha), 0) / eps**2
        total = d.sum()
        v_bar, c_bar = (d * v).sum() / total, (d * c).sum() / total
        s = e * (c - c_bar) * (v - v_bar)
        close(u, d * (v - v_bar), 1e-12)
        close(second, s - d * s.sum() / total, 1e-11)
        assert int(support.sum()) > 1


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.5])
def test_gradient_in_alpha(alpha: float) -> None:
    """Correia, Niculae, Martins 2019, "Adaptively sparse transformers", proposition 1, and its limit at alpha = 1."""
    a = t(alpha)[0].requires_grad_()
    c = t(1, -2, 0.5, 3)
    y = so.entmax(Z, a)
    (ours,) = torch.autograd.grad(y, a, c)
    p = y.detach()
    support = p > 0
    log = torch.where(support, p, 1).log()
    if alpha == 1:
        expected = -(p * log**2 - p * (p * log**2).sum()) / 2
    else:
        skewed = torch.where(support, torch.where(support, p, 1) ** (2 - alpha), 0)
        skewed = skewed / skewed.sum()
        plogp = p * log
        expected = (p - skewed) / (alpha - 1) ** 2 - (plogp - skewed * plogp.sum()) / (alpha - 1)
    close(ours, (expected * c).sum(), 1e-11)


# --- against other libraries -----------------------------------------------------------------------------------------


def peer(name: str) -> ModuleType:
    """An optional package; whatever it warns of at import is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: an optional comparison")


def same_with_gradient(ours: Callable, theirs: Callable, *inputs: Tensor, atol: float = 1e-11) -> None:
    """Values, and gradients of a weighted sum in every input."""
    leaves = [[v.clone().requires_grad_() for v in inputs] for _ in range(2)]
    a, b = ours(*leaves[0]), theirs(*leaves[1])
    close(a, b, atol)
    torch.manual_seed(7)
    c = torch.randn_like(a)
    gradients = [torch.autograd.grad(y, x, c) for y, x in zip((a, b), leaves, strict=True)]
    for g, h in zip(*gradients, strict=True):
        close(g, h, atol * 10)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("kind", "family"), [("l2", so.Quadratic), ("kl", so.Entropy)])
def test_rank_as_torchsort(x: Tensor, kind: str, family: Callable, eps: float) -> None:
    torchsort = peer("torchsort")
    same_with_gradient(
        lambda x: so.rank(x, smoothing=family(eps)), lambda x: torchsort.soft_rank(x, kind, eps), x, atol=1e-10
    )


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0, 100.0])
def test_sort_as_torchsort(x: Tensor, eps: float) -> None:
    torchsort = peer("torchsort")
    same_with_gradient(lambda x: so.sort(x, smoothing=eps), lambda x: torchsort.soft_sort(x, "l2", eps), x)
    # its KL sort is the mirror image of ours: minus the descending sort of -x
    same_with_gradient(
        lambda x: -so.sort(-x, descending=True, smoothing=so.Entropy(eps)),
        lambda x: torchsort.soft_sort(x, "kl", eps),
        x,
        atol=1e-10,
    )


def test_choices_as_entmax(x: Tensor) -> None:
    entmax = peer("entmax")
    same_with_gradient(so.sparsemax, entmax.sparsemax, x)
    same_with_gradient(so.entmax, entmax.entmax15, x)
    same_with_gradient(lambda x: so.sparsemax(x, 0), lambda x: entmax.sparsemax(x, 0), x)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 2.5])
def test_entmax_as_entmax_bisect(x: Tensor, alpha: float) -> None:
    entmax = peer("entmax")
    alphas = torch.full((5, 1), alpha, dtype=torch.float64)
    same_with_gradient(so.entmax, lambda x, a: entmax.entmax_bisect(x, a, n_iter=70), x, alphas, atol=1e-10)


@pytest.mark.parametrize("k", [1.5, 2, 7.25])
def test_mask_as_budget_bisect(x: Tensor, k: float) -> None:
    entmax = peer("entmax")
    same_with_gradient(lambda x: so.topk_mask(x, k, smoothing=1.0), lambda x: entmax.budget_bisect(x, k, n_iter=70), x)


# its modes c1 and c2 are the p-norms 3/2 and 4/3: Tsallis(p, eps (p - 1))
MODES = {
    "smooth": so.Entropy,
    "c0": so.Quadratic,
    "c1": lambda e: so.Tsallis(3 / 2, e / 2),
    "c2": lambda e: so.Tsallis(4 / 3, e / 3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_argmax_as_softtorch(x: Tensor, mode: str, eps: float) -> None:
    softtorch = peer("softtorch")
    same_with_gradient(
        lambda x: so.argmax(x, 1, smoothing=MODES[mode](eps)),
        lambda x: softtorch.argmax(x, 1, softness=eps, mode=mode, standardize=False),
        x,
        atol=1e-8,
    )


@pytest.mark.parametrize("eps", [0.1, 3.0])
def test_orders_as_softtorch(x: Tensor, eps: float) -> None:
    """It scales the positions to [0, 1], and eps with them."""
    softtorch = peer("softtorch")
    options = {"method": "fast_soft_sort", "mode": "c0", "standardize": False}
    n = x.shape[-1]
    same_with_gradient(
        lambda x: so.rank(x, smoothing=eps / (n - 1)),
        lambda x: softtorch.rank(x, -1, softness=eps, descending=False, **options),
        x,
        atol=1e-9,
    )
    same_with_gradient(
        lambda x: so.sort(x, smoothing=eps * (n - 1)),
        lambda x: softtorch.sort(x, -1, softness=eps, return_indices=False, **options).values,
        x,
        atol=1e-9,
    )


# --- inputs on which other libraries fail ----------------------------------------------------------------------------

INF = torch.inf


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a weighted sum: the plain sum of ranks is constant."""
    x = x.detach().clone().requires_grad_()
    y = f(x)
    c = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(torch.where(y.isfinite(), y, 0), x, c)[0]


@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_long_float32_sort(eps: float) -> None:
    """Written as a difference, rho/eps minus its fit, float32 loses 0.5 to 4 here."""
    n = 100_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    ours = so.sort(x, smoothing=eps, descending=True)
    assert ours.dtype == torch.float32
    rho = np.arange(n, 0, -1)
    s = np.sort(x.double().numpy())[::-1]
    exact = rho / eps - isotonic_regression(rho / eps - s, increasing=False).x
    np.testing.assert_allclose(ours.double().numpy(), exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    g32, g64 = (gradient(lambda v: so.sort(v, smoothing=eps), v) for v in (x, x.double()))
    close(g32.double(), g64, 1e-5 * float(g64.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_half_precision(dtype: torch.dtype) -> None:
    """Sums over 3000 entries exceed what float16 holds, 65504, and positions above 2048 are not all float16 numbers."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for f in (
        lambda v: so.rank(v, smoothing=0.01),
        lambda v: so.rank(v, smoothing=so.Entropy(0.01)),
        lambda v: so.sort(v, smoothing=100.0),
        lambda v: so.topk_mask(v, 2500, smoothing=1.0),
        so.sparsemax,
        lambda v: so.amax(v, smoothing=1.0),
    ):
        ours, wide = f(x), f(x.double())
        assert ours.dtype == dtype
        assert torch.equal(ours, wide.to(dtype))
        assert ours.isfinite().all()


def test_row_of_minus_infinity() -> None:
    x = torch.full((2, 3), -INF, dtype=torch.float64)
    x[1] = t(0.5, 0, -1)
    for f in (so.sparsemax, so.entmax, lambda v: so.argmax(v, 1), lambda v: so.topk_mask(v, 1, smoothing=1.0)):
        y = f(x)
        assert torch.equal(y[0], torch.zeros(3, dtype=torch.float64))
        assert torch.equal(y[1], f(x[1:])[0])
        g = gradient(f, x)
        assert torch.equal(g[0], torch.zeros(3, dtype=torch.float64))
        assert g[1].isfinite().all()
    assert torch.equal(so.amax(x, 1, smoothing=so.Quadratic(1.0)), t(-INF, 0.5625))
    assert torch.equal(so.sort(x, smoothing=1.0)[0], x[0])
    for smoothing in (1.0, so.Entropy(1.0)):
        ranks = so.rank(x, smoothing=smoothing)
        assert ranks.isfinite().all()
        close(ranks.sum(-1), [6, 6])


def test_one_minus_infinity() -> None:
    x = t(0.5, -INF, 0.25, 0.0)
    rest = t(0.5, 0.25, 0.0)
    keep = [0, 2, 3]
    for smoothing in (so.Quadratic(1.0), so.Entropy(1.0), so.Tsallis(1.5, 1.0)):
        y = so.argmax(x, smoothing=smoothing)
        assert y[1] == 0
        close(y[keep], so.argmax(rest, smoothing=smoothing), 1e-15)
        close(so.amax(x, smoothing=smoothing), so.amax(rest, smoothing=smoothing), 1e-15)
        g = gradient(lambda v, s=smoothing: so.argmax(v, smoothing=s), x)
        assert g[1] == 0
        assert g.isfinite().all()
    y = so.sort(x, smoothing=1.0)
    assert y[0] == -INF
    close(y[1:], so.sort(rest, smoothing=1.0), 1e-15)
    ranks = so.rank(x, smoothing=1.0)
    assert ranks[1] == 1
    close(ranks[keep], 1 + so.rank(rest, smoothing=1.0), 1e-14)
    assert gradient(lambda v: so.rank(v, smoothing=1.0), x).isfinite().all()


def test_second_to_last_dimension_with_k_1() -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    for largest in (True, False):
        values = so.topk(x, 1, -2, largest, smoothing=0.5)
        assert values.shape == (3, 1, 4)
        assert torch.equal(values, so.topk(x.mT, 1, -1, largest, smoothing=0.5).mT)
        mask = so.topk_mask(x, 1, -2, largest, smoothing=0.5)
        assert torch.equal(mask, so.topk_mask(x.mT, 1, -1, largest, smoothing=0.5).mT)
        close(mask.sum(-2), torch.ones(3, 4))


@pytest.mark.parametrize(
    "smoothing", [None, 0.5, so.Entropy(0.5), so.Hard()], ids=["mixing", "quadratic", "entropy", "hard"]
)
def test_dimension_of_size_1(smoothing: Any) -> None:
    x = t([3.0], [-2.0])
    one = torch.ones_like(x)
    assert torch.equal(so.rank(x, smoothing=smoothing), one)
    close(so.sort(x, smoothing=smoothing), x, 1e-15)
    close(so.topk(x, 1, smoothing=smoothing), x, 1e-15)
    assert torch.equal(so.topk_mask(x, 1, smoothing=smoothing), one)
    assert torch.equal(so.argmax(x, 1, smoothing=smoothing), one)
    assert not gradient(lambda v: so.rank(v, smoothing=smoothing), x).any()


def test_entropy_of_large_input() -> None:
    """exp(1e6 x) overflows unless shifted."""
    x = 1e6 * t(0.3, -1.2, 0.9, 0.1)
    close(so.rank(x, smoothing=so.Entropy(1.0)), [3, 1, 4, 2])
    close(so.sort(x, smoothing=so.Entropy(1e-9)), x.sort().values, 1e-9)
    close(so.argmax(x, smoothing=so.Entropy(1.0)), [0, 0, 1, 0])
    close(so.amax(x, smoothing=so.Entropy(1.0)), x.max())
    close(so.topk_mask(x, 2, smoothing=so.Entropy(1.0)), [1, 0, 1, 0])
    # scaling x and eps together changes nothing
    close(so.rank(x, smoothing=so.Entropy(1e6)), so.rank(x / 1e6, smoothing=so.Entropy(1.0)))
    for f in (so.rank, so.argmax, so.amax, lambda v, smoothing: so.topk_mask(v, 2, smoothing=smoothing)):
        assert gradient(lambda v, f=f: f(v, smoothing=so.Entropy(1.0)), x).isfinite().all()
    assert gradient(lambda v: so.sort(v, smoothing=so.Entropy(1.0)), x).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 1e6])
@pytest.mark.parametrize("eps", [1e-30, 1e-3, 1.0, 1e6])
def test_constant_rows(value: float, eps: float) -> None:
    x = torch.full((2, 6), value, dtype=torch.float64)
    half = torch.full_like(x, 0.5)
    for smoothing in (so.Quadratic(eps), so.Entropy(eps)):
        close(so.rank(x, smoothing=smoothing), half * 7, 1e-14)
        close(so.topk_mask(x, 3, smoothing=smoothing), half, 1e-15)
        close(so.argmax(x, 1, smoothing=smoothing), half / 3, 1e-15)
        assert gradient(lambda v, s=smoothing: so.rank(v, smoothing=s), x).isfinite().all()
    assert torch.equal(so.sort(x, smoothing=eps), x)  # P(x) is one point
    assert gradient(lambda v: so.sort(v, smoothing=eps), x).isfinite().all()
    for f in (so.rank, so.sort, lambda v: so.topk_mask(v, 3)):  # eps from data that has no spread
        assert f(x).isfinite().all()
        assert gradient(f, x).isfinite().all()


def test_ties_at_the_smallest_strengths() -> None:
    """A decision taken through x/eps - rho would err by 1e13 here."""
    x = t(0.7, 0.1, 0.7, 0.3, 0.1, 0.7)
    for eps in (1e-30, 1e-100, 1e-300):
        close(so.rank(x, smoothing=eps), [5, 1.5, 5, 3, 1.5, 5], 1e-14)
        close(so.topk_mask(x, 2, smoothing=eps), [2 / 3, 0, 2 / 3, 0, 0, 2 / 3], 1e-15)
        close(so.sort(x, smoothing=eps), x.sort().values, 0)
    close(so.rank(x + 1e6, smoothing=1e-30), [5, 1.5, 5, 3, 1.5, 5], 1e-14)


def test_an_outlier_leaves_the_others_alone() -> None:
    """Standardizing the input, a default elsewhere, would squash them into one point."""
    torch.manual_seed(3)
    rest = torch.randn(50, dtype=torch.float64)
    for far in (1e6, 1e12, 1e300):
        x = torch.cat([rest, t(far)])
        for smoothing in (0.1, so.Entropy(0.1)):
            ours = so.rank(x, smoothing=smoothing)
            close(ours[-1], 51)
            close(ours[:-1], so.rank(rest, smoothing=smoothing), 1e-12)
            g = gradient(lambda v, s=smoothing: so.rank(v, smoothing=s), x)
            assert g[-1] == 0
            assert g.isfinite().all()
            assert g.abs().max() > 0.1
    # with eps from the data the number of inputs mixed stays, so the blocks of the others do too
    ours, alone = so.rank(torch.cat([rest, t(1e6)])), so.rank(rest)
    close(ours[-1], 51, 1e-3)
    assert float((ours[:-1] - alone).abs().max()) < 3


def test_entropy_gradient_over_a_wide_range() -> None:
    """Values spread over +-100 at eps 0.1: exp of an unshifted value overflows in the backward pass of torchsort."""
    torch.manual_seed(4)
    x = (torch.rand(4, 64, dtype=torch.float64) - 0.5) * 200
    g = gradient(lambda v: so.rank(v, smoothing=so.Entropy(0.1)), x)
    assert g.isfinite().all()
    # float32 input, the case in which it was seen
    g32 = gradient(lambda v: so.rank(v, smoothing=so.Entropy(0.1)), x.float())
    assert g32.isfinite().all()
    # no two of these are pooled, so that nothing moves
    spread = torch.linspace(-100, 100, 200, dtype=torch.float64)
    assert not gradient(lambda v: so.rank(v, smoothing=so.Entropy(0.1)), spread[::40]).any()
    # a single block: y_i = (sum rho) softmax(x/eps)_i exactly
    wide = t(100.0, 99.999)
    g = gradient(lambda v: so.rank(v, smoothing=so.Entropy(0.1)), wide)
    p = torch.softmax(wide / 0.1, -1)
    c = t(-1.0, 1.0)
    close(g, 3 * p * (c - (p * c).sum()) / 0.1)
