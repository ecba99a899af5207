"""Lines of a UTF-8 text file with their numbers. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spt_ds.errors import DataError


def lines(path: Path, keep_end: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line); only a newline ends a line, a byte order mark is dropped,
    DataError names bad bytes.

    `keep_end` keeps the newline, which a CSV field may contain.
    """
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte 0x{raw[error.start]:02x} at column {error.start + 1} is"
                    " not UTF-8; save the file as UTF-8 (for example `iconv -f latin1 -t utf-8`)"
                ) from error
            yield number, line if keep_end else line.rstrip("\r\n")
    if not number:
        raise DataError(f"{path}: the file is empty, dialogues are needed")
