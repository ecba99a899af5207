"""CSV with a header: a row is a record, or a conversation of Synthetic-Persona-Chat. No torch."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_ds.config.data import FIELDS, SPC_COLUMNS
from spt_ds.data.dialogue import Example
from spt_ds.data.records import form, record_examples, renamed
from spt_ds.data.textfile import lines
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import parse_json

# Fields that may be lists: a cell that begins with a bracket is read as JSON.
_LISTS = ("persona", "history", "turns", "messages", "prompt", "completion", "choices")


def read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[Example]:
    """Yield the examples of each row; `columns` has the names of the header by ours."""
    for origin, cells in rows_of(path, lambda header, at: _check_header(header, columns, at)):
        record = _unpacked(renamed(cells, columns, origin), origin)
        name = str(record.get("id") or f"{path.name}:{origin.rpartition(':')[2]}")
        yield from record_examples(record, origin, name)


def rows_of(
    path: Path, check_header: Callable[[list[str], str], None]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, cells by column) of each row; `check_header` gets header and origin."""
    # A field may hold line ends, so a row begins on the line after the last one's end.
    rows = csv.reader((line for _, line in lines(path, keep_end=True)), strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in rows:
            number, start = start, rows.line_num + 1
            origin = f"{path}:{number}"
            if not header:
                header = row
                check_header(header, origin)
            elif len(row) == len(header):
                yield origin, dict(zip(header, row, strict=True))
            elif row:
                raise DataError(
                    f"{origin}: the row has {len(row)} fields, the header {len(header)}; quote"
                    " fields that hold a comma"
                )
    except csv.Error as error:
        long = "field limit" in str(error)
        mend = "look for a quote that is not closed" if long else "quote fields that span lines"
        raise DataError(f"{path}:{rows.line_num}: not a CSV row ({error}); {mend}") from error


def _check_header(header: list[str], columns: Mapping[str, str], origin: str) -> None:
    """Raise DataError where the rows would not be examples."""
    known = {*FIELDS, *columns.values()}
    twice = [name for name, count in Counter(header).items() if count > 1 and name in known]
    if twice:
        raise DataError(f"{origin}: the header has {shown(twice[0])} twice")
    named = renamed(dict.fromkeys(header, ""), columns, origin)
    missing = [name for name in SPC_COLUMNS if name not in named]
    if 0 < len(missing) < len(SPC_COLUMNS):
        raise DataError(
            f"{origin}: the header lacks {missing}, got {shown(header)}; Synthetic-Persona-Chat has"
            f" {SPC_COLUMNS}"
        )
    form(named, origin)


def _unpacked(record: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The record with lists and numbers in place of the texts that hold them."""
    whole = dict(record)
    for key in _LISTS:
        if isinstance(cell := whole.get(key), str) and cell.lstrip().startswith("["):
            try:
                whole[key] = parse_json(origin, cell, "a list in a cell is written as JSON")
            except DataError:
                # A prompt may begin with a bracket and be no list.
                if key not in ("persona", "prompt", "completion"):
                    raise
    if isinstance(turn := whole.get("turn"), str):
        whole["turn"] = int(turn) if turn.isdecimal() and len(turn) < 10 else turn or None
    for key in ("id", "dialogue_id", "choices"):
        whole[key] = whole.get(key) or None  # an empty cell
    return whole
