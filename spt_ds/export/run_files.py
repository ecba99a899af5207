"""A trained run as it leaves the folder it was trained in, and a run folder made of given tensors.

What is written is a run folder of one checkpoint: every command reads it as it reads any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.errors import CheckpointError, ConfigError
from spt_ds.files import new_folder
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from spt_ds.run.hub import HUB_ID


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run."""

    config: Config
    folder: RunFolder
    name: str  # of the checkpoint's folder
    step: int
    best_nll: float | None  # validation loss of the selected prompt, where it is known
    tensors: dict[str, torch.Tensor]  # fp32, by the names of the trained parameters

    @property
    def bank(self) -> torch.Tensor:
        """E [K, P, D]; ConfigError for a run without soft prompts."""
        if self.config.method.type != "spt":
            raise ConfigError(
                f"{self.folder}: method.type is {self.config.method.type}, which trains no soft"
                " prompts; export a run with method.type: spt"
            )
        return self.tensors["bank.weight"]


def open_trained(run: Path, which: str, overrides: Sequence[str] = ()) -> Trained:
    """Read a checkpoint of a run without its base.

    `which` is best, last or the number of a step. Raises ConfigError where there is no run,
    CheckpointError where its tensors are not those of its configuration.
    """
    folder = RunFolder(run)
    if not os.path.isfile(folder.config):  # pathlib raises on a name that no file can have
        raise ConfigError(
            f"{run}: no {folder.config.name} in it; give the folder of a run that was trained"
        )
    config = folder.load_config(overrides)
    path = checkpoint.find(folder.checkpoints, which)
    saved = checkpoint.load(path)
    if config.method.type == "spt":
        _check_bank(saved.trainables, config, path)
    best = saved.state.get("run", {}).get("best_nll")
    number = isinstance(best, (int, float)) and not isinstance(best, bool)
    return Trained(
        config, folder, path.name, saved.state["step"], best if number else None, saved.trainables
    )


def _check_bank(tensors: dict[str, torch.Tensor], config: Config, path: Path) -> None:
    bank, prompts = tensors.get("bank.weight"), config.prompts
    shape = () if bank is None else tuple(bank.shape)
    if bank is None or len(shape) != 3 or shape[:2] != (prompts.count, prompts.tokens):
        raise CheckpointError(
            f"{path}: does not fit this run: bank.weight is {shape}, prompts.count and"
            f" prompts.tokens are {prompts.count} and {prompts.tokens}"
        )


def write_run(
    part: Path, config: Config, tensors: dict[str, torch.Tensor], step: int, best_nll: float | None
) -> None:
    """Write a run folder of one checkpoint into `part`; Adam's moments are left out."""
    folder = RunFolder(part)
    folder.config.write_text(dump_config(config), encoding="utf-8")
    run: dict[str, Any] = {"step": step, "best_step": step}
    if best_nll is not None:
        run["best_nll"] = best_nll
    # No `environment`: that of a checkpoint names the machine.
    state = {"step": step, "run": run, "config": dump_config(config)}
    checkpoint.save(folder.checkpoints, checkpoint.Checkpoint(tensors, {}, state))


def write_new(out: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `out` of what `fill` writes into an empty one, as a whole or not at all.

    Raises ConfigError where `out` is there already or cannot be written.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} is already there; give another folder, or remove it")
    try:
        with new_folder(out) as part:
            fill(part)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror or error}); free space, or give another"
            " folder. Nothing was left behind"
        ) from error


def shared_base(config: Config, given: str | None) -> str | None:
    """The name by which others find the base: `given`, `embedded` or a hub id; None for a folder.

    Raises ConfigError where `given` is no hub id.
    """
    if given is not None:
        if not HUB_ID.fullmatch(given):
            raise ConfigError(
                f"--base {given!r}: expected the base's id at the hub, such as facebook/opt-125m"
            )
        return given
    base = config.model.base
    public = HUB_ID.fullmatch(base) and not os.path.exists(base)
    return base if public else None
