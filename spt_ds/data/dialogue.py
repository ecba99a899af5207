"""One training or test example, and the turns of a dialogue as one speaker sees them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One reply of a persona's owner.

    `history` alternates and ends with the partner's turn, so the speaker of each turn follows from
    its distance to the end; an empty history means that the owner opens the dialogue.
    """

    # unique in its source, for messages: `file:line` and the turn where a line holds a whole
    # dialogue
    id: str
    dialogue_id: str  # the same for all examples of one dialogue as one speaker sees it
    turn: int  # number of the response among the turns of the dialogue, from 0
    persona: tuple[str, ...]  # sentences; empty without a persona
    history: tuple[str, ...]  # oldest first
    response: str
    choices: tuple[str, ...] = ()  # the answers to choose among, the response one of them


def replies(turns: Sequence[str], self_opens: bool) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Yield (turn, history, response) for each turn of the persona's owner.

    `turns` alternate between two speakers.
    """
    for turn in range(0 if self_opens else 1, len(turns), 2):
        yield turn, tuple(turns[:turn]), turns[turn]
