"""`spt-ds plan`: where the base of a run would live on given ranks, and why, without loading it.

Reads the base's config.json alone. Exit code 2 where `engine.placement: auto` finds no place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.log import say_loading
from spt_ds.placement.choose import choose_placement
from spt_ds.placement.estimate import FIXED_BYTES, BaseShape, needs_of
from spt_ds.placement.memory import (
    GIB,
    USABLE,
    Memory,
    host_memory_per_rank,
    memory_per_rank,
)
from spt_ds.run.command import add_overrides, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds plan", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", required=True, help="YAML file or name of a shipped recipe")
    add_overrides(parser, "override one option, such as model.base_bits=4")
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="DeepSpeed file, or a shipped one's name such as zero3; decides where the base lives",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes of the run (default 1)"
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="G",
        help="memory of a rank's GPU; default this machine's",
    )
    parser.add_argument(
        "--host-gib",
        type=float,
        metavar="G",
        help="host memory next to each GPU; default this host's, shared by N",
    )
    return run_command(parser, argv, _plan)


def _plan(args: argparse.Namespace) -> None:
    for name in ("ranks", "memory_gib", "host_gib"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    config = load_config(args.config, args.overrides)
    say_loading()
    from spt_ds.model.loading import load_base_config  # imports torch, which --help need not

    shape = BaseShape.from_config(load_base_config(config.model).to_dict())
    memory = _memory(args.memory_gib, args.host_gib, args.ranks)
    print("\n".join(sizes(config, shape, args.ranks, memory)))
    placement = choose_placement(config, shape, args.deepspeed_config, args.ranks, memory)
    placement.zero.remove_swap_files()  # a dry run leaves no folder behind
    print("\n".join(placement.reasons))


def _memory(gpu_gib: float | None, host_gib: float | None, ranks: int) -> Memory:
    import torch

    gpu = None if gpu_gib is None else int(gpu_gib * GIB)
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0).total_memory
    if gpu is None and host_gib is not None:
        raise ConfigError(
            "--host-gib is the host's memory next to a GPU, and this machine has none; give"
            " --memory-gib too"
        )
    host = host_memory_per_rank(ranks) if host_gib is None else int(host_gib * GIB * USABLE)
    return Memory(memory_per_rank(gpu, ranks), None if gpu is None else host)


def sizes(config: Config, shape: BaseShape, ranks: int, memory: Memory) -> list[str]:
    """The terms of the decision, a line each, in GiB for one rank."""
    needs = needs_of(config, shape, ranks)
    terms = {
        f"memory of a rank, {USABLE:.0%} of it": memory.rank_bytes,
        f"host memory next to it, {USABLE:.0%} of it": memory.host_bytes,
        "process, kernels, buffers": FIXED_BYTES,
        "trainables, gradients, Adam": needs.trainables,
        "activations, recomputed": needs.recomputed,
        "activations, all kept": needs.activations,
        "base, whole (replicate)": needs.base,
        f"base, share of 1/{ranks} + gathered (zero3)": needs.resident["zero3"],
        "base, gathered (zero3_offload)": needs.resident["zero3_offload"],
        f"base, share of 1/{ranks} on the host": needs.share,
    }
    return [f"{name:<42} {size / GIB:9.2f} GiB" for name, size in terms.items() if size is not None]


if __name__ == "__main__":
    raise SystemExit(main())
