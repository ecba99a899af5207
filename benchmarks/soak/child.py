"""A command as a child: started, watched once a second, disturbed, and waited for."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python imports a module of this name before anything else. It makes each flush to the disk take a
# second, or lets the clock of the wall jump by up to a day every few seconds.
SITE = """
import os, time
fault = os.environ.get("SOAK_FAULT")
if fault == "slow disk":
    flush = os.fsync
    def slow(file):
        time.sleep(1.0)
        flush(file)
    os.fsync = slow
if fault == "clock":
    true, jumps = time.time, (0, 3600, -3600, 86400, -86400, 5, -5)
    time.time = lambda: true() + jumps[int(time.monotonic() / 3) % len(jumps)]
"""


@dataclass
class Sample:
    """What one process held at one moment."""

    seconds: float
    step: int
    anonymous_mib: float
    descriptors: int


@dataclass
class Child:
    """A running command of the package, with its samples."""

    process: subprocess.Popen[bytes]
    step: Callable[[], int]
    samples: list[Sample] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def watch(self) -> None:
        """Take a sample every second until the process has ended."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                self.samples.append(self._sample())
            time.sleep(1.0)

    def _sample(self) -> Sample:
        own = Path("/proc") / str(self.process.pid)
        status = (own / "status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
        held = len(list((own / "fd").iterdir()))
        return Sample(time.monotonic() - self.began, self.step(), int(line.split()[1]) / 1024, held)

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it started, as a host does that goes down."""
        for pid in family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_for(self, step: int, timeout_s: float) -> bool:
        """Wait until `step` is done; False where the process ended before."""
        until = time.monotonic() + timeout_s
        while self.process.poll() is None and self.step() < step:
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"step {step} was not reached in {timeout_s:.0f} s")
            time.sleep(0.05)
        return self.process.poll() is None

    def end(self, timeout_s: float) -> int:
        """Wait for the end; return the exit status, below 0 for a signal."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise


def family(pid: int) -> list[int]:
    """The process and its descendants; empty where it has ended."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of a program may hold blanks and brackets.
            state, parent = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    found = [pid] if pid in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def start(
    words: list[str],
    folder: Path,
    *,
    step: Callable[[], int] = lambda: 0,
    fault: str = "",
    address_space: int | None = None,
) -> Child:
    """Start `python -m WORDS`; what it says is appended to `folder/said.log`."""
    site = folder / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "SOAK_FAULT": fault,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SPT_CACHE": str(folder / "cache"),
    }

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    with (folder / "said.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=limit,
        )
    child = Child(process, step)
    threading.Thread(target=child.watch, daemon=True).start()
    return child


def newest_step(run: Path) -> int:
    """The last optimizer step in metrics.jsonl; 0 before the first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0
