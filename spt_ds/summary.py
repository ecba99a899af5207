"""`spt-ds summary RUN`: what a finished run achieved, as a table and in three replies."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from spt_ds.display import printable, shown
from spt_ds.errors import DataError
from spt_ds.evaluate.text_metrics import cleaned
from spt_ds.files import sha256
from spt_ds.json_input import parse_object
from spt_ds.run.command import run_command
from spt_ds.run.folder import RunFolder
from spt_ds.run.predictions import (
    MEND_LINE,
    PredictionInDialogue,
    check_same_examples,
    lines_of,
    read_rows,
)

LOSSES = (
    ("validation loss", "loss"),
    ("nll, mean of all prompts", "nll"),
    ("nll, selected prompt", "nll_selected"),
)
_DIALOGUES = 3
# Keys of scores.json.
SCORES = (("F1 (SPT)", "f1_spt"), ("BLEU", "bleu"), ("DIST-1", "dist1"), ("DIST-2", "dist2"))


class Losses(BaseModel):
    """Validation losses at one end of a training, nats per token."""

    loss: float
    nll: float
    nll_selected: float


class Done(BaseModel):
    """What the table needs of DONE.json."""

    step: int
    world_size: int
    trained_parameters: int
    valid_before: Losses
    valid_after: Losses


class ScoreSettings(BaseModel):
    """What the table needs of the settings in scores.json."""

    predictions_sha256: str


class RunScores(BaseModel):
    """What the table needs of scores.json."""

    values: dict[str, float]
    settings: ScoreSettings


Content = TypeVar("Content", bound=BaseModel)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds summary", description="Losses, scores, prompt usage and replies of a run."
    )
    parser.add_argument(
        "run",
        type=Path,
        help="run folder with DONE.json, and generate/scores.json where it is scored",
    )
    return run_command(parser, argv, _print_table)


def _print_table(args: argparse.Namespace) -> None:
    rows = summary_rows(args.run)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    for lines in dialogues(RunFolder(args.run)):
        print()
        print("\n".join(f"{name:<12}  {printable(text)}" for name, text in lines))


def dialogues(folder: RunFolder) -> list[list[tuple[str, str]]]:
    """(name, text) lines of a few examples with the reply before and after the training.

    Empty where not both were generated. The examples lie at even distances in the data, so nothing
    is picked by how it turned out.
    """
    if not (folder.replies.predictions.is_file() and folder.replies_before.predictions.is_file()):
        return []
    before, after = (
        read_rows(replies.predictions, PredictionInDialogue)
        for replies in (folder.replies_before, folder.replies)
    )
    check_same_examples(after, before)
    count = min(_DIALOGUES, len(after.rows))
    places = [(2 * number + 1) * len(after.rows) // (2 * count) for number in range(count)]
    return [_dialogue(before.rows[place], after.rows[place]) for place in places]


def _dialogue(before: PredictionInDialogue, after: PredictionInDialogue) -> list[tuple[str, str]]:
    prompt = "several prompts" if after.prompt is None else f"prompt {after.prompt}"
    return [
        ("persona", " ".join(after.persona)),
        ("partner", after.history[-1] if after.history else ""),
        ("reply before", cleaned(before.raw, before.clean).strip()),
        ("reply after", f"{cleaned(after.raw, after.clean).strip()}  ({prompt})"),
        ("reference", after.reference),
    ]


def summary_rows(run: Path) -> list[tuple[str, str]]:
    """(name, value) rows; raise DataError when the run is not done."""
    folder = RunFolder(run)
    done = _read(folder.done, Done, "train it to the end first")
    rows = [("steps", f"{done.step} on {done.world_size} rank(s)")]
    rows.append(("trained parameters", f"{done.trained_parameters:,}"))
    for name, key in LOSSES:
        before, after = getattr(done.valid_before, key), getattr(done.valid_after, key)
        rows.append((name, f"{before:.4f} before, {after:.4f} after"))
    scores, predictions = folder.replies.scores, folder.replies.predictions
    if scores.is_file():
        mend = "run `spt-ds evaluate` again"
        rows += _score_rows(_read(scores, RunScores, mend), predictions, mend)
    if predictions.is_file():
        used = _prompts(predictions)
        by_prompt = sorted(used.items(), key=_by_length)
        usage = ", ".join(f"{prompt}: {count}" for prompt, count in by_prompt)
        rows.append(("replies", str(sum(used.values()))))
        rows.append(("prompt usage", usage))
    rows.append(("run folder", str(run)))
    return rows


def _score_rows(scores: RunScores, predictions: Path, mend: str) -> list[tuple[str, str]]:
    if predictions.is_file() and scores.settings.predictions_sha256 != sha256(predictions):
        return [("scores", f"those of other replies; {mend}")]
    return [(name, f"{scores.values[key]:.2f}") for name, key in SCORES if key in scores.values]


def _prompts(predictions: Path) -> Counter[str]:
    """How often each prompt spoke. Only that field is read: `spt-ds evaluate` checks the others."""
    used: Counter[str] = Counter()
    for number, line in enumerate(lines_of(predictions), start=1):
        row = parse_object(f"{predictions}:{number}", line.rstrip(b"\n"), MEND_LINE)
        used[shown(row.get("prompt"))] += 1
    return used


def _by_length(item: tuple[str, int]) -> tuple[int, str]:
    """10 after 9, and what is no number behind both."""
    return len(item[0]), item[0]


def _read(path: Path, content: type[Content], mend: str) -> Content:
    try:
        return content.model_validate(parse_object(str(path), path.read_bytes(), mend))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {key} is {shown(fault['input'])}; {mend}") from error
