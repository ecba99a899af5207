"""Readers: a source's name becomes a stream of `Example`. No torch.

Every fault of a file names its `file:line`.

A source is a file (ParlAI text, Synthetic-Persona-Chat CSV, JSONL), `embedded:train|valid|test`
(the dialogues that are shipped), `embedded:clients/train|valid|test` (single turns of them in the
house styles of four clients) or `hub:NAME[:CONFIG][:SPLIT]` (anything that
`datasets.load_dataset` reads).
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from spt_ds.data.dialogue import Example, replies
from spt_ds.data.parlai import read_parlai
from spt_ds.data.textfile import lines, readable
from spt_ds.display import holds_surrogate, shown
from spt_ds.errors import DataError
from spt_ds.files import sha256
from spt_ds.json_input import parse_object
from spt_ds.log import get_logger

Format = Literal["auto", "parlai", "spc_csv", "jsonl"]
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {
    f"embedded:{prefix}{split}": ASSETS / folder / f"{split}.jsonl"
    for prefix, folder in (("", "dialogues"), ("clients/", "clients"))
    for split in ("train", "valid", "test")
}
SPC_COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
# Some conversations of the published files set the name in bold: `*User 1:* hi`; their asterisks
# are dropped.
_SPC_TURN = re.compile(r"(\*[* ]*)?User ([12]):(.*)", re.DOTALL)
_SPC_NAME = re.compile(r"\buser\s*\d+\s*:", re.IGNORECASE)
MAX_TURN = 2**31 - 1  # the store keeps places of turns in 32 bits


def read(source: str, format: Format = "auto") -> Iterator[Example]:
    """Yield the examples of `source`; DataError where it is missing, malformed or empty."""
    if source.startswith("hub:"):
        examples = _read_hub(source)
    else:
        path = resolve(source)
        examples = _FORMATS[detect(path) if format == "auto" else format](path)
    count = 0
    for count, example in enumerate(examples, start=1):  # noqa: B007 (read after the loop)
        yield example
    if not count:
        raise DataError(
            f"{source}: holds no example, at least one reply of a persona's owner is needed"
        )


def resolve(source: str) -> Path:
    """Return the file behind `embedded:SPLIT` or a path; DataError when it does not exist."""
    if source.startswith("embedded:"):
        if source not in SHIPPED:
            raise DataError(
                f"data source {source!r}: no such shipped split; use embedded:train, :valid or"
                " :test, or embedded:clients/train, /valid or /test"
            )
        path = SHIPPED[source]
    else:
        path = Path(os.path.expanduser(source))
    # os.path answers False where a name is too long or holds a NUL; pathlib raises.
    if not os.path.isfile(path):
        raise DataError(
            f"{path}: no such file (data source {shown(source)}); give a ParlAI text,"
            " Synthetic-Persona-Chat CSV or JSONL file, embedded:train|valid|test, or"
            " hub:NAME[:CONFIG][:SPLIT]"
        )
    return path


def digest(source: str) -> str:
    """Return the SHA-256 (hex) of the bytes of `source`.

    For a hub data set it is that of its name and content fingerprint.
    """
    if source.startswith("hub:"):
        fingerprint = f"{source} {_load_hub(source)._fingerprint}"
        return hashlib.sha256(fingerprint.encode()).hexdigest()
    path = resolve(source)
    with readable(path):
        return sha256(path)


def detect(path: Path) -> Format:
    """Tell the format of a file by its suffix, else by its first line that is not blank."""
    by_suffix: dict[str, Format] = {".csv": "spc_csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if known := by_suffix.get(path.suffix.lower()):
        return known
    number, first = next(((number, line) for number, line in lines(path) if line.strip()), (1, ""))
    if first.lstrip().startswith("{"):
        return "jsonl"
    if re.match(r"\d+ ", first):
        return "parlai"
    if SPC_COLUMNS[0] in first:
        return "spc_csv"
    raise DataError(
        f"{path}:{number}: cannot tell the format from the line {first[:60]!r}; allowed are ParlAI"
        " text (`1 hello`, a tab, `hi`), Synthetic-Persona-Chat CSV and JSONL; set data.format to"
        " parlai, spc_csv or jsonl"
    )


def _read_spc(path: Path) -> Iterator[Example]:
    """Synthetic-Persona-Chat: two views of each conversation, one for each user's persona."""
    # A field may hold line ends, so a row begins on the line after the last one's end.
    rows = csv.reader((line for _, line in lines(path, keep_end=True)), strict=True)
    header: list[str] = []
    columns: list[int] = []
    start = 1
    try:
        for row in rows:
            origin, start = f"{path}:{start}", rows.line_num + 1
            if not columns:
                header, columns = row, _spc_columns(row, origin)
            elif len(row) == len(header):
                yield from _spc_views([row[column] for column in columns], origin)
            elif row:
                raise DataError(
                    f"{origin}: the row has {len(row)} fields, the header {len(header)}; quote"
                    " fields that hold a comma"
                )
    except csv.Error as error:
        long = "field limit" in str(error)
        mend = "look for a quote that is not closed" if long else "quote fields that span lines"
        raise DataError(f"{path}:{rows.line_num}: not a CSV row ({error}); {mend}") from error


def _spc_columns(header: list[str], origin: str) -> list[int]:
    missing = [name for name in SPC_COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{origin}: the header lacks {missing}, got {shown(header)}; Synthetic-Persona-Chat has"
            f" {SPC_COLUMNS}"
        )
    return [header.index(name) for name in SPC_COLUMNS]


def _spc_views(cells: list[str], origin: str) -> Iterator[Example]:
    """Yield both users' examples of one conversation."""
    speakers, turns = _spc_turns(cells[2], origin)
    name = origin.rpartition("/")[2]
    for user in ("1", "2"):
        persona = tuple(line.strip() for line in cells[int(user) - 1].split("\n") if line.strip())
        view = f"{name}/user{user}"
        for turn, history, response in replies(turns, self_opens=speakers[:1] == [user]):
            yield Example(f"{view}/{turn}", view, turn, persona, history, response)


def _spc_turns(conversation: str, origin: str) -> tuple[list[str], list[str]]:
    """Return (speakers, turns), alternating.

    Turns in a row by one user, and lines without a name, are joined. The published files hold some
    conversations without names; they are left out with a warning.
    """
    speakers: list[str] = []
    turns: list[str] = []
    for line in conversation.split("\n"):
        if not line.strip("* "):
            continue  # blank lines and rulers
        match = _SPC_TURN.match(line.strip())
        if match is None and not speakers:
            get_logger().warning(
                "%s: skipped, the conversation names no speaker: %r", origin, line[:60]
            )
            break
        text = line.strip() if match is None else match[3].strip("* " if match[1] else " ")
        if name := _SPC_NAME.search(text):
            raise DataError(
                f"{origin}: {name[0][:60]!r} inside a turn; the turns of a conversation begin a"
                " line"
                " each, with `User 1:` or `User 2:`"
            )
        if match is None or (speakers and speakers[-1] == match[2]):
            turns[-1] = f"{turns[-1]} {text}".strip()
        else:
            speakers.append(match[2])
            turns.append(text)
    if "" in turns:
        raise DataError(
            f"{origin}: turn {turns.index('')} of the conversation has a name and no text; remove"
            " the line"
        )
    return speakers, turns


def _read_jsonl(path: Path) -> Iterator[Example]:
    """One JSON object a line.

    It is an example (persona, history, response) or a dialogue (persona, turns, first_speaker).
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        record = parse_object(origin, line, "each line is one JSON object")
        yield from _from_record(record, origin, str(record.get("id") or f"{path.name}:{number}"))


def _from_record(record: Mapping[str, Any], origin: str, name: str) -> Iterator[Example]:
    _check_characters(name, "id", origin)
    if "turns" not in record:
        history = _texts(record, "history", origin)
        response = _text(record.get("response"), "response", origin)
        dialogue = (
            name
            if (given := record.get("dialogue_id")) is None
            else _text(str(given), "dialogue_id", origin)
        )
        turn = len(history) if (given := record.get("turn")) is None else given
        if type(turn) is not int or not 0 <= turn <= MAX_TURN:
            raise DataError(
                f'{origin}: "turn" must be a whole number from 0 on, got {shown(turn)}; the'
                f" largest is {MAX_TURN}"
            )
        yield Example(name, dialogue, turn, _texts(record, "persona", origin), history, response)
        return
    if (first := record.get("first_speaker")) not in ("partner", "self"):
        raise DataError(
            f"{origin}: first_speaker is {shown(first)}; allowed are 'partner' and 'self' (the"
            " persona's owner)"
        )
    persona, turns = _texts(record, "persona", origin), _texts(record, "turns", origin)
    for turn, history, response in replies(turns, self_opens=first == "self"):
        yield Example(f"{name}/{turn}", name, turn, persona, history, response)


def _texts(record: Mapping[str, Any], key: str, origin: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, (list, tuple)):
        got = shown(value) if key in record else f"no such key among {shown(sorted(record))}"
        raise DataError(
            f'{origin}: "{key}" must be a list of texts, got {got}; write [] where there is none'
        )
    return tuple(_text(item, f"{key}[{number}]", origin) for number, item in enumerate(value))


def _text(value: object, key: str, origin: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{origin}: "{key}" must be a text that is not blank, got {shown(value)}')
    _check_characters(value, key, origin)
    return value.strip()


def _check_characters(text: str, key: str, origin: str) -> None:
    """A row of a hub data set comes from no JSON reader, which would have refused it."""
    if holds_surrogate(text):
        raise DataError(
            f'{origin}: "{key}" is {shown(text)}, which holds half a surrogate pair, no character'
        )


def _read_hub(source: str) -> Iterator[Example]:
    name = source.split(":")[1]
    for number, record in enumerate(_load_hub(source)):
        yield from _from_record(
            record, f"{source} row {number}", str(record.get("id") or f"{name}:{number}")
        )


def _load_hub(source: str) -> Any:
    """Load `hub:NAME[:CONFIG][:SPLIT]`.

    An empty CONFIG is the data set's default; SPLIT is train where it is left out.
    """
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise DataError(
            f"data source {source!r}: write hub:NAME[:CONFIG][:SPLIT], or hub:NAME::SPLIT without a"
            " config"
        )
    name, config, split = [*parts, "", ""][:3]
    import datasets  # seconds to import, and only this source needs it here

    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except (
        Exception
    ) as error:  # network, authentication and data-set faults come as a dozen unrelated classes
        raise DataError(
            f"data source {source!r}: cannot load it ({type(error).__name__}: {error}); without a"
            " network give a local file instead (ParlAI text, Synthetic-Persona-Chat CSV or"
            " JSONL), a split without a config is written hub:NAME::SPLIT"
        ) from error


_FORMATS: dict[str, Callable[[Path], Iterator[Example]]] = {
    "parlai": read_parlai,
    "spc_csv": _read_spc,
    "jsonl": _read_jsonl,
}
