"""The pieces of examples/matching.py, and that what it claims holds."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import matching

import smoothops as so


def test_patches_are_put_together_again():
    images = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matching.assembled(matching.patches(images)), images.reshape(3, 8, 8))


def test_the_truth_undoes_the_shuffle():
    _, test = matching.make_data(0)
    puzzle = matching.Puzzle.of(test, torch.Generator().manual_seed(0))
    assert not torch.equal(puzzle.parts, test)
    assert torch.equal(puzzle.truth.mT @ puzzle.parts, test)
    train, other = matching.make_data(1)
    assert len(train) + len(other) == 1797
    assert not torch.equal(other, test)


def test_the_losses_vanish_at_the_truth():
    _, test = matching.make_data(0)
    puzzle = matching.Puzzle.of(test[:5], torch.Generator().manual_seed(0))
    for name, loss in matching.LOSSES.items():
        theta = (50 * puzzle.truth).requires_grad_()
        value = loss(theta, puzzle)
        assert abs(value.item()) < 1e-4, name
        (gradient,) = torch.autograd.grad(value, theta)
        assert gradient.abs().max() < 1e-4, name


def test_the_gradient_of_the_fenchel_young_loss_is_plan_minus_truth():
    theta = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    truth = so.Birkhoff().maximize(theta.detach().flip(-1))
    (gradient,) = torch.autograd.grad(matching.SMOOTH(theta, truth), theta)
    plan = so.Birkhoff().argmax(theta.detach(), so.Entropy(matching.EPS))
    torch.testing.assert_close(gradient, (plan - truth) / 4)


def test_a_short_run_learns(tmp_path):
    results = [matching.run(0, 3)]
    for name, outcome in results[0].items():
        assert outcome.patches > 0.35, name  # 1 in 8 by chance
    matching.draw(results, 0, tmp_path / "matching.png")
    assert "Fenchel-Young" in matching.table(results)


@pytest.mark.full
def test_claims():
    matching.check([matching.run(seed) for seed in range(3)])
