"""Several runs in one table: seeds of a recipe averaged, with the gains over a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from spt_ds.config.legacy import upgrade
from spt_ds.config.load import flatten
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.evaluate import scores_json
from spt_ds.evaluate.columns import METRICS, WIDE_COLUMNS
from spt_ds.evaluate.scores_json import Scores
from spt_ds.evaluate.tables import Cell, Table
from spt_ds.files import sha256
from spt_ds.run import predictions
from spt_ds.run.folder import ReplyFolder, RunFolder
from spt_ds.yaml_input import load_yaml

# What two runs must share for a gain between them to mean anything.
COMMON = ("data_sha256", "bleu_signature", "ead_vocabulary")
# Keys of the configuration in which runs of one recipe may differ: they name the repeat or move no
# number.
FREE = ("train.seed", "engine.", "checkpoint.", "log.")


@dataclass(frozen=True)
class ScoredRun:
    """A run folder: recipe name and seed from its configuration, and its scores."""

    folder: Path
    name: str
    seed: int | None
    options: dict[str, Any]
    """The configuration by key path, that of generation where it is known."""
    scores: Scores


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, with mean and sample standard deviation of their metrics.

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

    @property
    def baseline(self) -> Group:
        """The group that the others are measured against."""
        return self.groups[0]

    def gains(self, group: Group) -> dict[str, tuple[float, float | None]]:
        """Gain over the baseline by metric, absolute and in percent (None over a baseline of 0)."""
        base = self.baseline.mean
        return {
            key: (value - base[key], _percent(value - base[key], base[key]))
            for key, value in group.mean.items()
            if key in base
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
        """Recipes in rows, metrics in the order of the paper's table; gains under each recipe."""
        columns = [
            metric
            for metric in METRICS
            if metric.key in WIDE_COLUMNS and any(metric.key in g.mean for g in self.groups)
        ]
        rows: list[list[Cell]] = []
        for group in self.groups:
            spreads = (_spread(group, metric.key) for metric in columns)
            rows.append([group.name, len(group.runs), *spreads])
            if group is not self.baseline:
                gains = self.gains(group)
                for label, part, sign in (("  gain", 0, ""), ("  gain %", 1, " %")):
                    cells = (gains.get(metric.key, (None, None))[part] for metric in columns)
                    told = (None if gain is None else f"{gain:+.2f}{sign}" for gain in cells)
                    rows.append([label, None, *told])
        return Table(["recipe", "runs", *(metric.label for metric in columns)], rows)

    def long(self) -> Table:
        """A row per recipe and metric, for other programs."""
        rows: list[list[Cell]] = []
        for group in self.groups:
            gains = self.gains(group)
            for key, value in group.mean.items():
                gain, percent = gains.get(key, (None, None))
                rows.append(
                    [group.name, key, len(group.runs), value, group.std.get(key), gain, percent]
                )
        return Table(["recipe", "metric", "runs", "mean", "std", "gain", "gain_percent"], rows)

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
                }
                for group in self.groups
            ],
            "settings": asdict(self.baseline.runs[0].scores.settings),
            "notes": self.notes,
        }


def compare(runs: Sequence[str | Path], baseline: str | Path) -> Comparison:
    """Read the runs, average those that share a recipe name, and set them against the baseline's.

    The baseline need not be among `runs`. Raises DataError for a folder without scores or
    predictions, and for runs that answered other examples or were scored with other settings than
    the baseline.
    """
    folders = {Path(folder).resolve(): Path(folder) for folder in (baseline, *runs)}
    scored = [read_run(folder) for folder in folders.values()]
    for run in scored[1:]:
        _check_comparable(scored[0], run)
    names = dict.fromkeys(run.name for run in scored)
    groups = [_group(name, [run for run in scored if run.name == name]) for name in names]
    skipped = dict.fromkeys(
        f"{family} skipped: {why}" for run in scored for family, why in run.scores.skipped.items()
    )
    return Comparison(groups, [*(note for group in groups for note in _notes(group)), *skipped])


def read_run(folder: Path) -> ScoredRun:
    """Read a run folder.

    Its scores.json counts when it belongs to the predictions beside it; else they are scored.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such run folder; give folders that hold predictions.jsonl or scores.json"
        )
    config = RunFolder(folder).config
    options = _read_options(config)
    name, seed = options.get("name", folder.resolve().name), options.get("train.seed")
    if not isinstance(name, str):
        raise DataError(f"{config}: name is {shown(name)}, expected a string")
    if seed is not None and not isinstance(seed, int):
        raise DataError(f"{config}: train.seed is {shown(seed)}, expected a whole number")
    scores = _read_scores(folder)
    answers = ReplyFolder.of(folder)
    options |= flatten(predictions.generated_with(answers.path, scores.settings.predictions_sha256))
    return ScoredRun(folder, name, seed, options, scores)


def _read_options(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{path}:{line}: not YAML ({error.problem})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({shown(error)})") from error
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: got a {type(tree).__name__}, expected keys such as 'name' and 'train'"
        )
    upgrade(tree, overwrite=False)
    return flatten(tree)


def _read_scores(run: Path) -> Scores:
    folder = ReplyFolder.of(run)
    if not folder.scores.exists():
        return scores_json.evaluate(folder.path)
    scores = scores_json.load_scores(folder.scores)
    source = folder.predictions
    if source.exists() and sha256(source) != scores.settings.predictions_sha256:
        return scores_json.evaluate(folder.path)
    return scores


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
    mean = {key: math.fsum(values) / len(values) for key, values in columns.items()}
    std = (
        {key: statistics.stdev(values) for key, values in columns.items()} if len(runs) > 1 else {}
    )
    return Group(name, runs, mean, std)


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
    percent = 100.0 * gain / base if base else math.inf
    return percent if math.isfinite(percent) else None


def _spread(group: Group, key: str) -> Cell:
    if key not in group.mean:
        return None
    return f"{group.mean[key]:.2f} ± {group.std[key]:.2f}" if group.std else group.mean[key]
