"""Law 4, and the conventions of sections on infinities, NaN and absent items."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import cotangent, normal, present, value_and_gradient
from registry import CASES, FAMILIES, OPERATORS, Case, Operator, case, cases, sum_error
from torch import Tensor

import smoothops as so

HARD = [pytest.param(o, id=o.name) for o in OPERATORS if o.hard]


@pytest.mark.parametrize("operator", HARD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("zero", ["Hard", "0", "Quadratic(0)"])
def test_hard_is_torch(operator: Operator, dtype: torch.dtype, zero: str) -> None:
    """Hard and a strength of 0 equal torch to the bit, ties as torch breaks them."""
    smoothing = {"Hard": so.Hard(), "0": 0, "Quadratic(0)": so.Quadratic(0.0)}[zero]
    arithmetic = operator.name in ("rank-weights", "Hypercube.max")  # sums that torch rounds in x's own dtype
    tolerance = {"rtol": 1e-14 if dtype == torch.float64 else 1e-6, "atol": 0} if arithmetic else {"rtol": 0, "atol": 0}
    for x in (normal(5, 7, seed=1) * 10, normal(20, 7, seed=2).round(), torch.zeros(2, 5)):
        if operator.name in ("topk_mask-fractional", "topk_mask-tensor"):
            x = x + 100 * torch.arange(x.numel()).reshape(
                x.shape
            )  # which of two tied items gets the part is nowhere specified
        x = x.to(dtype)
        for dim in (-1, 0):
            got, want = operator.call(x, smoothing, dim), operator.hard(x.to(torch.get_default_dtype()), dim)
            want = operator.hard(x, dim) if dtype.is_floating_point else want
            torch.testing.assert_close(got, want.to(got.dtype), **tolerance)


@pytest.mark.parametrize("name", ["amax", "amin", "max.values", "min.values", "sort", "sort-descending", "topk"])
def test_gradient_of_hard_values_is_torchs(name: str) -> None:
    operator = next(o for o in OPERATORS if o.name == name)
    for x in (normal(4, 7, seed=3), normal(4, 7, seed=4).round()):
        if name in ("sort-descending", "topk"):  # torch's unstable order of ties is not specified
            x = x + 1e-3 * torch.arange(7)
        got = value_and_gradient(lambda x: operator.call(x, so.Hard(), -1), x)
        want = value_and_gradient(lambda x: operator.hard(x, -1), x)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_all_of_a_tensor() -> None:
    """dim=None and tuples reduce as torch does, hard and soft."""
    x = normal(2, 3, 4, seed=5)
    assert torch.equal(so.max(x, smoothing=so.Hard()), x.max())
    assert torch.equal(so.min(x, smoothing=so.Hard()), x.min())
    assert torch.equal(so.amax(x, (0, 2), smoothing=so.Hard()), x.amax((0, 2)))
    assert torch.equal(so.argmax(x, smoothing=so.Hard()).flatten().argmax(), x.argmax())
    for smoothing in (so.Entropy(0.3), so.Quadratic(0.3), so.Tsallis(1.5, 0.3)):
        flat = so.amax(x.flatten(), smoothing=smoothing)
        torch.testing.assert_close(so.max(x, smoothing=smoothing), flat, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            so.argmax(x, smoothing=smoothing).flatten(), so.argmax(x.flatten(), smoothing=smoothing)
        )
        moved = so.amax(x.permute(1, 0, 2).flatten(1), -1, smoothing=smoothing)
        torch.testing.assert_close(so.amax(x, (0, 2), smoothing=smoothing), moved, rtol=1e-14, atol=0)
        pair = so.amax(torch.stack([x, x.flip(0)]), 0, smoothing=smoothing)
        torch.testing.assert_close(so.max(x, x.flip(0), smoothing=smoothing), pair, rtol=1e-14, atol=0)


def apart(n: int, seed: int) -> Tensor:
    """A shuffled row whose neighbours differ by at least 0.1."""
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
    return (gaps.cumsum(0) - gaps.sum() / 2)[torch.randperm(n, generator=generator)]


@pytest.mark.parametrize("case", cases("hard", lambda o: o.hard))
def test_small_eps_is_hard(case: Case) -> None:
    if case.excused("strength"):
        return
    x = apart(8, seed=6)
    torch.testing.assert_close(case(x, 1e-7), case.operator.call(x, so.Hard(), -1), rtol=0, atol=1e-5)
    assert case(x, 1e-30).isfinite().all()
    torch.testing.assert_close(case(x, 1e-30), case.operator.call(x, so.Hard(), -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", cases("centre", lambda o: o.centre))
def test_large_eps_is_the_centre(case: Case) -> None:
    x = normal(4, 7, seed=7)
    centre = torch.as_tensor(case.operator.centre(x), dtype=torch.float64)
    y = case(x, 1e10)
    torch.testing.assert_close(y, centre.expand_as(y), rtol=0, atol=1e-7)
    assert case(x, 1e30).isfinite().all()


def test_entropy_sort_tends_to_the_log_mean_exp() -> None:
    x = normal(6, seed=8)
    want = torch.logsumexp(x, 0) - torch.tensor(6.0, dtype=torch.float64).log()
    torch.testing.assert_close(so.sort(x, smoothing=so.Entropy(1e10)), want.expand(6), rtol=0, atol=1e-8)


extreme = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-8, 1e8, -1e8, 1e15, -1e15, 1e30, -1e30, 0.5, 3.0]),
    min_size=2,
    max_size=8,
)


@pytest.mark.parametrize("case", cases("extreme"))
@given(values=extreme)
def test_no_nan_and_no_overflow(case: Case, values: list[float]) -> None:
    """|x / eps| up to 1e30: finite values and gradients, inside the range that the answer can have."""
    x = torch.tensor(values, dtype=torch.float64)
    y, gradient = value_and_gradient(lambda x: case(x, 1.0), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    bound = len(x) * (1 + x.abs().max()) if case.operator.kind.degree else (len(x) + 1) ** 2
    if case.operator.name.startswith("OrderPolytope"):
        bound = (1 + x.abs().max()).square() * len(x)
    elif case.operator.name.startswith("Permutahedron"):
        bound = bound * len(x) ** 2
    assert y.abs().max() <= bound
    if case.operator.total and not case.excused("total") and case.operator.kind.degree == 0:
        assert abs(y.sum() - case.operator.total(x)) <= max(1e-9, sum_error(case))


# --- infinities -------------------------------------------------------------------------------------------------------

INF = torch.inf
CHOOSE = ("argmax", "amax", "max.values", "max.indices", "topk_mask", "topk_mask-fractional")
LEAST = ("argmin", "amin", "min.values", "min.indices", "topk_mask-smallest")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.operator.name in CHOOSE + LEAST])
def test_the_wrong_infinity_has_weight_and_gradient_0(case: Case) -> None:
    """-inf never counts (+inf for the min-type): the answer is that of the row without it."""
    wrong = INF if case.operator.name in LEAST else -INF
    x = torch.tensor([0.3, wrong, 1.0, -0.4, wrong, 0.8], dtype=torch.float64)
    keep = x.isfinite()
    (value, gradient), (want, want_gradient) = (
        value_and_gradient(lambda x: scaled_loss_input(case, x, keep), x),
        value_and_gradient(case, x[keep]),
    )
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient[keep], want_gradient, rtol=1e-9, atol=1e-11)
    assert torch.equal(gradient[~keep], torch.zeros(2, dtype=torch.float64))
    y = case(x)
    assert y.shape[-1] == 1 or torch.equal(y[~keep], torch.zeros(2, dtype=torch.float64))


def scaled_loss_input(case: Case, x: Tensor, keep: Tensor) -> Tensor:
    """The entries of the answer that belong to ``keep``, so that both losses weigh the same items."""
    y = case(x)
    return y[keep] if y.shape[-1] == len(keep) else y


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name) for c in CASES if c.operator.name in ("argmax", "topk_mask")]
)
def test_plus_infinity_takes_the_weight(case: Case) -> None:
    x = torch.tensor([0.3, INF, 1.0, -0.4], dtype=torch.float64)
    y, gradient = value_and_gradient(case, x)
    assert y[1] == 1
    assert gradient[1] == 0
    assert gradient.isfinite().all()
    if case.operator.name == "argmax":
        assert torch.equal(y, torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))
        assert torch.equal(gradient, torch.zeros(4, dtype=torch.float64))
    else:
        assert abs(y.sum() - 2) <= 1e-14
        rest = case.operator.name
        assert rest == "topk_mask"
        finite = torch.tensor([0, 2, 3])
        one = so.topk_mask(x[finite], 1, smoothing=case.smoothing())
        torch.testing.assert_close(y[finite], one, rtol=1e-12, atol=1e-14)
    many = torch.tensor([INF, 0.0, INF, INF], dtype=torch.float64)
    y, gradient = value_and_gradient(case, many)
    assert abs(y.sum() - (1 if case.operator.name == "argmax" else 2)) <= 1e-14
    assert y[1] == 0
    assert torch.equal(gradient, torch.zeros(4, dtype=torch.float64))
    if "hard" not in case.family and "straight" not in case.family:
        assert (y[[0, 2, 3]] - y[0]).abs().max() <= 1e-15


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.operator.name in ("amax", "amin")])
def test_maximum_of_infinities(case: Case) -> None:
    sign = 1 if case.operator.name == "amax" else -1
    top = sign * torch.tensor([[0.0, INF, 1.0], [-INF, -INF, -INF], [INF, INF, -INF]], dtype=torch.float64)
    y, gradient = value_and_gradient(case, top)
    assert torch.equal(y.squeeze(-1), sign * torch.tensor([INF, -INF, INF], dtype=torch.float64))
    assert not gradient.isnan().any()


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.operator.name in ("sort", "rank")])
def test_orders_keep_infinities_apart(case: Case) -> None:
    """Ordinary extremes: exact in a sort, first and last in a rank, never pooled with finite items, gradient 0."""
    x = torch.tensor([0.3, INF, 0.5, -INF, -0.4, INF], dtype=torch.float64)
    keep = x.isfinite()
    if case.operator.name == "sort":
        y, gradient = value_and_gradient(lambda x: case(x)[1:4], x)
        whole = case(x)
        assert whole[0] == -INF
        assert (whole[4:] == INF).all()
        want, want_gradient = value_and_gradient(case, x[keep])
    else:
        y, gradient = value_and_gradient(lambda x: case(x)[keep], x)
        whole = case(x)
        if case.family != "default":
            assert whole[3] == 1
            assert (whole[[1, 5]] == 5.5).all()
        want, want_gradient = value_and_gradient(lambda x: rank_between(case, x), x[keep])
    if case.family != "default" and case.operator.name == "sort":
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient[keep], want_gradient, rtol=1e-10, atol=1e-12)
    if case.operator.name == "rank" and case.family != "default":
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient[keep], want_gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(gradient[~keep], torch.zeros(3, dtype=torch.float64))


def rank_between(case: Case, x: Tensor) -> Tensor:
    """The ranks 2, 3, 4 of three finite items with one item below and two above."""
    if case.family in ("hard", "straight", "straight-entropy"):
        value = so.rank(x, smoothing=so.Hard()) + 1
        soft = so.Permutahedron(torch.tensor([2.0, 3, 4]).double()).argmax(x, case.smoothing())
        return value.detach() + (soft - soft.detach())
    return so.Permutahedron(torch.tensor([2.0, 3, 4]).double()).argmax(x, case.smoothing())


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("nan", all_core=False))
def test_nan_stays_in_its_row(case: Case) -> None:
    x = normal(4, 6, seed=9)
    clean, clean_gradient = value_and_gradient(case, x)
    x[1, 2] = torch.nan
    x[3] = torch.nan
    y, gradient = value_and_gradient(case, x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])
    if case.operator.name.startswith("Hypercube.argmax"):
        assert y[1, 2].isnan()
        assert torch.equal(y[1, [0, 1, 3, 4, 5]], clean[1, [0, 1, 3, 4, 5]])
    elif case.operator.name == "max-of-two":
        assert y[1, [2, 3]].isnan().all()
    elif case.operator.without is None:
        assert y[1].isnan().all()
        assert gradient[1].isnan().any()
    assert case.operator.without is not None or y[3].isnan().all()


# --- absent items -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("where", lambda o: o.without, all_core=True))
@pytest.mark.parametrize("junk", [0.0, 1e6, -1e6, torch.nan, INF, -INF])
def test_absent_items_do_not_count(case: Case, junk: float) -> None:
    """The answer is that of the present items alone, whatever stands in the absent places; absent: 0 (a sort: fill)."""
    x = normal(3, 7, seed=10)
    mask = present(x, -1).expand_as(x)
    keep = present(x, -1)[0]
    x = torch.where(mask, x, junk)
    m = int(keep.sum())
    y, gradient = value_and_gradient(case, x)
    alone = case.operator.without(x[:, keep], case.smoothing(), -1)
    kind = case.operator.name.split("-")[0]
    if kind == "sort":
        got, rest = y[:, :m], y[:, m:]
    elif kind == "amax":
        got, rest = y, y[:, :0]
    else:
        got, rest = y[:, keep], y[:, ~keep]
    torch.testing.assert_close(got, alone, rtol=1e-12, atol=1e-13)
    assert torch.equal(rest, torch.zeros_like(rest))
    assert torch.equal(gradient[:, ~keep], torch.zeros_like(gradient[:, ~keep]))
    c = cotangent(y)
    c = c[:, :m] if kind == "sort" else c if kind == "amax" else c[:, keep]
    part = x[:, keep].clone().requires_grad_()
    (want,) = torch.autograd.grad((case.operator.without(part, case.smoothing(), -1) * c).sum(), part)
    torch.testing.assert_close(gradient[:, keep], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("one", "entmax")])
def test_a_row_without_items(family: str) -> None:
    """Weights and ranks 0, the sort all fill, the maximum -inf; no NaN in any gradient."""
    x = normal(2, 4, seed=11)
    mask = torch.tensor([[True] * 4, [False] * 4])
    zero = torch.zeros(4, dtype=torch.float64)
    smoothing = FAMILIES[family].make(0.5)
    calls = {
        "argmax": lambda x: so.argmax(x, -1, where=mask, smoothing=smoothing),
        "topk_mask": lambda x: so.topk_mask(x, 2, where=mask, smoothing=smoothing),
        "rank": lambda x: so.rank(x, where=mask, smoothing=smoothing),
        "sort": lambda x: so.sort(x, where=mask, fill=0.0, smoothing=smoothing),
    }
    for name, call in calls.items():
        if not any(c.family == family and c.operator.name == name for c in CASES):
            continue
        y, gradient = value_and_gradient(call, x)
        assert torch.equal(y[1], zero)
        assert torch.equal(gradient[1], zero)
        alone = case(f"{name}-{family}").operator.call(x[0], smoothing, -1)
        torch.testing.assert_close(y[0], alone, rtol=1e-13, atol=1e-14)
    if any(c.family == family and c.operator.name == "amax" for c in CASES):
        y, gradient = value_and_gradient(lambda x: so.amax(x, -1, where=mask, smoothing=smoothing)[:1], x)
        assert so.amax(x, -1, where=mask, smoothing=smoothing)[1] == -INF
        assert torch.equal(gradient[1], zero)


@pytest.mark.parametrize("family", ["quadratic", "entropy", "laplace", "binary", "tsallis1.5", "hard", "default"])
def test_fewer_present_than_k(family: str) -> None:
    """Each present item has weight 1; a top-k of values pads with fill."""
    x = normal(2, 5, seed=12)
    mask = torch.tensor([[True, False, False, True, False], [True, True, False, True, True]])
    y, gradient = value_and_gradient(lambda x: so.topk_mask(x, 3, where=mask, smoothing=FAMILIES[family].make(0.5)), x)
    assert torch.equal(y[0], mask[0].double())
    assert torch.equal(gradient[0], torch.zeros(5, dtype=torch.float64))
    assert abs(y[1].sum() - 3) <= 1e-14
    if family in ("quadratic", "entropy", "hard", "default"):
        top = so.topk(x, 3, where=mask, fill=-7.0, smoothing=FAMILIES[family].make(2.0))
        assert top[0, 2] == -7
        pads = so.topk(x, 3, where=mask, smoothing=FAMILIES[family].make(2.0))
        assert torch.equal(pads.isnan(), torch.tensor([[False, False, True], [False] * 3]))
