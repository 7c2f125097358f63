"""The pieces of examples/sort_digits.py: what is drawn, what is measured, and that a short run learns and reports."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import sort_digits

import smoothops as so


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def job(name: str, **changes) -> sort_digits.Job:
    return sort_digits.Job(name, sort_digits.METHODS[name], 0, **{"sets": 50, "steps": 60, **changes})


# --- data -------------------------------------------------------------------------------------------------------------


def test_split_is_a_partition_and_new_for_each_seed():
    parts = sort_digits.split(1797, generator(0))
    assert [len(part) for part in parts] == [1078, 359, 360]
    assert torch.equal(torch.cat(parts).msort(), torch.arange(1797))
    assert not torch.equal(parts[0], sort_digits.split(1797, generator(1))[0])


def test_images_of_the_three_kinds_of_sets_are_disjoint():
    train, validation, tests = sort_digits.make_data(0, 2, 5, 200)
    kinds = [train, validation, *tests.values()]
    seen = [{row.numpy().tobytes() for row in sets.images.reshape(-1, 64)} for sets in kinds]
    assert all(len(images) > 300 for images in seen)
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & set().union(*seen[2:])


def test_every_image_of_the_digit_asked_for_is_drawn_and_no_other():
    labels = torch.tensor([3, 1, 3, 0, 1, 3])
    images = torch.arange(6.0).unsqueeze(-1).expand(6, 64)
    drawn = sort_digits.draw_images(images, labels, torch.tensor([[3, 1, 0]]).expand(200, 3), generator())[..., 0]
    assert [sorted(set(column.tolist())) for column in drawn.T] == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize(("digits", "n"), [(1, 5), (1, 9), (2, 3), (2, 9), (3, 7)])
def test_numbers_are_distinct_and_inside_their_window(digits, n):
    numbers, window = sort_digits.draw_numbers(500, n, digits, generator())
    first, width = window.unsqueeze(-1).unbind(1)
    top = 10**digits
    assert numbers.shape == (500, n)
    assert all(len(set(row)) == n for row in numbers.tolist())
    assert ((numbers >= first) & (numbers < first + width)).all()
    assert ((first >= 0) & (first + width <= top)).all()
    assert ((width >= min(max(10, 2 * n), top)) & (width <= top)).all()


def test_windows_are_log_uniform_and_numbers_fill_them():
    numbers, window = sort_digits.draw_numbers(20000, 5, 2, generator())
    first, width = window.unbind(-1)
    below = (width < 31.6).double().mean().item()  # half way from 10 to 100 in the logarithm
    assert abs(below - 0.5) < 0.02
    place = (numbers - first.unsqueeze(-1) + 0.5) / width.unsqueeze(-1)
    assert abs(place.mean().item() - 0.5) < 0.01
    assert (place.mean(0) - 0.5).abs().max() < 0.02, "the order of a set tells nothing"


def test_sets_carry_the_digits_and_ranks_of_their_numbers():
    labels = torch.arange(10).repeat(3)
    images = labels.float().unsqueeze(-1).expand(30, 64)  # each pixel says the digit
    sets = sort_digits.draw_sets(images, labels, 100, 5, 3, generator())
    assert sets.images.shape == (100, 5, 3, 64)
    assert torch.equal(sets.images[..., 7], sets.digits.float())
    for digits, ranks in zip(sets.digits.tolist(), sets.ranks.tolist(), strict=True):
        values = [int("".join(map(str, number))) for number in digits]
        assert ranks == [1 + sum(other < value for other in values) for value in values]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_match_rates_agree_with_sorting_each_set():
    ranks = torch.rand(400, 4, generator=generator(1)).argsort(-1).argsort(-1) + 1.0
    scores = ranks + 0.8 * torch.randn(400, 4, generator=generator(2))
    exact = items = 0
    for row, true in zip(scores.tolist(), ranks.tolist(), strict=True):
        right = [sorted(row).index(score) + 1 == rank for score, rank in zip(row, true, strict=True)]
        exact, items = exact + all(right), items + sum(right)
    assert 0 < exact < 400
    assert sort_digits.match_rates(scores, ranks) == (exact / 400, items / 1600)


def test_a_tie_is_a_mistake():
    assert sort_digits.match_rates(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]])) == (0.0, 1 / 3)


def test_expected_number_of_certain_logits_is_the_number():
    digits = torch.tensor([[4, 2], [0, 7]])
    logits = 50 * torch.nn.functional.one_hot(digits, 10).float()
    torch.testing.assert_close(sort_digits.expected_number(logits), torch.tensor([42.0, 7.0]))


def test_fenchel_young_is_the_loss_whose_gradient_is_the_rank_error():
    scores = torch.randn(6, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    ranks = torch.rand(6, 5, generator=generator(1)).argsort(-1).argsort(-1) + 1.0
    sets, smoothing = sort_digits.Sets(None, None, ranks.double()), so.Quadratic(0.3)
    loss = sort_digits.fenchel_young(scores, sets, smoothing)
    expected = (so.rank(scores, smoothing=smoothing) - ranks).detach() / 6
    assert loss > 0
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], expected)
    done = sort_digits.fenchel_young(ranks.double(), sets, smoothing)
    torch.testing.assert_close(done, torch.zeros_like(done))


def test_centred_regression_ignores_a_shift_of_a_set():
    sets = sort_digits.Sets(None, None, torch.tensor([[2.0, 1.0, 3.0]]))
    assert sort_digits.centred_regression(sets.ranks + 40, sets, None) == 0
    assert sort_digits.rank_regression(sets.ranks + 40, sets, None) == 1600


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sort_digits.METHODS)
def test_a_short_run_lowers_the_loss_and_can_be_repeated(name, monkeypatch):
    monkeypatch.setattr(sort_digits, "LOOK_EVERY", 20)
    monkeypatch.setattr(sort_digits, "EVALUATED", 100)
    first, again = sort_digits.run(job(name)), sort_digits.run(job(name))
    assert len(first.losses) == len(first.looks) == 3
    assert all(after < before for before, after in pairwise(first.losses))
    assert first == again
    assert len(first.shown) == sort_digits.SHOWN


def test_the_best_model_on_the_validation_sets_is_kept(monkeypatch):
    monkeypatch.setattr(sort_digits, "LOOK_EVERY", 10)
    monkeypatch.setattr(sort_digits, "EVALUATED", 100)
    task = job("squared", steps=80)
    train, validation, _ = sort_digits.make_data(task.seed, task.digits, task.n, task.sets)
    model, _, looks = sort_digits.fit(task, train, validation)
    with torch.no_grad():
        assert sort_digits.match_rates(model(validation.images), validation.ranks)[0] == max(looks)


def test_margins_pair_ours_with_each_baseline_seed_by_seed():
    rate = {"squared": (0.5, 0.6), "centred": (0.3, 0.7), "plain": (0.1, 0.2), "labels": (0.8, 0.9)}
    results = {
        name: [sort_digits.Result(job(name), {5: (exact, 1.0)}, [], [], []) for exact in rates]
        for name, rates in rate.items()
    }
    ahead = sort_digits.margins(results, 5)
    assert list(ahead) == [
        "soft rank, squared error over centred rank regression",
        "soft rank, squared error over rank regression",
    ]
    assert list(ahead.values()) == [pytest.approx([20, -10], abs=1e-4), pytest.approx([40, 40], abs=1e-4)]


def test_main_prints_the_tables_and_writes_the_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sort_digits, "EVALUATED", 100)
    figure = tmp_path / "new" / "figure.png"
    options = ["--steps", "60", "--sets", "50", "--seeds", "3", "4", "--workers", "1", "--loss", "squared"]
    assert sort_digits.main([*options, "--smoothing", "entropy:1", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in (
        "n = 9",
        "chance",
        "digit labels",
        "squared error over centred rank regression",
        "seed 4",
        str(figure),
    ):
        assert part in printed


@pytest.mark.parametrize(("ours", "code", "word"), [(0.5, 0, "passed"), (0.2, 1, "FAILED")])
def test_main_fails_if_the_default_experiment_is_not_won(ours, code, word, capsys, monkeypatch):
    exact = {"squared": ours, "fenchel-young": 0.5, "centred": 0.3, "plain": 0.1, "labels": 0.8}

    def measured(jobs, workers, threads):
        results = {name: [] for name in exact}
        for one in jobs:
            rates = dict.fromkeys(sort_digits.TEST_SIZES, (exact[one.name], 0.9))
            results[one.name].append(sort_digits.Result(one, rates, [], [], []))
        return results

    monkeypatch.setattr(sort_digits, "run_all", measured)
    monkeypatch.setattr(sort_digits, "draw", lambda results, path: None)
    assert sort_digits.main([]) == code
    assert word in capsys.readouterr().out.splitlines()[-1]
    assert sort_digits.main(["--steps", "7"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smoothing", "cubic:1"], "quadratic, entropy, laplace, mixing, straight-through"),
        (["--smoothing", "quadratic"], "invalid"),
        (["--smoothing", "straight-through:1"], "--loss squared"),
        (["--smoothing", "laplace:1"], "--loss squared"),
        (["--digits", "1", "--n", "11"], r"[2, 10]"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(options, message, capsys):
    with pytest.raises(SystemExit):
        sort_digits.main(options)
    assert message in capsys.readouterr().err
