"""Reads a run folder for a report.

What is not there yet is noted. What is there and damaged is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spt_ds.config.load import flatten, options_of
from spt_ds.config.schema import Config
from spt_ds.errors import DataError
from spt_ds.evaluate import scores_json
from spt_ds.evaluate.scores_json import Scores
from spt_ds.evaluate.text_metrics import cleaned, f1_spt
from spt_ds.json_input import parse_object
from spt_ds.run import predictions
from spt_ds.run.folder import ReplyFolder, RunFolder, distinct_names
from spt_ds.run.predictions import PredictionFile, PredictionInDialogue, read_rows

MEND_LINE = "remove the line"


@dataclass(frozen=True)
class Reply:
    """One example and what was answered."""

    row: PredictionInDialogue
    text: str
    """The prediction as it is scored."""
    f1: float
    """Word overlap with the reference, 0 to 1."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    label: str
    number: int
    """In the order of the page; it gives the run its colour."""
    options: dict[str, Any]
    """The configuration by key path."""
    generated: dict[str, Any]
    """The same, as the replies were generated; that of training where it is not known."""
    environment: dict[str, Any]
    """Hardware, versions and variables by key path; empty where they are not recorded."""
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl.

    Each has `step`, `kind` (train, valid), `time` (seconds since 1970), and the values.
    """
    done: dict[str, Any] | None
    """The summary at the end of training, or None."""
    deepspeed: str | None
    file: PredictionFile[PredictionInDialogue] | None
    replies: list[Reply]
    scores: Scores | None
    missing: list[str]
    """What is not there and how to get it."""

    @property
    def base(self) -> str:
        """The base, as a reader names it: losses over two bases are not comparable."""
        revision = self.options["model.revision"]
        return self.options["model.base"] + (f" at {revision}" if revision else "")

    def series(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of each line of `kind` that has a number under `key`."""
        return [
            (line["step"], line[key])
            for line in self.lines
            if line["kind"] == kind and _is_number(line.get(key))
        ]

    def paces(self) -> list[tuple[int, float]]:
        """(step, optimizer steps per second) of each stretch that ends in a training line.

        A stretch begins at the line before, of whatever kind, so no validation lies in it; saving
        of checkpoints does. The first one, with its warm-up, is left out where there are others.
        """
        stretches = [
            (after["step"], (after["step"] - before["step"]) / (after["time"] - before["time"]))
            for before, after in pairwise(self.lines)
            if after["kind"] == "train"
            and after["step"] > before["step"]
            and after["time"] > before["time"]
        ]
        return stretches[1:] or stretches


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each once, named by their last part, or more where that repeats.

    Raises DataError or ConfigError for a folder that is no run and for a file in it that cannot be
    read.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    names = distinct_names(unique)
    return [
        read_run(folder, name, number)
        for number, (folder, name) in enumerate(zip(unique, names, strict=True))
    ]


def by_base(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs over each base, in the order of the first of them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.base, []).append(run)
    return groups


def read_run(folder: Path, label: str, number: int = 0) -> Run:
    """Read one run folder."""
    run = RunFolder(folder)
    if not run.config.is_file():
        what = f"holds no {run.config.name}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; give a run folder, as `spt-ds train` writes one")
    loaded = run.load_config()
    missing: list[str] = []

    def present(path: Path, mend: str) -> bool:
        if not path.is_file():
            missing.append(f"{path.name} is not there: {mend}")
        return path.is_file()

    has_environment = present(run.environment, "hardware and versions are not known")
    lines = read_lines(run.metrics) if present(run.metrics, "no step has been logged yet") else []
    is_done = present(run.done, "training has not come to its end")
    file, scores = _scored(folder, missing)
    options = options_of(loaded)
    return Run(
        folder=folder,
        label=label,
        number=number,
        options=options,
        generated=(_generated(file) if file else None) or options,
        environment=flatten(_object(run.environment)) if has_environment else {},
        lines=lines,
        done=_object(run.done) if is_done else None,
        deepspeed=(
            _content(run.deepspeed).decode("utf-8", "replace") if run.deepspeed.is_file() else None
        ),
        file=file,
        replies=_replies(file) if file else [],
        scores=scores,
        missing=missing,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl. A last line without its end is one that a kill cut, and is left out."""
    lines = []
    for number, content in enumerate(_content(path).splitlines(keepends=True), start=1):
        if not content.endswith(b"\n"):
            break
        source = f"{path}:{number}"
        line = parse_object(source, content.rstrip(b"\n"), MEND_LINE)
        if not (
            isinstance(line.get("step"), int)
            and isinstance(line.get("kind"), str)
            and _is_number(line.get("time"))
        ):
            raise DataError(
                f"{source}: expected an object with 'step', 'kind' and 'time'; {MEND_LINE}"
            )
        lines.append(line)
    return lines


def extremes(replies: Sequence[Reply], most: int) -> tuple[list[Reply], list[Reply]]:
    """Return up to `most` replies of highest and of lowest F1, best and worst first.

    No reply is in both.
    """
    ranked = sorted(replies, key=lambda reply: (-reply.f1, reply.row.index))
    worst = ranked[max((len(ranked) + 1) // 2, len(ranked) - most) :]
    return ranked[: min((len(ranked) + 1) // 2, most)], worst[::-1]


def _scored(
    folder: Path, missing: list[str]
) -> tuple[PredictionFile[PredictionInDialogue] | None, Scores | None]:
    """The predictions and the scores that belong to them."""
    answers = ReplyFolder.of(folder)
    source, written = answers.predictions, answers.scores
    file = read_rows(source, PredictionInDialogue) if source.is_file() else None
    if file is None:
        missing.append(f"{source.name} is not there: write it with `spt-ds generate {folder}`")
    scores = scores_json.load_scores(written) if written.is_file() else None
    mend = f"write it with `spt-ds evaluate {folder}`"
    if scores is None:
        missing.append(f"{written.name} is not there: {mend}")
    elif file and scores.settings.predictions_sha256 != file.sha256:
        missing.append(f"{written.name} belongs to other predictions and is left out: {mend}")
        scores = None
    return file, scores


def _generated(file: PredictionFile[PredictionInDialogue]) -> dict[str, Any] | None:
    tree = predictions.generated_with(file.path.parent, file.sha256)
    try:
        return options_of(Config.model_validate_json(json.dumps(tree))) if tree else None
    except ValidationError as error:
        raise DataError(
            f"{ReplyFolder(file.path.parent).record}: {error}; generate again"
        ) from error


def _replies(file: PredictionFile[PredictionInDialogue]) -> list[Reply]:
    replies = []
    for row in file.rows:
        text = cleaned(row.raw, row.clean)
        replies.append(Reply(row, text, f1_spt(text, row.reference)))
    return replies


def _object(path: Path) -> dict[str, Any]:
    return parse_object(str(path), _content(path), "the training that wrote it can be run again")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
