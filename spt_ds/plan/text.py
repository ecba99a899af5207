"""What `spt-ds plan` prints: sizes, what fits, work and time, and the command to start with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from spt_ds.config.schema import Config
from spt_ds.evaluate.tables import Cell, Table
from spt_ds.placement.choose import Placement, fits
from spt_ds.placement.estimate import FIXED_BYTES, BaseShape, MicroBatch, Needs, needs_of
from spt_ds.placement.memory import GIB, USABLE, Memory
from spt_ds.placement.work import Work
from spt_ds.placement.zero_plan import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
WIDTHS = (16, 8, 4)
POSITIONS = {"prefix": "before_text", "suffix": "before_reply"}
MOST_RANKS = 4096
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Rate:
    """How fast and how dear a run is; None where it was not given."""

    tflops: float | None
    """That one rank reaches, in 10^12 operations a second."""
    step_seconds: float | None
    """Measured; goes before `tflops`."""
    price: float | None
    """Of one rank for an hour."""

    def seconds(self, work: Work, ranks: int) -> float | None:
        """Time of one step, None where nothing is known of it."""
        if self.step_seconds is not None:
            return self.step_seconds
        return None if self.tflops is None else work.flops / (self.tflops * 1e12 * ranks)


def sizes(needs: Needs, ranks: int, memory: Memory) -> list[str]:
    """The terms of the decision, a line each, in GiB for one rank."""
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


def _variants(config: Config) -> Iterator[tuple[str, Config]]:
    """The run at each width of the base and in each placement of the prompts, by name."""
    for (name, position), bits in product(POSITIONS.items(), WIDTHS):
        model = config.model.model_copy(update={"base_bits": bits})
        prompts = config.prompts.model_copy(update={"position": position})
        yield f"{name}, {bits} bits", config.model_copy(update={"model": model, "prompts": prompts})


def what_fits(
    config: Config, shape: BaseShape, ranks: int, memory: Memory, batch: MicroBatch | None = None
) -> Table:
    """GiB of a rank at each width and placement; empty where it does not fit."""
    rows: list[Sequence[Cell]] = []
    for name, variant in _variants(config):
        needs = needs_of(variant, shape, ranks, batch)
        # With recomputed layers, as `fits` counts: a run that has room left keeps all of them.
        fixed = FIXED_BYTES + needs.trainables + needs.recomputed
        rows.append(
            [
                name,
                *(
                    (fixed + needs.resident[kind]) / GIB
                    if fits(kind, needs, ranks, memory)
                    else None
                    for kind in KINDS
                ),
            ]
        )
    return Table([f"GiB of a rank, {ranks} rank{'s' * (ranks > 1)}", *KINDS], rows)


def fewest_ranks(
    config: Config, shape: BaseShape, memory: Memory, batch: MicroBatch | None = None
) -> Table:
    """The smallest power of two of ranks on which each way fits; empty where none does."""
    # Powers of two: nodes have 4 or 8 GPUs, and a half-used node costs as much as a full one.
    counts = [2**power for power in range(MOST_RANKS.bit_length())]
    rows: list[Sequence[Cell]] = []
    for name, variant in _variants(config):
        needs = {ranks: needs_of(variant, shape, ranks, batch) for ranks in counts}
        rows.append(
            [
                name,
                *(
                    next((n for n in counts if fits(kind, needs[n], n, memory)), None)
                    for kind in KINDS
                ),
            ]
        )
    return Table(["fewest ranks", *KINDS], rows)


def work_and_time(work: Work, steps: int | None, ranks: int, rate: Rate) -> list[str]:
    """What a step takes, and a run as far as it is known."""
    context = f" and {work.context_tokens:,} of contexts once" if work.context_tokens else ""
    lines = [
        f"a step: {work.rows_tokens:,} tokens of rows{context}, {work.flops / 1e12:.2f} TFLOP",
        f"a step sends to each rank: {work.gathered_bytes / GIB:.2f} GiB of weights,"
        f" {work.reduced_bytes / GIB:.3f} GiB of gradients",
    ]
    seconds = rate.seconds(work, ranks)
    if seconds is None:
        return [*lines, "time: give --tflops of a rank, or --seconds-per-step as measured"]
    kind = "measured" if rate.step_seconds is not None else "computing alone"
    lines.append(f"time of a step: {seconds:.3g} s ({kind})")
    if steps is None:
        return [*lines, "time of the run: give --examples, or set train.max_steps"]
    hours = steps * seconds / 3600
    cost = "" if rate.price is None else f", {hours * ranks * rate.price:,.2f} at --price"
    return [*lines, f"time of the run: {steps:,} steps, {hours:.2f} h{cost}"]


def start_with(
    source: str, overrides: Sequence[str], deepspeed: str | None, placement: Placement, ranks: int
) -> str:
    """The command that starts this run."""
    options = ["--config", source, *(word for one in overrides for word in ("--set", one))]
    file = deepspeed or {"zero3": "zero3", "zero3_offload": "zero3_offload_cpu"}.get(
        placement.zero.kind
    )
    options += ["--deepspeed_config", file] if file else []
    if ranks == 1:
        words = ["spt-ds", "train", *options]
    elif ranks <= GPUS_OF_A_NODE:
        words = ["deepspeed", "--num_gpus", str(ranks), "--module", "spt_ds.train", *options]
    else:
        nodes = f"--nodes={-(-ranks // GPUS_OF_A_NODE)}"
        each = [f"--{name}={GPUS_OF_A_NODE}" for name in ("ntasks-per-node", "gpus-per-node")]
        words = ["sbatch", nodes, *each, "slurm/train.sbatch", "--run-dir", "RUN", *options]
    return f"start with: {shlex.join(words)}"
