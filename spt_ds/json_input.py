"""JSON from files that anyone may have written: every fault becomes one DataError that names it."""

from __future__ import annotations

import json
import re
from typing import Any

from spt_ds.display import shown
from spt_ds.errors import DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(source: str, content: bytes, mend: str) -> Any:
    """Parse one JSON value. `source` (`file` or `file:line`) begins each message, `mend` ends it.

    Raises DataError for bytes that are not UTF-8, for what is not JSON, and for what is JSON but
    cannot be used: numbers beyond Python's limit of digits, nesting beyond its stack, and halves of
    surrogate pairs, which no UTF-8 file can hold.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise DataError(f"{source}: not JSON at {column} ({error.msg}); {mend}") from error
    except RecursionError as error:
        raise DataError(f"{source}: nested too deeply to be read; {mend}") from error
    except ValueError as error:  # the one left: more digits than sys.get_int_max_str_digits()
        raise DataError(f"{source}: holds a number of thousands of digits; {mend}") from error
    # Valid JSON may escape half of a surrogate pair. Such a string fails only where it is written.
    if _SURROGATE.search(text):
        _refuse_surrogates(source, value, mend)
    return value


def parse_object(source: str, content: bytes, mend: str) -> dict[str, Any]:
    """Like `parse_json`, for a file or line that holds a JSON object."""
    value = parse_json(source, content, mend)
    if not isinstance(value, dict):
        raise DataError(f"{source}: got a {type(value).__name__}, expected a JSON object; {mend}")
    return value


def _refuse_surrogates(source: str, value: Any, mend: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = shown(error.object[error.start])
        raise DataError(f"{source}: holds {half}, half of a surrogate pair; {mend}") from error
