"""Docstrings as Markdown: for the pages of the operators, and for the API pages of the site."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

HEADINGS = "Args|Returns|Raises|Complexity|Source|Example|Counted are"
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def sections(text: str) -> dict[str, str]:
    """A docstring split at its headings, in order; "" is what comes first."""
    parts = re.split(rf"^({HEADINGS})\b:?[ \n]", text, flags=re.M)
    return {
        "": parts[0].strip(),
        **{h: textwrap.dedent(b).strip("\n") for h, b in zip(parts[1::2], parts[2::2], strict=True)},
    }


def signature(thing: Any) -> str:
    """The signature without quotes around types; "" where there is none to show."""
    try:
        text = str(inspect.signature(thing)).replace("'", "")
    except (TypeError, ValueError):
        return ""
    return re.sub(r"torch\.(?=Tensor)| -> None$", "", text)


def arguments(body: str) -> tuple[list[str], str]:
    """The items of an Args section, and the text that follows them."""
    lines = body.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    inside = [i for i, line in enumerate(lines) if line.startswith(" " * indent) and line.strip()]
    end = next((i for i in range(len(lines)) if lines[i].strip() and i not in inside), len(lines))
    items: list[str] = []
    for line in lines[:end]:
        if line.startswith(" " * (indent + 1)) and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    return items, "\n".join(lines[end:]).strip()


def item(text: str) -> str:
    """``name: what it is`` with the name in code."""
    name, colon, rest = text.partition(": ")
    return f"- `{name}`: {rest}" if colon and re.fullmatch(r"[\w*, ]+", name) else f"- {text}"


def markdown(text: str) -> str:
    """A whole docstring as Markdown: text, arguments, and the rest under bold headings."""
    text = ROLE.sub(r"`\1`", text).replace("``", "`")
    parts = re.split(rf"^({HEADINGS}):[ \n]", text, flags=re.M)
    out = [parts[0].strip()]
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        if heading == "Args":
            items, rest = arguments(body)
            out += ["\n".join(map(item, items)), rest]
        elif heading == "Example":
            out.append(f"```python\n{textwrap.dedent(body).strip()}\n```")
        else:
            out.append(f"**{heading}.** {body.strip()}")
    return "\n\n".join(filter(None, out))


def entry(path: str, members: tuple[str, ...] = ()) -> str:
    """``package.name`` with its signature and docstring, as a section of a page; of a class also those members."""
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    parts = [f"### {name}", call(name, thing), markdown(inspect.getdoc(thing) or "")]
    for member in members:
        method = getattr(thing, member)
        parts += [f"#### {name}.{member}", call(member, method), markdown(inspect.getdoc(method) or "")]
    return "\n\n".join(parts)


def call(name: str, thing: Any) -> str:
    """How it is called, as a block."""
    text = textwrap.wrap(name + signature(thing), 96, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(["```python", *text, "```"])
