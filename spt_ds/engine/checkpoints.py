"""Saves and resumes a run together on all ranks; `run/checkpoint.py` has the files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from spt_ds import dist
from spt_ds.config.load import dump_config, options_of
from spt_ds.config.schema import Config
from spt_ds.display import shown
from spt_ds.engine.engine import Engine
from spt_ds.errors import CheckpointError, ConfigError
from spt_ds.log import get_logger
from spt_ds.run import checkpoint
from spt_ds.run.environment import environment
from spt_ds.run.folder import RunFolder

# What the shapes of the trained tensors follow from, beside the size of the base.
SHAPES = (
    "method.type",
    "method.lora.rank",
    "method.lora.targets",
    "prompts.count",
    "prompts.tokens",
    "retriever.projections",
    "retriever.keys",
)


@dataclass(frozen=True)
class RunState:
    """Where a run is; a checkpoint holds it as JSON."""

    step: int = 0
    """Optimizer steps taken."""
    best_nll: float = math.inf
    """The lowest validation loss of the selected prompt so far."""
    best_step: int | None = None
    """The step of that loss."""
    valid_before: dict[str, float] | None = None
    """Validation before the first step."""
    owes_validation: bool = False
    """Whether the run stopped at a step that is to be validated: it was saved at once, and is
    validated when the run resumes.
    """

    def advance(self) -> RunState:
        """The state one step later."""
        return replace(self, step=self.step + 1)

    def judge(self, valid: dict[str, float]) -> RunState:
        """The state after this step's validation: it may be the best step now."""
        state = replace(self, owes_validation=False)
        if self.step and valid["nll_selected"] < self.best_nll:
            return replace(state, best_nll=valid["nll_selected"], best_step=self.step)
        return state


class Checkpoints:
    """The checkpoints of one run. Every rank calls each method; rank 0 alone writes."""

    def __init__(self, folder: RunFolder, engine: Engine, total_steps: int) -> None:
        self.folder = folder.checkpoints
        self.engine = engine
        self.total_steps = total_steps

    def resume(self) -> RunState:
        """Restore the newest good checkpoint and return its state; a new run begins at step 0.

        Rank 0 looks for it and all ranks take the one that it found.
        """
        leads = self.engine.world.rank == 0
        newest = checkpoint.load_newest(self.folder) if leads else None
        name = dist.broadcast_json(newest[0].name if newest else None)
        step = newest[1].state["step"] if newest else 0
        # What is newer is damaged. It goes out of the way, or it would count among the newest.
        dist.agreed(lambda: checkpoint.set_aside(self.folder, step) if leads else None)
        if name is None:
            return RunState()
        path = self.folder / name
        saved = dist.agreed(lambda: newest[1] if newest else checkpoint.load(path))
        engine = self.engine
        # The file is the same on all ranks, so what does not fit fails on all of them alike.
        checkpoint.restore_trainables(engine.trainables, saved.trainables, path)
        checkpoint.restore_optimizer(engine.optimizer, engine.names, saved.optimizer, path)
        state = dist.agreed(lambda: _state_of(saved, path))
        get_logger().info(f"resuming from {path} at step {state.step}")
        self._compare_lengths(saved.state.get("total_steps"))
        return state

    def save(self, state: RunState, *, final: bool = False) -> bool:
        """Save on rank 0; every rank learns how it went, and they go on or fail together.

        Returns whether the checkpoint is on the disk. `state` is the run's only then: until then
        its best step is one that a checkpoint holds. Raises CheckpointError when a `final` save
        fails, and with `checkpoint.on_save_error: stop` when any does.
        """
        settings = self.engine.config.checkpoint

        def write() -> None:
            if self.engine.world.rank == 0:
                checkpoint.save(self.folder, self._contents(state))
                # Older ones go only when the new one is whole on the disk.
                checkpoint.prune(self.folder, settings.keep_last, state.best_step, state.step)

        # `agreed` is the only collective here, and every rank comes to it: none can be left waiting
        # for a rank whose disk is full.
        try:
            dist.agreed(write)
        except CheckpointError as error:  # raised on every rank together
            if final or settings.on_save_error == "stop":
                raise
            get_logger().warning(
                f"{error}; training continues (checkpoint.on_save_error: continue)"
            )
            return False
        return True

    def _contents(self, state: RunState) -> checkpoint.Checkpoint:
        engine = self.engine
        return checkpoint.Checkpoint(
            dict(engine.trainables.named_parameters()),
            checkpoint.optimizer_tensors(engine.optimizer, engine.names),
            {
                "step": state.step,
                "run": asdict(state),
                "total_steps": self.total_steps,
                "config": dump_config(engine.config),
                "environment": environment(),
            },
        )

    def _compare_lengths(self, before: object) -> None:
        if before == self.total_steps:
            return
        follows = ""
        if self.engine.config.optim.schedule == "cosine":
            follows = "; the learning rate follows the new length"
        get_logger().info(
            f"the run was {shown(before)} steps long and now is {self.total_steps}{follows}"
        )


def _state_of(saved: checkpoint.Checkpoint, path: Path) -> RunState:
    mend = "remove the folder to resume from an older checkpoint"
    try:
        state = TypeAdapter(RunState).validate_python(saved.state.get("run"))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(
            f"{path}: not written by spt_ds (state.json: run.{shown(key)} cannot be used); {mend}"
        ) from error
    if state.step != saved.state["step"]:
        raise CheckpointError(f"{path}: not written by spt_ds (state.json: two steps); {mend}")
    return state


def begin_from_run(engine: Engine) -> None:
    """Take the trained tensors of the run that `init` names; every rank calls it.

    Raises ConfigError where there is no such run, CheckpointError where its tensors do not fit.
    """
    own = engine.config
    folder = RunFolder(Path(own.init.removeprefix("run:")).expanduser())
    other = dist.agreed(lambda: _config_of(folder))
    if problems := _differences(own, other):
        raise CheckpointError(
            f"init: {own.init}: does not fit this run: {'; '.join(problems)}; set the same here, or"
            " leave init out"
        )
    path = dist.agreed(lambda: checkpoint.find(folder.checkpoints, "best"))
    saved = dist.agreed(lambda: checkpoint.load(path))
    checkpoint.restore_trainables(engine.trainables, saved.trainables, path)
    get_logger().info(f"init: bank and retriever begin as those of {path}")
    if own.model.base != other.model.base:
        get_logger().warning(
            f"init: {folder} was trained over the base {other.model.base}, this run has"
            f" {own.model.base}; prompts mean little to a base that they were not trained over"
        )


def _config_of(folder: RunFolder) -> Config:
    if not folder.config.is_file():
        raise ConfigError(f"init: {folder}: no run folder ({folder.config.name} is missing)")
    return folder.load_config()


def _differences(own: Config, other: Config) -> list[str]:
    """The options that make tensors of another shape."""
    here, there = options_of(own), options_of(other)
    return [
        f"{key} is {there[key]} there, {here[key]} here"
        for key in SHAPES
        if here[key] != there[key]
    ]
