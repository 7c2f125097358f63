"""fixed_point: every method and every gradient, against unrolling and closed forms."""

from __future__ import annotations

import pytest
import torch
from oracles import loss, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicit
from implicit import Anderson, Broyden, Implicit, OneStep, Phantom, Picard, Truncated, Unroll, fixed_point

F64 = torch.float64
METHODS = [Picard(), Picard(damping=0.7), Anderson(), Anderson(memory=2, damping=0.8, switch=0.0), Broyden()]
ids = pytest.mark.parametrize("method", METHODS, ids=repr)


def tanh_map(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + b)


def problem(n: int = 4, norm: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    W = normal(n, n, seed=seed)
    return (norm * W / torch.linalg.matrix_norm(W, 2)).requires_grad_(), normal(3, n, seed=seed + 1).requires_grad_()


def unrolled(W: Tensor, b: Tensor, steps: int = 120) -> Tensor:
    z = torch.zeros_like(b)
    for _ in range(steps):
        z = tanh_map(z, W, b)
    return z


def gradients(f, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(f(*inputs)), inputs)


@ids
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_value_and_gradient(method, batch_dims: int) -> None:
    W, b = problem()

    def solved(W: Tensor, b: Tensor) -> Tensor:
        return fixed_point(tanh_map, torch.zeros(3, 4, dtype=F64), W, b=b, method=method, batch_dims=batch_dims)

    torch.testing.assert_close(solved(W, b), unrolled(W, b), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(solved, W, b), gradients(unrolled, W, b), rtol=0, atol=1e-9)


@ids
def test_gradcheck(method) -> None:
    W, b = problem(2)

    def solved(W: Tensor, b: Tensor) -> Tensor:
        options = {"rtol": 1e-14, "atol": 1e-14} if method == METHODS[0] else {}
        return fixed_point(tanh_map, torch.zeros(3, 2, dtype=F64), W, b, method=method, batch_dims=1, **options)

    assert gradcheck(solved, (W, b), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solved, (W, b), check_batched_grad=True)


@ids
def test_torch_func(method) -> None:
    W, b = (t.detach() for t in problem(2))

    def solved(b: Tensor) -> Tensor:
        return fixed_point(tanh_map, torch.zeros(2, dtype=F64), W, b, method=method, rtol=1e-13, atol=1e-13)

    def oracle(b: Tensor) -> Tensor:
        return unrolled(W, b)

    f = torch.func
    transforms = [
        lambda g: f.vmap(g),
        lambda g: f.vmap(f.jacrev(g)),
        lambda g: f.vmap(f.jacfwd(g)),
        lambda g: f.vmap(f.hessian(lambda b: loss(g(b)))),
        lambda g: f.vmap(f.jacfwd(f.jacfwd(lambda b: loss(g(b))))),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(solved)(b), transform(oracle)(b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("a", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_slow_contractions_are_right_or_refused(a: float, method) -> None:
    """z = a z + 1 has dz/da = 1 / (1 - a)^2."""
    t = torch.tensor(a, dtype=F64, requires_grad=True)
    try:
        z = fixed_point(lambda z, a: a * z + 1, torch.zeros((), dtype=F64), t, method=method)
    except implicit.ConvergenceError:
        assert isinstance(method, Picard)
        assert a > 0.9
        return
    (g,) = torch.autograd.grad(z, t)
    assert g.item() * (1 - a) ** 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("norm", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_anderson_is_never_much_slower_than_picard_on_tanh_maps(norm: float, seed: int) -> None:
    W, b = (t.detach() for t in problem(100, norm, seed))
    steps = {}
    for method in (Picard(), Anderson(), Anderson(switch=0.0)):
        z, info = fixed_point(tanh_map, torch.zeros_like(b[0]), W, b[0], method=method, info=True)
        torch.testing.assert_close(z, unrolled(W, b[0], 400), rtol=0, atol=1e-8)
        steps[repr(method)] = info.iterations.item()
    picard, *rest = steps.values()
    assert max(rest) <= picard + 2


@pytest.mark.parametrize("seed", range(3))
def test_anderson_needs_half_of_picards_steps_on_a_slow_contraction(seed: int) -> None:
    q = torch.linalg.qr(normal(100, 100, seed=seed))[0]
    M, b = q @ torch.diag(torch.linspace(-0.99, 0.99, 100, dtype=F64)) @ q.T, normal(100, seed=seed + 9)
    steps = []
    for method in (Picard(), Anderson()):
        z, info = fixed_point(lambda z: M @ z + b, torch.zeros(100, dtype=F64), method=method, info=True, max_iter=5000)
        torch.testing.assert_close(z, torch.linalg.solve(torch.eye(100, dtype=F64) - M, b), rtol=0, atol=1e-7)
        steps.append(info.iterations.item())
    assert steps[1] <= steps[0] / 2


@ids
def test_samples_are_independent_and_finished_ones_are_left_out(method) -> None:
    a, b = torch.linspace(0.01, 0.9, 16, dtype=F64), normal(16, 3)

    def f(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a.unsqueeze(-1) * z + b / 9)

    z0 = torch.zeros(16, 3, dtype=F64)
    options = {"method": method, "batch_dims": 1, "info": True}
    z, info = fixed_point(f, z0, a, b, **options)
    for in_dims in ((0, 0), None):
        again, other = fixed_point(f, z0, a, b, in_dims=in_dims, **options)
        assert torch.equal(z, again)
        assert torch.equal(info.iterations, other.iterations)
    assert info.iterations.unique().numel() > 2
    for k in range(0, 16, 5):
        single, one = fixed_point(f, z0[:1], a[k : k + 1], b[k : k + 1], **options)
        assert torch.equal(single[0], z[k])
        assert torch.equal(one.iterations[0], info.iterations[k])


def test_float32() -> None:
    W, b = (t.detach().float().requires_grad_() for t in problem())
    got = gradients(lambda W, b: fixed_point(tanh_map, torch.zeros(3, 4), W, b, batch_dims=1), W, b)
    want = gradients(unrolled, W.detach().double().requires_grad_(), b.detach().double().requires_grad_())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


# --- approximate gradients, by name only ------------------------------------------------------------------------------


def affine(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * z + b


@pytest.mark.parametrize(
    ("grad", "geometric"),
    [
        (Implicit(), 2.0),
        (OneStep(), 1.0),
        (Truncated(3), 1.75),
        (Phantom(2, 0.5), 0.875),  # tau (1 + (1 - tau + tau a))
        (Unroll(), 2.0),
        (Unroll(checkpoint=7), 2.0),
    ],
    ids=repr,
)
def test_closed_forms_of_the_gradients(grad, geometric: float) -> None:
    """z = a z + b at a = 1/2: dz/db is the part of the geometric series that the gradient sums."""
    a, b = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (0.5, 3.0))
    for mode in ("reverse", "forward"):

        def solved(b: Tensor) -> Tensor:
            return fixed_point(affine, torch.zeros(1, dtype=F64), a, b, method=Picard(), grad=grad)

        if mode == "reverse":
            z = solved(b)
            assert z.item() == pytest.approx(6, abs=1e-9)
            (g,) = torch.autograd.grad(z.sum(), b)
        elif isinstance(grad, Unroll) and grad.checkpoint:
            continue  # torch's checkpoint has no forward mode
        else:
            g = torch.func.jacfwd(lambda b: solved(b).sum())(b.detach())
        assert g.item() == pytest.approx(geometric, abs=1e-9)


@pytest.mark.parametrize("method", [Picard(), Broyden(), Anderson(), Anderson(memory=2)], ids=repr)
def test_unrolled_steps_approach_the_exact_derivative(method) -> None:
    W, b = problem()
    for checkpoint in (None, 4):

        def solved(W: Tensor, b: Tensor, grad=Unroll(checkpoint)) -> Tensor:
            return fixed_point(tanh_map, torch.zeros(3, 4, dtype=F64), W, b, batch_dims=1, method=method, grad=grad)

        torch.testing.assert_close(gradients(solved, W, b), gradients(unrolled, W, b), rtol=1e-7, atol=1e-7)


class Saved:
    """Bytes that autograd saves for backward."""

    def __enter__(self) -> Saved:
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def pack(self, t: Tensor) -> Tensor:
        self.bytes += t.numel() * t.element_size()
        return t

    def __exit__(self, *args) -> None:
        self.hooks.__exit__(*args)


def test_memory_of_backward_does_not_grow_with_the_steps() -> None:
    a, b = (torch.full((50,), v, dtype=F64, requires_grad=True) for v in (0.95, 1.0))

    def saved(grad, steps: int) -> int:
        with Saved() as memory:
            fixed_point(affine, torch.zeros(50, dtype=F64), a, b, method=Picard(), grad=grad, max_iter=steps,
                        on_fail="ignore").sum().backward()  # fmt: skip
        return memory.bytes

    assert saved(Implicit(), 10) == saved(Implicit(), 300)
    assert saved(Unroll(), 300) > 20 * saved(Unroll(), 10)


# --- failures and options ---------------------------------------------------------------------------------------------


def test_divergence_is_reported() -> None:
    with pytest.raises(implicit.ConvergenceError, match=r"fixed_point \(Picard\).*no longer finite"):
        fixed_point(lambda z: z * z + 1, torch.ones(2, dtype=F64), method=Picard())
    with pytest.raises(implicit.ConvergenceError, match="raise max_iter"):
        fixed_point(lambda z: 1 - z, torch.zeros(1, dtype=F64), method=Picard())
    with pytest.raises(implicit.ConvergenceError, match="iterations"):
        fixed_point(lambda z: z + 1, torch.zeros(2, dtype=F64))


def test_bad_arguments_are_explained() -> None:
    z = torch.zeros(3, dtype=F64)
    for bad, text in [
        (lambda: fixed_point(lambda z: z[:2], z), r"lambda> returned \[\(2,\)\], expected the unknown's shapes"),
        (lambda: fixed_point(lambda z: (z, z), z), "returned"),
        (lambda: fixed_point(lambda z: 3.0, z), "returned"),
        (lambda: fixed_point(lambda z: z, z, method="Picard"), "must be one of Anderson, Picard"),
        (lambda: fixed_point(lambda z: z * 1j, z), "complex128"),
        (lambda: fixed_point(lambda z: z.long(), z), "int64"),
        (lambda: Picard(damping=0.0), "damping"),
        (lambda: Anderson(memory=0), "memory"),
        (lambda: Anderson(ridge=-1.0), "ridge"),
        (lambda: Anderson(switch=-1.0), "switch"),
        (lambda: Phantom(0), "k must be"),
        (lambda: Phantom(2, 1.5), "tau"),
        (lambda: Truncated(0), "k must be"),
        (lambda: Unroll(0), "checkpoint"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            bad()


def test_pytrees_aux_and_custom_fixed_point() -> None:
    a = torch.tensor(4.0, dtype=F64, requires_grad=True)

    def f(z, a):
        return {"x": (z["x"] + a / z["x"]) / 2, "y": [z["x"] * torch.ones(2, dtype=F64) / 3]}, "aux"

    z0 = {"x": torch.tensor(1.0, dtype=F64), "y": [torch.zeros(2, dtype=F64)]}
    z, aux = fixed_point(f, z0, a, has_aux=True)
    assert aux == "aux"
    assert torch.autograd.grad(z["y"][0][1], a)[0].item() == pytest.approx(0.25 / 3)

    decorated = implicit.custom_fixed_point(lambda z, a: (z + a / z) / 2)(lambda z0, a: a.sqrt())
    x = torch.tensor([4.0, 9.0], dtype=F64, requires_grad=True)
    assert gradgradcheck(lambda x: decorated(None, x), (x,))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_caller_gets_the_eager_answer() -> None:
    W, b = problem()

    def step(W: Tensor, b: Tensor) -> Tensor:
        return loss(fixed_point(tanh_map, torch.zeros(3, 4, dtype=F64), W, 2 * b, batch_dims=1) * 2)

    want = torch.autograd.grad(step(W, b), (W, b))
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager")(W, b), (W, b))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
