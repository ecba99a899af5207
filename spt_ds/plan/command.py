"""`spt-ds plan`: where the base of a run would live, what else fits, and how long a run takes.

No weight is read. Well-known bases are planned without network. Exit code 2 where
`engine.placement: auto` finds no place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.placement.choose import choose_placement
from spt_ds.placement.estimate import MicroBatch, needs_of
from spt_ds.placement.work import Lengths, work_of
from spt_ds.plan.base import memory_of, shape_of
from spt_ds.plan.text import (
    GPUS_OF_A_NODE,
    MOST_RANKS,
    Rate,
    fewest_ranks,
    sizes,
    start_with,
    what_fits,
    work_and_time,
)
from spt_ds.run.command import add_overrides, run_command

ANY = "?"
CONVAI2 = "143,14"  # mean tokens of a context and a reply in Llama's tokenizer


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
        "--ranks",
        "--gpus",
        default="1",
        metavar="N",
        help=f"processes of the run (default 1); {ANY!r} says how many each way needs",
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
    parser.add_argument(
        "--tokens",
        default=CONVAI2,
        metavar="C,R",
        help="mean tokens of a context and a reply (default %(default)s, as in ConvAI2)",
    )
    parser.add_argument(
        "--largest",
        metavar="E,C,R",
        help="examples of the largest micro-batch, tokens of its contexts and of its replies;"
        " default the most that the options allow",
    )
    parser.add_argument("--examples", type=float, metavar="N", help="of the training data")
    parser.add_argument(
        "--tflops", type=float, metavar="T", help="that a rank reaches, in 10^12 a second"
    )
    parser.add_argument("--seconds-per-step", type=float, metavar="S", help="as measured")
    parser.add_argument("--price", type=float, metavar="P", help="of a rank for an hour")
    return run_command(parser, argv, _plan)


def _plan(args: argparse.Namespace) -> None:
    numbers = ("memory_gib", "host_gib", "examples", "tflops", "seconds_per_step", "price")
    for name in numbers:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    lengths, ranks, batch = _lengths(args.tokens), _ranks(args.ranks), _largest(args.largest)
    config = load_config(args.config, args.overrides)
    shape = shape_of(config.model)
    memory = memory_of(args.memory_gib, args.host_gib, ranks or 1)
    print(f"base: {config.model.base}, {shape.parameters / 1e9:.2f} B weights")
    if ranks is None:
        print(fewest_ranks(config, shape, memory, batch).text(), end="")
        return
    print("\n".join(sizes(needs_of(config, shape, ranks, batch), ranks, memory)))
    print(f"\n{what_fits(config, shape, ranks, memory, batch).text()}")
    # As the command to start with, which is printed last.
    host_ranks = GPUS_OF_A_NODE if ranks % GPUS_OF_A_NODE == 0 else ranks
    file = args.deepspeed_config
    placement = choose_placement(config, shape, file, ranks, memory, batch, host_ranks)
    placement.zero.remove_swap_files()  # a dry run leaves no folder behind
    print("\n".join(placement.reasons))
    rate = Rate(args.tflops, args.seconds_per_step, args.price)
    work = work_of(config, shape, placement, lengths, ranks)
    print("\n".join(work_and_time(work, _steps(config, args.examples), ranks, rate)))
    print(start_with(args.config, args.overrides, args.deepspeed_config, placement, ranks))


def _ranks(given: str) -> int | None:
    """The number of ranks; None where the plan is to find it."""
    if given == ANY:
        return None
    if not given.isdecimal() or not 1 <= int(given) <= MOST_RANKS:
        raise ConfigError(
            f"--ranks {given}: give a whole number from 1 to {MOST_RANKS}, or {ANY!r} to be told"
            " how many are needed"
        )
    return int(given)


def _lengths(given: str) -> Lengths:
    context, _, response = given.partition(",")
    try:
        lengths = Lengths(float(context), float(response))
    except ValueError:
        lengths = Lengths(0, 0)
    if not (0 < lengths.context < 1e9 and 0 < lengths.response < 1e9):
        raise ConfigError(
            f"--tokens {given}: give the mean tokens of a context and of a reply, such as {CONVAI2}"
        )
    return lengths


def _largest(given: str | None) -> MicroBatch | None:
    if given is None:
        return None
    numbers = given.split(",")
    # Nine digits hold any window, and refuse what would be no size of a micro-batch.
    if len(numbers) != 3 or not all(n.isdecimal() and 1 <= int(n) < 1e9 for n in numbers):
        raise ConfigError(
            f"--largest {given}: give the examples of the largest micro-batch, the tokens of its"
            " contexts and those of its replies, such as 4,700,60"
        )
    return MicroBatch(*map(int, numbers))


def _steps(config: Config, examples: float | None) -> int | None:
    """Optimizer steps of the run; None where they depend on the data and nothing is said of it."""
    settings = config.train
    if settings.max_steps or examples is None:
        return settings.max_steps or None
    return -(-int(examples) * settings.epochs // settings.global_batch)


if __name__ == "__main__":
    raise SystemExit(main())
