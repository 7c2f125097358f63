"""The pieces of examples/shortest_path.py, and that a short run learns."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
import shortest_path as example

TRUTH = torch.tensor(list(example.KINDS.values()), dtype=torch.float64)


def test_paths_are_the_best_of_all_monotone_ones_or_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SIDE", 3)
    data = example.make_data(20, 0)
    costs = TRUTH[data.kinds]
    found = (costs * data.paths).sum((-2, -1))
    for cost, path, value in zip(costs, data.paths, found, strict=True):
        assert ((path >= 0) & (path <= 1)).all()  # ties are shared
        assert path[0, 0] == path[-1, -1] == 1
        best = min(walk(cost, downs) for downs in combinations(range(4), 2))
        assert value <= best + 1e-12
        assert value == pytest.approx(example.bellman_ford(cost.tolist()))


def walk(cost: torch.Tensor, downs: tuple[int, ...]) -> float:
    i, j, total = 0, 0, float(cost[0, 0])
    for step in range(4):
        i, j = (i + 1, j) if step in downs else (i, j + 1)
        total += float(cost[i, j])
    return total


def test_a_short_run_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SIDE", 4)
    monkeypatch.setattr(example, "SWEEPS", 6)
    costs = example.fit(example.make_data(60, 0), 12, True)
    assert costs[0] == 1
    assert (costs[1:] > costs[:-1]).all()
    assert example.accuracy(costs, example.make_data(100, 1)) > 0.8


def test_the_figure_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SIDE", 3)
    out = tmp_path / "there" / "figure.png"
    assert example.main(["--maps", "5", "--steps", "1", "--seeds", "0", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
