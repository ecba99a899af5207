"""Errors that a user can cause. Each says what is wrong, what was got, what is allowed and how to
mend it.

The command line prints their text without a traceback and ends with exit code 2; anything else is a
fault of ours and keeps its traceback. Texts of a file, a base or a model reach a terminal only
through `printable`, and a message repeats a value only as `quoted`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

SHOWN_CHARACTERS = 200  # of a value that a message repeats
LINE_CHARACTERS, LINES = 2000, 60  # of a whole message: what no caller cut is cut here
# What a terminal obeys instead of showing: control characters, the marks that reorder a line, and
# halves of surrogate pairs, which no stream can encode. A line end and a tab stay.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` with every character that a terminal would obey written as its escape."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def holds_surrogate(text: str) -> bool:
    """Whether `text` holds half a surrogate pair, which no tokenizer, file or stream takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


class _Short(reprlib.Repr):
    """`repr` that looks at a bounded part of a value, however large or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxother = SHOWN_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more than 4,300 digits.
        bits = x.bit_length()
        return f"a number of {bits} bits" if bits > SHOWN_CHARACTERS else repr(x)


_SHORT = _Short()


def quoted(value: Any, limit: int = SHOWN_CHARACTERS) -> str:
    """Return `repr(value)`, cut to about `limit` characters."""
    return _cut(_SHORT.repr(value), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]} ({len(text)} characters)"


class SptError(Exception):
    """Base of every error a user can cause."""

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        shown = [_cut(line, LINE_CHARACTERS) for line in lines[:LINES]]
        if len(lines) > LINES:
            shown.append(f"... and {len(lines) - LINES} more lines")
        return printable("\n".join(shown))


class ConfigError(SptError):
    """The YAML file, an override or the DeepSpeed JSON cannot be used; the text holds every problem
    found.
    """


class DataError(SptError):
    """A dialogue file is missing, malformed or does not fit; the text starts with `file:line` where
    there is one.
    """


class ModelError(SptError):
    """A base model cannot be loaded or lacks what the method needs."""


class EngineError(SptError):
    """The process group, DeepSpeed or the machine cannot do what was asked."""


class CheckpointError(SptError):
    """A checkpoint is damaged, incomplete or belongs to another run."""


class NonFiniteError(SptError):
    """A loss or gradient is NaN or infinite; raised on every rank together, before the optimizer
    moves.
    """
