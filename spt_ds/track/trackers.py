"""The trackers of a run: each gets every line of metrics.jsonl once, and none can stop the run.

metrics.jsonl is the record; a tracker is a copy of it. Beside the run's id each tracker's file in
the run folder holds the mark of the last line that it got. So a start that resumes sends what a
killed one could not, and does not send again what was sent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from spt_ds.config.schema import Config
from spt_ds.display import shortened
from spt_ds.errors import ConfigError
from spt_ds.files import write_whole
from spt_ds.json_input import read_json
from spt_ds.log import get_logger, say_once
from spt_ds.run.folder import RunFolder
from spt_ds.run.metrics_file import Line, Mark
from spt_ds.track.loggers import LOGGERS, Logger, Opening

# Their parts that loggers use, so that a package that is there and broken is found, too.
MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
WAITING_LINES = 10_000  # for a service that hangs: some 10 MB
CLOSE_S = 30.0  # for all trackers together, within the grace period of a cluster
NOTHING = Mark(-1, False)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


def chosen(asked: Sequence[str]) -> list[str]:
    """The trackers that `log.trackers` means here, with their packages imported.

    Raises ConfigError where one that is named is missing, with the extra that installs it.
    """
    names = []
    for name in dict.fromkeys(asked):
        wanted = "tensorboard" if name == "auto" else name
        try:
            # Not on the tracker's thread: a data worker that is forked in the midst of an import
            # could never import that module itself.
            importlib.import_module(MODULES[wanted])
        # A package that does not fit another one breaks in any way.
        except Exception as error:
            if name == "auto":
                get_logger().debug("log.trackers: auto: no TensorBoard (%s)", redacted(error))
                continue
            raise ConfigError(
                f"log.trackers: {name} cannot be imported ({redacted(error)}); install the extra"
                f" `{name}` (pip install 'spt-ds[{name}]'), or leave it out"
            ) from error
        names.append(wanted)
    return list(dict.fromkeys(names))


def redacted(error: BaseException) -> str:
    """What an error says on one line, without the keys of the environment or of an address."""
    text = " ".join(str(error).split())
    for variable, value in os.environ.items():
        # A short one would take letters out of every word, and is none.
        if len(value) >= 6 and _SECRET.search(variable):
            text = text.replace(value, "***")
    return shortened(f"{type(error).__name__}: {_USER_OF_ADDRESS.sub('***@', text)}")


class Trackers:
    """All trackers of one run, on the rank that writes. No method blocks or raises."""

    def __init__(self, names: Sequence[str], config: Config, folder: RunFolder) -> None:
        """`names` are those of `chosen`."""
        self._names, self._config, self._folder = names, config, folder
        self._threads: list[_Tracker] = []

    def start(self, kept: list[Line], first: Mark) -> None:
        """Begin to send: first what of the `kept` lines a tracker has not got.

        `first` is the mark of the first line that this start makes, perhaps again.
        """
        with contextlib.suppress(OSError):  # each tracker says it when it opens
            if self._names:
                self._folder.trackers.mkdir(exist_ok=True)
        for name in self._names:
            self._threads.append(_Tracker(name, self._config, self._folder, kept, first))
            self._threads[-1].start()

    def log(self, line: Line) -> None:
        """Pass a line on."""
        for thread in self._threads:
            thread.put(line)

    def close(self) -> None:
        """Wait a while until the trackers have all lines, and end their runs."""
        for thread in self._threads:
            thread.put(None)
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread.lost:
                continue
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                thread.lose(f"it did not end within {CLOSE_S:.0f} s")
        self._threads.clear()


class _Tracker(threading.Thread):
    """Feeds one tracker. A daemon: a service that hangs keeps no process alive."""

    def __init__(
        self, name: str, config: Config, folder: RunFolder, kept: list[Line], first: Mark
    ) -> None:
        super().__init__(daemon=True, name=name)
        self._record = _Record(folder.trackers / f"{name}.json")
        self._kept = kept
        self._lines: queue.Queue[Line | None] = queue.Queue(WAITING_LINES)
        self.lost = False
        self._losing = threading.Lock()
        self._opening = Opening(
            config, folder, self._record.id, self._record.keep, first.step, self._record.sent
        )

    def put(self, line: Line | None) -> None:
        if self.lost:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lose("it takes no lines")

    def lose(self, why: str) -> None:
        """Say once that this tracker gets no more."""
        with self._losing:
            if self.lost:
                return
            say_once(
                f"log.trackers: {self.name} gets no more lines ({why}); training continues, and"
                " metrics.jsonl has them all",
                logging.WARNING,
            )
            # Last: a process that sees a lost tracker may end, and the message with it.
            self.lost = True

    def run(self) -> None:
        logger: Logger | None = None
        try:
            logger = LOGGERS[self.name](self._opening)
            get_logger().info(f"log.trackers: {self.name}: {logger.where}")
            self._record.sent = logger.has
            for line in self._kept:
                self._send(logger, line)
            self._kept = []
            while not self.lost and (line_or_end := self._lines.get()) is not None:
                self._send(logger, line_or_end)
            logger.close()
        # Whatever a service raises: a run of days does not end because of a copy of its log.
        except Exception as error:
            self.lose(redacted(error))
            with contextlib.suppress(Exception):
                if logger is not None:
                    logger.close()

    def _send(self, logger: Logger, line: Line) -> None:
        if line.mark > self._record.sent:
            logger.log(line.step, line.numbers())
            self._record.advance(line.mark)


class _Record:
    """What a start must know of a tracker that an earlier start used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id: str | None = None
        self.sent = NOTHING
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            tree = read_json(path)
            step, validates = tree["sent"]
            self.id, self.sent = tree["id"], Mark(int(step), bool(validates))

    def keep(self, run_id: str) -> None:
        self.id = run_id
        self._write()

    def advance(self, mark: Mark) -> None:
        self.sent = mark
        self._write()

    def _write(self) -> None:
        # Without it a later start sends some lines twice, which is no reason to send none now.
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps({"id": self.id, "sent": list(self.sent)}))
