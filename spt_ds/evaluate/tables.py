"""Tables of numbers as text, Markdown, LaTeX and CSV, and their files, written whole or not."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_ds.errors import DataError
from spt_ds.files import write_whole

Cell = str | int | float | None
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first column names the row.

    None is an empty cell, a float shows two decimals.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """For a terminal: columns padded, numbers to the right."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        return (
            "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"
        )

    def markdown(self) -> str:
        """A GitHub table."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        cells = self._cells()
        cells.insert(1, rule)
        return "".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells
        )

    def latex(self) -> str:
        """A `tabular` with booktabs rules."""
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in self._cells()]
        head = [
            r"\begin{tabular}{l" + "r" * (len(self.columns) - 1) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
        ]
        return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])

    def csv(self) -> str:
        """Comma-separated, numbers with all digits."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return out.getvalue()

    def _cells(self) -> list[list[str]]:
        return [list(self.columns), *([_shown(cell) for cell in row] for row in self.rows)]


def write_files(
    folder: Path, stem: str, data: dict[str, Any], long: Table, wide: Table
) -> list[Path]:
    """Write `stem`.json, .csv (`long`), .md and .tex (`wide`) into `folder`; return the paths.

    Each file is renamed into place when it is whole. Raises DataError when the folder cannot be
    written.
    """
    texts = {
        # NaN is no JSON. Python would write it, and other readers would fail on the file.
        "json": json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "csv": long.csv(),
        "md": wide.markdown(),
        "tex": wide.latex(),
    }
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in texts.items():
            path = folder / f"{stem}.{suffix}"
            write_whole(path, content)
            paths.append(path)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}); give another folder with --out"
        ) from error
    return paths


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
