"""The pieces of examples/quantile_regression.py: folds, closed forms, scores, and that a short run trains."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import quantile_regression as example

import smoothops as so

LEVELS, MAIN = example.LEVELS, example.MAIN


@pytest.fixture(scope="module")
def data():
    return example.make_splits(0, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(splits: int = 2, rows: int = 30) -> example.Rows:
    features = torch.randn(splits, rows, 10, generator=generator(), dtype=torch.float64)
    noise = torch.randn(splits, rows, generator=generator(1), dtype=torch.float64)
    return example.Rows(features, features[..., 0] - 0.5 * features[..., 1] + 0.3 * noise + 2)


# --- data -------------------------------------------------------------------------------------------------------------


def test_the_parts_of_each_split_are_disjoint_and_every_row_is_tested_once_a_repeat():
    train, validation, test = example.fold(442, 2, generator())
    assert [tuple(part.shape) for part in (train, validation, test)] == [(10, 264), (10, 88), (10, 88)]
    for parts in zip(train, validation, test, strict=True):
        assert len(set(torch.cat(parts).tolist())) == 440
    for repeat in range(2):
        tested, chosen = test[repeat::2].flatten(), validation[repeat::2].flatten()
        assert len(set(tested.tolist())) == 440
        assert torch.equal(tested.msort(), chosen.msort())
    assert not torch.equal(test, example.fold(442, 2, generator(1))[2])


def test_training_rows_are_standardized_and_no_patient_is_in_two_parts(data):
    for part in data.train:
        torch.testing.assert_close(part.mean(1), torch.zeros_like(part[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.std(1), torch.ones_like(part[:, 0]))
    for index in range(5):
        parts = [{row.numpy().tobytes() for row in rows.features[index]} for rows in data[:3]]
        assert [len(part) for part in parts] == [264, 88, 88]
        assert len(set.union(*parts)) == 440
    targets = data.test.targets * data.unit + data.level
    assert 20 < targets.min() < 40, "the unit of the data: 25 to 346"
    assert 300 < targets.max() < 350


# --- methods ----------------------------------------------------------------------------------------------------------


def test_leave_one_out_predictions_are_those_of_a_fit_without_the_row():
    rows = toy()
    model = example.Jackknife(rows, 0.1)
    with torch.no_grad():
        model.log_penalty.add_(torch.linspace(-1, 1, 10))
        coefficients, predictions = model.ridge()
        x, penalty = example.with_one(rows.features), torch.zeros(2, 11, dtype=torch.float64)
        penalty[:, :10] = 30 * model.log_penalty.exp()
    for split, row in ((0, 0), (1, 7), (1, 29)):
        keep = torch.arange(30) != row
        inputs, targets = x[split, keep], rows.targets[split, keep]
        by_hand = torch.linalg.solve(inputs.T @ inputs + penalty[split].diag(), inputs.T @ targets)
        torch.testing.assert_close(predictions[split, row], x[split, row] @ by_hand)
    ordinary = example.Jackknife(rows, 0.1, left_out=False)
    ordinary.load_state_dict(model.state_dict())
    torch.testing.assert_close(ordinary.ridge()[1], (x @ coefficients).squeeze(-1))


def test_the_width_is_the_distance_of_the_quantiles_times_the_mean_spread():
    model = example.Jackknife(toy(), 0.1, mixing=1.0)  # mixes nothing: the hard quantiles
    with torch.no_grad():
        model.growth.fill_(0.2)
        z, log_spread = model.residuals()
        torch.testing.assert_close(z * log_spread.exp() + log_spread / 0.2, model.train_rows.targets)
        low, high = torch.quantile(z, torch.tensor([0.05, 0.95], dtype=z.dtype), dim=1)
        torch.testing.assert_close(model.losses(), (high - low) * log_spread.exp().mean(1), rtol=1e-4, atol=0)


def test_intervals_are_nested_and_cover_the_leave_one_out_residuals():
    rows = toy(rows=200)
    model = example.Jackknife(rows, 0.1)
    with torch.no_grad():
        z = model.residuals()[0]
        low, high = model.intervals(rows.features)
    assert low.shape == high.shape == (2, 200, len(LEVELS))
    assert (low.diff(dim=-1) < 0).all()
    assert (high.diff(dim=-1) > 0).all()
    prediction = example.with_one(rows.features) @ model.ridge()[0].detach()
    inside = (z.unsqueeze(-1) >= (low - prediction)) & (z.unsqueeze(-1) <= (high - prediction))  # the spread is still 1
    torch.testing.assert_close(inside.double().mean(1), torch.tensor(LEVELS).double().expand(2, -1), atol=0.011, rtol=0)


def test_pinball_of_one_constant_is_least_at_the_quantile():
    rows = example.Rows(torch.zeros(1, 101, 10), torch.linspace(0, 1, 101).unsqueeze(0) ** 2)
    model = example.Pinball(rows, 0.0)
    best = torch.quantile(rows.targets[0], example.TAUS)

    def loss(constants: torch.Tensor) -> float:
        with torch.no_grad():
            model.weights[0, -1] = constants
            return model.losses().item()

    assert loss(best) < min(loss(best + 0.03), loss(best - 0.03))
    low, high = model.intervals(rows.features)
    assert low.shape == high.shape == (1, 101, len(LEVELS))


def test_gaussian_intervals_have_the_normal_reach():
    model = example.Gaussian(example.Rows(*(part.float() for part in toy())), 0.0)
    low, high = model.intervals(torch.zeros(2, 3, 10))
    torch.testing.assert_close((high - low)[0, 0, MAIN], torch.tensor(2 * 1.644854))
    assert model.losses().shape == (2,)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_interval_score_and_misses_by_hand():
    low, high = torch.zeros(1, 3, len(LEVELS)), torch.ones(1, 3, len(LEVELS))
    targets = torch.tensor([[0.5, 1.25, -0.1]])
    torch.testing.assert_close(example.outside(low, high, targets)[0, :, 0], torch.tensor([-0.5, 0.25, 0.1]))
    score = example.interval_score(low, high, targets)[0, MAIN]  # alpha = 0.1
    torch.testing.assert_close(score, torch.tensor(1 + 20 * 0.35 / 3))


def test_the_conformal_margin_is_the_corrected_order_statistic():
    bounds = torch.zeros(1, 88, len(LEVELS))
    targets = torch.randperm(88, generator=generator()).float().unsqueeze(0) + 1
    assert example.conformal_margin(bounds, bounds, targets).tolist() == [[81.0]]  # ceil(0.9 * 89) = 81
    assert example.conformal_margin(bounds[:, :5], bounds[:, :5], targets[:, :5]).shape == (1, 1)


def test_measure_counts_and_returns_to_the_unit_of_the_data(data):
    class Constant(torch.nn.Module):
        def intervals(self, features):
            ends = torch.ones(*features.shape[:2], len(LEVELS))
            return -ends, ends

    result = example.measure(Constant(), data)
    covered = (data.test.targets.abs() <= 1).double().mean().item()
    assert result.coverage == pytest.approx([100 * covered] * len(LEVELS))
    assert result.off_nominal == pytest.approx(
        100 * sum(abs(covered - level) for level in LEVELS) / len(LEVELS), rel=1e-5
    )
    assert result.width == pytest.approx(2 * data.unit.mean().item(), rel=1e-5)
    assert result.calibrated > 85
    torch.testing.assert_close(result.shown[1] - result.shown[0], 2 * data.unit[0].expand(88))


def results(ours: tuple[float, float], base: tuple[float, float]) -> example.Results:
    def result(coverage: float, score: float) -> example.Result:
        return example.Result([100 * coverage] * len(LEVELS), 0.0, 1.0, score, 90.0, 1.0, torch.zeros(3, 5))

    return {name: [result(*(ours if name == "ours" else base))] * 3 for name in example.METHODS}


def test_margins_are_of_distance_from_nominal_whichever_side():
    nearer, lower = example.margins(results((0.91, 200.0), (0.88, 203.0)), "pinball")
    assert nearer == pytest.approx([1.0] * 3)
    assert lower == [3.0] * 3


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", example.METHODS)
def test_a_short_training_improves_keeps_the_best_of_each_split_and_can_be_repeated(name, data):
    method, scores = example.METHODS[name], []
    for _ in range(2):
        model = method.make(data.train, method.strength)
        before = model.losses().mean().item()
        looks = example.fit(model, data.validation, 0.05, 30)
        with torch.no_grad():
            bounds = model.intervals(data.validation.features)
            scores.append(example.interval_score(*bounds, data.validation.targets)[:, MAIN].mean().item())
        assert model.losses().mean().item() < before
        assert scores[-1] <= min(looks) + 1e-6
    assert scores[0] == scores[1]


def test_every_parameter_of_the_jackknife_has_the_gradient_of_finite_differences():
    rows = toy(1, 25)
    model = example.Jackknife(rows, 0.1)
    model.smoothing = so.Quadratic(0.5)  # of a fixed strength, which finite differences keep

    def loss(log_penalty: torch.Tensor, growth: torch.Tensor) -> torch.Tensor:
        model.log_penalty, model.growth = log_penalty, growth
        return model.losses().sum()

    point = [model.log_penalty.detach().requires_grad_(), (model.growth.detach() + 0.1).requires_grad_()]
    del model.log_penalty, model.growth
    assert torch.autograd.gradcheck(loss, point, eps=1e-7, atol=1e-6)


def test_main_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    assert example.main(["--steps", "10", "--repeats", "1", "--seeds", "3", "4", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 4", "pinball regression", "against Gaussian likelihood", "calibrated", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(
    ("ours", "code", "word"), [((0.905, 200.0), 0, "passed"), ((0.93, 200.0), 1, "FAILED"), ((0.9, 201.5), 1, "FAILED")]
)
def test_main_fails_if_the_default_experiment_is_not_won(ours, code, word, capsys, monkeypatch):
    measured = iter([run for runs in zip(*results(ours, (0.88, 203.0)).values(), strict=True) for run in runs])
    monkeypatch.setattr(example, "fit", lambda *_: None)
    monkeypatch.setattr(example, "measure", lambda *_: next(measured))
    monkeypatch.setattr(example, "draw", lambda results, path: None)
    assert example.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(word)
