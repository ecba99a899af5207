"""metrics.jsonl as lines: where each one stands in a run, and a reader that follows a growing file.

No torch is imported: the commands that watch runs read it too.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spt_ds.files import write_whole
from spt_ds.json_input import load_json

NEWEST = 400  # lines of training that are kept: more than a terminal is wide
BLOCK_BYTES = 16 << 20


class Mark(NamedTuple):
    """The place of a line: a step's training line comes before its validation."""

    step: int
    validates: bool


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps taken; 1 is the first."""
    kind: str
    """`train` or `valid`."""
    time: float
    """Seconds since 1970."""
    values: dict[str, Any] = field(default_factory=dict)
    """Losses in nats per token, `grad_norm`, `lr`, and `prompt_usage` as a list of counts."""

    @property
    def mark(self) -> Mark:
        return Mark(self.step, self.kind == "valid")

    @classmethod
    def parse(cls, content: bytes) -> Line | None:
        """The line that the bytes hold; None where they are cut or damaged."""
        try:
            tree = load_json(content)
        except ValueError:
            return None
        if not isinstance(tree, dict):
            return None
        step, kind, time = (tree.pop(key, None) for key in ("step", "kind", "time"))
        # A bool is an int, too.
        if type(step) is not int or type(kind) is not str or type(time) not in (int, float):
            return None
        return cls(step, kind, time, tree)

    def content(self) -> bytes:
        """The line as it is written."""
        tree = {"step": self.step, "kind": self.kind, "time": self.time, **self.values}
        return (json.dumps(tree) + "\n").encode()

    def numbers(self) -> dict[str, float]:
        """Every number by a name such as `train/loss`, or `train/prompt_usage/3` in a list."""
        found: dict[str, float] = {}
        for key, value in self.values.items():
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            for place, part in parts:
                if type(part) in (int, float):
                    name = f"{self.kind}/{key}" if place is None else f"{self.kind}/{key}/{place}"
                    found[name] = part
        return found


def forget(path: Path, first_lost: Mark) -> list[Line]:
    """Drop the lines from `first_lost` on, and damaged ones; return those that stay.

    A killed run made them after its last checkpoint: they are made again.
    """
    if not path.is_file():
        return []
    contents = path.read_bytes().split(b"\n")
    lines = [(content, line) for content in contents if (line := Line.parse(content))]
    kept = [(content, line) for content, line in lines if line.mark < first_lost]
    write_whole(path, "".join(f"{content.decode()}\n" for content, _ in kept))
    return [line for _, line in kept]


class History:
    """The lines of a metrics.jsonl that may still grow: every validation, and the newest steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.validations: list[Line] = []
        self.steps: deque[Line] = deque(maxlen=NEWEST)
        self._inode, self._read = 0, 0

    def look(self) -> None:
        """Read what was added since the last look. Raises OSError where the disk refuses."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._begin(0)
            return
        with file:
            status = os.fstat(file.fileno())
            # A start that resumes writes the file anew, without the lines that it makes again.
            if status.st_ino != self._inode or status.st_size < self._read:
                self._begin(status.st_ino)
            file.seek(self._read)
            while content := file.read(BLOCK_BYTES):
                whole = content[: content.rfind(b"\n") + 1]
                if not whole and len(content) < BLOCK_BYTES:
                    break  # the last line is being written
                self._take(whole.split(b"\n"))
                self._read += len(whole or content)
                file.seek(self._read)

    def _begin(self, inode: int) -> None:
        self.validations.clear()
        self.steps.clear()
        self._inode, self._read = inode, 0

    def _take(self, contents: list[bytes]) -> None:
        marked = b'"kind": "valid"'
        validations = [content for content in contents if marked in content]
        # A long run has 100,000 lines of training, and parsing all of them takes seconds.
        steps = [content for content in contents if content and marked not in content][-NEWEST:]
        self.validations += filter(None, map(Line.parse, validations))
        self.steps += filter(None, map(Line.parse, steps))

    @property
    def last(self) -> Line | None:
        """The line of the highest step."""
        lines = [*self.validations[-1:], *list(self.steps)[-1:]]
        return max(lines, key=lambda line: line.mark, default=None)

    @property
    def best(self) -> Line | None:
        """The validation with the lowest loss of the selected prompt, as the run judges it."""
        judged = [line for line in self.validations if line.step and _loss(line) < math.inf]
        return min(judged, key=_loss, default=None)


def _loss(line: Line) -> float:
    value = line.values.get("nll_selected")
    return value if isinstance(value, int | float) and math.isfinite(value) else math.inf
