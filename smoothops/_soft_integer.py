"""The soft integer of a softened context: a distribution over integers, as argmax or a sort's indices are.

Its entries are the hard integers, so that it works wherever torch needs integers; the distribution is used wherever
an average means something. Elementwise integer functions are exact: they act on the support and leave the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import comparisons
from ._soft_boolean import COMPARISONS, SoftBoolean, as_soft_boolean
from ._soft_boolean import RULES as BOOLEAN_RULES
from ._soft_choices import where_arguments
from ._soft_values import PROPERTIES, STRUCTURAL, SoftValue, any_of, context, ordered, own_work, plain, spelled
from .selection import where as soft_where

Law = tuple[Tensor, Tensor]  # weights and support, both (..., n)


class SoftInteger(SoftValue):
    """Hard integers (...), which know the distribution that they are the choice of."""

    before = ()
    _make: Callable[[], Law]
    _law: Law | None
    _with_grad: bool

    @property
    def law(self) -> Law:
        """The weights and the integers that they belong to, both (..., n); made at the first use."""
        if self._law is None:
            with torch.set_grad_enabled(self._with_grad):  # that of the choice, not of whoever asks first
                self._law = self._make()
        return self._law

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (plain(self), *self.law)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return as_soft_integer(plain(self).clone(), lambda law=self.law: law)  # type: ignore[misc]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not own_work():
            rule = RULES.get(func)
            if rule is not None:
                args, kwargs = ordered(func, args, kwargs)
                out = rule(func, *args, **kwargs)
                if out is not NotImplemented:
                    return out
            _refuse_in_place(func, args)
            of_boolean = BOOLEAN_RULES.get(func)
            if of_boolean is not None and any_of((*args, *kwargs.values()), SoftBoolean):
                return of_boolean(func, *map(_hard, args), **{k: _hard(v) for k, v in kwargs.items()})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


SoftBoolean.before = (SoftInteger,)


def _refuse_in_place(func: Any, args: Any) -> None:
    name = getattr(func, "__name__", "")
    changes = name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))
    if changes and args and isinstance(args[0], SoftInteger):
        raise TypeError(
            f"{name} would change a soft integer in place and leave its distribution behind; for hard integers enter "
            'so.softened(keep="argmax") (or whatever made them)'
        )


def as_soft_integer(hard: Tensor, make: Callable[[], Law]) -> Any:
    """``hard`` (...) with a distribution, which ``make`` computes when it is needed."""
    with torch._C.DisableTorchFunctionSubclass():
        out = hard.as_subclass(SoftInteger)
    out._make, out._law, out._with_grad = make, None, torch.is_grad_enabled()
    return out


def chosen(hard: Tensor, weights: Callable[[], Tensor]) -> Any:
    """The soft integer over 0, ..., n - 1 with weights (..., n)."""

    def make() -> Law:
        w = weights()
        return w, torch.arange(w.shape[-1], device=w.device).expand(w.shape)

    return as_soft_integer(hard, make)


def _rebuilt(hard: Tensor, weights: Tensor, support: Tensor) -> Any:
    return as_soft_integer(hard, lambda: (weights, support))


def _hard(x: Any) -> Any:
    if isinstance(x, SoftInteger):
        return plain(x)
    return type(x)(_hard(v) for v in x) if type(x) in (list, tuple) else x


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_j w_j v_j over the last dim; weight exactly 0 leaves out inf and nan."""
    w, v = torch.broadcast_tensors(weights, values.to(torch.promote_types(weights.dtype, values.dtype)))
    # other values stay: under StraightThrough a weight of 0 has a gradient
    return (w * torch.where((w == 0) & ~v.isfinite(), 0, v)).sum(-1)


def over_support(f: Callable[..., Any], *args: Any) -> Any:
    """f on each integer of the support: tensors (..., n) marked by :class:`Each` lose and regain their last dim."""
    return torch.vmap(f, in_dims=tuple(-1 if isinstance(a, Each) else None for a in args), out_dims=-1)(
        *(a.values if isinstance(a, Each) else a for a in args)
    )


class Each:
    def __init__(self, values: Tensor) -> None:
        self.values = values


# --- rules -----------------------------------------------------------------------------------------------------------

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(spelled(*names), function))
        return function

    return register


@rule(
    "repeat_interleave",
    *(name for name in STRUCTURAL if not name.endswith("_") and name not in ("broadcast_tensors", "__reversed__")),
)
def _structural(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, SoftInteger):
        return NotImplemented
    move = lambda v: func(v, *plain(args), **kwargs)  # noqa: E731
    hard = move(plain(x))
    if func in _OUTSIDE_VMAP:
        return as_soft_integer(hard, lambda: (move(x.law[0]), move(x.law[1])))
    both = _once(lambda: tuple(torch.vmap(move, in_dims=-1, out_dims=-1)(v) for v in x.law))
    if isinstance(hard, Tensor):
        return as_soft_integer(hard, both)
    return type(hard)(
        as_soft_integer(h, lambda i=i: tuple(v[i] for v in both()))  # type: ignore[misc]
        for i, h in enumerate(hard)
    )


_OUTSIDE_VMAP = {*spelled("cpu", "cuda", "pin_memory"), Tensor.data.__get__}  # type: ignore[attr-defined]
for _property in PROPERTIES:
    RULES[_property] = _structural


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


@rule("cat", "concat", "concatenate", "stack")
def _join(func: Any, parts: Any, dim: int = 0) -> Any:
    if not all(isinstance(p, SoftInteger) for p in parts):
        return NotImplemented
    laws = [p.law for p in parts]
    if len({w.shape[-1] for w, _ in laws}) > 1:
        return NotImplemented
    hard = func([plain(p) for p in parts], dim)
    at = dim if dim >= 0 else dim - 1  # before the dim of the distribution
    return as_soft_integer(hard, lambda: tuple(func([law[i] for law in laws], at) for i in (0, 1)))


@rule("__format__")
def _format(func: Any, x: Any, spec: str) -> str:
    return format(plain(x), spec)


@rule("__iter__")
def _iterate(func: Any, x: Any) -> Any:
    return iter([x[i] for i in range(len(x))])


def _compare(name: str, hard: Callable[[Any, Any], Any]) -> Rule:
    """P(X op y): the weight of the support where it holds; two soft integers are taken for independent."""

    def holds(a: Any, b: Any) -> Any:
        """With floats it is itself a soft comparison, in a context that has not kept it."""
        innermost = context()
        floats = any(isinstance(v, Tensor) and v.is_floating_point() for v in (a, b))
        if not floats or innermost is None or name in innermost._kept:
            return hard(a, b)
        return getattr(comparisons, name)(a, b, smoothing=innermost.smoothing)

    def compare(func: Any, x: Any, y: Any) -> Any:
        if not all(isinstance(v, (Tensor, int, float)) for v in (x, y)):  # `i == None`
            return NotImplemented
        if isinstance(x, SoftBoolean):
            p, yes, no = (plain(v) for v in (x, compare(func, 1, y), compare(func, 0, y)))
            return as_soft_boolean(p * yes + (1 - p) * no)
        if isinstance(y, SoftBoolean):
            p, yes, no = (plain(v) for v in (y, compare(func, x, 1), compare(func, x, 0)))
            return as_soft_boolean(p * yes + (1 - p) * no)

        def against(y: Any) -> Tensor:
            weights, support = x.law
            yes = over_support(holds, Each(support), y)
            return weighted(weights, yes.to(weights.dtype))

        if isinstance(x, SoftInteger) and isinstance(y, SoftInteger):
            weights, support = y.law
            p = weighted(weights, over_support(against, Each(support)))
        elif isinstance(x, SoftInteger):
            p = against(y)
        else:
            weights, support = y.law
            p = weighted(weights, over_support(lambda s: holds(x, s), Each(support)).to(weights.dtype))
        # a sum of weights may exceed 1 by rounding
        return as_soft_boolean(p + (p.clamp(0, 1) - p).detach())

    return compare


for _main, (_holds, _names) in COMPARISONS.items():
    rule(*_names)(_compare(_main, _holds))


def _arithmetic(f: Callable[..., Any], linear: bool) -> Rule:
    """An elementwise function of the hard integers and of the support; with floats, of the expected integer."""

    def calculate(func: Any, *args: Any, **kwargs: Any) -> Any:
        soft = [a for a in args if isinstance(a, SoftInteger)]
        if any(isinstance(a, float) or (isinstance(a, Tensor) and a.is_floating_point()) for a in args):
            return f(*(mean(a) if isinstance(a, SoftInteger) else a for a in args)) if linear else NotImplemented
        if len(soft) != 1 or kwargs:
            return NotImplemented

        def make() -> Law:
            weights, support = soft[0].law
            support = over_support(f, *(Each(support) if isinstance(a, SoftInteger) else a for a in args))
            return weights.broadcast_to(support.shape), support

        return as_soft_integer(f(*map(_hard, args)), make)

    return calculate


for _name, *_aliases in (("add",), ("sub", "subtract"), ("mul", "multiply"), ("floordiv", "floor_divide"),
                         ("mod", "remainder")):  # fmt: skip
    _f, _linear = getattr(operator, _name), _name in ("add", "sub", "mul")
    # not add_, which would leave the distribution behind: Python then reads `x += 1` as `x = x + 1`
    rule(f"__{_name}__", _name, *_aliases)(_arithmetic(_f, _linear))
    rule(f"__r{_name}__")(_arithmetic(lambda a, b, _f=_f: _f(b, a), _linear))
rule("__neg__", "neg", "negative")(_arithmetic(operator.neg, True))


@rule("__truediv__", "div", "divide", "true_divide", "__rtruediv__", "__rdiv__")
def _divide(func: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    """The expected integer, divided; nothing else is linear."""
    if kwargs or not isinstance(x, SoftInteger) or isinstance(y, SoftInteger) or func.__name__.startswith("__r"):
        return NotImplemented
    return mean(x) / y


def mean(x: SoftInteger) -> Tensor:
    """The expected integers."""
    return weighted(*x.law)


@rule("sum", "mean", "cumsum")
def _sum(func: Any, x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if dtype is not None and dtype.is_floating_point:
        kwargs["dtype"] = dtype
    return func(mean(x), *args, **kwargs)


@rule("where")
def _mixture(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One of two integers: the mixture of their distributions."""
    condition, x, y = where_arguments(func, *args, **kwargs)
    if isinstance(condition, SoftInteger):
        return NotImplemented
    c = plain(condition)
    if any(isinstance(v, float) or (isinstance(v, Tensor) and v.is_floating_point()) for v in (x, y)):
        return soft_where(c, *(mean(v) if isinstance(v, SoftInteger) else plain(v) for v in (x, y)))
    hard = torch.where(c if c.dtype == torch.bool else c > 0.5, _hard(x), _hard(y))
    laws = [v.law if isinstance(v, SoftInteger) else _certain(v, hard) for v in (x, y)]

    def make() -> Law:
        dtype = next(w.dtype for w, _ in laws if w.is_floating_point())
        share = c.to(dtype).unsqueeze(-1)
        parts = [(share * laws[0][0], laws[0][1]), ((1 - share) * laws[1][0], laws[1][1])]
        wide = [[t.broadcast_to(*hard.shape, t.shape[-1]) for t in part] for part in parts]
        return torch.cat([wide[0][0], wide[1][0]], -1), torch.cat([wide[0][1], wide[1][1]], -1)

    return as_soft_integer(hard, make)


def _certain(v: Any, like: Tensor) -> Law:
    support = torch.as_tensor(v, device=like.device).unsqueeze(-1)
    return torch.ones_like(support), support


@rule("float", "double", "half", "bfloat16", "to", "type")
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The expected integer, in a floating dtype; otherwise the same soft integer elsewhere."""
    if not isinstance(x, SoftInteger):
        return NotImplemented
    hard = func(plain(x), *plain(args), **kwargs)
    if not isinstance(hard, Tensor):
        return hard
    weights, support = x.law
    if hard.is_floating_point():
        return weighted(weights, support).to(hard.device, hard.dtype)
    return as_soft_integer(hard, lambda: (weights.to(hard.device), support.to(hard.device)))


rule("long", "int", "short")(_cast)
