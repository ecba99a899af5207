"""A JSON file that is one list of objects, read object by object with the line of each. No torch.

Such a file may have gigabytes, so it is never held as a whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spt_ds.data.textfile import MAX_LINE_BYTES, readable
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import parse_object

_BLOCK = 1 << 18  # bytes that are read at once
# A whole string, a bracket, or the quote of a string whose end is not there yet.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}"]', re.DOTALL)
_MEND = "the file is one JSON list of objects"


def objects_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line` of its beginning, object) for each object of the list.

    Raises DataError with `file:line` for whatever is not that, and for an object of more than
    16 MiB.
    """
    text, line = "", 1  # what is read and not yet used; the line on which it begins
    began = ended = False
    comma = True  # whether a comma, or the beginning of the list, precedes
    scan = _Scan()
    for block in _blocks(path):
        text += block
        while not ended:
            if not scan.depth:
                blank = len(text) - len(text.lstrip())
                line, text = line + text.count("\n", 0, blank), text[blank:]
                if not text:
                    break
                origin, first = f"{path}:{line}", text[0]
                if first == "," and began and not comma:
                    comma, text = True, text[1:]
                    continue
                if first == "[" and not began:
                    began, text = True, text[1:]
                    continue
                if first == "]" and began:
                    ended, text = True, text[1:]
                    continue
                if first != "{" or not began or not comma:
                    raise DataError(f"{origin}: not JSON at {shown(text[:20])}; {_MEND}")
            end = scan.end(text)
            if end is None:
                if len(text) > MAX_LINE_BYTES:
                    raise DataError(f"{path}:{line}: an object is longer than 16 MiB; {_MEND}")
                break
            yield f"{path}:{line}", _object(path, line, text[:end])
            line, text = line + text.count("\n", 0, end), text[end:]
            comma, scan = False, _Scan()
        if ended and text.strip():
            raise DataError(f"{path}:{line}: {shown(text.strip()[:20])} after the list; {_MEND}")
    if not ended:
        raise DataError(f"{path}:{line}: the file ends inside the list; {_MEND}")


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    origin = f"{path}:{line}"
    try:
        return parse_object(origin, text, _MEND)
    except DataError:
        # Once more, with the lines before it: the message is to count them from the file's first.
        return parse_object(origin, "\n" * (line - 1) + text, _MEND)


class _Scan:
    """Looks for the end of one object in a text that grows."""

    def __init__(self) -> None:
        self.depth = 0  # brackets that are open
        self._place = 0  # where to go on

    def end(self, text: str) -> int | None:
        """The index behind the object with which `text` begins; None while it is not there."""
        for match in _STRING_OR_BRACKET.finditer(text, self._place):
            token = match[0]
            if token == '"':
                self._place = match.start()
                return None
            self._place = match.end()
            if len(token) == 1:
                self.depth += 1 if token in "[{" else -1
                if self.depth == 0:
                    return match.end()
        self._place = max(self._place, len(text))
        return None


def _blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with readable(path), path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += block.count(b"\n", 0, max(0, error.start))
                raise DataError(
                    f"{path}:{line}: not UTF-8; save the file as UTF-8 (for example `iconv -f"
                    " latin1 -t utf-8`)"
                ) from error
            line += text.count("\n")
            yield text
            if not block:
                return
