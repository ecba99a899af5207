"""Checks of a DeepSpeed file against the machine: disk, compiler, CUDA, ranks of a host.

DeepSpeed itself would find these minutes later, or never. DeepSpeed and torch are imported only to
be asked what they can do here.
"""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spt_ds.display import shortened
from spt_ds.placement.estimate import BaseShape
from spt_ds.placement.memory import GIB

DEFAULT_NVME_BUFFER = 100_000_000  # elements, as DeepSpeed has it


@dataclass
class Findings:
    """What the checks of one file collect."""

    problems: list[str] = field(default_factory=list)
    """Each makes the file unusable."""
    notes: list[str] = field(default_factory=list)
    """Consequences and warnings."""
    inert: list[str] = field(default_factory=list)
    """Keys that are accepted and have no effect."""


@dataclass(frozen=True)
class Hosts:
    """What a second copy of a sharded base would find on each host."""

    ranks: int
    """Of the run, on each host; all of them where there is one host, or where hosts differ."""
    copy_bytes: int = 0
    """Of the copy, on each rank."""
    room_bytes: int = 0
    """That are left for it on each rank."""


def check_nvme(
    found: Findings, zero: dict[str, Any], shape: BaseShape | None, world_size: int
) -> None:
    """Check disk, buffers and compiler for shards on a disk."""
    offload = zero["offload_param"]
    section = "zero_optimization.offload_param"
    folder = _nvme_folder(offload.get("nvme_path"))
    if folder is None:
        found.problems.append(
            f'{section}.nvme_path: missing; give a folder on a local disk, or "auto"'
        )
    # os.path answers False where a name is too long or holds a NUL; pathlib raises.
    elif not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        what = "not writable" if os.path.isdir(folder) else "no such folder"
        found.problems.append(
            f"{section}.nvme_path: {shortened(str(folder))} is {what}; create it on every host, or"
            " name another"
        )
    else:
        # DeepSpeed empties its folder at the start: a run that shared it with another would
        # destroy its weights.
        offload["nvme_path"] = str(folder / f"spt_ds_{socket.gethostname()}_{os.getpid()}")
        found.notes.append(
            f"the base is swapped to {offload['nvme_path']}; a killed run leaves this folder"
        )
    _check_buffer(found, offload, shape, world_size)
    if zero.setdefault("stage3_max_reuse_distance", 0) > 0:
        found.problems.append(
            f"zero_optimization.stage3_max_reuse_distance: {zero['stage3_max_reuse_distance']}"
            " keeps parameters gathered, and each holds a disk buffer, until DeepSpeed runs"
            ' out of them; set it to 0 or "auto"'
        )
    if not _async_io_builds():
        found.problems.append(
            f"{section}.device: nvme needs DeepSpeed's async_io, which does not build here:"
            " `apt-get install libaio-dev` (libaio-devel with dnf), and a C compiler"
        )


def _check_buffer(
    found: Findings, offload: dict[str, Any], shape: BaseShape | None, world_size: int
) -> None:
    """Check that a shard of the largest parameter fits one buffer, or size the buffer."""
    needed = -(-shape.largest_parameter // world_size) if shape else 0
    size = offload.setdefault("buffer_size", needed or DEFAULT_NVME_BUFFER)
    if size < needed:
        found.problems.append(
            f"zero_optimization.offload_param.buffer_size: {size} elements are too few: the"
            " largest parameter "
            f'takes {needed} on each of {world_size} ranks; give at least that, or "auto"'
        )


def check_quantised(found: Findings, zero: dict[str, Any], base_bits: int) -> None:
    """Int8 gathers need DeepSpeed's CUDA quantiser and real numbers, not packed ones."""
    asked = zero["zero_quantized_weights"]
    if not asked:
        return
    why = None
    if base_bits != 16:
        why = f"its quantiser reads 16-bit numbers, model.base_bits is {base_bits}"
    elif not _cuda():
        why = "DeepSpeed's quantiser has no CPU version, it needs a CUDA device"
    zero["zero_quantized_weights"] = why is None
    if why is None:
        found.notes.append(
            "zero_quantized_weights: the base is read through int8, losses differ from bf16"
        )
    elif asked == "auto":
        found.notes.append(f"zero_quantized_weights is off: {why}")
    else:
        found.problems.append(
            f'zero_optimization.zero_quantized_weights: {why}; set it to false or "auto"'
        )


def check_second_copy(
    found: Findings, zero: dict[str, Any], world_size: int, base_bits: int, hosts: Hosts
) -> None:
    """Settle and check the ranks among which ZeRO++ (hpZ) keeps a second sharded copy.

    A file that does not say means "auto": where it saves gathers between hosts and fits.
    """
    asked, device = zero.get("zero_hpz_partition_size"), zero.get("offload_param", {}).get("device")
    if asked in (None, "auto"):
        spread, why = 1 < hosts.ranks < world_size, None
        if not spread:
            why = "it takes several equal hosts, with several ranks each"
        elif base_bits != 16:
            why = f"it is for 16-bit bases, model.base_bits is {base_bits}"
        elif device in ("cpu", "nvme"):
            why = "offload_param keeps the base off the device"
        elif hosts.copy_bytes > hosts.room_bytes:
            why = (
                f"{hosts.copy_bytes / GIB:.2f} GiB do not fit into the"
                f" {max(hosts.room_bytes, 0) / GIB:.2f} GiB that are left on each rank"
            )
        if why is None:
            zero["zero_hpz_partition_size"] = hosts.ranks
            found.notes.append(
                f"zero_hpz_partition_size: the {hosts.ranks} ranks of each host share a second copy"
                f" of the base, {hosts.copy_bytes / GIB:.2f} GiB on each, so that hosts gather"
                " nothing from one another"
            )
            return
        zero.pop("zero_hpz_partition_size", None)
        if asked or spread:
            found.notes.append(f"zero_hpz_partition_size is off: {why}")
    elif asked < 1 or world_size % asked:
        found.problems.append(
            f"zero_optimization.zero_hpz_partition_size: {asked} does not divide the"
            f' {world_size} ranks; give the number of ranks per host, or "auto"'
        )
    elif asked > 1 and device == "nvme":
        found.problems.append(
            "zero_optimization.zero_hpz_partition_size: DeepSpeed cannot keep the second copy"
            " on a disk; set it to 1, or offload_param.device to cpu"
        )


def _nvme_folder(path: str | None) -> Path | None:
    if path == "auto":
        return Path(os.environ.get("SPT_NVME_PATH") or tempfile.gettempdir())
    return Path(path) if path else None


def _async_io_builds() -> bool:
    # It is only asked whether it could build: the build itself takes minutes.
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
