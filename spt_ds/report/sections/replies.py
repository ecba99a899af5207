"""Examples: what was asked, what was expected and what was answered."""

from __future__ import annotations

from collections.abc import Sequence

from spt_ds.report.markup import Markup, absent, join, tag
from spt_ds.report.runs import Reply, Run, extremes

EXTREMES = 4
LATEST = 4  # utterances of a history that are open at first
LONG_TEXT, SHOWN = 400, 200  # characters from which on a text is folded, and of its beginning


def examples(runs: Sequence[Run]) -> Markup:
    """Replies of highest and lowest F1 against the reference."""
    parts: list[Markup] = []
    for run in runs:
        parts.append(tag("h3", run.label))
        if not run.replies:
            parts.append(absent("No replies yet."))
            continue
        best, worst = extremes(run.replies, EXTREMES)
        for heading, replies in (("Best", best), ("Worst", worst)):
            if replies:
                cards = tag("div", *map(_card, replies), class_="cards")
                parts += [tag("p", f"{heading} by F1 against the reference", class_="soft"), cards]
    return join(parts)


def _card(reply: Reply) -> Markup:
    row = reply.row
    facts = [f"F1 {100 * reply.f1:.1f}", *([] if row.prompt is None else [f"prompt {row.prompt}"])]
    facts += [] if row.turn is None else [f"utterance {row.turn}"]
    parts: list[Markup] = [
        tag("h4", " · ".join(facts)),
        tag("p", row.id, class_="soft", dir="auto"),
    ]
    if row.persona:
        parts += [tag("p", "Persona", class_="soft"), persona(row.persona)]
    if row.history:
        parts += _history(row.history)
    pairs = [("Reference", row.reference), ("Reply", reply.text or "(empty)")]
    if row.raw != reply.text:
        pairs.append(("As decoded, before it was cut", row.raw))
    texts = (
        part
        for name, text in pairs
        for part in (tag("dt", name), tag("dd", folded(text), dir="auto"))
    )
    return tag("article", *parts, tag("dl", *texts))


def bubble(element: str, who: str, text: str) -> Markup:
    """An utterance of `self` or `partner`, in the direction of its script."""
    # A block of its own: an override of direction that a text does not close ends with it.
    name = tag("span", f"{who}: ", class_="who")
    return tag(element, name, tag("div", folded(text), dir="auto"), class_=f"bubble {who}")


def persona(sentences: Sequence[str]) -> Markup:
    """The sentences of a persona, each in the direction of its script."""
    items = (tag("li", folded(text), dir="auto") for text in sentences)
    return tag("ul", *items, class_="persona")


def folded(text: str) -> str:
    """A text; of a long one its beginning, which opens to the whole."""
    if len(text) <= LONG_TEXT:
        return text
    begin = text[:SHOWN].rsplit(maxsplit=1)[0]
    size = f"{len(text):,} characters"
    heading = tag("summary", tag("span", f"{begin} \N{HORIZONTAL ELLIPSIS} ", class_="begin"), size)
    return tag("details", heading, text, class_="long")


def _history(utterances: Sequence[str]) -> list[Markup]:
    """The last utterance is the partner's, and the two take turns."""
    items = []
    for number, text in enumerate(utterances):
        who = "partner" if (len(utterances) - number) % 2 else "self"
        items.append(bubble("li", who, text))
    earlier, latest = items[:-LATEST], items[-LATEST:]
    parts = [tag("p", "History", class_="soft")]
    if earlier:
        heading = tag("summary", _counted(len(earlier), "earlier utterance"))
        parts.append(tag("details", heading, tag("ul", *earlier, class_="chat")))
    return [*parts, tag("ul", *latest, class_="chat")]


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
