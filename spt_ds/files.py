"""Files and folders that appear whole or not at all, digests of files, and locks that builds left.

Nothing of torch is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

STALE_LOCK_S = 600.0  # the slowest of DeepSpeed's extensions builds in two minutes


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its pieces one after another, under another name and rename it to `path`.

    A reader sees the old file or the new one. Raises OSError when the disk refuses, and then the
    old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
        # A kill leaves the old file or the new one. A power cut may leave neither, because nothing
        # is flushed here: `new_folder` with `to_disk` and checkpoints outlive one.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(path: Path, content: bytes) -> None:
    """Append `content` to a file, which is made where it is missing, as a whole or not at all.

    Raises OSError when the disk refuses.
    """
    size = path.stat().st_size if path.exists() else None
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError:
        with contextlib.suppress(OSError):
            if size is None:
                path.unlink()
            else:
                os.truncate(path, size)
        raise


@contextlib.contextmanager
def new_folder(path: Path, *, to_disk: bool = False) -> Iterator[Path]:
    """Give an empty folder that becomes `path` when the block ends without an error.

    Until then it is hidden beside `path`; on an error it is removed. With `to_disk` the contents
    are on the disk before the name is: also a power cut leaves all or nothing. Raises OSError when
    the disk refuses, or when `path` was made in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # no name of another's
    try:
        yield part
        # The mask can only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # mkdtemp lets only the owner in
        if to_disk:
            for inner in (*sorted(part.rglob("*")), part):
                sync(inner)
        part.rename(path)
        if to_disk:
            sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after the renaming nothing has this name


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes, which are read in blocks of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def build_locks(folder: Path) -> list[tuple[Path, float]]:
    """Return the locks of extensions that are built under `folder`, each with its age in seconds.

    A killed build leaves its lock, and DeepSpeed then waits for it at every later start, for ever
    and without a word. A lock older than STALE_LOCK_S is such a one.
    """
    locks = []
    for lock in sorted(folder.glob("**/lock")):
        with contextlib.suppress(FileNotFoundError):  # built in the meantime
            locks.append((lock, time.time() - lock.stat().st_mtime))
    return locks
