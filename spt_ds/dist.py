"""The only door to process groups outside `engine/`: start, reduce, gather, agree.

A single process is a group of one, so that no caller needs a second path. Objects travel as JSON,
never as pickles.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from spt_ds import errors, peers
from spt_ds.errors import EngineError
from spt_ds.log import get_logger

Result = TypeVar("Result")
c10d: Any = dist.distributed_c10d  # has more than its types declare
# Seconds by which the group of all ranks waits longer than decisions do. Past its time-out NCCL
# ends the process, so `peers` must have spoken by then; gloo raises an exception, which is as good.
MARGIN_S = {"gloo": 0, "nccl": 60}
_decisions: dist.ProcessGroup | None = None  # of all ranks, over gloo; None: the default group is


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


# Names under which the launchers tell a process its place: torchrun, deepspeed, Open MPI, srun. The
# last comes last because mpirun starts its daemons with srun: its ranks carry the variables of a
# daemon's task.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHERS = (
    _PLACE,
    (*_PLACE[:3], "LOCAL_SIZE"),
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def launch_variables(environment: Mapping[str, str]) -> dict[str, int]:
    """Map the launcher's variables to torchrun's names; a bare process is 0 of 1.

    One launcher is taken whole: srun's numbers are not mixed with torchrun's, which may run inside
    an srun task. Raises EngineError when a launcher set some of them only, or numbers that
    contradict one another.
    """
    candidates = [
        names for names in LAUNCHERS if names[0] in environment and names[1] in environment
    ]
    if not candidates:
        partial = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
        if partial:
            raise EngineError(
                f"{partial[0]} is set but not its partner; set both RANK and WORLD_SIZE, or neither"
            )
        return dict(zip(_PLACE, (0, 1, 0, 1), strict=True))
    # torchrun and deepspeed share the first three names. The fourth shows which of them it was.
    alike = [names for names in candidates if names[:3] == candidates[0][:3]]
    names = next((names for names in alike if names[3] in environment), alike[0])
    told = [
        environment.get(name, default)
        for name, default in zip(names, ("", "", "0", "1"), strict=True)
    ]
    if names[3].startswith("SLURM"):
        told[3] = _tasks_of(told[3], int(environment.get("SLURM_NODEID", "0")))
    for name, text in zip(names, told, strict=True):
        if not text.isdigit():
            raise EngineError(f"{name}: expected a whole number, got {text!r}")
    values = dict(zip(_PLACE, map(int, told), strict=True))
    if not values["RANK"] < values["WORLD_SIZE"]:
        raise EngineError(
            f"rank {values['RANK']} does not exist in a world of {values['WORLD_SIZE']}"
        )
    return values


def _srun_address(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of a task of srun: its first node, a port from its numbers."""
    if "SLURM_STEP_NODELIST" not in environment or shutil.which("scontrol") is None:
        return {}
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if told.returncode:
        return {}
    # Every task works out the same port without a word to the others, and two steps on one node
    # hardly ever share it.
    number = int(environment["SLURM_JOB_ID"]) * 101 + int(environment["SLURM_STEP_ID"])
    return {"MASTER_ADDR": told.stdout.split()[0], "MASTER_PORT": str(20000 + number % 12000)}


def _tasks_of(listed: str, node: int) -> str:
    """Tasks on a node by Slurm's list such as "4(x2),2"; the list where it has no such node."""
    for item in listed.split(","):
        count, _, times = item.rstrip(")").partition("(x")
        node -= int(times or 1)
        if node < 0:
            return count
    return listed


def gpu_of(local_rank: int) -> int | None:
    """The GPU of a local rank, None on a host without; EngineError when there are too few."""
    count = torch.cuda.device_count()
    if count and local_rank >= count:
        raise EngineError(
            f"local rank {local_rank} has no GPU: this process sees {count}; start one rank per"
            " GPU, each of which sees all GPUs of its node (srun: --gpu-bind=none)"
        )
    return local_rank if count else None


def init(timeout_s: int, give_up: Callable[[str], None] = peers.say_and_end) -> World:
    """Join, or alone make, the process group: NCCL on GPUs, gloo on CPUs.

    Collectives fail after `timeout_s` seconds: with an exception, or where that cannot be, with a
    call of `give_up`, which gets the reason and ends the process.
    """
    place = launch_variables(os.environ)
    size = place["WORLD_SIZE"]
    gpu = gpu_of(place["LOCAL_RANK"])
    if gpu is not None:
        torch.cuda.set_device(gpu)
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    if size == 1 and torch.cuda.device_count() > 1:
        get_logger().warning(
            f"world size is 1 but this host has {torch.cuda.device_count()} GPUs; "
            "start with `deepspeed --num_gpus N --module spt_ds.train ...` to use them"
        )
    if not dist.is_initialized():
        _make_groups(place, timeout_s, "gloo" if gpu is None else "nccl")
        if size > 1:
            store = c10d._get_default_store().clone()
            peers.start(store, place["RANK"], size, timeout_s, _entered, give_up)
    host = socket.gethostname()
    told = gather_json([host, os.getpid(), own_cores()])
    peers.know([(where, pid) for where, pid, _ in told])
    if not os.environ.get("OMP_NUM_THREADS"):
        # Each rank takes all cores by itself: two ranks would get in each other's way.
        most = fair_threads(own_cores(), [cores for where, _, cores in told if where == host])
        if most < torch.get_num_threads():
            torch.set_num_threads(most)
    return World(place["RANK"], size, place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"], device)


def _make_groups(place: Mapping[str, int], timeout_s: int, backend: str) -> None:
    """Make the group of all ranks, and where it is NCCL's one over gloo for what they decide."""
    global _decisions
    # DeepSpeed reads its place from torchrun's names, whichever launcher there was.
    os.environ.update({key: str(value) for key, value in place.items()})
    size, margin_s = place["WORLD_SIZE"], MARGIN_S[backend]
    timeout = datetime.timedelta(seconds=timeout_s + margin_s)
    # A group that somebody else makes, as DeepSpeed does, has torch's default: so this is ours.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    # A lone process takes no port, so any number of them can run on a host.
    store = dist.HashStore() if size == 1 else None  # type: ignore[attr-defined]
    if store is None and "MASTER_ADDR" not in os.environ:
        os.environ.update(_srun_address(os.environ))
    missing = [
        name for name in ("MASTER_ADDR", "MASTER_PORT") if store is None and name not in os.environ
    ]
    if missing:
        raise EngineError(
            f"{' and '.join(missing)} not set: every rank needs the address and port of rank 0"
        )
    try:
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=place["RANK"], world_size=size
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise EngineError(
            f"port {os.environ['MASTER_PORT']} of this host is in use, probably by another job;"
            " wait until it ends, or give another port (deepspeed --master_port 29501,"
            " torchrun --master-port 29501, else MASTER_PORT)"
        ) from error
    if margin_s and size > 1:
        own = datetime.timedelta(seconds=timeout_s)
        _decisions = dist.new_group(backend="gloo", timeout=own)


def _entered() -> int:
    """Collectives that this rank has entered, in all groups; ranks that are as far have as many."""
    return sum(group._get_sequence_number_for_group() for group in list(c10d._world.pg_map))


def own_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS binds no process to cores


def fair_threads(own: Sequence[int], ranks: Sequence[Sequence[int]]) -> int:
    """Threads of a rank whose cores are `own`; `ranks` are the cores of each rank of its host.

    A core that several ranks may use counts by its part: launchers that bind ranks to cores have
    shared them out already.
    """
    users = Counter(core for cores in ranks for core in cores)
    # Thirds do not add up to 1 exactly.
    return max(1, int(sum(1 / users[core] for core in own) + 1e-6))


def threads_line(world: World) -> str:
    """How many threads this rank computes with, and who decided so."""
    ranks = "1 rank" if world.local_size == 1 else f"each of {world.local_size} ranks"
    given = os.environ.get("OMP_NUM_THREADS")
    why = "OMP_NUM_THREADS is set" if given else "OMP_NUM_THREADS gives another number"
    return (
        f"threads: {torch.get_num_threads()} for {ranks} of this host,"
        f" which may use {len(own_cores())} cores ({why})"
    )


def shutdown() -> None:
    """Leave the process group."""
    global _decisions
    peers.leave()
    _decisions = None
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Stack equally shaped tensors of all ranks: [...] -> [ranks, ...], without gradient."""
    size = dist.get_world_size()
    if size == 1:
        return tensor.detach()[None]
    out = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(out, tensor.detach().contiguous(), group)
    return torch.stack(out)


def gather_json(value: Any) -> list[Any]:
    """Return every rank's `value` (anything JSON can hold), in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    # JSON and not `all_gather_object`, which pickles: a pickle runs code where it is read.
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    # Gathered tensors must have one shape, so lengths travel first and the rows are padded.
    lengths = all_gather(torch.tensor([len(data)]), _decisions)[:, 0].tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = data
    rows = all_gather(padded, _decisions)
    return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    return gather_json(value)[0]


def broadcast_(tensor: torch.Tensor) -> None:
    """Overwrite `tensor` with rank 0's."""
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1), group=_decisions)


def same_everywhere(what: str, value: str) -> None:
    """Raise EngineError on every rank when `value` differs between ranks, naming the groups."""
    values = gather_json(value)
    if len(set(values)) > 1:
        groups = {
            one: [rank for rank, other in enumerate(values) if other == one]
            for one in dict.fromkeys(values)
        }
        listing = "; ".join(f"ranks {ranks}: {one}" for one, ranks in groups.items())
        raise EngineError(
            f"{what} differs between ranks: {listing}; give every rank the same files"
        )


def leader_first(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank of each node, then on the others, who find its caches.

    `work` is free of collectives. An error that a user can cause is raised on every rank together,
    so that nobody waits for a rank that gave up.
    """
    leader = world.local_rank == 0
    result = agreed(lambda: work() if leader else None)
    return agreed(lambda: cast(Result, result) if leader else work())


def agreed(work: Callable[[], Result]) -> Result:
    """Run `work`; where it fails on any rank, raise that error on all of them.

    `work` is free of collectives, and its errors are those a user can cause.
    """
    result, problem, mine = None, None, None
    try:
        result = work()
    except errors.SptError as error:
        # Errors of other classes are faults of the code. Such a rank ends, and the others learn of
        # it from the lost connection.
        problem, mine = [type(error).__name__, str(error)], error
    first = next((found for found in gather_json(problem) if found), None)
    # A rank with an error of its own raises that one, which has its traceback.
    if mine is not None:
        raise mine
    if first is not None:
        raise getattr(errors, first[0])(first[1])
    return cast(Result, result)
