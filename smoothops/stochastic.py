"""Stochastic smoothing: the expectation of a hard answer under noise, with unbiased gradients of every order.

With Z of density p and mean 0, one copy a coordinate,

    y(theta) = E[argmax_{y in C} <theta + eps Z, y>],    m(theta) = E[max_{y in C} <theta + eps Z, y>],    grad m = y.

The hard answer at the points v = theta + eps z is constant almost everywhere; what depends on theta and eps is how
likely the points are. With the points held fixed, each is weighted by its likelihood ratio

    w(theta, eps) = prod_i p((v_i - theta_i)/eps)/eps over the same at the present theta and eps

which is 1, and whose derivatives are the score-function estimators: dw/dtheta = psi(z)/eps with psi = -(log p)'. Plain
torch, so that forward mode, torch.func, torch.compile and double backward need nothing of their own.
Source: Berthet et al. 2020, "Learning with differentiable perturbed optimizers"; Abernethy, Lee, Tewari 2016,
"Perturbation techniques in online learning and optimization".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._regularizer import check_positive
from .noises import Noise, Normal
from .smoothing import Problem, Smoothing

Oracle = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Perturbed(Smoothing):
    """The mean of the hard answer under noise: y = E[argmax_{y in C} <theta + eps Z, y>], Z centred.

    For argmax, max, topk_mask, rank, the polytopes but for the monotone cone (theta = x), sort and its parts
    (theta = 1..n), and as E f(x + eps Z) for argsort and elementwise functions.

    Args:
        eps: scale of the noise, in the unit of theta; a number (0: hard) or a positive tensor with gradient.
        noise: ``Normal()``, ``Gumbel()`` or ``Logistic()``.
        samples: number of hard answers, S. Value and gradient use the same; each call draws anew.
        antithetic: draw Z in mirrored pairs: monotone answers vary less, gradients less or by at most sqrt(2) more.
        control_variate: subtract from each answer the mean of those drawn independently of it (leave-one-out), which
            changes no expectation. Needs 2 independent draws: 2 samples, 4 when antithetic.
        generator: source of the noise, of x's device; ``None`` is torch's own. Copies go on from the same state.
            ``torch.func.vmap`` needs ``randomness="different"``; torch.compile traces no generator but torch's own.

    Complexity: S hard answers, in memory too. Source: Berthet et al. 2020; Kool et al. 2019 (control variate).

    Example:
        >>> so.rank(torch.tensor([2.0, 9.0, 2.0]), smoothing=so.Perturbed(0.5))[1]
        tensor(3.)
    """

    eps: float | Tensor
    noise: Noise = None  # type: ignore[assignment]  # Normal(), set below: torch.compile cannot trace a ready-made object
    samples: int = 100
    antithetic: bool = True
    control_variate: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_positive(self.eps, "Perturbed eps", zero=not isinstance(self.eps, Tensor))
        if self.noise is None:
            object.__setattr__(self, "noise", Normal())
        if not isinstance(self.noise, Noise):
            raise TypeError(f"Perturbed noise must be a noise object such as so.Normal(), got {self.noise!r}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int):
            raise TypeError(f"Perturbed samples must be an int, got {self.samples!r}")
        for name in ("antithetic", "control_variate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Perturbed {name} must be True or False, got {getattr(self, name)!r}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"Perturbed generator must be a torch.Generator or None, got {self.generator!r}; "
                "for a seed pass torch.Generator(device).manual_seed(seed)"
            )
        if self.samples < 1:
            raise ValueError(f"Perturbed samples must be at least 1, got {self.samples}")
        if self.antithetic and self.samples % 2:
            raise ValueError(
                f"Perturbed draws antithetic samples in pairs, got samples={self.samples}; "
                f"pass {self.samples + 1}, or antithetic=False"
            )
        if self.control_variate and self._independent < 2:
            raise ValueError(
                f"Perturbed with control_variate compares independent draws, got samples={self.samples}; "
                f"pass at least {4 if self.antithetic else 2}, or control_variate=False"
            )

    @property
    def _independent(self) -> int:
        """The number of independent draws: of pairs, when antithetic."""
        return self.samples // 2 if self.antithetic else self.samples

    def solve(self, problem: Problem) -> Tensor:
        if not isinstance(self.eps, Tensor) and self.eps == 0:
            return problem.hard()
        if problem.sampled is None:
            raise ValueError("Perturbed averages hard answers, which an unbounded set does not have; use so.Quadratic")
        return problem.sampled(self)

    def average(self, theta: Tensor, oracle: Oracle, eps: Tensor) -> Tensor:
        """E[f(theta + eps Z)] of any function f, smooth or not; the perturbed argmax for f the hard argmax.

        Args:
            theta: (..., n).
            oracle: f, which maps (S, ..., n) to (S, ..., m), each vector by itself. It need have no gradient in what it
                is given; gradients in what else it uses (the values that a sort arranges) are kept.
            eps: (..., 1), its batch dims those of theta or 1.

        Returns:
            (..., m), the mean of S values exactly, with unbiased derivatives of every order in theta and eps.
        """
        draws = _Draws(self, theta, eps)
        y = draws.answers(oracle)
        mean = y.mean(0)
        if not (_traced() or _wanted(theta, eps)):
            return mean
        _, excess = draws.ratio(draws.moved(theta), eps - draws.eps)
        return mean + (self._centred(y) * excess).mean(0)

    def maximum(self, theta: Tensor, oracle: Oracle, eps: Tensor) -> Tensor:
        """E[max_{y in C} <theta + eps Z, y>], for ``oracle`` the argmax, (S, ..., n) to (S, ..., n): shape (..., 1).

        Its gradient in theta is ``average`` of the same draws; its Hessian is the symmetric part of average's Jacobian.
        Symmetric noise in antithetic pairs gives no less than the hard maximum; any other, no less in expectation.
        """
        # The estimate A of the gradient (in theta: y w, in eps: <u, y> w with u = (v - theta)/eps) is a gradient field
        # in expectation only. A function that has the symmetric part of each of its derivatives is
        #     m0 + int_0^1 <d, A(q + t d)> dt,    q = (theta, eps), d the step from q, 0 in value
        # whose term of order k takes int t^(k-1) = 1/k. The mean over two nodes t and 1 - t, t uniform, is exact for
        # k = 1 and 2, and unbiased beyond.
        draws = _Draws(self, theta, eps)
        t = draws.uniform()  # drawn even if not needed: the next call's noise shall not depend on grad mode
        y = draws.answers(oracle)
        if y.shape != draws.v.shape:
            raise ValueError(f"maximum needs an argmax of shape {tuple(draws.v.shape)}, got {tuple(y.shape)}")
        mean, centred = y.mean(0), self._centred(y)
        slope = _dot(draws.z, centred).mean(0)

        def first_order(theta: Tensor, eps: Tensor) -> Tensor:
            return _dot(torch.where(mean == 0, 0, theta), mean) + eps * slope  # an item never chosen may be -inf

        def every_order(theta: Tensor, eps: Tensor) -> Tensor:
            dtheta, deps, value = draws.moved(theta), eps - draws.eps, first_order(theta, eps)
            for node in (t, 1 - t):
                u, excess = draws.ratio(node * dtheta, node * deps)
                field = (dtheta + deps * u) * excess + deps * (u - draws.z)  # without the part of first order
                value = value + _dot(field, centred).mean(0) / 2
            return value

        if _traced() or y.requires_grad:
            return every_order(theta, eps)
        value = first_order(theta.detach(), eps.detach())
        return _Envelope.apply(theta, eps, value, mean, slope, every_order) if _wanted(theta, eps) else value

    def _centred(self, y: Tensor) -> Tensor:
        """y_s minus the mean of the draws independent of y_s: of less variance, for the score has mean 0."""
        if not self.control_variate:
            return y
        y = y - y.mean(0)
        own = (y + y.roll(self._independent, 0)) / 2 if self.antithetic else y  # the mean of the pair
        return y + own / (self._independent - 1)


class _Draws:
    """Noise z (S, ..., n), centred, the points v = theta + eps z, and their likelihood around theta and eps."""

    def __init__(self, smoothing: Perturbed, theta: Tensor, eps: Tensor) -> None:
        self.smoothing, self.theta, self.eps = smoothing, theta.detach(), eps.detach()
        noise, shape = smoothing.noise, (smoothing._independent, *theta.shape)
        z = noise.sample(shape, smoothing.generator, theta.dtype, theta.device)
        if smoothing.antithetic:
            z = torch.cat([z, noise.mirror(z)])
        self.z = z - noise.mean
        self.v = self.theta + self.eps * self.z
        # an excluded item (-inf, -1e300), or one so large that the noise is rounded away: its noise has no effect, so
        # that its score would be noise alone
        self.still = (self.v == self.theta).all(0)

    def uniform(self) -> Tensor:
        shape = (*self.z.shape[:-1], 1)
        return torch.rand(shape, generator=self.smoothing.generator, dtype=self.z.dtype, device=self.z.device)

    def answers(self, oracle: Oracle) -> Tensor:
        y = oracle(self.v)
        if y.shape[:-1] != self.v.shape[:-1]:
            raise ValueError(
                f"the oracle must keep all but the last dimension of its input, {tuple(self.v.shape)}, "
                f"got {tuple(y.shape)}"
            )
        return y.to(self.v.dtype)

    def moved(self, theta: Tensor) -> Tensor:
        """theta minus its present value: 0, with derivative 1 where the noise has an effect."""
        return torch.where(self.still, 0, theta - self.theta)

    def ratio(self, dtheta: Tensor, deps: Tensor) -> tuple[Tensor, Tensor]:
        """u = (v - theta - dtheta)/(eps + deps), and w - 1 (S, ..., 1): z and 0 in value."""
        eps = self.eps + deps
        u = self.z * (self.eps / eps) - dtheta / eps  # not from v - theta, which rounds
        noise = self.smoothing.noise
        log_density = torch.where(self.still, 0, noise.log_prob(u + noise.mean) - eps.log()).sum(-1, keepdim=True)
        return u, torch.expm1(log_density - log_density.detach())


class _Envelope(torch.autograd.Function):
    """``value`` with the gradients (mean, slope), which cost nothing; further orders come from ``every_order``.

    In eager mode only, outside transforms. A training step needs the first order alone.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eps: Tensor, value: Tensor, mean: Tensor, slope: Tensor, every_order: Any
    ) -> Tensor:
        ctx.save_for_backward(theta, eps, mean, slope)
        ctx.every_order = every_order
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (theta, eps, mean, slope), (g,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():
            wanted = [x for x, need in zip((theta, eps), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(ctx.every_order(theta, eps), wanted, g, create_graph=True))
            grad_theta, grad_eps = (next(found) if need else None for need in ctx.needs_input_grad[:2])
        else:
            grad_theta, grad_eps = (g * mean).sum_to_size(theta.shape), (g * slope).sum_to_size(eps.shape)
        return grad_theta, grad_eps, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _traced() -> bool:
    """Whether compiled code, a transform or forward mode may ask for a derivative; they do not tell."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _wanted(*tensors: Tensor) -> bool:
    """Whether autograd will record a gradient in one of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
