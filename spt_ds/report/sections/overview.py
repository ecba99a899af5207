"""The first section of a report: how far each run is, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from spt_ds.report import plots
from spt_ds.report.markup import Markup, bullets, join, table, tag
from spt_ds.report.runs import Run

COLUMNS = (
    "run",
    "recipe",
    "base",
    "steps",
    "ranks",
    "NLL before",
    "NLL after",
    "best step",
    "replies",
    "folder",
)


def overview(runs: Sequence[Run]) -> Markup:
    """One row per run, then what each run lacks."""
    rows = [_row(run) for run in runs]
    parts = [
        table("Runs. NLL: validation loss of the selected prompt, nats per token.", COLUMNS, rows)
    ]
    parts += [
        tag("div", tag("p", f"Missing in {run.label}:"), bullets(run.missing), class_="none")
        for run in runs
        if run.missing
    ]
    return join(parts)


def _row(run: Run) -> list[str]:
    done = run.done or {}
    valid = run.series("valid", "nll_selected")
    steps = str(max((line["step"] for line in run.lines), default=0))
    colour = f"color:{plots.colour(run.number)}"
    swatch = tag("span", "\N{BLACK CIRCLE} ", style=colour, aria_hidden="true")
    return [
        tag("span", swatch, run.label),
        run.options["name"],
        run.base,
        steps if run.done else f"{steps}, not done",
        str(done.get("world_size", "")),
        f"{valid[0][1]:.4f}" if valid else "",
        f"{valid[-1][1]:.4f}" if len(valid) > 1 else "",
        str(done.get("best_step") or ""),
        str(len(run.replies)),
        str(run.folder),
    ]
