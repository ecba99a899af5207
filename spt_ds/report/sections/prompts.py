"""How the prompts of the banks were used, and how the retriever scored them.

Shape letters: K prompts, C columns of a heat map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spt_ds.report import plots
from spt_ds.report.markup import Markup, absent, join, tag
from spt_ds.report.plots import Floats, Heat
from spt_ds.report.runs import Reply, Run

MOST_BINS = 40  # columns of prompt use over time
SAMPLED = 60  # examples in the map of scores


def prompt_use(runs: Sequence[Run]) -> Markup:
    """Which prompts were selected, over training steps and per turn of the answered dialogues."""
    parts: list[Markup] = []
    for run in runs:
        parts.append(tag("h3", run.label))
        steps, shares = shares_over_time(run)
        parts.append(
            _use_over_time(f"time{run.number}", steps, shares)
            if steps
            else absent("No prompt use was logged.")
        )
        spoken = [reply for reply in run.replies if reply.row.prompt is not None]
        if spoken:
            parts.append(_use_per_turn(f"turn{run.number}", spoken))
        else:
            parts.append(
                absent("No replies in which one prompt speaks, so no use per dialogue turn.")
            )
    return join(parts)


def bank_scores(runs: Sequence[Run]) -> Markup:
    """The retriever's scores: of sampled examples, and their mean by the prompt that was chosen."""
    parts: list[Markup] = []
    for run in runs:
        scored = [reply for reply in run.replies if reply.row.scores]
        parts.append(tag("h3", run.label))
        parts.append(
            _score_maps(run.number, scored)
            if scored
            else absent("No replies with scores over the bank.")
        )
    return join(parts)


def shares_over_time(run: Run) -> tuple[list[int], Floats]:
    """Steps `[C]` and, up to each of them from the one before, the prompts' shares in % `[K, C]`.

    C is up to MOST_BINS, and 0 where no use was logged.
    """
    counted = [(line["step"], line["prompt_usage"]) for line in run.lines if "prompt_usage" in line]
    if not counted:
        return [], np.zeros((0, 0))
    each = plots.stride(len(counted), MOST_BINS)
    groups = [counted[first : first + each] for first in range(0, len(counted), each)]
    sums = [np.sum([counts for _, counts in group], axis=0, dtype=np.float64) for group in groups]
    return [group[-1][0] for group in groups], _shares(np.stack(sums, axis=1))


def _use_over_time(name: str, steps: Sequence[int], values: Floats) -> Markup:
    title = "Prompts selected in training, over steps"
    labels = [*map(str, steps)]
    shares = Heat(values, labels, "up to step", "% of examples", ".0f", limits=(0, 100), ends=True)
    return _use_figure(name, title, shares)


def _use_per_turn(name: str, replies: Sequence[Reply]) -> Markup:
    turns = sorted({reply.row.turn for reply in replies if reply.row.turn is not None})
    counts = np.zeros((bank_size(replies), len(turns) + 1))
    for reply in replies:
        counts[reply.row.prompt, -1] += 1
        if reply.row.turn is not None:
            counts[reply.row.prompt, turns.index(reply.row.turn)] += 1
    columns = [*map(str, turns), "all"]
    title = "Prompts that replied, by the number of the utterance in its dialogue"
    return _use_figure(
        name,
        title,
        Heat(_shares(counts), columns, "utterance", "% of replies", ".0f", limits=(0, 100)),
    )


def _use_figure(name: str, title: str, shares: Heat) -> Markup:
    last = ", ".join(
        f"prompt {prompt} {share:.0f} %" for prompt, share in enumerate(shares.values[:, -1])
    )
    alt = f"{title}: heat map of shares. Column {shares.columns[-1]}: {last}."
    return tag("figure", tag("figcaption", title), plots.heat(name, alt, shares))


def bank_size(replies: Sequence[Reply]) -> int:
    """Prompts in the bank: as many as there are scores, else one more than the largest seen."""
    return max(len(reply.row.scores) or (reply.row.prompt or 0) + 1 for reply in replies)


def _shares(counts: Floats) -> Floats:
    return 100.0 * counts / np.maximum(counts.sum(axis=0, keepdims=True), 1.0)


def _score_maps(number: int, replies: Sequence[Reply]) -> Markup:
    parts = [_scores_of_examples(f"scores{number}", replies)]
    speakers = sorted({reply.row.prompt for reply in replies if reply.row.prompt is not None})
    if speakers:
        parts.append(_scores_by_speaker(f"means{number}", replies, speakers))
    return join(parts)


def _scores_of_examples(name: str, replies: Sequence[Reply]) -> Markup:
    sampled = replies[:: plots.stride(len(replies), SAMPLED)]
    chosen = [reply.row.prompt for reply in sampled]
    values = np.asarray([reply.row.scores for reply in sampled], dtype=np.float64).T
    title = (
        f"Scores of {len(sampled)} of {len(replies)} examples, spread evenly; dots: the prompt that"
        " replied"
    )
    alt = f"{title}. Scores are between {values.min():.4g} and {values.max():.4g}."
    indices = [str(reply.row.index) for reply in sampled]
    scores = Heat(values, indices, "example", "score", ".3f", chosen)
    return tag("figure", tag("figcaption", title), plots.heat(name, alt, scores))


def _scores_by_speaker(name: str, replies: Sequence[Reply], speakers: Sequence[int]) -> Markup:
    means = np.stack(
        [
            np.mean([reply.row.scores for reply in replies if reply.row.prompt == speaker], axis=0)
            for speaker in speakers
        ],
        axis=1,
    )
    title = "Mean scores, by the prompt that replied"
    own = ", ".join(
        f"{means[speaker, column]:.3f} for {speaker}" for column, speaker in enumerate(speakers)
    )
    scores = Heat(means, [*map(str, speakers)], "prompt that replied", "mean score", ".3f")
    plot = plots.heat(name, f"{title}. Of the speaker itself: {own}.", scores)
    return tag("figure", tag("figcaption", title), plot)
