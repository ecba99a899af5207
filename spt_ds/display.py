"""How a value from a file is shown in a message or on a screen: short, and without control codes.

A file may hold a string of 100 kB, a list 500 levels deep or an escape sequence that a terminal
obeys. None of these may reach the screen as they are.
"""

from __future__ import annotations

import re
import reprlib

MOST_CHARACTERS = 200  # of a value in a message: enough to find it in its file
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 8, 8, 4
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 120
# Control codes, line separators, marks that reverse the direction of text, halves of pairs.
# Joiners stay: emoji and several scripts need them.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(value: object) -> str:
    """Return `value` as Python writes it, cut where it is long or deep."""
    return shortened(_REPR.repr(value))


def shortened(text: str) -> str:
    """Return `text` itself, or its two ends where it is longer than `MOST_CHARACTERS`."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text)} characters) ... {text[-half:]}"


def printable(text: str, keep: str = "") -> str:
    """Return `text` with the characters that steer a screen as escapes such as `\\x1b`.

    Characters in `keep` stay as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")

    return _CONTROL.sub(escaped, text)
