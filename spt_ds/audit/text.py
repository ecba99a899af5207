"""An audit as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spt_ds.audit.judge import Audit, Row
from spt_ds.audit.prompts import Prompt
from spt_ds.audit.replies import Control
from spt_ds.audit.verdict import Verdict
from spt_ds.display import printable, shortened
from spt_ds.evaluate.significance import Paired
from spt_ds.evaluate.tables import Cell, Table

WIDTH = 100  # columns of a text that is shown


def lines(
    verdict: Verdict, audit: Audit, prompts: Sequence[Prompt], controls: Sequence[Control]
) -> Iterator[str]:
    """Yield the text, the verdict first."""
    yield verdict.sentence
    yield ""
    yield f"{audit.examples} replies of {audit.dialogues} dialogues, {audit.prompts} prompts"
    yield ""
    yield loss_table(audit).text()
    yield from _choice(audit)
    if controls:
        yield ""
        yield control_table(controls).text()
    for number, prompt in enumerate(prompts):
        used = audit.usage[number]
        yield ""
        yield f"prompt {number}: selected for {used}, {prompt.nll:.3f} nats a token on all replies"
        for typical in prompt.typical:
            yield f"  {typical.gain:+.3f}  persona  {_short(typical.persona)}"
            yield f"          partner  {_short(typical.partner)}"
            yield f"          reply    {_short(typical.reply)}"


def loss_table(audit: Audit) -> Table:
    """A row per way to choose: loss, its distance to the best single prompt, share of the gap."""
    columns = ["choice", "nats a token", "95 %", "minus single", "95 %", "p", "of the gap", "R2"]
    return Table(columns, [_cells(row) for row in audit.rows])


def control_table(controls: Sequence[Control]) -> Table:
    """A row per system: its scores, and what the bank has more."""
    rows: list[list[Cell]] = []
    for control in controls:
        name = f"{control.folder} (nearest F1)" if control.matched else control.folder
        rows.append([name, *(round(value, 2) for value in control.values.values())])
        pairs = control.differences.values()
        rows.append(["  bank minus it", *(f"{pair.difference:+.2f}" for pair in pairs)])
        rows.append(["  p", *(p_value(pair) for pair in pairs)])
    return Table(["replies", "F1", "BLEU", "DIST-1", "DIST-2"], rows)


def p_value(pair: Paired) -> str:
    """A p-value as it is shown."""
    return f"{pair.p:.4f}" if pair.p >= 0.0001 else "< 0.0001"


def _cells(row: Row) -> list[Cell]:
    cells: list[Cell] = [row.name, f"{row.nll:.3f}", f"{row.low:.3f} to {row.high:.3f}"]
    pair, gap = row.minus_single, row.share_of_gap
    if pair is None:
        cells += [None] * 3
    else:
        interval = f"{pair.low:+.3f} to {pair.high:+.3f}"
        cells += [f"{pair.difference:+.3f}", interval, p_value(pair)]
    cells.append(None if gap is None else f"{gap[0]:.0%} ({gap[1]:.0%} to {gap[2]:.0%})")
    return [*cells, None if row.r2 is None else f"{row.r2:.3f}"]


def _choice(audit: Audit) -> Iterator[str]:
    if audit.prompts == 1:
        return
    yield "selected: " + " ".join(f"{k}:{count}" for k, count in enumerate(audit.usage))
    yield "best:     " + " ".join(f"{k}:{count}" for k, count in enumerate(audit.best_usage))
    yield f"entropy of the selection: {audit.usage_entropy:.2f} of 1"
    pair = audit.selected_minus_random
    if pair is not None:
        interval = f"{pair.low:+.3f} to {pair.high:+.3f}, p {p_value(pair)}"
        yield f"selected minus random: {pair.difference:+.3f} nats a token, {interval}"
    yield (
        f"best prompt selected: {audit.accuracy:.0%} of the replies, by chance"
        f" {audit.accuracy_by_chance:.0%}"
    )
    for name, pair in audit.against.items():
        interval = f"{pair.low:+.3f} to {pair.high:+.3f}, p {p_value(pair)}"
        yield f"selected minus {name}: {pair.difference:+.3f} nats a token, {interval}"
    if audit.kind_accuracy is not None:
        yield f"kind shown by the prompt: {audit.kind_accuracy:.0%} of the replies"
        rows: list[list[Cell]] = [[kind, *counts] for kind, counts in audit.kinds.items()]
        yield Table(["kind", *map(str, range(audit.prompts))], rows).text()


def _short(text: str) -> str:
    return shortened(printable(text), WIDTH)
