"""The pieces of examples/learn_a_program.py, and that a short run does what is claimed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
import learn_a_program as example

import smoothops as so


def test_payments_are_those_of_the_ordinary_function() -> None:
    data = example.make_data(50, 0.0, 0)
    for income, children, paid in zip(*(column.tolist() for column in data), strict=True):
        assert paid == pytest.approx(example.tax(income, children, *example.column(0).tolist()), abs=1e-12)


def test_a_limit_has_a_gradient_only_when_soft() -> None:
    data = example.make_data(200, 0.0, 0)
    constants = example.column(1).requires_grad_()
    for program, wanted in ((so.soften(smoothing=3.0)(example.tax), True), (so.soften(example.tax).hard, False)):
        (gradient,) = torch.autograd.grad(example.cost(program, data, constants), constants)
        assert bool(gradient[list(example.CONSTANTS).index("rich")] != 0) is wanted
        assert gradient.isfinite().all()


def test_a_short_run_beats_random_search() -> None:
    args = argparse.Namespace(people=400, noise=0.3, stages=6)
    fits = example.run(0, args)
    assert fits["random"].runs == fits["soft"].runs
    assert example.left(fits["soft"]).max() < 0.2
    assert example.left(fits["random"]).max() > 0.5
    assert example.left(fits["hard"]).max() > 0.9
    assert all(name in example.table({0: fits}) for name in example.CONSTANTS)


def test_the_figure_is_written(tmp_path: Path) -> None:
    out = tmp_path / "there" / "figure.png"
    arguments = ["--people", "60", "--stages", "2", "--seeds", "0", "--out", str(out)]
    assert example.main(arguments) == 0
    assert out.stat().st_size > 1000
