"""The source of a function -> the source of its run over worlds, statement by statement.

Local variables become attributes of the world ``_w``, and statements go through the run ``_so``:

    x = y                for _w in _so.step(): _w.x = _w.y
    x = f(y)             for _w in _so.each(): _so.begin(_w); _w.x = _so.call(f, _w.y)
    if c: A else: B      for _w in _so.step(): _so.decide(c)
                         if _so.then(): A
                         if _so.orelse(): B
                         _so.join()
    while c: A           _so.loop()
                         while _so.more():
                             for _w in _so.step(): _so.decide(c)
                             if not _so.stay(): break
                             A
                             _so.again()
                         _so.leave(); _so.rejoin()

Every new node has the place of the one that it came from, so that tracebacks show the user's lines.
"""

from __future__ import annotations

import ast
import copy
from typing import Any

from .desugaring import Desugared
from .names import Scope
from .refusals import check
from .rewriting import OPERATORS, Expression, as_value, placed, run_call


def transformed(function: ast.FunctionDef, filename: str, globals_: dict[str, Any]) -> ast.FunctionDef:
    """The definition of the run, a function of ``_so``."""
    check(function, Scope(function), filename)
    plainer = Desugared()
    function.body = [new for statement in function.body for new in plainer.several(statement)]
    scope = Scope(function)
    maker = Transformer(scope, globals_)
    body = maker.block(function.body)
    arguments = ast.arguments([], [ast.arg("_so")], None, [], [], None, [])
    result = ast.FunctionDef(function.name, arguments, body or [ast.Pass()], [], None)
    return ast.fix_missing_locations(ast.copy_location(with_type_parameters(result), function))


def with_type_parameters(node: ast.FunctionDef) -> ast.FunctionDef:
    """A definition made by hand lacks the field that Python 3.12 added."""
    if "type_params" in ast.FunctionDef._fields:
        setattr(node, "type_params", [])  # noqa: B010
    return node


def names(items: tuple[str, ...]) -> list[ast.expr]:
    return [ast.Tuple([ast.Constant(name) for name in items], ast.Load())] if items else []


class Transformer:
    """Rewrites statements."""

    def __init__(self, scope: Scope, globals_: dict[str, Any]) -> None:
        self.scope, self.globals, self.count = scope, globals_, 0

    def expression(self, node: ast.expr) -> tuple[Any, bool]:
        maker = Expression(self.scope, self.globals)
        return maker.visit(node), maker.choices

    def condition(self, node: ast.expr) -> tuple[Any, bool]:
        maker = Expression(self.scope, self.globals)
        return maker.condition(node), maker.choices

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Statements in order; neighbours without control flow or choices go through the worlds together."""
        result: list[ast.stmt] = []
        together: ast.For | None = None
        for statement in statements:
            simple = self.simple(statement)
            if simple is None:
                together = None
                new = getattr(self, f"{type(statement).__name__.lower()}_")(statement)
            else:
                lines, choices = simple
                if together is not None and not choices:
                    together.body += placed(lines, statement)
                    continue
                loop = each(lines, choices)
                new, together = [loop], None if choices else loop
            result += placed(new, statement)
        return result

    # --- statements of one world --------------------------------------------------------------------------------------

    def simple(self, node: ast.stmt) -> tuple[list[ast.stmt], bool] | None:
        """What a statement without control flow does in one world, and whether it may make a choice."""
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.IfExp):
            return None  # as an if statement: what is discrete keeps its worlds apart
        if isinstance(node, ast.Assign):
            value, choices = self.expression(node.value)
            if len(node.targets) == 1:
                lines, more = self.assignment(node.targets[0], value)
                return lines, choices or more
            kept = self.temporary()
            lines = [ast.Assign([store(kept)], value)]
            for target in node.targets:
                new, more = self.assignment(target, load(kept))
                lines, choices = lines + new, choices or more
            return lines, choices
        if isinstance(node, ast.AnnAssign):
            if node.value is None:
                return [ast.Pass()], False
            return self.simple(ast.copy_location(ast.Assign([node.target], node.value), node))
        if isinstance(node, ast.AugAssign):
            return self.augmented(node)
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):
                return [ast.Pass()], False
            value, choices = self.expression(node.value)
            return [ast.Expr(value)], choices
        if isinstance(node, ast.Assert):
            test, choices = self.condition(node.test)
            message = self.expression(node.msg)[0] if node.msg else None
            return [ast.Assert(run_call("require", test), message)], choices
        if isinstance(node, ast.Delete | ast.Raise):
            maker = Expression(self.scope, self.globals)
            return [maker.generic_visit(node)], maker.choices  # type: ignore[list-item]
        return ([node], False) if isinstance(node, ast.Pass) else None

    def temporary(self) -> str:
        self.count += 1
        return f"_so_{self.count}"

    def assignment(self, target: ast.expr, value: ast.expr) -> tuple[list[ast.stmt], bool]:
        if isinstance(target, ast.Subscript):
            root, path, choices = self.path(target)
            return [ast.Expr(run_call("setitem", value, root, *path))], choices
        if not any(isinstance(node, ast.Subscript) for node in ast.walk(target)):
            new, choices = self.expression(target)
            return [ast.Assign([new], value)], choices
        # all targets by way of temporaries, then one after the other, as Python does
        lines: list[ast.stmt] = []
        later: list[ast.stmt] = []
        choices = False
        items: list[ast.expr] = []
        for item in target.elts:  # type: ignore[attr-defined]
            starred = isinstance(item, ast.Starred)
            kept = self.temporary()
            items.append(ast.Starred(store(kept), ast.Store()) if starred else store(kept))
            new, more = self.assignment(item.value if starred else item, load(kept))
            later, choices = later + new, choices or more
        lines.append(ast.Assign([ast.Tuple(items, ast.Store())], value))
        return lines + later, choices

    def path(self, target: ast.expr) -> tuple[ast.expr, list[ast.expr], bool]:
        """root[a][b] as root and (a, b)."""
        if not isinstance(target, ast.Subscript):
            root, choices = self.expression(target)
            return root, [], choices
        root, path, choices = self.path(target.value)
        index, more = self.expression(target.slice)
        return root, [*path, as_value(index)], choices or more

    def augmented(self, node: ast.AugAssign) -> tuple[list[ast.stmt], bool]:
        value, choices = self.expression(node.value)
        op = ast.Constant(OPERATORS[type(node.op)])
        if isinstance(node.target, ast.Name):
            there, here = self.expression(node.target)[0], self.expression(ast.Name(node.target.id, ast.Load()))[0]
            return [ast.Assign([there], run_call("update", op, here, value))], choices
        root, path, more = self.path(node.target)
        kept = [self.temporary() for _ in range(len(path) + 1)]
        lines: list[ast.stmt] = [
            ast.Assign([store(name)], part) for name, part in zip(kept, [root, *path], strict=True)
        ]
        current: ast.expr = load(kept[0])
        for name in kept[1:]:
            current = run_call("getitem", current, load(name))
        new = run_call("update", op, current, value)
        return [*lines, ast.Expr(run_call("setitem", new, *(load(name) for name in kept)))], choices or more

    # --- control flow -------------------------------------------------------------------------------------------------

    def assign_(self, node: ast.Assign) -> list[ast.stmt]:
        assert isinstance(node.value, ast.IfExp)
        values = node.value.body, node.value.orelse
        both = [placed([ast.Assign(copy.deepcopy(node.targets), value)], node) for value in values]
        return self.if_(placed([ast.If(node.value.test, *both)], node)[0], plain=True)

    def annassign_(self, node: ast.AnnAssign) -> list[ast.stmt]:
        assert node.value is not None
        return self.assign_(ast.copy_location(ast.Assign([node.target], node.value), node))

    def if_(self, node: ast.If, plain: bool = False) -> list[ast.stmt]:
        test, choices = self.condition(node.test)
        result = [
            each([ast.Expr(run_call("decide", test))], choices),
            ast.If(run_call("then"), self.block(node.body), []),
        ]
        if node.orelse:
            result.append(ast.If(run_call("orelse"), self.block(node.orelse), []))
        dead = () if plain else self.scope.dead_after(node)
        return [*placed(result, node.test), statement("join", *names(dead))]

    def while_(self, node: ast.While) -> list[ast.stmt]:
        endless = isinstance(node.test, ast.Constant) and bool(node.test.value)
        condition, choices = self.condition(node.test)
        test = each([ast.Expr(run_call("decide", condition))], choices)
        stop = ast.If(ast.UnaryOp(ast.Not(), run_call("stay")), [ast.Break()], [])
        body = [test, stop, *self.block(node.body), statement("again", *names(self.scope.dead_before(node)))]
        more = run_call("more", *([ast.Constant(True)] if endless else []))
        return [statement("loop"), ast.While(more, body, []), *self.behind(node, "")]

    def for_(self, node: ast.For) -> list[ast.stmt]:
        self.count += 1
        key = f"<loop {self.count}>"
        begin = each([ast.Expr(run_call("iterate", ast.Constant(key), self.iterable(node.iter)))], True)
        target = [ast.Constant(key)]
        first: list[ast.stmt] = []
        if isinstance(node.target, ast.Name):
            target.append(ast.Constant(node.target.id))
        else:
            lines, choices = self.assignment(node.target, run_call("item", ast.Constant(key)))
            first = [each(lines, choices)]
        body = [*first, *self.block(node.body), statement("again", *names(self.scope.dead_before(node)))]
        return [begin, statement("loop"), ast.While(run_call("next", *target), body, []), *self.behind(node, key)]

    def iterable(self, node: ast.expr) -> ast.expr:
        """What a loop goes through: enumerate, zip, reversed and the entries of dicts as views of what they read."""
        if isinstance(node, ast.GeneratorExp):  # what it decides, it decides before the loop
            node = ast.copy_location(ast.ListComp(node.elt, node.generators), node)
        if not isinstance(node, ast.Call):
            return self.expression(node)[0]
        maker = Expression(self.scope, self.globals)
        if isinstance(node.func, ast.Name) and node.func.id in LIVE and maker.builtin(node.func.id):
            new = run_call(LIVE[node.func.id], *(self.iterable(arg) for arg in node.args))
            new.keywords = [ast.keyword(k.arg, self.expression(k.value)[0]) for k in node.keywords]
            return ast.copy_location(new, node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ENTRIES and not (node.args or node.keywords):
            new = run_call("entries", self.expression(node.func.value)[0], ast.Constant(node.func.attr))
            return ast.copy_location(new, node)
        return maker.visit(node)

    def behind(self, node: ast.While | ast.For, key: str) -> list[ast.stmt]:
        leave = statement("leave", *([ast.Constant(key)] if key else []))
        return [leave, *self.block(node.orelse), statement("rejoin", *names(self.scope.dead_after(node)))]

    def break_(self, node: ast.Break) -> list[ast.stmt]:
        return [statement("break_")]

    def continue_(self, node: ast.Continue) -> list[ast.stmt]:
        return [statement("continue_")]

    def return_(self, node: ast.Return) -> list[ast.stmt]:
        value = node.value or ast.Constant(None)
        if isinstance(value, ast.IfExp):
            both = [placed([ast.Return(part)], node) for part in (value.body, value.orelse)]
            return self.if_(placed([ast.If(value.test, *both)], node)[0], plain=True)
        given, choices = self.expression(value)
        return [each([ast.Expr(run_call("give", given))], choices), statement("return_")]

    def with_(self, node: ast.With) -> list[ast.stmt]:
        """A block under a context, for example torch.no_grad(): the same context for all worlds."""
        items = []
        for item in node.items:
            maker = Expression(self.scope, self.globals)
            context = maker.visit(item.context_expr)
            of_world = any(isinstance(n, ast.Name) and n.id == "_w" for n in ast.walk(context))
            world = ast.arguments([], [ast.arg("_w")], None, [], [], None, [])
            made = run_call("context", ast.Lambda(world, context), ast.Constant(of_world))
            items.append(ast.withitem(ast.copy_location(made, item.context_expr), None))
        return [ast.With(items, self.block(node.body))]

    def import_(self, node: ast.stmt) -> list[ast.stmt]:
        return [node]

    importfrom_ = import_


LIVE = {"enumerate": "enumerated", "zip": "zipped", "reversed": "reversed"}
ENTRIES = ("keys", "values", "items")


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def each(lines: list[ast.stmt], choices: bool) -> ast.For:
    """Lines in every running world; ``choices``: whether they may have several outcomes in one."""
    if choices:
        return ast.For(store("_w"), run_call("each"), [statement("begin", load("_w")), *lines], [])
    return ast.For(store("_w"), run_call("step"), lines, [])


def statement(name: str, *args: ast.expr) -> ast.Expr:
    return ast.Expr(run_call(name, *args))
