"""One start at a time works in a folder, and a killed one blocks nobody."""

from __future__ import annotations

import contextlib
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
from spt_ds.run.lock import NAME, REQUEST, only_start

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

    def __init__(self, folder: Path, *args: str, **variables: str) -> None:
        command = [sys.executable, "-c", HOLD, str(folder), *args]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **variables},
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
        with contextlib.suppress(ProcessLookupError):
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
        assert time.monotonic() - started < lock.PATIENCE_S
        assert str(os.getpid()) in (tmp_path / "run" / NAME).read_text(encoding="utf-8")


def test_an_owner_still_owns_after_a_beat(holder: Holder, tmp_path: Path) -> None:
    """To open and close the file in the owner would free the kernel's lock."""
    time.sleep(1.5 * lock.BEAT_S)
    os.kill(holder.pid, signal.SIGSTOP)  # it is told by the lock, not by another beat
    assert f"pid {holder.pid}" in refused(tmp_path / "run")


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
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    (tmp_path / NAME).write_text(content, encoding="latin-1")
    started = time.monotonic()
    with only_start(tmp_path, "wait"):
        assert (time.monotonic() - started > 1.0) == bool(content)


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


# What Slurm restarts -----------------------------------------------------------------------------


def slurm_start(job: str, restart: int) -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}


@pytest.fixture
def first_start(tmp_path: Path) -> Iterator[Holder]:
    """A rank of job 7 that lives on after Slurm has given its node up."""
    holder = Holder(tmp_path / "run", **slurm_start("7", 1))
    yield holder
    holder.end()


def become(monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    for name, value in slurm_start(job, restart).items():
        monkeypatch.setenv(name, value)


def test_the_restart_of_a_job_takes_the_folder_from_the_start_that_was_cut_off(
    first_start: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, "7", 2)
    with only_start(tmp_path / "run", "wait"):
        assert first_start.process.wait(5) == 1
        assert first_start.process.stderr is not None
        told = first_start.process.stderr.read()
        assert "Slurm has started this job again" in told
        assert f"pid {os.getpid()}" in told
        assert "job '7', restart 2); this start ends" in told
        assert not (tmp_path / "run" / REQUEST).exists()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(("job", "restart"), [("7", 1), ("7", 0), ("8", 2), ("", 2)])
def test_another_start_of_the_job_or_another_job_is_refused(
    first_start: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: int
) -> None:
    become(monkeypatch, job, restart)
    assert "job '7', restart 1" in refused(tmp_path / "run")
    assert first_start.process.poll() is None
    assert not (tmp_path / "run" / REQUEST).exists()


def test_a_start_that_does_not_leave_is_named_and_may_live(
    first_start: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(first_start.pid, signal.SIGSTOP)
    become(monkeypatch, "7", 2)
    monkeypatch.setattr(lock, "LEAVE_S", 1.0)
    assert f"pid {first_start.pid}" in refused(tmp_path / "run")
    assert not (tmp_path / "run" / REQUEST).exists()
    os.kill(first_start.pid, signal.SIGCONT)
    time.sleep(1.5 * lock.BEAT_S)
    assert first_start.process.poll() is None


def test_the_restart_takes_over_where_the_file_system_has_no_locks(
    first_start: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    become(monkeypatch, "7", 2)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "PATIENCE_S", 2 * lock.BEAT_S)
    with only_start(tmp_path / "run", "wait"):
        assert first_start.process.wait(5) == 1


def test_a_start_that_was_frozen_finds_its_successor_and_ends(
    first_start: Holder, tmp_path: Path
) -> None:
    """Where a file system has no locks, its beat stopped and the restart took the folder."""
    owner = json.loads((tmp_path / "run" / NAME).read_text(encoding="utf-8"))
    later = {**owner, "host": "other", "restart": 2, "beat": 0}
    (tmp_path / "run" / NAME).write_text(json.dumps(later), encoding="utf-8")
    assert first_start.process.wait(3 * lock.BEAT_S) == 1


def test_a_task_of_an_array_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, "9", 3)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert lock._slurm_start() == {"job": "9_0", "restart": 3}


@pytest.mark.parametrize("restart", ["2", 2.0, True, None, [2]])
def test_a_request_that_no_start_wrote_is_ignored(restart: object) -> None:
    assert not lock._is_later({"job": "7", "restart": restart}, {"job": "7", "restart": 1})
