"""Equilibrium: gradients of parameters and inputs, and the side effects of f."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import loss, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import implicit

F64 = torch.float64


class Cell(nn.Module):
    """tanh(B(W z) + x), with BatchNorm or dropout inside."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=F64)
        nn.init.orthogonal_(self.linear.weight, gain=0.4)
        self.inner = inner or nn.Identity()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.inner(self.linear(z)) + x)


def unrolled(cell: nn.Module, x: Tensor, steps: int = 150) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return z


def test_parameters_are_the_layers_and_get_their_gradients() -> None:
    layer = implicit.Equilibrium(Cell())
    assert {name for name, _ in layer.named_parameters()} == {"f.linear.weight", "f.linear.bias"}
    x = normal(5, 4).requires_grad_()
    inputs = (x, *layer.parameters())
    got = torch.autograd.grad(loss(layer(x)), inputs)
    want = torch.autograd.grad(loss(unrolled(layer.f, x)), inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    loss(layer(x, z0=torch.ones_like(x))).backward()
    torch.testing.assert_close(layer.f.linear.weight.grad, want[1], rtol=1e-9, atol=1e-9)


def test_state_dict_and_copies() -> None:
    layer, x = implicit.Equilibrium(Cell()), normal(5, 4)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert "Anderson" in repr(layer)


def test_train_and_eval_give_the_same_gradient() -> None:
    layer, x = implicit.Equilibrium(Cell()), normal(5, 4)
    found = []
    for mode in (True, False):
        layer.train(mode)
        found.append(torch.autograd.grad(loss(layer(x)), tuple(layer.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "grad", [implicit.Implicit(), implicit.OneStep(), implicit.Phantom(3), implicit.Unroll()], ids=repr
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_buffers_change_once_per_call(grad, create_graph: bool) -> None:
    layer = implicit.Equilibrium(Cell(nn.BatchNorm1d(4, dtype=F64)), grad=grad, batch_dims=0)
    x = normal(6, 4).requires_grad_()
    plain = copy.deepcopy(layer.f)
    plain(torch.zeros_like(x), x)  # one plain evaluation
    z = layer(x)
    grads = torch.autograd.grad(loss(z), tuple(layer.parameters()), create_graph=create_graph)
    if create_graph:
        torch.autograd.grad(loss(grads[0]), x)
    for have, want in zip(layer.f.buffers(), plain.buffers(), strict=True):
        assert torch.equal(have, want)
    assert layer.f.inner.num_batches_tracked == 1
    if not isinstance(grad, implicit.Unroll):
        layer(x)
        assert layer.f.inner.num_batches_tracked == 2


@pytest.mark.parametrize("grad", [implicit.Implicit(), implicit.Truncated(3), implicit.Unroll()], ids=repr)
def test_dropout_draws_once_per_call(grad) -> None:
    layer = implicit.Equilibrium(Cell(nn.Dropout(0.5)), grad=grad)
    x = normal(6, 4).requires_grad_()
    torch.manual_seed(3)
    layer.f(torch.zeros_like(x), x)
    after = torch.rand(3)
    torch.manual_seed(3)
    z = layer(x)
    loss(z).backward()
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(3)
    other = layer(x)
    assert torch.equal(other, z)  # the same mask in every step: there is a fixed point
    assert not torch.equal(layer(x), z)


def test_dropout_gradient_is_that_of_the_mask_drawn() -> None:
    layer = implicit.Equilibrium(Cell(nn.Dropout(0.5)))
    x = normal(6, 4).requires_grad_()
    torch.manual_seed(5)
    mask = nn.Dropout(0.5)(torch.ones(6, 4, dtype=F64))
    torch.manual_seed(5)
    z = layer(x)
    (got,) = torch.autograd.grad(loss(z), x, create_graph=True)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * mask * layer.f.linear(z) + x)

    (want,) = torch.autograd.grad(loss(unrolled(cell, x)), x, create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.manual_seed(99)  # whatever happens in between
    second = [torch.autograd.grad(loss(g), x)[0] for g in (got, want)]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)


MODULES = {
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
        lambda m, z, x: torch.tanh(m(z) / 2 + x),
    ),
    "GRUCell": (lambda: nn.GRUCell(6, 6), lambda m, z, x: m(x, z) / 2),
    "LSTM": (lambda: nn.LSTM(6, 6), lambda m, z, x: m(z + x)[0] / 2),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), lambda m, z, x: 0.1 * m(z + x)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.GroupNorm(3, 3)), lambda m, z, x: m(z) / 9 + x),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_modules_have_the_gradients_of_long_unrolling(name: str) -> None:
    make, f = MODULES[name]
    torch.manual_seed(0)
    module = make().double().eval()
    shape = (3, 6) if name == "GRUCell" else (2, 3, 6)
    x = normal(*shape).requires_grad_()
    leaves = [x, *module.parameters()]
    z = torch.zeros(shape, dtype=F64)
    layer = implicit.Equilibrium(lambda z, x: f(module, z, x), batch_dims=0)
    got = torch.autograd.grad(loss(layer(x)), leaves)
    for _ in range(80):
        z = f(module, z, x)
    torch.testing.assert_close(got, torch.autograd.grad(loss(z), leaves), rtol=1e-7, atol=1e-8)


def test_functional_call_and_per_sample_gradients() -> None:
    layer = implicit.Equilibrium(Cell(), batch_dims=0)
    x = normal(3, 4)
    params = {k: v.detach() for k, v in layer.named_parameters()}

    def one(params, x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(layer, params, (x,)))

    got = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, x)
    for k in range(3):
        want = torch.autograd.grad(loss(layer(x[k])), tuple(layer.parameters()))
        for g, w in zip(got.values(), want, strict=True):
            torch.testing.assert_close(g[k], w, rtol=1e-9, atol=1e-9)


def test_errors() -> None:
    with pytest.raises(TypeError, match="f must be a map"):
        implicit.Equilibrium(3)
    with pytest.raises(ValueError, match="pass z0="):
        implicit.Equilibrium(lambda z: z)()
    with pytest.raises(ValueError, match="on_fail"):
        implicit.Equilibrium(lambda z: z, on_fail="never")


@pytest.mark.parametrize("grad", [implicit.Implicit(), implicit.OneStep(), implicit.Unroll()], ids=repr)
def test_autocast(grad) -> None:
    """Casts that autocast keeps from steps without a graph, or from another call, must not cut gradients off."""
    torch.manual_seed(0)
    linear, x = nn.Linear(5, 5), torch.randn(3, 5)
    nn.init.orthogonal_(linear.weight, gain=0.4)
    layer = implicit.Equilibrium(lambda z, x: torch.tanh(linear(z) + x), grad=grad, rtol=1e-2, atol=1e-2)
    want = torch.autograd.grad(loss(layer(x)), [*linear.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x)
        for _ in range(2):
            got = torch.autograd.grad(loss(layer(x).float()), [*linear.parameters()])
            torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)
