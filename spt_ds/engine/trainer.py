"""The training loop: windows in, optimizer steps, validation, checkpoints, agreed stops."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from spt_ds import dist
from spt_ds.batch import Window
from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.data.loader import TrainLoader, eval_batches
from spt_ds.data.sampler import total_steps
from spt_ds.data.store import ExampleStore
from spt_ds.engine.engine import Engine
from spt_ds.engine.metrics import Metrics
from spt_ds.engine.session import open_session, open_split, read_base
from spt_ds.engine.stop import StopRequests
from spt_ds.errors import CheckpointError
from spt_ds.files import write_whole
from spt_ds.log import get_logger
from spt_ds.placement.agree import agree_on_placement
from spt_ds.run import checkpoint
from spt_ds.run.command import EXIT_DONE, EXIT_STOPPED
from spt_ds.run.environment import environment
from spt_ds.run.folder import RunFolder


@dataclass
class RunState:
    """What a resumed run goes on from, beside tensors."""

    step: int = 0
    best_nll: float = math.inf
    best_step: int | None = None
    valid_before: dict[str, float] | None = None
    # stopped at a step that was to be validated: saved at once, validated on resume
    owes_validation: bool = False


class Trainer:
    """One run in one folder; a run that is found there is continued."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        deepspeed_config: str | None,
        world: dist.World,
        started_s: (
            float | None
        ) = None,  # time.monotonic() of the program's start, for train.max_hours
    ) -> None:
        self.config = config
        self.folder = folder
        self.deepspeed_config = deepspeed_config
        self.world = world
        self.started_s = time.monotonic() if started_s is None else started_s
        self.state = RunState()

    def run(self) -> int:
        """Train to the end (exit code 0) or to an agreed stop with a checkpoint (75)."""
        leads = self.world.rank == 0
        if dist.broadcast_json(dist.agreed(lambda: leads and self.folder.is_done(self.config))):
            get_logger().info(
                f"{self.folder}: this run is done ({self.folder.done.name} is there); nothing to do"
            )
            return EXIT_DONE
        base = read_base(self.config.model)
        placement = agree_on_placement(self.config, base.shape, self.deepspeed_config, self.world)
        # A DeepSpeed file that cannot be used has left no folder.
        dist.agreed(
            lambda: self.folder.prepare(self.config, self.deepspeed_config) if leads else None
        )
        session = open_session(self.config, base, placement, self.world)
        train, valid = open_split(session, "train"), open_split(session, "valid")
        self.total = self._total_steps(len(train))
        self.engine = Engine(self.config, self.world, session.sharding, session.root, session.spt)
        self._resume()
        self.metrics = Metrics(
            self.folder,
            self.total,
            self.state.step,
            revalidates=self.state.owes_validation or self.state.step in (0, self.total),
            active=leads,
            tensorboard=self.config.log.tensorboard,
        )
        self.stop = StopRequests(
            self.folder, self.config.train.max_hours, watch_files=leads, started_s=self.started_s
        )
        self.stop.install()
        try:
            return self._loop(train, valid)
        finally:
            self.metrics.close()
            session.sharding.close()

    def _total_steps(self, examples: int) -> int:
        if self.config.method.type == "none":
            return 0
        settings = self.config.train
        return settings.max_steps or total_steps(examples, settings.global_batch, settings.epochs)

    def _loop(self, train: ExampleStore, valid: ExampleStore) -> int:
        config, state = self.config, self.state
        if state.step == 0:
            state.valid_before = self._validate(valid)
        windows = self._windows(train)
        if state.owes_validation and state.step < self.total:
            state = self.state = self._judged(
                self._validate(valid)
            )  # its checkpoint is there already
        while state.step < self.total:
            window = next(windows)
            out = self.engine.train_window(window, state.step, self.total, self.stop.poll())
            state.step += 1
            self.metrics.tick()
            last = state.step == self.total
            stop, save = out.requested()
            if last or state.step == 1 or state.step % config.log.every_steps == 0:
                self.metrics.record(state.step, "train", out.metrics())
            if last or stop:
                break
            judged = state
            if _due(config.train.eval_every_steps, state.step):
                judged = self._judged(self._validate(valid))
            if (
                save
                or _due(config.checkpoint.every_steps, state.step)
                or judged.best_step == state.step
            ):
                self._save(judged, final=False)
                state = self.state
        if state.step < self.total:
            # Validation may outlast the grace of whoever stops the run: it is made up for on
            # resume.
            self._save(
                replace(state, owes_validation=_due(config.train.eval_every_steps, state.step)),
                final=True,
            )
            get_logger().warning(
                f"stopped at step {state.step} of {self.total}"
                f" ({self.stop.reason or 'asked by a rank'})"
            )
            return EXIT_STOPPED
        after = (
            self._validate(valid)
            if state.step or state.valid_before is None
            else state.valid_before
        )
        self._save(self._judged(after), final=True)
        self._finish(after)
        return EXIT_DONE

    def _windows(self, train: ExampleStore) -> Iterator[Window]:
        config = self.config
        loader = TrainLoader(
            train,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world=self.world.size,
            rank=self.world.rank,
            seed=config.train.seed,
            bleu_threshold=config.losses.bleu_threshold if config.losses.contrastive else None,
            workers=config.data.workers,
        )
        return loader.windows(self.state.step)

    def _validate(self, valid: ExampleStore) -> dict[str, float]:
        batches = eval_batches(
            valid, self.config.train.micro_batch, self.world.size, self.world.rank
        )
        values = self.engine.evaluate(batches)
        self.metrics.record(self.state.step, "valid", values)
        return values

    def _judged(self, values: dict[str, float]) -> RunState:
        """The state with this step as the best one where it is; the run's own only once its
        checkpoint is written.
        """
        state = replace(self.state, owes_validation=False)
        if state.step and values["nll_selected"] < state.best_nll:
            state.best_nll, state.best_step = values["nll_selected"], state.step
        return state

    def _resume(self) -> None:
        """Go on from the newest good checkpoint; rank 0 looks and all take the one it found."""
        folder = self.folder.checkpoints
        found = checkpoint.load_newest(folder) if self.world.rank == 0 else None
        name = dist.broadcast_json(found[0].name if found else None)
        step = found[1].state["step"] if found else 0
        dist.agreed(lambda: checkpoint.set_aside(folder, step) if self.world.rank == 0 else None)
        if name is None:
            return
        path = folder / name
        saved = dist.agreed(lambda: found[1] if found else checkpoint.load(path))
        checkpoint.restore_trainables(self.engine.trainables, saved.trainables, path)
        checkpoint.restore_optimizer(self.engine.optimizer, self.engine.names, saved.optimizer)
        self.state = RunState(**saved.state["run"])
        get_logger().info(f"resuming from {path} at step {self.state.step}")
        if (before := saved.state["total_steps"]) != self.total:
            follows = (
                "; the learning rate follows the new length"
                if self.config.optim.schedule == "cosine"
                else ""
            )
            get_logger().info(f"the run was {before} steps long and now is {self.total}{follows}")

    def _save(self, state: RunState, *, final: bool) -> None:
        """Save on rank 0 and let every rank know how it went: they go on, or fail, together.

        `state` becomes the run's when it is written: until then the best step stays one that a
        checkpoint holds.
        """

        def write() -> None:
            if self.world.rank != 0:
                return
            folder = self.folder.checkpoints
            told = {"step": state.step, "run": asdict(state), "total_steps": self.total}
            told |= {"config": dump_config(self.config), "environment": environment()}
            tensors = dict(self.engine.trainables.named_parameters())
            moments = checkpoint.optimizer_tensors(self.engine.optimizer, self.engine.names)
            checkpoint.save(folder, checkpoint.Checkpoint(dict(tensors), moments, told))
            checkpoint.prune(folder, self.config.checkpoint.keep_last, state.best_step, state.step)

        try:
            dist.agreed(write)
        except CheckpointError as error:  # raised on every rank together
            if final or self.config.checkpoint.on_save_error == "stop":
                raise
            get_logger().warning(f"{error}; training goes on (checkpoint.on_save_error: continue)")
        else:
            self.state = state

    def _finish(self, after: dict[str, float]) -> None:
        if self.world.rank != 0:
            return
        summary: dict[str, Any] = {
            "step": self.state.step,
            "valid_before": self.state.valid_before,
            "valid_after": after,
        }
        summary |= {"best_step": self.state.best_step, "world_size": self.world.size}
        summary["trained_parameters"] = sum(
            parameter.numel() for parameter in self.engine.trainables.parameters()
        )
        write_whole(self.folder.done, json.dumps(summary, indent=2))
        get_logger().info(f"done: {self.state.step} steps; run folder {self.folder}")


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0
