"""Writes docs/operators and docs/smoothings, a page each from the docstrings: ``python docs/operator_pages.py``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from docstrings import sections, signature
from torch import Tensor

import smoothops as so

DOCS = Path(__file__).parent
COLORS = plt.get_cmap("viridis")([0.0, 0.35, 0.65, 0.9])
OTHERS = (-1.0, 0.5)  # what the moving entry is compared with

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})

# what a reader must know beside the docstring, by theme
SIMPLEX = """Ties share equally (`Hard`: the first one takes all). -inf has weight 0 and gradient 0; +inf takes all the
weight, shared among equal ones. With Quadratic and Tsallis weights are exactly 0 outside of the support; at
the edge of the support, a kink, the gradient is one-sided. An all-absent row has weights 0 and maximum
-inf."""
MASK = """Ties share equally. -inf has weight 0, +inf weight 1 (k shared equally where there are more than k of them);
neither carries gradient. With fewer than k present, each present item has weight 1. With Quadratic, where
no item is strictly between 0 and 1 the gradient is 0."""
ORDER = """Infinities are ordinary extremes: pooled with equal ones, never with finite items, without gradient. A gap
that equals eps (rank) or 1/eps (sort) is a kink: it is not pooled. With Laplace nothing is pooled and there
are no kinks."""
RANK = "Ties are symmetric: equal items have equal ranks and gradients; `Hard` averages them. " + ORDER
SORT = "Ties are differentiated along the stable order, as `torch.sort(stable=True)` does. " + ORDER
COMPARISON = """At a = b gt, ge, lt and le are 1/2 by symmetry, whatever eps; only `Hard` tells > from >=. Equal
infinities are a tie. The answer lies in [0, 1] for every input; NaN stays in its own entry. Numbers and integers
promote as in torch. A tensor eps broadcasts to a - b."""
FLOW = """Decisions are soft booleans; where they are 0 and 1 the answer is that of the ordinary program, to the bit. A
branch of weight exactly 0, and the steps after a row has halted, leave no trace in value or gradient, even where they
are inf or nan. The dims of a decision stand for the leading dims of every result.
[Control flow](../control_flow.md) says more."""
LOGIC = """The picture shows events that depend on the same x, taken for independent (`Product`): `between` is the exact
joint event. On 0 and 1 every logic is Boole's. Gradients are exact at 0 and 1 too; `Godel` shares them at ties."""
INDEX = """Integer indices go to torch's own function. A soft index is a distribution over the n positions: the integer
index's shape with a last dimension of size n, as `argmax`, `argsort` and `argtopk` give it. What has weight exactly 0
is not read, so that an inf or nan there leaves no trace."""
STEP = """At 0 a soft step is 1/2 by symmetry. Infinities are taken to their limits, without gradient; NaN stays in
its own entry. Quadratic has kinks where it meets the hard function, at distance eps; Entropy and Laplace
have none (Laplace a jump of the second derivative). A tensor eps broadcasts to x."""


@dataclass(frozen=True)
class Page:
    """``curve(x, eps)`` is what the picture shows, for each entry of x; ``unit`` is that of eps."""

    conventions: str
    curve: Callable[[Tensor, float], Tensor]
    shows: str
    unit: str = "the unit of x"
    strengths: tuple[float, ...] = (0.02, 0.3, 1.0, 3.0)


def rows(x: Tensor, others: tuple[float, ...] = OTHERS) -> Tensor:
    return torch.cat([x[:, None], torch.tensor(others, dtype=x.dtype).expand(len(x), -1)], 1)


def first(f: Callable[..., Tensor], **given: object) -> Callable[[Tensor, float], Tensor]:
    """The first entry of f's answer for (x, -1, 0.5), x moving."""
    return lambda x, e: f(rows(x), smoothing=e, **given)[:, 0]


def alone(f: Callable[..., Tensor], **given: object) -> Callable[[Tensor, float], Tensor]:
    return lambda x, e: f(x, smoothing=e, **given)


VALUES = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
CHOSEN = "(1, 0, 2) at the soft argmax of (x, -1, 0.5)"


def chosen(x: Tensor, eps: float) -> Tensor:
    return so.argmax(rows(x), 1, smoothing=eps)


def sides(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return so.gt(x, -1.0, smoothing=eps), so.lt(x, 1.0, smoothing=eps)


INVERSE = "1 / the unit of x"
SHARE = "the first weight of (x, -1, 0.5)"
WEIGHTS = "the weight of x among (x, -1, 0.5)"
PAGES: dict[str, Page] = {
    "argmax": Page(SIMPLEX, first(so.argmax, dim=1), WEIGHTS),
    "argmin": Page(SIMPLEX, first(so.argmin, dim=1), WEIGHTS),
    "amax": Page(SIMPLEX, lambda x, e: so.amax(rows(x), 1, smoothing=e), "the maximum of (x, -1, 0.5)"),
    "amin": Page(SIMPLEX, lambda x, e: so.amin(rows(x), 1, smoothing=e), "the minimum of (x, -1, 0.5)"),
    "max": Page(SIMPLEX, lambda x, e: so.max(rows(x), 1, smoothing=e).values, "the maximum of (x, -1, 0.5)"),
    "min": Page(SIMPLEX, lambda x, e: so.min(rows(x), 1, smoothing=e).values, "the minimum of (x, -1, 0.5)"),
    "sparsemax": Page(SIMPLEX, lambda x, e: so.sparsemax(rows(x) / e)[:, 0], WEIGHTS + ", of x/eps"),
    "entmax": Page(SIMPLEX, lambda x, e: so.entmax(rows(x) / e)[:, 0], WEIGHTS + ", of x/eps"),
    "topk_mask": Page(MASK, first(so.topk_mask, k=1.5), "the weight of x among (x, -1, 0.5), k = 1.5"),
    "rank": Page(RANK, first(so.rank), "the rank of x among (x, -1, 0.5)"),
    "sort": Page(SORT, lambda x, e: so.sort(rows(x), smoothing=e)[:, 1], "the middle one of (x, -1, 0.5)", INVERSE),
    "argsort": Page(
        RANK, lambda x, e: so.argsort(rows(x), smoothing=e)[:, 1, 0], "how much of x is in the middle of (x, -1, 0.5)"
    ),
    "argtopk": Page(
        RANK, lambda x, e: so.argtopk(rows(x), 1, smoothing=e)[:, 0, 0], "how much of x is on top of (x, -1, 0.5)"
    ),
    "soft_permutation": Page(
        RANK,
        lambda x, e: (so.soft_permutation(rows(x), smoothing=e) @ rows(x).unsqueeze(-1))[:, 1, 0],
        "the middle entry of P x for (x, -1, 0.5)",
    ),
    "topk": Page(SORT, lambda x, e: so.topk(rows(x), 2, smoothing=e)[:, 1], "the second of (x, -1, 0.5)", INVERSE),
    "kthvalue": Page(SORT, alone(lambda x, smoothing: so.kthvalue(rows(x), 2, smoothing=smoothing)),
                     "the second smallest of (x, -1, 0.5)", INVERSE),
    "median": Page(SORT, alone(lambda x, smoothing: so.median(rows(x), 1, smoothing=smoothing)),
                   "the median of (x, -1, 0.5)", INVERSE),
    "quantile": Page(SORT, alone(lambda x, smoothing: so.quantile(rows(x), 0.75, 1, smoothing=smoothing)),
                     "the 0.75 quantile of (x, -1, 0.5)", INVERSE),
    "isotonic": Page(
        "The fit is piecewise linear in x; at a kink, where two blocks just touch, the gradient is one-sided.\n"
        "It takes no smoothing: a projection is soft already. An infinity gives NaN in its row.",
        lambda x, e: so.isotonic(rows(x, (e - 1, 0.5)))[:, 0],
        "the first entry of the fit to (x, eps - 1, 0.5)", "no unit"),
    "heaviside": Page(STEP, alone(so.heaviside), "heaviside(x)"),
    "sign": Page(STEP, alone(so.sign), "sign(x)"),
    "relu": Page(STEP, alone(so.relu), "relu(x)"),
    "abs": Page(STEP, alone(so.abs), "abs(x)"),
    "maximum": Page(STEP, lambda x, e: so.maximum(x, torch.zeros_like(x) + 0.5, smoothing=e), "maximum(x, 0.5)"),
    "minimum": Page(STEP, lambda x, e: so.minimum(x, torch.zeros_like(x) + 0.5, smoothing=e), "minimum(x, 0.5)"),
    "clamp": Page(STEP, alone(so.clamp, min=-1.0, max=1.0), "clamp(x, -1, 1)"),
    "floor": Page(STEP, alone(so.floor), "floor(x)", strengths=(0.01, 0.05, 0.15, 0.5)),
    "ceil": Page(STEP, alone(so.ceil), "ceil(x)", strengths=(0.01, 0.05, 0.15, 0.5)),
    "round": Page(STEP, alone(so.round), "round(x)", strengths=(0.01, 0.05, 0.15, 0.5)),
    "gt": Page(COMPARISON, alone(so.gt, b=0.5), "gt(x, 0.5)"),
    "ge": Page(COMPARISON, alone(so.ge, b=0.5), "ge(x, 0.5)"),
    "lt": Page(COMPARISON, alone(so.lt, b=0.5), "lt(x, 0.5)"),
    "le": Page(COMPARISON, alone(so.le, b=0.5), "le(x, 0.5)"),
    "eq": Page(COMPARISON, alone(so.eq, b=0.5), "eq(x, 0.5)"),
    "ne": Page(COMPARISON, alone(so.ne, b=0.5), "ne(x, 0.5)"),
    "isclose": Page(COMPARISON, alone(so.isclose, b=0.5, atol=0.5), "isclose(x, 0.5, atol=0.5)"),
    "between": Page(COMPARISON, alone(so.between, low=-1.0, high=1.0), "between(x, -1, 1)"),
    "bucketize": Page(
        "The weights sum to 1 by construction. Equal edges enclose an empty bucket. NaN gives NaN in its row.",
        lambda x, e: so.bucketize(x, torch.tensor([-1.0, 1.0]), smoothing=e)[:, 1],
        "the weight of the middle bucket of edges -1, 1"),
    "searchsorted": Page(
        "As `bucketize`, with a sorted sequence a row.",
        lambda x, e: so.searchsorted(torch.tensor([-1.0, 1.0]), x, smoothing=e)[:, 2],
        "the weight of the last place in (-1, 1)"),
    "lookup": Page(
        "Equally near keys share; `Hard` takes the first. The weights are those of `argmax`, whose conventions hold.",
        lambda x, e: so.lookup(torch.tensor([-1.0, 0.0, 2.0]), x, torch.tensor([1.0, 0.0, 2.0]), smoothing=e),
        "lookup in {-1: 1, 0: 0, 2: 2}", "the unit of a squared distance"),
    "where": Page(
        "A branch of weight exactly 0 does not exist, in value and gradient, even where it is inf or nan. At weight\n"
        "exactly 1/2 both forms of the blend agree.",
        lambda x, e: so.where(so.heaviside(x, smoothing=e), x, torch.zeros_like(x)),
        "where(heaviside(x), x, 0)", "no unit"),
    "take": Page(INDEX, lambda x, e: so.take(VALUES, chosen(x, e)), CHOSEN, "no unit"),
    "take_along_dim": Page(
        INDEX, lambda x, e: so.take_along_dim(VALUES.expand(len(x), 3), chosen(x, e).unsqueeze(1), 1)[:, 0], CHOSEN,
        "no unit"),
    "gather": Page(
        INDEX, lambda x, e: so.gather(VALUES.expand(len(x), 3), 1, chosen(x, e).unsqueeze(1))[:, 0], CHOSEN, "no unit"),
    "index_select": Page(INDEX, lambda x, e: so.index_select(VALUES, 0, chosen(x, e)), CHOSEN, "no unit"),
    "narrow": Page(
        INDEX + " A slice that would leave the dimension is kept inside, or filled.",
        lambda x, e: so.narrow(VALUES.expand(len(x), 3), 1, chosen(x, e), 2)[:, 0],
        "the first of two of (1, 0, 2) from the argmax of (x, -1, 0.5)", "no unit"),
    "scatter": Page(
        INDEX + " Where writes meet, the last one wins.",
        lambda x, e: so.scatter(torch.zeros(len(x), 3), 1, chosen(x, e).unsqueeze(1), 1.0)[:, 0],
        "1 written at the argmax of (x, -1, 0.5)", "no unit"),
    "cond": Page(
        FLOW, lambda x, e: so.cond(so.heaviside(x, smoothing=e), torch.square, torch.neg, x), "x^2 if x > 0 else -x",
        "no unit"),
    "switch": Page(
        FLOW, lambda x, e: so.switch(
            so.bucketize(x, torch.tensor([-1.0, 1.0]), smoothing=e), [torch.neg, torch.zeros_like, torch.square], x),
        "-x below -1, 0, x^2 from 1 on", "no unit"),
    "fori_loop": Page(
        FLOW, lambda x, e: so.fori_loop(0, 3, lambda i, s: s - so.gt(s, 0.0, smoothing=e), x),
        "three times: if x > 0: x -= 1", "no unit"),
    "scan": Page(
        FLOW, lambda x, e: so.scan(
            lambda s, c: (s - c * so.gt(s, 0.0, smoothing=e), s), x, torch.tensor([0.5, 1.0, 1.5]))[0],
        "for c in (0.5, 1, 1.5): if x > 0: x -= c", "no unit"),
    "while_loop": Page(
        FLOW, lambda x, e: so.while_loop(
            lambda s: so.gt(s[0], 0.0, smoothing=e), lambda s: (s[0] - 1, s[1] + 1), (x, 0 * x), 60,
            on_fail="ignore")[0][1],
        "while x > 0: x -= 1; n += 1", "no unit", strengths=(0.02, 0.1, 0.3, 1.0)),
    "logical_and": Page(LOGIC, lambda x, e: so.logical_and(*sides(x, e)), "x > -1 and x < 1", "no unit"),
    "logical_or": Page(LOGIC, lambda x, e: so.logical_or(*sides(x, e)), "x > -1 or x < 1", "no unit"),
    "logical_xor": Page(LOGIC, lambda x, e: so.logical_xor(*sides(x, e)), "x > -1 xor x < 1", "no unit"),
    "implies": Page(LOGIC, lambda x, e: so.implies(*sides(x, e)), "x > -1 implies x < 1", "no unit"),
    "logical_not": Page(LOGIC, lambda x, e: so.logical_not(sides(x, e)[0]), "not x > -1", "no unit"),
    "all": Page(LOGIC, lambda x, e: so.all(torch.stack(sides(x, e)), 0), "all of x > -1, x < 1", "no unit"),
    "any": Page(LOGIC, lambda x, e: so.any(1 - torch.stack(sides(x, e)), 0), "any of x <= -1, x >= 1", "no unit"),
}  # fmt: skip

RELAXED = """Infinities keep their ends of the sorted row, exact and without gradient; between them the finite items
are sorted alone, and absent items come last. In argsort equal infinities share their positions. NaN gives NaN in its
row. At a tie the gradient follows the stable order; NeuralSort alone treats tied items alike."""
NOISE = """The answer is a sample mean: it changes with the state of the generator, and its gradient is an unbiased
estimate, whose spread grows as 1/eps. Infinities and absent items stay where they are: no noise moves them, and they
carry no gradient. NaN gives NaN in its row (elementwise: in its entry). `max` draws anew for values and for indices. A
tensor k of `topk_mask` carries no gradient. In sort the noise is on the positions 1..n, and eps has no unit there."""


def relaxed(smoothing: Callable[[float], so.Smoothing]) -> Callable[[Tensor, float], Tensor]:
    return lambda x, e: so.sort(rows(x), smoothing=smoothing(e))[:, 0]


def perturbed(x: Tensor, eps: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return so.argmax(rows(x), 1, smoothing=so.Perturbed(eps, samples=1000, generator=generator))[:, 0]


LEAST = "sort: the smallest of (x, -1, 0.5)"
SMOOTHINGS: dict[str, Page] = {
    "SoftSort": Page(RELAXED, relaxed(so.SoftSort), LEAST),
    "NeuralSort": Page(RELAXED, relaxed(so.NeuralSort), LEAST),
    "SortingNetwork": Page(RELAXED, relaxed(so.SortingNetwork), LEAST, strengths=(0.02, 0.1, 0.3, 1.0)),
    "Perturbed": Page(NOISE, perturbed, "argmax: the weight of x, 1000 samples",
                      strengths=(0.1, 0.3, 1.0, 3.0)),
}  # fmt: skip


def picture(folder: str, name: str, page: Page) -> None:
    """Value and derivative against x, one curve an eps."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.7), layout="constrained")
    for eps, color in zip(page.strengths, COLORS, strict=True):
        x = torch.linspace(-3, 3, 1201, dtype=torch.float64, requires_grad=True)
        y = page.curve(x, eps)
        (slope,) = torch.autograd.grad(y.sum(), x)
        axes[0].plot(x.detach(), y.detach(), color=color, lw=1.7, label=f"eps = {eps:g}")
        axes[1].plot(x.detach(), slope, color=color, lw=1.7)
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(max(low, -3.2), min(high, 3.2))  # a jump of the hard limit would dwarf every other slope
    axes[0].set_title(page.shows, fontsize=9)
    axes[1].set_title("derivative in x", fontsize=9)
    for ax in axes:
        ax.set_xlabel("x")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(DOCS / "img" / folder / f"{name}.png")
    plt.close(figure)


def code_names(text: str) -> str:
    """Docstring markup as markdown."""
    text = re.sub(r":func:`(\w+)`", r"[`\1`](\1.md)", text)
    return text.replace("``", "`")


def markdown(folder: str, name: str, page: Page) -> str:
    function = getattr(so, name)
    parts = sections(inspect.getdoc(function) or "")
    lines = [
        f"# {name}",
        "",
        "```text",
        *textwrap.wrap(f"so.{name}{signature(function)}", 100, subsequent_indent="    "),
        "```",
        "",
    ]
    lines += [code_names(parts[""]), ""]
    if "Args" in parts:
        arguments = re.sub(r"\n {2,}", " ", parts["Args"])
        lines += ["## Arguments", "", *(f"- {code_names(a)}" for a in arguments.splitlines()), ""]
    rest = {h: re.sub(r"\s+", " ", parts[h]) for h in ("Returns", "Raises", "Complexity", "Source") if h in parts}
    lines += [line for h, body in rest.items() for line in (f"**{h}.** {code_names(body)}", "")]
    lines += ["## Conventions", "", "" if page.unit == "no unit" else f"eps has {page.unit}.", "",
              page.conventions, "", f"![{page.shows}, for several eps](../img/{folder}/{name}.png)", ""]  # fmt: skip
    example = parts["Example"].strip()
    lines += ["## Example", "", "```python", ">>> import torch", ">>> import smoothops as so", example, "```", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def write(folder: str, pages: dict[str, Page], title: str) -> None:
    (DOCS / "img" / folder).mkdir(parents=True, exist_ok=True)
    (DOCS / folder).mkdir(exist_ok=True)
    for name, page in pages.items():
        picture(folder, name, page)
        (DOCS / folder / f"{name}.md").write_text(markdown(folder, name, page))
    index = [
        f"# {title}",
        "",
        "One page each: equation, arguments, conventions, a picture of value and gradient, an example.",
        "",
    ]
    for name in pages:
        summary = sections(inspect.getdoc(getattr(so, name)) or "")[""].split("\n")[0]
        index.append(f"- [`{name}`]({name}.md): {code_names(summary)}")
    (DOCS / folder / "index.md").write_text("\n".join(index) + "\n")
    print(f"wrote {len(pages)} pages")


def main() -> None:
    write("operators", PAGES, "Operators")
    write("smoothings", SMOOTHINGS, "Smoothings of other kinds")


if __name__ == "__main__":
    main()
