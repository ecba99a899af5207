"""`spt-ds runs`: the run folders below a folder, each with state, age, step, loss and scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spt_ds.display import duration
from spt_ds.errors import DataError
from spt_ds.log import show
from spt_ds.run.command import run_command
from spt_ds.run.progress import SCORES, Progress, RunWatch, run_folders

HEAD = ("run", "state", "age", "step", "best step", "best nll", *SCORES)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds runs",
        description="List run folders: state, age, step of all steps, best validation, scores.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="a run folder, or one that holds some; default runs",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a run, one a line")
    return run_command(parser, argv, _list)


def _list(args: argparse.Namespace) -> None:
    found = [run for folder in args.folders or [Path("runs")] for run in _runs_in(folder)]
    progress = [RunWatch(run).look(scores=True) for run in dict.fromkeys(found)]
    if args.json:
        for one in progress:
            print(json.dumps(asdict(one)))
        return
    rows = [HEAD, *map(_row, progress)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        show("  ".join(cells).rstrip())


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a run folder, or one that holds some")
    runs = list(run_folders(folder))
    if not runs:
        raise DataError(f"{folder}: holds no run folder (one has config.yaml and checkpoints)")
    return runs


def _row(one: Progress) -> tuple[str, ...]:
    total = "?" if one.total_steps is None else str(one.total_steps)
    return (
        one.run,
        one.state,
        duration(one.age_s),
        f"{one.step} of {total}",
        "-" if one.best_step is None else str(one.best_step),
        "-" if one.best_nll is None else f"{one.best_nll:.4f}",
        *(f"{one.scores[key]:.2f}" if key in one.scores else "-" for key in SCORES),
    )
