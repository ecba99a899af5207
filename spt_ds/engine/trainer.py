"""The training loop: windows in, optimizer steps, validation, checkpoints, agreed stops."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from spt_ds import dist
from spt_ds.config.schema import Config
from spt_ds.data.encode import Encoder
from spt_ds.data.loader import PersonaDropout, TrainLoader, eval_batches
from spt_ds.data.sampler import MicroSize, total_steps
from spt_ds.data.store import ExampleStore
from spt_ds.engine.checkpoints import Checkpoints, RunState, begin_from_run
from spt_ds.engine.compiling import compile_base, refuse_shards
from spt_ds.engine.engine import Engine
from spt_ds.engine.metrics import Metrics
from spt_ds.engine.session import Session, open_session, open_split, read_base, train_style
from spt_ds.engine.step_sums import StepResult
from spt_ds.engine.stop import StopRequests
from spt_ds.files import write_whole
from spt_ds.log import get_logger
from spt_ds.placement.agree import agree_on_placement
from spt_ds.run.command import EXIT_DONE, EXIT_STOPPED
from spt_ds.run.folder import RunFolder
from spt_ds.run.lock import only_start
from spt_ds.track.trackers import Trackers, chosen


def train_run(
    config: Config,
    folder: RunFolder,
    deepspeed_config: str | None,
    world: dist.World,
    started_s: float | None = None,
) -> int:
    """Train to the end (exit code 0) or to an agreed stop with a checkpoint (75).

    A run that is in the folder already is continued. `started_s` is time.monotonic() at the
    program's start, from which `train.max_hours` counts.
    """
    if dist.broadcast_json(dist.agreed(lambda: world.rank == 0 and folder.is_done(config))):
        get_logger().info(
            f"{folder}: this run is done ({folder.done.name} is there); nothing to do"
        )
        return EXIT_DONE
    with open_trainer(config, folder, deepspeed_config, world, started_s) as trainer:
        return trainer.run()


@contextlib.contextmanager
def open_trainer(
    config: Config,
    folder: RunFolder,
    deepspeed_config: str | None,
    world: dist.World,
    started_s: float | None = None,
) -> Iterator[Trainer]:
    """Open all that a run needs, resume it where it stands, and close what must be closed."""
    leads = world.rank == 0
    # Rank 0 alone tracks; where it cannot, every rank ends before the base is read.
    names = dist.agreed(lambda: chosen(config.log.trackers) if leads else [])
    base = read_base(config.model)
    placement = agree_on_placement(config, base.shape, deepspeed_config, world)
    refuse_shards(config, placement)
    with contextlib.ExitStack() as closing:

        def claim() -> None:
            mend = "wait until it ends, or give another --run-dir"
            closing.enter_context(only_start(folder.path, mend))
            folder.prepare(config, deepspeed_config)

        # Only now: an unusable base or DeepSpeed file leaves no folder.
        dist.agreed(lambda: claim() if leads else None)
        session = open_session(config, base, placement, world)
        # The lock was entered first, so it is released last: no other start comes in while this one
        # cleans up.
        closing.callback(session.sharding.close)
        train, valid = open_split(session, "train"), open_split(session, "valid")
        total = steps_of(config, len(train))
        engine = Engine(session)
        checkpoints = Checkpoints(folder, engine, total)
        state = checkpoints.resume()
        if config.init and state.step == 0:
            begin_from_run(engine)
        # By all steps: compiled layers round differently, and a run that resumes takes the same.
        compile_base(session, total)
        metrics = Metrics(
            folder,
            total,
            state.step,
            revalidates=state.owes_validation or state.step in (0, total),
            active=leads,
            trackers=Trackers(names, config, folder),
        )
        closing.callback(metrics.close)
        started_s = time.monotonic() if started_s is None else started_s
        stop = StopRequests(folder, config.train.max_hours, watch_files=leads, started_s=started_s)
        stop.install()
        loader = train_loader(session, train)
        yield Trainer(
            config, folder, engine, loader, valid, checkpoints, metrics, stop, total, state
        )


def steps_of(config: Config, examples: int) -> int:
    """Optimizer steps of a run on so many training examples."""
    if config.method.type == "none":
        return 0
    settings = config.train
    return settings.max_steps or total_steps(examples, settings.global_batch, settings.epochs)


def train_loader(session: Session, train: ExampleStore) -> TrainLoader:
    """The loader of this rank's windows."""
    config, world, dropout = session.config, session.world, None
    if config.data.persona_dropout.active:
        encoder = Encoder(session.tokenizer, config.data.max_tokens, train_style(config))
        dropout = PersonaDropout(encoder, config.data.persona_dropout, config.train.seed)
    return TrainLoader(
        train,
        global_batch=config.train.global_batch,
        micro=MicroSize.of(config),
        world=world.size,
        rank=world.rank,
        seed=config.train.seed,
        bleu_threshold=config.losses.bleu_threshold if config.losses.contrastive else None,
        workers=config.data.workers,
        dropout=dropout,
    )


@dataclass
class Trainer:
    """One run in one folder, opened and ready to continue from `state`."""

    config: Config
    folder: RunFolder
    engine: Engine
    loader: TrainLoader
    valid: ExampleStore
    checkpoints: Checkpoints
    metrics: Metrics
    stop: StopRequests
    total: int
    """Optimizer steps of the whole run."""
    state: RunState

    def run(self) -> int:
        """Train to the end (exit code 0) or to an agreed stop with a checkpoint (75)."""
        self._validate_at_start()
        windows = self.loader.windows(self.state.step)
        while self.state.step < self.total:
            # Requests travel with the gradients: all ranks learn of them at the same step.
            out = self.engine.train_window(
                next(windows), self.state.step, self.total, self.stop.poll()
            )
            self.state = self.state.advance()
            self._record(out)
            # A stop comes before this step's validation, and `_done` validates the last step
            # itself.
            if out.stop or self.state.step == self.total:
                break
            validated = self._due(self.config.train.eval_every_steps)
            judged = self.state.judge(self._validate()) if validated else self.state
            wanted = out.save or self._due(self.config.checkpoint.every_steps)
            if wanted or judged.best_step == judged.step:
                self._save(judged)
        return self._stopped() if self.state.step < self.total else self._done()

    def _save(self, judged: RunState) -> None:
        """Write a checkpoint and take its state over: the best step is always one on the disk."""
        if self.checkpoints.save(judged):
            self.state = judged

    def _due(self, every: int) -> bool:
        return bool(every) and self.state.step % every == 0

    def _validate(self) -> dict[str, float]:
        world = self.engine.world
        batches = eval_batches(self.valid, MicroSize.of(self.config), world.size, world.rank)
        values = self.engine.evaluate(batches)
        self.metrics.record(self.state.step, "valid", values)
        return values

    def _validate_at_start(self) -> None:
        if self.state.step == 0:
            self.state = replace(self.state, valid_before=self._validate())
        if self.state.owes_validation and self.state.step < self.total:
            self.state = self.state.judge(self._validate())  # the checkpoint is there already

    def _record(self, out: StepResult) -> None:
        step = self.state.step
        self.metrics.tick()
        if step in (1, self.total) or step % self.config.log.every_steps == 0:
            self.metrics.record(step, "train", out.metrics())

    def _stopped(self) -> int:
        # Validation may outlast the grace period of whoever stops the run, so it waits for the
        # next start.
        owes = self._due(self.config.train.eval_every_steps)
        self.checkpoints.save(replace(self.state, owes_validation=owes), final=True)
        get_logger().warning(
            f"stopped at step {self.state.step} of {self.total}"
            f" ({self.stop.reason or 'asked by a rank'})"
        )
        return EXIT_STOPPED

    def _done(self) -> int:
        before = self.state.valid_before
        after = self._validate() if self.state.step or before is None else before
        self.state = self.state.judge(after)
        self.checkpoints.save(self.state, final=True)
        if self.engine.world.rank == 0:
            trained = sum(parameter.numel() for parameter in self.engine.trainables.parameters())
            summary = {
                "step": self.state.step,
                "valid_before": self.state.valid_before,
                "valid_after": after,
                "best_step": self.state.best_step,
                "world_size": self.engine.world.size,
                "trained_parameters": trained,
            }
            # Last of all: whoever finds this file may rely on the checkpoint.
            write_whole(self.folder.done, json.dumps(summary, indent=2))
            get_logger().info(f"done: {self.state.step} steps; run folder {self.folder}")
        return EXIT_DONE
