"""Where torch would read a soft boolean as ordinary numbers: attention masks, and tensors made of data."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._soft_boolean import RULES, SoftBoolean, as_soft_boolean, hard_boolean, is_boolean, rule
from ._soft_values import any_of, context, plain

# --- attention -------------------------------------------------------------------------------------------------------

# A floating mask is added to the scores. Weights p exp(score), normalized, are those of the scores plus log p.


def _bias(p: Tensor) -> Tensor:
    """log p, without gradient where p is 0: nothing passes there."""
    return torch.where(p > 0, torch.where(p > 0, p, 1).log(), -torch.inf)


@rule("scaled_dot_product_attention")
def _attend(func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *a: Any, **kw: Any) -> Any:
    if isinstance(attn_mask, SoftBoolean):  # True may be looked at
        attn_mask = _bias(plain(attn_mask)).to(query.dtype)
    return func(query, key, value, attn_mask, *a, **kw)


def _attend_heads(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Masks of multi_head_attention_forward, where True may not be looked at."""
    if not any_of((*args, *kwargs.values()), SoftBoolean):
        return None, args, kwargs
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    for name in ("key_padding_mask", "attn_mask"):  # a hard one too: torch wants both in one dtype
        mask = given.get(name)
        if is_boolean(mask):
            given[name] = _bias(1 - plain(mask).to(given["query"].dtype))
    return None, (), given


@rule("is_floating_point")
def _is_floating_point(func: Any, p: Any) -> bool:
    if context() is None and sys._getframe(2).f_code.co_name == "_canonical_mask":
        raise ValueError(
            "attention would add a soft boolean to the scores as if it were a bias; call it inside so.softened, or "
            "pass torch.log(1 - mask)"
        )
    return func(plain(p))


@rule("_nested_tensor_from_mask", "_nested_tensor_from_mask_left_aligned")
def _nested(func: Any, x: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    return func(x, hard_boolean(mask, "a nested tensor") if isinstance(mask, SoftBoolean) else mask, *args, **kwargs)


# --- tensors of data -------------------------------------------------------------------------------------------------


def _made(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """torch.tensor(p, dtype=torch.bool) would be True for a probability of 0.001."""
    data = args[-1] if args else kwargs.get("data", kwargs.get("obj"))
    if not any_of((data,), SoftBoolean):
        return None, args, kwargs
    dtype = kwargs.pop("dtype", None) if _all_boolean(data) else kwargs.get("dtype")
    made = func(*plain(args), **{name: plain(v) for name, v in kwargs.items()})
    if not _all_boolean(data):
        return made, args, kwargs
    made = as_soft_boolean(made)
    return made if dtype is None else RULES[Tensor.to](Tensor.to, made, dtype), args, kwargs


def _all_boolean(data: Any) -> bool:
    return all(map(_all_boolean, data)) if type(data) in (list, tuple) else is_boolean(data)


# what happens before a call is dispatched further: (answer or None, args, kwargs)
PREPARED: dict[Any, Callable[..., tuple[Any, Any, Any]]] = {
    F.multi_head_attention_forward: _attend_heads,
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor), _made),
}
