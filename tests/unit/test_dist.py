"""Who a process is under each launcher; what ranks tell one another, and how they fail together."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from spt_ds import dist, errors, peers
from spt_ds.errors import DataError, EngineError
from tests.helpers.ranks import run_ranks

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "16",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def place(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, int]:
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, place(0, 1, 0, 1)),
        (TORCHRUN, place(3, 4, 1, 2)),
        (DEEPSPEED, place(3, 4, 1, 2)),
        (SRUN, place(5, 8, 1, 4)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, place(5, 8, 1, 4)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2,3(x2)", "SLURM_NODEID": "2"}, place(5, 8, 1, 3)),
        (OMPI, place(2, 4, 0, 2)),
        # A launcher inside a scheduler's task is the one that counts, whole.
        ({**SRUN, **TORCHRUN}, place(3, 4, 1, 2)),
        ({**SRUN, **DEEPSPEED}, place(3, 4, 1, 2)),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2"}, place(1, 2, 0, 1)),
        # mpirun's daemons are tasks of srun: their numbers are not those of its ranks.
        ({**SRUN, **OMPI}, place(2, 4, 0, 2)),
        # An interactive shell of a scheduler is no task of a step.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, place(0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, place(0, 1, 0, 1)),
    ],
)
def test_launchers(environment: dict[str, str], expected: dict[str, int]) -> None:
    assert dist.launch_variables(environment) == expected


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "RANK is set but not its partner"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but not its partner"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: expected a whole number, got 'x'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected a whole number, got '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 does not exist in a world of 2"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        dist.launch_variables(environment)


def test_ranks_without_an_address_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(EngineError, match="MASTER_ADDR and MASTER_PORT not set"):
        dist.init(5)


def test_a_port_in_use_is_an_error_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs on one host take the same default port of their launcher."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**two, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(EngineError, match=f"port {port} of this host is in use"):
            dist.init(5)


def talk(world: dist.World) -> dict[str, Any]:
    """Everything that ranks say to one another, once."""
    mine = torch.tensor([float(world.rank), 1.0])
    own = torch.full((2,), float(world.rank))
    dist.broadcast_(own)
    told: dict[str, Any] = {
        "gathered": dist.gather_json({"rank": world.rank, "text": "é" * world.rank}),
        "leader": dist.broadcast_json(f"of {world.rank}"),
        "stacked": dist.all_gather(mine).tolist(),
        "sum": dist.all_reduce_sum(mine.clone()).tolist(),
        "broadcast": own.tolist(),
    }
    stamps = dist.leader_first(world, lambda: time.monotonic())
    told["first"] = dist.gather_json(stamps)
    return told


@pytest.mark.parametrize("size", [1, 3])
def test_what_ranks_tell_one_another(size: int) -> None:
    for told in run_ranks(size, talk):
        assert told["gathered"] == [{"rank": rank, "text": "é" * rank} for rank in range(size)]
        assert told["leader"] == "of 0"
        assert told["stacked"] == [[rank, 1] for rank in range(size)]
        assert told["sum"] == [size * (size - 1) / 2, size]
        assert told["broadcast"] == [0, 0]
        assert told["first"][0] == min(told["first"])


def disagree(world: dist.World, what: str) -> tuple[str, str]:
    """One rank fails; what each of them raises."""

    def fail() -> str:
        if world.rank == 1:
            raise DataError("a.txt:3: bad line")
        return "fine"

    work = {
        "agreed": lambda: dist.agreed(fail),
        "leader_first": lambda: dist.leader_first(world, fail),
        "same": lambda: dist.same_everywhere("data", "ab" if world.rank == 1 else "cd"),
    }[what]
    try:
        work()
    except errors.SptError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("what", ["agreed", "leader_first"])
def test_an_error_of_one_rank_is_raised_on_all(what: str) -> None:
    assert run_ranks(3, disagree, what) == [("DataError", "a.txt:3: bad line")] * 3


def test_differing_values_are_listed_by_rank() -> None:
    says = (
        "data differs between ranks: ranks [0, 2]: cd; ranks [1]: ab; give every rank the same"
        " files"
    )
    assert run_ranks(3, disagree, "same") == [("EngineError", says)] * 3


def test_other_errors_explain_no_loss() -> None:
    assert peers.explain_loss(RuntimeError("shape mismatch")) is None


def test_a_process_alone_loses_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_processes", [[socket.gethostname(), os.getpid()]])
    assert peers.explain_loss(RuntimeError("The read operation timed out")) is None


def test_a_rank_that_did_not_say_where_it_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_processes", [])
    assert peers._words([1], alive=True).startswith("rank 1 did not answer within")


@pytest.mark.parametrize(
    "text",
    [
        "Connection closed by peer [127.0.0.1]:25787",
        "Read error [127.0.0.1]:40649: Connection reset by peer",
        "Timed out waiting 15000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "Watchdog caught collective operation timeout: WorkNCCL timed out in blocking wait",
    ],
)
def test_the_rank_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        here = socket.gethostname()
        monkeypatch.setattr(
            peers, "_processes", [[here, os.getpid()], [here, other.pid], ["elsewhere", 1]]
        )
        told = peers.explain_loss(RuntimeError(text))
        assert told is not None
        assert (
            "a rank on elsewhere died or did not answer within engine.collective_timeout_s (every"
            f" rank on {here}" in told
        )
        other.kill()
        told = peers.explain_loss(RuntimeError(text))  # not even buried yet
        assert told is not None
        assert told.startswith(f"rank 1 (pid {other.pid} on {here}) ended in the middle of a step")


@pytest.mark.parametrize(
    ("own", "ranks", "expected"),
    [
        (range(8), [range(8)], 8),
        (range(8), [range(8)] * 2, 4),
        (range(6), [range(6)] * 3, 2),
        (range(8), [range(8)] * 3, 2),
        (range(2), [range(2)] * 4, 1),  # never none
        # A launcher that binds each rank to cores of its own has shared them out.
        (range(4), [range(4), range(4, 8)], 4),
        # The rank that is bound to core 0 leaves the other seven to its neighbour.
        (range(8), [range(8), [0]], 7),
    ],
)
def test_ranks_of_a_host_share_its_cores(
    own: range, ranks: list[Sequence[int]], expected: int
) -> None:
    assert dist.fair_threads(own, ranks) == expected


def threads_of(world: dist.World, given: str | None) -> tuple[int, str]:
    """Threads of a rank that meets the others again, where OMP_NUM_THREADS is `given`."""
    dist.shutdown()
    os.environ.pop("OMP_NUM_THREADS", None)
    if given is not None:
        os.environ["OMP_NUM_THREADS"] = given
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    torch.set_num_threads(5)
    again = dist.init(60)
    return torch.get_num_threads(), dist.threads_line(again)


def test_two_ranks_do_not_both_take_all_cores() -> None:
    cores = len(dist.own_cores())
    threads = min(5, max(1, cores // 2))
    line = (
        f"threads: {threads} for each of 2 ranks of this host, which may use {cores} cores"
        " (OMP_NUM_THREADS gives another number)"
    )
    assert run_ranks(2, threads_of, None) == [(threads, line)] * 2


def test_who_sets_omp_num_threads_is_obeyed() -> None:
    line = (
        f"threads: 5 for each of 2 ranks of this host, which may use {len(dist.own_cores())} cores"
        " (OMP_NUM_THREADS is set)"
    )
    assert run_ranks(2, threads_of, "5") == [(5, line)] * 2
