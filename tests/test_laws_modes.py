"""Law 12: the modes, threads and processes that a training script runs an operator in."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import cotangent, loss, normal, value_and_gradient
from registry import FAMILIES, Case, case, cases
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import smoothops as so


@pytest.mark.parametrize("case", cases("modes"))
def test_autocast_does_not_change_the_answer(case: Case) -> None:
    x = normal(3, 6, seed=1, dtype=torch.float32)
    want = value_and_gradient(case, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(case, x)
    assert got[0].dtype == torch.float32
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("case", cases("modes"))
def test_without_gradient(case: Case) -> None:
    """inference_mode and no_grad give the same numbers and no graph; so does an input that needs none."""
    x = normal(3, 6, seed=2)
    want = case(x.clone().requires_grad_())
    with torch.inference_mode():
        y = case(x)
        assert y.is_inference()
    assert torch.equal(y, want)
    with torch.no_grad():
        y = case(x.clone().requires_grad_())
    assert not y.requires_grad
    assert torch.equal(y, want)
    assert not case(x).requires_grad


@pytest.mark.parametrize("case", cases("modes"))
def test_change_in_place_before_backward(case: Case) -> None:
    """Either the gradient is that of the old x, or torch raises: never a silently wrong one."""
    x = normal(3, 6, seed=3)
    want = value_and_gradient(case, x)[1]
    leaf = x.clone().requires_grad_()
    middle = leaf * 1.0
    y = case(middle)
    with torch.no_grad():
        middle.mul_(-2.0)
    raised, gradient = "", want
    try:
        (gradient,) = torch.autograd.grad(loss(y), leaf)
    except RuntimeError as error:
        raised = str(error)
    assert not raised or "modified by an inplace operation" in raised
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("case", cases("modes"))
def test_the_input_is_left_alone(case: Case) -> None:
    x = normal(3, 6, seed=4)
    before = x.clone()
    y, _ = value_and_gradient(case, x)
    case(x)
    assert torch.equal(x, before)
    other = case(x)
    other.zero_()  # the answer does not share memory with x or with later answers
    assert torch.equal(x, before)
    assert torch.equal(case(x), y)


@pytest.mark.parametrize("case", cases("modes"))
def test_gradients_only_where_needed(case: Case) -> None:
    """A frozen row is no leaf of the graph; gradients accumulate and repeat with retain_graph."""
    x = normal(3, 6, seed=5).requires_grad_()
    y = case(x)
    (once,) = torch.autograd.grad(loss(y), x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss(y), x)
    assert torch.equal(once, twice)
    case_loss = loss(case(x)) + loss(case(x))
    case_loss.backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["rank-quadratic", "topk_mask-tsallis1.5", "sort-entropy"])
def test_eps_alone_needs_a_gradient(name: str) -> None:
    chosen, x = case(name), normal(3, 6, seed=6)
    eps = torch.tensor(chosen.operator.eps, dtype=torch.float64, requires_grad=True)
    y = chosen(x, eps)
    (alone,) = torch.autograd.grad(loss(y), eps)
    both = torch.autograd.grad(loss(chosen(x.clone().requires_grad_(), eps)), eps)[0]
    assert torch.equal(alone, both)
    assert alone.abs() > 1e-3


@pytest.mark.parametrize("case", cases("modes"))
def test_deterministic_algorithms(case: Case) -> None:
    x = normal(3, 6, seed=7)
    want = value_and_gradient(case, x)
    torch.use_deterministic_algorithms(True)
    try:
        got = value_and_gradient(case, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


# --- threads and processes --------------------------------------------------------------------------------------------

THREADED = ["rank-quadratic", "rank-entropy", "sort-default", "topk_mask-laplace", "argmax-quadratic", "isotonic-one"]


@pytest.mark.parametrize("name", THREADED)
def test_several_threads_at_once(name: str) -> None:
    chosen = case(name)
    inputs = [normal(20, 50, seed=s) for s in range(16)]
    want = [value_and_gradient(chosen, x) for x in inputs]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda x: value_and_gradient(chosen, x), inputs))
    finally:
        torch.set_num_threads(1)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.parametrize("name", THREADED)
def test_backward_in_another_thread(name: str) -> None:
    chosen, x = case(name), normal(3, 6, seed=8)
    want = value_and_gradient(chosen, x)[1]
    leaf = x.clone().requires_grad_()
    total = loss(chosen(leaf))
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert torch.equal(leaf.grad, want)


class Ranks(Dataset):
    """Soft ranks computed by the workers of a DataLoader."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = normal(50, seed=i)
        return torch.cat([so.rank(x, smoothing=0.3), so.sort(x, smoothing=so.Entropy(1.0))])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_dataloader_workers_after_fork() -> None:
    """The parent has used the kernels before it forks."""
    data = Ranks()
    want = [data[i] for i in range(8)]
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(want), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_threads_have_run() -> None:
    x = normal(200, 50, seed=9)
    want = so.rank(x, smoothing=0.3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: so.rank(x, smoothing=0.3), range(4)))
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(so.rank(x, smoothing=0.3), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- smoothings and polytopes as values -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothings_are_frozen_values(family: str) -> None:
    """Picklable, deep-copyable, immutable, with a readable repr; equal only to themselves."""
    smoothing = FAMILIES[family].make(0.5)
    if not isinstance(smoothing, so.Smoothing):
        return
    x = normal(3, 6, seed=10)
    operator = so.argmax if "one" in family or "straight" in family or "entmax" in family else None
    operator = operator or (so.argmax if family.startswith(("quad", "entr", "tsal", "hard")) else so.topk_mask)
    extra = (2,) if operator is so.topk_mask else (-1,)
    want = operator(x, *extra, smoothing=smoothing)
    for twin in (pickle.loads(pickle.dumps(smoothing)), copy.deepcopy(smoothing), copy.copy(smoothing)):
        assert torch.equal(operator(x, *extra, smoothing=twin), want)
    with pytest.raises(AttributeError):
        smoothing.eps = 1.0
    assert type(smoothing).__name__ in repr(smoothing)
    assert len({smoothing, copy.copy(smoothing)}) == 2


def test_smoothing_of_a_learned_eps() -> None:
    """A smoothing that holds a parameter can be copied with its module, and the copy learns on its own."""
    eps = torch.nn.Parameter(torch.tensor(0.5))
    smoothing = so.Quadratic(eps)
    twin = copy.deepcopy(smoothing)
    assert twin.eps is not eps
    y = so.rank(torch.tensor([0.1, 0.3, 0.2]), smoothing=twin)
    (y * cotangent(y).float()).sum().backward()
    assert eps.grad is None
    assert twin.eps.grad.abs() > 0


@pytest.mark.parametrize(
    "polytope", [so.Simplex(), so.CappedSimplex(1.5), so.Hypercube(), so.OrderPolytope(True)], ids=repr
)
def test_polytopes_are_values(polytope: so.Polytope) -> None:
    x = normal(3, 5, seed=11)
    for twin in (pickle.loads(pickle.dumps(polytope)), copy.deepcopy(polytope)):
        assert torch.equal(twin.argmax(x, so.Quadratic(0.5)), polytope.argmax(x, so.Quadratic(0.5)))
    assert type(polytope).__name__ in repr(polytope)
