"""Hosts on one machine: network namespaces on a bridge, each with an address and a host name of its
own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "pdsh", "sshd")
CONTROL = "10.77.0.1"
HOSTS = {"node1": "10.77.0.11", "node2": "10.77.0.12", "node3": "10.77.0.13"}
ROOT = Path(__file__).resolve().parents[2]


def missing() -> str:
    """Why the cluster tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "they need root (namespaces, slurmd)"
    if not Path("/etc/debian_version").exists():
        return "they are written for Debian's packages"
    if absent := absent_programs():
        return f"not installed: {', '.join(absent)} (run .ci/packages)"
    if subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "this machine does not let root make namespaces"
    return ""


def absent_programs() -> list[str]:
    """Programs that .ci/packages could install here; empty where it could not."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        return []
    return [name for name in PROGRAMS if shutil.which(name) is None]


def inside() -> bool:
    """Whether this process is the first of a PID namespace: then nothing of the machine is within
    reach.
    """
    return os.getpid() == 1


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Sandbox:
    """The bridge, the hosts, and the daemons by their recorded pids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        Path("/run/netns").mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "none", "/run/netns")
        names = "".join(
            f"{address} {host}\n" for host, address in {**HOSTS, "control": CONTROL}.items()
        )
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
        run("hostname", "control")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "address", "add", f"{CONTROL}/24", "dev", "bridge")
        run("ip", "link", "set", "bridge", "up")
        for host, address in HOSTS.items():
            run("ip", "netns", "add", host)
            run(
                "ip",
                "link",
                "add",
                f"to-{host}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host,
            )
            run("ip", "link", "set", f"to-{host}", "master", "bridge", "up")
            run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", host, "link", "set", "eth0", "up")
            run("ip", "-n", host, "link", "set", "lo", "up")

    def link(self, host: str, state: str) -> None:
        """Plug (`up`) or pull (`down`) the host's cable."""
        run("ip", "link", "set", f"to-{host}", state)

    def start(
        self,
        name: str,
        command: list[str],
        host: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a daemon or launcher, on a host or on the control machine; its output goes to
        NAME.log.
        """
        if host is not None:
            enter = 'hostname "$0" && exec "$@"'
            command = [
                "nsenter",
                f"--net=/run/netns/{host}",
                "unshare",
                "--uts",
                "sh",
                "-c",
                enter,
                host,
                *command,
            ]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self.daemons[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """End every daemon by its pid, those that were started last first."""
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in reversed(self.daemons.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, command line) of every living process of this PID namespace."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or entry.name == "1":
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            yield int(entry.name), command


def ranks(module: str = "spt_ds.train") -> list[int]:
    """Pids of the python processes that run `module` as a rank, in the order of their numbers;
    launchers are none.
    """
    return sorted(pid for pid, command in processes() if _runs(command, module))


def _runs(command: list[str], module: str) -> bool:
    """Whether `command` is `python [-u] -m MODULE ...`."""
    words = [word for word in command[:4] if word != "-u"]
    return len(words) > 2 and "python" in Path(words[0]).name and words[1:3] == ["-m", module]


def wait_until(
    what: str, condition: Callable[[], bool], timeout_s: float, every_s: float = 0.2
) -> float:
    """Seconds until `condition` holds; AssertionError when it does not in time."""
    begin = time.monotonic()
    while not condition():
        elapsed = time.monotonic() - begin
        assert elapsed < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return time.monotonic() - begin


def kill_9(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
