"""One start at a time works in a folder: a lock that names its owner and dies with it.

The kernel's record lock on `.lock` holds while its owner lives and goes when it is killed; a forked
worker does not inherit it. NFS and Lustre carry it from host to host where they are set up to. On
the others it holds within a host only, or not at all, so that its owner also writes a beat into the
file: whoever finds the name of an owner that it cannot judge waits for the next beat.

Slurm restarts a job when it has lost a node. A rank that lives on there, cut off from Slurm but not
from the folder, would hold it against its own restart. The restart therefore asks it to leave, and
it ends within a beat.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spt_ds.display import shown
from spt_ds.errors import ConfigError
from spt_ds.files import write_whole
from spt_ds.json_input import load_json
from spt_ds.log import get_logger

NAME, REQUEST = ".lock", ".lock.request"
BEAT_S = 4.0
PATIENCE_S = 14.0  # three beats and what a shared file system adds
LEAVE_S = 120.0  # a beat; or, with NFS, the 90 s after which a server gives up a host that is away
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid
BYTES = 4096  # of a lock file that anyone may have written
BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart, host names may repeat

_held: set[str] = set()  # a record lock does not stop its own process


@contextlib.contextmanager
def only_start(folder: Path, mend: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where it is missing, during the block.

    Raises ConfigError, which ends with `mend`, where another start holds it or the disk refuses.
    """
    lock = _Lock(folder, mend)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lives(folder: Path) -> bool | None:
    """Whether the start that holds the lock of `folder` lives; None where there is no lock.

    It only looks: a start that comes in the same moment is not disturbed.
    """
    path = folder / NAME
    # To close the file here would free a lock that this very process holds.
    if os.path.realpath(path) in _held:
        return True
    try:
        with path.open("rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
            owner, beat_s = _parsed(file.read(BYTES)), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    if struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK:
        return True
    # The kernel of another machine may not tell its locks; the beat does.
    here = owner.get("machine") == _machine()
    return not here and time.time() - beat_s < PATIENCE_S


class _Lock:
    def __init__(self, folder: Path, mend: str) -> None:
        self.folder = folder
        self.path = folder / NAME
        self.mend = mend
        self.ended = threading.Event()
        self.owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(),
            **_slurm_start(),
        }

    def acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.key = os.path.realpath(self.path)
            if self.key in _held:
                raise self._taken(self.owner)
            while not self._claim():
                pass
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror or error}); {self.mend}"
            ) from error
        _held.add(self.key)
        # A daemon, so that a rank which ends without `release` is not kept alive by it.
        self.thread = threading.Thread(target=self._beat, daemon=True, name="folder lock")
        self.thread.start()

    def _claim(self) -> bool:
        """Take the lock; False where its last owner removed the file in the same moment."""
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # The kernel's lock alone is no proof: on some shared file systems two hosts get it at
            # once.
            locked = self._lock()
            earlier = os.pread(self.file, BYTES, 0)
            # What a killed owner of this machine left needs no proof: the kernel freed its lock.
            known = locked and _parsed(earlier).get("machine") == self.owner["machine"]
            if earlier and not known:
                self._wait_for_beat(earlier)
                # The wait has opened and closed the file, and to close any descriptor of a file
                # frees the process's record locks on it.
                self._lock()
            # The last owner may have removed the file between the open and the lock. This one would
            # then hold a file that nobody else can find.
            if not self._is_there():
                os.close(self.file)
                return False
        except BaseException:
            os.close(self.file)
            self._end_request(owns=False)
            raise
        self._write(0)
        self._end_request(owns=True)
        return True

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file))
        except FileNotFoundError:
            return False

    def _lock(self) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        until = None
        while True:
            try:
                # Not `flock`, which a forked data worker would inherit and hold after its parent's
                # death.
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody holds it
                owner = _parsed(os.pread(self.file, BYTES, 0))
                until = until or self._ask_to_leave(owner)
                if not self._continues(owner) or time.monotonic() > until:
                    raise self._taken(owner) from None
                time.sleep(0.5)
            except OSError as error:
                get_logger().warning(
                    f"{self.path}: this file system has no locks ({error.strerror}); a second start"
                    " sees this one only by what it writes into the file"
                )
                return False

    def _wait_for_beat(self, earlier: bytes) -> None:
        """Wait until nobody has written into the file for PATIENCE_S."""
        get_logger().info(
            f"{self.folder}: a start was here and did not say that it ended"
            f" ({_told(_parsed(earlier))}); looking for {PATIENCE_S:.0f} s whether it lives"
        )
        quiet_since, until = time.monotonic(), None
        while time.monotonic() - quiet_since < PATIENCE_S:
            time.sleep(min(1.0, PATIENCE_S / 10))
            try:
                # Opened again each time: NFS looks for new contents only then.
                now = self.path.read_bytes()
            except FileNotFoundError:
                return  # it ended in the meantime
            if now in (earlier, b""):
                continue  # empty: it is being written
            owner = _parsed(now)
            until = until or self._ask_to_leave(owner)
            if not self._continues(owner) or time.monotonic() > until:
                raise self._taken(owner)
            earlier, quiet_since = now, time.monotonic()

    def _continues(self, owner: dict[str, Any]) -> bool:
        """Whether this is a later start of the same Slurm job, which Slurm began as it took the
        owner for dead.
        """
        return _is_later(self.owner, owner)

    def _ask_to_leave(self, owner: dict[str, Any]) -> float:
        """Ask an earlier start of this job to end; return how long to wait for it."""
        if self._continues(owner):
            get_logger().warning(
                f"{self.folder}: an earlier start of this job still works here ({_told(owner)});"
                f" asking it to end, for up to {LEAVE_S:.0f} s"
            )
            write_whole(self.folder / REQUEST, json.dumps(self.owner))
        return time.monotonic() + LEAVE_S

    def _end_request(self, *, owns: bool) -> None:
        """Remove this start's own request; what asked before it is answered where it `owns`."""
        with contextlib.suppress(OSError):
            asked = _parsed(self._request())
            if asked == self.owner or (owns and not _is_later(asked, self.owner)):
                (self.folder / REQUEST).unlink()

    def _taken(self, owner: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self.folder}: another start works in this folder ({_told(owner)}); {self.mend}"
        )

    def _write(self, beat: int) -> None:
        text = json.dumps({**self.owner, "beat": beat}).encode()
        try:
            os.pwrite(self.file, text, 0)
            os.ftruncate(self.file, len(text))
        except OSError as error:
            # A full disk must not end a training between two checkpoints.
            get_logger().debug("%s: %s", self.path, error)

    def _beat(self) -> None:
        beat = 0
        while not self.ended.wait(BEAT_S):
            later = self._later_start()
            if later and not self.ended.is_set():
                self._leave(later)
            beat += 1
            self._write(beat)

    def _later_start(self) -> dict[str, Any]:
        """The start of this job that asks for the folder, or has taken it; empty where none has."""
        # To close the lock's file once more would free the lock: it is read where it is open.
        for read in (self._request, lambda: os.pread(self.file, BYTES, 0)):
            with contextlib.suppress(OSError):
                owner = _parsed(read())
                if _is_later(owner, self.owner):
                    return owner
        return {}

    def _request(self) -> bytes:
        with (self.folder / REQUEST).open("rb") as file:
            return file.read(BYTES)

    def _leave(self, later: dict[str, Any]) -> None:
        """End the process as a kill would: every file in the folder is whole at any moment."""
        get_logger().error(
            f"{self.folder}: Slurm has started this job again ({_told(later)}); this start ends"
        )
        os._exit(1)

    def release(self) -> None:
        self.ended.set()
        # Its descriptor is closed below, and the number may then be another file's.
        self.thread.join()
        _held.discard(self.key)
        with contextlib.suppress(OSError):
            if self._is_there():
                # Before the lock is freed: whoever opens the file now finds that it is gone and
                # looks once more.
                self.path.unlink()
        os.close(self.file)


def _slurm_start() -> dict[str, Any]:
    """Which job of Slurm this is, and how often Slurm had restarted it; empty without Slurm."""
    variables = os.environ
    # The last task of an array has the number of the whole array as its own.
    array = [variables.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK")]
    job = "_".join(filter(None, array)) or variables.get("SLURM_JOB_ID")
    restarts = variables.get("SLURM_RESTART_COUNT", "0")
    return {"job": job, "restart": int(restarts)} if job and restarts.isdecimal() else {}


def _is_later(start: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether Slurm began `start` after `other`, as the same job."""
    mine, theirs = start.get("restart"), other.get("restart")
    if start.get("job") is None or start.get("job") != other.get("job"):
        return False
    return type(mine) is int and type(theirs) is int and mine > theirs


def _machine() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = load_json(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _told(owner: dict[str, Any]) -> str:
    if not owner:
        return "its owner is not named"
    keys = ("host", "pid", "since", *(("job", "restart") if owner.get("job") else ()))
    return ", ".join(f"{key} {shown(owner.get(key))}" for key in keys)
