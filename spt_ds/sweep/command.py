"""`spt-ds sweep FILE`: train, generate and evaluate every cell of a grid, in one table.

A cell is one configuration. Cells of one row differ in their seed alone, and the table gives a
row's mean and standard deviation. What is finished is not repeated, what was begun goes on: the run
folders are the only state. On a cluster `slurm/sweep.sbatch` starts the steps of a cell from what
`--list` prints.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from spt_ds.errors import ConfigError
from spt_ds.evaluate import tables
from spt_ds.evaluate.comparison import compare
from spt_ds.evaluate.tables import Cell as TableCell
from spt_ds.evaluate.tables import Table
from spt_ds.run.command import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    add_overrides,
    at_least,
    run_command,
)
from spt_ds.sweep.cells import Cell, load_cells
from spt_ds.sweep.runner import Runner


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep.

    Returns 0 when every cell is finished, 75 when stopped, 1 when one failed, 2 for an error to
    mend.
    """
    parser = argparse.ArgumentParser(
        prog="spt-ds sweep",
        description="Train, generate and evaluate every cell of a grid; one table at the end.",
    )
    parser.add_argument("file", type=Path, help="YAML file of the sweep")
    parser.add_argument(
        "--out", type=Path, help="folder of all runs and of the table; default runs/NAME"
    )
    add_overrides(parser, "set an option in every cell, such as data.train=FILE")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="cells at a time on this machine (default %(default)s)",
    )
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, help="processes of each cell (default %(default)s)"
    )
    parser.add_argument(
        "--task", type=int, metavar="N", help="this cell alone, counted from 0; makes no table"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--count", action="store_true", help="print the number of cells")
    what.add_argument(
        "--list",
        action="store_true",
        help="print number, folder and training arguments of each cell",
    )
    what.add_argument(
        "--table", action="store_true", help="run nothing; write the table of what is finished"
    )
    return run_command(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    root, cells = load_cells(args.file, args.out, args.overrides)
    numbered = list(enumerate(cells))
    if args.task is not None:
        if not 0 <= args.task < len(cells):
            raise ConfigError(
                f"--task {args.task}: {args.file} has {len(cells)} cells; give 0 to"
                f" {len(cells) - 1}"
            )
        numbered = numbered[args.task : args.task + 1]
    if args.count:
        print(len(numbered))
        return 0
    if args.list:
        for number, cell in numbered:
            print(number, shlex.join([str(cell.folder), *cell.training]))
        return 0
    failures: dict[str, str] = {}
    stopped = False
    if not args.table:
        runner = Runner(args.jobs, args.ranks)
        failures, stopped = runner.run([cell for _, cell in numbered]), runner.stopped
    for name, why in failures.items():
        if not stopped:
            print(f"spt-ds sweep: {name}: {why}", file=sys.stderr)
    if args.task is None:
        print("written: " + " ".join(map(str, write_table(root, cells, failures))))
    if stopped:
        print("stopped; the same command resumes the sweep", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_DONE if all(cell.finished for _, cell in numbered) else EXIT_FAILED


def write_table(root: Path, cells: Sequence[Cell], failures: dict[str, str]) -> list[Path]:
    """Write `table.{json,csv,md,tex}` of the finished cells; return the paths.

    The other cells are named in it.

    `failures` tells by folder name why a cell failed. Raises SptError where cells cannot be
    compared.
    """
    finished = [cell for cell in cells if cell.finished]
    missing = {
        cell.folder.name: failures.get(cell.folder.name, "not finished")
        for cell in cells
        if not cell.finished
    }
    if not finished:
        rows: list[list[TableCell]] = [[f"{name}: {why}"] for name, why in missing.items()]
        table = Table(["recipe"], rows)
        return tables.write_files(root, "table", {"recipes": [], "failed": missing}, table, table)
    result = compare([cell.folder for cell in finished], average_seeds=True)
    told = {}
    if finished[0].row != cells[0].row:
        told = {cells[0].row: f"the baseline is not finished; gains are over {finished[0].row}"}
    wide, long = result.wide(), result.long()
    wide = Table(
        wide.columns,
        [*wide.rows, *_named(told, len(wide.columns)), *_named(missing, len(wide.columns))],
    )
    long = Table(long.columns, [*long.rows, *_named(missing, len(long.columns))])
    paths = tables.write_files(root, "table", {**result.to_json(), "failed": missing}, long, wide)
    print(wide.text() + "".join(f"{note}\n" for note in result.notes), end="")
    return paths


def _named(missing: dict[str, str], columns: int) -> list[list[TableCell]]:
    return [[f"{name}: {why}", *[None] * (columns - 1)] for name, why in missing.items()]


if __name__ == "__main__":
    raise SystemExit(main())
