"""The scores of all runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from spt_ds.evaluate.columns import METRICS
from spt_ds.evaluate.command import notes
from spt_ds.evaluate.scores_json import Scores
from spt_ds.report.markup import Markup, absent, bullets, join, table, tag
from spt_ds.report.runs import Run


def text_scores(runs: Sequence[Run]) -> Markup:
    """Metrics in rows, runs in columns, each with its 95 % interval."""
    scored = [(run, run.scores) for run in runs if run.scores is not None]
    if not scored:
        return absent(
            "No run has scores. `spt-ds generate RUN` writes replies, `spt-ds evaluate RUN` scores"
            " them."
        )
    metrics = [m for m in METRICS if any(m.key in scores.values for _, scores in scored)]
    rows = [
        [metric.label, metric.meaning, *(_with_interval(each, metric.key) for _, each in scored)]
        for metric in metrics
    ]
    columns = ["metric", "meaning", *(run.label for run, _ in scored)]
    parts = [
        table(
            "Scores on the test examples; in brackets 95 % intervals over dialogues.", columns, rows
        )
    ]
    if len({scores.settings.data_sha256 for _, scores in scored}) > 1:
        parts.append(
            absent("These runs answered different examples: their scores cannot be compared.")
        )
    parts += [
        tag("details", tag("summary", f"How {run.label} was scored"), bullets(notes(scores)))
        for run, scores in scored
    ]
    return join(parts)


def _with_interval(scores: Scores, key: str) -> str:
    if key not in scores.values:
        return ""
    interval = scores.intervals.get(key)
    return f"{scores.values[key]:.2f}" + (
        f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    )
