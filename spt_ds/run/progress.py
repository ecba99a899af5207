"""Where a run stands, from the files of its folder alone: also of one that another machine trains.

Nothing of torch is imported, and nothing in the folder is trusted: what is no number is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spt_ds.files import sha256
from spt_ds.json_input import read_json
from spt_ds.run.folder import RunFolder
from spt_ds.run.lock import lives
from spt_ds.run.metrics_file import History

State = Literal["training", "stopped", "done", "dead"]
DEPTH = 4  # folders below one that is given in which runs are looked for
SCORES = ("f1_spt", "bleu")  # keys of scores.json
RECENT = 20  # lines of training over which the speed is taken


@dataclass(frozen=True)
class Progress:
    """One run folder at one moment."""

    run: str
    """Its path, as it was given."""
    state: State
    """`dead`: the process that trained did not end by itself; `stopped`: it did, before the end."""
    step: int
    """The newest step of metrics.jsonl."""
    total_steps: int | None
    """None where no start came so far as to know."""
    age_s: float | None
    """Seconds since the newest sign of the run: a line of its log, or its end."""
    best_step: int | None
    best_nll: float | None
    """Validation loss of the selected prompt at its best step, nats per token."""
    steps_per_s: float | None
    """Over the newest lines of this start."""
    left_s: float | None
    """Seconds to the last step at this speed; None where it does not train."""
    scores: dict[str, float]
    """F1 and BLEU in percent where the replies that are there are scored."""


class RunWatch:
    """Looks at one run folder again and again; only what is new in its log is read."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = RunFolder(run)
        self.history = History(self.folder.metrics)

    def look(self, *, scores: bool = False) -> Progress:
        """Where the run stands now. Raises OSError where the disk refuses."""
        self.history.look()
        start, done = _tree(self.folder.start), _tree(self.folder.done)
        last, best = self.history.last, self.history.best
        # The log may hold every tenth step only, so the end is known from elsewhere.
        step = max(last.step if last else 0, _number(done.get("step")) or 0)
        total = _number(start.get("total_steps")) or _number(done.get("step"))
        state = self._state(bool(done))
        speed = self._steps_per_s(_number(start.get("time")) or 0)
        left = None
        if state == "training" and speed and total:
            left = max(0.0, (total - step) / speed)
        return Progress(
            run=str(self.run),
            state=state,
            step=int(step),
            total_steps=None if total is None else int(total),
            age_s=self._age_s(),
            best_step=best.step if best else None,
            best_nll=best.values["nll_selected"] if best else None,
            steps_per_s=speed,
            left_s=left,
            scores=_scores(self.folder) if scores else {},
        )

    def _state(self, done: bool) -> State:
        living = lives(self.run)
        if living:
            return "training"
        if done:
            return "done"
        return "stopped" if living is None else "dead"

    def _age_s(self) -> float | None:
        times = []
        for path in (self.folder.metrics, self.folder.done, self.folder.start):
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(0.0, time.time() - max(times)) if times else None

    def _steps_per_s(self, started: float) -> float | None:
        # A pause between two starts is no part of the speed.
        lines = [line for line in self.history.steps if line.time >= started][-RECENT:]
        if len(lines) < 2:
            return None
        steps, seconds = lines[-1].step - lines[0].step, lines[-1].time - lines[0].time
        return steps / seconds if steps > 0 and seconds > 0 else None


def run_folders(given: Path) -> Iterator[Path]:
    """Yield `given` where it is a run folder, and else those below it, by name."""
    root = str(given)
    for place, folders, files in os.walk(root):
        below = len(Path(place).relative_to(root).parts)
        if "config.yaml" in files and ("checkpoints" in folders or "metrics.jsonl" in files):
            yield Path(place)
            folders.clear()
        elif below >= DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _scores(folder: RunFolder) -> dict[str, float]:
    scores, replies = _tree(folder.replies.scores), folder.replies.predictions
    values, settings = scores.get("values"), scores.get("settings")
    if not isinstance(values, dict) or not isinstance(settings, dict):
        return {}
    # Those of earlier replies say nothing of the ones that are there.
    if replies.is_file() and settings.get("predictions_sha256") != sha256(replies):
        return {}
    found = {key: _number(values.get(key)) for key in SCORES}
    return {key: value for key, value in found.items() if value is not None}


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _number(value: object) -> float | None:
    finite = type(value) in (int, float) and abs(value) < float("inf")  # type: ignore[arg-type]
    return value if finite else None  # type: ignore[return-value]
