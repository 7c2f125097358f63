"""Derivatives of implicit.qp: against extended precision and finite differences, in every mode of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.qp import exact, problem
from oracles import loss, normal
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicit import _qp_solve, qp

D = torch.float64
EYE = torch.eye(2, dtype=D)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_qp_solve, "has_numba", lambda: request.param == "compiled")
    return request.param


def data(batch: tuple[int, ...] = (), n: int = 3, p: int = 1, m: int = 4, seed: int = 0) -> list[Tensor]:
    """(Q, c, A, b, G, h) with some rows active and some not, far from a change of the active set."""
    root = normal(*batch, n, n, seed=seed)
    A, G = normal(*batch, p, n, seed=seed + 1), normal(*batch, m, n, seed=seed + 2)
    b, h = 0.05 * normal(*batch, p, seed=seed + 3), 0.3 + 0.4 * normal(*batch, m, seed=seed + 5).abs()
    return [root @ root.mT + 0.5 * torch.eye(n, dtype=D), 4 * normal(*batch, n, seed=seed + 4), A, b, G, h]


def outputs(*values: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(v for v in qp(*values)[:3] if v.numel())


def total(*values: Tensor | None) -> Tensor:
    return sum(((i + 1) * loss(v) for i, v in enumerate(outputs(*values))), torch.zeros((), dtype=D))


def gradients(values: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [v.clone().requires_grad_() for v in values]
    return torch.autograd.grad(total(*inputs), inputs)


def close(found: Any, true: Any, tol: float = 1e-10) -> None:
    torch.testing.assert_close(found, true, rtol=tol, atol=tol)


EVERY = tuple(range(6))


def test_the_data_of_these_tests_have_active_and_inactive_rows() -> None:
    for batch, seed in (((), 0), ((4,), 0)):
        s = qp(*data(batch, seed=seed))
        assert s.info.margin.min() > 1e-3
        assert 0 < (s.dual_ineq > 0).sum() < s.dual_ineq.numel()


# --- values of derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "batch"), [(10, 10, 16), (50, 50, 4), (100, 100, 2), (20, 100, 4)])
def test_gradients_equal_the_active_system_in_extended_precision(n: int, m: int, batch: int, path: str) -> None:
    *values, weights = problem(n, m, batch)
    x, true = exact((*values, weights))
    inputs = [v.requires_grad_() for v in values]
    Q, c, G, h = inputs
    s = qp(Q, c, G=G, h=h)
    close(s.x.detach(), x, 1e-12)
    close(list(torch.autograd.grad((s.x * weights).sum(), inputs)), true, 1e-10)


FORMS = {
    "everything": [0, 1, 2, 3, 4, 5],
    "inequalities": [0, 1, 4, 5],
    "equalities": [0, 1, 2, 3],
    "no constraints": [0, 1],
}


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, path: str) -> None:
    values = data((2,)) if form == "everything" else data()
    inputs = [values[i].requires_grad_() for i in FORMS[form]]

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = [None] * 6
        for i, v in zip(FORMS[form], given, strict=True):
            full[i] = v
        return outputs(*full)

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_gradgradcheck() -> None:
    inputs = [v.requires_grad_() for v in data()]
    assert gradgradcheck(outputs, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    assert gradgradcheck(lambda *v: outputs(*v, None, None), inputs[:4])
    assert gradgradcheck(outputs, inputs[:2])


@pytest.mark.parametrize("shared", [(0,), (1, 2), (0, 4), (4, 5), (0, 1, 2, 3, 4), (2, 3, 5)])
def test_shared_data_get_summed_gradients(shared: tuple[int, ...], path: str) -> None:
    values = data((4,))
    mixed = [v[0] if i in shared else v for i, v in enumerate(values)]
    for compact in (mixed, [v[None] if i in shared else v for i, v in enumerate(mixed)]):
        spread = [v.expand(values[i].shape) for i, v in enumerate(compact)]
        found, each = gradients(compact), gradients([v.contiguous() for v in spread])
        for f, e in zip(found, each, strict=True):
            close(f, e.sum_to_size(f.shape))


def test_several_batch_dims_and_partial_broadcasting(path: str) -> None:
    values = data((3, 4))
    values[0], values[2], values[4], values[5] = values[0][:, :1], values[2][0, 0], values[4][0], values[5][:1]
    values[3], values[1] = values[3][0, 0], values[1][0]
    spread = [v.expand(3, 4, *v.shape[v.ndim - 2 + i % 2 :]).contiguous() for i, v in enumerate(values)]
    for f, e in zip(gradients(values), gradients(spread), strict=True):
        close(f, e.sum_to_size(f.shape))


def test_gradient_of_q_is_symmetric() -> None:
    g = gradients(data((2,)))[0]
    close(g, g.mT)


def test_only_what_is_needed(path: str) -> None:
    values = data()
    every = gradients(values)
    for i in EVERY:
        inputs = [v.clone().requires_grad_(j == i) for j, v in enumerate(values)]
        close(torch.autograd.grad(total(*inputs), inputs[i])[0], every[i])
    assert not qp(*values).x.requires_grad
    c = values[1].clone().requires_grad_()
    assert not torch.autograd.grad(qp(values[0], c, *values[2:]).dual_eq.sum() * 0, c)[0].any()
    with torch.no_grad():
        assert not qp(values[0], c, *values[2:]).x.requires_grad


def test_box_projections_with_ties(path: str) -> None:
    """A bound that only just touches counts as inactive: no gradient lies between the two one-sided ones."""
    y = (0.7 * normal(64, 10)).mul(10).round().div(10).requires_grad_()
    eye = torch.eye(10, dtype=D)
    x = qp(eye, -y, G=torch.cat([eye, -eye]), h=torch.cat([torch.ones(10, dtype=D), torch.zeros(10, dtype=D)])).x
    weights = normal(64, 10, seed=1)
    (g,) = torch.autograd.grad((x * weights).sum(), y)
    assert ((y == 0) | (y == 1)).sum() > 30
    close(x, y.clamp(0, 1), 0)
    assert torch.equal(g, torch.where((y >= 0) & (y <= 1), weights, 0))


def test_repeated_rows_share_one_derivative(path: str) -> None:
    h = torch.ones(3, dtype=D, requires_grad=True)
    x = qp(EYE, torch.tensor([-1.0, -2.0], dtype=D), G=torch.ones(3, 2, dtype=D), h=h).x
    (g,) = torch.autograd.grad(x[0], h)
    close(g.sum(), torch.tensor(0.5, dtype=D))
    assert (g != 0).sum() == 1


def test_singular_q_and_linear_programmes() -> None:
    box = torch.cat([EYE, -EYE, torch.ones(1, 2, dtype=D)])
    h = torch.tensor([0.6, 0.7, 0.0, 0.0, 1.0], dtype=D)
    for Q in (torch.diag(torch.tensor([1.0, 0.0], dtype=D)), torch.ones(2, 2, dtype=D), torch.zeros(2, 2, dtype=D)):
        c = torch.tensor([-1.5, -2.0], dtype=D)
        inputs = [v.clone().requires_grad_() for v in (c, box, h)]
        f = lambda c, G, h, Q=Q: (qp(Q, c, G=G, h=h).x, qp(Q, c, G=G, h=h).dual_ineq)  # noqa: E731
        assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)
    # at a vertex the solution of a linear programme does not move with the objective
    (g,) = torch.autograd.grad(f(*inputs)[0].sum(), inputs[0])
    assert not g.any()
    assert not g.requires_grad


def test_float32_gradients_are_rounded_once(path: str) -> None:
    values = [v.float() for v in data((3,))]
    for f, g in zip(gradients(values), gradients([v.double() for v in values]), strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, g.float(), rtol=1e-5, atol=1e-5)


# --- modes of torch ---------------------------------------------------------------------------------------------------


def test_transforms_of_torch_func() -> None:
    values = data()
    true = gradients(values)
    for transform in (grad, jacrev, jacfwd):
        close(transform(total, argnums=EVERY)(*values), true)
    H = torch.autograd.functional.hessian(total, tuple(values))
    for i in EVERY:
        for double in (hessian, lambda f, argnums: jacrev(jacrev(f, argnums), argnums)):
            close(double(total, argnums=i)(*values), H[i][i])
    direction = [normal(*v.shape, seed=9) for v in values]
    slope = sum((t * d).sum() for t, d in zip(true, direction, strict=True))
    close(jvp(total, tuple(values), tuple(direction))[1], slope)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(values, direction, strict=True)]
        close(forward_ad.unpack_dual(total(*duals)).tangent, slope)


def test_vmap() -> None:
    values, (Q, c, A, b, G, h) = data((4,)), data()
    close(tuple(vmap(outputs)(*values)), outputs(*values))
    whole = vmap(lambda c: qp(Q, c, A, b, G, h))(values[1])
    assert whole.info.converged.shape == (4,)
    true = qp(Q, values[1], A, b, G, h)
    close(whole.x, true.x)
    close(whole.info.margin, true.info.margin)
    nested = vmap(vmap(lambda c, h: qp(Q, c, A, b, G, h).x, (0, None)), (None, 0))(values[1], h + values[5] / 9)
    close(nested, qp(Q, values[1], A, b, G, (h + values[5] / 9)[:, None]).x)
    one = lambda *v: grad(total, argnums=EVERY)(*v)  # noqa: E731
    for i, found in enumerate(vmap(one)(*values)):
        close(found, torch.stack([gradients([v[j] for v in values])[i] for j in range(4)]))
    inputs = [v.requires_grad_() for v in data()]
    units = torch.eye(3, dtype=D)
    (batched,) = torch.autograd.grad(qp(*inputs).x, inputs[1], units, is_grads_batched=True)
    close(batched, jacrev(lambda c: qp(Q, c, A, b, G, h).x)(c))


def check_compiled(f: Callable[..., Any], *args: Any) -> None:
    close(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


def test_compiled() -> None:
    torch._dynamo.reset()
    values = data()
    inputs = [v.clone().requires_grad_() for v in values]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(*inputs), inputs), gradients(values))
    check_compiled(lambda *v: qp(*v).info, *values)
    check_compiled(grad(total, argnums=EVERY), *values)
    check_compiled(vmap(outputs), *data((4,)))
    check_compiled(lambda c, d: jvp(lambda c: qp(values[0], c, *values[2:]).x, (c,), (d,)), values[1], normal(3))
    single = [v.float() for v in values]
    assert torch.compile(lambda *v: qp(*v).x, fullgraph=True, backend="aot_eager")(*single).dtype == torch.float32


def test_changes_in_place() -> None:
    values = data()
    true = torch.autograd.functional.jacobian(lambda h: 2 * qp(*values[:5], h).x, values[5])
    h = values[5].clone().requires_grad_()
    x = qp(*values[:5], h).x
    x.mul_(2)
    found = [torch.autograd.grad(x[i], h, retain_graph=True)[0] for i in range(3)]
    close(torch.stack(found), true)
    Q = values[0].clone().requires_grad_() * 1
    x = qp(Q, *values[1:]).x
    Q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_inference_mode_autocast_and_threads() -> None:
    values = data((5,))
    true = qp(*values).x
    with torch.inference_mode():
        close(qp(*[v.clone() for v in values]).x, true)
    with torch.autocast("cpu"):
        close(qp(*[v.float() for v in values]).x, qp(*[v.float().double() for v in values]).x.float(), 1e-6)
    expected, found = gradients(values), []
    threads = [threading.Thread(target=lambda: found.append(gradients(values))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    assert all(torch.equal(a, b) for g in found for a, b in zip(g, expected, strict=True))
