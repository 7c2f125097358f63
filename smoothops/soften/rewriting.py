"""Expressions of a function -> expressions of one world ``_w``, by way of the run ``_so`` where they may be soft."""

from __future__ import annotations

import ast
import builtins
from types import ModuleType
from typing import Any

from .calls import SOFTENED_BUILTINS
from .names import Scope, target_names

OPERATORS: dict[type, str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/",
    ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.MatMult: "@", ast.BitAnd: "&", ast.BitOr: "|",
    ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>",
}  # fmt: skip
# builtins that are called as they are; a statement that calls nothing else makes no choice between outcomes
DIRECT = frozenset(
    (
        "len", "range", "enumerate", "zip", "reversed", "isinstance", "list", "tuple", "dict", "set", "str", "repr",
        "type", "divmod", "ord", "chr",
    )
)  # fmt: skip


def run_call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name("_so", ast.Load()), name, ast.Load()), list(args), [])


def thunk(body: ast.expr) -> ast.Lambda:
    return ast.Lambda(ast.arguments([], [], None, [], [], None, []), body)


def placed(nodes: list[Any], where: ast.AST) -> list[Any]:
    """The nodes at the place of another one, as far as they have none."""
    for new in nodes:
        for child in ast.walk(new):
            if isinstance(child, ast.expr | ast.stmt | ast.keyword | ast.arg) and not hasattr(child, "lineno"):
                ast.copy_location(child, where)
                if child.lineno != child.end_lineno:  # a method call on several lines counts as one on the last
                    child.end_lineno, child.end_col_offset = child.lineno, child.col_offset
    return nodes


def boolean(node: ast.expr) -> bool:
    """Whether the value is True, False or a soft boolean."""
    if isinstance(node, ast.BoolOp):
        return all(map(boolean, node.values))
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


class Expression(ast.NodeTransformer):
    """Rewrites the expressions of one world."""

    def __init__(self, scope: Scope, globals_: dict[str, Any]) -> None:
        self.scope, self.globals = scope, globals_
        self.shadows: list[set[str]] = []
        self.choices = False  # whether the expression may have several outcomes

    def visit(self, node: ast.AST) -> Any:
        new = super().visit(node)
        if isinstance(new, ast.expr) and isinstance(node, ast.expr) and hasattr(node, "lineno"):
            placed([ast.copy_location(new, node)], node)
        return new

    def local(self, name: str) -> bool:
        return name in self.scope.locals and not any(name in shadow for shadow in self.shadows)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not self.local(node.id):
            return node
        return ast.Attribute(ast.Name("_w", ast.Load()), node.id, node.ctx)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        operands = [self.visit(node.left), *(self.visit(c) for c in node.comparators)]
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            return ast.Compare(operands[0], node.ops, operands[1:])
        args = [operands[0], ast.Constant(OPERATORS[type(node.ops[0])]), operands[1]]
        for op, operand in zip(node.ops[1:], operands[2:], strict=True):
            args += [ast.Constant(OPERATORS[type(op)]), thunk(operand)]
        return run_call("compare", *args)

    def condition(self, node: ast.expr) -> ast.expr:
        """An expression of which only the truth is used."""
        if isinstance(node, ast.BoolOp):
            first, *rest = (self.condition(value) for value in node.values)
            new = run_call("and_" if isinstance(node.op, ast.And) else "or_", first, *map(thunk, rest))
            return ast.copy_location(new, node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ast.copy_location(run_call("not_", self.condition(node.operand)), node)
        return self.visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        if boolean(node):
            return self.condition(node)
        self.choices = True  # the value is one of the operands
        first, *rest = (self.visit(value) for value in node.values)
        end = ast.Constant(isinstance(node.op, ast.Or))
        return run_call("operand", end, first, *map(thunk, rest))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.Not):
            return self.condition(node)
        return ast.UnaryOp(node.op, self.visit(node.operand))

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.choices = True
        sides = (thunk(self.visit(side)) for side in (node.body, node.orelse))
        return run_call("ifexp", self.condition(node.test), *sides)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        function = self.function(node.func)
        args = [self.visit(arg) for arg in node.args]
        keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        name = node.func.id if isinstance(node.func, ast.Name) and self.builtin(node.func.id) else ""
        if name in DIRECT:
            return ast.Call(function, args, keywords)
        self.choices |= name not in SOFTENED_BUILTINS or bool(keywords)
        call = run_call("call", function, *args)
        call.keywords = keywords
        return call

    def function(self, node: ast.expr) -> ast.expr:
        """What is called: a method is read as it is."""
        if isinstance(node, ast.Attribute):
            return ast.copy_location(ast.Attribute(self.visit(node.value), node.attr, node.ctx), node)
        return self.visit(node)

    def builtin(self, name: str) -> bool:
        return not self.local(name) and name not in self.globals and hasattr(builtins, name)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.visit(node.value)
        module = isinstance(value, ast.Name) and isinstance(self.globals.get(value.id), ModuleType)
        if module or not self.scope.writes or not isinstance(node.ctx, ast.Load):
            return ast.Attribute(value, node.attr, node.ctx)
        return run_call("attribute", value, ast.Constant(node.attr))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        value, index = self.visit(node.value), self.visit(node.slice)
        if not isinstance(node.ctx, ast.Load) or isinstance(index, ast.Slice | ast.Constant):
            return ast.Subscript(value, index, node.ctx)
        return run_call("getitem", value, as_value(index))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.expr:
        return run_call("let", ast.Constant(node.target.id), self.visit(node.value))

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        arguments = node.args
        bound = {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}
        defaults = [self.visit(d) for d in arguments.defaults]
        named = [d and self.visit(d) for d in arguments.kw_defaults]
        self.shadows.append(bound)
        body = self.visit(node.body)
        self.shadows.pop()
        new = ast.arguments(
            arguments.posonlyargs, arguments.args, arguments.vararg, arguments.kwonlyargs, named, arguments.kwarg,
            defaults,
        )  # fmt: skip
        return ast.Lambda(new, body)

    def comprehension(self, node: Any) -> Any:
        generators = []
        for generator in node.generators:
            source = self.visit(generator.iter)  # the first one is outside of the scope of the rest
            self.shadows.append(target_names(generator.target))
            tests: list[ast.expr] = [
                ast.copy_location(run_call("test", self.condition(test)), test) for test in generator.ifs
            ]
            generators.append(ast.comprehension(generator.target, source, tests, 0))
        parts = [self.visit(getattr(node, f)) for f in ("elt", "key", "value") if hasattr(node, f)]
        del self.shadows[len(self.shadows) - len(node.generators) :]
        return type(node)(*parts, generators)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension


def as_value(index: ast.expr) -> ast.expr:
    """An index as an expression of its own: slices inside of a tuple have no syntax there."""
    if isinstance(index, ast.Slice):
        ends = [end or ast.Constant(None) for end in (index.lower, index.upper, index.step)]
        return ast.copy_location(ast.Call(ast.Name("slice", ast.Load()), ends, []), index)
    if isinstance(index, ast.Tuple):
        return ast.copy_location(ast.Tuple([as_value(item) for item in index.elts], ast.Load()), index)
    return index
