"""Reads `predictions.jsonl`: one JSON object per line, in the order of the data.

Any system's replies can be brought into this form, so nothing in the file is trusted. Each fault is
named by `file:line`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from spt_ds.config.legacy import upgrade
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import parse_json, parse_object
from spt_ds.run.folder import ReplyFolder, RunFolder

MAX_NATS = 700  # exp(700) is about the largest double
MAX_BANK = 4096  # prompts: a table of dialogues by prompts must fit into memory
MAX_CHOICES = 4096  # answers to choose among
MAX_LINE_BYTES = 16 << 20  # a file without line ends is not read into memory as a whole
MAX_TOKENS = 2**53  # up to here a double holds every whole number
MEND_LINE = (
    "each line is one JSON object (a cut-off last line means that generation was stopped: run it"
    " again)"
)


def _with_a_word(text: str) -> str:
    if not text.strip():
        raise ValueError("no word")
    return text


# Strict: true is no number, and "3" is none.
Count = Annotated[int, Field(strict=True, ge=0)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKENS)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Words = Annotated[Text, AfterValidator(_with_a_word)]


class Prediction(BaseModel):
    """What the scores need of one line; fields of other names are left to their readers.

    A field's description says in a message which values it may have.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    index: Count = Field(description="a whole number from 0 on")
    id: Text = Field(description="a string")
    dialogue_id: Text = Field(description="a string")
    reference: Words = Field(description="a string with at least one word")
    raw: Text = Field(description="a string")
    """The prediction as decoded, not yet cut."""
    clean: Annotated[Literal["spt", "none"], Field(description="spt or none")] = "spt"
    """How the scores cut it; files of other systems are cut as the paper's."""
    choices: tuple[Words, ...] = Field(
        (), description="a list of texts, one of them the reference", max_length=MAX_CHOICES
    )
    """The answers to choose among; empty where there are none."""
    prompt: Annotated[Count, Field(lt=MAX_BANK)] | None = Field(
        None, description=f"null or a whole number from 0 on, below {MAX_BANK}"
    )
    """The prompt that spoke; None where several did or none."""
    scores: Annotated[tuple[Finite, ...], BeforeValidator(lambda given: given or ())] = Field(
        (), description="a list of finite numbers", max_length=MAX_BANK
    )
    """One score per prompt of the bank; empty where there is none."""
    nll_sum: Annotated[Finite, Field(ge=0)] | None = Field(
        None, description="a finite number from 0 on"
    )
    """Negative log-likelihood of the reference in nats."""
    nll_tokens: Annotated[Tokens, Field(ge=1)] | None = Field(
        None, description="a whole number from 1 on"
    )
    """Target tokens that `nll_sum` covers."""
    new_tokens: Tokens | None = Field(None, description="a whole number from 0 on")
    context_tokens: Tokens | None = Field(None, description="a whole number from 0 on")


Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda given: () if given is None else given)]


class PredictionInDialogue(Prediction):
    """A line of the predictions with the dialogue around it, which the scores do not need."""

    turn: Count | None = Field(None, description="null or a whole number from 0 on")
    """Number of the utterance in its dialogue, from 0; None where the file does not tell."""
    persona: Texts = Field((), description="a list of strings")
    history: Texts = Field((), description="a list of strings")
    """Utterances from the first on; the last one is the partner's."""


Row = TypeVar("Row", bound=Prediction)


@dataclass(frozen=True)
class PredictionFile(Generic[Row]):
    """A whole file, checked."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    rows: tuple[Row, ...]

    @property
    def data_sha256(self) -> str:
        """Digest of ids and references.

        It is equal for two files of the same examples in the same order.
        """
        # As JSON lists: where one text ends and the next begins counts too.
        pairs = [[row.id, row.reference] for row in self.rows]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    @property
    def units(self) -> list[int]:
        """The dialogue of each row, numbered from 0 in order of appearance."""
        known: dict[str, int] = {}
        return [known.setdefault(row.dialogue_id, len(known)) for row in self.rows]


def read_predictions(path: str | Path) -> PredictionFile[Prediction]:
    """Read and check a predictions file, or the one in a run folder or its folder `generate`.

    Raises DataError as `read_rows` does.
    """
    return read_rows(path, Prediction)


def read_rows(path: str | Path, row_type: type[Row]) -> PredictionFile[Row]:
    """Like `read_predictions`, for a reader that needs more of each line than the scores do.

    Raises DataError, with `file:line`, for a file that is missing, empty or not UTF-8, for a line
    that is not a JSON object, for a missing or wrong field of `row_type`, and for an index that is
    repeated, skipped or out of order.
    """
    path = Path(path)
    if path.is_dir():
        own, inner = ReplyFolder(path).predictions, RunFolder(path).replies.predictions
        path = inner if inner.exists() and not own.exists() else own
    digest = hashlib.sha256()
    rows: list[Row] = []
    for number, line in enumerate(lines_of(path), start=1):
        # Hashed while it is parsed: rows and digest belong to one read of the file.
        digest.update(line)
        source = f"{path}:{number}"
        row = _row(source, line, row_type)
        _check_order(source, row, rows)
        rows.append(row)
    if not rows:
        raise DataError(
            f"{path}: is empty; a predictions file holds one JSON object per line (was generation"
            " cut off?)"
        )
    return PredictionFile(path, digest.hexdigest(), tuple(rows))


def generated_with(folder: Path, sha256: str) -> dict[str, Any]:
    """The configuration, as a tree, under which the predictions in `folder` were generated.

    It is training's with what was overridden, and keys of 0.1.0 have their new names. Empty where
    `generate.json` is not there or tells of other predictions than those whose bytes have the
    digest `sha256`; DataError where it cannot be read.
    """
    path = ReplyFolder(folder).record
    if not path.is_file():
        return {}
    mend = "`spt-ds generate` writes it"
    try:
        record = parse_json(str(path), path.read_bytes(), mend)
        config = record["config"] if record["predictions_sha256"] == sha256 else {}
    except (OSError, DataError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({shown(error)}); {mend}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: config is a {type(config).__name__}, expected an object; {mend}")
    upgrade(config, overwrite=False)
    return config


def check_same_examples(first: PredictionFile[Any], second: PredictionFile[Any]) -> None:
    """Raise DataError unless both files answer the same examples in the same order.

    The message names the first line that differs.
    """
    for number, (ours, theirs) in enumerate(zip(first.rows, second.rows, strict=False), start=1):
        for name in ("id", "dialogue_id", "reference"):
            got, expected = getattr(theirs, name), getattr(ours, name)
            if got != expected:
                raise DataError(
                    f"{second.path}:{number}: field '{name}' is {shown(got)}, but"
                    f" {shown(expected)} in {first.path}:{number}; two files are compared on the"
                    " same examples only: generate both from the same data"
                )
    if len(first.rows) != len(second.rows):
        raise DataError(
            f"{second.path}: {len(second.rows)} examples, but {len(first.rows)} in {first.path}; "
            "two files are compared on the same examples only: generate both from the same data"
        )


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their ends. Only a line feed ends one."""
    try:
        with path.open("rb") as file:
            # One byte more than is allowed shows that a line is too long, without the rest of it in
            # memory.
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number + 1}: the line is longer than {MAX_LINE_BYTES >> 20} MiB;"
                        f" {MEND_LINE}"
                    )
                yield line
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such predictions file; `spt-ds generate` writes one"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a predictions file"
        ) from error


def _row(source: str, line: bytes, row_type: type[Row]) -> Row:
    given = parse_object(source, line.rstrip(b"\n"), MEND_LINE)
    try:
        row = row_type.model_validate(given)
    except ValidationError as error:
        raise DataError(f"{source}: {_told(error, given, row_type)}") from error
    _check_fit(source, row)
    return row


def _told(error: ValidationError, given: dict[str, Any], row_type: type[Row]) -> str:
    """The first fault in our words: pydantic's name a type, ours what the field may hold."""
    fault = error.errors(include_url=False, include_context=False)[0]
    name = str(fault["loc"][0])
    words = row_type.model_fields[name].description
    if name not in given:
        # Names of other fields are no misspelling of this one.
        near = difflib.get_close_matches(name, given.keys() - row_type.model_fields.keys(), 1)
        hint = f"; did you mean '{name}' by '{near[0]}'?" if near else f"; it is {words}"
        return f"field '{name}' is missing{hint}"
    return f"field '{name}' is {shown(given[name])}, expected {words}"


def _check_fit(source: str, row: Prediction) -> None:
    """Fields that must fit one another."""
    if row.choices and row.reference not in row.choices:
        raise DataError(
            f"{source}: field 'choices' is {shown(list(row.choices))}, which lacks the reference"
            f" {shown(row.reference)}"
        )
    if row.prompt is not None and row.scores and row.prompt >= len(row.scores):
        raise DataError(
            f"{source}: field 'prompt' is {row.prompt}, but 'scores' is over {len(row.scores)}"
            f" prompts (0 to {len(row.scores) - 1})"
        )
    if row.nll_sum is None and row.nll_tokens is None:
        return
    if row.nll_sum is None or row.nll_tokens is None:
        raise DataError(
            f"{source}: fields 'nll_sum' and 'nll_tokens' come together; give both or neither"
        )
    # The scores divide by tokens and by words, so both perplexities must be finite.
    if row.nll_sum > MAX_NATS * min(row.nll_tokens, len(row.reference.split())):
        raise DataError(
            f"{source}: field 'nll_sum' is {row.nll_sum!r}, more than {MAX_NATS} nats a token or"
            " word: its perplexity is no finite number (is it a sum of natural logarithms over the"
            " reference's tokens?)"
        )


def _check_order(source: str, row: Row, earlier: list[Row]) -> None:
    """Indices count the lines from 0, and all lines have the same optional fields."""
    expected = len(earlier)
    if row.index < expected:
        raise DataError(
            f"{source}: index {row.index} again, first on line {row.index + 1}; each example is"
            " scored once"
        )
    if row.index > expected:
        raise DataError(
            f"{source}: index {shown(row.index)}, expected {expected}; an example is missing or out"
            " of order (lines follow the data, from index 0 on)"
        )
    if not earlier:
        return
    first = earlier[0]
    if len(row.scores) != len(first.scores):
        raise DataError(
            f"{source}: field 'scores' has {len(row.scores)} numbers, {len(first.scores)} on line"
            " 1; one file holds the predictions of one bank"
        )
    if row.clean != first.clean:
        raise DataError(
            f"{source}: field 'clean' is {row.clean}, {first.clean} on line 1; replies that are"
            " compared are cut by one rule"
        )
    for name in ("nll_sum", "prompt", "new_tokens", "context_tokens"):
        if (getattr(row, name) is None) != (getattr(first, name) is None):
            raise DataError(
                f"{source}: field '{name}' is on some lines and not on others; give it on all or"
                " none"
            )
