"""Soft integers: hard integers that remember the distribution they are the choice of; compared with sums over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smoothops as so

G = torch.Generator().manual_seed(0)
EPS = 0.5
B, N = 6, 4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def enumerated(f: Callable[[Tensor], Any], w: Tensor) -> Tensor:
    """sum over all index vectors' entries: E f(index), each entry of the index on its own, by brute force."""
    total = torch.zeros((), dtype=w.dtype)
    for j in range(w.shape[-1]):
        value = f(torch.full(w.shape[:-1], j)).to(w.dtype)
        weight = w[..., j].reshape(w.shape[:-1] + (1,) * (value.ndim - w.ndim + 1))
        total = total + weight * value
    return total


def increased(i: Any) -> Any:
    i += 1
    return i


TABLE, LABELS, FLAGS = random(N, 3), torch.tensor([7, 3, 7, 5]), torch.tensor([True, False, True, True])
Y = torch.randint(N, (B,), generator=G)
X = random(B, N).requires_grad_()

# functions of a soft index (B,), each entry of whose answer depends on one entry of the index
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "==": lambda i: i == Y,
    "== reversed": lambda i: i == Y,
    "!=": lambda i: i != 2,
    "<": lambda i: i < Y,
    "<= reversed": lambda i: i >= 2,
    "> float": lambda i: i > 1.5,
    "arithmetic": lambda i: (2 * i - 1) % 3 == 1,
    "offset": lambda i: i + torch.arange(B) * 10 > 21,
    "in place": lambda i: increased(i) == 2,
    "float": lambda i: i.double(),
    "to": lambda i: i.to(torch.float64),
    "scaled": lambda i: i * 0.5 + X.detach()[:, 0],
    "divided": lambda i: i / 3,
    "view": lambda i: i.view(B, 1).expand(B, 2)[:, 1] == Y,
    "shape": lambda i: i.unsqueeze(0).squeeze().reshape(2, 3).flatten() == 1,
    "part": lambda i: i[..., 2:] == 1,
    "masked": lambda i: i[Y > 1] == 1,
    "split": lambda i: i.split(2)[1] == 1,
    "cat": lambda i: torch.cat([i, i])[B:] == 1,
    "stack": lambda i: torch.stack([i, i], -1)[:, 0] == 1,
    "iterated": lambda i: torch.stack([v == 1 for v in i]),
    "clone": lambda i: i.clone().contiguous().cpu().long() == 1,
    "gather": lambda i: X.gather(1, i.unsqueeze(1))[:, 0],
    "take_along_dim": lambda i: torch.take_along_dim(X, i[:, None], 1).squeeze(1),
    "rows": lambda i: TABLE[i],
    "index_select": lambda i: TABLE.index_select(0, i),
    "embedding": lambda i: F.embedding(i, TABLE),
    "pairs": lambda i: X[torch.arange(B), i],
    "column": lambda i: TABLE.T[1, i],
    "labels": lambda i: LABELS[i] == 7,
    "labels, gathered": lambda i: LABELS.expand(B, N).gather(1, i[:, None])[:, 0] == 3,
    "labels as floats": lambda i: LABELS[i].double(),
    "flags": lambda i: FLAGS[i],
    "flags negated": lambda i: ~FLAGS[i],
    "take": lambda i: torch.take(TABLE[:, 0], i),
    "where": lambda i: torch.where(Y > 1, i, -1) == 1,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_expectation(name: str) -> None:
    f = FUNCTIONS[name]
    w = so.argmax(X, 1, smoothing=EPS)
    with so.softened(EPS, keep=("gt", "ge", "lt", "le", "eq", "ne")):  # rules of soft integers, not of floats
        index = X.argmax(1)
        found = numbers(f(index))
    assert torch.equal(numbers(index), X.detach().argmax(1))
    if name in ("part", "masked", "split"):
        every = {"part": w[2:], "masked": w[Y > 1], "split": w[2:4]}[name]
        expected = every[:, 1]
    else:
        expected = enumerated(f, w)
    torch.testing.assert_close(found, expected)
    c = random(*expected.shape)
    for a, b in zip(
        *(torch.autograd.grad((v * c).sum(), X, retain_graph=True) for v in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_soft_positions_in_the_middle() -> None:
    x, w = random(2, N, 3), so.argmax(X, 1, smoothing=EPS)
    with so.softened(EPS):
        i = X.argmax(1)
        found = x[:, i], x[..., i, :], x[:, i, None], x[i - i, i], x[0, i]
    torch.testing.assert_close(found[0], torch.einsum("bj,ajc->abc", w, x))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0].unsqueeze(2))
    torch.testing.assert_close(found[4], torch.einsum("bj,jc->bc", w, x[0]))
    labels = torch.arange(2 * N).reshape(2, N)
    with so.softened(EPS):
        assert numbers(labels[:, i]).tolist() == labels[:, numbers(i)].tolist()
        torch.testing.assert_close(numbers(labels[:, i] == labels[:, :1]), w[:, :1].T.expand(2, B))


def test_two_soft_integers_are_independent() -> None:
    z = random(B, N)
    v, w = so.argmax(z, 1, smoothing=EPS), so.argmax(X, 1, smoothing=EPS)
    with so.softened(EPS):
        a, b = X.argmax(1), z.argmax(1)
        same, less = a == b, a < b
    torch.testing.assert_close(numbers(same), (v * w).sum(1))
    torch.testing.assert_close(numbers(less), torch.einsum("bi,bj,ij->b", w, v, torch.ones(N, N).double().triu(1)))


def test_counts() -> None:
    w = so.argmax(X, 1, smoothing=EPS)
    with so.softened(EPS):
        i = X.argmax(1)
        torch.testing.assert_close(torch.bincount(i, minlength=N), w.sum(0))
        confusion = torch.bincount(N * Y + i, minlength=N * N).reshape(N, N)
        torch.testing.assert_close(i.sum(), (w @ torch.arange(N).double()).sum())
        filled = torch.zeros(B, N, dtype=torch.float64).scatter_(1, i[:, None], 1.0)
    torch.testing.assert_close(confusion, F.one_hot(Y, N).double().T @ w)
    torch.testing.assert_close(filled, w)


def test_mixture() -> None:
    w, p = so.argmax(X, 1, smoothing=EPS), so.gt(X[:, 0], 0, smoothing=EPS)
    with so.softened(EPS):
        answer = torch.where(X[:, 0] > 0, X.argmax(1), -1)
        abstains, right = answer == -1, answer == Y
    torch.testing.assert_close(numbers(abstains), 1 - p)
    torch.testing.assert_close(numbers(right), p * w.gather(1, Y[:, None])[:, 0])


def test_mixture_with_floats() -> None:
    w, p = so.argmax(X, 1, smoothing=EPS), so.gt(X[:, 0], 0, smoothing=EPS)
    expected = w @ torch.arange(N).double()
    with so.softened(EPS):
        found = torch.where(X[:, 0] > 0, X.argmax(1), 0.5), torch.where(Y > 1, X.argmax(1), 0.5)
    torch.testing.assert_close(found[0], p * expected + (1 - p) * 0.5)
    torch.testing.assert_close(found[1].double(), torch.where(Y > 1, expected, 0.5))


def test_a_first_look_without_grad_costs_no_gradient() -> None:
    with so.softened(EPS):
        i = X.argsort(1)[:, 0] + 1
        with torch.no_grad():
            seen = (i == 2).double()
        used = (i == 2).double()
    assert not seen.requires_grad
    torch.testing.assert_close(used, so.argsort(X, 1)[:, 0, 1])
    for a, b in zip(
        *(torch.autograd.grad(v.square().sum(), X) for v in (used, so.argsort(X, 1)[:, 0, 1])), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_hard_where_an_integer_is_needed() -> None:
    with so.softened(EPS):
        i = X.argmax(1)
        assert i.dtype == torch.long
        assert i.tolist() == X.detach().numpy().argmax(1).tolist()
        assert int(i[0]) == int(X.detach().numpy()[0].argmax())
        assert [10, 11, 12, 13][i[0]] in (10, 11, 12, 13)
        assert F.cross_entropy(X, i).item() == F.cross_entropy(X, torch.as_tensor(X.detach().numpy().argmax(1))).item()
        assert type(i // 2).__name__ == "SoftInteger"
        assert type(torch.unique(i)) is Tensor
        for change in (lambda: i.add_(1), lambda: i.__setitem__(0, 1), lambda: i.fill_(3)):
            with pytest.raises(TypeError, match="leave its distribution behind"):
                change()


def test_indices_of_a_sort_are_of_the_values_then() -> None:
    x = random(5)
    w = so.argsort(x)
    with so.softened(EPS):
        i = x.argsort()
        x.zero_()
        torch.testing.assert_close(F.one_hot(i, 5), w)


def test_positions_outside() -> None:
    with so.softened(EPS), pytest.raises((IndexError, RuntimeError)):
        _ = TABLE[:2][X.argmax(1)]


def test_topk_accuracy_of_exclusive_events() -> None:
    with so.softened(EPS, logic=so.Lukasiewicz()):
        hit = (X.topk(2).indices == Y[:, None]).any(-1)
    torch.testing.assert_close(numbers(hit), so.argtopk(X, 2).sum(1).gather(1, Y[:, None])[:, 0])
