"""Whether a retriever earns its keep, in one word and one sentence.

The rules are in docs/how-to/audit.md. A difference counts where its p-value is below `SURE`.
"""

from __future__ import annotations

from dataclasses import dataclass

from spt_ds.audit.judge import Audit, Row
from spt_ds.evaluate.significance import Paired

SURE = 0.01
ALL = 0.95  # share of the replies from which on one prompt answers all
KNOWS = 0.98  # share of best choices from which on a retriever may know the reply
TOLD = 0.5  # share of the retriever's gain that a gate on the context must reach to explain it


@dataclass(frozen=True)
class Verdict:
    """`word` is for programs, `sentence` for readers."""

    word: str
    sentence: str


def verdict(audit: Audit) -> Verdict:
    """Judge the choice that the retriever makes."""
    if audit.prompts == 1:
        return Verdict("one prompt", "The bank has one prompt: there is nothing to choose.")
    rows = {row.name: row for row in audit.rows}
    selected = rows["selected prompt"]
    # In this order, because each verdict would mislead where one before it holds: a bank that has
    # collapsed is not "no better than one".
    most = max(audit.usage)
    if most >= ALL * audit.examples:
        prompt, share = audit.usage.index(most), most / audit.examples
        return Verdict(
            "collapsed",
            f"One prompt answers all: prompt {prompt} gives {share:.0%} of the replies, and the"
            " others are not needed.",
        )
    assert selected.minus_single is not None
    assert audit.selected_minus_random is not None
    if audit.accuracy >= KNOWS and not _told_by_context(audit, selected):
        return Verdict(
            "knows the reply",
            f"The retriever picks the best prompt of {audit.accuracy:.0%} of the replies, which"
            " these contexts do not tell: look for the reply in what it reads.",
        )
    if not _better(audit.selected_minus_random):
        return _no_better_than_random(audit.selected_minus_random)
    if not _better(selected.minus_single):
        return Verdict(
            "no better than one",
            "The retriever chooses better than by chance, but its best single prompt does as well"
            f" ({_told(selected.minus_single)}): the bank does not earn its keep.",
        )
    unbeaten = [name for name, pair in audit.against.items() if not _better(pair)]
    if unbeaten:
        pair = audit.against[unbeaten[0]]
        return Verdict(
            "no better than another run",
            f"The retriever chooses well, but {unbeaten[0]} does as well ({_told(pair)}): the bank"
            " does not earn its keep.",
        )
    beaten = f" and than {', '.join(audit.against)}" if audit.against else ""
    return Verdict(
        "earns its keep",
        "The retriever earns its keep: its choice is better than the best single prompt"
        f"{beaten} ({_told(selected.minus_single)}).",
    )


def _no_better_than_random(pair: Paired) -> Verdict:
    if pair.p < SURE:
        return Verdict(
            "worse than chance",
            f"The retriever chooses worse than by chance ({_told(pair)}): a prompt drawn at random"
            " would do better.",
        )
    return Verdict(
        "by chance",
        f"The retriever chooses by chance: a prompt drawn at random does as well ({_told(pair)}).",
    )


def _told_by_context(audit: Audit, selected: Row) -> bool:
    """Whether a gate that reads the context alone comes near the retriever's gain."""
    assert selected.share_of_gap is not None
    gates = [row.share_of_gap[0] for row in audit.rows if row.r2 is not None and row.share_of_gap]
    return max(gates, default=0.0) >= TOLD * selected.share_of_gap[0]


def _better(pair: Paired) -> bool:
    return pair.difference < 0 and pair.p < SURE


def _told(pair: Paired) -> str:
    p = f"p = {pair.p:.3f}" if pair.p >= 0.001 else "p < 0.001"
    return f"{pair.difference:+.3f} nats a token, {pair.low:+.3f} to {pair.high:+.3f}, {p}"
