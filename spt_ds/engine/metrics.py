"""Metrics of a run: metrics.jsonl, a progress bar, and the trackers that copy them."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import Any

from tqdm import tqdm

from spt_ds.files import append_whole, write_whole
from spt_ds.log import ErrorStream, say_once
from spt_ds.run.folder import RunFolder
from spt_ds.run.metrics_file import Line, Mark, forget
from spt_ds.track.trackers import Trackers


class Metrics:
    """Writes on rank 0 only; on the others every call does nothing."""

    def __init__(
        self,
        folder: RunFolder,
        total_steps: int,
        start_step: int,
        *,
        revalidates: bool,
        active: bool,
        trackers: Trackers,
    ) -> None:
        """Go on from `start_step`, whose validation this run makes (again) if it `revalidates`."""
        self.active = active
        self._bar: Any = None
        self._trackers = trackers
        if not active:
            return
        self._path = folder.metrics
        first = Mark(start_step, True) if revalidates else Mark(start_step + 1, False)
        kept = forget(self._path, first)
        trackers.start(kept, first)
        start = {"total_steps": total_steps, "first_step": start_step, "time": time.time()}
        with contextlib.suppress(OSError):  # only those who watch the run read it
            write_whole(folder.start, json.dumps(start))
        stream = ErrorStream()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="train",
            file=stream,
            dynamic_ncols=True,
            mininterval=0.5 if stream.isatty() else 20.0,
        )

    def tick(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update(1)

    def record(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append `values` of `step` (1 is the first) as one line of kind `train` or `valid`."""
        if not self.active:
            return
        line = Line(step, kind, round(time.time(), 3), values)
        try:
            append_whole(self._path, line.content())
        except OSError as error:
            # A full disk stops a run where checkpoint.on_save_error says so, not here.
            say_once(
                f"{self._path}: lines are lost ({error.strerror}); training continues",
                logging.WARNING,
            )
        self._trackers.log(line)
        shown = {key: values[key] for key in ("loss", "nll", "nll_selected") if key in values}
        if kind == "train":
            self._bar.set_postfix(
                {key: f"{value:.4f}" for key, value in shown.items()}, refresh=False
            )
        else:
            text = " ".join(f"{key} {value:.4f}" for key, value in shown.items())
            tqdm.write(f"step {step} {kind}: {text}", file=ErrorStream())

    def close(self) -> None:
        """Finish the bar, and wait a while for the trackers."""
        if self._bar is not None:
            self._bar.close()
        self._trackers.close()
