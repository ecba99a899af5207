"""The figures of an audit.

All losses are nats a token. Intervals and p-values are those of `spt-ds evaluate`: a jackknife over
dialogues. Legend: N examples, K prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from spt_ds.audit.gate import Gate
from spt_ds.audit.measured import Ints, Measured
from spt_ds.evaluate.significance import (
    Paired,
    interval,
    paired,
    quantile_95,
    standard_error,
)
from spt_ds.evaluate.text_metrics import Floats


@dataclass(frozen=True)
class Row:
    """One way to choose, or one other run."""

    name: str
    nll: float
    low: float
    high: float
    minus_single: Paired | None
    """Difference to the best single prompt; None of that itself."""
    share_of_gap: tuple[float, float, float] | None = None
    """Share of the way from the best single prompt to the best of each reply, with its interval."""
    r2: float | None = None


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    examples: int
    dialogues: int
    prompts: int
    rows: list[Row]
    selected_minus_random: Paired | None
    against: dict[str, Paired]
    """Selected minus each other run."""
    usage: list[int]
    usage_entropy: float | None
    """Entropy of the usage over that of equal use; None of one prompt."""
    best_usage: list[int]
    """How often each prompt is the best one."""
    accuracy: float
    """Share of examples whose selected prompt is the best one."""
    accuracy_by_chance: float
    """The same where as many choices of each prompt were made without a look at the context."""
    kinds: dict[str, list[int]] = field(default_factory=dict)
    """How often each prompt answered each kind."""
    kind_accuracy: float | None = None
    """Share of examples whose prompt answers their kind more often than any other kind."""

    def to_json(self) -> dict[str, object]:
        """Plain data for `audit.json`."""
        return asdict(self)


class Judge:
    """Compares ways to choose on the same examples."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.single = measured.of(best_single(measured))
        self.oracle = measured.losses.min(axis=1)

    def row(self, name: str, losses: Floats, gate: Gate | None = None) -> Row:
        """`losses` [N] of the replies as chosen so."""
        statistic = self.measured.per_token(losses)
        low, high = interval(statistic)
        own = losses is self.single
        gap = None if own or self.measured.count < 2 else self._share(losses)
        difference = None if own else self.compare(losses, self.single)
        r2 = None if gate is None else gate.r2
        return Row(name, statistic.value(), low, high, difference, gap, r2)

    def compare(self, first: Floats, second: Floats) -> Paired:
        """First minus second, of [N] losses each."""
        return paired(self.measured.per_token(first), self.measured.per_token(second))

    def _share(self, losses: Floats) -> tuple[float, float, float] | None:
        if not (self.single > self.oracle).any():
            return None
        columns = [self.single, losses, self.oracle]
        share = self.measured.of_sums(
            columns, lambda sums: (sums[:, 0] - sums[:, 1]) / (sums[:, 0] - sums[:, 2])
        )
        # It may be negative, so its interval is not made for a logarithm.
        value, reach = share.value(), quantile_95(share.units - 1) * standard_error([(share, 1.0)])
        return value, value - reach, value + reach


def judge(
    measured: Measured,
    gates: Sequence[Gate],
    others: Mapping[str, Floats],
    kinds: Sequence[str] = (),
) -> Audit:
    """Compute every figure.

    `others` are [N] losses of the same replies by other runs, `kinds` a label of each example.
    """
    judge = Judge(measured)
    # The mean over the prompts is what a random choice expects. Nothing is drawn.
    selected, random = measured.of(measured.selected), measured.losses.mean(axis=1)
    rows = [judge.row("best single prompt", judge.single)]
    if measured.count > 1:
        rows += [
            judge.row("random prompt", random),
            judge.row("selected prompt", selected),
            judge.row("all prompts together", measured.ensemble),
            judge.row("best prompt of each reply", judge.oracle),
        ]
    for gate in gates:
        name = f"gate fitted afterwards: {gate.kind}, {gate.features}"
        rows.append(judge.row(name, measured.of(gate.prompts), gate))
    if kinds and measured.count > 1:
        rows.append(
            judge.row("best prompt of each kind", measured.of(best_of_kinds(measured, kinds)))
        )
    rows += [judge.row(name, losses) for name, losses in others.items()]
    usage = np.bincount(measured.selected, minlength=measured.count)
    best = np.bincount(measured.best, minlength=measured.count)
    counted = kind_counts(measured.selected, kinds, measured.count)
    return Audit(
        examples=len(measured.tokens),
        dialogues=int(measured.units.max()) + 1,
        prompts=measured.count,
        rows=rows,
        selected_minus_random=judge.compare(selected, random) if measured.count > 1 else None,
        against={name: judge.compare(selected, losses) for name, losses in others.items()},
        usage=usage.tolist(),
        usage_entropy=entropy(usage),
        best_usage=best.tolist(),
        accuracy=float((measured.selected == measured.best).mean()),
        # So often two independent draws agree, one with the frequencies of the selected prompts and
        # one with those of the best.
        accuracy_by_chance=float(usage @ best / len(measured.best) ** 2),
        kinds=counted,
        kind_accuracy=kind_accuracy(counted) if kinds else None,
    )


def best_single(measured: Measured) -> Ints:
    """[N] the one prompt that is best for all, chosen on the other half of the dialogues."""
    # Chosen on some dialogues and judged on others: on the same ones the best of K prompts would
    # partly be the luckiest.
    halves, chosen = measured.folds(2), np.zeros(len(measured.tokens), dtype=np.int64)
    for half in (0, 1):
        chosen[halves == half] = measured.losses[halves != half].sum(axis=0).argmin()
    return chosen


def best_of_kinds(measured: Measured, kinds: Sequence[str]) -> Ints:
    """[N] the prompt that is best for the kind, chosen on the other half of the dialogues."""
    halves, names = measured.folds(2), np.asarray(kinds)
    chosen = best_single(measured)
    for half in (0, 1):
        for name in np.unique(names):
            there = measured.losses[(halves != half) & (names == name)]
            if len(there):
                chosen[(halves == half) & (names == name)] = there.sum(axis=0).argmin()
    return chosen


def entropy(usage: Ints) -> float | None:
    """Entropy of counts [K] over that of equal counts: 0 where one has all, 1 where all are equal.

    None of a single count.
    """
    if len(usage) < 2:
        return None
    shares = usage[usage > 0] / usage.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(usage))) + 0.0


def kind_counts(selected: Ints, kinds: Sequence[str], count: int) -> dict[str, list[int]]:
    """How often each of `count` prompts was selected for each kind, kinds in alphabetical order."""
    names = np.asarray(kinds)
    return {
        str(name): np.bincount(selected[names == name], minlength=count).tolist()
        for name in sorted(set(kinds))
    }


def kind_accuracy(counts: Mapping[str, Sequence[int]]) -> float:
    """Share of examples whose prompt answers their kind more often than any other kind."""
    table = np.asarray(list(counts.values()))
    return float(table.max(axis=0).sum() / table.sum())
