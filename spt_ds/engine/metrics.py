"""Metrics of a run: metrics.jsonl, a progress bar and, on request, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spt_ds.errors import ConfigError
from spt_ds.files import append_whole, write_whole
from spt_ds.json_input import load_json
from spt_ds.log import ErrorStream, say_once
from spt_ds.run.folder import RunFolder


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
        tensorboard: bool,
    ) -> None:
        """Go on from `start_step`, whose validation this run makes (again) if it `revalidates`."""
        self.active = active
        self._bar: Any = None
        self._board: Any = None
        if not active:
            return
        self._path = folder.metrics
        self._forget_after(start_step, revalidates)
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
        if tensorboard:
            self._board = _writer(folder.tensorboard)

    def _forget_after(self, step: int, revalidates: bool) -> None:
        """Drop lines of what a killed run did after its last checkpoint: it is done again."""
        if self._path.is_file():
            lines = self._path.read_bytes().split(b"\n")
            # As pairs, because a step's training line (False) comes before its validation (True).
            first_lost = (step, True) if revalidates else (step + 1, False)
            kept = [line for line in lines if line and _mark(line) < first_lost]
            write_whole(self._path, "".join(f"{line.decode()}\n" for line in kept))

    def tick(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update(1)

    def record(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append `values` of `step` (1 is the first) as one line of kind `train` or `valid`."""
        if not self.active:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        try:
            append_whole(self._path, (json.dumps(line) + "\n").encode())
        except OSError as error:
            # A full disk stops a run where checkpoint.on_save_error says so, not here.
            say_once(
                f"{self._path}: lines are lost ({error.strerror}); training continues",
                logging.WARNING,
            )
        shown = {key: values[key] for key in ("loss", "nll", "nll_selected") if key in values}
        if kind == "train":
            self._bar.set_postfix(
                {key: f"{value:.4f}" for key, value in shown.items()}, refresh=False
            )
        else:
            text = " ".join(f"{key} {value:.4f}" for key, value in shown.items())
            tqdm.write(f"step {step} {kind}: {text}", file=ErrorStream())
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Finish bar and event file."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


def _mark(line: bytes) -> tuple[float, bool]:
    """(step, whether it is its validation) of one line; infinite where it is cut or damaged."""
    try:
        found = load_json(line)
        return float(found["step"]), found["kind"] == "valid"
    except (ValueError, KeyError, TypeError):
        return math.inf, True


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard: the tensorboard package is missing; install the extra `tensorboard`"
            " or set it to false"
        ) from error
    return SummaryWriter(str(folder))
