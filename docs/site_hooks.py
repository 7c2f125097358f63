"""What the site adds to the pages in docs/: API entries, a gallery from the examples, formulas as MathML."""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from docstrings import entry
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FORMULA = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>', re.S)
ENTRY = re.compile(r"^::: (?P<path>[\w.]+)(?: \((?P<members>[\w, ]+)\))?$", re.M)
FENCE = re.compile(r"(^ *(?P<mark>```+|~~~+).*?^ *(?P=mark) *$|`[^`\n]+`)", re.M | re.S)
PRODUCT = re.compile(r"<(?=\w+, )")  # <x, y>, which Python-Markdown takes for a tag
OUTSIDE = re.compile(r"\]\((?:\.\./)+(?P<path>examples/(?P<name>\w+)\.py)\)")


def on_files(files: Files, config: Any) -> Files:
    pages = {"gallery.md": gallery()} | {f"gallery/{path.stem}.md": example(path) for path in EXAMPLES}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Entries of the API; a link to an example leads to its page of the gallery."""
    here = posixpath.dirname(page.file.src_uri) or "."
    markdown = ENTRY.sub(lambda m: entry(m["path"], tuple((m["members"] or "").replace(",", "").split())), markdown)
    markdown = OUTSIDE.sub(lambda m: f"]({posixpath.relpath('gallery/' + m['name'] + '.md', here)})", markdown)
    parts, last = [], 0
    for found in FENCE.finditer(markdown):
        parts += [PRODUCT.sub("&lt;", markdown[last : found.start()]), found[0]]
        last = found.end()
    return "".join([*parts, PRODUCT.sub("&lt;", markdown[last:])])


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    return FORMULA.sub(formula, content)


def formula(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    latex = html.unescape(found["latex"]).strip().replace(r"\arg", r"\operatorname{arg}")
    drawn = convert(latex, display=display)
    if "\\" in drawn:
        raise PluginError(f"a formula that latex2mathml does not know: {latex}")
    return drawn


# --- the gallery ------------------------------------------------------------------------------------------------------


def described(path: Path) -> tuple[str, str]:
    """The first sentence of a docstring and the rest, as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text())) or path.stem
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()).replace("``", "`"), re.sub(r"``", "`", rest)


def title(path: Path) -> str:
    return path.stem.replace("_", " ").capitalize()


def gallery() -> str:
    cards = []
    for path in EXAMPLES:
        sentence = html.escape(described(path)[0]).replace("`", "")
        image = f"img/{path.stem}.png"
        cards.append(
            f'<a href="gallery/{path.stem}.html"><img src="{image}" alt="{title(path)}" loading="lazy">'
            f"<strong>{title(path)}</strong>{sentence}</a>"
        )
    return (
        "# Gallery\n\nEach is one script in `examples/`, runs in under three minutes on two cores, checks its claim "
        "over three seeds, and draws its figure.\n\n"
        '<div class="gallery">\n' + "\n".join(cards) + "\n</div>\n"
    )


def example(path: Path) -> str:
    sentence, rest = described(path)
    code = path.read_text().partition('"""\n\n')[2]
    return (
        f"# {title(path)}\n\n{sentence}\n\n![{title(path)}](../img/{path.stem}.png)\n\n{rest}\n\n"
        f"## Source\n\n`examples/{path.name}`\n\n~~~~python\n{code}~~~~\n"
    )
