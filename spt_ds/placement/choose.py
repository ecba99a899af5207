"""Decides where the base of a run lives and whether its layers are recomputed, and says why.

Arithmetic alone: no torch, no collective, no weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spt_ds.config.method import TRAIN_THE_BASE
from spt_ds.config.schema import Config
from spt_ds.errors import EngineError
from spt_ds.placement.ds_check import plan_of_file, plan_of_kind
from spt_ds.placement.ds_machine import Hosts
from spt_ds.placement.estimate import FIXED_BYTES, BaseShape, MicroBatch, Needs, needs_of
from spt_ds.placement.memory import GIB, Memory
from spt_ds.placement.zero_plan import Kind, ZeroPlan

Recompute = Literal["off", "non_reentrant", "reentrant"]


@dataclass(frozen=True)
class Placement:
    """Where the frozen base lives and how its layers compute: settled before anything is loaded."""

    zero: ZeroPlan
    """What DeepSpeed does with the base."""
    recompute: Recompute
    """How layers are recomputed in the backward pass."""
    reasons: tuple[str, ...]
    """Why, and what follows, a line each."""


def choose_placement(
    config: Config,
    shape: BaseShape,
    deepspeed_config: str | None,
    world_size: int,
    memory: Memory,
    batch: MicroBatch | None = None,
    host_ranks: int | None = None,
) -> Placement:
    """Settle the placement for `world_size` ranks with so much memory each.

    `batch` is the largest micro-batch, where it is known; `host_ranks` the ranks of each host, by
    default all.

    A DeepSpeed file, where one is given, decides where the base lives; else `engine.placement`.
    Raises ConfigError for a file that cannot be used, EngineError where `auto` finds no place.
    """
    needs = needs_of(config, shape, world_size, batch)
    ranks = host_ranks or world_size
    room_bytes = room_for_copy(config, needs, memory) if ranks < world_size else 0
    hosts = Hosts(ranks, needs.base // ranks, room_bytes)
    if deepspeed_config is not None:
        zero = plan_of_file(deepspeed_config, config, shape, world_size, hosts)
        kind, why = zero.kind, f"placement: {zero.kind} ({deepspeed_config})"
    else:
        kind, why = place_base(config, needs, world_size, memory)
        zero = plan_of_kind(kind, config, world_size, hosts)
    # Offloaded, the second copy is on the host as the first.
    copy = needs.base // zero.copy_ranks if kind == "zero3" and zero.copy_ranks else 0
    recompute, why_recompute = choose_checkpointing(config, needs, kind, memory.rank_bytes - copy)
    return Placement(zero, recompute, (why, why_recompute, *zero.notes))


def place_base(config: Config, needs: Needs, world_size: int, memory: Memory) -> tuple[Kind, str]:
    """Pick where the base lives for `engine.placement`, and say why in one line.

    Raises EngineError where `auto` finds no place.
    """
    asked = config.engine.placement
    if asked != "auto":
        return asked, f"placement: {asked} (as configured)"
    host_bytes = memory.host_bytes
    sizes = (
        f"base {needs.base / GIB:.2f} GiB at {config.model.base_bits} bits,"
        f" {max(room(needs, memory), 0) / GIB:.2f} GiB left for it on each rank"
    )
    kind: Kind
    if config.method.type in TRAIN_THE_BASE:
        if not fits("replicate", needs, world_size, memory):
            raise EngineError(_no_room_to_train(config, sizes))
        kind, why = "replicate", f"method.type: {config.method.type} trains weights in it"
    elif fits("replicate", needs, world_size, memory):
        kind, why = "replicate", "sharding would only add communication"
    elif fits("zero3", needs, world_size, memory):
        kind, why = "zero3", f"a share of 1/{world_size} and what is gathered fit"
    elif host_bytes is not None and fits("zero3_offload", needs, world_size, memory):
        kind = "zero3_offload"
        why = (
            f"a share of 1/{world_size} and what is gathered do not fit; the share,"
            f" {needs.share / GIB:.2f} GiB, goes to the host, which has"
            f" {host_bytes / GIB:.2f} GiB for each rank"
        )
    else:
        need = (
            f"a share of 1/{world_size} is {needs.share / GIB:.2f} GiB, what is gathered at one"
            f" time {needs.resident['zero3_offload'] / GIB:.2f} GiB"
        )
        raise EngineError(_no_place(f"{sizes}; {need}", host_bytes))
    return kind, f"placement: {kind} ({sizes}: {why})"


def room(needs: Needs, memory: Memory) -> int:
    """Bytes that are left for the base on a rank whose layers are recomputed."""
    return memory.rank_bytes - FIXED_BYTES - needs.trainables - needs.recomputed


def room_for_copy(config: Config, needs: Needs, memory: Memory) -> int:
    """Bytes that are left for a second copy (hpZ) after shards and what layers keep.

    A second copy is no reason to recompute layers: that costs more than it saves.
    """
    recompute, _ = choose_checkpointing(config, needs, "zero3", memory.rank_bytes)
    kept = needs.activations if recompute == "off" else needs.recomputed
    return memory.rank_bytes - FIXED_BYTES - needs.trainables - needs.resident["zero3"] - kept


def fits(kind: Kind, needs: Needs, world_size: int, memory: Memory) -> bool:
    """Whether the base can live there, in the memory that `auto` plans with."""
    if kind == "zero3" and world_size == 1:
        return False
    if kind == "zero3_offload":
        host_bytes = memory.host_bytes
        if host_bytes is None or needs.share > host_bytes - FIXED_BYTES:
            return False
    return needs.resident[kind] <= room(needs, memory)


def _no_room_to_train(config: Config, sizes: str) -> str:
    return (
        f"engine.placement: auto finds no place for the base: {sizes}, and method.type:"
        f" {config.method.type}, which trains weights in it, needs a copy on each rank."
        " Take a smaller base, lower train.micro_batch or data.max_tokens, on hosts"
        " without GPUs fewer ranks; engine.placement: replicate is used without this"
        " check"
    )


def _no_place(sizes: str, host_bytes: int | None) -> str:
    if host_bytes is None:
        host, more = "without a GPU, host offload takes the same memory", "ranks on more hosts"
    else:
        host = (
            f"the host has {host_bytes / GIB:.2f} GiB for each rank's share,"
            f" {FIXED_BYTES / GIB:.0f} GiB of it in use"
        )
        more = "more ranks"
    return (
        f"engine.placement: auto finds no place for the base: {sizes}; {host}. Set"
        f" model.base_bits: 4 or 8, take {more}, or keep the shares on a disk:"
        " --deepspeed_config ds_configs/zero3_offload_nvme.json. Another engine.placement is"
        " used without this check"
    )


def choose_checkpointing(
    config: Config, needs: Needs, kind: Kind, rank_bytes: int
) -> tuple[Recompute, str]:
    """Pick how layers are recomputed in the backward pass, and say why in one line."""
    asked = config.model.activation_checkpointing
    if asked != "auto":
        return asked, f"activation checkpointing: {asked} (as configured)"
    room = rank_bytes - FIXED_BYTES - needs.trainables - needs.resident[kind]
    used: Recompute = "off" if needs.activations <= room else "non_reentrant"
    verdict = "fit" if used == "off" else "do not fit"
    why = (
        f"activation checkpointing: {used} ({needs.activations / GIB:.2f} GiB of activations at"
        f" most {verdict} into {max(room, 0) / GIB:.2f} GiB)"
    )
    return used, why
