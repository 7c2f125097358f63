"""A convex programme written in cvxpy as a differentiable function of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._closure import raw
from ._jacobian import check_on_fail
from ._program_dpp import check_dpp, not_dpp
from ._program_form import Form
from ._program_solve import Core
from ._program_solvers import SCS, Clarabel, ConeSolver, HiGHS
from .linear import ConvergenceError
from .operator import apply_matrix
from .qp import qp

__all__ = ["SCS", "Clarabel", "HiGHS", "Program", "program"]


class Program(torch.nn.Module):
    """What :func:`program` returns: call it with one tensor for each parameter, in the order given there.

    Each tensor has its parameter's shape, or any leading dims in front of it, which broadcast; so has the answer, a
    tuple with one tensor for each variable, of the parameters' dtype and on their device.

    Example:
        >>> import cvxpy as cp
        >>> x, a = cp.Variable(2), cp.Parameter(2)
        >>> layer = implicit.program(cp.Problem(cp.Minimize(cp.norm(x - a)), [x >= 0]), [a], [x])
        >>> isinstance(layer, torch.nn.Module)
        True
    """

    def __init__(
        self, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], solver: ConeSolver,
        tol: float | None, on_fail: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shapes = [tuple(p.shape) for p in parameters]
        self.names = [p.name() for p in parameters]
        self.signs = [{k: v for k, v in p.attributes.items() if v is True} for p in parameters]
        self.form = Form(problem, parameters, variables, solver.name)
        self.core = Core(self.form, solver, tol, on_fail)
        self.quadratic = self.core.cones.polyhedral and self._strongly_convex(parameters)

    def extra_repr(self) -> str:
        inputs = ", ".join(f"{n}: {s}" for n, s in zip(self.names, self.shapes, strict=True))
        return f"{inputs}; {self.form.n} unknowns, {self.core.cones.size} rows, solver={self.core.solver}"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The optimal variables, a tuple of tensors (..., *variable.shape)."""
        lead = self._check(tensors)
        count = lead.numel()
        rows = [self._rows(t, shape, lead, count) for t, shape in zip(tensors, self.shapes, strict=True)]
        P, q, A, b = self.form.data(self.form.theta(rows))
        x = self._quadratic(P, q, A, b) if self.quadratic else self.core.solution(P, q, A, b)
        dtype = torch.float64 if not tensors else self._dtype(tensors)
        device = tensors[0].device if tensors else torch.device("cpu")
        x = x.expand(count, self.form.n) if len(x) != count else x
        outputs = (self.form.recover(x, index) for index in self.form.outputs)
        return tuple(o.reshape(*lead, *o.shape[1:]).to(device=device, dtype=dtype) for o in outputs)

    def _strongly_convex(self, parameters: Sequence[Any]) -> bool:
        """Whether x'Px is positive on the null space of the equalities, for parameters in general position."""
        if self.form.P is None:
            return False
        generator = torch.Generator().manual_seed(0)
        P, q, A, b = self.form.data(self.form.theta([example(p, generator) for p in parameters]))
        values = torch.linalg.eigvalsh(penalized(P, q, A, b, self.form.dims.zero)[0])
        return bool((values[..., 0] > 1e-10 * values[..., -1]).all())

    def _quadratic(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        free = self.form.dims.zero
        P, q = penalized(P, q, A, b, free)
        equal = (A[..., :free, :], b[..., :free]) if free else (None, None)
        below = (A[..., free:, :], b[..., free:]) if free < b.shape[-1] else (None, None)
        data = [t if t is None or len(t) > 1 else t[0] for t in (P, q, *equal, *below)]
        data[1] = q  # keeps the batch dim
        try:
            return qp(*data, on_fail=self.core.on_fail).x
        except ConvergenceError as failure:
            raise ConvergenceError(f"the programme, as the QP that cvxpy makes of it: {failure}") from None

    @staticmethod
    def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
        dtype = tensors[0].dtype
        for t in tensors[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    @staticmethod
    def _rows(t: Tensor, shape: tuple[int, ...], lead: torch.Size, count: int) -> Tensor:
        """(count, *shape), or (1, *shape) where the parameter is shared."""
        t = t.to(device="cpu", dtype=torch.float64)
        if t.ndim == len(shape) and count > 0:
            return t.unsqueeze(0)
        return t.expand(*lead, *shape).reshape(count, *shape)

    def _check(self, tensors: tuple[Tensor, ...]) -> torch.Size:
        """The leading dims, after checks of what was given."""
        if len(tensors) != len(self.shapes):
            raise TypeError(
                f"the programme has {len(self.shapes)} parameters ({', '.join(self.names)}), got {len(tensors)}"
            )
        leads = []
        for t, shape, name in zip(tensors, self.shapes, self.names, strict=True):
            if not isinstance(t, Tensor):
                raise TypeError(f"parameter {name} must be a torch.Tensor, got {type(t).__name__}; use torch.as_tensor")
            if t.is_complex():
                raise TypeError(f"parameter {name} must be real, got dtype {t.dtype}")
            if t.ndim < len(shape) or tuple(t.shape[t.ndim - len(shape) :]) != shape:
                raise ValueError(f"parameter {name} has shape {shape}; got a tensor of shape {tuple(t.shape)}")
            leads.append(t.shape[: t.ndim - len(shape)])
        try:
            lead = torch.broadcast_shapes(*leads)
        except RuntimeError:
            shown = ", ".join(f"{n} {tuple(d)}" for n, d in zip(self.names, leads, strict=True))
            raise ValueError(f"the leading dims of the parameters do not broadcast: {shown}") from None
        if not torch.compiler.is_compiling():
            for t, name, attributes in zip(tensors, self.names, self.signs, strict=True):
                check_values(raw(t), name, attributes, self.core.on_fail)
        return lead


def penalized(P: Tensor, q: Tensor, A: Tensor, b: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """x'Px/2 + q'x plus r |Ax - b|^2 / 2 over the equalities: the same on the feasible set, and there strongly convex
    where P is so on their null space. Variables that cvxpy adds make P singular, but not this."""
    if free == 0:
        return P, q
    A, b = A[..., :free, :], b[..., :free]
    r = P.detach().abs().amax((-2, -1)) / A.detach().square().sum(-2).amax(-1).clamp(min=1e-300)
    return P + r[..., None, None] * (A.mT @ A), q - r.unsqueeze(-1) * apply_matrix(A.mT, b)


def example(parameter: Any, generator: torch.Generator) -> Tensor:
    """A value (1, *shape) in general position, with the parameter's attributes."""
    t = torch.randn(1, *parameter.shape, generator=generator, dtype=torch.float64)
    has = parameter.attributes
    if has["nonneg"] or has["pos"] or has["nonpos"] or has["neg"]:
        return t.abs() if has["nonneg"] or has["pos"] else -t.abs()
    if has["PSD"] or has["NSD"]:
        return (t @ t.mT) * (1 if has["PSD"] else -1)
    return t + t.mT if has["symmetric"] else t


def check_values(t: Tensor, name: str, attributes: dict[str, Any], on_fail: str) -> None:
    """ValueError where a tensor lacks what its cvxpy parameter declares, which the convexity rests on."""
    if on_fail == "raise" and not bool(t.isfinite().all()):
        raise ValueError(f"parameter {name} holds NaN or inf; on_fail='nan' gives NaN for such samples only")
    t = t.nan_to_num(0.0, 0.0, 0.0) if t.is_floating_point() else t
    scale = 1e-6 * (1 + float(t.abs().max())) if t.numel() else 0.0
    for attribute, low in (("nonneg", t), ("pos", t), ("nonpos", -t), ("neg", -t)):
        if attribute in attributes and bool((low < -scale).any()):
            raise ValueError(f"parameter {name} was declared {attribute}=True; got values in [{t.min()}, {t.max()}]")
    if attributes.keys() & {"symmetric", "PSD", "NSD"} and bool(((t - t.mT).abs() > scale).any()):
        raise ValueError(f"parameter {name} was declared symmetric; pass (M + M.mT) / 2")
    for attribute, sign in (("PSD", 1.0), ("NSD", -1.0)):
        if attribute in attributes and t.numel() and float(torch.linalg.eigvalsh(sign * t.double()).min()) < -scale:
            raise ValueError(f"parameter {name} was declared {attribute}=True and is not; pass L @ L.mT")
    if "diag" in attributes and bool(((t - torch.diag_embed(t.diagonal(dim1=-2, dim2=-1))).abs() > scale).any()):
        raise ValueError(f"parameter {name} was declared diag=True and has entries off the diagonal")


def program(
    problem: Any,
    parameters: Sequence[Any],
    variables: Sequence[Any],
    solver: ConeSolver = Clarabel(),
    *,
    tol: float | None = None,
    on_fail: str = "raise",
) -> Program:
    """A convex cvxpy problem as a differentiable function: x(theta) = argmin f(x, theta) over x in C(theta).

    Args:
        problem: a ``cvxpy.Problem``, convex (DCP) and affine in its parameters where cvxpy asks for that (DPP).
        parameters: all its ``cvxpy.Parameter`` s, in the order of the tensors that the answer is called with.
        variables: those of its ``cvxpy.Variable`` s that are returned.
        solver: ``Clarabel()`` or ``SCS()``; Newton steps on the optimality conditions follow in any case.
        tol: largest relative primal residual, dual residual and gap; 1e-8, with exponential or power cones 1e-6.
        on_fail: "raise", "warn", "nan" or "ignore" for infeasible, unbounded or inaccurate samples.

    Returns: a :class:`Program`. Raises: ValueError naming what breaks DCP or DPP; when called, ConvergenceError.
    Complexity: a solver call a sample, then O(N^3) for N unknowns and rows. Derivatives of all orders, all modes.
    Source: Agrawal et al. 2019, "Differentiable convex optimization layers".

    Example:
        >>> import cvxpy as cp
        >>> x, a = cp.Variable(2), cp.Parameter(2)
        >>> nearest = implicit.program(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x])
        >>> nearest(torch.tensor([3.0, 4.0]))
        (tensor([0.6000, 0.8000]),)
    """
    import cvxpy as cp

    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem must be a cvxpy.Problem, got {type(problem).__name__}")
    if not isinstance(solver, ConeSolver):
        raise TypeError(f"solver must be implicit.Clarabel(...) or implicit.SCS(...), got {solver!r}")
    check_on_fail(on_fail)
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol!r}")
    check_members(problem.parameters(), parameters, "parameters", cp.Parameter, whole=True)
    check_members(problem.variables(), variables, "variables", cp.Variable, whole=False)
    if any(leaf.is_complex() for leaf in [*problem.variables(), *problem.parameters()]):
        raise ValueError("the problem is complex; split it into real and imaginary parts")
    check_dpp(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's remarks on how it canonicalizes
        try:
            return Program(problem, list(parameters), list(variables), solver, tol, on_fail)
        except Exception as failure:
            if problem.is_dpp():
                raise
            # a quad_form(x, P) with a parameter P that is not a term of the objective by itself
            raise ValueError(not_dpp(problem)) from failure


def check_members(known: Sequence[Any], given: Any, what: str, kind: type, whole: bool) -> None:
    if not isinstance(given, (list, tuple)) or not all(isinstance(g, kind) for g in given):
        raise TypeError(f"{what} must be a list of {kind.__name__} objects of cvxpy, got {given!r}")
    ids, mine = {k.id for k in known}, [g.id for g in given]
    strange = [g.name() for g in given if g.id not in ids]
    missing = [k.name() for k in known if k.id not in mine] if whole else []
    if strange or missing or len(set(mine)) < len(mine):
        raise ValueError(
            f"{what} must be {'all' if whole else 'some'} of the problem's, each once: missing {missing}, not in the "
            f"problem {strange}, given {[g.name() for g in given]}"
        )
