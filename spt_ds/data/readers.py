"""Readers: a source's name becomes a stream of `Example`. No torch.

Every fault of a file names its `file:line`.

A source is a file (ParlAI text, CSV, JSONL, questions of LaMP or PersonaMem),
`embedded:train|valid|test` (the dialogues that are shipped), `embedded:clients/train|valid|test`
(single turns of them in the house styles of four clients) or `hub:NAME[:CONFIG][:SPLIT]` (anything
that `datasets.load_dataset` reads).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from spt_ds.config.data import FIELDS, SPC_COLUMNS, Format
from spt_ds.data.csv_file import read_csv
from spt_ds.data.dialogue import Example
from spt_ds.data.lamp import outputs_of, read_lamp
from spt_ds.data.parlai import read_parlai
from spt_ds.data.personamem import contexts_of, is_personamem, read_personamem
from spt_ds.data.records import record_examples, renamed
from spt_ds.data.spc import conversation_of
from spt_ds.data.textfile import lines, readable
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.files import sha256
from spt_ds.json_input import parse_object

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {
    f"embedded:{prefix}{split}": ASSETS / folder / f"{split}.jsonl"
    for prefix, folder in (("", "dialogues"), ("clients/", "clients"))
    for split in ("train", "valid", "test")
}
Split = Literal["train", "valid", "test"]
_LONGEST_HEADER = 1 << 12  # bytes of a file that tell what it is
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def read(
    source: str, format: Format = "auto", columns: Mapping[str, str] = NO_COLUMNS
) -> Iterator[Example]:
    """Yield the examples of `source`; DataError where it is missing, malformed or empty.

    `columns` has the names of its keys by ours (see FIELDS). ParlAI text has no names, and the
    shipped dialogues have ours.
    """
    if source.startswith("hub:"):
        examples = _read_hub(source, columns)
    else:
        path = resolve(source)
        format = detect(path) if format == "auto" else format
        if format == "parlai":
            examples = read_parlai(path)
        elif format == "lamp":
            examples = read_lamp(path)
        elif format == "personamem":
            examples = read_personamem(path)
        elif format == "jsonl":
            examples = _read_jsonl(path, NO_COLUMNS if source in SHIPPED else columns)
        else:
            examples = read_csv(path, columns)
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
            f"{path}: no such file (data source {shown(source)}); give a ParlAI text, CSV or JSONL"
            " file, embedded:train|valid|test, or hub:NAME[:CONFIG][:SPLIT]"
        )
    return path


def digest(source: str, format: Format = "auto") -> str:
    """Return the SHA-256 (hex) of the bytes of `source`, and of the file beside it if it has one.

    For a hub data set it is that of its name and content fingerprint.
    """
    if source.startswith("hub:"):
        # `datasets` keeps a hash of the content and has no public name for it.
        fingerprint = f"{source} {load_hub(source)._fingerprint}"
        return hashlib.sha256(fingerprint.encode()).hexdigest()
    path = resolve(source)
    format = detect(path) if format == "auto" else format
    beside = {"lamp": outputs_of, "personamem": contexts_of}.get(format)
    with readable(path):
        own = sha256(path)
        return (
            own
            if beside is None
            else hashlib.sha256(f"{own} {sha256(beside(path))}".encode()).hexdigest()
        )


def detect(path: Path) -> Format:
    """Tell the format of a file by its suffix, else by its first line that is not blank."""
    by_suffix: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    with readable(path), path.open("rb") as file:
        header = file.read(_LONGEST_HEADER).decode("utf-8-sig", "replace").lstrip()
    if known := by_suffix.get(path.suffix.lower()):
        return "personamem" if known == "csv" and is_personamem(header) else known
    if header.startswith("["):  # its one line may have gigabytes
        return "lamp"
    number, first = next(((number, line) for number, line in lines(path) if line.strip()), (1, ""))
    if first.lstrip().startswith("{"):
        return "jsonl"
    if re.match(r"\d+ ", first):
        return "parlai"
    names = [cell.strip('" ') for cell in first.split(",")]
    if SPC_COLUMNS[0] in first or (len(names) > 1 and any(name in FIELDS for name in names)):
        return "csv"
    raise DataError(
        f"{path}:{number}: cannot tell the format from the line {first[:60]!r}; allowed are ParlAI"
        " text (`1 hello`, a tab, `hi`), CSV, JSONL, and questions of LaMP and PersonaMem; set"
        " data.format to parlai, csv, jsonl, lamp or personamem"
    )


@dataclass(frozen=True)
class Part:
    """A part of a source that is divided among training, validation and test.

    Dialogues, or personas, are put in an order that follows from their names and a seed alone. The
    first of them are the test, the next ones the validation, the rest the training data.
    """

    name: Split
    valid: float  # share of the dialogues or personas
    test: float
    by: Literal["dialogue", "persona"]
    seed: int

    def of(self, source: str, format: Format, columns: Mapping[str, str]) -> Iterator[Example]:
        """Yield the examples of this part of a source, which is read twice.

        DataError where a part would be empty.
        """
        # Sorted by hash: the order does not depend on that of the file.
        groups = sorted({self._rank(example) for example in read(source, format, columns)})
        test, valid = (
            max(1, round(share * len(groups))) if share else 0 for share in (self.test, self.valid)
        )
        if test + valid >= len(groups):
            raise DataError(
                f"{source}: {len(groups)} {self.by}s cannot be divided into {test} for the test,"
                f" {valid} for validation and the rest for training; give more, or separate files"
            )
        bounds = {"test": (0, test), "valid": (test, test + valid), "train": (test + valid, None)}
        chosen = set(groups[slice(*bounds[self.name])])
        for example in read(source, format, columns):
            if self._rank(example) in chosen:
                yield example

    def _rank(self, example: Example) -> bytes:
        """Where the example's dialogue or persona is in the order."""
        group = (
            "\n".join(example.persona)
            if self.by == "persona"
            # Both views of a conversation go into one part, because they hold the same texts.
            else conversation_of(example.dialogue_id)
        )
        return hashlib.sha256(f"{self.seed}:{group}".encode()).digest()[:16]


def _read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[Example]:
    """One JSON object a line, in any of the forms of `records`."""
    for number, line in lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        record = renamed(
            parse_object(origin, line, "each line is one JSON object"), columns, origin
        )
        yield from record_examples(record, origin, str(record.get("id") or f"{path.name}:{number}"))


def _read_hub(source: str, columns: Mapping[str, str]) -> Iterator[Example]:
    """Yield the examples of each row of `hub:NAME[:CONFIG][:SPLIT]`."""
    name = source.split(":")[1]
    for number, row in enumerate(load_hub(source)):
        origin = f"{source} row {number}"
        record = renamed(row, columns, origin)
        yield from record_examples(record, origin, str(record.get("id") or f"{name}:{number}"))


def load_hub(source: str) -> Any:
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
    except Exception as error:
        # Network, authentication and data-set faults come as a dozen unrelated classes.
        raise DataError(
            f"data source {source!r}: cannot load it ({type(error).__name__}: {error}); without a"
            " network give a local file instead (ParlAI text, CSV or JSONL), a split without a"
            " config is written hub:NAME::SPLIT"
        ) from error
