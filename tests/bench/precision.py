"""float32 against float64 on the same input: writes the tables of docs/precision.md.

Run as ``python tests/bench/precision.py``. Errors are the largest absolute difference over the largest absolute entry,
for the values and for the gradient of a weighted sum with fixed random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import smoothops as so

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
STRENGTHS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e8)
PAGE = Path(__file__).parents[2] / "docs" / "precision.md"
BOUND = 1e-5

OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rank Quadratic": lambda x, e: so.rank(x, smoothing=so.Quadratic(e)),
    "rank Laplace": lambda x, e: so.rank(x, smoothing=so.Laplace(e)),
    "rank Entropy": lambda x, e: so.rank(x, smoothing=so.Entropy(e)),
    "sort Quadratic": lambda x, e: so.sort(x, smoothing=so.Quadratic(e)),
    "sort Entropy": lambda x, e: so.sort(x, smoothing=so.Entropy(e)),
    "argmax Entropy": lambda x, e: so.argmax(x, -1, smoothing=so.Entropy(e)),
    "argmax Quadratic": lambda x, e: so.argmax(x, -1, smoothing=so.Quadratic(e)),
    "argmax Tsallis 1.5": lambda x, e: so.argmax(x, -1, smoothing=so.Tsallis(1.5, e)),
    "amax Entropy": lambda x, e: so.amax(x, -1, smoothing=so.Entropy(e)),
    "topk_mask Quadratic": lambda x, e: so.topk_mask(x, x.shape[-1] // 10, smoothing=so.Quadratic(e)),
    "topk_mask Entropy": lambda x, e: so.topk_mask(x, x.shape[-1] // 10, smoothing=so.Entropy(e)),
    "topk_mask BinaryEntropy": lambda x, e: so.topk_mask(x, x.shape[-1] // 10, smoothing=so.BinaryEntropy(e)),
    "topk_mask Laplace": lambda x, e: so.topk_mask(x, x.shape[-1] // 10, smoothing=so.Laplace(e)),
}


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; where b lies below the range of float32, 0 if a is 0 too, else 1."""
    scale = b.abs().max()
    if scale < torch.finfo(torch.float32).tiny:  # no float32 has this size: the right answer is 0
        return float(a.abs().max() > torch.finfo(torch.float32).tiny)
    return float((a.double() - b).abs().max() / scale)


def errors(f: Callable[[Tensor, float], Tensor], n: int, eps: float) -> tuple[float, float]:
    """Relative errors of the float32 value and gradient."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator)
    weights = torch.randn(n, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = f(leaf, eps)
        w = weights[: y.numel()].reshape(y.shape).to(dtype)
        (gradient,) = torch.autograd.grad(y, leaf, w)
        results.append((y.detach(), gradient))
    (y32, g32), (y64, g64) = results
    return relative(y32, y64), relative(g32, g64)


def table(
    kind: int, measured: dict[tuple[str, int, float], tuple[float, float]], sizes: tuple[int, ...], by_size: bool
) -> list[str]:
    """A markdown table: for each operator and n, the largest error over all strengths; or the other way round."""
    heads = [f"n = {n:.0e}".replace("e+0", "e") for n in sizes] if by_size else [f"eps = {e:g}" for e in STRENGTHS]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in OPERATORS:
        if by_size:
            cells = [max(measured[name, n, e][kind] for e in STRENGTHS) for n in sizes]
        else:
            cells = [max(measured[name, n, e][kind] for n in sizes) for e in STRENGTHS]
        lines.append(f"| {name} | " + " | ".join(f"{c:.1e}" for c in cells) + " |")
    return lines


def main(sizes: tuple[int, ...] = SIZES) -> None:
    measured = {}
    for name, f in OPERATORS.items():
        for n in sizes:
            for eps in STRENGTHS:
                measured[name, n, eps] = errors(f, n, eps)
        print(name, max(max(measured[name, n, e]) for n in sizes for e in STRENGTHS), flush=True)
    worst = max(max(v) for v in measured.values())
    text = [
        "# Precision",
        "",
        "All inner arithmetic is float64 and is rounded once, at the end. The tables give the error of float32 against",
        "float64 on the same standard normal input, as max |difference| / max |entry|, the largest over",
        "eps = " + ", ".join(f"{e:.0e}" for e in STRENGTHS) + ". `topk_mask` uses k = n/10; gradients are those of a",
        "sum with random weights.",
        f"Largest of all: {worst:.1e}. The library's own bound is {BOUND:.0e}.",
        "",
        *(
            line
            for by_size in (True, False)
            for kind, title in enumerate(("Values", "Gradients"))
            for line in (
                f"{title} by {'length' if by_size else 'strength'}",
                "",
                *table(kind, measured, sizes, by_size),
                "",
            )
        ),
        "",
        "A gradient that lies below the range of float32 altogether (a hard regime: 1e-112, say) counts as 0.",
        "Written by `python tests/bench/precision.py`.",
        "",
    ]
    PAGE.write_text("\n".join(text))
    if worst > BOUND:
        sys.exit(f"an error of {worst:.1e} exceeds {BOUND:.0e}")


if __name__ == "__main__":
    main()
