"""soften: an ordinary Python function, run on worlds of soft weight."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..regularizers import Entropy
from ..smoothing import Hard, SmoothingLike, StraightThrough, as_smoothing
from .errors import GENERATED, SoftenError, cannot
from .expressions import Expressions
from .frames import Frame, copied, mapped
from .merging import merged
from .names import writes
from .original import AS_WRITTEN, NotPython, as_written, on_tensors, runs_on_tensors
from .outcomes import GIVEN
from .purity import Purity
from .runtime import Options, Run
from .transform import transformed, with_type_parameters
from .values import SoftBool
from .weights import Weight, heaviest, product

DEPTH = 80  # of softened functions that call each other: a soft recursion ends only where its weight does


# one function is often softened at many eps
COMPILED: weakref.WeakKeyDictionary[Callable[..., Any], tuple] = weakref.WeakKeyDictionary()


class Softened:
    """A softened function; see :func:`soften`.

    Example:
        >>> @so.soften(smoothing=so.Quadratic(1.0))
        ... def side(x):
        ...     return "right" if x > 0 else "left"
        >>> side.worlds(torch.tensor(0.5)), side.hard(torch.tensor(0.5))
        ([(tensor(0.7500, dtype=torch.float64), 'right'), (tensor(0.2500, dtype=torch.float64), 'left')], 'right')
    """

    def __init__(self, function: Callable[..., Any], smoothing: SmoothingLike, max_iter: int, max_worlds: int) -> None:
        if function not in COMPILED:
            COMPILED[function] = compiled(function)
        self._run, self.source, self._aliases, self._writes = COMPILED[function]
        functools.update_wrapper(self, function)
        self._smoothing, self._max_iter, self._max_worlds = smoothing, max_iter, max_worlds
        self._signature = inspect.signature(function)
        self._purity = Purity(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_compile()
        if AS_WRITTEN.get():
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        return self._value(self._smoothing, args, kwargs)

    def hard(self, *args: Any, **kwargs: Any) -> Any:
        """The function as it was written, on copies of the arguments.

        What Python has no meaning for, conditions on batches, transforms and soft indices, runs under ``Hard()``.
        """
        self._refuse_compile()
        if not runs_on_tensors(self._purity.names):
            return self._value(Hard(), args, kwargs)
        try:
            return on_tensors(self.__wrapped__, self._purity.names, args, kwargs)  # type: ignore[attr-defined]
        except NotPython:
            return self._value(Hard(), args, kwargs)

    def worlds(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """The weights and values of all outcomes that differ in their discrete state, heaviest first."""
        self._refuse_compile()
        results = self._results(self._smoothing, args, kwargs)
        pairs = [(total_weight(w), mapped(w.value, plain)) for w in results]
        return sorted(pairs, key=lambda pair: -float(pair[0].detach().max()))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else Bound(self, instance)

    def __reduce__(self) -> str:
        return self.__qualname__  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<softened {self.__qualname__}>"  # type: ignore[attr-defined]

    # --- running ------------------------------------------------------------------------------------------------------

    def _results(
        self,
        smoothing: SmoothingLike,
        args: tuple,
        kwargs: dict,
        caller: Expressions | None = None,
        shared: Sequence[Any] = (),
    ) -> list[Frame]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        outside = self._purity.containers() if self._writes else []
        options = Options(smoothing, self._max_iter, self._max_worlds, self._aliases, outside)
        memo: dict[Any, Any] = {}
        variables = copied(dict(bound.arguments), memo)
        if shared:  # with another softened function, which sees what changes
            variables[GIVEN] = tuple(memo.get(id(x), x) for x in shared)
        run = Run(variables, options, caller)
        try:
            self._run(run)
        except Exception as error:
            if run.frame._so_weight is not None and not isinstance(error, SoftenError):
                weight = torch.as_tensor(product(run.frame._so_weight)).detach()
                error.add_note(f"raised on a soft path of weight {weight.max().item():.3g} of {self!r}")
            raise
        results = run.results()
        if run.lost:
            warnings.warn(
                f"{self!r} kept the max_worlds={self._max_worlds} heaviest worlds of different discrete state and lost "
                f"the mass {run.lost:.3g}; raise max_worlds, or keep less discrete state",
                RuntimeWarning,
                stacklevel=4,
            )
        return results

    def _value(self, smoothing: SmoothingLike, args: tuple, kwargs: dict) -> Any:
        if self._purity.holds((args, kwargs)):
            return as_written(self.__wrapped__, args, kwargs)  # type: ignore[attr-defined]
        results = self._results(smoothing, args, kwargs)
        if len(results) > 1:
            apart = results
            results = merged(results, aliases=False, integers=True)
            if len(results) > 1:
                raise SoftenError(self._several(apart))
        return mapped(results[0].value, plain)

    def _refuse_compile(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self!r} looks at its weights, which torch.compile cannot trace; use so.cond")

    def _several(self, results: list[Frame]) -> str:
        shown = [f"{describe(w.value)} with weight {heaviest(w._so_mass):.3g}" for w in results]
        return (
            f"{self!r} returns values that have no mean: {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}; "
            "return numbers or tensors of one structure, or read all of them with .worlds(...)"
        )

    def _so_outcomes(
        self, caller: Expressions, args: tuple, kwargs: dict, shared: Sequence[Any]
    ) -> list[tuple[Weight | None, Any]]:
        """What a call from another softened function may give, with weights: a value, and what became of ``shared``."""
        if caller.depth >= DEPTH:
            raise cannot(
                f"softened functions are {DEPTH} calls deep: the recursion does not end as long as its weight is "
                "positive; write a loop, or use Quadratic smoothing, whose weights reach 0"
            )
        results = self._results(caller.smoothing, args, kwargs, caller, shared)
        return [(w._so_weight, (w.value, w.__dict__.get(GIVEN, ()))) for w in results]


class Bound:
    """A softened method and its object."""

    def __init__(self, softened: Softened, instance: Any) -> None:
        self._softened, self._instance = softened, instance
        self.source = softened.source

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._softened(self._instance, *args, **kwargs)

    def hard(self, *args: Any, **kwargs: Any) -> Any:
        return self._softened.hard(self._instance, *args, **kwargs)

    def worlds(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        return self._softened.worlds(self._instance, *args, **kwargs)

    def _so_outcomes(
        self, caller: Expressions, args: tuple, kwargs: dict, shared: Sequence[Any]
    ) -> list[tuple[Weight | None, Any]]:
        return self._softened._so_outcomes(caller, (self._instance, *args), kwargs, shared)


def total_weight(world: Frame) -> Tensor:
    weight = product(world._so_weight)
    return weight if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float64)


def plain(x: Any) -> Any:
    return x.number if isinstance(x, SoftBool) else x


def describe(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 40 else f"{text[:36]} ..."


def compiled(function: Callable[..., Any]) -> tuple[Callable[[Run], None], str, bool, bool]:
    """The run of a function as code, its text, and whether it writes to items, or changes containers at all."""
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"soften takes a Python function, got {type(function).__name__}")
    if hasattr(function, "__wrapped__"):
        raise SoftenError(
            f"{function.__qualname__} is wrapped by another decorator, of which the source says nothing; put soften "
            "next to the function, below the other decorators"
        )
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise SoftenError(f"the source of {function.__qualname__} cannot be read; define it in a file") from error
    text = "".join(lines)
    indented = text[:1].isspace()
    tree = ast.parse("if 1:\n" + text if indented else text)
    node = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    if isinstance(node, ast.AsyncFunctionDef):
        raise SoftenError(f"{code.co_filename}:{first}: {function.__name__}: async cannot be softened")
    if not isinstance(node, ast.FunctionDef):
        raise SoftenError(f"{code.co_filename}:{first}: soften takes a function made by def, not a lambda")
    ast.increment_lineno(node, first - 1 - indented)
    node.decorator_list = []
    mangle(node, code.co_qualname.rpartition(".")[0].rpartition(".")[2])
    new = transformed(node, code.co_filename, function.__globals__)
    text, new.name = ast.unparse(new), "_so_run"  # a recursive function must find itself outside
    free = code.co_freevars
    arguments = ast.arguments([], [ast.arg(n) for n in free], None, [], [], None, [])
    outer = with_type_parameters(ast.FunctionDef("_so_outer", arguments, [new], []))
    module = ast.Module([ast.fix_missing_locations(ast.copy_location(outer, node))], [])
    made = code_of(code_of(compile(module, code.co_filename, "exec"), "_so_outer"), new.name)
    made = made.replace(co_name=code.co_name, co_qualname=code.co_qualname)
    GENERATED.add(made)
    cells = dict(zip(free, function.__closure__ or (), strict=True))
    run = types.FunctionType(
        made, function.__globals__, function.__name__, None, tuple(cells[n] for n in made.co_freevars)
    )
    items = any(isinstance(n, ast.AugAssign) for n in ast.walk(node)) or any(
        isinstance(n, ast.Subscript) and not isinstance(n.ctx, ast.Load) for n in ast.walk(node)
    )
    return run, text, items, any(map(writes, ast.walk(node)))


def mangle(function: ast.FunctionDef, owner: str) -> None:
    """The private names of a method, as the compiler has them inside of its class."""
    if owner in ("", "<locals>") or not owner.strip("_"):
        return

    def mangled(name: str) -> str:
        private = name.startswith("__") and not name.endswith("__")
        return f"_{owner.lstrip('_')}{name}" if private else name

    for node in ast.walk(function):
        for field in ("id", "attr", "arg"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                setattr(node, field, mangled(name))


def code_of(code: types.CodeType, name: str) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)


def soften(
    function: Callable[..., Any] | None = None,
    /,
    *,
    smoothing: SmoothingLike = 0.1,
    max_iter: int = 1000,
    max_worlds: int = 128,
) -> Any:
    """An ordinary Python function made differentiable: its decisions on tensors become weights.

    Every condition on a floating-point tensor splits the run into weighted worlds; where paths meet, worlds of equal
    discrete state become one, floats and tensors averaged by weight. The rules are in docs/soften.md.

    Args:
        smoothing: of each comparison; a number eps means Entropy(eps). max_iter: bound of soft loops.
        max_worlds: how many worlds of different discrete state are kept, the heaviest, with a warning.

    Returns: the function, on copies of its arguments; ``.hard(...)`` runs it as written, ``.worlds(...)`` returns
    the outcomes apart, ``.source`` is the generated code. Raises: SoftenError, a ValueError, by line and reason.
    Complexity: each statement once a world. Source: Petersen et al. 2021, "Learning with algorithmic supervision".

    Example:
        >>> @so.soften(smoothing=so.Quadratic(1.0))
        ... def tax(income):
        ...     return 0.5 * income - 1 if income > 2 else 0.25 * income - 0.5
        >>> tax(torch.tensor([2.0, 4.0])), tax.hard(torch.tensor(4.0))
        (tensor([0., 1.]), tensor(1.))
    """
    for name, value in (("max_iter", max_iter), ("max_worlds", max_worlds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if isinstance(as_smoothing(smoothing, Entropy, 0.1), StraightThrough):
        raise ValueError(
            "StraightThrough makes every weight 0 or 1, so that only the taken path runs and no condition has a "
            "gradient; use .hard(...) for the value and the softened function for the gradient"
        )
    if function is None:
        return lambda f: Softened(f, smoothing, max_iter, max_worlds)
    return Softened(function, smoothing, max_iter, max_worlds)
