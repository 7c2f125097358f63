"""The pieces of examples/label_ranking.py, and what it claims on the smaller sets."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import label_ranking as example

import smoothops as so


def toy(samples: int = 60, labels: int = 4) -> example.Data:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, samples, 3, generator=generator)
    scores = features @ torch.randn(3, labels, generator=generator) + torch.randn(labels, generator=generator)
    ones = torch.ones_like(features[..., :1])
    return example.Data(torch.cat([features, ones], -1), so.rank(scores, smoothing=so.Hard()))


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", example.SETS)
def test_targets_are_ranks_and_features_are_standardized(name):
    data = example.SETS[name]()
    labels = data.ranks.shape[1]
    torch.testing.assert_close(data.ranks.sum(1), torch.full_like(data.ranks[:, 0], labels * (labels + 1) / 2))
    assert data.ranks.min() >= 1
    assert data.ranks.max() <= labels
    assert (data.features[:, -1] == 1).all()
    assert data.features[:, :-1].mean(0).abs().max() < 1e-5
    torch.testing.assert_close(data.features[:, :-1].std(0, correction=0), torch.ones_like(data.features[0, :-1]))
    assert data.ranks.std(0).min() > 0, "no label always has the same rank"


def test_the_first_class_is_mostly_the_one_of_the_sample_and_labels_are_no_features():
    classes = torch.tensor(example.load_iris().target)
    assert (example.SETS["iris"]().ranks.argmax(1) == classes).float().mean() > 0.9
    features = example.standardized(example.load_wine().data)
    data = example.SETS["wine, features"]()
    assert data.features.shape[1] - 1 + data.ranks.shape[1] == features.shape[1]
    highest = features[:, 2::3].argmax(1)
    assert np.array_equal(data.ranks.argmax(1).numpy(), highest)


def test_the_parts_of_each_split_are_disjoint_and_every_sample_is_tested_once_a_seed():
    numbers = torch.arange(52.0).unsqueeze(1)
    splits = example.make_splits(example.Data(numbers, numbers), [0, 1])
    assert [tuple(part.ranks.shape) for part in splits] == [(10, 30, 1), (10, 10, 1), (10, 10, 1)]
    for parts in zip(*(part.ranks for part in splits), strict=True):
        assert len(set(torch.cat(parts).flatten().tolist())) == 50
    assert len(set(splits.test.ranks[:5].flatten().tolist())) == 50
    assert not torch.equal(splits.test.ranks[:5], splits.test.ranks[5:])


# --- methods ----------------------------------------------------------------------------------------------------------


def test_least_squares_is_the_minimum_of_its_objective():
    data, penalties = toy(), torch.tensor([0.01, 0.5])
    weights = example.least_squares(data, penalties).requires_grad_()
    misfit = (data.features.unsqueeze(1) @ weights - data.ranks.unsqueeze(1)).square().sum(-1).mean(-1)
    objective = misfit + penalties * weights[..., :-1, :].square().sum((-2, -1))
    (gradient,) = torch.autograd.grad(objective.sum(), weights)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_soft_squares_forgives_what_is_far_ahead_and_nothing_else():
    ranks = torch.tensor([1.0, 2.0, 3.0])
    for smoothing in (so.Quadratic(1.0), so.Entropy(1.0)):
        loss = example.soft_squares(smoothing)
        assert loss(torch.tensor([-50.0, 0.0, 50.0]), ranks).item() == pytest.approx(0, abs=1e-6)
        assert loss(torch.tensor([0.0, 50.0, -50.0]), ranks).item() == pytest.approx(6, abs=1e-4)
    near = torch.tensor([1.6, 2.0, 2.4])  # in the permutahedron: the ranks are the scores themselves
    expected = (near - ranks).square().sum()
    torch.testing.assert_close(example.soft_squares(so.Quadratic(1.0))(near, ranks), expected)


def test_training_of_one_penalty_does_not_depend_on_the_others():
    data, loss = toy(), example.soft_squares(so.Quadratic(1.0))
    both = example.train(data, torch.tensor([0.001, 0.1]), loss, 15)
    alone = example.train(data, torch.tensor([0.1]), loss, 15)
    torch.testing.assert_close(both[:, 1:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", example.METHODS)
def test_every_method_has_fourteen_options_and_learns_a_linear_order(name):
    data = toy()
    weights = example.METHODS[name](data, 60)
    assert weights.shape == (2, 14, 4, 4)
    assert example.spearman(weights, data).amax(1).min() > 0.85


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iris", "breast cancer"])
def test_soft_ranks_are_ahead_of_least_squares(name, monkeypatch):
    monkeypatch.setattr(example, "METHODS", {n: example.METHODS[n] for n in ("soft", "squares")})
    scores = example.run(example.SETS[name](), [0], 60, lambda: None)
    assert example.gains(scores)[0] > 0.003


def test_claims_count_seeds_and_sets():
    results = {
        "won": {"soft": [0.9, 0.8], "squares": [0.7, 0.7]},
        "lost": {"soft": [0.5, 0.5], "squares": [0.51, 0.55]},
    }
    mean, wins, worst = example.claims(results)
    assert mean == pytest.approx(0.025)
    assert wins == 1
    assert worst == pytest.approx(-0.03)


def test_main_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    assert example.main(["--sets", "iris", "wine", "--steps", "3", "--seeds", "3", "4", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("iris", "wine", "soft - squares", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("ours", "code", "word"), [(0.75, 0, "passed"), (0.69, 1, "FAILED")])
def test_main_fails_if_the_default_experiment_is_not_won(ours, code, word, capsys, monkeypatch, tmp_path):
    scores = {"soft": [ours] * 3, "squares": [0.7] * 3, "likelihood": [0.7] * 3}
    monkeypatch.setattr(example, "run", lambda *args: scores)
    assert example.main(["--out", str(tmp_path / "figure.png")]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(word)
