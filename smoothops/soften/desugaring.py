"""match statements on values -> if, elif, else; inner functions of one expression -> lambdas; before all else.

match x:                    subject = x
    case 0 | 1: A           if subject == 0 or subject == 1: A
    case _: B               else: B
"""

from __future__ import annotations

import ast

UNSUPPORTED = (
    "case takes values, names, | and _ here; write if, elif, else for patterns of sequences, dicts and classes"
)


def values_only(pattern: ast.pattern) -> bool:
    """Whether a pattern looks at the value alone, not into it."""
    if isinstance(pattern, ast.MatchOr):
        return all(map(values_only, pattern.patterns))
    if isinstance(pattern, ast.MatchAs):
        return pattern.pattern is None
    return isinstance(pattern, ast.MatchValue | ast.MatchSingleton)


def expression_of(function: ast.FunctionDef) -> ast.expr | None:
    """What a function returns, where that is all it does."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    single = len(body) == 1 and isinstance(body[0], ast.Return) and not function.decorator_list
    return (body[0].value or ast.Constant(None)) if single else None  # type: ignore[attr-defined]


class Desugared(ast.NodeTransformer):
    """Replaces match statements and inner functions."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Match(self, node: ast.Match) -> list[ast.stmt]:
        self.count += 1
        name = f"_so_subject_{self.count}"
        first: ast.stmt = ast.Assign([ast.Name(name, ast.Store())], node.subject)
        rest: list[ast.stmt] = []
        for case in reversed(node.cases):
            body = [new for statement in case.body for new in self.several(statement)]
            captured = case.pattern.name if isinstance(case.pattern, ast.MatchAs) else None
            if captured is not None:
                bind: ast.stmt = ast.Assign([ast.Name(captured, ast.Store())], ast.Name(name, ast.Load()))
                # the name is bound before the guard is asked, also where that says no
                rest = [bind, *(body if case.guard is None else [ast.If(case.guard, body, rest)])]
                continue
            test = condition(case.pattern, name)
            if case.guard is not None:
                test = case.guard if test is None else ast.BoolOp(ast.And(), [test, case.guard])
            rest = body if test is None else [ast.If(test, body, rest)]
        return placed([first, *(rest or [ast.Pass()])], node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        value = expression_of(node)
        assert value is not None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        function = ast.Lambda(node.args, self.visit(value))
        return placed([ast.Assign([ast.Name(node.name, ast.Store())], function)], node)[0]

    def several(self, statement: ast.stmt) -> list[ast.stmt]:
        new = self.visit(statement)
        return new if isinstance(new, list) else [new]


def placed(statements: list[ast.stmt], where: ast.stmt) -> list[ast.stmt]:
    """The statements, on the line of another one where they have none."""
    for new in statements:
        for child in ast.walk(new):
            if isinstance(child, ast.expr | ast.stmt) and not hasattr(child, "lineno"):
                child.lineno = child.end_lineno = where.lineno
                child.col_offset = child.end_col_offset = where.col_offset
    return statements


def condition(pattern: ast.pattern, name: str) -> ast.expr | None:
    """Whether the subject is what the pattern says; None for one that takes everything."""
    subject = ast.Name(name, ast.Load())
    if isinstance(pattern, ast.MatchValue):
        return ast.copy_location(ast.Compare(subject, [ast.Eq()], [pattern.value]), pattern)
    if isinstance(pattern, ast.MatchSingleton):
        return ast.copy_location(ast.Compare(subject, [ast.Is()], [ast.Constant(pattern.value)]), pattern)
    if isinstance(pattern, ast.MatchOr):
        tests = [condition(part, name) for part in pattern.patterns]
        return None if None in tests else ast.BoolOp(ast.Or(), [test for test in tests if test is not None])
    return None
