"""HTML by functions: no text of a run can become an element.

Every string is escaped unless it is `Markup`, which only these functions make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = {"meta"}  # elements without an end tag; the one that a report uses
# What a model or a file may hold and a page may not: control codes become their pictures, as
# U+241B for an escape, and halves of surrogate pairs the replacement character.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
_UNSAFE = {**_PICTURES, 0x7F: 0x2421, **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)}


class Markup(str):
    """A string that is HTML already."""


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """Return an element.

    `class_` and `aria_label` become the attributes `class` and `aria-label`.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
    )
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{pairs}>{join(children)}{end}")


def join(children: Iterable[str]) -> Markup:
    """Put children one after the other; what is not `Markup` is escaped."""
    return Markup(
        "".join(child if isinstance(child, Markup) else _escaped(child) for child in children)
    )


def absent(text: str) -> Markup:
    """Return a box that says what a section lacks."""
    return tag("p", text, class_="none")


def bullets(items: Iterable[str]) -> Markup:
    """Return a list of points."""
    return tag("ul", *(tag("li", item) for item in items))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """Return a table in a box that scrolls sideways by itself.

    The first cell of a row is its heading. Each other cell, one text or one element, knows its
    column's name: on a narrow screen a row is a list of names and values.
    """
    names = columns[1:]
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = (tag("tr", tag("th", row[0], scope="row"), *map(_cell, names, row[1:])) for row in rows)
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _cell(name: str, content: str) -> Markup:
    return tag("td", content, data_label=name) if content else tag("td")


def _escaped(text: str) -> str:
    return escape(text.translate(_UNSAFE), quote=True)
