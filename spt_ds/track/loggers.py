"""One logger per service: it opens or continues the service's run and passes numbers on.

Each is opened and used on one thread of its own, which may block or raise as it likes. Addresses
and keys come from the environment variables that each service documents; none is an option here.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spt_ds.config.load import options_of
from spt_ds.config.schema import Config
from spt_ds.files import write_whole
from spt_ds.json_input import read_json
from spt_ds.run.folder import RunFolder
from spt_ds.run.metrics_file import Mark

PROJECT = "spt_ds"  # where the environment names no project or experiment
# Servers of MLflow refuse more: characters of a parameter, and parameters and metrics of one call.
MLFLOW_PARAMETER_CHARACTERS, MLFLOW_PARAMETERS, MLFLOW_METRICS = 500, 100, 1000


class Logger(Protocol):
    """Where the numbers of a run go."""

    where: str
    """Where a user finds them."""
    has: Mark
    """The last line that is there already, as far as can be known; what follows it is sent."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of `step`, by names such as `train/loss`."""

    def close(self) -> None:
        """Pass on what is left, and end the run."""


@dataclass(frozen=True)
class Opening:
    """What a logger is opened with."""

    config: Config
    folder: RunFolder
    id: str | None
    """What the service knows the run by; None in its first start."""
    keep: Callable[[str], None]
    """Keeps such an id for later starts."""
    first_step: int
    """The first step whose lines this start makes (again)."""
    sent: Mark
    """The last line that an earlier start handed over. Where the service keeps lines in memory, a
    kill may have lost some of them.
    """

    def own_id(self, variable: str) -> str:
        """The kept id, or that of an environment variable, or a new one, which is kept first: a
        start that is killed while it opens leaves no second run.
        """
        found = self.id or os.environ.get(variable) or uuid.uuid4().hex[:16]
        if found != self.id:
            self.keep(found)
        return found


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {opening.folder.tensorboard}"
        # Readers drop the events of earlier starts from this step on, whole steps.
        self.has = min(opening.sent, Mark(opening.first_step - 1, True))
        self._writer = SummaryWriter(str(opening.folder.tensorboard), purge_step=opening.first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # By itself it flushes every two minutes, and a killed run would lose these steps.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=opening.own_id("WANDB_RUN_ID"),
            resume="allow",
            name=opening.config.name,
            dir=str(opening.folder.path),
            config=opening.config.model_dump(mode="json"),
            # What the terminal shows stays there, and nobody is asked for a key.
            settings=wandb.Settings(
                console="off", silent=True, login_timeout=1, allow_val_change=True
            ),
        )
        self._torn = opening.folder.trackers / "wandb-offline.json"
        self._offline_folder = Path(self._run.settings.sync_dir)
        self.where = str(self._offline_folder if self._run.offline else self._run.url)
        self.has = self._has_offline(opening) if self._run.offline else self._has_online()
        # Its own counter only goes up, and here it numbers the lines.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _has_online(self) -> Mark:
        """The last line that the server knows, by which it lets a run resume."""
        last = self._run.starting_step - 1
        return Mark(last // 2, bool(last % 2))

    def _has_offline(self, opening: Opening) -> Mark:
        """The last line before the newest folder that a kill has torn.

        The folder is written in blocks, so a kill loses lines of minutes. It gets another name,
        which `wandb sync` does not look for, and the lines are written again.
        """
        has = opening.sent
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            torn = read_json(self._torn)
            has = Mark(*torn["has"])
            folder = opening.folder.path / "wandb" / Path(torn["folder"]).name
            folder.rename(folder.with_name(f"torn-{folder.name}"))
        record = {"folder": self._offline_folder.name, "has": list(has)}
        write_whole(self._torn, json.dumps(record))
        return has

    def log(self, step: int, values: Mapping[str, float]) -> None:
        validates = any(name.startswith("valid/") for name in values)
        self._run.log({"step": step, **values}, step=2 * step + validates, commit=True)

    def close(self) -> None:
        self._run.finish()
        self._torn.unlink(missing_ok=True)


class Mlflow:
    """MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID."""

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        kept = opening.id or os.environ.get("MLFLOW_RUN_ID")
        self._run_id = kept or self._new_run(opening)
        if opening.id != self._run_id:
            opening.keep(self._run_id)
        self.where, self.has = f"run {self._run_id}", opening.sent
        self._client.update_run(self._run_id, status="RUNNING")

    def _new_run(self, opening: Opening) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            experiment_id = self._client.create_experiment(name)
        else:
            experiment_id = experiment.experiment_id
        run = self._client.create_run(experiment_id, run_name=opening.config.name)
        # Once only: a parameter cannot change, and a resumed run may change some options.
        options = options_of(opening.config, "json")
        parameters = [
            Param(key, str(value)[:MLFLOW_PARAMETER_CHARACTERS]) for key, value in options.items()
        ]
        for first in range(0, len(parameters), MLFLOW_PARAMETERS):
            batch = parameters[first : first + MLFLOW_PARAMETERS]
            self._client.log_batch(run.info.run_id, params=batch)
        run_id: str = run.info.run_id
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        for first in range(0, len(metrics), MLFLOW_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + MLFLOW_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class Trackio:
    """trackio; TRACKIO_DIR, TRACKIO_SPACE_ID, HF_TOKEN."""

    def __init__(self, opening: Opening) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{opening.config.name}-{opening.own_id('TRACKIO_RUN_ID')}"
        self.where = f"run {name} of project {project}"
        self._run = trackio.init(
            project=project,
            name=name,
            resume="allow",
            config=options_of(opening.config, "json"),
        )
        # It writes twice a second, so the last lines before a kill may not be there.
        self.has = min(opening.sent, Mark(self._run._next_step - 1, True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Opening], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
