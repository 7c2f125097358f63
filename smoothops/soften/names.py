"""The names of a function: its locals, and which of them nothing reads any more at a point (liveness)."""

from __future__ import annotations

import ast

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def target_names(target: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def stored(node: ast.AST) -> set[str]:
    """Names that a node binds in the scope of the function, not in one of its own."""
    if isinstance(node, ast.Lambda):
        return set()
    if isinstance(node, COMPREHENSIONS):
        return {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
    found = {node.id} if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else set()
    for child in ast.iter_child_nodes(node):
        found |= stored(child)
    return found


def loaded(node: ast.AST | None) -> set[str]:
    """Names that a node reads (or deletes), with those of inner scopes: too many at worst."""
    if node is None:
        return set()
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}


MUTATORS = frozenset(
    (
        "append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "update", "setdefault", "popitem",
        "add", "discard", "appendleft", "popleft", "extendleft", "rotate",
    )
)  # fmt: skip


def writes(node: ast.AST) -> bool:
    """Whether a node may change a list or another container."""
    if isinstance(node, ast.Subscript | ast.Attribute):
        return not isinstance(node.ctx, ast.Load) or (isinstance(node, ast.Attribute) and node.attr in MUTATORS)
    return isinstance(node, ast.AugAssign)


class Scope:
    """The local variables of a function and where each of them is dead."""

    def __init__(self, function: ast.FunctionDef) -> None:
        a = function.args
        self.parameters = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        self.parameters += [p.arg for p in (a.vararg, a.kwarg) if p is not None]
        self.writes = any(map(writes, ast.walk(function)))  # whether a container may be changed
        self.locals = set(self.parameters)
        for statement in function.body:
            self.locals |= stored(statement)
        self.after: dict[int, set[str]] = {}
        self.before: dict[int, set[str]] = {}
        # what a lambda or generator expression reads, it may read at any time
        self.kept = {
            name for n in ast.walk(function) if isinstance(n, ast.Lambda | ast.GeneratorExp) for name in loaded(n)
        }
        self.live_block(function.body, set(), None, None)

    def dead_after(self, node: ast.stmt) -> tuple[str, ...]:
        return tuple(sorted(self.locals - self.after[id(node)] - self.kept)) if id(node) in self.after else ()

    def dead_before(self, node: ast.stmt) -> tuple[str, ...]:
        """Of a loop: at the start of an iteration."""
        return tuple(sorted(self.locals - self.before[id(node)] - self.kept))

    # liveness, backwards: ``live`` after a node -> live before it; ``again`` and ``behind`` are what is live where
    # continue and break lead to

    def live_block(
        self, block: list[ast.stmt], live: set[str], again: set[str] | None, behind: set[str] | None
    ) -> set[str]:
        for node in reversed(block):
            live = self.live_before(node, live, again, behind)
        return live

    def live_before(self, node: ast.stmt, live: set[str], again: set[str] | None, behind: set[str] | None) -> set[str]:
        self.after[id(node)] = set(live)
        if isinstance(node, ast.If):
            yes = self.live_block(node.body, live, again, behind)
            return loaded(node.test) | yes | self.live_block(node.orelse, live, again, behind)
        if isinstance(node, ast.While | ast.For):
            return self.live_loop(node, live, again, behind)
        if isinstance(node, ast.Break):
            return set(behind or ())
        if isinstance(node, ast.Continue):
            return set(again or ())
        if isinstance(node, ast.Return):
            return loaded(node.value)
        if isinstance(node, ast.With):
            inner = self.live_block(node.body, live, again, behind)
            return inner.union(*(loaded(item) for item in node.items))
        if isinstance(node, ast.Assign):
            bound = {t.id for t in node.targets if isinstance(t, ast.Name)}
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    bound |= {t.id for t in target.elts if isinstance(t, ast.Name)}
            return (live - bound) | loaded(node)
        if isinstance(node, ast.AugAssign):
            return live | loaded(node) | stored(node)
        return live | loaded(node)

    def live_loop(
        self, node: ast.While | ast.For, live: set[str], again: set[str] | None, behind: set[str] | None
    ) -> set[str]:
        left = self.live_block(node.orelse, live, again, behind)
        head = set(left)
        while True:
            start = self.live_block(node.body, head, head, live)
            if isinstance(node, ast.While):
                new = head | loaded(node.test) | start
            else:
                new = head | (start - target_names(node.target)) | loaded(node.target)
            if new == head:
                break
            head = new
        self.before[id(node)] = head
        return head | (loaded(node.iter) if isinstance(node, ast.For) else set())
