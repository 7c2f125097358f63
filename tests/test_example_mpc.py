"""The pieces of examples/mpc.py, and that what it claims holds."""

import pytest
import torch

pytest.importorskip("matplotlib")
import mpc


def test_the_plan_is_the_best_one():
    """Against the same plan by projected gradient steps on the pushes, where no speed limit is near."""
    start = torch.tensor([0.3, -0.1], dtype=torch.float64)
    controller = mpc.Controller(**mpc.EXPERT)
    A, B = mpc.TRUE
    weights = torch.tensor([mpc.EXPERT["q_p"], mpc.EXPERT["q_v"]], dtype=torch.float64)
    u = torch.zeros(mpc.HORIZON, dtype=torch.float64, requires_grad=True)
    for _ in range(1500):
        x, total = start, u.square().sum()
        for t in range(mpc.HORIZON):
            x = A @ x + B * u[t]
            total = total + (weights * x.square()).sum()
        (g,) = torch.autograd.grad(total, u)
        u = (u - 0.02 * g).clamp(-mpc.PUSH, mpc.PUSH).detach().requires_grad_()
    assert controller(start).item() == pytest.approx(u[0].item(), abs=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    states = mpc.starts(20, 0)
    controller = mpc.Controller(**mpc.FIRST)
    names = [name for name, _ in controller.named_parameters()]

    def pushes(*values):
        return torch.func.functional_call(controller, dict(zip(names, values, strict=True)), (states,))

    values = [p.detach().requires_grad_() for p in controller.parameters()]
    assert torch.autograd.gradcheck(pushes, values, atol=1e-5)


def test_the_expert_keeps_the_limits():
    states, pushes = mpc.drive(mpc.Controller(**mpc.EXPERT), mpc.starts(50, 3))
    assert states[..., 1].abs().max() <= mpc.SPEED + 1e-12
    assert pushes.abs().max() <= mpc.PUSH + 1e-12
    assert (states[..., 1].abs() > mpc.SPEED - 1e-9).any()  # and meets them
    assert states[:, -1].abs().max() < 0.2


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_claims(seed, tmp_path):
    result = mpc.run(seed)
    mpc.check([result])
    assert result.excess["linear"] > 0.1
    mpc.draw([result], tmp_path / "mpc.png")
    assert "learned MPC" in mpc.table([result])
