"""The pieces of examples/bouncing_ball.py and examples/policy_rules.py, and that short runs do what is claimed."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import bouncing_ball
import policy_rules

import smoothops as so


def throws(*rows: tuple[float, float]) -> bouncing_ball.Throw:
    return bouncing_ball.Throw(*torch.tensor(rows, dtype=torch.float64).T)


# --- bouncing ball ----------------------------------------------------------------------------------------------------


def test_the_laws_of_motion_by_hand() -> None:
    """Dropped: sqrt(2 h/g) to the floor, then twice 2 e^k u/g; thrown beyond the wall: back at four fifths."""
    u = (2 * 9.81 * 1.5) ** 0.5
    time = u / 9.81 * (1 + 2 * 0.7 + 2 * 0.49)
    place, found = bouncing_ball.exact(throws((0.0, 0.0), (1.0, 0.0), (10.0, 0.0)))
    assert found.tolist() == pytest.approx([time] * 3)
    assert place.tolist() == pytest.approx([0, time, 8 - 0.8 * (10 * time - 8)])


@pytest.mark.parametrize(("smoothing", "tolerance"), [(so.Hard(), 0.02), (so.Quadratic(0.05), 0.005)])
def test_the_program_is_the_physics(smoothing, tolerance: float) -> None:
    throw = throws((3.0, 2.0), (4.0, 3.5), (3.3, 4.4))
    got, want = bouncing_ball.landing(throw, 0.01, smoothing), bouncing_ball.exact(throw)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=5 * tolerance)


def test_the_soft_gradient_is_that_of_the_physics_and_the_ordinary_one_is_not() -> None:
    _, truth, _ = bouncing_ball.make_carts(6, 0)
    want = bouncing_ball.slopes(truth, 0.02, None)
    got = bouncing_ball.slopes(truth, 0.02, 0.2)
    off = (got - want).abs().mean(0)[[0, 1, 3]] / want.abs().mean(0)[[0, 1, 3]]
    assert off.max() < 0.1
    up = truth.up.clone().requires_grad_()
    place, time = bouncing_ball.landing(bouncing_ball.Throw(truth.right, up), 0.02, so.Hard())
    assert want[:, 3].abs().min() > 0.1
    slope = torch.autograd.grad(time.sum(), up, allow_unused=True)[0] if time.requires_grad else None
    assert slope is None or not slope.any()
    # the soft gradient is exactly that of the soft program, by finite differences
    right = truth.right.clone().requires_grad_()

    def soft(right, up):
        return bouncing_ball.landing(bouncing_ball.Throw(right, up), 0.05, so.Entropy(0.2))

    assert torch.autograd.gradcheck(soft, (right[:2], up[:2]), atol=1e-4)
    assert place.shape == (6,)


def test_carts_can_be_met_and_the_path_ends_there() -> None:
    carts, truth, start = bouncing_ball.make_carts(16, 3)
    assert bouncing_ball.hits(truth, carts).all()
    assert not bouncing_ball.hits(start, carts).any()
    assert (carts.place < bouncing_ball.WALL).all()
    x, y = bouncing_ball.path_of(bouncing_ball.one(truth, 2))
    assert x[-1].item() == pytest.approx(carts.place[2].item())
    assert y[-1].item() == pytest.approx(0, abs=1e-9)
    assert y[0] == 1.5
    contacts = ((y[1:-1] < y[:-2]) & (y[1:-1] <= y[2:])).sum()
    assert contacts == bouncing_ball.BOUNCES


def test_a_short_search_with_the_soft_gradient_learns_the_time_and_with_the_ordinary_one_never() -> None:
    carts, _, start = bouncing_ball.make_carts(6, 7)
    late = [
        bouncing_ball.misses(bouncing_ball.exact(throw), carts)[1].abs().mean().item()
        for throw in (start, *(bouncing_ball.search(carts, start, 0.04, 25, soft) for soft in (True, False)))
    ]
    assert late[1] < late[0] / 3
    assert late[2] == late[0]


def test_bouncing_ball_main(tmp_path, capsys) -> None:
    figure = tmp_path / "new" / "figure.png"
    options = ["--step", "0.05", "--rounds", "3", "--carts", "2", "--seeds", "1", "2", "--out", str(figure)]
    assert bouncing_ball.main(options) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 2", "ordinary gradient", "laws of motion", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("good", "code", "word"), [(True, 0, "passed"), (False, 1, "FAILED")])
def test_bouncing_ball_fails_if_the_claim_does_not_hold(good: bool, code: int, word: str, capsys, monkeypatch) -> None:
    def run(args, advance):
        made = {seed: bouncing_ball.make_carts(4, seed) for seed in args.seeds}
        return {
            seed: bouncing_ball.Result(carts, truth, {"start": start, "hard": start, "soft": truth if good else start})
            for seed, (carts, truth, start) in made.items()
        }

    monkeypatch.setattr(bouncing_ball, "run", run)
    monkeypatch.setattr(bouncing_ball, "draw", lambda results, errors, path: None)
    monkeypatch.setattr(bouncing_ball, "slope_errors", lambda results, step: {})
    assert bouncing_ball.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(word)


# --- policy rules -----------------------------------------------------------------------------------------------------


def ordinary(age: float, pulse: float, oxygen: float, fever: float) -> float:
    low, fast, old, hot = policy_rules.THRESHOLDS.values()
    now, soon, later, warm, last = policy_rules.MINUTES
    if oxygen > low:
        if pulse > fast:
            return soon if age > old else later
        return warm if fever > hot else last
    return now


def test_the_hard_rules_are_the_ordinary_program() -> None:
    patients = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    mean, deviation = torch.tensor(list(policy_rules.FEATURES.values())).T
    want = [ordinary(*row) for row in (patients * deviation + mean).tolist()]
    found = policy_rules.truth()(patients, so.Hard())
    assert found.tolist() == pytest.approx(want)
    assert len(set(want)) == 5
    assert policy_rules.in_units(policy_rules.truth().thresholds) == pytest.approx(
        list(policy_rules.THRESHOLDS.values())
    )


def test_the_hard_rules_have_no_gradient_in_their_thresholds_and_the_soft_ones_have_the_right_one() -> None:
    patients = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    thresholds, minutes = (p.detach().double().requires_grad_() for p in policy_rules.truth().parameters())

    def waits(thresholds, minutes, smoothing=so.Entropy(0.3)):
        parameters = {"thresholds": thresholds, "times": minutes}
        return torch.func.functional_call(policy_rules.truth(), parameters, (patients, smoothing))

    assert torch.autograd.gradcheck(waits, (thresholds, minutes))
    hard = torch.autograd.grad(waits(thresholds, minutes, so.Hard()).sum(), thresholds, allow_unused=True)[0]
    assert hard is None or not hard.any()


def test_a_day_is_known_by_its_mean_only() -> None:
    data = policy_rules.make_data(50, 4, 0.0, 3)
    assert data.patients.shape == (50, 4, 4)
    torch.testing.assert_close(data.minutes, policy_rules.truth()(data.patients, so.Hard()).mean(-1).detach())
    noisy = policy_rules.make_data(5000, 4, 2.0, 3).minutes - policy_rules.make_data(5000, 4, 0.0, 3).minutes
    assert noisy.std().item() == pytest.approx(2, rel=0.05)


def test_thresholds_are_recovered_and_the_hard_program_stays() -> None:
    args = argparse.Namespace(days=300, patients=6, noise=1.0, stages=8)
    result = policy_rules.run(11, args)
    assert policy_rules.off(result.soft).max() < 0.05
    torch.testing.assert_close(result.hard.thresholds, policy_rules.beginning().thresholds)
    assert result.errors["soft"] < result.errors["tree"] / 2


def test_policy_rules_main(tmp_path, capsys) -> None:
    figure = tmp_path / "new" / "figure.png"
    assert policy_rules.main(["--days", "30", "--stages", "2", "--seeds", "1", "2", "--out", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("seed 2", "pulse high", "decision tree", str(figure)):
        assert part in printed
    assert "passed" not in printed, "only the default experiment makes the claim"


@pytest.mark.parametrize(("good", "code", "word"), [(True, 0, "passed"), (False, 1, "FAILED")])
def test_policy_rules_fails_if_the_claim_does_not_hold(good: bool, code: int, word: str, capsys, monkeypatch) -> None:
    def run(seed, args, advance):
        soft = policy_rules.truth() if good else policy_rules.beginning()
        return policy_rules.Result(soft, policy_rules.beginning(), {"soft": 1.0, "hard": 20.0, "tree": 20.0})

    monkeypatch.setattr(policy_rules, "run", run)
    monkeypatch.setattr(policy_rules, "draw", lambda results, path: None)
    assert policy_rules.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(word)
