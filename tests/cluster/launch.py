"""Starts a training on two hosts without Slurm: torchrun on each of them, or deepspeed with pdsh
from outside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster import jobs
from tests.cluster.sandbox import HOSTS, Sandbox, run, wait_until

TWO = list(HOSTS)[:2]
BIN = Path(sys.executable).parent
SSH_CONFIG = """\
User root
IdentityFile {folder}/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
# Without these the launcher waits for ever when a host is cut off.
ServerAliveInterval 5
ServerAliveCountMax 3
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PidFile {folder}/sshd-{host}.pid
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
ClientAliveInterval 5
ClientAliveCountMax 3
"""


def arguments(config: Path, run_dir: Path) -> list[str]:
    return [
        "--config",
        str(config),
        "--deepspeed_config",
        "ds_configs/zero3.json",
        "--run-dir",
        str(run_dir),
    ]


def torchrun(
    sandbox: Sandbox, config: Path, run_dir: Path, port: int, rendezvous: str = "static"
) -> list[subprocess.Popen[bytes]]:
    """One torchrun on each host; `rendezvous` is static (with --node-rank) or c10d (elastic)."""
    command = [
        str(BIN / "torchrun"),
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--rdzv-backend={rendezvous}",
    ]
    command += [f"--rdzv-endpoint=node1:{port}", f"--rdzv-id={port}"]
    environment = {**os.environ, **jobs.ENVIRONMENT}
    started = []
    for index, host in enumerate(TWO):
        work = [f"--node-rank={index}", "-m", "spt_ds.train", *arguments(config, run_dir)]
        started.append(
            sandbox.start(f"torchrun-{port}-{host}", [*command, *work], host, environment)
        )
    return started


def start_sshd(sandbox: Sandbox) -> None:
    """A daemon on each of the two hosts that lets this test in and nobody else."""
    folder = sandbox.folder / "ssh"
    folder.mkdir()
    for name in ("id", "host_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "config").write_text(SSH_CONFIG.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in TWO:
        config = folder / f"sshd-{host}.conf"
        config.write_text(SSHD_CONFIG.format(folder=folder, host=host))
        sandbox.start(f"sshd-{host}", ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], host)
        wait_until("sshd", (folder / f"sshd-{host}.pid").exists, 10)


def deepspeed(sandbox: Sandbox, config: Path, run_dir: Path, port: int) -> subprocess.Popen[bytes]:
    """`deepspeed --hostfile` on the control machine. What is not NCCL_* or PYTHON* travels in a
    file.
    """
    folder = sandbox.folder / "ssh"
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in TWO))
    (folder / "environment").write_text(
        "".join(f"{key}={value}\n" for key, value in jobs.ENVIRONMENT.items())
    )
    environment = {**os.environ, **jobs.ENVIRONMENT, "DS_ENV_FILE": str(folder / "environment")}
    environment["PDSH_SSH_ARGS_APPEND"] = f"-F {folder / 'config'}"
    command = [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(folder / "hostfile"),
        "--no_ssh_check",
        "--launcher",
        "pdsh",
    ]
    command += [
        "--master_addr",
        HOSTS["node1"],
        "--master_port",
        str(port),
        "--module",
        "spt_ds.train",
    ]
    return sandbox.start(
        f"deepspeed-{port}", [*command, *arguments(config, run_dir)], None, environment
    )
