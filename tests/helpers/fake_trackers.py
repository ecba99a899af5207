"""Stands in for wandb, mlflow and trackio: what their servers would hold is a file of JSON lines.

The file outlives a killed process, as a server does. `steps_of` reads the history of a run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAMES = ("wandb", "mlflow", "trackio")


class Server:
    """Keeps what it is told, and fails or hangs at steps that a test names."""

    def __init__(self, path: Path, fails_at: int | None = None, hangs_at: int | None = None):
        self.path, self.fails_at, self.hangs_at = path, fails_at, hangs_at

    def tell(self, service: str, what: str, run: str, **more: Any) -> None:
        if what == "log" and more["step"] == self.hangs_at:
            time.sleep(3600)
        if what == "log" and more["step"] == self.fails_at:
            key = os.environ.get("WANDB_API_KEY")
            raise ConnectionError(f"https://me:{key}@server refused {key}\nand more")
        line = {"service": service, "what": what, "run": run, "pid": os.getpid(), **more}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lose(self, service: str, lines: int) -> None:
        """Forget the last lines of a service, which a killed process had in memory."""
        told = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        own = [line for line in told if f'"service": "{service}", "what": "log"' in line]
        kept = [line for line in told if line not in own[-lines:]]
        self.path.write_text("".join(kept), encoding="utf-8")

    def told(self, service: str, what: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if (line["service"], line["what"]) == (service, what)]

    def steps_of(self, service: str) -> list[tuple[int, dict[str, float]]]:
        """(step, numbers) of each call, in order."""
        return [(line["step"], line["values"]) for line in self.told(service, "log")]


class _Run:
    """A run of wandb or trackio."""

    url, offline = "https://server/run", False
    settings = SimpleNamespace(sync_dir="run-now")

    def __init__(self, server: Server, service: str, run: str, **options: Any) -> None:
        self._server, self._service, self._run = server, service, run
        logged = [line for line in server.told(service, "log") if line["run"] == run]
        # As wandb and trackio count.
        self.starting_step = max((line["number"] for line in logged), default=-1) + 1
        self._next_step = max((line["step"] for line in logged), default=-1) + 1
        server.tell(service, "open", run, **options)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._server.tell(self._service, "define", self._run, name=name, step_metric=step_metric)

    def log(self, values: Mapping[str, float], step: int, commit: bool | None = None) -> None:
        own = {key: value for key, value in values.items() if key != "step"}
        number, step = step, int(values.get("step", step))
        self._server.tell(self._service, "log", self._run, number=number, step=step, values=own)

    def finish(self) -> None:
        self._server.tell(self._service, "close", self._run)


class _Client:
    """MLflow's client."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        run = f"from-the-server-{len(self._server.told('mlflow', 'open'))}"
        self._server.tell("mlflow", "open", run, name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self._server.tell("mlflow", "status", run, status=status)

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        if metrics:
            [step] = {metric.step for metric in metrics}
            values = {metric.key: metric.value for metric in metrics}
            self._server.tell("mlflow", "log", run, step=step, values=values)

    def set_terminated(self, run: str) -> None:
        self._server.tell("mlflow", "close", run)


def modules(server: Server) -> dict[str, ModuleType]:
    """The packages by name, for `sys.modules`."""
    server.path.touch()
    wandb, mlflow, entities, trackio = map(
        ModuleType, ("wandb", "mlflow", "mlflow.entities", "trackio")
    )

    def wandb_init(id: str, project: str, resume: str, settings: Any, **options: Any) -> _Run:
        return _Run(server, "wandb", id, project=project, resume=resume, **options)

    def trackio_init(name: str, project: str, resume: str, **options: Any) -> _Run:
        return _Run(server, "trackio", name, project=project, resume=resume, **options)

    wandb.init, wandb.Settings = wandb_init, SimpleNamespace  # type: ignore[attr-defined]
    trackio.init = trackio_init  # type: ignore[attr-defined]
    mlflow.MlflowClient = lambda: _Client(server)  # type: ignore[attr-defined]
    mlflow.entities = entities  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value, step=step
    )
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)  # type: ignore[attr-defined]
    return {"wandb": wandb, "mlflow": mlflow, "mlflow.entities": entities, "trackio": trackio}


def install(server: Server) -> None:
    """Put the packages into this process, which ends with the test."""
    sys.modules.update(modules(server))
