"""`spt-ds evaluate`: scores of a predictions file.

They go to the screen and into files as JSON, CSV, Markdown and LaTeX.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spt_ds.evaluate import tables
from spt_ds.evaluate.columns import METRICS, WIDE_COLUMNS
from spt_ds.evaluate.corpus_metrics import OPT_VOCABULARY, corpus_metrics
from spt_ds.evaluate.scores_json import Scores, scores_of
from spt_ds.evaluate.significance import Paired, p_text
from spt_ds.evaluate.tables import Cell, Table
from spt_ds.run.command import at_least, run_command
from spt_ds.run.folder import RunFolder
from spt_ds.run.predictions import read_predictions


def main(argv: Sequence[str]) -> int:
    """Score, print and write; return the exit code."""
    return run_command(_parser(), argv, _run)


def long_table(scores: Scores, against: dict[str, Paired] | None = None) -> Table:
    """One row per metric: value and 95 % interval.

    With `against` come difference, its interval and its p-value.
    """
    columns = ["metric", "value", "low 95 %", "high 95 %"]
    if against is not None:
        columns += ["difference", "diff low", "diff high", "p"]
    rows: list[list[Cell]] = []
    for metric in METRICS:
        if metric.key not in scores.values:
            continue
        interval = scores.intervals.get(metric.key, (None, None))
        row: list[Cell] = [metric.label, scores.values[metric.key], *interval]
        if against is not None:
            pair = against.get(metric.key)
            row += _tested(pair) if pair else [None] * 4
        rows.append(row)
    return Table(columns, rows)


def _tested(pair: Paired) -> list[Cell]:
    return [pair.difference, pair.low, pair.high, p_text(pair.p)]


def wide_table(name: str, scores: Scores, against: dict[str, Paired] | None = None) -> Table:
    """One row in the order of the paper's columns, intervals below it.

    With `against` come rows of differences and p-values.
    """
    columns = [
        metric for metric in METRICS if metric.key in WIDE_COLUMNS and metric.key in scores.values
    ]
    rows: list[list[Cell]] = [[name, *(scores.values[metric.key] for metric in columns)]]
    if scores.intervals:
        intervals = (scores.intervals.get(metric.key) for metric in columns)
        told = (None if pair is None else f"{pair[0]:.2f} to {pair[1]:.2f}" for pair in intervals)
        rows.append(["95 %", *told])
    if against is not None:
        pairs = [against.get(metric.key) for metric in columns]
        rows.append(
            ["difference", *(None if pair is None else f"{pair.difference:+.2f}" for pair in pairs)]
        )
        rows.append(["p", *(None if pair is None else p_text(pair.p) for pair in pairs)])
    return Table(["system", *(metric.label for metric in columns)], rows)


def notes(scores: Scores) -> list[str]:
    """What the table does not hold.

    That is prompt counts, lengths, BLEU's signature, and what was skipped and why.
    """
    settings = scores.settings
    lines = [
        f"{settings.examples} examples of {settings.dialogues} dialogues; BLEU"
        f" {settings.bleu_signature}"
    ]
    if settings.dialogues == 1:
        lines.append(
            "intervals skipped: all examples are of one dialogue, and intervals tell how dialogues"
            " differ"
        )
    if scores.prompt_counts:
        lines.append(
            "prompts chosen: "
            + " ".join(f"{k}:{count}" for k, count in enumerate(scores.prompt_counts))
        )
    for name, part in scores.lengths.items():
        rest = " ".join(f"{key} {value:g}" for key, value in part.items() if key != "mean")
        lines.append(f"{name}: mean {part['mean']:.2f} {rest}")
    lines += [f"{name} skipped: {why}" for name, why in scores.skipped.items()]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-ds evaluate", description="Score a predictions file."
    )
    parser.add_argument(
        "predictions", type=Path, help="predictions.jsonl, or the run folder that holds it"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for scores.json, .csv, .md and .tex; default: the folder of the predictions",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help=(
            "predictions of another system for the same "
            "examples: adds differences, their intervals and p-values"
        ),
    )
    parser.add_argument(
        "--ead-vocabulary",
        type=at_least(2),
        default=OPT_VOCABULARY,
        metavar="V",
        help="vocabulary size in EAD, one for all systems compared (default %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    metrics = corpus_metrics(read_predictions(args.predictions), args.ead_vocabulary)
    scores = scores_of(metrics)
    data, pairs = scores.to_json(), None
    if args.against is not None:
        other = corpus_metrics(read_predictions(args.against), args.ead_vocabulary)
        pairs = metrics.against(other)
        data["against"] = {
            "predictions_sha256": other.file.sha256,
            "metrics": {key: asdict(pair) for key, pair in pairs.items()},
        }
    table = long_table(scores, pairs)
    folder = args.out or metrics.file.path.parent
    home = metrics.file.path.resolve().parent
    name = (home.parent if home == RunFolder(home.parent).replies.path else home).name
    paths = tables.write_files(
        folder, "scores", data, long=table, wide=wide_table(name, scores, pairs)
    )
    # Printed last: a reader that closes the pipe, such as `head`, must not cost the files.
    print(table.text())
    told = notes(scores)
    if pairs is not None and "ppl_token" in scores.values and "ppl_token" not in pairs:
        told.append("PPL/token is not compared: the other file has other tokens, or none")
    print("\n".join([*told, "written: " + " ".join(map(str, paths))]))
