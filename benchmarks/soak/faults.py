"""What befalls a command: kills, stops, disks that are full or slow, clocks that jump, no memory.

Each fault takes a `Case`, starts the command, lets the fault happen and returns how the command
ended. The next start must resume from what the fault left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.child import Child, start

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
PATIENCE_S = 1800.0


@dataclass
class Case:
    """One command that can be started again and again until it ends with 0."""

    words: list[str]
    folder: Path
    """Where it logs and keeps its cache."""
    disk: Path
    """The small disk that it writes to."""
    draw: random.Random
    step: Callable[[], int] = lambda: 0
    """How far it is, in its own units."""
    pace: int = 0
    """Units that it does between its start and the fault; 0: the fault comes after a time."""
    seconds: float = 5.0
    """Of a whole undisturbed command, where `pace` is 0."""
    stops: bool = False
    """Whether a file STOP ends it with 75."""

    def begin(self, fault: str = "", address_space: int | None = None) -> Child:
        return start(
            self.words, self.folder, step=self.step, fault=fault, address_space=address_space
        )

    def work(self, child: Child) -> bool:
        """Wait until the moment of the fault; False where the command ended before."""
        if self.pace:
            goal = self.step() + self.draw.randint(1, 2 * self.pace)
            return child.wait_for(goal, PATIENCE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(self.draw.uniform(0.2, 1.1) * self.seconds)
        return child.process.poll() is None


def killed(case: Case) -> int:
    child = case.begin()
    case.work(child)
    child.signal(signal.SIGKILL)
    return child.end(PATIENCE_S)


def frozen(case: Case) -> int:
    """Stopped for seconds up to three times, then killed, perhaps while it is stopped."""
    child = case.begin()
    for _ in range(3):
        if not case.work(child):
            break
        child.signal(signal.SIGSTOP)
        time.sleep(case.draw.uniform(0.5, 3.0))
        if case.draw.random() >= 0.7:
            break  # killed while it is stopped
        child.signal(signal.SIGCONT)
    child.signal(signal.SIGKILL)
    return child.end(PATIENCE_S)


def full_disk(case: Case) -> int:
    """Not a page is left from a random moment on; the command has to end by itself."""
    child = case.begin()
    case.work(child)
    filler = case.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    try:
        return child.end(PATIENCE_S)
    finally:
        filler.unlink()


def slow_disk(case: Case) -> int:
    """Each flush takes a second; then SIGTERM."""
    return _stopped(case, "slow disk", lambda child: child.process.send_signal(signal.SIGTERM))


def clock_jumps(case: Case) -> int:
    """The clock of the wall jumps by up to a day, back and forth; then a file STOP, or SIGTERM."""

    def ask(child: Child) -> None:
        if case.stops:
            (case.disk / "run" / "STOP").touch()
        else:
            child.process.send_signal(signal.SIGTERM)

    return _stopped(case, "clock", ask)


def _stopped(case: Case, fault: str, ask: Callable[[Child], None]) -> int:
    child = case.begin(fault)
    if case.work(child):
        ask(child)
    return child.end(PATIENCE_S)


def little_memory(case: Case) -> int:
    """An address space that is too small from a random point of the start on."""
    return case.begin(address_space=case.draw.randint(400, 1500) << 20).end(PATIENCE_S)


def out_of_memory(case: Case) -> int:
    """The kernel kills where the command needs more than its control group has; or it is killed."""
    with _memory_group(case.draw.randint(100, 500)) as group:
        child = case.begin()
        if group is not None:
            (group / "cgroup.procs").write_text(str(child.process.pid), encoding="ascii")
        case.work(child)
        child.signal(signal.SIGKILL)
        return child.end(PATIENCE_S)


@contextlib.contextmanager
def _memory_group(mib: int) -> Iterator[Path | None]:
    """A control group with a limit of memory, of either version; None where none can be made."""
    v1 = V1.is_dir()
    folder = (V1 if v1 else V2) / f"spt-soak-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if v1 else "memory.max")
    try:
        folder.mkdir()
        limit.write_text(str(mib << 20), encoding="ascii")
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):  # busy until the last process is gone
                folder.rmdir()
                break
            time.sleep(0.1)


FAULTS: dict[str, Callable[[Case], int]] = {
    "kill -9": killed,
    "SIGSTOP, then kill -9": frozen,
    "full disk": full_disk,
    "slow disk, SIGTERM": slow_disk,
    "clock jumps, stop request": clock_jumps,
    "little address space": little_memory,
    "out of memory": out_of_memory,
}


@contextlib.contextmanager
def small_disk(path: Path, mib: int) -> Iterator[Path]:
    """Mount a small file system in memory at `path`; one that is there from before is taken."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(path):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "soak", str(path)], check=True
        )
    yield path  # it stays where the soak is interrupted: the next start goes on with it
    subprocess.run(["umount", str(path)], check=True)
