"""The frame of every command: shared options, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence

from spt_ds.errors import SptError, mendable
from spt_ds.log import flush_output, prepare_streams

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 0, 1, 2, 75


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int | None],
) -> int:
    """Parse `argv`, do `work` with the arguments and return its exit code, by default 0.

    An error that the user can mend becomes one line on stderr and exit code 2.
    """
    prepare_streams()
    args = parser.parse_args(argv)
    try:
        code = work(args) or EXIT_DONE
        # A disk that refuses the output is noticed here, before there is an exit code.
        flush_output()
        return code
    except SptError as error:
        told = error
    except OSError as error:
        if (mended := mendable(error)) is None:
            raise
        told = mended
    with contextlib.suppress(SptError):
        # What was printed before must come before the error, in a log too.
        flush_output()
    print(f"{parser.prog}: {told}", file=sys.stderr)
    return EXIT_USER_ERROR


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Import PyTorch and transformers in here: that is where a command's start spends its time."""
    fresh = "torch" not in sys.modules and gc.isenabled()
    if fresh:
        gc.disable()
    try:
        yield
    finally:
        if fresh:
            # Hundreds of thousands of objects that live as long as the process. The collector would
            # walk over them again and again: a quarter of the imports' time.
            gc.freeze()
            gc.enable()


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--set KEY=VALUE`, which may be given often and comes as `overrides`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument's type: a whole number from `least` on."""

    def number(given: str) -> int:
        if not given.isdecimal() or int(given) < least:
            raise argparse.ArgumentTypeError(
                f"got {given!r}, expected a whole number from {least} on"
            )
        return int(given)

    return number


def add_deepspeed(parser: argparse.ArgumentParser) -> None:
    """Add `--deepspeed_config`, and what DeepSpeed's launcher passes of its own accord."""
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="DeepSpeed file, or a shipped one's name such as zero3; decides where the base lives",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
