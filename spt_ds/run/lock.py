"""One start at a time works in a folder: a lock that names its owner and dies with it.

The kernel's record lock on `.lock` holds while its owner lives and goes when it is killed; a forked
worker does not inherit it. NFS and Lustre carry it from host to host where they are set up to. On
the others it holds within a host only, or not at all, so that its owner also writes a beat into the
file: whoever finds the name of an owner that it cannot judge waits for the next beat.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spt_ds.display import shown
from spt_ds.errors import ConfigError
from spt_ds.json_input import load_json
from spt_ds.log import get_logger

NAME = ".lock"
BEAT_S = 4.0
PATIENCE_S = 14.0  # three beats and what a shared file system adds
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
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()

    def _claim(self) -> bool:
        """Take the lock; False where its last owner removed the file in the same moment."""
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = self._lock()
            earlier = os.pread(self.file, BYTES, 0)
            # What a killed owner of this machine left needs no proof: the kernel freed its lock.
            known = locked and _parsed(earlier).get("machine") == self.owner["machine"]
            if earlier and not known:
                self._wait_for_beat(earlier)
                self._lock()  # reading the file anew has freed it
            if not self._is_there():
                os.close(self.file)
                return False
        except BaseException:
            os.close(self.file)
            raise
        self._write(0)
        return True

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file))
        except FileNotFoundError:
            return False

    def _lock(self) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody holds it
            raise self._taken(_parsed(os.pread(self.file, BYTES, 0))) from None
        except OSError as error:
            get_logger().warning(
                f"{self.path}: this file system has no locks ({error.strerror}); a second start"
                " sees this one only by what it writes into the file"
            )
            return False
        return True

    def _wait_for_beat(self, earlier: bytes) -> None:
        get_logger().info(
            f"{self.folder}: a start was here and did not say that it ended"
            f" ({_told(_parsed(earlier))}); looking for {PATIENCE_S:.0f} s whether it lives"
        )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            time.sleep(min(1.0, PATIENCE_S / 10))
            try:
                now = self.path.read_bytes()  # opened anew: NFS looks for new contents only then
            except FileNotFoundError:
                return  # it ended in the meantime
            if now != earlier:
                raise self._taken(_parsed(now))

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
            beat += 1
            self._write(beat)

    def release(self) -> None:
        self.ended.set()
        _held.discard(self.key)
        with contextlib.suppress(OSError):
            if self._is_there():
                self.path.unlink()  # before it is freed: whoever opens it now looks once more
        os.close(self.file)


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
    return ", ".join(f"{key} {shown(owner.get(key))}" for key in ("host", "pid", "since"))
