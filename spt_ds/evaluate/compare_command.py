"""`spt-ds compare`: one table of several runs, on the screen and in files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spt_ds.evaluate import tables
from spt_ds.evaluate.comparison import compare
from spt_ds.run.command import run_command


def main(argv: Sequence[str]) -> int:
    """Compare, print and, with --out, write; return the exit code."""
    return run_command(_parser(), argv, _compare)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-ds compare", description="One table of several runs."
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder with predictions.jsonl or scores.json",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        required=True,
        metavar="RUN",
        help="run that gains are measured over",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for compare.json, .csv, .md and .tex"
    )
    return parser


def _compare(args: argparse.Namespace) -> None:
    result = compare(args.runs, args.baseline)
    paths: list[Path] = []
    if args.out is not None:
        paths = tables.write_files(
            args.out, "compare", result.to_json(), result.long(), result.wide()
        )
    # Printed last: a reader that closes the pipe, such as `head`, must not cost the files.
    print(result.wide().text())
    for group in result.groups[1:]:
        gain = result.diversity_gain(group)
        if gain is not None:
            print(
                f"{group.name}: mean gain of DIST-1 and DIST-2 over {result.baseline.name}"
                f" {gain:+.1f} %"
            )
    print("".join(f"{note}\n" for note in result.notes), end="")
    if paths:
        print("written: " + " ".join(map(str, paths)))
