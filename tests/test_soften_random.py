"""Random programs under soften: Python's own answer under Hard(), true derivatives when soft."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soften_random import made, programs
from torch import Tensor
from torch.autograd import gradcheck

import smoothops as so

HALVES = st.lists(st.sampled_from([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]), min_size=6, max_size=6)


def arguments(values) -> tuple:
    x, y, z, *a = values
    return x, y, z, list(a)


def leaves(result) -> list:
    return [leaf for item in result for leaf in (leaves(item) if isinstance(item, (tuple, list)) else [item])]


@settings(max_examples=300)
@given(programs(), HALVES)
def test_random_programs_are_pythons_own_under_hard(source: str, values: list[float]) -> None:
    program = made(source)
    wanted = program(*arguments(values))
    tensors = torch.tensor(values, dtype=torch.float64)
    given_ = arguments(tensors.unbind(0))
    found = so.soften(smoothing=so.Hard(), max_worlds=1)(program)(*given_)
    assert isinstance(found, tuple)
    assert [float(v) for v in leaves(found)] == [float(v) for v in leaves(wanted)], source
    for got, want in zip(leaves(found), leaves(wanted), strict=True):
        assert type(got) is type(want) or (isinstance(got, Tensor) and isinstance(want, float))
    assert [v.item() for v in given_[3]] == values[3:]


@settings(max_examples=60)
@given(programs(), HALVES)
def test_random_programs_without_tensors_run_as_written(source: str, values: list[float]) -> None:
    program = made(source)
    assert so.soften(program)(*arguments(values)) == program(*arguments(values))


@settings(max_examples=60)
@given(programs(2), st.sampled_from([so.Entropy(0.5), so.Entropy(2.0), so.Laplace(1.0)]))
def test_random_programs_have_true_derivatives_when_soft(source: str, smoothing: so.Smoothing) -> None:
    soft = so.soften(smoothing=smoothing, max_worlds=100_000)(made(source))

    def total(v: Tensor) -> Tensor:
        """The mean over the outcomes of a weighted sum of what they hold, which need not have one structure."""
        sums = []
        for weight, value in soft.worlds(*arguments(v.unbind(0))):
            found = [torch.as_tensor(leaf, dtype=torch.float64) for leaf in leaves(value)]
            sums.append(weight * (torch.stack(found) @ torch.linspace(1, 2, len(found), dtype=torch.float64)))
        return torch.stack(sums).sum()

    x = torch.tensor([0.31, -0.42, 0.77, 1.13, -0.93, 0.08], dtype=torch.float64, requires_grad=True)
    weights = torch.stack([weight for weight, _ in soft.worlds(*arguments(x.unbind(0)))])
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)
    assert gradcheck(lambda v: total(v) + 0 * v.sum(), (x,)), source
