"""The pieces of examples/robust_regression.py, and what it claims on a few splits."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import robust_regression as example

import smoothops as so


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", example.ERRORS)
def test_the_share_of_wrong_targets_is_that_asked_for_and_test_rows_are_clean(error):
    clean, split = (example.make_split(3, 1, error, share) for share in (0.0, 0.3))
    assert not clean.wrong.any()
    assert int(split.wrong.sum()) == round(0.3 * len(split.wrong))
    assert [len(part.targets) for part in split[:3]] == [264, 88, 88]

    def joined(parts):  # in the unit of the clean targets: both are affine images of it
        return torch.cat([part.targets for part in parts])

    scale = torch.linalg.lstsq(
        torch.stack([split.test.targets, torch.ones(88)], 1), clean.test.targets.unsqueeze(-1)
    ).solution.flatten()
    moved = scale[0] * joined(split[:2]) + scale[1] - joined(clean[:2])
    torch.testing.assert_close(scale[0] * split.test.targets + scale[1], clean.test.targets)
    assert int((moved.abs() > 1e-9).sum()) == round(0.3 * 264) + round(0.3 * 88)
    assert torch.equal(moved[:264].abs() > 1e-9, split.wrong)
    if error == "one-sided":
        assert moved.min() > -1e-9


def test_every_patient_is_tested_once_by_the_five_splits():
    rows = [example.make_split(0, fold, "wide", 0.2).test.features for fold in range(example.FOLDS)]
    parts = torch.cat([features[:, 1] + 1e-3 * features[:, 2] for features in rows])  # columns of a few values each
    assert len(parts) == 440
    assert all(features.shape == (88, 11) for features in rows)
    assert not torch.equal(rows[0], example.make_split(1, 0, "wide", 0.2).test.features)


# --- the objective and its optimizer ----------------------------------------------------------------------------------


def test_the_weights_are_the_gradient_of_the_soft_sum_of_the_smallest_losses():
    losses = torch.rand(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    smoothing = so.Quadratic(0.3)
    value = -so.CappedSimplex(12).max(-losses, smoothing)
    (gradient,) = torch.autograd.grad(value.sum(), losses)
    weights = so.topk_mask(losses, 12, largest=False, smoothing=smoothing)
    torch.testing.assert_close(gradient, weights)
    small = so.CappedSimplex(12).max(-losses, so.Quadratic(1e-9))
    torch.testing.assert_close(-small, losses.sort(-1).values[:, :12].sum(-1))


def test_every_step_lowers_the_objective_and_the_ends_are_least_squares_and_trimmed_squares():
    rows = example.make_split(0, 0, "one-sided", 0.2).train
    size = len(rows.targets)

    def objective(weights: torch.Tensor) -> float:
        losses = example.losses(rows, example.least_squares(rows, weights))
        return -so.CappedSimplex(0.7 * size).max(-losses, so.Quadratic(1.0)).item()

    weights, kept, values = torch.ones(1, size, dtype=torch.float64), column(0.7 * size), []
    for _ in range(8):
        weights = example.concentrate(rows, weights, kept, column(1.0), 1)
        values.append(objective(weights))
    assert all(after <= before + 1e-9 for before, after in pairwise(values))
    assert values[-1] < values[0]
    even = example.concentrate(rows, torch.ones(1, size, dtype=torch.float64), kept, column(1e9), 1)
    torch.testing.assert_close(even, torch.full_like(even, 0.7), atol=1e-4, rtol=0)
    plain = torch.linalg.lstsq(rows.features, rows.targets.unsqueeze(-1)).solution.mT
    torch.testing.assert_close(example.least_squares(rows, even), plain, atol=1e-4, rtol=0)
    hard = example.concentrate(rows, even, kept.round(), None, 1)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    smallest = example.losses(rows, plain).topk(round(0.7 * size), largest=False).indices
    assert hard[0, smallest[0]].all()


def test_annealing_ends_with_the_wrong_rows_almost_without_weight():
    split = example.make_split(0, 0, "one-sided", 0.3)
    *_, weights = example.anneal(split.train, column(0.7 * 264), column(0.5))
    assert weights[0, split.wrong].mean() < 0.1 < 0.8 < weights[0, ~split.wrong].mean()


def test_random_starts_find_at_least_as_small_a_trimmed_loss():
    rows, share = example.make_split(0, 0, "one-sided", 0.4).train, column(0.5, 0.75)

    def trimmed(coefficients: torch.Tensor) -> torch.Tensor:
        ordered = example.losses(rows, coefficients).sort(-1).values
        return torch.stack([ordered[0, :132].sum(), ordered[1, :198].sum()])

    starts, one = example.fast_lts(rows, share), example.hard_trimmed(rows, share)
    assert starts.shape == one.shape == (2, 11)
    assert (trimmed(starts) <= trimmed(one) + 1.0).all()
    assert trimmed(starts).sum() <= trimmed(one).sum()


@pytest.mark.parametrize("name", example.METHODS)
def test_every_method_has_six_options_and_fits_clean_rows(name):
    split = example.make_split(0, 0, "wide", 0.0)
    found = example.METHODS[name](split.train)
    assert found.shape == (6, 11)
    best = max(example.r_squared(split.test, coefficients) for coefficients in found)
    assert best > 0.3


# --- what is measured -------------------------------------------------------------------------------------------------


def test_r_squared_and_spread_by_hand():
    rows = example.Rows(torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([0.0, 1.0, 5.0]))
    assert example.r_squared(rows, torch.tensor([2.0])) == pytest.approx(0.0)
    residuals = torch.tensor([[1.0, -1.0, 1.0, -1.0, 100.0]])
    torch.testing.assert_close(example.spread(residuals), torch.tensor([(4 + (2 * 1.4826) ** 2) / 5]))


def test_lead_is_of_the_worst_seed():
    results = {}
    for seed, gap in ((0, 0.2), (1, 0.1)):
        for error in example.ERRORS:
            for share in example.SHARES:
                results[seed, error, share] = dict.fromkeys(example.METHODS, 0.3) | {"soft": 0.3 + gap}
    assert example.lead(results, "wide", (0.1, 0.2), "huber") == pytest.approx(0.1)
    assert all(value == pytest.approx(0.1) for value, _ in example.claims(results).values())


# --- claims -----------------------------------------------------------------------------------------------------------


def test_trimming_is_ahead_at_30_percent_and_not_behind_without_errors(monkeypatch):
    monkeypatch.setattr(example, "METHODS", {n: example.METHODS[n] for n in ("soft", *example.BASELINES)})
    wrong = [example.run(0, "one-sided", 0.3, fold) for fold in (0, 1)]
    clean = [example.run(0, "wide", 0.0, fold) for fold in (0, 1)]
    mean = {name: sum(scores[name] for scores in wrong) / 2 for name in wrong[0]}
    for name in example.BASELINES:
        assert mean["soft"] > mean[name] + 0.05, name
    assert sum(scores["soft"] - scores["squares"] for scores in clean) / 2 > -0.05


def test_main_prints_the_table_and_writes_the_figure(tmp_path, capsys, monkeypatch):
    quick = ("soft", "hard", "squares", "huber")
    monkeypatch.setattr(example, "METHODS", {name: example.METHODS[name] for name in quick})
    monkeypatch.setattr(example, "LABELS", {name: example.LABELS[name] for name in quick})
    monkeypatch.setattr(example, "SHARES", (0.0, 0.3))
    figure = tmp_path / "new" / "figure.png"
    assert example.main(["--seeds", "4", "--folds", "1", "--processes", "1", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "soft trimmed squares (ours)" in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("ours", "code", "word"), [(0.6, 0, "passed"), (0.1, 1, "FAILED")])
def test_main_fails_if_the_default_experiment_is_not_won(ours, code, word, capsys, monkeypatch, tmp_path):
    def measured(seeds, folds, processes):
        scores = dict.fromkeys(example.METHODS, 0.3) | {"soft": ours}
        return {(seed, error, share): scores for seed in seeds for error in example.ERRORS for share in example.SHARES}

    monkeypatch.setattr(example, "experiment", measured)
    assert example.main(["--out", str(tmp_path / "figure.png")]) == code
    assert capsys.readouterr().out.splitlines()[-1] == word
