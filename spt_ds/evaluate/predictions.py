"""Reads `predictions.jsonl`: one JSON object per line, in the order of the data; any fault is named
by `file:line`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_ds.errors import DataError

FILE_NAME = "predictions.jsonl"
RECORD = "generate.json"  # beside it: how the replies were made
DEFAULT_FOLDER = "generate"  # where `spt-ds generate` puts the file in a run folder
MAX_NATS = 700  # exp(700) is about the largest double


@dataclass(frozen=True)
class Prediction:
    """What the scores need of one line; fields of other names are left to their readers."""

    index: int
    id: str
    dialogue_id: str
    reference: str
    raw: str
    """The prediction as decoded, not yet cut."""
    prompt: int | None
    """The prompt that spoke; None where several did or none."""
    scores: tuple[float, ...]
    """One score per prompt of the bank; empty where there is none."""
    nll_sum: float | None
    """Negative log-likelihood of the reference in nats."""
    nll_tokens: int | None
    """Target tokens that `nll_sum` covers."""
    new_tokens: int | None
    context_tokens: int | None


@dataclass(frozen=True)
class PredictionFile:
    """A whole file, checked."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    rows: tuple[Prediction, ...]

    @property
    def data_sha256(self) -> str:
        """Digest of ids and references: equal for two files of the same examples in the same order."""
        pairs = [[row.id, row.reference] for row in self.rows]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    @property
    def units(self) -> list[int]:
        """The dialogue of each row, numbered from 0 in order of appearance."""
        known: dict[str, int] = {}
        return [known.setdefault(row.dialogue_id, len(known)) for row in self.rows]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_spoken(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


# Field: is it required, what holds for its value, the same in words.
_FIELDS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "index": (True, _is_count, "a whole number from 0 on"),
    "id": (True, _is_text, "a string"),
    "dialogue_id": (True, _is_text, "a string"),
    "reference": (True, _is_spoken, "a string with at least one word"),
    "raw": (True, _is_text, "a string"),
    "prompt": (False, _is_count, "null or a whole number from 0 on"),
    "scores": (False, _is_numbers, "a list of finite numbers"),
    "nll_sum": (False, lambda value: _is_number(value) and value >= 0, "a finite number from 0 on"),
    "nll_tokens": (
        False,
        lambda value: _is_count(value) and value != 0,
        "a whole number from 1 on",
    ),
    "new_tokens": (False, _is_count, "a whole number from 0 on"),
    "context_tokens": (False, _is_count, "a whole number from 0 on"),
}


def locate(folder: Path, *names: str) -> Path:
    """Return `folder`, or its `generate` folder if only that one holds any file of `names`."""
    inner = folder / DEFAULT_FOLDER
    outside, inside = (any((place / name).exists() for name in names) for place in (folder, inner))
    return inner if inside and not outside else folder


def read_predictions(path: str | Path) -> PredictionFile:
    """Read and check `path`: a predictions file, or a folder that holds one, itself or in its
    folder `generate`.

    Raises DataError, with `file:line`, for a file that is missing, empty or not UTF-8, for a line
    that is not a JSON object, for a missing or wrong field, and for an index that is repeated,
    skipped or out of order.
    """
    path = Path(path)
    if path.is_dir():
        path = locate(path, FILE_NAME) / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such predictions file; `spt-ds generate` writes one"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a predictions file"
        ) from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise DataError(
            f"{path}: is empty; a predictions file holds one JSON object per line (was generation"
            " cut off?)"
        )
    rows: list[Prediction] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        row = _parse(where, line)
        _check_order(where, row, rows)
        rows.append(row)
    return PredictionFile(path, hashlib.sha256(content).hexdigest(), tuple(rows))


def generated_with(folder: Path, sha256: str) -> dict[str, Any]:
    """The configuration, as a tree, under which the predictions in `folder` were generated.

    It is training's with what was overridden. Empty where `generate.json` is not there or tells of
    other predictions than those whose bytes have the digest `sha256`; DataError where it cannot be
    read.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = record["config"] if record["predictions_sha256"] == sha256 else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}); `spt-ds generate` writes it"
        ) from error
    if not isinstance(config, dict):
        raise DataError(
            f"{path}: config is a {type(config).__name__}, expected an object; `spt-ds generate`"
            " writes it"
        )
    return config


def check_same_examples(first: PredictionFile, second: PredictionFile) -> None:
    """Raise DataError, with the first differing line, unless both files answer the same examples in
    order.
    """
    for number, (one, other) in enumerate(zip(first.rows, second.rows, strict=False), start=1):
        for name in ("id", "dialogue_id", "reference"):
            got, expected = getattr(other, name), getattr(one, name)
            if got != expected:
                raise DataError(
                    f"{second.path}:{number}: field '{name}' is {got!r}, but {expected!r} in"
                    f" {first.path}:{number}; two files are compared on the same examples only:"
                    " generate both from the same data"
                )
    if len(first.rows) != len(second.rows):
        raise DataError(
            f"{second.path}: {len(second.rows)} examples, but {len(first.rows)} in {first.path}; "
            "two files are compared on the same examples only: generate both from the same data"
        )


def _parse(where: str, line: bytes) -> Prediction:
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON at column {error.colno} ({error.msg}); each line is one JSON object"
            " (a cut-off last line means that generation was stopped: run it again)"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{where}: got a {type(found).__name__}, expected a JSON object with 'index', 'id', ..."
        )
    values = {name: _field(where, found, name) for name in _FIELDS}
    row = Prediction(**{**values, "scores": tuple(values["scores"] or ())})
    _check_fit(where, row)
    return row


def _field(where: str, found: dict[str, Any], name: str) -> Any:
    required, holds, words = _FIELDS[name]
    value = found.get(name)
    if value is None and not required:
        return None
    if name not in found:
        near = difflib.get_close_matches(name, found.keys() - _FIELDS.keys(), 1)
        hint = f"; did you mean '{name}' by '{near[0]}'?" if near else f"; it is {words}"
        raise DataError(f"{where}: field '{name}' is missing{hint}")
    if not holds(value):
        raise DataError(f"{where}: field '{name}' is {value!r}, expected {words}")
    return value


def _check_fit(where: str, row: Prediction) -> None:
    """Fields that must fit one another."""
    if row.prompt is not None and row.scores and row.prompt >= len(row.scores):
        raise DataError(
            f"{where}: field 'prompt' is {row.prompt}, but 'scores' is over {len(row.scores)}"
            f" prompts (0 to {len(row.scores) - 1})"
        )
    if row.nll_sum is None and row.nll_tokens is None:
        return
    if row.nll_sum is None or row.nll_tokens is None:
        raise DataError(
            f"{where}: fields 'nll_sum' and 'nll_tokens' come together; give both or neither"
        )
    if row.nll_sum > MAX_NATS * min(row.nll_tokens, len(row.reference.split())):
        raise DataError(
            f"{where}: field 'nll_sum' is {row.nll_sum!r}, more than {MAX_NATS} nats a token or"
            " word: its perplexity is no finite number (is it a sum of natural logarithms over the"
            " reference's tokens?)"
        )


def _check_order(where: str, row: Prediction, earlier: list[Prediction]) -> None:
    """Indices count the lines from 0, and all lines have the same optional fields."""
    expected = len(earlier)
    if row.index < expected:
        raise DataError(
            f"{where}: index {row.index} again, first on line {row.index + 1}; each example is"
            " scored once"
        )
    if row.index > expected:
        raise DataError(
            f"{where}: index {row.index}, expected {expected}; an example is missing or out of"
            " order (lines follow the data, from index 0 on)"
        )
    if not earlier:
        return
    first = earlier[0]
    if len(row.scores) != len(first.scores):
        raise DataError(
            f"{where}: field 'scores' has {len(row.scores)} numbers, {len(first.scores)} on line 1;"
            " one file holds the predictions of one bank"
        )
    for name in ("nll_sum", "prompt", "new_tokens", "context_tokens"):
        if (getattr(row, name) is None) != (getattr(first, name) is None):
            raise DataError(
                f"{where}: field '{name}' is on some lines and not on others; give it on all or"
                " none"
            )
