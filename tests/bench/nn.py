"""Times sparse attention against torch's and against entmax's weights: ``python -m tests.bench.nn [--quick]``.

Forward and backward of a self-attention layer of 4 heads and 64 features on one thread, in float32, weights returned.
The peer's row is the same layer with the weights of the package entmax. All take turns in one process; a time is a
median over the turns, a ratio the median of the ratios to torch's within a turn.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import smoothops as so
from smoothops.nn import attention

SIZE, HEADS = 64, 4


def peers() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The weights of the package entmax, where it is installed."""
    try:
        import entmax
    except ImportError:
        print("entmax is not installed: its rows are missing")
        return {}
    return {"entmax: sparsemax": entmax.sparsemax, "entmax: entmax15": entmax.entmax15}


class Peer(so.nn.SparseAttention):
    """The layer with somebody else's weights."""

    def __init__(self, weights: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(SIZE, HEADS, batch_first=True)
        self.weights = weights

    def forward(self, *args: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
        ours = attention.argmax
        attention.argmax = lambda scores, dim, smoothing: self.weights(scores, dim)  # type: ignore[assignment]
        try:
            return super().forward(*args, **options)
        finally:
            attention.argmax = ours


def contestants() -> dict[str, nn.Module]:
    def ours(smoothing: so.Smoothing) -> nn.Module:
        return so.nn.SparseAttention(SIZE, HEADS, batch_first=True, smoothing=smoothing)

    return {
        "torch: MultiheadAttention": nn.MultiheadAttention(SIZE, HEADS, batch_first=True),
        "smoothops: Quadratic (sparsemax)": ours(so.Quadratic(1.0)),
        "smoothops: Tsallis 1.5 (entmax)": ours(so.Tsallis(1.5, 1.0)),
        "smoothops: Entropy (softmax)": ours(so.Entropy(1.0)),
        **{name: Peer(weights) for name, weights in peers().items()},
    }


def seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x, x, x)[0].square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences, fewer turns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths, turns = ((32, 64), 5) if args.quick else ((64, 256, 512), 9)
    layers = contestants()
    columns: dict[str, list[str]] = {name: [] for name in layers}
    for length in lengths:
        x = torch.randn(8, length, SIZE, requires_grad=True)
        for layer in layers.values():
            seconds(layer, x)
        spent = [{name: seconds(layer, x) for name, layer in layers.items()} for _ in range(turns)]
        base = next(iter(layers))
        for name in layers:
            took = statistics.median(turn[name] for turn in spent)
            ratio = statistics.median(turn[name] / turn[base] for turn in spent)
            columns[name].append(f"{1000 * took:.3g} ms, {ratio:.2g}")
    print(f"\n{datetime.date.today()}, {platform.machine()}, 1 thread, torch {torch.__version__}; ratios to torch's\n")
    print("| 8 sequences of length | " + " | ".join(map(str, lengths)) + " |")
    print("|---|" + "---:|" * len(lengths))
    for name, cells in columns.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
