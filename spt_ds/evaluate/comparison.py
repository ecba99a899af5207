"""Several runs in one table: gains over a baseline, tested, and seeds of a recipe averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.evaluate.columns import METRIC_OF, METRICS, WIDE_COLUMNS
from spt_ds.evaluate.corpus_metrics import CorpusMetrics, other_tokens, tested_gains
from spt_ds.evaluate.scored_runs import ScoredRun, read_run
from spt_ds.evaluate.significance import Paired, p_text
from spt_ds.evaluate.tables import Cell, Table
from spt_ds.run.folder import distinct_names

# What two runs must share for a gain between them to mean anything.
COMMON = ("data_sha256", "bleu_signature", "ead_vocabulary")
# Keys of the configuration in which runs of one recipe may differ: they name the repeat or move no
# number.
FREE = ("train.seed", "engine.", "checkpoint.", "log.")
GAIN_COLUMNS = ("gain", "gain %", "95 %", "p")


@dataclass(frozen=True)
class Group:
    """The runs of one row, with mean and sample standard deviation of their metrics.

    A metric counts only where all of the runs have it.
    """

    name: str
    runs: list[ScoredRun]
    mean: dict[str, float]
    std: dict[str, float]
    """Empty for a single run."""


@dataclass(frozen=True)
class Comparison:
    """Groups in the order given, the baseline first."""

    groups: list[Group]
    notes: list[str]
    tests: Mapping[str, Mapping[str, Paired]] = field(default_factory=dict)
    """By group and metric: the gain over the baseline, paired over dialogues."""
    kind: Literal["run", "recipe"] = "recipe"
    """What a row is."""

    @property
    def baseline(self) -> Group:
        """The group that the others are measured against."""
        return self.groups[0]

    def gains(self, group: Group) -> dict[str, tuple[float, float | None]]:
        """Gain over the baseline by metric, absolute and in percent (None over a baseline of 0)."""
        base = self.baseline.mean
        apart = {"ppl_token"} if other_tokens(_metrics(self.baseline, group)) else set()
        return {
            key: (value - base[key], _percent(value - base[key], base[key]))
            for key, value in group.mean.items()
            if key in base and key not in apart
        }

    def diversity_gain(self, group: Group) -> float | None:
        """The mean of DIST-1's and DIST-2's gains in percent.

        It is the paper's measure of added diversity.
        """
        gains = self.gains(group)
        found = (gains.get(key, (0.0, None))[1] for key in ("dist1", "dist2"))
        known = [gain for gain in found if gain is not None]
        return sum(known) / 2 if len(known) == 2 else None

    def wide(self) -> Table:
        """A row per group, metrics in the order of the paper's table; its gains below it."""
        columns = [
            metric.key
            for metric in METRICS
            if metric.key in WIDE_COLUMNS and any(metric.key in g.mean for g in self.groups)
        ]
        rows: list[list[Cell]] = []
        for group in self.groups:
            spreads = (_spread(group, key) for key in columns)
            rows.append([group.name, len(group.runs), *spreads])
            if group is not self.baseline:
                rows += self._gain_rows(group, columns)
        return Table([self.kind, "runs", *(METRIC_OF[key].label for key in columns)], rows)

    def _gain_rows(self, group: Group, columns: Sequence[str]) -> Iterator[list[Cell]]:
        cells = [self._gain_cells(group, key) for key in columns]
        for place, label in enumerate(GAIN_COLUMNS):
            if label in ("gain", "gain %") or self.tests.get(group.name):
                yield [f"  {label}", None, *(cell[place] for cell in cells)]

    def _gain_cells(self, group: Group, key: str) -> tuple[Cell, Cell, Cell, Cell]:
        """The GAIN_COLUMNS of one metric; None where there is none."""
        gain, percent = self.gains(group).get(key, (None, None))
        pair = self.tests.get(group.name, {}).get(key)
        return (
            None if gain is None else f"{gain:+.2f}",
            None if percent is None else f"{percent:+.1f}",
            None if pair is None else f"{pair.low:+.2f} to {pair.high:+.2f}",
            None if pair is None else p_text(pair.p),
        )

    def against_baseline(self, group: Group) -> Table:
        """A row per metric: the baseline, the group, and the gain with its test."""
        rows: list[list[Cell]] = []
        for key in (metric.key for metric in METRICS if metric.key in group.mean):
            both = [_spread(self.baseline, key), _spread(group, key)]
            rows.append([METRIC_OF[key].label, *both, *self._gain_cells(group, key)])
        return Table(["metric", self.baseline.name, group.name, *GAIN_COLUMNS], rows)

    def long(self) -> Table:
        """A row per group and metric, for other programs."""
        rows: list[list[Cell]] = []
        for group in self.groups:
            gains, tests = self.gains(group), self.tests.get(group.name, {})
            for key, value in group.mean.items():
                row: list[Cell] = [group.name, key, len(group.runs), value, group.std.get(key)]
                pair = tests.get(key)
                tested = (pair.low, pair.high, pair.p) if pair else (None, None, None)
                rows.append([*row, *gains.get(key, (None, None)), *tested])
        columns = [self.kind, "metric", "runs", "mean", "std", "gain", "gain_percent"]
        return Table([*columns, "gain_low", "gain_high", "p"], rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `compare.json`."""
        return {
            "baseline": self.baseline.name,
            "recipes": [
                {
                    "name": group.name,
                    "runs": [{"folder": str(run.folder), "seed": run.seed} for run in group.runs],
                    "mean": group.mean,
                    "std": group.std,
                    "gain": {key: gain for key, (gain, _) in self.gains(group).items()},
                    "gain_percent": {
                        key: percent for key, (_, percent) in self.gains(group).items()
                    },
                    "diversity_gain_percent": self.diversity_gain(group),
                    "tests": {
                        key: {"low": pair.low, "high": pair.high, "p": pair.p}
                        for key, pair in self.tests.get(group.name, {}).items()
                    },
                }
                for group in self.groups
            ],
            "settings": asdict(self.baseline.runs[0].scores.settings),
            "notes": self.notes,
        }


def compare(
    runs: Sequence[str | Path], baseline: str | Path | None = None, *, average_seeds: bool = False
) -> Comparison:
    """Read the runs and set them against the baseline, by default the first of them.

    Each run is a row, named by its folder. With `average_seeds` a row is the mean of the runs that
    share a recipe name. The baseline need not be among `runs`. Raises DataError for a folder
    without scores or predictions, and for runs that answered other examples or were scored with
    other settings than the baseline.
    """
    given = [*([] if baseline is None else [baseline]), *runs]
    # By their resolved paths: a baseline that is also among the runs is read once.
    folders = list({Path(folder).resolve(): Path(folder) for folder in given}.values())
    scored = [read_run(folder) for folder in folders]
    for run in scored[1:]:
        _check_comparable(scored[0], run)
    names = [run.recipe for run in scored] if average_seeds else distinct_names(folders)
    members: dict[str, list[ScoredRun]] = {name: [] for name in names}
    for name, run in zip(names, scored, strict=True):
        members[name].append(run)
    groups = [_group(name, own) for name, own in members.items()]
    tests = {group.name: _tests(group, groups[0]) for group in groups[1:]}
    notes = [note for group in groups for note in _notes(group)]
    for group in groups[1:]:
        notes += _notes_of_pair(groups[0], group, bool(tests[group.name]))
    if any(tests.values()):
        notes.append(_legend(groups[0]))
    kind: Literal["run", "recipe"] = "recipe" if average_seeds else "run"
    return Comparison(groups, [*notes, *_skipped(scored)], tests, kind)


def _check_comparable(base: ScoredRun, other: ScoredRun) -> None:
    for name in COMMON:
        expected, got = getattr(base.scores.settings, name), getattr(other.scores.settings, name)
        if got != expected:
            raise DataError(
                f"{other.folder}: {name} is {shown(got)}, but {shown(expected)} in the baseline"
                f" {base.folder}; runs are compared on the same examples, scored the same way:"
                " generate from the same data and run `spt-ds evaluate` on both"
            )


def _group(name: str, runs: list[ScoredRun]) -> Group:
    shared = [m.key for m in METRICS if all(m.key in run.scores.values for run in runs)]
    columns = {key: [run.scores.values[key] for run in runs] for key in shared}
    # fsum rounds once, so the order of the runs does not change the mean.
    mean = {key: math.fsum(values) / len(values) for key, values in columns.items()}
    std = (
        {key: statistics.stdev(values) for key, values in columns.items()} if len(runs) > 1 else {}
    )
    return Group(name, runs, mean, std)


def _tests(group: Group, baseline: Group) -> dict[str, Paired]:
    """The group minus the baseline, by metric; empty where predictions or dialogues are missing."""
    ours, theirs = _metrics(group), _metrics(baseline)
    # The mean of a row is over all of its runs. A test on some of them would be of another number.
    if len(ours) < len(group.runs) or len(theirs) < len(baseline.runs):
        return {}
    return tested_gains(ours, theirs)


def _metrics(*groups: Group) -> list[CorpusMetrics]:
    return [run.metrics for group in groups for run in group.runs if run.metrics is not None]


def _notes(group: Group) -> Iterator[str]:
    """What a reader of the table must know about a group."""
    first = group.runs[0]
    seeds = [run.seed for run in group.runs]
    if len(seeds) > 1 and len(set(seeds)) < len(seeds):
        yield (
            f"{group.name}: seeds {seeds} repeat; the standard deviation is not that over"
            " independent runs"
        )
    for run in group.runs[1:]:
        keys = sorted(
            key for key in first.options.keys() | run.options.keys() if not key.startswith(FREE)
        )
        differing = [key for key in keys if first.options.get(key) != run.options.get(key)]
        if differing:
            yield (
                f"{group.name}: {run.folder} differs from {first.folder} in {', '.join(differing)}"
            )


def _percent(gain: float, base: float) -> float | None:
    # A base near 0 can make the quotient infinite, which no table and no JSON file can hold.
    percent = 100.0 * gain / base if base else math.inf
    return percent if math.isfinite(percent) else None


def _notes_of_pair(baseline: Group, group: Group, tested: bool) -> Iterator[str]:
    """What a reader of a gain must know about it."""
    bases = [str(each.runs[0].options.get("model.base", "")) for each in (baseline, group)]
    if all(bases) and bases[0] != bases[1]:
        yield (
            f"{group.name}: its base is {shown(bases[1])}, that of {baseline.name}"
            f" {shown(bases[0])}; the gains are those of the base too"
        )
    if "ppl_token" in group.mean and other_tokens(_metrics(baseline, group)):
        yield (
            f"{group.name}: its tokens are not those of {baseline.name}, so PPL/token has no gain;"
            " compare PPL/word"
        )
    if not tested:
        yield (
            f"{group.name}: its gains are not tested; that needs the predictions of all runs, of"
            " two dialogues or more"
        )


def _skipped(runs: Sequence[ScoredRun]) -> Iterator[str]:
    """Which metrics are missing, in which runs and why."""
    without: dict[tuple[str, str], list[str]] = {}
    for name, run in zip(distinct_names([run.folder for run in runs]), runs, strict=True):
        for skipped in run.scores.skipped.items():
            without.setdefault(skipped, []).append(name)
    for (family, why), names in without.items():
        told = "" if len(names) == len(runs) else f" in {', '.join(names)}"
        yield f"{family} skipped{told}: {why}"


def _legend(baseline: Group) -> str:
    settings = baseline.runs[0].scores.settings
    bert = " BERTScore is tested by `spt-ds evaluate --against`."
    return (
        f"gains are over {baseline.name}; 95 % intervals and p-values are paired over"
        f" {settings.dialogues} dialogues."
    ) + (bert if "bert_f1" in baseline.mean else "")


def _spread(group: Group, key: str) -> Cell:
    if key not in group.mean:
        return None
    return f"{group.mean[key]:.2f} ± {group.std[key]:.2f}" if group.std else group.mean[key]
