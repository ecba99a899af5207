"""What can befall a job, and what it cost: the rows of the table in docs/how-to/clusters.md."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.sandbox import Sandbox, kill_9, processes, ranks, wait_until
from tests.cluster.slurm import Slurm, job_log


@dataclass(frozen=True)
class Cost:
    """What one fault cost a run."""

    fault: str
    noticed_s: float
    """From the fault to the end of the step that it hit, or to the next start where nobody could
    tell of the end.
    """
    again_s: float
    """From the fault to the end of the first optimizer step of the next start."""
    repeated: int
    """Optimizer steps taken twice."""

    def row(self) -> str:
        return f"| {self.fault} | {self.noticed_s:.0f} | {self.again_s:.0f} | {self.repeated} |"


def rank_killed(sandbox: Sandbox, slurm: Slurm) -> None:
    kill_9(ranks()[-1])


def launcher_killed(sandbox: Sandbox, slurm: Slurm) -> None:
    for pid, command in processes():
        if command and Path(command[0]).name == "srun":
            with contextlib.suppress(ProcessLookupError):  # srun's helper ends with it
                kill_9(pid)


def requeued_by_hand(sandbox: Sandbox, slurm: Slurm) -> None:
    (number,) = slurm.call("squeue", "--noheader", "--states=R", "--format=%A").split()
    slurm.call("scontrol", "requeue", number)


def link_cut(sandbox: Sandbox, slurm: Slurm) -> None:
    sandbox.link("node2", "down")


def first_link_cut(sandbox: Sandbox, slurm: Slurm) -> None:
    sandbox.link("node1", "down")


def slurmd_killed(sandbox: Sandbox, slurm: Slurm) -> None:
    """slurmd dies for good; the ranks go on without it, but so slowly that Slurm gives the node up
    first.
    """
    kill_9(sandbox.daemons["slurmd-node2"].pid)
    pids = ranks()
    pause(pids)
    wait_for_node_down(slurm, "node2")
    go_on(pids)


def wait_for_node_down(slurm: Slurm, node: str) -> None:
    """Wait until Slurm has given a node up."""
    command = ("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
    wait_until(f"{node} down", lambda: "down" in slurm.call(*command), 90, 1)


def mend(sandbox: Sandbox, slurm: Slurm) -> None:
    """Links up, every slurmd there, every node idle."""
    for host in ("node1", "node2", "node3"):
        sandbox.link(host, "up")
        if sandbox.daemons[f"slurmd-{host}"].poll() is not None:
            slurm.start_slurmd(host)
    wait_until("nodes idle", lambda: slurm.node_states() == ["idle"] * 3, 90, 1)


FAULTS: dict[str, Callable[[Sandbox, Slurm], None]] = {
    "`kill -9` of a rank": rank_killed,
    "`kill -9` of srun, the launcher": launcher_killed,
    "`kill -9` of slurmd, for good": slurmd_killed,
    "link of a node cut, for good": link_cut,
    "link of the first node cut, for good": first_link_cut,
    "`scontrol requeue`": requeued_by_hand,
}


def newest_step(run: Path) -> int:
    """The last optimizer step that metrics.jsonl tells of; 0 before the first."""
    return max((record["step"] for record in _records(run)), default=0)


def cost(fault: str, run: Path, begin: float, step: int) -> Cost:
    """What the fault at time `begin` (seconds since 1970), after `step`, cost a run that is done by
    now.
    """
    told = [
        _seconds(line)
        for line in job_log(run).splitlines()
        if re.search(r"\] (step ended|start \d)", line)
    ]
    noticed = min(max(when - begin, 0.0) for when in told if when >= int(begin))
    resumed = re.findall(
        r"resuming from \S+ at step (\d+)",
        "".join(p.read_text() for p in run.glob("logs/node*.log")),
    )
    start = int(resumed[0]) if resumed else 0
    again = next(record["time"] for record in _records(run) if record["step"] == start + 1)
    return Cost(fault, noticed, again - begin, max(step - start, 0))


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        record
        for line in lines
        if line.endswith("}") and (record := json.loads(line))["kind"] == "train"
    ]


def _seconds(line: str) -> float:
    return datetime.datetime.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%S%z").timestamp()


def pause(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def go_on(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended by Slurm in the meantime
            os.kill(pid, signal.SIGCONT)


def wait_for_step(run: Path, step: int, timeout_s: float = 90) -> tuple[float, int]:
    """Wait until `step` is done; return the time and the newest step."""
    wait_until(f"step {step} of {run}", lambda: newest_step(run) >= step, timeout_s)
    return time.time(), newest_step(run)
