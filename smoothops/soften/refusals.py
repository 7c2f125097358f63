"""What has no soft meaning is refused when a function is decorated, by line and reason."""

from __future__ import annotations

import ast

from .desugaring import UNSUPPORTED, expression_of, values_only
from .errors import refused
from .names import COMPREHENSIONS, Scope

STATEMENTS: dict[type[ast.AST], str] = {
    ast.Global: "a global variable would be written outside of the worlds; pass it as an argument and return it",
    ast.Nonlocal: "a variable of an outer function would be written outside of the worlds; pass and return it",
    ast.Try: "try cannot be softened: an exception has no weight; test the condition with if",
    ast.ClassDef: "a class inside of a softened function is not supported; define it outside",
    ast.AsyncFunctionDef: "async cannot be softened",
    ast.AsyncFor: "async cannot be softened",
    ast.AsyncWith: "async cannot be softened",
    ast.Await: "async cannot be softened",
    ast.Yield: "a generator would stop in the middle of a weight; collect the values in a list and return it",
    ast.YieldFrom: "a generator would stop in the middle of a weight; collect the values in a list and return it",
}
if hasattr(ast, "TryStar"):
    STATEMENTS[ast.TryStar] = STATEMENTS[ast.Try]
FORBIDDEN = {
    name: f"{name}() reaches around the local variables, which are kept in worlds"
    for name in ("locals", "vars", "globals", "exec", "eval", "setattr", "delattr", "super", "next")
}
FORBIDDEN["next"] = "next() changes an iterator, which cannot be copied for two worlds; use a for loop"
FORBIDDEN["super"] = "super() without arguments needs the original function; name the class"


def check(function: ast.FunctionDef, scope: Scope, filename: str) -> None:
    """Raises SoftenError for the first thing that cannot be softened."""
    for node in ast.walk(function):
        reason = None if node is function else reason_of(node, scope)
        if reason is not None:
            place = getattr(node, "context_expr", None) or getattr(node, "pattern", None) or node
            raise refused(filename, getattr(place, "lineno", function.lineno), f"{function.name}: {reason}")
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
    handed_on = {id(arg) for call in calls for arg in (*call.args, *(k.value for k in call.keywords))}
    handed_on |= {id(n.iter) for n in ast.walk(function) if isinstance(n, ast.For)}
    for node in ast.walk(function):
        if isinstance(node, ast.GeneratorExp) and id(node) not in handed_on:
            reason = "a generator expression that is kept would be read by several worlds; make a list"
            raise refused(filename, node.lineno, f"{function.name}: {reason}")


def reason_of(node: ast.AST, scope: Scope) -> str | None:
    reason = STATEMENTS.get(type(node))
    if reason is not None:
        return reason
    if (isinstance(node, ast.Name) and node.id.startswith("_so")) or (isinstance(node, ast.Name) and node.id == "_w"):
        return f"the name {node.id} is used by the generated code; choose another"
    if isinstance(node, ast.FunctionDef) and expression_of(node) is None:
        return "a function inside of a softened one may only return an expression; define others outside, softened"
    if isinstance(node, ast.match_case) and not values_only(node.pattern):
        return UNSUPPORTED
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return f"the attribute .{node.attr} of an object would be written in all worlds; use a local variable"
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        root = node.value
        while isinstance(root, ast.Subscript):
            root = root.value
        if isinstance(root, ast.Attribute) or (isinstance(root, ast.Name) and root.id not in scope.locals):
            name = ast.unparse(root)
            return f"an item of {name}, which is no local variable, would be written; pass it and return it"
    if isinstance(node, ast.Call):
        return call_reason(node, scope)
    if isinstance(node, ast.withitem) and node.optional_vars is not None:
        return "'with ... as name' is not supported; make the object outside"
    if isinstance(node, COMPREHENSIONS) and any(isinstance(n, ast.NamedExpr) for n in ast.walk(node)):
        return "':=' inside of a comprehension is not supported; write a loop"
    return None


def call_reason(node: ast.Call, scope: Scope) -> str | None:
    f = node.func
    if isinstance(f, ast.Name) and f.id in FORBIDDEN and f.id not in scope.locals:
        return FORBIDDEN[f.id]
    if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id not in scope.locals:  # noqa: SIM102
        if f.attr in ("append", "extend", "insert", "pop", "clear", "setdefault"):
            return f"{f.value.id}.{f.attr}() changes what is no local variable; pass it as an argument and return it"
    return None
