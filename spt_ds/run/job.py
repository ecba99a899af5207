"""A job on several ranks: they meet and work, and the first that fails speaks for all."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.display import printable
from spt_ds.errors import SptError, mendable
from spt_ds.log import flush_output, get_logger, prepare_streams, say_loading
from spt_ds.peers import explain_loss
from spt_ds.run.command import EXIT_FAILED, EXIT_USER_ERROR
from spt_ds.run.folder import RunFolder

if TYPE_CHECKING:
    from spt_ds.dist import World

RESUMES = "The same command resumes from the newest checkpoint."
_started: list[str] = []  # name of this start, the same on every rank, once they have met


def join(config: Config, folder: RunFolder) -> World:
    """Start the process group and agree on a name for this start.

    Under it the first rank that fails speaks for all.
    """
    from spt_ds import dist

    world = dist.init(config.engine.collective_timeout_s, partial(_give_up, folder))
    if world.device.type == "cpu":
        get_logger().info(dist.threads_line(world))
    if world.rank == 0:
        for old in folder.errors.glob(".first-*"):
            with contextlib.suppress(OSError):  # it is another start's, and harms none
                old.unlink()
    _started[:] = [dist.broadcast_json(uuid.uuid4().hex)]
    return world


def run_job(
    source: str,
    overrides: Sequence[str],
    run_dir: Path | None,
    work: Callable[[Config, RunFolder], int],
) -> int:
    """Read the configuration, do `work`, and turn what fails into one message and an exit code.

    `run_dir` None is `runs/NAME`, the name being that of the configuration.

    The first rank that fails speaks; the others, who fail because of it, only leave their traceback
    in `RUN/errors/rank-N.txt`. When a rank is gone without a word, one survivor on each host says
    what it sees from there.
    """
    prepare_streams()
    folder: RunFolder | None = None
    try:
        config = load_config(source, overrides)
        folder = RunFolder(run_dir or Path("runs") / config.name)
        say_loading()
        return work(config, folder)
    except SptError as error:
        _speak(folder, f"error: {error}")
        return EXIT_USER_ERROR
    # the last frame before the interpreter's: nothing is swallowed, the code says failed
    except Exception as error:
        if isinstance(error, OSError) and (mended := mendable(error)):
            _speak(folder, f"error: {mended}")
            return EXIT_USER_ERROR
        text = traceback.format_exc()
        loss = explain_loss(error)
        if loss is None:
            _fail(folder, f"{type(error).__name__}: {error}", text)
        else:
            _fail(folder, f"{loss}.\n{RESUMES} What the transport said: {error}", text, lost=True)
        return EXIT_FAILED


def _give_up(folder: RunFolder, loss: str) -> None:
    """End a process whose main thread waits for a rank that is gone, as its exception would."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main else None
    text = "Where the main thread waits:\n" + "".join(traceback.format_stack(frame))
    _fail(folder, f"{loss}.\n{RESUMES}", text, lost=True)
    exit_with(EXIT_FAILED)


def _fail(folder: RunFolder | None, what: str, text: str, *, lost: bool = False) -> None:
    """Keep the traceback and say what happened; `lost`: that a peer is gone."""
    kept = _keep_traceback(folder, text)
    message = f"failed: {what}\n{text if kept is None else f'traceback in {kept}'}"
    _speak(folder, message, socket.gethostname() if lost else "")


def exit_with(code: int) -> None:
    """End the process now, even where a thread still waits for a dead rank."""
    # A full disk behind the output changes no exit code.
    with contextlib.suppress(SptError):
        flush_output()
    sys.stderr.flush()
    os._exit(code)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _keep_traceback(folder: RunFolder | None, text: str) -> Path | None:
    if folder is None or not folder.path.is_dir():
        return None
    path = folder.errors / f"rank-{_rank()}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path


def _speak(folder: RunFolder | None, message: str, host: str = "") -> None:
    """Print `message` unless another rank of this start (with `host`: of that host) has spoken."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if not _started:
            # Nobody has met: the configuration fails alike on all ranks of a host, what comes after
            # it does not.
            if (
                folder is None
                and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"
            ):
                return
        elif folder is not None and folder.path.is_dir():
            cause = folder.errors / f".first-{_started[0]}"
            try:
                if cause.exists():
                    return
                cause.parent.mkdir(exist_ok=True)
                # Made only where it is not there yet: of two ranks that fail together one gets it.
                cause.with_name(cause.name + (host and f"-{host}")).touch(exist_ok=False)
            except FileExistsError:
                return
            except OSError:
                pass  # a full disk must not hide the message
        elif _rank() != "0":
            # There is no folder yet: what fails this early fails on all ranks together.
            return
    # On a line of its own: a progress bar may stand where the cursor is.
    text = printable(f"\nspt-ds [rank {_rank()}] {message}", keep="\n\t")
    print(text, file=sys.stderr, flush=True)
