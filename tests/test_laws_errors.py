"""Law 10: bad arguments raise, and the message names what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from oracles import normal
from registry import CASES, FAMILIES, OPERATORS, Operator

import smoothops as so

X = normal(2, 5)
W = torch.arange(5.0)
ONES = torch.ones(5)
SHORT = torch.ones(4)

BAD = {
    "eps < 0": (lambda: so.rank(X, smoothing=-0.5), ValueError, r"-0\.5"),
    "eps nan": (lambda: so.argmax(X, smoothing=float("nan")), ValueError, "nan"),
    "eps inf": (lambda: so.Entropy(float("inf")), ValueError, "inf"),
    "eps tensor 0": (lambda: so.Quadratic(torch.tensor(0.0)), ValueError, "positive"),
    "eps tensor < 0": (lambda: so.argmax(X, smoothing=torch.tensor([[1.0], [-1.0]])), ValueError, "positive"),
    "eps of a wrong shape": (lambda: so.argmax(X, -1, smoothing=torch.ones(3)), ValueError, r"\(3,\).*\(2, 1\)"),
    "eps of the other dim": (lambda: so.rank(X, 0, smoothing=torch.ones(2, 1)), ValueError, r"\(2, 1\).*\(1, 5\)"),
    "eps a string": (lambda: so.argmax(X, smoothing="hard"), TypeError, "str"),
    "eps a bool": (lambda: so.argmax(X, smoothing=True), TypeError, "bool"),
    "eps complex": (lambda: so.Quadratic(torch.tensor(1j)), TypeError, "complex"),
    "alpha < 1": (lambda: so.entmax(X, 0.5), ValueError, r"0\.5"),
    "alpha tensor < 1": (lambda: so.entmax(X, torch.tensor(0.5)), ValueError, r"0\.5"),
    "alpha inf": (lambda: so.Tsallis(float("inf"), 1.0), ValueError, "inf"),
    "mixing < 1": (lambda: so.Mixing(0.5), ValueError, r"0\.5"),
    "k > n": (lambda: so.topk_mask(X, 6), ValueError, r"6.*5"),
    "k < 0": (lambda: so.topk_mask(X, -1), ValueError, "-1"),
    "k nan": (lambda: so.topk_mask(X, float("nan")), ValueError, "nan"),
    "k tensor > n": (lambda: so.topk_mask(X, torch.tensor(5.5)), ValueError, r"5\.5"),
    "k of a wrong shape": (lambda: so.topk_mask(X, torch.ones(2)), ValueError, r"\(2,\)"),
    "k a string": (lambda: so.topk_mask(X, "2"), TypeError, "str"),
    "topk k > n": (lambda: so.topk(X, 6), ValueError, r"6.*5"),
    "topk k fractional": (lambda: so.topk(X, 1.5), TypeError, r"1\.5.*topk_mask"),
    "x a list": (lambda: so.argmax([1.0, 2.0]), TypeError, "list"),
    "x complex": (lambda: so.sort(torch.zeros(3, dtype=torch.complex64)), TypeError, "complex"),
    "dim too large": (lambda: so.argmax(X, 2), IndexError, "2"),
    "dim too small": (lambda: so.sort(X, -3), IndexError, "-3"),
    "topk dim": (lambda: so.topk(X, 1, 2), IndexError, "2"),
    "dim a tuple": (lambda: so.rank(X, (0, 1)), TypeError, r"\(0, 1\)"),
    "dim a float": (lambda: so.amax(X, 1.0), TypeError, r"1\.0"),
    "dim twice": (lambda: so.amax(X, (0, 0)), ValueError, "twice"),
    "dim a bool": (lambda: so.sort(X, True), TypeError, "True"),
    "where not bool": (lambda: so.rank(X, where=torch.ones(5)), TypeError, "float32"),
    "where of a wrong shape": (lambda: so.rank(X, where=SHORT.bool()), ValueError, r"\(4,\).*\(2, 5\)"),
    "weights <= 0": (lambda: so.rank(X, weights=torch.zeros(5)), ValueError, "positive"),
    "weights of a wrong shape": (lambda: so.rank(X, weights=SHORT), ValueError, r"\(4,\)"),
    "weights with Entropy": (lambda: so.rank(X, weights=ONES, smoothing=so.Entropy(1.0)), ValueError, "Entropy"),
    "isotonic weights": (lambda: so.isotonic(X, weights=-torch.ones(5)), ValueError, "positive"),
    "w of a wrong length": (lambda: so.Permutahedron(SHORT).argmax(X, 1.0), ValueError, r"5.*4"),
    "w without dims": (lambda: so.Permutahedron(torch.tensor(1.0)), ValueError, "dimension"),
    "w <= 0 with Entropy": (lambda: so.Permutahedron(W).argmax(X, so.Entropy(1.0)), ValueError, "w > 0"),
    "vertices without n": (lambda: so.Simplex().vertices(), ValueError, "vertices"),
    "an unbounded cone": (lambda: so.OrderPolytope().maximize(X), ValueError, "unbounded"),
    "penalty of Mixing": (lambda: so.Simplex().penalty(X, so.Quadratic(so.Mixing())), ValueError, "Mixing"),
    "Mixing on the Hypercube": (lambda: so.Hypercube().argmax(X, so.Quadratic(so.Mixing())), ValueError, "Mixing"),
    "mixing_eps of a stranger": (lambda: so.mixing_eps(torch.sort, X), ValueError, "sort"),
    "mixing_eps of a string": (lambda: so.mixing_eps(so.rank, X, smoothing="quadratic"), TypeError, "quadratic"),
    "max of mismatched tensors": (lambda: so.max(X, torch.ones(3)), (ValueError, RuntimeError), "3"),
    "a StraightThrough of a string": (lambda: so.argmax(X, smoothing=so.StraightThrough("x")), TypeError, "str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("operator", [pytest.param(o, id=o.name) for o in OPERATORS if len(o.smoothings) > 1])
def test_a_smoothing_that_is_not_defined_lists_those_that_are(operator: Operator) -> None:
    allowed = {c.family.split("1")[0].split("2")[0].split("3")[0] for c in CASES if c.operator is operator}
    if operator.name.split("-")[0] in ("rank", "sort", "topk", "kthvalue", "median", "quantile"):
        allowed |= {"laplace"}  # a line of its own
    if operator.name.startswith("ConvexSet"):
        allowed |= {"entropy", "tsallis", "binary"}  # see test_convex_set
    for name in ("quadratic", "entropy", "tsallis1.5", "binary", "laplace"):
        if name.split("1")[0] in allowed:
            continue
        with pytest.raises(ValueError, match=r"Quadratic|Entropy") as raised:
            operator.call(X, FAMILIES[name].make(0.5), -1)
        assert type(FAMILIES[name].make(0.5)).__name__ in str(raised.value)


@pytest.mark.parametrize("name", ["phi", "dphi", "psi", "phi_inverse", "omega", "cap", "simplex_argmax", "simplex_max"])
def test_a_regularizer_that_lacks_a_function_says_which(name: str) -> None:
    function = getattr(so.Regularizer, name)
    arguments = {"cap": (X,), "simplex_argmax": (X,), "simplex_max": (X,)}.get(name, (X, X))
    with pytest.raises(NotImplementedError, match=f"supplies no {name}, .* see docs/extending.md"):
        function(*arguments)


def test_values_of_tensors_are_not_looked_at_in_transforms() -> None:
    """Under vmap, grad and compile a bad value must not raise for a look at the host; shapes still do."""
    eps = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x = normal(3, 5)
    y = torch.vmap(lambda x, e: so.rank(x, smoothing=so.Quadratic(e)))(x, eps)
    torch.testing.assert_close(y, so.rank(x, smoothing=eps.unsqueeze(1)), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        torch.vmap(lambda x: so.rank(x, smoothing=so.Quadratic(torch.ones(3).double())))(x.unsqueeze(1))
