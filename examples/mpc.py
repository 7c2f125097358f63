"""Learn the cost and friction of a model-predictive controller from demonstrations, through its quadratic programme.

A cart is pushed along a line by a bounded force, and may not exceed a speed limit:

    p' = p + dt v,   v' = (1 - friction dt) v + dt u,   |u| <= 1,   |v| <= 0.6.

At each step the controller plans 15 pushes that minimize sum q_p p^2 + q_v v^2 + u^2 along the way, and applies the
first one. The plan is a quadratic programme in the pushes, solved and differentiated exactly by ``implicit.qp``.

An expert drives by a controller of this kind whose weights q_p, q_v and friction nobody knows. We watch a few of its
drives, with noise on the pushes, and fit the three numbers by gradient descent so that the planned push is the one that
was seen. What was learned is then put on the road from starting points not seen before.

Two others learn from the same drives: a linear feedback u = clip(k'x), which is what the controller is far from all
limits, and a network of two hidden layers. Neither knows of the speed limit: they break it, and what they save by that
is no merit. The programme keeps it, up to the error of the friction that it found.

    python examples/mpc.py             # three seeds, a table and a figure
    python examples/mpc.py --drives 12

Source: Amos, Rodriguez, Sacks, Boots, Kolter 2018, "Differentiable MPC for end-to-end planning and control".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

import implicit

DT, HORIZON, PUSH, SPEED = 0.25, 15, 1.0, 0.6
LENGTH, NOISE = 30, 0.02  # steps of a drive; standard deviation of what is seen of a push
EXPERT = {"q_p": 3.0, "q_v": 1.5, "friction": 0.5}
FIRST = {"q_p": 1.0, "q_v": 0.5, "friction": 0.0}  # where learning begins
CLOSE = 0.2  # claimed: the learned weights and friction are within this share of the expert's
WORSE = 1.02  # claimed: a drive of the learned controller costs at most this much of the expert's
FASTER = 0.01  # claimed: it exceeds the speed limit nowhere by more than this; the friction that it found is not exact
COLOURS = {"expert": "#8a8f98", "learned": "#1b6ca8", "linear": "#e08e2b", "network": "#5a9a4c"}
LABELS = {"expert": "expert", "learned": "learned MPC (ours)", "linear": "linear feedback", "network": "network"}

Policy = Callable[[Tensor], Tensor]

# --- the cart ---------------------------------------------------------------------------------------------------------


def dynamics(friction: Tensor) -> tuple[Tensor, Tensor]:
    """A (2, 2) and B (2,) of the state (p, v)."""
    one, zero = torch.ones_like(friction), torch.zeros_like(friction)
    A = torch.stack([torch.stack([one, one * DT]), torch.stack([zero, 1 - friction * DT])])
    return A, torch.stack([zero, one * DT])


TRUE = dynamics(torch.tensor(EXPERT["friction"], dtype=torch.float64))


@torch.no_grad()
def drive(policy: Policy, start: Tensor) -> tuple[Tensor, Tensor]:
    """States (drives, LENGTH + 1, 2) and pushes (drives, LENGTH) of the true cart under ``policy``."""
    A, B = TRUE
    states, pushes = [start], []
    for _ in range(LENGTH):
        u = policy(states[-1]).clamp(-PUSH, PUSH)
        pushes.append(u)
        states.append(states[-1] @ A.mT + u.unsqueeze(-1) * B)
    return torch.stack(states, 1), torch.stack(pushes, 1)


def starts(count: int, seed: int) -> Tensor:
    """Places (count, 2) up to 3 away, with speeds within two thirds of the limit."""
    spread = torch.rand(count, 2, generator=Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return spread * torch.tensor([3.0, SPEED * 2 / 3])


# --- the controller ---------------------------------------------------------------------------------------------------


class Controller(nn.Module):
    """State (..., 2) -> the first push (...) of the best plan; parameters: log weights and friction."""

    def __init__(self, q_p: float, q_v: float, friction: float) -> None:
        super().__init__()
        self.log_weights = nn.Parameter(torch.tensor([q_p, q_v], dtype=torch.float64).log())
        self.friction = nn.Parameter(torch.tensor(friction, dtype=torch.float64))

    def found(self) -> dict[str, float]:
        q_p, q_v = self.log_weights.detach().exp().tolist()
        return {"q_p": q_p, "q_v": q_v, "friction": self.friction.item()}

    def forward(self, state: Tensor) -> Tensor:
        A, B = dynamics(self.friction)
        # the states along the way are Phi x + Gamma u: powers of A, and what each push adds to the later states
        powers = [torch.eye(2, dtype=torch.float64)]
        for _ in range(HORIZON):
            powers.append(A @ powers[-1])
        phi = torch.stack(powers[1:])  # (HORIZON, 2, 2)
        kicks = torch.stack([p @ B for p in powers[:-1]])  # (HORIZON, 2)
        later = torch.arange(HORIZON).unsqueeze(1) - torch.arange(HORIZON)
        gamma = torch.where((later >= 0)[..., None], kicks[later.clamp(min=0)], 0)  # (time, push, 2)
        weights = self.log_weights.exp()
        Q = 2 * (torch.eye(HORIZON, dtype=torch.float64) + torch.einsum("tai,i,tbi->ab", gamma, weights, gamma))
        free = torch.einsum("tij,...j->...ti", phi, state)  # without pushes
        c = 2 * torch.einsum("tai,i,...ti->...a", gamma, weights, free)
        speed = gamma[..., 1]  # (time, push)
        one = torch.eye(HORIZON, dtype=torch.float64)
        G = torch.cat([one, -one, speed, -speed])
        v = free[..., 1]
        bound = torch.full_like(v, PUSH)
        h = torch.cat([bound, bound, SPEED - v, SPEED + v], -1)
        return implicit.qp(Q, c, G=G, h=h).x[..., 0]


def cost(states: Tensor, pushes: Tensor) -> Tensor:
    """What a drive costs the expert, (drives,)."""
    weights = torch.tensor([EXPERT["q_p"], EXPERT["q_v"]], dtype=torch.float64)
    return (states[:, 1:].square() @ weights).sum(-1) + pushes.square().sum(-1)


# --- learning ---------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """States (samples, 2), and the pushes (samples,) that were seen there."""

    states: Tensor
    pushes: Tensor


def demonstrations(drives: int, seed: int) -> Seen:
    states, pushes = drive(Controller(**EXPERT), starts(drives, seed))
    noise = torch.randn(pushes.shape, generator=Generator().manual_seed(seed + 1), dtype=torch.float64)
    return Seen(states[:, :-1].reshape(-1, 2), (pushes + NOISE * noise).reshape(-1))


def fit(policy: nn.Module, seen: Seen, steps: int, rate: float, progress: str) -> nn.Module:
    optimizer = torch.optim.Adam(policy.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), progress, leave=False, disable=None):
        optimizer.zero_grad()
        (policy(seen.states) - seen.pushes).square().mean().backward()
        optimizer.step()
        schedule.step()
    return policy


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, state: Tensor) -> Tensor:
        return (state @ self.gain).clamp(-PUSH, PUSH)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(-2))
    return layers.double()


class Result(NamedTuple):
    """``found``: the learned numbers; a policy's name -> the mean cost of its drives over the expert's, its largest
    speed over the limit; and its test drive from farthest away, states (LENGTH + 1, 2)."""

    found: dict[str, float]
    costs: dict[str, float]
    excess: dict[str, float]
    example: dict[str, Tensor]


def run(seed: int, drives: int = 6, steps: int = 600) -> Result:
    seen = demonstrations(drives, 10 * seed)
    learned = Controller(**FIRST)
    policies: dict[str, nn.Module] = {
        "expert": Controller(**EXPERT),
        "learned": fit(learned, seen, steps, 0.1, "MPC"),
        "linear": fit(Linear(), seen, 1000, 0.05, "linear"),
        "network": fit(network(seed), seen, 3000, 0.01, "network"),
    }
    driven = {name: drive(policy, starts(100, 1000 + seed)) for name, policy in policies.items()}
    far = int(starts(100, 1000 + seed)[:, 0].abs().argmax())
    bill = {name: cost(*d).mean().item() for name, d in driven.items()}
    return Result(
        learned.found(),
        {name: value / bill["expert"] for name, value in bill.items()},
        {name: states[..., 1].abs().max().item() - SPEED for name, (states, _) in driven.items()},
        {name: states[far] for name, (states, _) in driven.items()},
    )


def check(results: Sequence[Result]) -> None:
    for result in results:
        for name, value in result.found.items():
            assert abs(value / EXPERT[name] - 1) <= CLOSE, f"{name}: {value:.3f}, the expert's is {EXPERT[name]}"
        assert result.costs["learned"] <= WORSE, f"costs {result.costs['learned']:.4f} of the expert's"
        assert result.excess["learned"] <= FASTER, f"exceeds the limit by {result.excess['learned']:.1e}"


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    lines = [f"{'':22} {'cost / expert':>14} {'over the limit':>15}"]
    for name, label in LABELS.items():
        over = max(r.excess[name] for r in results)
        lines.append(f"{label:22} {fmean(r.costs[name] for r in results):14.4f} {max(over, 0.0):15.2g}")
    found = {name: [f"{r.found[name]:.3f}" for r in results] for name in EXPERT}
    lines += ["", *(f"{name}: {', '.join(values)} (expert {EXPERT[name]:g})" for name, values in found.items())]
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2)
    time = torch.arange(LENGTH + 1) * DT
    for name, label in LABELS.items():
        states = results[0].example[name]
        style = {"color": COLOURS[name], "lw": 3.5 if name == "expert" else 1.5, "label": label}
        axes[0].plot(time, states[:, 0], **style)
        axes[1].plot(time, states[:, 1], **style)
    for ax, what in zip(axes, ("place", "speed"), strict=True):
        ax.set(xlabel="time", ylabel=what)
        ax.spines[["top", "right"]].set_visible(False)
    for limit in (-SPEED, SPEED):
        axes[1].axhline(limit, color="#b03a2e", lw=0.8, ls="--")
    axes[1].set_ylim(-SPEED * 1.2, SPEED * 1.9)
    axes[1].text(time[-1], SPEED * 1.06, "speed limit", ha="right", color="#b03a2e", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drives", type=int, default=6, help="how many drives of the expert are seen")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=Path("mpc.png"))
    given = parser.parse_args()
    results = [run(seed, given.drives) for seed in range(given.seeds)]
    print(table(results))
    draw(results, given.figure)
    print(f"wrote {given.figure}")
    check(results)


if __name__ == "__main__":
    main()
