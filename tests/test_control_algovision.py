"""The programs that AlgoVision ships as examples: its numbers, and the ordinary programs in the limit."""

from __future__ import annotations

import pytest
import torch
from oracles import loss, normal
from torch import Tensor

import smoothops as so
from tests.bench import control


def test_numbers_of_algovision() -> None:
    """Recorded from algovision 0.1.2 in float64; its loops end where the mass is below 1e-5."""

    def exact(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    array, swaps = control.bubble_sort(exact(1.3, -0.2, 0.9, 0.1)[None], 5.0)
    want = exact(-0.142069264372, 0.062611090455, 0.931671108948, 1.247787064968)[None]
    torch.testing.assert_close(array, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(swaps, exact(4.036590238453), rtol=0, atol=1e-11)
    count = control.counting(exact(0.3, -1.2, 4.9), 1.25)
    torch.testing.assert_close(count, exact(4.982300681, 4.976755106, 5.572769768), rtol=0, atol=1e-5)


def test_bubble_sort_at_a_large_beta_is_the_ordinary_one() -> None:
    x = torch.stack([torch.randperm(7) for _ in range(40)]).double()
    array, swaps = control.bubble_sort(x, 1e4)
    assert torch.equal(array, x.sort().values)
    assert torch.equal(swaps, (x[:, :, None] > x[:, None, :]).double().triu(1).sum((1, 2)))


# --- shortest paths ---------------------------------------------------------------------------------------------------


def maps(seed: int = 0) -> Tensor:
    """Costs as in the example, without ties."""
    return torch.sigmoid(4 * normal(6, 7, 9, seed=seed)) + 0.2


def test_shortest_paths_of_algovision() -> None:
    """Recorded from algovision 0.1.2 in float64, with its for loop and its while loop."""
    costs = torch.tensor([[0.3, 0.9, 0.4], [0.7, 1.1, 0.2], [0.5, 0.6, 0.8]], dtype=torch.float64)[None]
    found = [control.shortest_paths(costs, 0.2, 6, until_seen=u) for u in (False, True)]
    rows = [[0.928989356217, 0.484211344833, 0.020413138266, 0.762728099069, 0.636243263246, 0.339224889783,
             0.009695775854, 0.150255062649, 1.0],
            [0.826837714659, 0.405574371565, 0.019762933243, 0.603401186750, 0.611861596648, 0.334146793391,
             0.008922415773, 0.147773100003, 0.993307149076]]  # fmt: skip
    for (path, distance), row in zip(found, rows, strict=True):
        torch.testing.assert_close(path.flatten().tolist(), row, rtol=0, atol=1e-11)
        torch.testing.assert_close(distance[0, -1, -1].item(), 2.004171908008, rtol=0, atol=1e-11)


@pytest.mark.parametrize("smoothing", [so.Hard(), so.Entropy(1e-7), so.Quadratic(1e-7)])
def test_shortest_paths_in_the_limit_are_those_of_dijkstra(smoothing) -> None:
    costs = maps()
    path, distance = control.shortest_paths(costs, smoothing, 40, stay=True, logic=so.Lukasiewicz())
    torch.testing.assert_close(path, control.on_shortest_path(costs), rtol=0, atol=1e-12)
    lengths = [control.dijkstra(row)[1] for row in costs.tolist()]
    assert distance[:, -1, -1].tolist() == pytest.approx(lengths, abs=1e-12)


def test_the_error_of_soft_paths_falls_with_eps() -> None:
    costs = maps()
    exact = control.on_shortest_path(costs)
    errors = []
    for eps in (0.3, 0.1, 0.03, 0.01, 0.003):
        path, _ = control.shortest_paths(costs, eps, 40, stay=True, logic=so.Lukasiewicz())
        errors.append((path - exact).abs().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002


@pytest.mark.parametrize("plan", [so.Sqrt(), so.Binomial(3)], ids=repr)
def test_paths_have_the_same_gradient_with_checkpoints(plan) -> None:
    costs = maps()[:2].requires_grad_()
    grads = []
    for checkpoint in (None, plan):
        path, distance = control.shortest_paths(costs, 0.1, 12, checkpoint, until_seen=True)
        grads.append(torch.autograd.grad(loss(path) + distance[:, -1, -1].sum(), costs)[0])
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    assert grads[0].abs().max() > 1
