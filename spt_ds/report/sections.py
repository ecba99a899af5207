"""The sections of a report. Each takes the runs and returns HTML; what a run lacks is said in its
place.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from spt_ds.config.schema import Config
from spt_ds.evaluate.command import notes as notes_of_scores
from spt_ds.evaluate.evaluation import Scores
from spt_ds.evaluate.scores import METRICS
from spt_ds.report import plots
from spt_ds.report.markup import Markup, bullets, join, table, tag
from spt_ds.report.plots import Floats, Heat, Line
from spt_ds.report.runs import Reply, Run, extremes, options_of

# Quantities of metrics.jsonl in the order of their plots; others follow by name.
CURVES = {
    "loss": "Total loss",
    "nll": "NLL, mean of all prompts",
    "nll_selected": "NLL, selected prompt",
    "nll_best": "NLL, best prompt",
    "selection": "Selection loss",
    "fusion": "Fusion loss",
    "contrastive": "Contrastive loss",
    "ppl_selected": "Perplexity, selected prompt",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
}
NO_QUANTITY = {"step", "kind", "time"}
KINDS = {"train": "training", "valid": "validation"}
MOST_BINS = 40  # columns of prompt use over time
SAMPLED = 60  # examples in the map of scores
EXTREMES = 4
LATEST = 4  # utterances of a history that are open at first


def overview(runs: Sequence[Run]) -> Markup:
    """How far each run is, and what is missing."""
    rows = [_overview_row(place, run) for place, run in enumerate(runs)]
    columns = [
        "run",
        "recipe",
        "steps",
        "ranks",
        "NLL before",
        "NLL after",
        "best step",
        "replies",
        "folder",
    ]
    parts = [
        table("Runs. NLL: validation loss of the selected prompt, nats per token.", columns, rows)
    ]
    parts += [
        tag("div", tag("p", f"Missing in {run.label}:"), bullets(run.missing), class_="none")
        for run in runs
        if run.missing
    ]
    return join(parts)


def scores(runs: Sequence[Run]) -> Markup:
    """Metrics in rows, runs in columns, each with its 95 % interval."""
    scored = [(run, run.scores) for run in runs if run.scores is not None]
    if not scored:
        return _none(
            "No run has scores. `spt-ds generate RUN` writes replies, `spt-ds evaluate RUN` scores"
            " them."
        )
    shown = [metric for metric in METRICS if any(metric.key in found.values for _, found in scored)]
    rows = [
        [metric.label, metric.meaning, *(_with_interval(found, metric.key) for _, found in scored)]
        for metric in shown
    ]
    columns = ["metric", "meaning", *(run.label for run, _ in scored)]
    parts = [
        table(
            "Scores on the test examples; in brackets 95 % intervals over dialogues.", columns, rows
        )
    ]
    if len({found.settings.data_sha256 for _, found in scored}) > 1:
        parts.append(
            _none("These runs answered different examples: their scores cannot be compared.")
        )
    parts += [
        tag(
            "details",
            tag("summary", f"How {run.label} was scored"),
            bullets(notes_of_scores(found)),
        )
        for run, found in scored
    ]
    return join(parts)


def losses(runs: Sequence[Run]) -> Markup:
    """A plot of each quantity over steps, all runs in each."""
    found = {
        key
        for run in runs
        for line in run.lines
        for key, value in line.items()
        if not isinstance(value, list)
    }
    keys = [*CURVES, *sorted(found - CURVES.keys() - NO_QUANTITY)]
    figures = [figure for key in keys for figure in _curve(runs, key)]
    if not figures:
        return _none("No run has logged a step yet.")
    return join([_legend(runs), tag("div", *figures, class_="grid")])


def throughput(runs: Sequence[Run]) -> Markup:
    """Steps and examples per second, from the times in metrics.jsonl."""
    timed = [(place, run, run.paces()) for place, run in enumerate(runs)]
    timed = [one for one in timed if one[2]]
    if not timed:
        return _none("No run has logged two steps yet.")
    rows = []
    for _, run, paces in timed:
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
        for _, run, paces in timed
    )
    plot = plots.curves(
        "pace", alt, [Line(paces, plots.colour(place)) for place, _, paces in timed]
    )
    figure = tag("figure", tag("figcaption", "Steps per second"), plot)
    return join([table(caption, columns, rows), tag("div", figure, class_="grid")])


def prompt_use(runs: Sequence[Run]) -> Markup:
    """Which prompts were selected: over training steps, and per turn of the dialogues that were
    answered.
    """
    parts: list[Markup] = []
    for place, run in enumerate(runs):
        parts.append(tag("h3", run.label))
        counted = [
            (line["step"], line["prompt_usage"]) for line in run.lines if "prompt_usage" in line
        ]
        parts.append(
            _use_over_time(f"time{place}", counted)
            if counted
            else _none("No prompt use was logged.")
        )
        spoken = [reply for reply in run.replies if reply.row.prompt is not None]
        if spoken:
            parts.append(_use_per_turn(f"turn{place}", spoken))
        else:
            parts.append(
                _none("No replies in which one prompt speaks, so no use per dialogue turn.")
            )
    return join(parts)


def bank_scores(runs: Sequence[Run]) -> Markup:
    """The retriever's scores: of sampled examples, and their mean by the prompt that was chosen."""
    parts: list[Markup] = []
    for place, run in enumerate(runs):
        scored = [reply for reply in run.replies if reply.row.scores]
        parts.append(tag("h3", run.label))
        parts.append(
            _score_maps(place, scored) if scored else _none("No replies with scores over the bank.")
        )
    return join(parts)


def examples(runs: Sequence[Run]) -> Markup:
    """Replies of highest and lowest F1 against the reference."""
    parts: list[Markup] = []
    for run in runs:
        parts.append(tag("h3", run.label))
        if not run.replies:
            parts.append(_none("No replies yet."))
            continue
        best, worst = extremes(run.replies, EXTREMES)
        for heading, some in (("Best", best), ("Worst", worst)):
            if some:
                cards = tag("div", *map(_card, some), class_="cards")
                parts += [tag("p", f"{heading} by F1 against the reference", class_="soft"), cards]
    return join(parts)


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
    differing = [key for key in keys if any(one[key] != sets[0][key] for one in sets)]
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
        return _none("No run has recorded its environment.")
    keys = list(dict.fromkeys(key for run in known for key in run.environment))
    sets = [run.environment for run in known]
    return _options(
        "Where and with what the runs were started last.", [run.label for run in known], sets, keys
    )


def _none(text: str) -> Markup:
    return tag("p", text, class_="none")


def _overview_row(place: int, run: Run) -> list[str]:
    done = run.done or {}
    valid = run.series("valid", "nll_selected")
    steps = str(max((line["step"] for line in run.lines), default=0))
    swatch = tag(
        "span", "\N{BLACK CIRCLE} ", style=f"color:{plots.colour(place)}", aria_hidden="true"
    )
    return [
        tag("span", swatch, run.label),
        run.options["name"],
        steps if run.done else f"{steps}, not done",
        str(done.get("world_size", "")),
        f"{valid[0][1]:.4f}" if valid else "",
        f"{valid[-1][1]:.4f}" if len(valid) > 1 else "",
        str(done.get("best_step") or ""),
        str(len(run.replies)),
        str(run.folder),
    ]


def _with_interval(found: Scores, key: str) -> str:
    if key not in found.values:
        return ""
    interval = found.intervals.get(key)
    return f"{found.values[key]:.2f}" + (
        f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    )


def _curve(runs: Sequence[Run], key: str) -> Iterator[Markup]:
    """The figure of one quantity, or nothing where no run has it."""
    lines, told = [], []
    for place, run in enumerate(runs):
        for kind, word in KINDS.items():
            points = run.series(kind, key)
            if points:
                lines.append(Line(points, plots.colour(place), dashed=kind == "valid"))
                told.append((f"{run.label}, {word}", points))
    if lines:
        title = CURVES.get(key, key)
        plot = plots.curves(
            f"curve-{''.join(filter(str.isalnum, key))}", f"{title} over steps. {_alt(told)}", lines
        )
        yield tag("figure", tag("figcaption", title), plot)


def _legend(runs: Sequence[Run]) -> Markup:
    items = [
        (run.label, f"border-color:{plots.colour(place)}", "") for place, run in enumerate(runs)
    ]
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
    told = []
    for label, points in series:
        (first, start), (last, end) = points[0], points[-1]
        told.append(
            f"{label}: {start:.4g} at step {first}"
            + (f", {end:.4g} at step {last}" if last != first else "")
        )
    return "; ".join(told) + "."


def _use_over_time(name: str, counted: Sequence[tuple[int, list[float]]]) -> Markup:
    groups = np.array_split(
        np.asarray([counts for _, counts in counted], dtype=np.float64),
        min(len(counted), MOST_BINS),
    )
    ends = np.cumsum([len(group) for group in groups]) - 1
    shares = _shares(np.stack([group.sum(axis=0) for group in groups], axis=1))
    columns = [str(counted[end][0]) for end in ends]
    title = "Prompts selected in training, over steps"
    return _use_figure(
        name, title, Heat(shares, columns, "up to step", "% of examples", ".0f", limits=(0, 100))
    )


def _use_per_turn(name: str, replies: Sequence[Reply]) -> Markup:
    turns = sorted({reply.turn for reply in replies if reply.turn is not None})
    counts = np.zeros((_bank(replies), len(turns) + 1))
    for reply in replies:
        counts[reply.row.prompt, -1] += 1
        if reply.turn is not None:
            counts[reply.row.prompt, turns.index(reply.turn)] += 1
    columns = [*map(str, turns), "all"]
    title = "Prompts that replied, by the number of the utterance in its dialogue"
    return _use_figure(
        name,
        title,
        Heat(_shares(counts), columns, "utterance", "% of replies", ".0f", limits=(0, 100)),
    )


def _use_figure(name: str, title: str, one: Heat) -> Markup:
    last = ", ".join(
        f"prompt {prompt} {share:.0f} %" for prompt, share in enumerate(one.values[:, -1])
    )
    alt = f"{title}: heat map of shares. Column {one.columns[-1]}: {last}."
    return tag("figure", tag("figcaption", title), plots.heat(name, alt, one))


def _bank(replies: Sequence[Reply]) -> int:
    """Prompts in the bank: as many as there are scores, or as the largest prompt that spoke tells."""
    return max(len(reply.row.scores) or (reply.row.prompt or 0) + 1 for reply in replies)


def _shares(counts: Floats) -> Floats:
    return 100.0 * counts / np.maximum(counts.sum(axis=0, keepdims=True), 1.0)


def _score_maps(place: int, replies: Sequence[Reply]) -> Markup:
    picks = np.unique(
        np.linspace(0, len(replies) - 1, min(SAMPLED, len(replies))).round().astype(int)
    )
    sampled = [replies[pick] for pick in picks]
    chosen = [reply.row.prompt for reply in sampled]
    values = np.asarray([reply.row.scores for reply in sampled], dtype=np.float64).T
    title = (
        f"Scores of {len(sampled)} of {len(replies)} examples, spread evenly; dots: the prompt that"
        " replied"
    )
    alt = f"{title}. Scores lie between {values.min():.4g} and {values.max():.4g}."
    one = Heat(
        values, [str(reply.row.index) for reply in sampled], "example", "score", ".3f", chosen
    )
    parts = [tag("figure", tag("figcaption", title), plots.heat(f"scores{place}", alt, one))]
    speakers = sorted({reply.row.prompt for reply in replies if reply.row.prompt is not None})
    if speakers:
        means = np.stack(
            [
                np.mean(
                    [reply.row.scores for reply in replies if reply.row.prompt == speaker], axis=0
                )
                for speaker in speakers
            ],
            axis=1,
        )
        title = "Mean scores, by the prompt that replied"
        own = ", ".join(
            f"{means[speaker, column]:.3f} for {speaker}" for column, speaker in enumerate(speakers)
        )
        one = Heat(
            means,
            [str(speaker) for speaker in speakers],
            "prompt that replied",
            "mean score",
            ".3f",
        )
        plot = plots.heat(f"means{place}", f"{title}. Of the speaker itself: {own}.", one)
        parts.append(tag("figure", tag("figcaption", title), plot))
    return join(parts)


def _card(reply: Reply) -> Markup:
    row = reply.row
    facts = [f"F1 {100 * reply.f1:.1f}", *([] if row.prompt is None else [f"prompt {row.prompt}"])]
    facts += [] if reply.turn is None else [f"utterance {reply.turn}"]
    told: list[Markup] = [tag("h4", " · ".join(facts)), tag("p", row.id, class_="soft")]
    if reply.persona:
        told += [tag("p", "Persona", class_="soft"), bullets(reply.persona)]
    # The last utterance is the partner's, and the two take turns.
    said = [
        tag(
            "li",
            tag(
                "span", "partner: " if (len(reply.history) - place) % 2 else "self: ", class_="who"
            ),
            text,
        )
        for place, text in enumerate(reply.history)
    ]
    earlier, latest = said[:-LATEST], said[-LATEST:]
    if said:
        told.append(tag("p", "History", class_="soft"))
    if earlier:
        told.append(
            tag(
                "details", tag("summary", f"{len(earlier)} earlier utterances"), tag("ul", *earlier)
            )
        )
    if said:
        told.append(tag("ul", *latest))
    pairs = [("Reference", row.reference), ("Reply", reply.text or "(empty)")]
    if row.raw != reply.text:
        pairs.append(("As decoded, before it was cut", row.raw))
    told.append(
        tag("dl", *(part for name, text in pairs for part in (tag("dt", name), tag("dd", text))))
    )
    return tag("article", *told)


def _options(
    caption: str, columns: Sequence[str], sets: Sequence[dict[str, Any]], keys: Sequence[str]
) -> Markup:
    return table(
        caption, ["key", *columns], ([key, *(_value(one, key) for one in sets)] for key in keys)
    )


def _value(options: dict[str, Any], key: str) -> str:
    value = options.get(key, "")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
    )
