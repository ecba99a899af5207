"""The scores of all runs side by side; what was skipped is marked, with the reason below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spt_ds.evaluate.columns import FAMILY_OF, METRICS
from spt_ds.evaluate.command import notes
from spt_ds.evaluate.scores_json import Scores
from spt_ds.report.markup import Markup, absent, bullets, join, table, tag
from spt_ds.report.runs import Run, by_base

# The number of each (family, reason) on the page.
Reasons = Mapping[tuple[str, str], int]


def text_scores(runs: Sequence[Run]) -> Markup:
    """Metrics in rows, runs in columns, each with its 95 % interval; a table for each base."""
    scored = [run for run in runs if run.scores is not None]
    if not scored:
        return absent(
            "No run has scores. `spt-ds generate RUN` writes replies, `spt-ds evaluate RUN` scores"
            " them."
        )
    skipped = dict.fromkeys(why for run in scored for why in _scores(run).skipped.items())
    reasons = {why: number for number, why in enumerate(skipped, start=1)}
    bases = by_base(scored)
    parts: list[Markup] = []
    for base, own in bases.items():
        parts += [tag("h3", f"Base: {base}")] if len(bases) > 1 else []
        parts.append(_table(own, reasons))
        if len({_scores(run).settings.data_sha256 for run in own}) > 1:
            parts.append(
                absent("These runs answered different examples: their scores cannot be compared.")
            )
    parts += [
        tag("p", f"[{number}] {family} was skipped: {why}", id=f"skipped-{number}", class_="soft")
        for (family, why), number in reasons.items()
    ]
    parts += [
        tag("details", tag("summary", f"How {run.label} was scored"), bullets(notes(_scores(run))))
        for run in scored
    ]
    return join(parts)


def _scores(run: Run) -> Scores:
    assert run.scores is not None, "asked for the scores of a run without"
    return run.scores


def _table(runs: Sequence[Run], reasons: Reasons) -> Markup:
    rows = []
    for metric in METRICS:
        cells = [_cell(_scores(run), metric.key, reasons) for run in runs]
        if any(cells):
            rows.append([metric.label, metric.meaning, *cells])
    caption = "Scores on the test examples; in brackets 95 % intervals over dialogues."
    return table(caption, ["metric", "meaning", *(run.label for run in runs)], rows)


def _cell(scores: Scores, key: str, reasons: Reasons) -> str:
    """A value with its interval, or that it was skipped and where the reason is; else nothing."""
    if key in scores.values:
        told, interval = f"{scores.values[key]:.2f}", scores.intervals.get(key)
        return f"{told} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else told
    family = FAMILY_OF.get(key, "")
    if family not in scores.skipped:
        return ""
    number = reasons[family, scores.skipped[family]]
    return tag("span", "skipped ", tag("a", f"[{number}]", href=f"#skipped-{number}"))
