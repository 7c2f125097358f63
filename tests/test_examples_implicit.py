"""The pieces of examples/hyperparameters.py and examples/equilibrium.py, and that short runs work."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import equilibrium
import hyperparameters

import implicit


@pytest.fixture(scope="module")
def task():
    return hyperparameters.Task(hyperparameters.make_data(0, 1, 1))


# --- hyperparameters --------------------------------------------------------------------------------------------------


def test_the_parts_of_each_split_are_disjoint_and_standardized_by_the_rows_that_are_fitted(task):
    data = task.data
    assert [tuple(rows.targets.shape) for rows in data[:4]] == [(5, 4, 264), (5, 4, 88), (5, 352), (5, 88)]
    for fitted in (data.train, data.all):
        columns = fitted.columns[..., data.predictor % 10 != 1]  # the sex has two values, so that its square is special
        torch.testing.assert_close(columns.mean(-2), torch.zeros_like(columns[..., 0, :]), atol=1e-10, rtol=0)
        torch.testing.assert_close(columns.std(-2), torch.ones_like(columns[..., 0, :]))
        assert fitted.targets.mean(-1).abs().max() < 1e-10
    for split in range(5):
        whole = [{row.numpy().tobytes() for row in rows.columns[split]} for rows in (data.all, data.test)]
        assert [len(part) for part in whole] == [352, 88]
        assert len(set.union(*whole)) == 440


def test_decoys_are_the_measurements_in_another_order():
    none, some = (hyperparameters.make_data(3, 1, copies) for copies in (0, 2))
    assert int(none.predictor.max()) == 9
    assert int(some.predictor.max()) == 29
    whole = torch.cat([some.all.columns[0], some.test.columns[0]])
    for real, decoy in ((2, 12), (2, 22), (8, 18)):
        a, b = (whole[:, some.predictor == index][:, 0] for index in (real, decoy))
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.2
        a, b = ((column.msort() - column.mean()) / column.std() for column in (a, b))
        # two rows of the 442 are left out of each repeat, so that the values are nearly the same
        assert (a - b).abs().median() < 0.03


def test_hypergradients_are_those_of_autograd_through_the_closed_form(task):
    s = torch.randn(task.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = task.folds.solves
    (ours,) = torch.autograd.grad(task.validate(s).sum(), s)
    assert task.folds.solves == before + 2, "a fit and an adjoint"
    ridge = task.folds
    strengths = s.exp().unsqueeze(1).expand(-1, hyperparameters.FOLDS, -1)[..., ridge.predictor]
    w = torch.linalg.solve(ridge.gram + torch.diag_embed(strengths), ridge.moment)
    errors = hyperparameters.error(w, task.data.validation).mean(1)
    torch.testing.assert_close(ours, torch.autograd.grad(errors.sum(), s)[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(task.validate(s.detach()), errors.detach())
    assert task.folds.solves == before + 3, "no adjoint where there is nothing to differentiate"


@pytest.mark.parametrize("name", hyperparameters.LABELS)
def test_searches_cost_what_they_may_and_keep_the_best_in_validation(name, task):
    seen = []

    class Watched(hyperparameters.Task):
        def validate(self, s):
            errors = super().validate(s)
            seen.append((s.detach().clone(), errors.detach()))
            return errors

    result = hyperparameters.search(name, Watched(task.data), 12, 0)
    assert result.solves[-1] == 12
    assert result.validation == sorted(result.validation, reverse=True)
    errors = torch.stack([errors for _, errors in seen])
    assert result.validation[-1] == pytest.approx(errors.amin(0).mean().item())
    chosen = torch.stack([seen[place][0][split] for split, place in enumerate(errors.argmin(0).tolist())])
    assert result.test[-1] == pytest.approx(task.judge(chosen).mean().item())
    torch.testing.assert_close(result.strengths, chosen.mean(0))


def test_main_of_hyperparameters_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    options = ["--solves", "6", "--repeats", "1", "--seeds", "3", "4", "--out", str(figure)]
    assert hyperparameters.main(options) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 4", "random search", "30 strengths, 20 of them of decoys", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("ours", "code"), [(3000.0, 0), (3060.0, 1)])
def test_main_of_hyperparameters_fails_if_the_default_experiment_is_not_won(ours, code, capsys, monkeypatch):
    def found(name, task, solves, seed):
        test = ours if name == "gradient" else 3100.0 + seed
        return hyperparameters.Result([1], [test], [test], torch.zeros(30), [0.0])

    monkeypatch.setattr(hyperparameters, "Task", lambda data: None)
    monkeypatch.setattr(hyperparameters, "search", found)
    monkeypatch.setattr(hyperparameters, "draw", lambda results, path: None)
    assert hyperparameters.main([]) == code
    assert ("passed" if code == 0 else "FAILED") in capsys.readouterr().out


# --- equilibrium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    data, test = equilibrium.make_data(0)
    assert len(data.labels) + len(test.labels) == 1797
    assert data.images.min() == 0
    assert data.images.max() == 1
    return equilibrium.Digits(data.images[:64], data.labels[:64])


def networks(width: int = 16) -> dict[str, equilibrium.Network]:
    out = {}
    for name, make in equilibrium.NETWORKS.items():
        torch.manual_seed(0)
        out[name] = make(width)
    return out


def test_all_networks_have_the_same_parameters_to_begin_with():
    shapes = [{name: p.shape for name, p in network.named_parameters()} for network in networks().values()]
    values = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks().values()]
    assert shapes[0].keys() == {"inject.weight", "inject.bias", "map.weight", "head.weight", "head.bias"}
    assert set(shapes[2]) == set(shapes[1]) == set(shapes[0])
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_the_map_contracts_even_where_its_weight_is_large():
    layer = equilibrium.Contraction(16)
    with torch.no_grad():
        layer.weight.mul_(100)
    z, other, u = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0)) / 100
    assert (layer(z, u) - layer(other, u)).norm() <= 0.95 * (z - other).norm()
    jacobian = torch.func.jacrev(lambda z: layer(z, torch.zeros(16)))(torch.zeros(16))
    assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(0.95, rel=1e-5)


def test_the_gradient_is_that_of_the_unrolled_network(batch):
    unrolled, ours = (networks()[name].double() for name in ("unrolled", "equilibrium"))
    unrolled.steps = 200
    ours.layer.options |= {"rtol": 1e-12, "atol": 1e-12, "linear": implicit.GMRES(rtol=1e-12)}
    data = equilibrium.Digits(batch.images.double(), batch.labels)
    gradients = [torch.autograd.grad(equilibrium.loss(n, data), list(n.parameters())) for n in (unrolled, ours)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


def test_kept_memory_is_constant_for_ours_and_grows_with_unrolled_steps(batch):
    made, spent = networks(), equilibrium.costs(networks(), batch)
    assert len(set(spent["equilibrium"].kilobytes)) == 1
    assert spent["equilibrium"].steps == sorted(spent["equilibrium"].steps)
    steps, kilobytes = spent["unrolled"].steps, spent["unrolled"].kilobytes
    slopes = {(b - a) / (t - s) for s, t, a, b in zip(steps, steps[1:], kilobytes, kilobytes[1:], strict=False)}
    assert max(slopes) == pytest.approx(min(slopes))
    # by hand: the logits' log-softmax, its mean's weight, and both tanh
    assert equilibrium.kept(made["explicit"], batch) >= 4 * 64 * (10 + 2 * 16)
    assert equilibrium.kept(made["explicit"], batch) <= 4 * 64 * (2 * 10 + 3 * 16)


@pytest.mark.parametrize("name", equilibrium.LABELS)
def test_a_short_training_learns_and_can_be_repeated(name):
    args = equilibrium.make_parser().parse_args(["--width", "8", "--epochs", "3"])
    first, second = (equilibrium.train(name, 5, args) for _ in range(2))
    assert first.accuracy == second.accuracy
    assert first.accuracy[-1] > 50
    assert len(first.taken) == (3 if name == "equilibrium" else 0)


def test_main_of_equilibrium_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    assert equilibrium.main(["--width", "8", "--epochs", "1", "--seeds", "3", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 3", "explicit, two layers", "kept, kB", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(
    ("ours", "last", "code"), [(97.0, 40.0, 0), (96.0, 40.0, 1), (97.0, 41.0, 1)], ids=["won", "accuracy", "memory"]
)
def test_main_of_equilibrium_fails_if_the_default_experiment_is_not_won(ours, last, code, capsys, monkeypatch):
    def trained(name, seed, args):
        return equilibrium.Result([ours if name == "equilibrium" else 97.2], [], networks()[name])

    cost = {
        "explicit": equilibrium.Cost([2], [10.0], [1.0]),
        "unrolled": equilibrium.Cost([1] * 7, [400.0] * 7, [1.0] * 7),
        "equilibrium": equilibrium.Cost([1] * 6, [40.0] * 5 + [last], [1.0] * 6),
    }
    monkeypatch.setattr(equilibrium, "train", trained)
    monkeypatch.setattr(equilibrium, "costs", lambda networks, data: cost)
    monkeypatch.setattr(equilibrium, "draw", lambda results, spent, path: None)
    assert equilibrium.main([]) == code
    assert ("passed" if code == 0 else "FAILED") in capsys.readouterr().out
