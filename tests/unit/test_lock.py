"""One start at a time works in a folder, and a killed one blocks nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds.errors import ConfigError
from spt_ds.run import lock
from spt_ds.run.lock import NAME, only_start

HOLD = """
import sys, os, time, multiprocessing
from pathlib import Path
from spt_ds.run.lock import only_start
with only_start(Path(sys.argv[1]), "wait"):
    if "fork" in sys.argv:
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    print("held", os.getpid(), flush=True)
    time.sleep(600)
"""


class Holder:
    """Another process that holds the lock of a folder."""

    def __init__(self, folder: Path, *args: str) -> None:
        command = [sys.executable, "-c", HOLD, str(folder), *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        word, pid = self.process.stdout.readline().split()
        assert word == "held"
        self.pid = int(pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """The process with what it forked."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "run", "fork")
    yield holder
    holder.end()


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, only_start(folder, "give another --run-dir"):
        pass
    return str(caught.value)


def test_a_second_start_is_told_who_works_there(holder: Holder, tmp_path: Path) -> None:
    text = refused(tmp_path / "run")
    assert text.startswith(f"{tmp_path / 'run'}: another start works in this folder (host '")
    assert f"pid {holder.pid}, since '20" in text
    assert text.endswith("; give another --run-dir")
    with only_start(tmp_path / "other", "wait"):
        pass


def test_a_killed_owner_blocks_nobody_though_its_workers_live(
    holder: Holder, tmp_path: Path
) -> None:
    holder.kill()
    started = time.monotonic()
    with only_start(tmp_path / "run", "wait"):
        assert time.monotonic() - started < 3
        assert str(os.getpid()) in (tmp_path / "run" / NAME).read_text(encoding="utf-8")


def test_a_stopped_owner_still_owns(holder: Holder, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    assert f"pid {holder.pid}" in refused(tmp_path / "run")


def test_nothing_is_left_of_a_start_that_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with only_start(tmp_path, "wait"):
            assert "another start" in refused(tmp_path)
        assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), only_start(tmp_path, "wait"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", json.dumps({"machine": "elsewhere"})])
def test_an_owner_that_cannot_be_judged_is_given_time(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    (tmp_path / NAME).write_text(content, encoding="latin-1")
    started = time.monotonic()
    with only_start(tmp_path, "wait"):
        assert (time.monotonic() - started > 0.3) == bool(content)


def test_an_owner_on_a_file_system_without_shared_locks_is_known_by_its_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host's kernel holds the lock, which this one's does not know."""
    monkeypatch.setattr(lock, "PATIENCE_S", 5.0)
    file = os.open(tmp_path / NAME, os.O_RDWR | os.O_CREAT)
    ended = threading.Event()

    def write(beat: int) -> None:
        """As an owner does: the file is never empty between two beats."""
        owner = {"host": "far", "pid": 1, "machine": "elsewhere", "beat": beat}
        os.pwrite(file, json.dumps(owner).encode(), 0)

    def beat() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            write(number)

    write(0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "host 'far', pid 1" in refused(tmp_path)
    finally:
        ended.set()
        thread.join()
        os.close(file)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_beat_of_an_owner_decides(
    number: int, holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "PATIENCE_S", 2 * lock.BEAT_S)
    assert f"pid {holder.pid}" in refused(tmp_path / "run")
    holder.kill()
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    with only_start(tmp_path / "run", "wait"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(tmp_path / "file" / "run")


def test_many_starts_at_once_give_one_owner_at_a_time(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from spt_ds.errors import ConfigError
from spt_ds.run.lock import only_start
folder, inside, won = Path(sys.argv[1]), Path(sys.argv[1]) / "inside", 0
until = time.monotonic() + 4
while time.monotonic() < until:
    try:
        with only_start(folder, "wait"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            os.unlink(inside)
            won += 1
    except ConfigError:
        pass
print(won)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    won = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum(won) > 4
