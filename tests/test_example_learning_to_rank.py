"""The pieces of examples/learning_to_rank.py: the queries, the grades, the losses, and that a short run improves."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import learning_to_rank as example


@pytest.fixture(scope="module")
def data():
    return example.make_data(0, 40, 0.3)


def test_the_images_of_the_three_parts_are_disjoint_and_new_for_each_seed(data):
    assert [tuple(part.documents.shape) for part in data] == [(1078, 40, 64), (359, 40, 64), (360, 40, 64)]
    seen = [{image.numpy().tobytes() for image in part.documents.flatten(0, 1)} for part in data]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]
    again, other = example.make_data(0, 40, 0.3)[2], example.make_data(1, 40, 0.3)[2]
    assert all(torch.equal(a, b) for a, b in zip(again, data[2], strict=True))
    assert not torch.equal(other.grades, data[2].grades)


def test_every_list_has_its_relevant_documents_in_no_order(data):
    for part in data:
        counts = torch.stack([(part.grades == grade).sum(-1) for grade in range(4)], -1)
        assert (counts == torch.tensor([30, 4, 3, 3])).all()
        assert (part.grades.mean(0) > 0.2).all()


def test_the_nearest_of_the_same_digit_are_the_most_relevant():
    alike = torch.tensor([True] * 8 + [False] * 2)
    distances = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4, 0.5, 0.1])
    assert example.grade(distances, alike).tolist() == [1, 3, 1, 3, 2, 3, 2, 2, 0, 0]


def test_a_query_loses_a_quarter():
    seen = example.degrade(torch.ones(50, 64), 0.1, torch.Generator().manual_seed(0)).view(50, 8, 8)
    quarters = seen.unflatten(1, (2, 4)).unflatten(3, (2, 4)).abs().sum((2, 4)).flatten(1)
    assert ((quarters == 0).sum(-1) == 1).all()
    assert (quarters == 0).any(0).all()
    assert seen[seen != 0].std().item() == pytest.approx(0.1, rel=0.1)


def test_every_loss_has_options_and_a_gradient(data):
    assert set(example.TUNED) == set(example.LOSSES) == set(example.COLOURS)
    scores = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name, (_, option) in example.TUNED.items():
        loss = example.LOSSES[name](option)(scores, data[0].grades[:8])
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.shape == ()
        assert (gradient != 0).float().mean() > 0.4, name


def test_a_short_training_improves_keeps_the_best_and_can_be_repeated(data):
    train, validation, test = data
    loss = example.LOSSES["soft ndcg"](8.0)
    torch.manual_seed(3)
    before = example.evaluate(example.Matcher(), test)
    runs = [example.fit(loss, 0.005, train, validation, 60, seed=3) for _ in range(2)]
    assert runs[0][1] == runs[1][1] == example.evaluate(runs[0][0], validation)
    assert example.evaluate(runs[0][0], test) > before + 0.1


def test_main_prints_the_table_and_writes_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    assert example.main(["--steps", "3", "--seeds", "3", "4", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 4", *example.LOSSES, str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("ours", "code", "word"), [(0.72, 0, "passed"), (0.66, 1, "FAILED"), (0.8, 1, "FAILED")])
def test_main_fails_if_the_claim_does_not_hold(ours, code, word, capsys, monkeypatch, data):
    def measured(seed, args, advance):
        scores = dict.fromkeys(example.LOSSES, 0.73)
        magnified = dict.fromkeys(example.LOSSES, 0.58 + seed / 1000) | {"soft ndcg": ours}
        return example.Result({}, scores, magnified, data[2])

    monkeypatch.setattr(example, "run", measured)
    monkeypatch.setattr(example, "draw", lambda results, factor, path: None)
    assert example.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(word)
    assert example.main(["--steps", "7"]) == 0


def test_too_few_documents_are_refused(capsys):
    with pytest.raises(SystemExit):
        example.main(["--documents", "10"])
    assert "more than the 10" in capsys.readouterr().err
