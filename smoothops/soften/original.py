"""The function as it was written, on copies of its arguments: what ``.hard`` runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .frames import copied

# whether a softened function is running as it was written: so do those that it calls
AS_WRITTEN: ContextVar[bool] = ContextVar("AS_WRITTEN", default=False)
IN_PLACE = {
    f"{name}_": getattr(Tensor, name) for name in ("add", "sub", "mul", "div", "floor_divide", "remainder", "pow")
} | {f"__i{name}__": getattr(Tensor, f"__{name}__") for name in ("and", "or", "xor", "lshift", "rshift")}


class NotPython(BaseException):
    """Something that Python has no meaning for: a condition on a batch, a weighted index."""


class Numbers(tuple):
    """The numbers of a vector; a loop meets each as it is when it comes to it."""

    vector: Tensor

    def __iter__(self) -> Iterator[Any]:
        return (self.vector[i].clone() for i in range(len(self)))


class Values(TorchFunctionMode):
    """0-d tensors behave as numbers of Python: no views of where they were read, and ``+=`` makes a new one."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self.names = names  # in the source: a method that changes its tensor there means to

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__bool__" and args[0].numel() != 1:
            raise NotPython
        if name == "__index__" and args[0].is_floating_point():
            raise NotPython
        if name in IN_PLACE and args[0].ndim == 0 and name not in self.names:
            return IN_PLACE[name](*args)
        if name == "__getitem__":
            if isinstance(args[1], Tensor) and args[1].is_floating_point():
                raise NotPython
            item = func(*args)
            return item.clone() if item.ndim == 0 else item
        result = func(*args, **(kwargs or {}))
        if name == "unbind" and args[0].ndim == 1:
            result = Numbers(number.clone() for number in result)
            result.vector = args[0]
        return result


def as_written(function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """function(*args, **kwargs) on copies, also in the softened functions that it calls."""
    memo: dict[Any, Any] = {}
    args, kwargs = copied((args, kwargs), memo)
    token = AS_WRITTEN.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        AS_WRITTEN.reset(token)


def on_tensors(function: Callable[..., Any], names: Container[str], args: tuple, kwargs: dict) -> Any:
    """The same with tensors among the arguments, which are copied too; two names of one stay two names of one."""
    args, kwargs = cloned((args, kwargs), {})
    with Values(names):
        return as_written(function, args, kwargs)


def cloned(x: Any, memo: dict[int, Any]) -> Any:
    """x with its tensors copied, in new containers."""
    if isinstance(x, Tensor):
        if id(x) not in memo:
            memo[id(x)] = x.clone()
        return memo[id(x)]
    made = copied(x, {})
    return _swap(made, memo, set())


def _swap(x: Any, memo: dict[int, Any], seen: set[int]) -> Any:
    if isinstance(x, Tensor):
        return cloned(x, memo)
    if isinstance(x, tuple):
        items = [_swap(item, memo, seen) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, list | dict) and id(x) not in seen:
        seen.add(id(x))
        for key, item in list(x.items() if isinstance(x, dict) else enumerate(x)):
            x[key] = _swap(item, memo, seen)
    return x


def runs_on_tensors(names: Container[str]) -> bool:
    """Whether Python can run it: under transforms no condition is a bool, and a tensor has no __round__."""
    return torch._C._functorch.peek_interpreter_stack() is None and "round" not in names
