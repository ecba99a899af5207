"""The memory that a rank of this machine can plan with. GiB is 2**30 bytes throughout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# share of a rank's memory that is planned with; the rest is for fragments, buffers and the runtime
USABLE = 0.85
V2_FILES = ("memory.max", "memory.current")


@dataclass(frozen=True)
class Memory:
    """Bytes that the poorest rank can plan with, on its device and on its host."""

    rank_bytes: int
    host_bytes: int | None
    """None on a machine without GPUs: the host's memory is the rank's own, and offload frees
    nothing.
    """


def memory_per_rank(device_bytes: int | None, local_size: int) -> int:
    """Bytes a rank can plan with: its GPU's memory, or its share of what the host has available."""
    return (
        int(device_bytes * USABLE) if device_bytes is not None else host_memory_per_rank(local_size)
    )


def host_memory_per_rank(local_size: int, root: Path = Path("/")) -> int:
    """A rank's share of the host memory that is free and that its cgroups leave.

    Slurm's `--mem` and containers limit by cgroup, which /proc/meminfo does not know. `root` is for
    the tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # not Linux: the free pages are all that is known
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([available, *_left_in_cgroups(root)]) * USABLE / local_size)


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that each memory cgroup around this process leaves; file pages count as free."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            limit, used = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else V2_FILES
            )
            # A limit may stand at any group around this one. A container may see its own group as
            # the mount itself.
            inner = mount / group.strip("/")
            outer = (parent for parent in inner.parents if parent.is_relative_to(mount))
            for folder in (inner, *outer):
                # No such file there, or `max`: no limit.
                with contextlib.suppress(OSError, ValueError):
                    left = int((folder / limit).read_text()) - int((folder / used).read_text())
                    yield max(
                        left + _file_pages(folder / "memory.stat", "total_" if controllers else ""),
                        0,
                    )


def _file_pages(stat: Path, prefix: str) -> int:
    """Bytes of a cgroup's page cache, which the kernel drops before it refuses memory."""
    names = {f"{prefix}inactive_file", f"{prefix}active_file"}
    pairs = (line.split() for line in stat.read_text(encoding="ascii").splitlines())
    return sum(int(count) for name, count in pairs if name in names)
