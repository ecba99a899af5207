"""Lines of a UTF-8 text file with their numbers. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spt_ds.errors import DataError

MAX_LINE_BYTES = 16 << 20  # a file without line ends is not read into memory as a whole


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); look at its owner and its disk"
        ) from error


def lines(path: Path, keep_end: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line); DataError names bad bytes.

    Only a newline ends a line, a byte order mark is dropped. `keep_end` keeps the newline, which a
    CSV field may contain.
    """
    number = 0
    with readable(path), path.open("rb") as file:
        # Bytes first: `open` in text mode would also end lines at the separators that Unicode
        # knows, and could not say on which line a bad byte is.
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; a line"
                    " holds one example or dialogue"
                )
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


def file_beside(path: Path, first: str, second: str, suffix: str) -> Path:
    """The second file of a source of two, such as train_outputs.json beside train_questions.json.

    `first` and `second` are the words in which their names differ, `suffix` ends the second's name.
    Raises DataError where the name of `path` has no such word, or the second file is not there.
    """
    if first not in path.stem:
        raise DataError(
            f"{path}: such a source is a file with the word {first!r} in its name, with"
            f" {second!r} and {suffix} in the name of the one next to it; rename it so"
        )
    before, _, after = path.stem.rpartition(first)
    beside = path.with_name(f"{before}{second}{after}{suffix}")
    if not beside.is_file():
        raise DataError(f"{path}: the rest of it is read from {beside}, which is not there")
    return beside
