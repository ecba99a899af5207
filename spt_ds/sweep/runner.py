"""Runs the cells of a sweep on this machine.

Each step of a cell is a process, or several by DeepSpeed's launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from spt_ds.errors import EngineError
from spt_ds.log import say_loading
from spt_ds.sweep.cells import Cell


class Runner:
    """`jobs` cells at a time with `ranks` processes each; a cell that fails ends no other."""

    def __init__(self, jobs: int, ranks: int) -> None:
        """Raises EngineError when there are GPUs, but too few."""
        self._jobs, self._ranks = jobs, ranks
        # The GPUs of each job; none on a CPU.
        self._slots: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
        for devices in _share_out(jobs, ranks):
            self._slots.put(devices)
        # A second signal may interrupt the handler of the first while that one holds it.
        self._lock = threading.RLock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Finish the cells; return by folder name why those did not that did not.

        SIGINT and SIGTERM make it end early: training then saves a checkpoint, generation keeps the
        replies it has.
        """
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                reasons = list(pool.map(self._run_cell, cells))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return {
            cell.folder.name: reason for cell, reason in zip(cells, reasons, strict=True) if reason
        }

    def _stop(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self.stopped = True
            for process in self._live:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGTERM)

    def _run_cell(self, cell: Cell) -> str | None:
        if cell.finished:
            print(f"{cell.folder.name}: finished before", flush=True)
            return None
        devices = self._slots.get()
        started = time.monotonic()
        try:
            reason = self._steps(cell, devices)
        finally:
            self._slots.put(devices)
        if reason and self.stopped:
            return "stopped"
        print(
            f"{cell.folder.name}: {reason or 'finished'} ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
        return reason

    def _steps(self, cell: Cell, devices: tuple[str, ...]) -> str | None:
        path = cell.run.sweep_log
        written = cell.run.replies.predictions
        train, generate = (
            ["spt_ds.train", *cell.training],
            ["spt_ds.generate", str(cell.folder), *cell.options],
        )
        score = [sys.executable, "-m", "spt_ds.cli", "evaluate", str(cell.folder)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as log:
                # The steps inherit the lock with the log: it outlives this process until the last
                # of them has ended.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                begin = log.tell()
                if not cell.trained:
                    code = self._call(self._launched(train, devices), log, devices)
                    # The file tells the truth, a launcher's exit code does not.
                    if not cell.trained:
                        return _why(code, "training", path, begin)
                code = self._call(self._launched(generate, devices), log, devices)
                if code or not written.is_file():
                    return _why(code, "generation", path, begin)
                code = self._call(score, log, devices)
                return None if cell.finished else _why(code, "evaluation", path, begin)
        except BlockingIOError:
            return "another process works in this folder; wait for it, or end it"
        except OSError as error:
            return f"{error.filename}: cannot be written ({error.strerror})"

    def _launched(self, module: list[str], devices: tuple[str, ...]) -> list[str]:
        if self._ranks == 1:
            return [sys.executable, "-m", *module]
        where = (
            ["--include", f"localhost:{','.join(devices)}"]
            if devices
            else ["--num_gpus", str(self._ranks)]
        )
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--master_port",
            str(_free_port()),
        ]
        return [*launcher, *where, "--module", *module]

    def _call(self, command: list[str], log: BinaryIO, devices: tuple[str, ...]) -> int:
        """Run one step to its end, its output appended to `log`; return its exit code."""
        from spt_ds.dist import own_cores

        cores = len(own_cores()) // (self._jobs * self._ranks)
        environment = {"OMP_NUM_THREADS": str(max(1, cores)), **os.environ}
        if len(devices) == 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[0]
        elif devices:
            # `--include` names the devices.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        with self._lock:
            # Under the lock: a process that starts after the request would not hear of it.
            if self.stopped:
                return -signal.SIGTERM
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # In a group of its own: Ctrl-C reaches this process alone, which then asks the
                # steps to stop.
                start_new_session=True,
            )
            self._live.add(process)
        code = process.wait()
        with self._lock:
            self._live.remove(process)
        return code


def _share_out(jobs: int, ranks: int) -> list[tuple[str, ...]]:
    """The GPUs of each job; empty where the machine has none."""
    say_loading()
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [()] * jobs
    if count < jobs * ranks:
        raise EngineError(
            f"--jobs {jobs} of --ranks {ranks} need {jobs * ranks} GPUs, this machine shows {count}"
        )
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(number) for number in range(count)]
    return [tuple(names[job * ranks : (job + 1) * ranks]) for job in range(jobs)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _why(code: int, step: str, log: Path, begin: int) -> str:
    """The error that was told last, from byte `begin` of the log on, or how the step ended."""
    lines = log.read_bytes()[begin:].decode("utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.startswith("spt-ds")]
    return f"failed in {step}: {told[-1] if told else f'exit code {code}'} (see {log})"
