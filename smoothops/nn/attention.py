"""Attention whose weights are sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..operators import argmax
from ..regularizers import Tsallis
from ._held import Source, current, held, written


class SparseAttention(nn.MultiheadAttention):
    """Multi-head attention with weights argmax_{y in simplex} <q k'/sqrt(d), y> - eps Omega(y), 0 for most keys.

    Takes the place of :class:`torch.nn.MultiheadAttention`: same arguments, shapes, masks and state_dict; inside
    ``nn.TransformerEncoderLayer`` too: ``layer.self_attn = so.nn.SparseAttention(...)``.

    Args:
        smoothing: ``so.Tsallis(1.5, 1.0)`` (entmax) by default; ``so.Quadratic(1.0)`` is sparsemax, ``so.Entropy(1.0)``
            softmax. Scores have shape (batch, heads, queries, keys): a strength a head is (1, heads, 1, 1). Or a
            ``LearnableEps`` or ``Anneal``.
        embed_dim, num_heads, **options: those of MultiheadAttention.

    A query that may attend to nothing gets weights 0 (torch: NaN). ``is_causal=True`` without a mask makes one.
    Complexity: O(queries keys embed_dim) time, O(queries keys) memory a head.
    Source: Correia, Niculae, Martins 2019, "Adaptively sparse transformers".

    Example:
        >>> x = torch.randn(2, 10, 16)
        >>> y, weights = so.nn.SparseAttention(16, 4, batch_first=True)(x, x, x)
        >>> torch.testing.assert_close(weights.sum(-1), torch.ones(2, 10))
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, smoothing: Source = None, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, *args, **options)
        self.smoothing = held(Tsallis(1.5, 1.0) if smoothing is None else smoothing, "SparseAttention")
        # nn.TransformerEncoderLayer would otherwise compute softmax attention from the weights, without asking forward
        self._qkv_same_embed_dim = False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As of :class:`torch.nn.MultiheadAttention`."""
        single = self._check(query, key, value)
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        batch, targets = q.shape[:2]
        extra = k.shape[1] - key.shape[1]  # the keys that add_bias_kv and add_zero_attn append
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        scores = (q / math.sqrt(self.head_dim)) @ k.mT  # (batch, heads, targets, keys)
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(targets, key.shape[1], dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is not None:
            scores = masked(scores, self._shaped(attn_mask, batch, targets, key.shape[1]), extra, "attn_mask")
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, key.shape[1]):
                raise ValueError(
                    f"key_padding_mask must be {(batch, key.shape[1])}, got {tuple(key_padding_mask.shape)}"
                )
            scores = masked(scores, key_padding_mask[:, None, None], extra, "key_padding_mask")
        weights = F.dropout(argmax(scores, -1, smoothing=current(self.smoothing)), self.dropout, self.training)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        out = out.squeeze(0) if single else out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights.squeeze(0) if single else weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the sequences come without a batch dim."""
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError(
                "query, key and value must all be sequences (length, features) or batches of them, got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        for name, x, size in zip(("query", "key", "value"), (query, key, value), self._sizes(), strict=True):
            if x.shape[-1] != size:
                raise ValueError(f"{name} must have {size} features, got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must be of the same length")
        along = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[along] != key.shape[along]:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch size")
        return query.ndim == 2

    def _sizes(self) -> tuple[int, int, int]:
        return self.embed_dim, self.kdim, self.vdim

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values (batch, length, embed_dim)."""
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, b.to(x.dtype).expand(len(x), -1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[-1])], 1) for x in (k, v))
        return [q, k, v]

    def _shaped(self, mask: Tensor, batch: int, targets: int, sources: int) -> Tensor:
        """attn_mask (targets, sources) or (batch * heads, targets, sources), to broadcast with the scores."""
        if mask.shape == (targets, sources):
            return mask
        if mask.shape == (batch * self.num_heads, targets, sources):
            return mask.unflatten(0, (batch, self.num_heads))
        raise ValueError(
            f"attn_mask must be {(targets, sources)} or {(batch * self.num_heads, targets, sources)}, "
            f"got {tuple(mask.shape)}"
        )

    def extra_repr(self) -> str:
        known = [] if isinstance(self.smoothing, nn.Module) else [f"smoothing={written(self.smoothing)}"]
        return ", ".join([f"{self.embed_dim}, {self.num_heads}", *known, f"batch_first={self.batch_first}"])


def masked(scores: Tensor, mask: Tensor, extra: int, name: str) -> Tensor:
    """``scores`` where a bool mask is False, plus a float mask; the last ``extra`` keys are always open."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True: not attended to) or floating (added to the scores), got {mask.dtype}"
        )
    mask = F.pad(mask, (0, extra)) if extra else mask
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
