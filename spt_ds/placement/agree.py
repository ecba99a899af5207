"""All ranks settle on one placement: that of the rank with the least memory."""

from __future__ import annotations

import json

import torch

from spt_ds import dist
from spt_ds.config.schema import Config
from spt_ds.log import get_logger
from spt_ds.placement.choose import Placement, choose_placement
from spt_ds.placement.estimate import BaseShape
from spt_ds.placement.memory import Memory, host_memory_per_rank, memory_per_rank


def agree_on_placement(
    config: Config, shape: BaseShape, deepspeed_config: str | None, world: dist.World
) -> Placement:
    """Choose placement and activation checkpointing together on all ranks, and say why once.

    Raises on every rank what `choose_placement` raises on one, and EngineError when the DeepSpeed
    files of the ranks differ.
    """
    memory, per_host = _least_memory(world), _ranks_per_host(world)
    placement = dist.agreed(
        lambda: choose_placement(
            config, shape, deepspeed_config, world.size, memory, host_ranks=per_host
        )
    )
    if deepspeed_config is not None:
        # Ranks must shard alike; only the swap folder of NVMe offload is each process's own.
        shared = json.loads(json.dumps(placement.zero.engine_config))
        shared.get("zero_optimization", {}).get("offload_param", {}).pop("nvme_path", None)
        dist.same_everywhere("the DeepSpeed configuration", json.dumps(shared, sort_keys=True))
    for line in placement.reasons:
        get_logger().info(line)
    return placement


def _ranks_per_host(world: dist.World) -> int:
    """Ranks of each host; all of them where hosts differ, or where a host's have no common place.

    DeepSpeed takes neighbours in the order of ranks for a host.
    """
    told = dist.gather_json([world.rank - world.local_rank, world.local_size])
    size = told[0][1]
    alike = all(found == [rank // size * size, size] for rank, found in enumerate(told))
    return size if alike else world.size


def _least_memory(world: dist.World) -> Memory:
    gpu = None
    if world.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(world.device).total_memory
    rank_bytes = min(dist.gather_json(memory_per_rank(gpu, world.local_size)))
    host_bytes = min(dist.gather_json(host_memory_per_rank(world.local_size)))
    return Memory(rank_bytes, None if gpu is None else host_bytes)
