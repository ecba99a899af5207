"""A rank that falls silent is named by the others within the time-out, also where their collectives
raise nothing: as NCCL's, whose time-out is longer here too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spt_ds import dist, peers
from tests.distributed.scenes import CONFIG, ROOT, Scene
from tests.distributed.test_dead_rank import assert_one_message
from tests.helpers.ranks import free_port, run_ranks

LIMIT_S = 8
MARGIN_S = 60
LEEWAY_S = 12


def start(
    scene: Scene, folder: Path, ranks: int, fault: str, margin_s: int
) -> list[subprocess.Popen[str]]:
    """Train without a launcher, which would end the ranks itself."""
    options = scene.overrides(
        "llama",
        "train.max_steps=5",
        "train.micro_batch=1",
        f"engine.collective_timeout_s={LIMIT_S}",
    )
    command = [
        sys.executable,
        str(ROOT / "tests" / "distributed" / "dying.py"),
        *("--config", CONFIG, "--deepspeed_config", scene.ds("zero3")),
        *("--run-dir", str(folder / "run")),
        *[word for option in options for word in ("--set", option)],
    ]
    shared = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SPT_TEST_FAULT": fault,
        "SPT_TEST_MARGIN": str(margin_s),
        "SPT_TEST_DIED": str(folder / "died"),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("victim", "how", "margin_s", "says"),
    [
        (1, "stop", MARGIN_S, "died or did not answer within engine.collective_timeout_s: its"),
        (
            1,
            "hang",
            MARGIN_S,
            "did not answer within engine.collective_timeout_s: its process runs",
        ),
        # The first process holds the store through which the ranks look for one another.
        pytest.param(0, "stop", MARGIN_S, "died or did not answer", marks=pytest.mark.slow),
        pytest.param(1, "stop", 0, "died or did not answer", marks=pytest.mark.slow),
        pytest.param(1, "hang", 0, "its process runs", marks=pytest.mark.slow),
    ],
)
def test_a_silent_rank_is_named(
    scene: Scene, tmp_path: Path, victim: int, how: str, margin_s: int, says: str
) -> None:
    ranks = start(scene, tmp_path, 3, f"{victim}:3:{how}", margin_s)
    silent = ranks.pop(victim)
    try:
        told = [process.communicate(timeout=120)[1] for process in ranks]
        seconds = time.time() - (tmp_path / "died").stat().st_mtime
        # Nobody ended it: it is the others who did not wait.
        assert silent.poll() is None
    finally:
        for process in (silent, *ranks):
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in ranks] == [1, 1]
    message = assert_one_message("".join(told))
    assert f"failed: rank {victim} (pid {silent.pid} on " in message
    assert says in message
    assert LIMIT_S <= seconds < LIMIT_S + LEEWAY_S
    for rank in {0, 1, 2} - {victim}:
        kept = (tmp_path / "run" / "errors" / f"rank-{rank}.txt").read_text()
        assert "train_window" in kept  # where it waited
        assert margin_s == 0 or kept.startswith("Where the main thread waits:")


def test_what_ranks_decide_fails_with_an_exception_where_nccl_would_abort() -> None:
    survivor, _ = run_ranks(2, decide_without_rank_1, free_port(), free_port())
    limits, told = survivor
    assert limits == [LIMIT_S + MARGIN_S, LIMIT_S]  # of the group of all, and of decisions
    assert told.startswith("rank 1 (pid ")
    assert "its process runs" in told


def decide_without_rank_1(world: dist.World, port: int, port_after: int) -> tuple[list[float], str]:
    """Gather where rank 1 comes too late; the time-outs of the groups, and what rank 0 was told."""
    dist.shutdown()
    dist.MARGIN_S["gloo"], os.environ["MASTER_PORT"] = MARGIN_S, str(port)
    dist.init(LIMIT_S)
    groups = (torch.distributed.group.WORLD, dist._decisions)
    backends = [group._get_backend(torch.device("cpu")) for group in groups if group]
    limits = [backend.options._timeout.total_seconds() for backend in backends]
    told = None
    if world.rank == 1:
        time.sleep(LIMIT_S + 8)
    else:
        with pytest.raises(RuntimeError) as raised:
            dist.gather_json("here")
        told = peers.explain_loss(raised.value)
        time.sleep(6)
    # The helper meets once more at the end.
    dist.shutdown()
    dist.MARGIN_S["gloo"], os.environ["MASTER_PORT"] = 0, str(port_after)
    dist.init(60)
    return limits, told or ""
