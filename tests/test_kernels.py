"""The kernels that find the discrete structure: compiled and plain against each other and against brute force."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

import smoothops as so
from smoothops import kernels
from smoothops.kernels import torch as plain
from smoothops.kernels.torch import LOGSUMEXP, MEAN

compiled = pytest.importorskip("smoothops.kernels.cpu", reason="numba cannot be imported")
RULES = pytest.mark.parametrize("rule", [MEAN, LOGSUMEXP], ids=["mean", "logsumexp"])

# --- pooling ---------------------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # theta, w, weights, group, eps


def descending(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.sort(-1, descending=True).values


def positions(rows: int, n: int) -> Tensor:
    return torch.arange(n, 0, -1, dtype=torch.float64).expand(rows, n)


def case(theta: Tensor, w: Tensor, eps: float, weights: Tensor | None = None, group: Tensor | None = None) -> Rows:
    return (
        theta.contiguous(),
        w.expand_as(theta).contiguous(),
        torch.ones_like(theta) if weights is None else weights,
        torch.ones_like(theta, dtype=torch.int8) if group is None else group.expand(theta.shape).to(torch.int8),
        torch.full((theta.shape[0], 1), eps, dtype=torch.float64),
    )


def outlier(n: int) -> Tensor:
    """One large value, then a slope: in a soft sort each round pools one more item with it."""
    w = -torch.arange(n, dtype=torch.float64).expand(2, n) / n
    return torch.cat([w[:, :1] + 1e6, w[:, 1:]], -1)


CASES: dict[str, Rows] = {
    **{f"rank, eps {eps:g}": case(descending(4, 60), positions(4, 60), eps) for eps in (1e-4, 1e-2, 0.1, 1, 100)},
    **{f"sort, eps {eps:g}": case(positions(4, 60), descending(4, 60), eps) for eps in (1e-2, 1, 10, 1e3, 1e6)},
    "two random rows": case(descending(5, 40), descending(5, 40, seed=1), 0.7),
    "tied": case((2 * descending(5, 50)).round() / 2, positions(5, 50), 0.05),
    "all tied": case(torch.ones(2, 30, dtype=torch.float64), positions(2, 30), 1e-30),
    "equal gaps, at the kink": case(positions(2, 33) / 4, positions(2, 33), 0.25),
    "equal gaps, pooled": case(positions(2, 33) / 4, positions(2, 33), 0.2501),
    "outlier": case(positions(2, 200), outlier(200), 1.0),
    "outlier last": case(positions(2, 200), -outlier(200).flip(-1), 1.0),
    "groups": case(descending(3, 48), positions(3, 48), 1.0, group=torch.arange(48) // 13),
    "groups of infinities": case(
        descending(3, 40), positions(3, 40), 1.0, group=torch.tensor([0, 1, 2, 3, 4, 7, 8, 15]).repeat_interleave(5)
    ),
    "one item": case(descending(3, 1), positions(3, 1), 1.0),
    "large offset": case(descending(2, 50) + 1e9, positions(2, 50), 0.1),
    "tiny scale": case(descending(2, 50) * 1e-200, positions(2, 50), 1e-201),
}
WEIGHTED = {  # MEAN only
    "weighted": case(descending(4, 50), positions(4, 50), 0.1, weights=descending(4, 50, seed=2).exp()),
    "weighted by 1e-6 to 1e6": case(
        descending(4, 50), positions(4, 50), 0.1, weights=10 ** (descending(4, 50, seed=3) * 2)
    ),
    "isotonic": case(descending(4, 50).flip(-1).roll(7, -1), torch.zeros(4, 50, dtype=torch.float64), 1.0),
}
ALL = [
    pytest.param(rows, rule, id=f"{name}-{'mean' if rule == MEAN else 'logsumexp'}")
    for name, rows in (CASES | WEIGHTED).items()
    for rule in (MEAN, LOGSUMEXP)
    if rule == MEAN or (name in CASES and "outlier" not in name)  # exp(1e6) is nobody's vertex
]


def level(rows: Rows, rule: int, r: int, a: int, b: int) -> float:
    """What pooling makes nonincreasing: the level of the block of items a to b of row r."""
    theta, w, weights, _, eps = rows
    e, part = float(eps[r]), slice(a, b + 1)
    if rule == MEAN:
        m = weights[r, part]
        shifted = (theta[r, part] - theta[r, a]) - e * (w[r, part] - w[r, a])
        return float(theta[r, a] - e * w[r, a] + (m * shifted).sum() / m.sum())
    return float(torch.logsumexp(theta[r, part] / e, 0) - torch.logsumexp(w[r, part], 0))


def minimax(rows: Rows, rule: int, r: int) -> list[float]:
    """The isotonic fit of a row, group by group: min over a <= i of max over b >= i of the level of a to b."""
    group = rows[3][r].tolist()
    n = len(group)
    fit = []
    best = {}
    for a in range(n):
        inside = [b for b in range(a, n) if group[a : b + 1] == [group[a]] * (b - a + 1)]
        levels = [level(rows, rule, r, a, b) for b in inside]
        for i in inside:
            best[a, i] = max(levels[i - a :])
    for i in range(n):
        fit.append(min(v for (a, j), v in best.items() if j == i))
    return fit


@pytest.mark.parametrize(("rows", "rule"), ALL)
def test_compiled_and_plain_agree(rows: Rows, rule: int) -> None:
    assert torch.equal(compiled.pool(*rows, rule), plain.pool(*rows, rule))


@pytest.mark.parametrize(("rows", "rule"), ALL)
@pytest.mark.parametrize("module", [compiled, plain], ids=["compiled", "plain"])
def test_blocks_are_the_isotonic_fit(module: object, rows: Rows, rule: int) -> None:
    start = module.pool(*rows, rule)  # type: ignore[attr-defined]
    r, n = 0, rows[0].shape[1]
    first = start[r].tolist()
    assert all(s <= i and first[s] == s for i, s in enumerate(first))
    group = rows[3][r]
    assert torch.equal(group, group[start[r]]), "items of two groups were pooled"
    if n > 60:
        return  # the brute force is cubic
    ends = {s: i for i, s in enumerate(first)}
    ours = [level(rows, rule, r, s, ends[s]) for s in first]
    best = minimax(rows, rule, r)
    scale = max(abs(v) for v in best) or 1.0
    assert max(abs(a - b) for a, b in zip(ours, best, strict=True)) <= 1e-13 * scale


@pytest.mark.parametrize(("rows", "rule"), ALL)
def test_a_block_holds_together(rows: Rows, rule: int) -> None:
    """Strictly pooled: each block would violate the order if it were cut anywhere, so ``gap == eps`` is not pooled."""
    start = compiled.pool(*rows, rule)[0].tolist()
    ends = {s: i for i, s in enumerate(start)}
    slack = 1e-12 * max(abs(level(rows, rule, 0, i, i)) for i in range(len(start)))
    for s, e in ends.items():
        for cut in range(s, e):
            assert level(rows, rule, 0, s, cut) <= level(rows, rule, 0, cut + 1, e) + slack


@pytest.mark.parametrize("name", [*CASES, *WEIGHTED])
def test_mean_pooling_against_scipy(name: str) -> None:
    theta, w, weights, _, eps = rows = (CASES | WEIGHTED)[name]
    if "groups" in name or name == "large offset":
        pytest.skip("scipy knows no groups, and loses eleven digits to the offset")
    start = compiled.pool(*rows, MEAN)
    for r in range(theta.shape[0]):
        target = theta[r] - eps[r] * w[r]
        expected = isotonic_regression(target.numpy(), weights=weights[r].numpy(), increasing=False).x
        m = torch.zeros_like(target).index_add(0, start[r], weights[r])
        total = torch.zeros_like(target).index_add(0, start[r], weights[r] * target)
        np.testing.assert_allclose((total / m)[start[r]], expected, rtol=0, atol=1e-12 * float(target.abs().max()))


def test_gap_equal_to_eps_is_not_pooled() -> None:
    for module in (compiled, plain):
        separate = module.pool(*CASES["equal gaps, at the kink"], MEAN)
        assert torch.equal(separate, torch.arange(33).expand(2, 33))
        assert not module.pool(*CASES["equal gaps, pooled"], MEAN).any()


def test_one_outlier_reaches_the_sequential_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    original = plain._pool_sequentially

    def counted(state: plain.State, rule: int) -> plain.State:
        left.append(len(state[0]))
        return original(state, rule)

    monkeypatch.setattr(plain, "_pool_sequentially", counted)
    rows = CASES["outlier"]
    start = plain.pool(*rows, MEAN)
    assert not start.any()
    assert len(left) == 1
    assert 2 * (200 - plain.ROUNDS) <= left[0] <= 2 * 200
    # logsumexp needs a milder outlier
    w = descending(2, 400)
    w[:, 0] = 100
    mild = case(positions(2, 400) / 400, w, 0.001)
    assert torch.equal(plain.pool(*mild, LOGSUMEXP), compiled.pool(*mild, LOGSUMEXP))


@RULES
def test_rounds_and_fallback_give_the_same_blocks(rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = CASES["rank, eps 0.1"]
    expected = plain.pool(*rows, rule)
    for rounds in (1, 2, 3, 5):
        monkeypatch.setattr(plain, "ROUNDS", rounds)
        assert torch.equal(plain.pool(*rows, rule), expected)


@RULES
@pytest.mark.parametrize("module", [compiled, plain], ids=["compiled", "plain"])
def test_rows_do_not_see_each_other(module: object, rule: int) -> None:
    theta, w, weights, group, eps = CASES["rank, eps 0.1"]
    together = module.pool(theta, w, weights, group, eps, rule)  # type: ignore[attr-defined]
    for r in range(4):
        part = slice(r, r + 1)
        alone = module.pool(theta[part], w[part], weights[part], group[part], eps[part], rule)  # type: ignore[attr-defined]
        assert torch.equal(alone, together[part])


@RULES
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_pool(shape: tuple[int, int], rule: int) -> None:
    empty = torch.zeros(shape, dtype=torch.float64)
    for module in (compiled, plain):
        assert module.pool(*case(empty, empty, 1.0), rule).shape == shape


@RULES
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 1e3])
def test_long_rows_agree(rule: int, eps: float) -> None:
    rows = case(descending(1, 20_000), positions(1, 20_000), eps)
    if rule == LOGSUMEXP:
        rows = (rows[0], rows[1].log(), *rows[2:])
    assert torch.equal(compiled.pool(*rows, rule), plain.pool(*rows, rule))


# --- the operators on top of either kernel ---------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda x: so.rank(x, smoothing=0.1),
    "rank, mixing": lambda x: so.rank(x),
    "rank, entropy": lambda x: so.rank(x, smoothing=so.Entropy(0.1)),
    "rank, weights": lambda x: so.rank(x, weights=torch.arange(1.0, 41.0), smoothing=0.5),
    "rank, where": lambda x: so.rank(x, where=x.detach() > -1, smoothing=0.1),
    "sort": lambda x: so.sort(x, smoothing=20.0),
    "sort, mixing": lambda x: so.sort(x),
    "sort, entropy": lambda x: so.sort(x, smoothing=so.Entropy(20.0)),
    "topk": lambda x: so.topk(x, 7, smoothing=20.0),
    "isotonic": lambda x: so.isotonic(x),
    "sparsemax": lambda x: so.sparsemax(x),
    "entmax": lambda x: so.entmax(x),
    "entmax, alpha 1.2": lambda x: so.entmax(x, 1.2),
    "entmax, alpha 3": lambda x: so.entmax(x, 3.0),
    "amax": lambda x: so.amax(x, 1, smoothing=so.Tsallis(1.5, 0.3)),
    "mask": lambda x: so.topk_mask(x, 5.5, smoothing=0.3),
    "mask, mixing": lambda x: so.topk_mask(x, 5),
    "mask, entropy": lambda x: so.topk_mask(x, 5, smoothing=so.Entropy(0.3)),
    "mask, tsallis": lambda x: so.topk_mask(x, 5, smoothing=so.Tsallis(1.5, 0.3)),
    "mask, binary entropy": lambda x: so.topk_mask(x, 35, smoothing=so.BinaryEntropy(0.3)),
    "mask, laplace": lambda x: so.topk_mask(x, 5, smoothing=so.Laplace(0.3)),
    "mask, where": lambda x: so.topk_mask(x, 5, where=x.detach() > -1, smoothing=so.Laplace(0.3)),
    "mask, k of each row": lambda x: so.topk_mask(x, torch.arange(1.0, 7.0).unsqueeze(1), smoothing=0.3),
}


# tau is known to the rounding of the sum, k, so that a value near 1 moves by some ulps where k is 35
ULPS = {"mask, binary entropy": 16}


def ulps(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of float64 rounding at the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / (torch.finfo(torch.float64).eps * b.abs().max()))


@pytest.fixture(params=["compiled", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths in turn."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "_compiled", lambda name: None)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_numba_the_numbers_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS[name]
    x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    assert kernels._compiled("cpu") is not None
    fast = operator(x)
    c = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    (fast_gradient,) = torch.autograd.grad(fast, x, c)
    monkeypatch.setattr(kernels, "_compiled", lambda name: None)
    slow = operator(x)
    (slow_gradient,) = torch.autograd.grad(slow, x, c)
    assert ulps(fast, slow) <= ULPS.get(name, 4)
    assert ulps(fast_gradient, slow_gradient) <= 16


# --- the threshold ---------------------------------------------------------------------------------------------------

Wide = np.ndarray  # of long double
HAS_LONG_DOUBLE = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def tsallis(alpha: float) -> Callable[[Wide], Wide]:
    return lambda z: np.maximum((alpha - 1) * z, 0) ** (1 / np.longdouble(alpha - 1))


def logistic(z: Wide) -> Wide:
    t = np.exp(-np.abs(z))
    return np.where(z < 0, t, 1) / (1 + t)


def laplace(z: Wide) -> Wide:
    t = np.exp(-np.abs(z)) / 2
    return np.where(z < 0, t, 1 - t)


# phi as tabulated in the literature, independent of the library's own
UNBOUNDED = {
    "Quadratic": (so.Quadratic, lambda z: np.maximum(z, 0)),
    "Entropy": (so.Entropy, np.exp),
    "Tsallis 1.5": (lambda e: so.Tsallis(1.5, e), tsallis(1.5)),
    "Tsallis 1.1": (lambda e: so.Tsallis(1.1, e), tsallis(1.1)),
    "Tsallis 4": (lambda e: so.Tsallis(4.0, e), tsallis(4.0)),
}
BOUNDED = {"BinaryEntropy": (so.BinaryEntropy, logistic), "Laplace": (so.Laplace, laplace)}


def by_bisection(x: np.ndarray, eps: float, k: float, phi: Callable[[Wide], Wide], reference: float) -> np.ndarray:
    """phi((x - tau)/eps) with sum k, in long double. ``reference`` is an entry of x near the threshold."""
    u = (x.astype(np.longdouble) - np.longdouble(reference)) / np.longdouble(eps)
    reach = np.longdouble(100) + 2 * np.abs(u).max()
    low, high = -reach, reach
    with np.errstate(over="ignore"):
        for _ in range(400):
            tau = (low + high) / 2
            if phi(u - tau).sum() > np.longdouble(k):
                low = tau
            else:
                high = tau
        return phi(u - (low + high) / 2)


def same(ours: Tensor, expected: Wide, atol: float) -> None:
    np.testing.assert_allclose(ours.numpy(), expected.astype(np.float64), rtol=0, atol=atol)


STRENGTHS = [1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e8]
N = 24


def scores(seed: int) -> Tensor:
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("eps", STRENGTHS)
@pytest.mark.parametrize("k", [1e-6, 0.3, 1, 2.5, N // 2, N - 1, N - 1e-3])
@pytest.mark.parametrize("name", [*UNBOUNDED, *BOUNDED])
def test_capped_threshold_against_bisection(path: None, name: str, k: float, eps: float) -> None:
    make, phi = (UNBOUNDED | BOUNDED)[name]
    x = scores(5)
    ours = so.topk_mask(x, k, smoothing=make(eps))
    order = x.sort(descending=True).values
    bounded = phi if name in BOUNDED else lambda z: np.minimum(phi(z), 1)
    expected = by_bisection(x.numpy(), eps, k, bounded, float(order[min(math.floor(k), N - 1)]))
    same(ours, expected, atol=2e-14 if k > 0.1 else 1e-15)
    assert abs(float(ours.sum()) - k) <= (1e-14 * k if k > 0.1 else 1e-15)


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("eps", STRENGTHS)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_simplex_threshold_against_bisection(path: None, name: str, eps: float) -> None:
    make, phi = UNBOUNDED[name]
    for seed in range(3):
        x = scores(seed)
        expected = by_bisection(x.numpy(), eps, 1, phi, float(x.max()))
        ours = so.argmax(x, smoothing=make(eps))
        same(ours, expected, atol=1e-14)


@pytest.mark.skipif(not HAS_LONG_DOUBLE, reason="long double is no wider than double here")
@pytest.mark.parametrize("name", [*UNBOUNDED, *BOUNDED])
@pytest.mark.parametrize("shift", [0.0, 1e6, -1e6])
def test_threshold_of_clustered_scores(path: None, name: str, shift: float) -> None:
    """Ties, a far outlier on each side, and a common offset."""
    make, phi = (UNBOUNDED | BOUNDED)[name]
    x = torch.tensor([0.0, 0, 0, 1, 1, 0.5, 1e5, -1e5, 0.25, 0.25], dtype=torch.float64) + shift
    bounded = phi if name in BOUNDED else lambda z: np.minimum(phi(z), 1)
    expected = by_bisection(x.numpy(), 0.3, 4, bounded, shift + 0.25)
    ours = so.topk_mask(x, 4, smoothing=make(0.3))
    same(ours, expected, atol=1e-15)


# --- threads, processes, cache ---------------------------------------------------------------------------------------


def work(seed: int) -> Tensor:
    x = torch.randn(8, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = so.rank(x, smoothing=0.1) * so.sort(x) + so.topk_mask(x, 3)
    return torch.autograd.grad((y * torch.arange(300.0)).sum(), x)[0]


def test_four_threads_at_once() -> None:
    expected = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(work, range(16)), expected, strict=True):
            assert torch.equal(ours, alone)


def run(code: str, *, folder: Path | None = None, **environment: str) -> str:
    """The output of a new process in which smoothops is found in ``folder``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    folder = folder or Path(so.__file__).parents[1]
    env |= {"PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_use_from_four_threads() -> None:
    """Compilation, too, may start in several threads at once."""
    out = run(
        "import torch, smoothops as so\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "x = torch.randn(4, 9, 50)\n"
        "with ThreadPoolExecutor(4) as pool: ys = list(pool.map(so.rank, x)) + list(pool.map(so.sparsemax, x))\n"
        "print(all(map(torch.equal, ys, [so.rank(v) for v in x] + [so.sparsemax(v) for v in x])))"
    )
    assert out == "True\n"


def test_backward_in_another_thread() -> None:
    x = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
    c = torch.tensor([1.0, -2.0, 0.5])
    expected = torch.autograd.grad(so.rank(x, smoothing=1.0), x, c)[0]
    y = so.rank(x, smoothing=1.0)
    thread = threading.Thread(target=y.backward, args=(c,))
    thread.start()
    thread.join()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


class Ranked(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.arange(20.0).mul(index + 1.7).sin().requires_grad_()
        return torch.autograd.grad(so.rank(x, smoothing=0.1), x, torch.arange(20.0))[0]


# Python 3.12 warns of any fork in a process with threads; that fork is what is tested here
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_data_loader_workers_after_fork() -> None:
    data = Ranked()
    expected = torch.stack([data[i] for i in range(len(data))])  # compiles in the parent
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=120)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)


def test_without_a_writable_cache(tmp_path: Path) -> None:
    """Neither beside the sources nor in the user's cache folder can anything be written, not even by root."""
    package = tmp_path / "smoothops"
    shutil.copytree(Path(so.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, *(p for p in package.rglob("*") if p.is_dir())):
        (folder / "__pycache__").touch()  # a file where a folder would have to be
    blocked = str(package / "__pycache__" / "none")
    code = (
        "import torch, smoothops as so\n"
        "from smoothops.kernels import cpu, cpu_threshold\n"
        "print(so.__file__, *(f._cache.__class__.__name__ for f in (cpu._pool_mean, cpu_threshold._solve)))\n"
        "print(so.rank(torch.tensor([5.0, 1.0, 2.0]), smoothing=2.0).tolist())\n"
        "print(so.sparsemax(torch.tensor([0.5, 0.0, -1.0])).tolist())"
    )
    out = run(code, folder=tmp_path, XDG_CACHE_HOME=blocked, HOME=blocked, LOCALAPPDATA=blocked)
    assert out.splitlines() == [
        f"{package / '__init__.py'} NullCache NullCache",
        "[3.0, 1.25, 1.75]",
        "[0.75, 0.25, 0.0]",
    ]
