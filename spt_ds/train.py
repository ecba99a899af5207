"""Entry point of the main job: `deepspeed --num_gpus N --module spt_ds.train --config ...` or
`spt-ds train ...`.

Exit codes: 0 done, 75 stopped on request with a checkpoint, 2 an error the user can mend, 1 a
fault.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.engine.stop import EXIT_FAILED, EXIT_USER_ERROR
from spt_ds.errors import SptError

if TYPE_CHECKING:
    from spt_ds.dist import World

_started: list[str] = []  # name of this start, the same on every rank, once they have met


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that training and generation share."""
    parser.add_argument("--config", required=True, help="YAML file or name of a shipped recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one option, such as losses.tau_gold=0.5; may be given often",
    )
    parser.add_argument(
        "--deepspeed_config", metavar="JSON", help="DeepSpeed file; decides where the base lives"
    )
    parser.add_argument("--run-dir", type=Path, help="run folder; default runs/NAME")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="spt-ds train", description="Train prompt bank and retriever on a frozen base."
    )
    add_run_arguments(parser)
    args = parser.parse_args(argv)

    def work(config: Config, run_dir: Path) -> int:
        from spt_ds import dist
        from spt_ds.engine.trainer import Trainer

        world = join(config, run_dir)
        code = Trainer(config, run_dir, args.deepspeed_config, world, started_s).run()
        dist.shutdown()
        return code

    return run_job(args, work)


def join(config: Config, run_dir: Path) -> World:
    """Start the process group; the ranks agree on a name for this start, under which the first that
    fails speaks.
    """
    from spt_ds import dist

    world = dist.init(config.engine.collective_timeout_s)
    if world.rank == 0:
        for old in (run_dir / "errors").glob(".first-*"):
            with contextlib.suppress(OSError):  # it is another start's, and harms none
                old.unlink()
    _started[:] = [dist.broadcast_json(uuid.uuid4().hex)]
    return world


def run_job(args: argparse.Namespace, work: Callable[[Config, Path], int]) -> int:
    """Read the configuration, do `work`, and turn what fails into one message and an exit code.

    The first rank that fails speaks; the others, who fail because of it, only leave their traceback
    in `RUN/errors/rank-N.txt`. When a rank is gone without a word, one survivor on each host says
    what it sees from there.
    """
    run_dir: Path | None = None
    try:
        config = load_config(args.config, args.overrides)
        run_dir = args.run_dir or Path("runs") / config.name
        return work(config, run_dir)
    except SptError as error:
        _speak(run_dir, f"error: {error}")
        return EXIT_USER_ERROR
    # the last frame before the interpreter's: nothing is swallowed, the code says failed
    except Exception as error:
        text = traceback.format_exc()
        where = _keep_traceback(run_dir, text)
        what, lost = _explained(error)
        message = f"failed: {what}\n{text if where is None else f'traceback in {where}'}"
        _speak(run_dir, message, socket.gethostname() if lost else "")
        return EXIT_FAILED


def _explained(error: Exception) -> tuple[str, bool]:
    """What happened, and whether it is that a peer is gone."""
    from spt_ds import dist

    loss = dist.explain_loss(error)
    if loss is None:
        return f"{type(error).__name__}: {error}", False
    return (
        (
            f"{loss}.\nThe same command goes on from the newest checkpoint. What the transport"
            f" said: {error}"
        ),
        True,
    )


def exit_with(code: int) -> None:
    """End the process now: after a failure, communication threads that wait for a dead peer must
    not hold it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _keep_traceback(run_dir: Path | None, text: str) -> Path | None:
    if run_dir is None or not run_dir.is_dir():
        return None
    path = run_dir / "errors" / f"rank-{_rank()}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path


def _speak(run_dir: Path | None, message: str, host: str = "") -> None:
    """Print `message` unless another rank of this start has spoken already; with `host`, another
    rank of that host.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if not _started:
            # Nobody has met: the configuration fails alike on all ranks of a host, what comes after
            # it does not.
            if (
                run_dir is None
                and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"
            ):
                return
        elif run_dir is not None and run_dir.is_dir():
            cause = run_dir / "errors" / f".first-{_started[0]}"
            try:
                if cause.exists():
                    return
                cause.parent.mkdir(exist_ok=True)
                cause.with_name(cause.name + (host and f"-{host}")).touch(exist_ok=False)
            except FileExistsError:
                return
            except OSError:
                pass  # a full disk must not hide the message
        elif _rank() != "0":
            return  # there is no folder yet: what fails this early fails together
    with contextlib.suppress(BrokenPipeError):
        # On a line of its own: a progress bar may stand where the cursor is.
        print(f"\nspt-ds [rank {_rank()}] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main())
