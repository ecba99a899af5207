"""The log of a run that was killed and goes on: each step and each validation once."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from spt_ds.config.schema import Config
from spt_ds.engine.metrics import Metrics
from spt_ds.run.folder import RunFolder
from spt_ds.track.trackers import Trackers


def nobody(folder: RunFolder) -> Trackers:
    return Trackers([], Config(), folder)


LINES = [(0, "valid"), (1, "train"), (2, "train"), (2, "valid"), (3, "train")]


@pytest.mark.parametrize(
    ("start", "revalidates", "kept"),
    [
        (2, False, LINES[:4]),
        (2, True, LINES[:3]),
        (0, True, []),
        (3, False, LINES),
        (3, True, LINES),
    ],
)
def test_what_is_done_again_is_forgotten(
    tmp_path: Path, start: int, revalidates: bool, kept: list[tuple[int, str]]
) -> None:
    folder = RunFolder(tmp_path)
    text = "".join(
        json.dumps({"step": step, "kind": kind, "time": 1.0}) + "\n" for step, kind in LINES
    )
    folder.metrics.write_text(text + '{"step": 1, "ki', encoding="utf-8")
    Metrics(folder, 4, start, revalidates=revalidates, active=True, trackers=nobody(folder))
    found = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["kind"]) for line in found] == kept


def test_a_damaged_line_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good = b'{"step": 1, "kind": "train", "time": 1.0}\n'
    damaged = [b'{"step": 1, "kind": "tr\xff"}\n', b"[" * 5000 + b"\n", b"[]\n", b'{"step": "x"}\n']
    folder.metrics.write_bytes(good + b"".join(damaged) + good)
    Metrics(folder, 4, 3, revalidates=False, active=True, trackers=nobody(folder))
    assert folder.metrics.read_bytes() == good + good


def test_a_full_disk_costs_lines_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the run ends, nor is a half line left to which the next would be glued."""

    class Full:
        def write(self, text: str = "") -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        flush = write

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            raise OSError

        encoding = "utf-8"

    monkeypatch.setattr("sys.stderr", Full())
    folder = RunFolder(tmp_path)
    metrics = Metrics(folder, 4, 0, revalidates=True, active=True, trackers=nobody(folder))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 5):
        metrics.tick()
        full = step in (2, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else limit[0], limit[1]))
        try:
            metrics.record(step, "train" if step % 2 else "valid", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    metrics.close()
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 4]


def test_the_event_file_holds_each_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path)
    trackers = Trackers(["tensorboard"], Config(), folder)
    metrics = Metrics(folder, 4, 0, revalidates=True, active=True, trackers=trackers)
    metrics.record(1, "train", {"loss": 2.5, "prompt_usage": [1, 2]})
    metrics.record(2, "valid", {"nll": 1.5})
    metrics.close()
    events = accumulator.EventAccumulator(str(folder.tensorboard))
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    values = {name: [(event.step, event.value) for event in found[name]] for name in found}
    assert values == {
        "train/loss": [(1, 2.5)],
        "train/prompt_usage/0": [(1, 1)],
        "train/prompt_usage/1": [(1, 2)],
        "valid/nll": [(2, 1.5)],
    }
