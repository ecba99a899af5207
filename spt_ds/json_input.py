"""JSON from files that anyone may have written: every fault becomes one error that names it.

Python's own reader fails in several ways on a text that is made to break it: RecursionError on deep
nesting, ValueError on a number of 5,000 digits; and `"\\ud800"` becomes a string that no UTF-8 file
can hold. Here each of them is a JSONDecodeError with its position, or a DataError made of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from spt_ds.display import shown
from spt_ds.errors import DataError

MAX_DEPTH = 64  # lists and objects inside one another
MAX_DIGITS = 300  # of a whole number: every one of them is also a double
MAX_FILE_BYTES = 64 << 20  # of a JSON document; data sets and predictions are read line by line

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(source: str, content: str | bytes, mend: str) -> Any:
    """Parse one JSON value. `source` (`file` or `file:line`) begins each message, `mend` ends it.

    Raises DataError for bytes that are not UTF-8 and for whatever `load_json` refuses.
    """
    try:
        return load_json(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise DataError(f"{source}: not JSON at {column} ({error.msg}); {mend}") from error


def parse_object(source: str, content: str | bytes, mend: str) -> dict[str, Any]:
    """Like `parse_json`, for a file or line that holds a JSON object."""
    value = parse_json(source, content, mend)
    if not isinstance(value, dict):
        raise DataError(f"{source}: got a {type(value).__name__}, expected a JSON object; {mend}")
    return value


class _Refused(ValueError):
    """A value that JSON's grammar allows and we do not; `text` is how it is written."""

    def __init__(self, problem: str, text: str) -> None:
        super().__init__(problem)
        self.text = text


def load_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises JSONDecodeError (a ValueError, as UnicodeDecodeError is) also for nesting beyond
    MAX_DEPTH, whole numbers beyond MAX_DIGITS, a key that an object holds twice, and half a
    surrogate pair. NaN and Infinity are read, as Python writes them, unless `finite`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    # Most texts have fewer brackets than that and cannot be too deep: counting them is cheap.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    try:
        value = (_FINITE if finite else _DECODER).decode(text)
    except _Refused as error:
        # The parser does not tell its hooks where they are: the last place of the text is a good
        # guess.
        at = max(text.rfind(error.text), 0)
        raise json.JSONDecodeError(str(error), text, at) from None
    # Only an escape can bring half a pair in. Whole pairs are written the same way, so the value
    # decides.
    if escape := _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            problem = "half a surrogate pair, which is no character"
            raise json.JSONDecodeError(problem, text, escape.start()) from None
    return value


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of at most MAX_FILE_BYTES; raise OSError or ValueError."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return load_json(content)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
            raise json.JSONDecodeError(problem, text, match.start())


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number of {len(text)} digits, allowed are {MAX_DIGITS}", text)
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _Refused(f"key {shown(twice)} is given twice", json.dumps(twice, ensure_ascii=False))
    return tree


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is no JSON number", name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole_number)
_FINITE = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_whole_number, parse_constant=_no_constant
)
