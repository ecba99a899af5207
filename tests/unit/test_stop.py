"""Requests to stop or save on one rank: signals, files, a budget; a second SIGINT ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds.engine.stop import STOP_SIGNALS, StopRequests
from spt_ds.run.folder import RunFolder


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_request_nothing_is_asked(tmp_path: Path) -> None:
    stop = StopRequests(RunFolder(tmp_path), 0.0, watch_files=True)
    assert stop.poll() == (0.0, 0.0)
    assert stop.reason == ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_ask_to_stop_and_keep_asking(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopRequests(RunFolder(tmp_path), 0.0, watch_files=False)
    stop.install()
    os.kill(os.getpid(), number)
    assert stop.poll() == (1.0, 0.0)
    assert stop.poll() == (1.0, 0.0)
    assert stop.reason == number.name


def test_two_kinds_of_signals_still_wait_for_the_step(tmp_path: Path) -> None:
    """A scheduler's SIGTERM after one ctrl-C is no second ctrl-C."""
    stop = StopRequests(RunFolder(tmp_path), 0.0, watch_files=False)
    stop.install()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll() == (1.0, 0.0)


def test_files_are_taken_away_once_seen(tmp_path: Path) -> None:
    stop = StopRequests(RunFolder(tmp_path), 0.0, watch_files=True)
    (tmp_path / "SAVE").touch()
    assert stop.poll() == (0.0, 1.0)
    assert stop.poll() == (0.0, 0.0)
    (tmp_path / "STOP").touch()
    (tmp_path / "SAVE").touch()
    assert stop.poll() == (1.0, 1.0)
    assert stop.reason == "STOP file"
    assert list(tmp_path.iterdir()) == []


def test_one_rank_alone_looks_for_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert StopRequests(RunFolder(tmp_path), 0.0, watch_files=False).poll() == (0.0, 0.0)
    assert (tmp_path / "STOP").exists()


def test_a_budget_is_wall_clock_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequests(RunFolder(tmp_path), 2.0, watch_files=False)
    now += 2 * 3600
    assert stop.poll() == (0.0, 0.0)
    now += 1
    assert stop.poll() == (1.0, 0.0)
    assert stop.reason == "wall-clock budget"


def test_a_budget_includes_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large base takes its share of a job's time limit."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequests(RunFolder(tmp_path), 2.0, watch_files=False, started_s=now - 3600)
    now += 3601
    assert stop.poll() == (1.0, 0.0)


TRAINING = """
import sys, time
from pathlib import Path
from spt_ds.engine.stop import StopRequests
from spt_ds.run.folder import RunFolder
stop = StopRequests(RunFolder(Path(sys.argv[1])), 0.0, watch_files=False)
stop.install()
print("ready", flush=True)
end = time.monotonic() + 30
while time.monotonic() < end:  # a step that never ends
    time.sleep(0.01)
    if stop.reason and sys.argv[2] == "polite":
        sys.exit(75)
    if stop.reason:
        print("asked", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, None)])
def test_a_second_sigint_ends_at_once(
    tmp_path: Path, number: signal.Signals, code: int | None
) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path), "busy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"  # the first one only asks
        process.send_signal(number)
        if code is None:  # a scheduler may send SIGTERM often: the checkpoint still comes
            time.sleep(0.2)
            assert process.poll() is None
            process.kill()
        else:
            assert process.wait(timeout=25) == code  # the step alone would end with 0, after 30 s


def test_the_first_sigint_lets_the_step_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path), "polite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 75
