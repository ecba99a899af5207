"""`spt-ds summary RUN`: what a finished run achieved, as a table."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spt_ds.errors import DataError
from spt_ds.files import sha256
from spt_ds.run.command import run_command
from spt_ds.run.folder import RunFolder

LOSSES = (
    ("validation loss (nll, selection, fusion)", "loss"),
    ("nll, mean of all prompts", "nll"),
    ("nll, selected prompt", "nll_selected"),
)
SCORES = (
    ("F1 (SPT)", "f1_spt"),
    ("BLEU", "bleu"),
    ("DIST-1", "dist1"),
    ("DIST-2", "dist2"),
)  # keys of scores.json


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds summary", description="Losses, scores and prompt usage of a run."
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


def summary_rows(run: Path) -> list[tuple[str, str]]:
    """(name, value) rows; raise DataError when the run is not done."""
    folder = RunFolder(run)
    done = _read(folder.done, "train it to the end first")
    before, after = done["valid_before"], done["valid_after"]
    rows = [("steps", f"{done['step']} on {done['world_size']} rank(s)")]
    rows.append(("trained parameters", f"{done['trained_parameters']:,}"))
    rows += [(name, f"{before[key]:.4f} before, {after[key]:.4f} after") for name, key in LOSSES]
    scores, predictions = folder.replies.scores, folder.replies.predictions
    if scores.is_file():
        rows += _score_rows(_read(scores, "run `spt-ds evaluate` again"), predictions)
    if predictions.is_file():
        used = Counter(
            json.loads(line)["prompt"]
            for line in predictions.read_text(encoding="utf-8").splitlines()
        )
        usage = ", ".join(f"{prompt}: {count}" for prompt, count in sorted(used.items(), key=str))
        rows.append(("replies", str(sum(used.values()))))
        rows.append(("prompt usage", usage))
    rows.append(("run folder", str(run)))
    return rows


def _score_rows(scores: dict[str, Any], predictions: Path) -> list[tuple[str, str]]:
    if predictions.is_file():
        digest = sha256(predictions)
        if scores["settings"]["predictions_sha256"] != digest:
            return [("scores", "those of other replies; run `spt-ds evaluate` again")]
    return [(name, f"{scores['values'][key]:.2f}") for name, key in SCORES]


def _read(path: Path, mend: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {mend}") from error
    return found
