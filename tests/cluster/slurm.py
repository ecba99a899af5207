"""A real Slurm of three nodes in the sandbox: munge, slurmctld and a slurmd on each host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import jobs
from tests.cluster.sandbox import CONTROL, HOSTS, ROOT, Sandbox, wait_until

SLURMD_TIMEOUT_S = 10
CONFIG = """\
ClusterName=spt
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Short credentials: a requeued job is held until those of its last start have expired (121 s by
# default).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_min_interval=100000,requeue_delay=0
ReturnToService=2
SlurmdTimeout={timeout}
KillWait=8
MessageTimeout=5
TCPTimeout=2
MinJobAge=3600
TreeWidth=16
MailProg=/bin/true
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Slurm:
    """The cluster; `submit` and the questions that tests ask about jobs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.folder = sandbox.folder / "slurm"
        self.folder.mkdir()
        self.runs: dict[int, Path] = {}
        (self.folder / "state").mkdir()
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs=4 State=UNKNOWN"
            for name, address in HOSTS.items()
        )
        config = self.folder / "slurm.conf"
        config.write_text(
            CONFIG.format(
                control=CONTROL, folder=self.folder, timeout=SLURMD_TIMEOUT_S, nodes=nodes
            )
        )
        self.environment = {**os.environ, "SLURM_CONF": str(config)}
        self.job_environment = {
            **jobs.ENVIRONMENT,
            "SPT_PYTHON": sys.executable,
            "SPT_WAIT_S": "20",
        }
        self._start_munge()
        sandbox.start(
            "slurmctld", ["slurmctld", "-D", "-f", str(config)], environment=self.environment
        )
        for host in HOSTS:
            self.start_slurmd(host)
        wait_until("nodes idle", lambda: self.node_states() == ["idle"] * len(HOSTS), 60)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = ("socket", "pid", "log", "seed")
        socket, pid, log, seed = (self.folder / f"munge.{name}" for name in names)
        options = [
            f"--key-file={key}",
            f"--socket={socket}",
            f"--pid-file={pid}",
            f"--log-file={log}",
        ]
        self.sandbox.start(
            "munged", ["munged", "--foreground", "--force", f"--seed-file={seed}", *options]
        )
        wait_until("munge socket", socket.exists, 20)

    def start_slurmd(self, host: str) -> None:
        command = ["slurmd", "-D", "-N", host, "-f", str(self.folder / "slurm.conf")]
        self.sandbox.start(f"slurmd-{host}", command, host, self.environment)

    def call(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**self.environment, **variables},
            timeout=60,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> int:
        """sbatch from the root of the checkout; returns the job's number."""
        output = f"--output={self.sandbox.folder}/job-%j.out"
        return int(
            self.call(
                "sbatch", "--parsable", output, *arguments, **{**self.job_environment, **variables}
            )
        )

    def node_states(self) -> list[str]:
        return self.call("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T").split()

    def job(self, number: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", str(number))))

    def wait_for(
        self, number: int, states: tuple[str, ...] = ("COMPLETED",), timeout_s: float = 120
    ) -> dict[str, str]:
        """Wait until the job has ended and is in one of `states`; AssertionError with its logs
        otherwise.
        """
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        begin = time.monotonic()
        while (job := self.job(number))[
            "JobState"
        ] not in ended and time.monotonic() - begin < timeout_s:
            time.sleep(0.5)
        assert job["JobState"] in states, f"{job}\n{self._logs(number)}"
        return job

    def _logs(self, number: int) -> str:
        files = [
            self.sandbox.folder / f"job-{number}.out",
            *sorted(self.runs.get(number, self.folder).glob("logs/*.log")),
        ]
        return "\n".join(
            f"--- {path}\n{path.read_text()[-3000:]}" for path in files if path.exists()
        )

    def cancel_all(self) -> None:
        for job in self.call("squeue", "--noheader", "--format=%A").split():
            self.call("scancel", job)

    def train(
        self,
        config: Path | str,
        run: Path,
        *options: str,
        nodes: int = 2,
        arguments: Sequence[str] = (),
        **variables: str,
    ) -> int:
        """`sbatch slurm/train.sbatch` with ZeRO-3, one rank per node."""
        options = (f"--nodes={nodes}", "--ntasks-per-node=1", *options)
        what = [
            "--config",
            str(config),
            "--deepspeed_config",
            "ds_configs/zero3.json",
            "--run-dir",
            str(run),
        ]
        number = self.submit(*options, "slurm/train.sbatch", *what, *arguments, **variables)
        self.runs[number] = run
        return number


def job_log(run: Path) -> str:
    return (run / "logs" / "job.log").read_text()
