"""Soft booleans where torch would take them for numbers: attention, tensors of data, stores, and calls in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import smoothops as so
from smoothops._soft_values import CONTEXTS

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Any) -> Tensor:
    return x.as_subclass(Tensor)


# --- attention -------------------------------------------------------------------------------------------------------

X, PAIRS, KEYS = random(2, 4, 8), random(4, 4), random(2, 4)


def attended(layer: nn.MultiheadAttention, x: Tensor, p: Tensor) -> Tensor:
    """Attention by hand, each weight exp(score) times the probability p that it is let through."""
    heads = [
        (x @ w.T + b).reshape(2, 4, 2, 4).transpose(1, 2)
        for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    ]
    e = p * torch.exp(heads[0] @ heads[1].mT / 2)
    out = (e / e.sum(-1, keepdim=True)) @ heads[2]
    return layer.out_proj(out.transpose(1, 2).reshape(2, 4, 8))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [True, False])
def test_a_soft_mask_is_not_added_to_the_scores(weights: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    pairs, keys = PAIRS.clone().requires_grad_(), KEYS.clone().requires_grad_()
    p, r = so.gt(pairs, 0, smoothing=EPS), so.gt(keys, 0, smoothing=EPS)[:, None, None]
    hard = torch.eye(4, dtype=torch.bool)
    with so.softened(EPS):
        found = [
            layer(X, X, X, attn_mask=pairs > 0, need_weights=weights)[0],
            layer(X, X, X, key_padding_mask=keys > 0, need_weights=weights)[0],
            layer(X, X, X, attn_mask=pairs > 0, key_padding_mask=keys > 0, need_weights=weights)[0],
            layer(X, X, X, attn_mask=hard, key_padding_mask=keys > 0, need_weights=weights)[0],
        ]
    expected = [1 - p, 1 - r, (1 - p) * (1 - r), (~hard).double() * (1 - r)]
    for y, through in zip(found, expected, strict=True):
        by_hand = attended(layer, X, through)
        torch.testing.assert_close(y, by_hand)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (pairs, keys)) for y in (found[2], attended(
        layer, X, expected[2]))), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_scaled_dot_product_attention() -> None:
    pairs = PAIRS.clone().requires_grad_()
    with so.softened(EPS):
        found = F.scaled_dot_product_attention(X, X, X, attn_mask=pairs > 0)
    e = so.gt(pairs, 0, smoothing=EPS) * torch.exp(X @ X.mT / 8**0.5)
    expected = (e / e.sum(-1, keepdim=True)) @ X
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), pairs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    pairs = PAIRS.abs() * (1 - 2 * torch.eye(4).double())
    with so.softened(so.Quadratic(1e-9)):
        found = F.scaled_dot_product_attention(X, X, X, pairs > 0)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(X, X, X, ~torch.eye(4, dtype=torch.bool)))


def test_attention_outside_refuses_a_soft_mask() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with so.softened(EPS):
        mask = PAIRS > 0
    assert torch.is_floating_point(mask)
    with pytest.raises(ValueError, match=r"attention would add a soft boolean to the scores"):
        layer(X, X, X, attn_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_hard_padding() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double().eval()
    padding = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]]).bool()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = encoder(X, src_key_padding_mask=padding)
            with so.softened(EPS):
                found = encoder(X, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])


def test_a_transformer_asks_itself_whether_a_bias_is_causal() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1).double()
    causal = nn.Transformer.generate_square_subsequent_mask(4).double()
    for bias in (PAIRS, causal, causal + 0.1 * PAIRS):
        expected = encoder(X, mask=bias)
        with so.softened(EPS):
            assert torch.equal(encoder(X, mask=bias), expected)


# --- data and stores -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_tensors_of_soft_booleans() -> None:
    x = random(3)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        for made in (
            torch.tensor(a), torch.tensor(a, dtype=torch.bool), torch.as_tensor(a, dtype=torch.bool), torch.asarray(a),
            x.new_tensor(a, dtype=torch.bool), torch.tensor([v > 0 for v in x]), torch.tensor([a[0], True, a[2]])[::2],
        ):  # fmt: skip
            assert type(made).__name__ == "SoftBoolean"
            torch.testing.assert_close(numbers(made), p[::2] if made.numel() == 2 else p, check_dtype=False)
        assert torch.tensor(a, dtype=torch.float32).dtype == torch.float32
        assert type(torch.tensor([a[0], 0.5])) is Tensor


def test_stored_in_a_soft_boolean() -> None:
    x, y = random(3), random(3)
    with so.softened(EPS):
        for store in (lambda a: a.copy_(y), lambda a: a.__setitem__(slice(None), y)):
            a = x > 0
            store(a)
            torch.testing.assert_close(numbers(a), so.ne(y, 0, smoothing=EPS))
        a = x > 0
        a[a] = 7
        torch.testing.assert_close(numbers(a), 1 - (1 - so.gt(x, 0, smoothing=EPS)) ** 2)
    with pytest.raises(ValueError, match=r"takes another boolean"):
        a.copy_(y)


def test_sums_and_products_of_booleans_are_logic() -> None:
    x, y = random(5), random(5)
    with so.softened(EPS, logic=so.Godel()):
        p, q = x > 0, y > 0
        assert torch.equal(p + q, p | q)
        assert torch.equal(p * (y.long() > 0), p & (y.long() > 0))
        assert type(p + 1) is type(p * y) is Tensor
        assert sum([p[0], p[1], p[2]]).item() == numbers(p)[:3].sum().item()


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_comparison_in_place_needs_room(dtype: torch.dtype) -> None:
    target = torch.arange(3).to(dtype)
    with so.softened(EPS), pytest.raises(ValueError, match=r"gt_ on a tensor of torch\.\w+ needs a yes or no"):
        target.gt_(random(3))
    with so.softened(so.StraightThrough(EPS)):
        assert target.clone().lt_(torch.tensor([-1.0, 7.0, 7.0])).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda p, i, o: torch.where(p, o, -o, out=o),
        lambda p, i, o: torch.logical_and(p, p, out=o),
        lambda p, i, o: torch.gather(o, 0, i, out=o.clone()),
    ],
)
def test_out_is_refused(call: Callable[..., Any]) -> None:
    with so.softened(EPS), pytest.raises(TypeError, match=r"out=.* has no soft form"):
        call(random(3) > 0, random(3, 3).argmax(0), torch.zeros(3).double())


def test_nan_has_no_truth_value() -> None:
    with so.softened(EPS), pytest.raises(ValueError, match=r"this soft boolean holds NaN"):
        bool(torch.tensor(torch.nan) > 0)


# --- with soft integers ----------------------------------------------------------------------------------------------


def test_a_single_position() -> None:
    v = random(5).requires_grad_()
    w = so.argmax(v, smoothing=EPS)
    labels = torch.tensor([3, 1, 3, 3, 0])
    with so.softened(EPS):
        found, right = v[v.argmax()], labels[v.argmax()] == 3
    torch.testing.assert_close(found, w @ v)
    torch.testing.assert_close(numbers(right), w[[0, 2, 3]].sum())
    torch.testing.assert_close(torch.autograd.grad(found, v)[0], torch.autograd.grad(w @ v, v)[0])


def test_spellings_of_reading() -> None:
    x = random(4, 5).requires_grad_()
    expected = (so.argmax(x, 1, smoothing=EPS) * x).sum(1)
    with so.softened(EPS):
        i = x.argmax(1, keepdim=True)
        for found in (
            x.gather(dim=1, index=i), torch.gather(input=x, dim=1, index=i), torch.take_along_dim(x, indices=i, dim=1),
            torch.take_along_dim(x, i + 5 * torch.arange(4)[:, None]), x.take(index=i + 5 * torch.arange(4)[:, None]),
            (torch.zeros_like(x).scatter(1, i, value=1.0) * x).sum(1), (i.data == torch.arange(5)).double() * x,
        ):  # fmt: skip
            found = found.sum(1) if found.shape == (4, 5) else found.reshape(-1)
            torch.testing.assert_close(found, expected)
        labels = torch.tensor([2, 2, 1, 1, 0])
        for picked in (labels.index_select(0, i[:, 0]), torch.take_along_dim(labels, i[:, 0]), labels.take(i[:, 0])):
            torch.testing.assert_close(numbers(picked == 2), so.argmax(x, 1, smoothing=EPS)[:, :2].sum(1))


def test_soft_integers_against_floats() -> None:
    x, y = random(4, 5), random(4).requires_grad_()
    w = so.argmax(x, 1, smoothing=EPS)
    expected = (w * so.gt(torch.arange(5.0).double(), y[:, None], smoothing=EPS)).sum(1)
    with so.softened(EPS):
        found = x.argmax(1) > y
        assert (x.argmax(1) == None) is False  # noqa: E711
    torch.testing.assert_close(numbers(found), expected)
    assert found.requires_grad
    with so.softened(EPS, keep="gt"):
        kept = x.argmax(1) > y
    torch.testing.assert_close(numbers(kept), (w * (torch.arange(5.0) > y[:, None])).sum(1))


# --- entering and leaving --------------------------------------------------------------------------------------------


def test_contexts_that_cross_raise() -> None:
    x = random(3)

    def held(eps: float) -> Iterator[Tensor]:
        with so.softened(eps):
            yield torch.sign(x)
            yield torch.sign(x)

    first, second = held(0.1), held(0.9)
    next(first), next(second)
    with pytest.raises(RuntimeError, match=r"left in another order"):
        list(first)
    with pytest.raises(RuntimeError, match=r"left in another order"):
        list(second)

    async def job(eps: float) -> Tensor:
        with so.softened(eps):
            await asyncio.sleep(0.001)
            return torch.sign(x)

    async def both() -> list[Any]:
        return await asyncio.gather(job(0.1), job(0.9), return_exceptions=True)

    assert all(isinstance(found, RuntimeError) for found in asyncio.run(both()))
    assert CONTEXTS.entered == []
    assert _get_current_function_mode_stack() == []
    assert set(torch.sign(x).tolist()) <= {-1.0, 1.0}
