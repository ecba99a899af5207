"""ParlAI and ConvAI2 text: `N text<TAB>reply[<TAB><TAB>candidates]`. No torch.

A dialogue's lines are numbered from 1, its persona lines come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from spt_ds.data.dialogue import Example
from spt_ds.data.textfile import lines
from spt_ds.errors import DataError

SILENCE = "__SILENCE__"
# No dialogue has more lines than 9 digits count, and Python refuses to read 5,000 of them.
_NUMBERED = re.compile(r"(\d{1,9}) (.*)", re.DOTALL)
# Only the prefix makes a persona line: what follows may hold colons, and an utterance may hold
# "persona:".
_PERSONA = re.compile(r"(your persona|partner's persona):(.*)", re.DOTALL)


def read_parlai(path: Path) -> Iterator[Example]:
    """Yield one example per utterance line; the partner's persona is not part of an example."""
    previous = 0
    persona: list[str] = []
    history: list[str] = []
    dialogue = ""
    for number, line in lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        count, text = _numbered(line, origin)
        if count == 1:
            persona, history, dialogue = [], [], f"{path.name}:{number}"
        elif count != previous + 1:
            raise DataError(
                f"{origin}: the line has number {count} after {previous}; allowed are"
                f" {previous + 1}"
                " or, where a dialogue begins, 1"
            )
        previous = count
        if match := _PERSONA.match(text):
            sentence = _persona_sentence(match[2], bool(history), origin)
            if match[1] == "your persona":
                persona.append(sentence)
            continue
        partner, reply = _exchange(text, origin)
        if partner != SILENCE:
            history.append(partner)
        elif history:
            raise DataError(
                f"{origin}: {SILENCE} inside a dialogue; it is allowed only where the persona's"
                " owner begins it"
            )
        yield Example(
            f"{path.name}:{number}", dialogue, len(history), tuple(persona), tuple(history), reply
        )
        history.append(reply)


def _numbered(line: str, origin: str) -> tuple[int, str]:
    match = _NUMBERED.match(line)
    if not match:
        raise DataError(
            f"{origin}: got {line[:60]!r}; a line begins with its number in the dialogue and a"
            " blank, as `1 hi`"
        )
    return int(match[1]), match[2]


def _persona_sentence(text: str, late: bool, origin: str) -> str:
    if late:
        raise DataError(
            f"{origin}: persona line after the dialogue's first utterance; move it to the"
            " dialogue's"
            " beginning"
        )
    if "\t" in text.strip():
        raise DataError(
            f"{origin}: persona line with a tab and a reply; an utterance must not begin `your"
            " persona:`"
        )
    if not text.strip():
        raise DataError(f"{origin}: persona line without a sentence; remove it")
    return text.strip()


def _exchange(text: str, origin: str) -> tuple[str, str]:
    """Split `text<TAB>reply[<TAB>reward[<TAB>candidates]]`; reward and candidates are not used."""
    fields = text.split("\t")
    if len(fields) < 2:
        raise DataError(
            f"{origin}: no tab in {text[:60]!r}; an utterance line is `N text`, a tab, `reply`"
        )
    partner, reply = fields[0].strip(), fields[1].strip()
    if not partner:
        raise DataError(
            f"{origin}: the partner's text is blank; write {SILENCE} where the persona's owner"
            " opens"
        )
    if not reply:
        raise DataError(f"{origin}: the reply after the tab is blank; every line needs one")
    return partner, reply
