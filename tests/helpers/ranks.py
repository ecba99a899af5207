"""Runs a function on N ranks that gloo connects, with a time-out that prints every rank's
traceback.

The ranks are forked from a server process that has imported torch, transformers and DeepSpeed once:
a start costs well under a second instead of ten. Functions and arguments must be importable by
name; results are plain data.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "deepspeed",
    "pyarrow",
    "spt_ds.engine.trainer",
    "torch.utils.tensorboard",
    "spt_ds.model.quant_load",
]
MEMORY_LIMIT_BYTES = 16 * 2**30

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 90
) -> list[Any]:
    """Call `function(world, *args)` on `size` ranks and return their results in rank order.

    Raises AssertionError with each rank's traceback when one fails or the time is up.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            receive, send = _context.Pipe(duplex=False)
            log = Path(folder) / f"rank-{rank}.txt"
            process = _context.Process(
                target=_rank_main, args=(rank, size, port, log, timeout_s, send, function, args)
            )
            process.start()
            send.close()
            pipes.append(receive)
            processes.append((process, log))
        results = [_result(pipe, timeout_s + 15) for pipe in pipes]
        for process, _ in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        if not all(ok for ok, _ in results):
            logs = "\n".join(
                f"--- rank {rank}\n{log.read_text()}" for rank, (_, log) in enumerate(processes)
            )
            raise AssertionError(f"{function.__name__} failed on {size} ranks\n{logs}")
    return [value for _, value in results]


def _result(pipe: Any, timeout_s: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(timeout_s) else (False, None)
    except EOFError:
        return False, None


def _rank_main(
    rank: int,
    size: int,
    port: int,
    log: Path,
    timeout_s: float,
    send: Any,
    function: Any,
    args: tuple[Any, ...],
) -> None:
    with log.open("w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = stream, stream
        faulthandler.enable(stream)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        import torch

        from spt_ds import dist

        torch.set_num_threads(1)
        try:
            world = dist.init(int(timeout_s))
            value = function(world, *args)
            dist.barrier()
            dist.shutdown()
            send.send((True, value))
        except BaseException:
            traceback.print_exc()
            send.send((False, None))
        stream.flush()
        os._exit(0)
