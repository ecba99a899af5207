"""The cells of a sweep file: every configuration under every combination of a grid. No torch."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from spt_ds.config.data import held_out
from spt_ds.config.load import key_paths, load_config, load_yaml, options_of
from spt_ds.config.schema import Config
from spt_ds.config.section import FolderName, Section
from spt_ds.errors import ConfigError
from spt_ds.run.folder import RunFolder, differences

SEED = "train.seed"
MOST_CELLS = 10_000
MOST_LETTERS = 80  # of a value in a row's name
# What may still change while a run is trained, but not once it is done: the scores of a row are
# those of one setting.
FIXED_BY_END = (
    "train.max_steps",
    "train.epochs",
    "train.eval_every_steps",
    "data.test",
    "data.max_test_",
    "generate.",
)
FREE = ("generate.batch_size",)


class Entry(Section):
    """One configuration of a sweep; its recipe or file alone may stand in its place."""

    config: str
    """A recipe or a YAML file."""
    name: FolderName | None = None
    """Row of the table; default the name in the configuration."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Options of this configuration, `key.path: value`."""


class SweepFile(Section):
    """A sweep: every configuration under every combination of the grid."""

    name: FolderName
    """Default folder: runs/NAME."""
    configs: Annotated[tuple[Entry, ...], Field(min_length=1)]
    """Recipes, files or entries; the first row is the baseline of the table."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Options of every cell, `key.path: value`; an entry's own go before them."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Axes, `key.path: [values]`. Those of train.seed are the repeats of a row; every other value
    makes its own row.
    """

    @model_validator(mode="before")
    @classmethod
    def _short_entries(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("configs"), list):
            entries = [{"config": one} if isinstance(one, str) else one for one in tree["configs"]]
            return {**tree, "configs": entries}
        return tree


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    row: str  # in the table, and the name in its configuration
    folder: Path
    source: str  # recipe or YAML file
    overrides: tuple[str, ...]  # key.path=value
    config: Config

    @property
    def run(self) -> RunFolder:
        """The files in the folder."""
        return RunFolder(self.folder)

    @property
    def options(self) -> list[str]:
        """The overrides as words of a command line."""
        return [word for override in self.overrides for word in ("--set", override)]

    @property
    def training(self) -> list[str]:
        """What follows `spt-ds train`."""
        return ["--config", self.source, "--run-dir", str(self.folder), *self.options]

    @property
    def trained(self) -> bool:
        """Whether training has come to its end."""
        return self.run.done.is_file()

    @property
    def finished(self) -> bool:
        """Whether the scores are there."""
        return self.run.replies.scores.is_file()

    def conflict(self) -> str | None:
        """How the run in the folder differs from this cell; None where it can be gone on with."""
        if not self.run.config.is_file():
            return None
        old = self.run.load_config()
        changed = differences(old, self.config)
        if self.trained:
            before, after = options_of(old), options_of(self.config)
            changed += [
                f"{key}: {before[key]!r} -> {after[key]!r}"
                for key in before
                if key.startswith(FIXED_BY_END) and key not in FREE and before[key] != after[key]
            ]
        return "; ".join(changed) or None


def load_cells(
    path: Path, out: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Path, list[Cell]]:
    """Read a sweep file; return its folder and its cells with their configurations.

    `overrides` (`key.path=value`) hold in every cell. Raises ConfigError for whatever makes a cell
    unusable, also for a run folder that holds another training.
    """
    sweep = load_yaml(path, SweepFile)
    _check_keys(path, sweep, overrides)
    root = out or Path("runs") / sweep.name
    count = len(sweep.configs) * math.prod(len(values) for values in sweep.grid.values())
    # Counted before any cell is made: a few long axes would fill the memory.
    if count > MOST_CELLS:
        raise ConfigError(
            f"{path}: the grid makes {count} cells, allowed are {MOST_CELLS}; shorten its axes"
        )
    cells = [
        cell for entry in sweep.configs for cell in _cells(path, sweep, entry, root, overrides)
    ]
    folders = Counter(cell.folder for cell in cells)
    for cell in cells:
        if folders[cell.folder] > 1:
            raise ConfigError(
                f"{path}: two cells are called {cell.folder.name}; give each entry of configs a"
                " name of its own"
            )
    _check_same_test(path, cells)
    conflicts = [f"  {cell.folder}: {conflict}" for cell in cells if (conflict := cell.conflict())]
    if conflicts:
        raise ConfigError(
            f"{path}: {len(conflicts)} folder(s) hold a run with another configuration; choose"
            " another --out, or remove them to start over\n" + "\n".join(conflicts)
        )
    return root, cells


def _cells(
    path: Path, sweep: SweepFile, entry: Entry, root: Path, overrides: Sequence[str]
) -> Iterator[Cell]:
    # First next to the sweep file, so that it can be started from any folder.
    beside = path.parent / entry.config
    source = (
        str(beside)
        if entry.config.endswith((".yaml", ".yml")) and beside.is_file()
        else entry.config
    )
    name = entry.name or load_config(source).name
    for values in itertools.product(*sweep.grid.values()):
        place = dict(zip(sweep.grid, values, strict=True))
        parts = [
            f"{_short(key, sweep.grid)}-{_slug(value)}"
            for key, value in place.items()
            if key != SEED
        ]
        row = ".".join([name, *parts])
        folder = root / (f"{row}.seed-{place[SEED]}" if SEED in place else row)
        given = [f"{key}={_yaml(value)}" for key, value in {**sweep.set, **entry.set}.items()]
        # Later ones win. An axis is never overridden, and the name is always the row's.
        options = (
            *given,
            *overrides,
            *(f"{key}={_yaml(value)}" for key, value in place.items()),
            f"name={_yaml(row)}",
        )
        try:
            config = load_config(source, options)
        except ConfigError as error:
            raise ConfigError(f"{path}: cell {folder.name}: {error}") from error
        yield Cell(row, folder, source, options, config)


def _check_same_test(path: Path, cells: Sequence[Cell]) -> None:
    """Check that all cells answer the same examples, before any of them is trained."""
    keys = ["test", "max_test_examples"]
    if any(held_out(cell.config.data.test) for cell in cells):
        keys += ["train", "valid", "split_by", "split_seed"]
    for key in keys:
        values = {repr(getattr(cell.config.data, key)): cell.folder.name for cell in cells}
        if len(values) > 1:
            listing = ", ".join(f"{value} in {name}" for value, name in values.items())
            raise ConfigError(
                f"{path}: data.{key} is {listing}; all cells of a sweep answer the same examples:"
                " set it once, under `set`, or make a sweep of each"
            )


def _check_keys(path: Path, sweep: SweepFile, overrides: Sequence[str]) -> None:
    known = set(key_paths(Config)) - {"name"}
    places = [("set", sweep.set), ("grid", sweep.grid)]
    places += [(f"configs.{number}.set", entry.set) for number, entry in enumerate(sweep.configs)]
    problems = []
    for place, keys in places:
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                problems.append(
                    f"  {place}.{key}: unknown option"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
            elif place != "grid" and key in sweep.grid:
                problems.append(
                    f"  {place}.{key}: is an axis of the grid too; leave it in one place"
                )
    problems += [
        f"  --set {override}: is an axis of the grid; change it there"
        for override in overrides
        if override.partition("=")[0].strip() in sweep.grid
    ]
    if problems:
        raise ConfigError(
            f"{path}: {len(problems)} problem(s) in the sweep\n" + "\n".join(problems)
        )


def _short(key: str, keys: Iterable[str]) -> str:
    """The last part of a key, or all of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _slug(value: object) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(value)).strip("_")[:MOST_LETTERS] or "none"


def _yaml(value: object) -> str:
    # JSON is YAML too, and quotes: a text that looks like a number stays a text.
    return json.dumps(value, ensure_ascii=False)
