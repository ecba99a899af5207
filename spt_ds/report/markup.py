"""HTML by functions: no text of a run can become an element.

Every string is escaped unless it is `Markup`, which only these functions make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = {"meta"}  # elements without an end tag; the one that a report uses


class Markup(str):
    """A string that is HTML already."""


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """Return an element.

    `class_` and `aria_label` become the attributes `class` and `aria-label`.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value, quote=True)}"'
        for key, value in attributes.items()
    )
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{pairs}>{join(children)}{end}")


def join(children: Iterable[str]) -> Markup:
    """Put children one after the other; what is not `Markup` is escaped."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    )


def absent(text: str) -> Markup:
    """Return a box that says what a section lacks."""
    return tag("p", text, class_="none")


def bullets(items: Iterable[str]) -> Markup:
    """Return a list of points."""
    return tag("ul", *(tag("li", item) for item in items))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """Return a table in a box that scrolls sideways by itself.

    The first cell of a row is its heading.
    """
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")
