"""How a value from a file is shown in a message or on a screen: short, and without control codes.

A file may hold a string of 100 kB, a list 500 levels deep or an escape sequence that a terminal
obeys. None of these may reach the screen as they are.
"""

from __future__ import annotations

import re
import reprlib

MOST_CHARACTERS = 200  # of a value in a message: enough to find it in its file
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))  # of time, with their seconds
MOST_BITS = 400  # of a whole number: 120 digits

# Control codes, line separators, marks that reverse the direction of text, halves of pairs.
# Joiners stay: emoji and several scripts need them.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class _Repr(reprlib.Repr):
    """`repr` that looks at a bounded part of a value, however large or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 4
        self.maxstring = self.maxlong = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of more than 4,300 digits.
        bits = x.bit_length()
        return f"a number of {bits} bits" if bits > MOST_BITS else repr(x)


_REPR = _Repr()


def shown(value: object) -> str:
    """Return `value` as Python writes it, cut where it is long or deep."""
    return shortened(_REPR.repr(value))


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return `text` itself, or its two ends where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... ({len(text)} characters) ... {text[-half:]}"


def holds_surrogate(text: str) -> bool:
    """Whether `text` holds half a surrogate pair, which no tokenizer, file or stream takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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


def duration(seconds: float | None) -> str:
    """A length of time for a table, such as `3.2 h`; `-` where it is not known."""
    if seconds is None:
        return "-"
    for length, unit in UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
