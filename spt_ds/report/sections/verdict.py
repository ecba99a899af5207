"""The verdict: what the rest of the page shows, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from spt_ds.errors import DataError
from spt_ds.evaluate.columns import METRIC_OF
from spt_ds.evaluate.corpus_metrics import CorpusMetrics, corpus_metrics, tested_gains
from spt_ds.evaluate.significance import Paired
from spt_ds.report.markup import Markup, bullets, join, tag
from spt_ds.report.runs import Run, by_base

HEADLINES = ("f1_spt", "bleu", "rougeL", "dist1", "dist2", "ppl_token")
SCORED = ("f1_spt", "bleu", "dist2")
SAME_SCORES = 0.01  # the retriever's, between the prompts of an example: hardly told apart
PAIRED = ", paired over "
CAUTION = (
    "One interval in twenty misses the truth by chance, so one of many metrics may differ by chance"
    " too. The intervals are over test dialogues and say nothing about other seeds."
)


def verdict(runs: Sequence[Run]) -> Markup:
    """How each run went and, over each base, how the others are against the first of its runs."""
    parts: list[Markup] = [_figures(runs[0])] if len(runs) == 1 else []
    bases = by_base(runs)
    for base, own in bases.items():
        if len(bases) > 1:
            parts.append(tag("h3", f"Base: {base}"))
        if len(own) > 1:
            compared = [*_comparisons(own)]
            parts.append(bullets(compared))
            if any(PAIRED in sentence for sentence in compared):
                parts.append(tag("p", CAUTION, class_="soft"))
        told = [join([tag("strong", run.label), " ", *_of_run(run)]) for run in own]
        parts.append(bullets(told) if len(runs) > 1 else tag("p", *told))
    if len(bases) > 1:
        parts.append(tag("p", "Runs over different bases are not compared with each other."))
    return tag("div", *parts, class_="verdict")


def _figures(run: Run) -> Markup:
    """The numbers of one run that a reader looks for first; of several, the tables tell."""
    figures = []
    losses = [value for _, value in run.series("valid", "nll_selected")]
    if losses:
        figures.append(("Validation nll", f"{losses[-1]:.3f}", f"{losses[0]:.3f} at first"))
    if run.scores is not None and SCORED[0] in run.scores.values:
        key, interval = SCORED[0], run.scores.intervals.get(SCORED[0])
        note = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "no interval"
        figures.append((METRIC_OF[key].label, f"{run.scores.values[key]:.2f}", note))
    spoken = {reply.row.prompt for reply in run.replies if reply.row.prompt is not None}
    if spoken:
        bank = max(len(reply.row.scores) for reply in run.replies)
        note = f"for {len(run.replies):,} examples"
        told = f"{len(spoken)} of {bank}" if bank else str(len(spoken))
        figures.append(("Prompts that replied", told, note))
    tiles = (
        tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="soft"))
        for name, value, note in figures
    )
    return tag("dl", *tiles, class_="figures") if figures else Markup("")


def _of_run(run: Run) -> Iterator[str]:
    yield from _training(run)
    if not run.replies:
        yield " It has no replies yet."
        return
    if run.scores is None:
        yield f" Its {len(run.replies):,} replies are not scored yet."
    else:
        told = ", ".join(_score(run, key) for key in SCORED if key in run.scores.values)
        yield f" Its {len(run.replies):,} replies have {told}."
    yield from _prompts(run)


def _training(run: Run) -> Iterator[str]:
    steps = max((line["step"] for line in run.lines), default=0)
    if run.done is None:
        yield f"is at step {steps} and has not come to its end." if steps else "has not begun."
    else:
        yield f"came to its end after {steps} steps."
    losses = [value for _, value in run.series("valid", "nll_selected")]
    if len(losses) > 1:
        way = "fell" if losses[-1] < losses[0] else "rose" if losses[-1] > losses[0] else "stayed"
        yield f" Its validation nll {way} from {losses[0]:.3f} to {losses[-1]:.3f} nats per token"
        best = (run.done or {}).get("best_step")
        yield f" and was lowest at step {best}." if best else "."


def _score(run: Run, key: str) -> str:
    assert run.scores is not None, "asked for a score of a run without"
    told = f"{METRIC_OF[key].label} {run.scores.values[key]:.2f}"
    interval = run.scores.intervals.get(key)
    return told if interval is None else f"{told} ({interval[0]:.2f} to {interval[1]:.2f})"


def _prompts(run: Run) -> Iterator[str]:
    """Whether the bank is used. A bank of one prompt has nothing to choose."""
    scores = [reply.row.scores for reply in run.replies if len(reply.row.scores) > 1]
    spoken = Counter(reply.row.prompt for reply in run.replies if reply.row.prompt is not None)
    if not scores or not spoken:
        return
    (first, most), total = spoken.most_common(1)[0], spoken.total()
    bank = len(scores[0])
    who = f"All {bank} prompts" if len(spoken) == bank else f"{len(spoken)} of {bank} prompts"
    yield f" {who} replied, prompt {first} most often ({100 * most / total:.0f} %)."
    apart = sum(max(row) - min(row) for row in scores) / len(scores)
    if apart < SAME_SCORES:
        yield f" Their scores are {apart:.2g} apart on average: the retriever hardly tells them"
        yield " from each other."


def _comparisons(runs: Sequence[Run]) -> Iterator[Markup]:
    files = {run.label: run.file for run in runs if run.file is not None}
    metrics = {label: corpus_metrics(file, bert_score=False) for label, file in files.items()}
    first = runs[0].label
    for run in runs[1:]:
        pair = join([tag("strong", run.label), " against ", tag("strong", first)])
        yield join([pair, _compared(first, run.label, metrics)])


def _compared(first: str, other: str, metrics: Mapping[str, CorpusMetrics]) -> str:
    without = next((name for name in (first, other) if name not in metrics), None)
    if without is not None:
        return f": not compared, because {without} has no replies."
    try:
        gains = tested_gains([metrics[other]], [metrics[first]])
    except DataError:
        return ": not compared, because the two answered different examples."
    if not gains:
        return ": not compared, because all examples are of one dialogue."
    better, worse, unsure = [], [], []
    for key in (key for key in HEADLINES if key in gains):
        pair, metric = gains[key], METRIC_OF[key]
        # The same as a p-value of 0.05 or more: both come from one standard error.
        if pair.low <= 0.0 <= pair.high:
            unsure.append(metric.label)
        elif (pair.difference < 0.0) == metric.less_is_better:
            better.append(_told(metric.label, pair))
        else:
            worse.append(_told(metric.label, pair))
    parts = [("better in", better), ("worse in", worse), ("no sure difference in", unsure)]
    told = "; ".join(f"{words} {', '.join(labels)}" for words, labels in parts if labels)
    dialogues = max(metrics[first].file.units) + 1
    return f"{PAIRED}{dialogues} dialogues: {told}."


def _told(label: str, pair: Paired) -> str:
    return f"{label} by {abs(pair.difference):.2f} ({pair.low:+.2f} to {pair.high:+.2f})"
