"""Requests to stop or save: signals, files in the run folder, a wall-clock budget.

Each rank only collects what it has seen; the engine adds the requests of all ranks to the reduction
of the gradients, so that every rank learns of them at the same step boundary.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from spt_ds.run.folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """Collects requests on one rank.

    `max_hours` counts from `started_s` (time.monotonic()); 0 sets no limit.
    """

    def __init__(
        self,
        folder: RunFolder,
        max_hours: float,
        *,
        watch_files: bool,
        started_s: float | None = None,
    ) -> None:
        self.folder = folder
        started_s = time.monotonic() if started_s is None else started_s
        self.deadline_s = started_s + max_hours * 3600 if max_hours else None
        self.watch_files = watch_files  # one rank looks, the reduction tells the others
        self.reason = ""

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1; call from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            # Asked twice by hand: end now. The last checkpoint is the state of the run.
            os._exit(130)
        # Only noted: the signal may have come in the middle of a collective, and the loop acts
        # after it.
        self.reason = signal.Signals(number).name

    def poll(self) -> tuple[float, float]:
        """Return (stop, save), each 1.0 when requested; a STOP or SAVE file that is seen goes."""
        if self.deadline_s is not None and time.monotonic() > self.deadline_s:
            self.reason = self.reason or "wall-clock budget"
        save = self.watch_files and _take(self.folder.save)
        if self.watch_files and _take(self.folder.stop):
            self.reason = self.reason or "STOP file"
        return float(bool(self.reason)), float(save)


def _take(path: Path) -> bool:
    there = path.exists()
    if there:
        # The user may take it back in the same moment.
        path.unlink(missing_ok=True)
    return there
