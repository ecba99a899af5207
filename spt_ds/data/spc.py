"""Conversations of Synthetic-Persona-Chat: two views, one for each user's persona. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from spt_ds.config.data import SPC_COLUMNS
from spt_ds.data.dialogue import Example, replies
from spt_ds.display import holds_surrogate, shown
from spt_ds.errors import DataError
from spt_ds.log import get_logger

# Some conversations of the published files set the name in bold: `*User 1:* hi`; their asterisks
# are dropped.
_TURN = re.compile(r"(\*[* ]*)?User ([12]):(.*)", re.DOTALL)
_NAME = re.compile(r"\buser\s*\d+\s*:", re.IGNORECASE)
_VIEW = re.compile(r"/user[12]$")


def conversation_of(dialogue_id: str) -> str:
    """What the two views of a conversation share: they hold the same texts."""
    return _VIEW.sub("", dialogue_id)


def spc_examples(cells: Sequence[object], origin: str, name: str) -> Iterator[Example]:
    """Yield both users' examples of the conversation in `cells`, those of SPC_COLUMNS."""
    first, second, conversation = (
        _text(cell, key, origin) for key, cell in zip(SPC_COLUMNS, cells, strict=True)
    )
    speakers, turns = _turns(conversation, origin)
    for user, persona in (("1", lines_of(first)), ("2", lines_of(second))):
        view = f"{name}/user{user}"
        for turn, history, response in replies(turns, self_opens=speakers[:1] == [user]):
            yield Example(f"{view}/{turn}", view, turn, persona, history, response)


def lines_of(value: str) -> tuple[str, ...]:
    """The lines of a text that are not blank."""
    return tuple(line.strip() for line in value.split("\n") if line.strip())


def _text(cell: object, key: str, origin: str) -> str:
    if not isinstance(cell, str):
        raise DataError(f'{origin}: "{key}" must be a text, got {shown(cell)}')
    if holds_surrogate(cell):
        raise DataError(f'{origin}: "{key}" holds half a surrogate pair, which is no character')
    return cell


def _turns(conversation: str, origin: str) -> tuple[list[str], list[str]]:
    """Return (speakers, turns), alternating.

    Turns in a row by one user, and lines without a name, are joined. The published files hold some
    conversations without names; they are left out with a warning.
    """
    speakers: list[str] = []
    turns: list[str] = []
    for line in conversation.split("\n"):
        if not line.strip("* "):
            continue  # blank lines and rulers
        match = _TURN.match(line.strip())
        if match is None and not speakers:
            get_logger().warning(
                "%s: skipped, the conversation names no speaker: %r", origin, line[:60]
            )
            break
        text = line.strip() if match is None else match[3].strip("* " if match[1] else " ")
        if name := _NAME.search(text):
            raise DataError(
                f"{origin}: {name[0][:60]!r} inside a turn; the turns of a conversation begin a"
                " line each, with `User 1:` or `User 2:`"
            )
        if match is None or (speakers and speakers[-1] == match[2]):
            turns[-1] = f"{turns[-1]} {text}".strip()
        else:
            speakers.append(match[2])
            turns.append(text)
    if "" in turns:
        raise DataError(
            f"{origin}: turn {turns.index('')} of the conversation has a name and no text; remove"
            " the line"
        )
    return speakers, turns
