"""What was run: how far each run is and what it lacks, its configuration, hardware and versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from spt_ds.config.load import options_of
from spt_ds.config.schema import Config
from spt_ds.report import plots
from spt_ds.report.markup import Markup, absent, bullets, join, table, tag
from spt_ds.report.runs import Run

OVERVIEW = (
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
        table("Runs. NLL: validation loss of the selected prompt, nats per token.", OVERVIEW, rows)
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


def configuration(runs: Sequence[Run]) -> Markup:
    """What differs between the runs (of one run: from the defaults), then everything."""
    keys = list(runs[0].options)
    if len(runs) > 1:
        columns, sets = [run.label for run in runs], [run.options for run in runs]
        caption, same = (
            "Options that differ between the runs.",
            "The runs were trained with the same configuration.",
        )
    else:
        columns, sets = ["default", runs[0].label], [options_of(Config()), runs[0].options]
        caption, same = "Options that differ from the defaults.", "Every option has its default."
    differing = [key for key in keys if any(options[key] != sets[0][key] for options in sets)]
    first = _options(caption, columns, sets, differing) if differing else tag("p", same)
    everything = _options(
        "All options.", [run.label for run in runs], [run.options for run in runs], keys
    )
    changed = [key for key in keys if any(run.generated[key] != run.options[key] for run in runs)]
    generated = [run.generated for run in runs]
    overridden = _options(
        "Options set for the replies alone.", [run.label for run in runs], generated, changed
    )
    parts = [
        first,
        overridden if changed else Markup(""),
        tag("details", tag("summary", "All options"), everything),
    ]
    parts += [
        tag(
            "details",
            tag("summary", f"DeepSpeed configuration of {run.label}"),
            tag("pre", run.deepspeed),
        )
        for run in runs
        if run.deepspeed
    ]
    return join(parts)


def machines(runs: Sequence[Run]) -> Markup:
    """Hardware, versions and recorded variables."""
    known = [run for run in runs if run.environment]
    if not known:
        return absent("No run has recorded its environment.")
    keys = list(dict.fromkeys(key for run in known for key in run.environment))
    sets = [run.environment for run in known]
    return _options(
        "Where and with what the runs were started last.", [run.label for run in known], sets, keys
    )


def _options(
    caption: str, columns: Sequence[str], sets: Sequence[dict[str, Any]], keys: Sequence[str]
) -> Markup:
    return table(
        caption,
        ["key", *columns],
        ([key, *(_value(options, key) for options in sets)] for key in keys),
    )


def _value(options: dict[str, Any], key: str) -> str:
    value = options.get(key, "")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
