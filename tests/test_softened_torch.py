"""Calls of torch in all spellings, softened by almost nothing, against torch: shapes, containers, values, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smoothops as so

G = torch.Generator().manual_seed(0)
LABELS = torch.arange(40) % 7

INPUTS = {
    "matrix": torch.randn(4, 5, generator=G, dtype=torch.float64),
    "vector": torch.randn(7, generator=G, dtype=torch.float64),
    "scalar": torch.tensor(0.71, dtype=torch.float64),
    "empty": torch.zeros(0, 5, dtype=torch.float64),
    "half": torch.randn(4, 5, generator=G).half() + 0.003,
    "single": torch.randn(4, 5, generator=G),
    "infinite": torch.tensor([1.1, torch.inf, -torch.inf, 2.2], dtype=torch.float64),
    "cube": torch.randn(2, 3, 4, generator=G, dtype=torch.float64),
}


def spellings() -> list[str]:
    out = []
    for n in ("gt", "ge", "lt", "le", "eq", "ne"):
        out += [f"x.{n}(0.13)", f"torch.{n}(x, True)", f"x.clone().{n}_(0.13)", f"torch.{n}(input=x, other=0.13)"]
        out += [f"torch.{n}(torch.tensor(3), x)", f"x.int().{n}(x + 0.01)"]
    for n in ("sign", "sgn", "round", "floor", "ceil"):
        out += [f"x.{n}()", f"torch.{n}(input=x)", f"x.clone().{n}_()", f"torch.{n}(x, out=None)"]
    out += ["x.round(decimals=1)", "torch.special.round(x, decimals=-1)", "x == None", "x != 'a'", "(x > 0) == None"]
    bounds = (
        "0.1", "0.1, 1", "min=0.1", "max=1", "None, 1", "min=0.1, max=1", "1.0, 0.1", "1.0, torch.tensor(0.1).to(x)",
        "torch.tensor(1.0).to(x), 0.1", "torch.tensor([[0.1], [0.2]]).to(x)[:1, 0]", "min=-1, max=x * 0.5",
        "torch.tensor(2), torch.tensor(1)", "max=torch.tensor(1)",
    )  # fmt: skip
    for n in ("x.clamp", "x.clip", "x.clone().clamp_", "functools.partial(torch.clamp, x)"):
        out += [f"{n}({b})" for b in bounds]
    for n in ("maximum", "minimum", "fmax", "fmin"):
        out += [f"torch.{n}(x, {o})" for o in ("x.flip(0)", "torch.tensor(0.5)", "torch.tensor(1)", "x.int()", "x[:1]")]
    out += ["torch.heaviside(x, torch.tensor([0.5]).to(x))", "x.heaviside(x * 0 + 0.5)"]
    dims = ("", "0", "-1", "dim=0", "dim=0, keepdim=True", "axis=0", "axis=0, keepdims=True")
    for n in ("max", "min", "argmax", "argmin", "amax", "amin", "median"):
        out += [f"x.{n}({d})" for d in dims] + [f"torch.{n}(input=x, dim=0)"]
    out += [f"x.{n}({d})" for n in ("amax", "amin") for d in ("(0, -1)", "dim=()", "[0]")]
    out += [f"x.aminmax({d})" for d in ("", "dim=0", "dim=-1, keepdim=True")]
    out += [f"torch.{n}(x, other=x.flip(0))" for n in ("max", "min")]
    order = (
        "",
        "0",
        "dim=0",
        "descending=True",
        "0, True",
        "stable=True, dim=0, descending=True",
        "dim=0, stable=False",
    )
    out += [f"x.{n}({o})" for n in ("sort", "argsort") for o in order]
    out += [f"x.topk({o})" for o in ("1", "2, 0", "2, largest=False", "k=2, dim=0, sorted=False", "2, -1, False", "99")]
    out += [f"x.kthvalue({o})" for o in ("1", "2, 0", "k=2, keepdim=True", "99")] + ["torch.msort(x)"]
    out += [f"torch.quantile(x, {o})" for o in ("0.3", "0.3, 0, True", "q=0.3, dim=0, interpolation='lower'", "1.5")]
    edges = "torch.tensor([0.0, 1.0]).to(x)"
    out += [f"torch.searchsorted({edges}, x, {o})" for o in ("side='left'", "side='up'", "right=True, side='left'")]
    out += ["torch.searchsorted(torch.tensor([0, 1]), x)", f"torch.bucketize(x, {edges}, right=True, out_int32=True)"]
    for p in ("x", "(x > 0)", "(x == x.clone())"):
        for n in ("any", "all"):
            out += [f"{p}.{n}({d})" for d in (*dims, "dim=(0,)", "dim=()", "dim=None")] + [
                f"torch.{n}(input={p}, dim=0)"
            ]
        out += [f"{p}.count_nonzero({d})" for d in ("", "0", "dim=(0, -1)")]
    for n in ("logical_and", "logical_or", "logical_xor"):
        for p, q in (("x", "x"), ("(x > 0)", "x"), ("x", "(x > 0)"), ("(x > 0)", "x.int()"), ("x.int()", "x")):
            out.append(f"torch.{n}({p}, {q})")
        out.append(f"torch.{n}(input=x > 0, other=x < 1)")
    for o in "&|^+*":
        out += [f"(x > 0) {o} (x < 1)", f"(x.int() > 0) {o} (x < 1)", f"(x > 0) {o} True", f"mask(x, '{o}')"]
    out += ["torch.zeros_like(x > 0)", "torch.ones_like(x > 0)", "torch.full_like(x > 0, True)", "(x > 0).new_ones(2)"]
    out += ["torch.tensor(x > 0)", "torch.as_tensor(x > 0, dtype=torch.bool)", "torch.asarray(x > 0).sum()"]
    out += ["torch.tensor([v > 0 for v in x.flatten()])", "torch.tensor(x > 0, dtype=torch.float64)"]
    out += ["torch.where(x > 0, x, 0)", "torch.where(condition=x > 0, input=x, other=-x)", "x.where(x > 0, 0)"]
    out += ["stored(x, 0)", "stored(x, torch.nan)", "x.masked_fill(mask=x > 0, value=2)", "x[x > 0]"]
    out += ["x[x.argmax(0)] if x.ndim == 1 else 0", "x[..., x.flatten().argmax() % 2]", "filled(x)"]
    for n, i in (("argmax", "x.argmax(-1, keepdim=True)"), ("argsort", "x.argsort(-1)")):
        out += [f"x.gather(dim=-1, index={i})", f"torch.gather(input=x, dim=-1, index={i})", f"x.{n}(-1).data + 1"]
        out += [
            f"torch.take_along_dim(x, indices={i}, dim=-1)",
            f"torch.take_along_dim(LABELS, {i})",
            f"x.take(index={i})",
        ]
        out += [
            f"torch.zeros_like(x).scatter(-1, {i}, value=1.0)",
            f"torch.zeros_like(x).scatter(dim=-1, index={i}, src=x)",
        ]
        out += [f"LABELS.index_select(0, {i}.flatten())", f"torch.bincount(input={i}.flatten())[:1]", f"{i} == None"]
    out += [f"x.{n}" for n in ("to(x > 9)", "to(LABELS > 3)", "type_as(LABELS > 3)", "type('torch.BoolTensor')")]
    for p in ("(x > 0)", "(x == x.clone())"):
        out += [f"{p}.triu().any()", f"{p}.tril()", f"F.pad({p}, (1, 1)).all()", f"torch.column_stack([{p}, {p}])"]
        out += [f"torch.hsplit({p}, 1)", f"torch.dstack([{p}, {p}])", f"{p}.diag()", f"~torch.diag_embed({p})"]
    for n in ("F.hardtanh", "F.hardtanh_", "F.relu6", "torch._C._nn.hardtanh"):
        out += [f"{n}(x.clone())", f"{n}((3 * x.clamp(-9, 9)).long())"]
    out += ["F.hardtanh(x, 2.0, 1.0)", "F.hardtanh_(x.clone(), min_val=0.0)", "F.threshold(x.clone(), 0.1, 5, True)"]
    out += [
        "F.threshold(LABELS, 1, 7)",
        "F.margin_ranking_loss(x, x[:1], torch.ones(3))",
        "F.hardshrink(x, lambd=-0.5)",
    ]
    out += ["x.to_sparse().sign().to_dense() if x.numel() else 0"]
    return list(dict.fromkeys(out))


def mask(x: Tensor, operation: str) -> Any:
    p, q = x > 0, x < 1
    if operation == "&":
        p &= q
    elif operation == "|":
        p |= q
    elif operation == "^":
        p ^= q
    return p


def stored(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[x > 0] = value
    return x


def filled(x: Tensor) -> Any:
    p = x > 0
    p[..., :1] = 3
    return p.clone().fill_(5), p, p.clone().copy_(x.int()), (x > 0).copy_(x)


def run(f: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return f(), None
    except Exception as error:
        return None, error


def differs(found: Any, expected: Any, atol: float) -> str | None:
    if isinstance(expected, (tuple, list)):
        if type(found) is not type(expected):
            return f"{type(found)} for {type(expected)}"
        parts = (differs(f, e, atol) for f, e in zip(found, expected, strict=True))
        return next((part for part in parts if part), None)
    if not isinstance(expected, Tensor):
        return None if found == expected else f"{found} for {expected}"
    if expected.dtype == torch.bool:
        right = type(found).__name__ == "SoftBoolean" or found.dtype == torch.bool
    else:
        right = found.dtype == expected.dtype or (not expected.is_floating_point() and found.is_floating_point())
    found = found.as_subclass(Tensor)
    if not right or found.shape != expected.shape:
        return f"{found.dtype}{tuple(found.shape)} for {expected.dtype}{tuple(expected.shape)}"
    atol = max(atol, 2e-3 if atol and found.dtype == torch.half else 0)
    close = torch.allclose(found.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)
    return None if close else f"{found} for {expected}"


def excused(spelling: str, name: str, expected: Any) -> bool:
    """Where the context gives more than torch, or a rule of its own that the page states."""
    if name == "half" and "quantile" in spelling:
        return True  # torch has none
    if name == "scalar" and spelling.endswith("((0, -1))"):
        return True  # one dim named twice
    return name == "empty" and expected is None and "(x > 0)" in spelling


# a little softening; soft gradients only, where values are torch's to the bit; none at all
CONTEXTS: dict[str, tuple[Callable[[], so.softened], float]] = {
    "small": (lambda: so.softened(so.Quadratic(1e-9), order=so.Laplace(1e-9)), 2e-6),
    "through": (lambda: so.softened(so.StraightThrough(0.3)), 0.0),
    "hard": (lambda: so.softened(so.Hard()), 0.0),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", INPUTS)
def test_every_spelling(name: str, context: str) -> None:
    scope = {"torch": torch, "F": F, "functools": functools, "LABELS": LABELS}
    scope |= {"mask": mask, "stored": stored, "filled": filled}
    wrong = []
    enter, atol = CONTEXTS[context]
    for spelling in spellings():
        f = eval(f"lambda x: {spelling}", scope)
        expected, refused = run(lambda f=f: f(INPUTS[name].clone()))  # type: ignore[misc]
        with enter():
            found, error = run(lambda f=f: f(INPUTS[name].clone()))  # type: ignore[misc]
        if refused is not None or error is not None:
            if (refused is None) != (error is None) and not excused(spelling, name, expected):
                wrong.append(f"{spelling}: torch {refused!r}, here {error!r}"[:200])
        elif (
            context == "hard"
            and isinstance(expected, Tensor)
            and (type(found), found.dtype) != (Tensor, expected.dtype)
        ):
            wrong.append(f"{spelling}: {type(found)} of {found.dtype}")
        elif difference := differs(found, expected, atol):
            wrong.append(f"{spelling}: {difference}"[:200])
    assert not wrong, "\n".join(wrong)
