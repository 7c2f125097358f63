"""docs/migrating.md: each row of its tables is evaluated, old call against new call, in value and gradient.

The packages compared with are optional: torchsort, entmax, sparsemax, softtorch. fast-soft-sort is stood in for by
torchsort, a port of it with one direction, and sparsemax, where it is missing, by the class of that name in entmax.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smoothops as so

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
N = 40


@dataclass(frozen=True)
class Row:
    old: str
    new: str
    leaves: tuple[str, ...] = ("x",)
    atol: float = 1e-12  # of values; ten times that for gradients, 0 for torch.equal


ROWS: dict[str, list[Row]] = {
    "torchsort": [
        Row('torchsort.soft_rank(x, "l2", 0.5)', "so.rank(x, smoothing=0.5)"),
        Row('torchsort.soft_rank(x, "kl", 0.5)', "so.rank(x, smoothing=so.Entropy(0.5))"),
        Row('torchsort.soft_rank(-x, "l2", 0.5)', "so.rank(x, descending=True, smoothing=0.5)"),
        Row('torchsort.soft_sort(x, "l2", 0.5)', "so.sort(x, smoothing=0.5)"),
        Row('-torchsort.soft_sort(-x, "l2", 0.5)', "so.sort(x, descending=True, smoothing=0.5)"),
        Row('torchsort.soft_sort(x, "kl", 0.5)', "-so.sort(-x, descending=True, smoothing=so.Entropy(0.5))"),
        Row('-torchsort.soft_sort(-x, "kl", 0.5)', "so.sort(x, descending=True, smoothing=so.Entropy(0.5))"),
        Row("torchsort.soft_rank(x)", "so.rank(x, smoothing=1.0)"),
        Row("torchsort.soft_sort(x)", "so.sort(x, smoothing=1.0)"),
    ],
    "fast-soft-sort": [
        Row('soft_rank(x, "ASCENDING", 0.5, "l2")', "so.rank(x, smoothing=0.5)"),
        Row('soft_rank(x, "DESCENDING", 0.5, "l2")', "so.rank(x, descending=True, smoothing=0.5)"),
        Row('soft_rank(x, "ASCENDING", 0.5, "kl")', "so.rank(x, smoothing=so.Entropy(0.5))"),
        Row('soft_rank(x, "DESCENDING", 0.5, "kl")', "so.rank(x, descending=True, smoothing=so.Entropy(0.5))"),
        Row('soft_sort(x, "ASCENDING", 0.5, "l2")', "so.sort(x, smoothing=0.5)"),
        Row('soft_sort(x, "DESCENDING", 0.5, "l2")', "so.sort(x, descending=True, smoothing=0.5)"),
        Row('soft_sort(x, "ASCENDING", 0.5, "kl")', "-so.sort(-x, descending=True, smoothing=so.Entropy(0.5))"),
        Row('soft_sort(x, "DESCENDING", 0.5, "kl")', "so.sort(x, descending=True, smoothing=so.Entropy(0.5))"),
    ],
    "entmax": [
        Row("entmax.sparsemax(x)", "so.sparsemax(x)"),
        Row("entmax.sparsemax(x, 0)", "so.sparsemax(x, 0)"),
        Row("entmax.entmax15(x)", "so.entmax(x)"),
        Row("entmax.entmax15(x, dim=0)", "so.entmax(x, dim=0)"),
        Row("entmax.sparsemax_bisect(x, n_iter=70)", "so.sparsemax(x)"),
        Row("entmax.entmax_bisect(x, 1.3, n_iter=70)", "so.entmax(x, 1.3)"),
        Row("entmax.entmax_bisect(x, alpha, n_iter=70)", "so.entmax(x, alpha)", leaves=("x", "alpha")),
        Row("entmax.budget_bisect(x, 3, n_iter=70)", "so.topk_mask(x, 3, smoothing=1.0)"),
        Row("entmax.sparsemax_loss(x, labels)", "so.amax(x, -1, smoothing=so.Quadratic(1.0)) - chosen(x, labels)"),
        Row("entmax.entmax15_loss(x, labels)", "so.amax(x, -1, smoothing=so.Tsallis(1.5, 1.0)) - chosen(x, labels)"),
        Row(
            "entmax.entmax_bisect_loss(x, labels, 1.3, 70)",
            "so.amax(x, -1, smoothing=so.Tsallis(1.3, 1.0)) - chosen(x, labels)",
        ),
        Row("entmax.Entmax15(dim=1)(x)", "so.entmax(x, dim=1)"),
    ],
    "sparsemax": [
        Row("sparsemax.Sparsemax(dim=-1)(x)", "so.sparsemax(x)"),
    ],
    "softtorch": [
        Row("softtorch.argmax(x, -1)", "so.argmax(squashed(x), -1, smoothing=0.1)"),
        Row("softtorch.argmax(x, -1, standardize=False)", "so.argmax(x, -1, smoothing=0.1)"),
        Row("softtorch.argmax(x, 0, standardize=False)", "so.argmax(x, 0, smoothing=0.1).movedim(0, -1)"),
        Row("softtorch.argmin(x, -1, standardize=False)", "so.argmin(x, -1, smoothing=0.1)"),
        Row(
            'softtorch.argmax(x, -1, softness=0.5, mode="c0", standardize=False)',
            "so.argmax(x, -1, smoothing=so.Quadratic(0.5))",
        ),
        Row(
            'softtorch.argmax(x, -1, softness=0.5, mode="c1", standardize=False)',
            "so.argmax(x, -1, smoothing=so.Tsallis(3 / 2, 0.5 / 2))",
        ),
        Row(
            'softtorch.argmax(x, -1, softness=0.5, mode="c2", standardize=False)',
            "so.argmax(x, -1, smoothing=so.Tsallis(4 / 3, 0.5 / 3))",
        ),
        Row("softtorch.max(x, -1, standardize=False).values", "(x * so.argmax(x, -1, smoothing=0.1)).sum(-1)"),
        Row("softtorch.max(x, -1, standardize=False).indices", "so.max(x, -1, smoothing=0.1).indices"),
        Row("softtorch.argsort(x)", "neuralsort(squashed(x), 0.1)"),
        Row("softtorch.sort(x).values", "(neuralsort(squashed(x), 0.1) @ x.unsqueeze(-1)).squeeze(-1)"),
        Row(
            'softtorch.argsort(x, method="softsort", standardize=False)',
            "so.argmax(-(so.sort(x, smoothing=0).unsqueeze(-1) - x.unsqueeze(-2)).abs(), -1, smoothing=0.1)",
        ),
        Row(
            'softtorch.sort(x, method="fast_soft_sort", mode="c0", standardize=False).values',
            "so.sort(x, smoothing=0.1 * (n - 1))",
        ),
        Row(
            'softtorch.sort(x, descending=True, method="fast_soft_sort", mode="c0", standardize=False).values',
            "so.sort(x, descending=True, smoothing=0.1 * (n - 1))",
        ),
        Row(
            'softtorch.sort(x, method="fast_soft_sort", standardize=False).values',
            "so.sort(x, smoothing=so.Entropy(0.1 * (n - 1)))",
        ),
        Row(
            'softtorch.rank(x, -1, descending=False, method="fast_soft_sort", mode="c0", standardize=False)',
            "so.rank(x, smoothing=0.1 / (n - 1))",
        ),
        Row(
            'softtorch.rank(x, -1, method="fast_soft_sort", mode="c0", standardize=False)',
            "so.rank(x, descending=True, smoothing=0.1 / (n - 1))",
        ),
        Row(
            'softtorch.rank(x, -1, descending=False, method="fast_soft_sort", standardize=False)',
            "(n - 1) * so.Permutahedron(positions.exp()).argmax(x, so.Entropy(0.1)).log()",
        ),
        Row(
            'softtorch.topk(x, 3, method="fast_soft_sort", mode="c0", standardize=False).values',
            "so.topk(x, 3, smoothing=0.1 * (n - 1))",
        ),
        Row(
            'softtorch.quantile(x, 0.3, -1, method="fast_soft_sort", mode="c0", standardize=False)',
            "so.quantile(x, 0.3, -1, smoothing=0.1 * (n - 1))",
        ),
        Row(
            'softtorch.median(x, method="fast_soft_sort", mode="c0", standardize=False)',
            "so.median(x, smoothing=0.1 * (x.numel() - 1))",
        ),
        Row(
            'softtorch.rank_st(x, -1, descending=False, method="fast_soft_sort", mode="c0", standardize=False)',
            "so.rank(x, smoothing=so.StraightThrough(so.Quadratic(0.1 / (n - 1))))",
        ),
        Row("softtorch.heaviside(x)", "so.heaviside(x, smoothing=0.1)"),
        Row('softtorch.heaviside(x, mode="c0")', "so.heaviside(x, smoothing=so.Quadratic(0.5))"),
        Row("softtorch.sign(x)", "so.sign(x, smoothing=0.1)"),
        Row("softtorch.abs(x)", "x * so.sign(x, smoothing=0.1)"),
        Row("softtorch.relu(x)", "so.relu(x, smoothing=0.1)", atol=3e-10),
        Row('softtorch.relu(x, mode="c0")', "so.relu(x, smoothing=so.Quadratic(0.5))"),
        Row("softtorch.relu(x, gated=True)", "x * so.heaviside(x, smoothing=0.1)"),
        Row("softtorch.clamp(x, -1.0, 1.0)", "so.clamp(x, -1.0, 1.0, smoothing=0.1)", atol=5e-10),
        Row("softtorch.round(x)", "so.round(x, smoothing=0.1)"),
        Row("softtorch.greater(x, b)", "so.heaviside(x - b, smoothing=0.1)", leaves=("x", "b"), atol=5e-10),
    ],
    "torch": [
        Row("torch.sort(x).values", "so.sort(x, smoothing=s)", atol=0.0),
        Row("torch.sort(x, 0, descending=True).values", "so.sort(x, 0, descending=True, smoothing=s)", atol=0.0),
        Row("torch.msort(x)", "so.sort(x, 0, smoothing=s)", atol=0.0),
        Row("F.one_hot(torch.argsort(x, stable=True), n).to(x.dtype)", "so.argsort(x, smoothing=s)", atol=0.0),
        Row("x.argsort().argsort().to(x.dtype) + 1", "so.rank(x, smoothing=s)", atol=0.0),
        Row("torch.topk(x, 3).values", "so.topk(x, 3, smoothing=s)", atol=0.0),
        Row("torch.topk(x, 3, largest=False).values", "so.topk(x, 3, largest=False, smoothing=s)", atol=0.0),
        Row(
            "torch.zeros_like(x).scatter(-1, torch.topk(x, 3).indices, 1)",
            "so.topk_mask(x, 3, smoothing=s)",
            atol=0.0,
        ),
        Row("torch.kthvalue(x, 4).values", "so.kthvalue(x, 4, smoothing=s)", atol=0.0),
        Row("torch.median(x)", "so.median(x, smoothing=s)", atol=0.0),
        Row("torch.median(x, 1).values", "so.median(x, 1, smoothing=s)", atol=0.0),
        Row("torch.quantile(x, 0.3, 1)", "so.quantile(x, 0.3, 1, smoothing=s)", atol=0.0),
        Row(
            "torch.quantile(x, levels, 1, keepdim=True)",
            "so.quantile(x, levels, 1, keepdim=True, smoothing=s)",
            atol=0.0,
        ),
        Row("F.one_hot(torch.argmax(x, 1), n).to(x.dtype)", "so.argmax(x, 1, smoothing=s)", atol=0.0),
        Row("F.one_hot(torch.argmin(x, 1), n).to(x.dtype)", "so.argmin(x, 1, smoothing=s)", atol=0.0),
        Row("torch.max(x)", "so.max(x, smoothing=s)", atol=0.0),
        Row("torch.max(x, 1).values", "so.max(x, 1, smoothing=s).values", atol=0.0),
        Row("F.one_hot(torch.max(x, 1).indices, n).to(x.dtype)", "so.max(x, 1, smoothing=s).indices", atol=0.0),
        Row("torch.amax(x, 1, keepdim=True)", "so.amax(x, 1, keepdim=True, smoothing=s)", atol=0.0),
        Row("torch.amin(x, (0, 1))", "so.amin(x, (0, 1), smoothing=s)", atol=0.0),
        Row("torch.min(x, 0).values", "so.min(x, 0, smoothing=s).values", atol=0.0),
        Row("torch.max(x, b)", "so.max(x, b, smoothing=s)", atol=0.0),
        Row("torch.maximum(x, b)", "so.maximum(x, b, smoothing=s)", atol=0.0),
        Row("torch.minimum(x, b)", "so.minimum(x, b, smoothing=s)", atol=0.0),
        Row("torch.relu(x)", "so.relu(x, smoothing=s)", atol=0.0),
        Row("torch.abs(x)", "so.abs(x, smoothing=s)", atol=0.0),
        Row("torch.sign(x)", "so.sign(x, smoothing=s)", atol=0.0),
        Row("torch.heaviside(x, half)", "so.heaviside(x, half, smoothing=s)", atol=0.0),
        Row("(x > b).to(x.dtype)", "so.heaviside(x - b, 0.0, smoothing=s)", atol=0.0),
        Row("torch.clamp(x, -1.0, 1.0)", "so.clamp(x, -1.0, 1.0, smoothing=s)", atol=0.0),
        Row("torch.round(x)", "so.round(x, smoothing=s)", atol=0.0),
        Row("torch.round(x, decimals=1)", "so.round(x, decimals=1, smoothing=s)", atol=0.0),
        Row("torch.floor(x)", "so.floor(x, smoothing=s)", atol=0.0),
        Row("torch.ceil(x)", "so.ceil(x, smoothing=s)", atol=0.0),
    ],
    "soft": [
        Row("torch.softmax(x / 0.5, -1)", "so.argmax(x, -1, smoothing=0.5)"),
        Row("F.softmin(x / 0.5, -1)", "so.argmin(x, -1, smoothing=0.5)"),
        Row("0.5 * torch.logsumexp(x / 0.5, -1)", "so.amax(x, -1, smoothing=0.5)"),
        Row("torch.logaddexp(x, b)", "so.maximum(x, b, smoothing=1.0)", leaves=("x", "b")),
        Row("torch.sigmoid(x / 0.5)", "so.heaviside(x, smoothing=0.5)"),
        Row("torch.tanh(x)", "so.sign(x, smoothing=0.5)"),
        Row("F.softplus(x)", "so.relu(x, smoothing=1.0)"),
        Row("F.logsigmoid(x)", "-so.relu(-x, smoothing=1.0)"),
        Row("F.silu(x)", "x * so.heaviside(x, smoothing=1.0)"),
        Row("F.hardsigmoid(x)", "so.heaviside(x, smoothing=so.Quadratic(3.0))", atol=1e-08),
        Row("F.hardtanh(x)", "so.clamp(x, -1.0, 1.0, smoothing=0)"),
    ],
}


def peer(name: str) -> ModuleType:
    """An optional package; whatever it warns of at import is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: an optional comparison")


def fast_soft_sort() -> dict[str, Callable]:
    """soft_rank and soft_sort as in its numpy operators, whose direction "ASCENDING" is what torchsort kept."""
    torchsort = peer("torchsort")

    def soft_rank(x: Tensor, direction: str, strength: float, kind: str) -> Tensor:
        return torchsort.soft_rank(x if direction == "ASCENDING" else -x, kind, strength)

    def soft_sort(x: Tensor, direction: str, strength: float, kind: str) -> Tensor:
        ascending = direction == "ASCENDING"
        return torchsort.soft_sort(x, kind, strength) if ascending else -torchsort.soft_sort(-x, kind, strength)

    return {"soft_rank": soft_rank, "soft_sort": soft_sort}


def sparsemax() -> dict[str, Any]:
    try:
        return {"sparsemax": peer("sparsemax")}
    except pytest.skip.Exception:
        return {"sparsemax": SimpleNamespace(Sparsemax=peer("entmax").Sparsemax)}


PEERS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchsort": lambda: {"torchsort": peer("torchsort")},
    "fast-soft-sort": fast_soft_sort,
    "entmax": lambda: {"entmax": peer("entmax")},
    "sparsemax": sparsemax,
    "softtorch": lambda: {"softtorch": peer("softtorch")},
    "torch": dict,
    "soft": dict,
}


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_the_page() -> dict[str, Any]:
    """The names that the page itself defines."""
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(code, names)
    return names


def names_of(section: str) -> dict[str, Any]:
    names = on_the_page() | PEERS[section]()
    return names | {
        "x": draw(5, N),
        "b": draw(5, N, seed=12),
        "alpha": torch.linspace(1.1, 2.5, 5, dtype=torch.float64).unsqueeze(-1),
        "labels": torch.tensor([0, 7, 39, 12, 3]),
        "levels": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        "half": torch.tensor(0.5, dtype=torch.float64),
        "positions": torch.arange(1, N + 1, dtype=torch.float64) / (N - 1),
        "n": N,
    }


def answer(expression: str, names: dict[str, Any], leaves: tuple[str, ...]) -> list[Tensor]:
    """The value, then the gradients of a weighted sum; zeros where it has none."""
    inputs = {name: names[name].clone().requires_grad_() for name in leaves}
    y = eval(expression, names | inputs)
    if not y.requires_grad:
        return [y, *(torch.zeros_like(v) for v in inputs.values())]
    c = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    if expression.startswith("torch.heaviside"):  # which has no derivative in torch
        return [y.detach(), *(torch.zeros_like(v) for v in inputs.values())]
    return [y.detach(), *torch.autograd.grad(y, tuple(inputs.values()), c)]


# --- the page and the rows are the same ------------------------------------------------------------------------------


def rows_of(*sections: str) -> list[Any]:
    return [pytest.param(s, row, id=f"{s}: {row.old}") for s in sections for row in ROWS[s]]


def test_the_page_has_these_rows_and_no_others() -> None:
    shown = re.findall(r"^\| `(.*?)` \| `(.*?)` \|", PAGE.read_text(), re.M)
    assert shown == [(row.old, row.new) for rows in ROWS.values() for row in rows]


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "row"), rows_of(*(s for s in ROWS if s != "torch")))
def test_old_is_new(section: str, row: Row) -> None:
    names = names_of(section)
    old, new = (answer(expression, names, row.leaves) for expression in (row.old, row.new))
    assert new[0].dtype == torch.float64
    torch.testing.assert_close(new[0], old[0], rtol=0, atol=row.atol)
    for ours, theirs in zip(new[1:], old[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * row.atol)
        assert ours.any()


# --- torch -----------------------------------------------------------------------------------------------------------

ORDER_OF_TIES = ("scatter", "argsort().argsort()")  # torch leaves it open, or ours averages


@pytest.mark.parametrize(
    ("row", "tied"),
    [
        pytest.param(row, tied, id=f"{row.old}: {'tied' if tied else 'distinct'}")
        for row in ROWS["torch"]
        for tied in (False, True)
        if not (tied and any(name in row.old for name in ORDER_OF_TIES))
    ],
)
def test_hard_limit_is_torch(row: Row, tied: bool) -> None:
    names = names_of("torch") | {"s": 0}
    if tied:
        names["x"], names["b"] = (names["x"] * 4).round() / 4, (names["b"] * 4).round() / 4
    old, new = (answer(expression, names, row.leaves) for expression in (row.old, row.new))
    assert new[0].dtype == old[0].dtype
    if row.atol:
        torch.testing.assert_close(new[0], old[0], rtol=0, atol=row.atol)
    else:
        assert torch.equal(new[0], old[0])
    if not tied:
        for ours, theirs in zip(new[1:], old[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("section", "row"), rows_of("torch"))
def test_soft_torch_has_shape_dtype_and_gradient(section: str, row: Row) -> None:
    names = names_of(section)
    old, new = answer(row.old, names | {"s": 0}, ("x",)), answer(row.new, names | {"s": 0.3}, ("x",))
    assert new[0].shape == old[0].shape
    assert new[0].dtype == old[0].dtype
    assert new[1].isfinite().all()
    assert new[1].any()


# --- what the page says beside the tables ----------------------------------------------------------------------------


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, c: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, c)[0]


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_fast_soft_sort_readme() -> None:
    """The stand-in gives the numbers printed there."""
    package, x = fast_soft_sort(), t([5, 1, 2], [2, 1, 5])
    for f, strength, expected in (
        ("soft_sort", 1.0, t([5 / 3, 8 / 3, 11 / 3], [5 / 3, 8 / 3, 11 / 3])),
        ("soft_sort", 0.1, t([1, 2, 5], [1, 2, 5])),
        ("soft_rank", 2.0, t([3, 1.25, 1.75], [1.75, 1.25, 3])),
        ("soft_rank", 1.0, t([3, 1, 2], [2, 1, 3])),
    ):
        torch.testing.assert_close(package[f](x, "ASCENDING", strength, "l2"), expected, rtol=0, atol=1e-12)
        ours = so.sort if f == "soft_sort" else so.rank
        torch.testing.assert_close(ours(x, smoothing=strength), expected, rtol=0, atol=1e-12)


def test_the_two_entropic_sorts_part() -> None:
    torchsort = peer("torchsort")
    x, much = draw(5, N), 1e6
    theirs, ours = torchsort.soft_sort(x, "kl", much), so.sort(x, smoothing=so.Entropy(much))
    mean = torch.tensor(float(N), dtype=x.dtype).log()
    torch.testing.assert_close(ours.mean(-1), x.logsumexp(-1) - mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(theirs.mean(-1), mean - (-x).logsumexp(-1), rtol=0, atol=1e-3)
    flipped = so.sort(x, descending=True, smoothing=so.Entropy(0.5)).flip(-1)
    assert torch.equal(flipped, so.sort(x, smoothing=so.Entropy(0.5)))


def test_torchsort_takes_matrices_only() -> None:
    torchsort = peer("torchsort")
    x = draw(2, 3, 4)
    with pytest.raises(ValueError, match="2d-tensor"):
        torchsort.soft_rank(x)
    rows = torchsort.soft_rank(x.reshape(6, 4), regularization_strength=0.5).reshape(2, 3, 4)
    torch.testing.assert_close(so.rank(x, smoothing=0.5), rows, rtol=0, atol=1e-12)
    middle = so.rank(x.movedim(-1, 1), 1, smoothing=0.5).movedim(1, -1)
    torch.testing.assert_close(middle, rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rank", "sort"])
def test_kinks(name: str) -> None:
    torchsort = peer("torchsort")
    ours = {"rank": so.rank, "sort": so.sort}[name]
    theirs = getattr(torchsort, f"soft_{name}")
    x, c = t([1, 2, 4 if name == "rank" else 2.5]), t([1, -2, 3])  # one gap of 1
    torch.testing.assert_close(ours(x, smoothing=1.0), theirs(x), rtol=0, atol=1e-15)
    apart, pooled = {"rank": ([0, 0, 0], [1.5, -1.5, 0]), "sort": ([1, -2, 3], [-0.5, -0.5, 3])}[name]
    torch.testing.assert_close(gradient(lambda v: ours(v, smoothing=1.0), x, c), t(apart))
    torch.testing.assert_close(gradient(theirs, x, c), t(pooled))


def test_ties() -> None:
    torchsort = peer("torchsort")
    x, c = t([2, 1, 1, 3, 1]), t([1, -2, 0.5, 4, 3])
    for strength in (0.01, 0.4, 10.0):
        ours = gradient(lambda v, e=strength: so.rank(v, smoothing=e), x, c)
        theirs = gradient(lambda v, e=strength: torchsort.soft_rank(v, "l2", e), x, c)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours = gradient(lambda v: so.sort(v, smoothing=0.01), x, c)
    assert ours.tolist() == [[4, 1, -2, 3, 0.5]]  # the tied ones along the stable order
    theirs = gradient(lambda v: torchsort.soft_sort(v, "l2", 0.01), x, c)
    tied = x == 1
    torch.testing.assert_close(theirs[~tied], ours[~tied])
    torch.testing.assert_close(theirs[tied].sort().values, ours[tied].sort().values)


def test_precision_of_torchsort() -> None:
    torchsort = peer("torchsort")
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(11))
    for ours, theirs, lost in ((so.sort, torchsort.soft_sort, 1.0), (so.rank, torchsort.soft_rank, 0.1)):
        exact = ours(x.double(), smoothing=1e-4)
        assert torch.equal(ours(x, smoothing=1e-4), exact.float())
        assert float((theirs(x, "l2", 1e-4) - exact).abs().max()) > lost


def test_second_derivatives_of_torchsort() -> None:
    """Of a squared gradient: compared with central differences of the gradient."""
    torchsort = peer("torchsort")
    x, c, d, h = draw(1, 6), t([0, 1, 4, 9, 16, 25]), draw(1, 6, seed=12), 1e-5

    def energy(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return torch.autograd.grad(f(v), v, c, create_graph=True)[0].square().sum()

    def both(f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        v = x.clone().requires_grad_()
        (second,) = torch.autograd.grad(energy(f, v), v)
        ends = [float(energy(f, (x + step * d).requires_grad_()).detach()) for step in (h, -h)]
        return float((second * d).sum()), (ends[0] - ends[1]) / (2 * h)

    ours, differences = both(lambda v: so.rank(v, smoothing=so.Entropy(3.0)))
    assert ours == pytest.approx(differences, rel=1e-6)
    theirs, differences = both(lambda v: torchsort.soft_rank(v, "kl", 3.0))
    assert theirs != pytest.approx(differences, rel=0.1)


def test_entmax_of_an_empty_row() -> None:
    entmax = peer("entmax")
    x = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    assert not so.sparsemax(x).any()
    assert not so.entmax(x).any()
    assert entmax.entmax_bisect(x).isnan().all()
    for f in (entmax.sparsemax, entmax.entmax15):
        with pytest.raises(RuntimeError):
            f(x)


def test_strength_of_entmax() -> None:
    entmax, x = peer("entmax"), draw(5, N)
    for alpha in (1.5, 2.0):
        ours = so.argmax(x, -1, smoothing=so.Tsallis(alpha, 0.3))
        theirs = entmax.entmax_bisect(x / 0.3, alpha, n_iter=70)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dim_of_sparsemax() -> None:
    package, x = peer("sparsemax"), draw(5, N)
    assert torch.equal(package.Sparsemax(dim=0)(x), package.Sparsemax(dim=1)(x))
    torch.testing.assert_close(so.sparsemax(x, 0), so.sparsemax(x.T).T)


def test_optimal_transport_of_softtorch() -> None:
    """Its values, and central differences of them: its own gradient is close, no more."""
    softtorch = peer("softtorch")
    x, c, d, h = draw(5, N), draw(5, N, seed=12), draw(5, N, seed=13), 1e-4

    def theirs(v: Tensor) -> Tensor:
        options = {"method": "ot", "standardize": False, "ot_kwargs": {"sinkhorn_tol": 1e-13}}
        return softtorch.argmax(v, -1, softness=0.5, **options)

    def ours(v: Tensor) -> Tensor:
        return so.topk_mask(v, 1, smoothing=so.BinaryEntropy(0.5 / 2))

    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-11)
    differences = float(((theirs(x + h * d) - theirs(x - h * d)) * c).sum() / (2 * h))
    assert float((gradient(ours, x, c) * d).sum()) == pytest.approx(differences, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls a deprecated function of torch
        own = float((gradient(theirs, x, c) * d).sum())
    assert own == pytest.approx(differences, rel=1e-2)


def test_rounding_of_softtorch() -> None:
    softtorch, x = peer("softtorch"), draw(5, N)
    for softness, low, high in ((0.1, 0.0, 1e-14), (0.2, 1e-10, 1e-8), (1.0, 0.05, 0.1)):
        error = float((softtorch.round(x, softness) - so.round(x, smoothing=softness)).abs().max())
        assert low <= error < high


def test_hard_ranks_of_softtorch() -> None:
    softtorch = peer("softtorch")
    x = t([3, 1, 3])
    assert sorted(softtorch.rank(x, -1, mode="hard", descending=False)[0].tolist()) == [1, 2, 3]
    assert so.rank(x, smoothing=0).tolist() == [[2.5, 1, 2.5]]


def test_softplus_drops_its_tail() -> None:
    x = t(20.5, 30.0)
    lost = so.relu(x, smoothing=1.0) - F.softplus(x)
    torch.testing.assert_close(lost, torch.log1p((-x).exp()), rtol=0, atol=1e-14)
    assert 1e-9 < float(lost.max()) < 2e-9


def test_default_strength_is_chosen_from_the_data() -> None:
    x = draw(5, N)
    for operator in (so.rank, so.sort):
        eps = so.mixing_eps(operator, x)
        torch.testing.assert_close(operator(x), operator(x, smoothing=so.Quadratic(eps)), rtol=0, atol=1e-12)
    assert torch.equal(so.argmax(x, -1), so.argmax(x, -1, smoothing=0.1))


def test_units_of_eps() -> None:
    x = draw(5, N)
    torch.testing.assert_close(so.rank(1000 * x, smoothing=500.0), so.rank(x, smoothing=0.5), rtol=0, atol=1e-10)
    large, small = so.sort(1000 * x, smoothing=0.0005), so.sort(x, smoothing=0.5)
    torch.testing.assert_close(large, 1000 * small, rtol=0, atol=1e-10)
