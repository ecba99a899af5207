"""What was logged while the runs were trained: curves and speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from spt_ds.report import plots
from spt_ds.report.markup import Markup, absent, join, table, tag
from spt_ds.report.plots import Line
from spt_ds.report.runs import Run, by_base

# Quantities of metrics.jsonl in the order of their plots; others follow by name.
CURVES = {
    "loss": "Total loss",
    "nll": "NLL, mean of all prompts",
    "nll_selected": "NLL, selected prompt",
    "nll_best": "NLL, best prompt",
    "mixture": "Mixture loss",
    "balance": "Balance loss",
    "selection": "Selection loss",
    "fusion": "Fusion loss",
    "contrastive": "Contrastive loss",
    "ppl_selected": "Perplexity, selected prompt",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
}
NO_QUANTITY = {"step", "kind", "time"}
KINDS = {"train": "training", "valid": "validation"}


def losses(runs: Sequence[Run]) -> Markup:
    """A plot of each quantity over steps, all runs over one base in each."""
    bases = by_base(runs)
    if len(bases) == 1:
        return _losses(runs)
    return join(
        part for base, own in bases.items() for part in (tag("h3", f"Base: {base}"), _losses(own))
    )


def _losses(runs: Sequence[Run]) -> Markup:
    logged = {
        key
        for run in runs
        for line in run.lines
        for key, value in line.items()
        if not isinstance(value, list)
    }
    keys = [*CURVES, *sorted(logged - CURVES.keys() - NO_QUANTITY)]
    figures = [figure for key in keys for figure in _curve(runs, key)]
    if not figures:
        return absent("No run has logged a step yet.")
    return join([_legend(runs), tag("div", *figures, class_="grid")])


def throughput(runs: Sequence[Run]) -> Markup:
    """Steps and examples per second, from the times in metrics.jsonl."""
    timed = [(run, paces) for run in runs if (paces := run.paces())]
    if not timed:
        return absent("No run has logged two steps yet.")
    rows = []
    for run, paces in timed:
        median = statistics.median(rate for _, rate in paces)
        span = run.lines[-1]["time"] - run.lines[0]["time"]
        examples = median * run.options["train.global_batch"]
        rows.append(
            [run.label, f"{median:.3g}", f"{examples:.3g}", str(len(paces)), _duration(span)]
        )
    columns = ["run", "steps/s", "examples/s", "stretches", "first to last line"]
    caption = (
        "Median over the stretches between logged lines that hold no validation; saving of"
        " checkpoints is in it."
    )
    alt = "Optimizer steps per second over steps. " + _alt(
        (f"{run.label}, median", [(paces[-1][0], statistics.median(rate for _, rate in paces))])
        for run, paces in timed
    )
    lines = [Line(paces, plots.colour(run.number)) for run, paces in timed]
    plot = plots.curves(f"pace{timed[0][0].number}", alt, lines)
    figure = tag("figure", tag("figcaption", "Steps per second"), plot)
    return join([table(caption, columns, rows), tag("div", figure, class_="grid")])


def _curve(runs: Sequence[Run], key: str) -> Iterator[Markup]:
    """The figure of one quantity, or nothing where no run has it."""
    lines, told = [], []
    for run in runs:
        for kind, word in KINDS.items():
            points = run.series(kind, key)
            if points:
                lines.append(Line(points, plots.colour(run.number), dashed=kind == "valid"))
                told.append((f"{run.label}, {word}", points))
    if lines:
        title = CURVES.get(key, key)
        name = f"curve{runs[0].number}-{''.join(filter(str.isalnum, key))}"
        plot = plots.curves(name, f"{title} over steps. {_alt(told)}", lines)
        yield tag("figure", tag("figcaption", title), plot)


def _legend(runs: Sequence[Run]) -> Markup:
    items = [(run.label, f"border-color:{plots.colour(run.number)}", "") for run in runs]
    items += [
        ("training", "border-color:var(--ink)", ""),
        ("validation", "border-color:var(--ink)", "dashed"),
    ]
    swatches = (
        tag("li", tag("span", style=style, class_=class_, aria_hidden="true"), label)
        for label, style, class_ in items
    )
    return tag("ul", *swatches, class_="legend")


def _alt(series: Iterable[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """What a reader who cannot see the plot learns from it: where each line begins and ends."""
    told = []
    for label, points in series:
        (first, start), (last, end) = points[0], points[-1]
        told.append(
            f"{label}: {start:.4g} at step {first}"
            + (f", {end:.4g} at step {last}" if last != first else "")
        )
    return "; ".join(told) + "."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    told = f"{minutes} min {rest:02d} s"
    if minutes >= 60:
        told = f"{minutes // 60} h {minutes % 60:02d} min"
    return told.replace(" ", "\N{NO-BREAK SPACE}")
