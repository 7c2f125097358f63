"""SparseAttention: with softmax weights it is torch's module, and its own weights are the soft argmax."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smoothops as so

BATCH, TARGETS, SOURCES, SIZE, HEADS = 3, 4, 5, 8, 2


def pair(smoothing: Any = None, **options: Any) -> tuple[nn.MultiheadAttention, so.nn.SparseAttention]:
    """Torch's module and ours with the same parameters, in float64."""
    theirs = nn.MultiheadAttention(SIZE, HEADS, dtype=torch.float64, **options)
    for p in theirs.parameters():  # torch starts biases at 0
        nn.init.normal_(p)
    ours = so.nn.SparseAttention(SIZE, HEADS, smoothing=smoothing or so.Entropy(1.0), dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def sequences(batch_first: bool = False, batched: bool = True, kdim: int = SIZE, vdim: int = SIZE) -> list[Tensor]:
    shapes = [(TARGETS, SIZE), (SOURCES, kdim), (SOURCES, vdim)]
    made = [torch.randn(*([BATCH] * batched), *shape, dtype=torch.float64) for shape in shapes]
    made = made if batch_first or not batched else [x.transpose(0, 1) for x in made]
    return [x.detach().requires_grad_() for x in made]


def masks(batched: bool) -> dict[str, dict[str, Any]]:
    open_first = torch.rand(TARGETS, SOURCES) < 0.4
    open_first[:, 0] = False
    heads = torch.rand(BATCH * HEADS if batched else HEADS, TARGETS, SOURCES) < 0.4
    heads[..., 0] = False
    padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
    padding[1, 3:] = True
    padding = padding if batched else padding[1]
    added = torch.randn(TARGETS, SOURCES, dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": open_first},
        "heads": {"attn_mask": heads},
        "added": {"attn_mask": added},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": open_first, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(TARGETS, SOURCES, dtype=torch.bool).triu(1), "is_causal": True},
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 3, "vdim": 7, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "bias": True},
]


@pytest.mark.parametrize("mask", list(masks(True)))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_softmax_weights_are_torch(mask: str, options: dict[str, Any], batched: bool) -> None:
    theirs, ours = pair(**options)
    sizes = {key: options[key] for key in ("kdim", "vdim") if key in options}
    given, mask_given = sequences(options.get("batch_first", False), batched, **sizes), masks(batched)[mask]
    # without weights torch asks a kernel for the causal mask, which then hides the keys that it appended itself
    appended = mask == "causal" and bool(options.keys() & {"add_bias_kv", "add_zero_attn"})
    for need, average in ((True, True), (True, False), *(() if appended else [(False, True)])):
        flags = {"need_weights": need, "average_attn_weights": average}
        want, want_weights = theirs(*given, **mask_given, **flags)
        out, weights = ours(*given, **mask_given, **flags)
        torch.testing.assert_close(out, want)
        assert (weights is None) == (want_weights is None)
        if need:
            torch.testing.assert_close(weights, want_weights)
    seed = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((ours(*given, **mask_given)[0] * seed).sum(), [*given, *ours.parameters()]),
        torch.autograd.grad((theirs(*given, **mask_given)[0] * seed).sum(), [*given, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


STRENGTHS = {
    "sparsemax": (so.Quadratic(1.0), [so.Quadratic(1.0)] * HEADS),
    "entmax": (so.Tsallis(1.5, 1.0), [so.Tsallis(1.5, 1.0)] * HEADS),
    "heads": (so.Quadratic(torch.tensor([0.3, 2.0]).reshape(1, HEADS, 1, 1)), [so.Quadratic(0.3), so.Quadratic(2.0)]),
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_weights_are_the_soft_argmax(name: str) -> None:
    smoothing, each = STRENGTHS[name]
    ours = so.nn.SparseAttention(SIZE, HEADS, batch_first=True, smoothing=smoothing).double()
    q, k, v = sequences(batch_first=True)
    out, weights = ours(q, k, v, average_attn_weights=False)
    wq, wk, _ = ours.in_proj_weight.chunk(3)
    for row, head in itertools.product(range(BATCH), range(HEADS)):
        part = slice(head * SIZE // HEADS, (head + 1) * SIZE // HEADS)
        scores = (q[row] @ wq[part].T) @ (k[row] @ wk[part].T).T / (SIZE / HEADS) ** 0.5  # biases start at 0
        torch.testing.assert_close(
            weights[row, head], so.argmax(scores, -1, smoothing=each[head]), rtol=1e-6, atol=1e-6
        )
    assert (weights == 0).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert out.shape == (BATCH, TARGETS, SIZE)


def test_a_query_that_may_attend_to_nothing() -> None:
    _, ours = pair(so.Tsallis(1.5, 1.0), batch_first=True)
    q, k, v = sequences(batch_first=True)
    padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
    padding[0] = True
    out, weights = ours(q, k, v, key_padding_mask=padding)
    assert (weights[0] == 0).all()
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand_as(out[0]))
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][0] == 0).all()


def test_causal_without_mask() -> None:
    _, ours = pair(so.Quadratic(1.0), batch_first=True)
    x = torch.randn(BATCH, TARGETS, SIZE, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(TARGETS, dtype=torch.float64)
    torch.testing.assert_close(ours(x, x, x, is_causal=True), ours(x, x, x, attn_mask=mask))


@pytest.mark.parametrize("training", [True, False])
def test_inside_an_encoder_layer(training: bool) -> None:
    """Torch's fast path would compute softmax from the parameters without asking the module."""
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.0, batch_first=True).train(training)
    dense = copy.deepcopy(layer)
    layer.self_attn = so.nn.SparseAttention(SIZE, HEADS, batch_first=True, smoothing=so.Quadratic(0.1)).train(training)
    layer.self_attn.load_state_dict(dense.self_attn.state_dict())
    x = torch.randn(BATCH, TARGETS, SIZE)
    with torch.no_grad():
        y = layer(x)
        assert not torch.allclose(y, dense(x), atol=1e-3)
        attended, _ = layer.self_attn(x, x, x)
        first = layer.norm1(x + attended)
        want = layer.norm2(first + layer.linear2(layer.activation(layer.linear1(first))))
        torch.testing.assert_close(y, want)
        # the layer copied by an encoder, with masks
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
        padding = torch.zeros(BATCH, TARGETS, dtype=torch.bool)
        padding[0, 2:] = True
        moved = x.clone()
        moved[0, 2:] += 1
        out, other = encoder(x, src_key_padding_mask=padding), encoder(moved, src_key_padding_mask=padding)
        torch.testing.assert_close(out[0, :2], other[0, :2])


def test_dropout_acts_in_training_only() -> None:
    ours = so.nn.SparseAttention(SIZE, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, TARGETS, SIZE)
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_gradients() -> None:
    _, ours = pair(so.Tsallis(1.5, 1.0), batch_first=True)
    given = sequences(batch_first=True)
    seed = torch.randn(BATCH, TARGETS, SIZE, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: (ours(*x)[0] * seed).sum(), given, check_batched_grad=True)
    _, ours = pair(so.Entropy(1.0), batch_first=True)
    assert torch.autograd.gradgradcheck(lambda *x: (ours(*x)[0] * seed).sum(), given)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), {"attn_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"\(3, 3\)"),
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "int64"),
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), {"key_padding_mask": torch.ones(3, 2) > 0}, ValueError, r"\(2, 3\)"),
        (((2, 3, 8), (4, 3, 8), (4, 3, 8)), {}, ValueError, "batch size"),
        (((2, 3, 8), (2, 3, 8), (2, 4, 8)), {}, ValueError, "same length"),
        (((2, 3, 8), (2, 3, 7), (2, 3, 8)), {}, ValueError, "key must have 8 features"),
        (((2, 3, 8), (3, 8), (3, 8)), {}, ValueError, "all be sequences"),
        (((8,), (8,), (8,)), {}, ValueError, "all be sequences"),
    ],
)
def test_errors(shapes: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = so.nn.SparseAttention(8, 2, batch_first=True)
    with pytest.raises(error, match=message):
        ours(*(torch.randn(s) for s in shapes), **options)
