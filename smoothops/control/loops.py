"""Loops with a number of steps that is known: fori_loop and scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._chain import Chain
from ._run import run
from ._trees import check_same, flatten, unflatten
from .branches import check_callable, name_of
from .checkpoint import Checkpoint


def same_form(fn: Callable[..., Any], reference: str) -> Callable[[Any, Any], Any]:
    name = name_of(fn)
    return lambda new, old: check_same(new, old, name, reference, numbers=False)


def fori_loop(
    lo: int, hi: int, body: Callable[[int, Any], Any], init: Any, *, checkpoint: Checkpoint | None = None
) -> Any:
    """The state after ``for i in range(lo, hi): state = body(i, state)``, with bounded memory for its backward.

    Args:
        lo, hi: ints.
        body: (i, state) -> state, of the same pytree structure, shapes and dtypes; i is an int. It may close over
            tensors and modules; with ``checkpoint`` it is run more than once, with the same random numbers.
        init: the state, a pytree of tensors and numbers.
        checkpoint: ``None`` keeps all that autograd needs; ``Sqrt()`` and ``Binomial(slots)`` keep few states.

    Returns: the final state; ``init`` if hi <= lo.
    Raises: TypeError, ValueError where the state changes its form, and for ``checkpoint`` inside torch.func.grad.
    Complexity: hi - lo calls of body, about as many again in backward with ``Sqrt()``.

    Example:
        >>> so.fori_loop(1, 5, lambda i, s: s * i, torch.tensor(1.0))
        tensor(24.)
    """
    for bound, name in ((lo, "lo"), (hi, "hi")):
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise TypeError(f"{name} must be an int, got {type(bound).__name__}; soft bounds are while_loop's")
    check_callable(body, "body")

    def step(i: int, state: Any, _: None) -> tuple[Any, None]:
        return body(lo + i, state), None

    return run(Chain(step, check=same_form(body, "its state was")), init, max(hi - lo, 0), checkpoint)[0]


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    *,
    dim: int = 0,
    reverse: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[Any, Any]:
    """The final carry and the stacked y of ``carry, y = f(carry, x)`` for the slices x of xs.

    Args:
        f: (carry, x) -> (carry, y); the carry keeps its pytree structure, shapes and dtypes, y is any pytree.
        init: the first carry, a pytree.
        xs: a pytree of tensors of one length along ``dim``, at least 1.
        dim: along which xs is cut and the y are stacked.
        reverse: from the last slice to the first; y stay at the places of their x.
        checkpoint: as for ``fori_loop``.

    Returns: (carry, ys). Raises: TypeError, ValueError as ``fori_loop``, and for lengths that differ or are 0.
    Complexity: one call of f per slice.

    Example:
        >>> so.scan(lambda s, x: (s + x, s * x), torch.tensor(0.0), torch.tensor([1.0, 2.0, 3.0]))
        (tensor(6.), tensor([0., 2., 9.]))
    """
    check_callable(f, "f")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    leaves, spec = flatten(xs)
    if not leaves or not all(isinstance(x, Tensor) and x.ndim for x in leaves):
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
        raise TypeError(f"xs must be a pytree of tensors with a dim to scan, got {found}")
    lengths = {x.shape[dim] for x in leaves}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"xs has length {sorted(lengths)} along dim {dim}, expected one length of at least 1")
    feeds = [list(slices) for slices in zip(*(x.unbind(dim) for x in leaves), strict=True)]
    name = name_of(f)

    def step(i: int, carry: Any, feed: list[Tensor]) -> tuple[Any, Any]:
        found = f(carry, unflatten(feed, spec))
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(f"{name} must return (carry, y), got {type(found).__name__}")
        return found

    chain = Chain(step, feeds[::-1] if reverse else feeds, check=same_form(f, "its carry was"))
    carry, ys = run(chain, init, len(feeds), checkpoint)
    rows = []
    for y in ys:
        check_same(y, ys[0], name, "as the first y", numbers=False)
        rows.append(flatten(y)[0])
    columns = zip(*(rows[::-1] if reverse else rows), strict=True)
    stacked = [torch.stack([torch.as_tensor(leaf) for leaf in column], dim) for column in columns]
    return carry, unflatten(stacked, flatten(ys[0])[1])
