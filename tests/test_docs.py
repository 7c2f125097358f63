"""Everything the documentation shows is run: python blocks of Markdown files, examples of docstrings, links."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import implicit
import smoothops as so

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [p for p in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))] if p.exists()]
FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)(?P=mark)[ ]*$", re.M | re.S
)
LINK = re.compile(
    r"""!?\[[^\]]*\]\( <?(?P<target>[^)\s>]+)>? (?:\s+"[^"]*")? \) | \b(?:src|href)="(?P<attribute>[^"]+)" """, re.X
)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line number, code) of each fenced block marked as python."""
    for found in FENCE.finditer(text):
        if found["info"].strip() == "python":
            lines = found["body"].splitlines(keepends=True)
            code = "".join(line.removeprefix(found["indent"]) for line in lines)
            yield text[: found.start("body")].count("\n"), code


def run_session(code: str, namespace: dict[str, Any], name: str, line: int) -> None:
    """Run a ``>>>`` session in a namespace that stays."""
    test = doctest.DocTestParser().get_doctest(code, {}, name, name, line)
    test.globs = namespace
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


@pytest.fixture(autouse=True)
def quiet_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, a fixed seed, no window; the default dtype comes back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "MPLBACKEND", "Agg")
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page.read_text()):
        if ">>>" in code:
            run_session(code, namespace, page.name, line)
        else:  # empty lines in front, so that a traceback names the line of the page
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", FENCE.sub("", text), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(f.startswith(slug) for f in found)}")
    return found | set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for found in LINK.finditer(prose):
        target = found["target"] or found["attribute"]
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(ROOT), f"{page.name} links to {target}, outside the project"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), f"{page.name} links to {target}: no such heading"


def documented() -> dict[str, Any]:
    """What ``__all__`` of any public module lists, once each."""
    found: dict[int, tuple[str, Any]] = {}
    for package in (so, implicit):
        names = [package.__name__]
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        for name in names:
            if ".kernels" in name or any(part.startswith("_") for part in name.split(".")):
                continue
            module = importlib.import_module(name)
            for public in getattr(module, "__all__", ()):
                thing = getattr(module, public)
                if not isinstance(thing, ModuleType):
                    found.setdefault(id(thing), (f"{name}.{public}", thing))
    return dict(found.values())


PUBLIC = documented()


def test_the_api_pages_list_everything_once() -> None:
    listed = [
        name
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed)), "listed twice"
    known = [
        f"{module.__name__}.{name}"
        for module in (so, so.losses, so.metrics, so.nn, implicit, implicit.conditions)
        for name in module.__all__
        if callable(getattr(module, name))
    ]
    assert set(listed) == set(known)


EXAMPLES = [
    test
    for name, thing in PUBLIC.items()
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        thing, name, module=False, globs={"torch": torch, "so": so, "implicit": implicit}
    )
    if test.examples
]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_there_and_short(name: str) -> None:
    thing = PUBLIC[name]
    if not callable(thing):
        return  # a constant
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    lines = len(text.splitlines())
    assert lines <= 20, f"{name}: {lines} lines"
    # a record is explained by what returns it, an abstract class by its members
    explained = isinstance(thing, type) and (issubclass(thing, tuple) or inspect.isabstract(thing))
    assert ">>>" in text or explained or thing is so.Regularizer, f"{name} has no example"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_docstring_example(example: doctest.DocTest) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(example, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


def test_a_wrong_example_is_noticed() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        run_session(">>> so.argmax(torch.zeros(2))\ntensor([1., 0.])\n", {"so": so, "torch": torch}, "page", 0)
    assert list(blocks("text\n```python\nx = 1\n```\n```text\nno\n```\n")) == [(2, "x = 1\n")]
