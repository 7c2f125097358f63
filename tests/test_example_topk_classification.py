"""The pieces of examples/topk_classification.py, and what it claims on one seed."""

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import topk_classification as example


def option(value: float) -> torch.Tensor:
    return torch.tensor(value).view(1, 1)


# --- data -------------------------------------------------------------------------------------------------------------


def test_noise_has_the_share_asked_for_is_never_the_label_and_stays_where_it_should():
    bunch = example.load_digits()
    images, labels = torch.tensor(bunch.data / 16).float(), torch.tensor(bunch.target)
    for name, (wrong, share) in example.NOISES.items():
        found = wrong(images, labels, torch.Generator().manual_seed(0))
        assert (found != labels).all(), name
        data = example.make_data([0, 1], name)
        clean = example.make_data([0, 1], "none")
        assert torch.equal(data.test.labels, clean.test.labels), name
        assert torch.equal(data.train.images, clean.train.images), name
        for noisy, right in ((data.train, clean.train), (data.validation, clean.validation)):
            assert (noisy.labels != right.labels).float().mean().item() == pytest.approx(share, abs=0.05), name
    targets = example.confusable(images, labels, torch.Generator().manual_seed(0))
    assert all(len(targets[labels == digit].unique()) == 2 for digit in range(10))
    five = example.grouped(images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(five // 5, labels // 5)
    assert len(five[labels == 3].unique()) == 4


def test_the_parts_are_disjoint_and_change_with_the_seed():
    data = example.make_data([0, 1], "none")
    assert [tuple(part.labels.shape) for part in data] == [(2, 800), (2, 400), (2, 597)]
    total = sum(part.images.double().sum((1, 2)) for part in data)
    whole = torch.tensor(example.load_digits().data / 16).sum()
    torch.testing.assert_close(total, whole.expand(2), rtol=1e-6, atol=0)
    assert not torch.equal(data.test.labels[0], data.test.labels[1])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_top_k_loss_by_hand_where_the_scores_are_far_apart():
    scores, eps = torch.arange(10.0).unsqueeze(0) * 100, option(0.3)
    costs = [example.top_k(scores, torch.tensor([label]), eps).item() for label in range(10)]
    assert costs[9] == pytest.approx(0, abs=1e-6)
    assert costs[5:9] == pytest.approx([math.log(2)] * 4, abs=1e-6)
    assert min(costs[:5]) > 10
    even = example.top_k(torch.zeros(1, 10), torch.tensor([3]), eps)
    torch.testing.assert_close(even, -torch.tensor([0.5 * 0.1 + 0.5 * 0.5]).log())


def test_the_gradient_of_the_top_k_loss_and_its_options_side_by_side():
    scores = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels, eps = torch.tensor([1, 4, 9]), torch.tensor([0.3, 1.0], dtype=torch.float64).view(-1, 1, 1)
    assert torch.autograd.gradcheck(lambda x: example.top_k(x, labels, eps[0]), scores)
    both = example.top_k(scores.expand(2, 3, 10), labels.expand(2, 3), eps)
    for index in range(2):
        torch.testing.assert_close(both[index], example.top_k(scores, labels, eps[index]))


def test_cross_entropy_and_label_smoothing_are_those_of_torch():
    scores = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 9, 9, 2])
    reference = torch.nn.functional.cross_entropy
    expected = reference(0.3 * scores, labels, reduction="none")
    torch.testing.assert_close(example.cross_entropy(scores, labels, option(0.3)), expected)
    expected = reference(scores, labels, reduction="none", label_smoothing=0.4)
    torch.testing.assert_close(example.smoothed(scores, labels, option(0.4)), expected)


def test_every_loss_chooses_between_as_many_options():
    assert {len(options) for _, options in example.LOSSES.values()} == {3}


# --- training ---------------------------------------------------------------------------------------------------------


def test_hits_by_hand():
    scores = torch.arange(10.0).expand(1, 1, 4, 10)
    found = example.hits(scores, torch.tensor([[9, 8, 5, 4]]))
    torch.testing.assert_close(found, torch.tensor([[[0.25, 0.75]]]))


def test_networks_of_other_options_change_nothing():
    data, loss = example.make_data([0], "none"), example.cross_entropy
    both = example.fit(loss, (0.3, 1.0), 0.01, data, 10)
    again = example.fit(loss, (0.3, 1.0), 0.01, data, 10)
    assert all(torch.equal(*pair) for pair in zip(both, again, strict=True))
    changed = example.fit(loss, (0.3, 3.0), 0.01, data, 10)
    torch.testing.assert_close(changed[1][0], both[1][0])


@pytest.mark.parametrize("name", example.LOSSES)
def test_a_short_training_learns(name):
    loss, options = example.LOSSES[name]
    seen, accuracy = example.fit(loss, options, 0.03, example.make_data([0], "none"), 60)
    assert seen.shape == (3, 1)
    assert accuracy.shape == (3, 1, 2)
    assert accuracy[..., 0].max() > 0.8
    assert (accuracy[..., 1] >= accuracy[..., 0]).all()


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_top_k_loss_is_ahead_with_confusable_labels(monkeypatch):
    monkeypatch.setattr(example, "RATES", (0.003, 0.01))
    monkeypatch.setattr(example, "LOSSES", {n: example.LOSSES[n] for n in ("top-k", "cross-entropy")})
    results = {"confusable 45 %": example.run("confusable 45 %", [0], 200, lambda: None)}
    assert example.lead(results, "confusable 45 %", "cross-entropy") > 0.01


def test_main_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    assert example.main(["--noises", "none", "--steps", "2", "--seeds", "3", "4", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("top-k", "label smoothing", "seeds 3 4", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("ours", "code", "word"), [(0.9, 0, "passed"), (0.805, 1, "FAILED")])
def test_main_fails_if_the_default_experiment_is_not_won(ours, code, word, capsys, monkeypatch, tmp_path):
    def measured(noise, seeds, steps, advance):
        return {n: torch.full((len(seeds), 2), ours if n == "top-k" else 0.8) for n in example.LOSSES}

    monkeypatch.setattr(example, "run", measured)
    assert example.main(["--out", str(tmp_path / "figure.png")]) == code
    assert capsys.readouterr().out.splitlines()[-1] == word
