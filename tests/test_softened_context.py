"""The softened context as a context: who is softened, who is not, and that it leaves no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import implicit
import smoothops as so
from smoothops._soft_values import CONTEXTS

G = torch.Generator().manual_seed(0)
EPS = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def numbers(x: Any) -> Tensor:
    return x.as_subclass(Tensor)


def soft_sign(x: Tensor, eps: float = EPS) -> Tensor:
    return so.sign(x, smoothing=eps)


@pytest.fixture(autouse=True)
def no_trace() -> Any:
    yield
    assert _get_current_function_mode_stack() == []
    assert CONTEXTS.entered == []
    x = random(3)
    assert torch.equal(x.sign(), torch.where(x > 0, 1.0, -1.0).double())
    assert (x > 0).dtype == torch.bool


# --- who is not softened ---------------------------------------------------------------------------------------------


def test_integers_and_nan_tests_are_exact() -> None:
    i, x = torch.arange(5), torch.tensor([1.0, torch.nan])
    with so.softened(EPS):
        for exact in (i > 2, i == 3, i > 2.5, i.bool(), x != x, x.isnan(), torch.isfinite(x)):
            assert type(exact) is Tensor
            assert exact.dtype == torch.bool
        assert (x != x).tolist() == [False, True]
        assert type(i.argmax()) is Tensor
        assert i.clamp(1, 3).tolist() == [1, 1, 2, 3, 3]
        assert torch.tensor(1j).sgn() == 1j
        assert torch.where(i > 2, 1, 0).dtype == torch.long


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": so.rank,
    "sort": so.sort,
    "topk": lambda x: so.topk(x, 3),
    "topk_mask": lambda x: so.topk_mask(x, 2),
    "argsort": so.argsort,
    "quantile": lambda x: so.quantile(x, 0.4),
    "argmax": so.argmax,
    "amax": so.amax,
    "sparsemax": so.sparsemax,
    "entmax": so.entmax,
    "rank, entropy": lambda x: so.rank(x, smoothing=so.Entropy(0.3)),
    "perturbed": lambda x: so.argmax(
        x, smoothing=so.Perturbed(0.3, so.Gumbel(), 20, generator=torch.Generator().manual_seed(0))
    ),
    "network": lambda x: so.sort(x, smoothing=so.SortingNetwork(0.3)),
    "laplace": lambda x: so.rank(x, smoothing=so.Laplace(0.3)),
    "hard": lambda x: so.rank(x, smoothing=so.Hard()),
    "where": lambda x: so.where(so.gt(x, 0), x, -x),
    "round": so.round,
    "all": lambda x: so.all(so.gt(x, 0)),
    "clamp": lambda x: so.clamp(x, -1, 1),
    "bucketize": lambda x: so.bucketize(x, [0.0, 1.0]),
    "isotonic": so.isotonic,
    "max": lambda x: so.max(x, 0).values,
    "loss": lambda x: so.losses.ndcg(x, torch.arange(7.0)),
    "metric": lambda x: so.metrics.spearman(x, torch.arange(7.0)),
    "root": lambda x: implicit.root(lambda z, a: z**3 + z - a, torch.zeros_like(x), x),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_own_operators_are_the_same_inside(name: str) -> None:
    operator, x = OPERATORS[name], random(7).requires_grad_()

    def run() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        y = operator(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y, g, torch.autograd.grad(g.square().sum() + x.sum(), x)[0]

    outside = run()
    with so.softened(EPS, also=("abs", "relu")):
        inside = run()
        with so.softened(1.0, also=("abs", "relu")):
            nested = run()
    for order, (a, b, c) in enumerate(zip(outside, inside, nested, strict=True)):
        assert type(b) is Tensor
        if order < 2:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # under any mode the second derivative is traced anew
        assert torch.equal(b, c)


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.sign(ctx.saved_tensors[0])


def test_a_backward_pass_is_not_replaced() -> None:
    x = random(5).requires_grad_()
    with so.softened(EPS):
        y = Rectified.apply(x)
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        with so.softened(1.0):
            y.sum().backward()
    torch.testing.assert_close(y, x * soft_sign(x))  # the forward pass is ordinary code
    assert torch.equal(g, x.sign())
    assert x.grad is not None
    assert torch.equal(x.grad, g)


def test_optimizers_and_printing_are_not_softened() -> None:
    def train() -> tuple[Tensor, str]:
        w = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=0.1, amsgrad=True)
        for _ in range(3):
            optimizer.zero_grad()
            w.square().sum().backward()
            nn.utils.clip_grad_norm_([w], 1.0)
            optimizer.step()
        return w.detach(), repr(w)

    expected = train()
    with so.softened(EPS):
        found = train()
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.distributions.Normal(found[0], found[0].exp()).log_prob(found[0])
    assert found[1] == expected[1]


# --- entering and leaving --------------------------------------------------------------------------------------------


def test_nesting() -> None:
    x = random(4)
    outer = so.softened(EPS)
    with outer:
        assert torch.equal(torch.sign(x), soft_sign(x))
        with so.softened(1.0, keep="floor"):
            assert torch.equal(torch.sign(x), soft_sign(x, 1.0))
            assert torch.equal(torch.floor(x), torch.floor(x.clone()))
            with outer:  # re-entered
                assert torch.equal(torch.sign(x), soft_sign(x))
            with so.softened(so.Hard()):
                assert (x > 0).dtype == torch.bool
                assert set(torch.sign(x).tolist()) <= {1.0, -1.0}
            assert torch.equal(torch.sign(x), soft_sign(x, 1.0))
        assert torch.equal(torch.sign(x), soft_sign(x))
    with so.softened(EPS), so.softened(1.0, keep="sign"):
        assert set(torch.sign(x).tolist()) <= {1.0, -1.0}  # kept by the inner one, whatever the outer one says


def test_exceptions_leave_no_trace() -> None:
    for bad in (lambda x: 1 / 0, lambda x: bool(x[0] > 0), lambda x: x.sort(dim=7), lambda x: F.threshold(x, None, 0)):
        with pytest.raises((ZeroDivisionError, ValueError, IndexError, TypeError)), so.softened(EPS):
            bad(random(3))  # type: ignore[no-untyped-call]
        assert CONTEXTS.entered == []


def test_decorator_and_recursion() -> None:
    @so.softened(EPS)
    def collapse(x: Tensor, n: int) -> Tensor:
        return torch.sign(x) if n == 0 else collapse(x, n - 1)

    x = random(3)
    assert torch.equal(collapse(x, 3), soft_sign(x))


def test_what_runs_later_cannot_be_decorated() -> None:
    def later(x: Tensor) -> Any:
        yield torch.sign(x)

    with pytest.raises(TypeError, match="later would run after"):
        so.softened(EPS)(later)
    x = random(3)
    torch.testing.assert_close(
        so.softened(EPS)(nn.Threshold(0.1, 0.0))(x), so.where(so.gt(x, 0.1, smoothing=EPS), x, 0.0)
    )


def test_own_operators_take_soft_booleans() -> None:
    x, y = random(4), random(4)
    p = so.gt(x, 0, smoothing=EPS)
    with so.softened(EPS):
        a = x > 0
        inside = so.where(a, x, y), so.logical_and(a, a), so.any(a), so.logical_not(a), so.logical_xor(a, x.long() > 1)
    outside = so.where(a, x, y), so.logical_and(a, a), so.any(a), so.logical_not(a), so.logical_xor(a, x.long() > 1)
    expected = so.where(p, x, y), so.logical_and(p, p), so.any(p), so.logical_not(p), so.logical_xor(p, x.long() > 1)
    for i, o, e in zip(inside, outside, expected, strict=True):
        assert torch.equal(numbers(i), e)
        assert torch.equal(numbers(o), e)


def test_threads() -> None:
    x, barrier = random(50), threading.Barrier(4)
    found: dict[float, list[Tensor]] = {}

    def run(eps: float) -> None:
        found[eps] = []
        for _ in range(20):
            barrier.wait()
            if eps == 0:
                found[eps].append(torch.sign(x))
                continue
            with so.softened(eps):
                found[eps].append(torch.sign(x))

    threads = [threading.Thread(target=run, args=(eps,)) for eps in (0.0, 0.1, 0.5, 2.0)]
    with so.softened(7.0):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for eps, values in found.items():
        assert len(values) == 20
        assert all(torch.equal(v, soft_sign(x, eps) if eps else torch.sign(x)) for v in values)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    def block(x: Tensor) -> Tensor:
        return F.threshold(x, 0.1, -1.0) * torch.sign(x)

    x = random(5).requires_grad_()
    with so.softened(EPS):
        (expected,) = torch.autograd.grad(block(x).sum(), x)
        with torch.no_grad():
            block(x)
    checkpoint(so.softened(EPS)(block), x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    for part in (block, torch.sign, nn.Threshold(0.1, -1.0)):
        with pytest.raises(RuntimeError, match=r"enter it inside|different number of tensors"), so.softened(EPS):
            checkpoint(part, x, use_reentrant=reentrant).sum().backward()


def test_with_another_mode() -> None:
    x = random(3)
    with torch.device("cpu"), so.softened(EPS), torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.equal(torch.sign(x), soft_sign(x))


def test_no_grad_and_inference_mode_give_the_same_values() -> None:
    x = random(4).requires_grad_()
    with so.softened(EPS):
        values = [x.sign(), numbers(x > 0), x.sort().values]
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                again = [x.sign(), numbers(x > 0), x.sort().values]
            for a, b in zip(values, again, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_follow_torch(dtype: torch.dtype) -> None:
    x = random(6).to(dtype)
    with so.softened(EPS):
        assert x.sign().dtype == x.sort().values.dtype == (x > 0).dtype == x.clamp(0, 1).dtype == dtype
        assert torch.where(x > 0, x, 0.0).dtype == dtype
        assert (x > 0).float().dtype == torch.float32


# --- compile ---------------------------------------------------------------------------------------------------------


def test_inside_compile_it_raises() -> None:
    def f(x: Tensor) -> Tensor:
        with so.softened(EPS):
            return torch.sign(x)

    x = random(3)
    with pytest.raises(Exception, match=r"so\.softened cannot be used inside torch\.compile"):
        torch.compile(f, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="eager")(x), soft_sign(x))  # torch runs this frame uncompiled
    torch._dynamo.reset()


def test_around_compiled_code() -> None:
    x = random(3)
    compiled = torch.compile(lambda x: torch.sign(x) + 1, backend="eager")
    compiled(x)
    with so.softened(EPS):
        torch.testing.assert_close(compiled(x), soft_sign(x) + 1)
        strict = torch.compile(lambda x: torch.sign(x) + 2, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"so\.softened cannot be used inside torch\.compile"):
            strict(x)
    torch.testing.assert_close(compiled(x), torch.sign(x) + 1)
    torch._dynamo.reset()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="keep takes names among gt"):
        so.softened(keep="greater")
    with pytest.raises(ValueError, match="also takes names among abs, relu"):
        so.softened(also=("sign",))
    with pytest.raises(TypeError, match="logic must be"):
        so.softened(logic="product")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="smoothing must be a Smoothing"):
        so.softened("soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps"):
        so.softened(-1.0)
    with so.softened(EPS), pytest.raises(TypeError, match=r"sign\(out=\.\.\.\) has no soft form"):
        torch.sign(torch.ones(3), out=torch.ones(3))
    with so.softened(so.Laplace(1.0)), pytest.raises(ValueError, match="Laplace"):
        torch.ones(3).argmax()


def test_the_context_itself_can_be_copied() -> None:
    context = copy.deepcopy(so.softened(EPS, keep="sign"))
    x = random(3)
    with context:
        assert set(torch.sign(x).tolist()) <= {1.0, -1.0}
        assert torch.equal(torch.floor(x), so.floor(x, smoothing=EPS))
