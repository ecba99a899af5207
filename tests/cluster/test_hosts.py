"""Two hosts without Slurm, by torchrun and by pdsh: a short cut of a link is lived through, a long
one ends both.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import faults, jobs, launch
from tests.cluster.sandbox import Sandbox, ranks, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
TIMEOUT_S = 15  # engine.collective_timeout_s of the tiny training
LEEWAY_S = 10
CUT_S = 8


@pytest.fixture
def links(sandbox: Sandbox) -> Iterator[Sandbox]:
    yield sandbox
    for host in launch.TWO:
        sandbox.link(host, "up")


@pytest.fixture(scope="session")
def ssh(sandbox: Sandbox) -> None:
    launch.start_sshd(sandbox)


def ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    return all(process.poll() is not None for process in processes)


def test_elastic_torchrun_lives_through_a_short_cut(
    links: Sandbox, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run, port = tmp_path / "run", 29502
    both = launch.torchrun(links, config, run, port, "c10d")
    faults.wait_for_step(run, 3)
    links.link("node2", "down")
    time.sleep(CUT_S)
    links.link("node2", "up")
    wait_until("the end of the run", lambda: ended(both), 90)
    assert [process.returncode for process in both] == [0, 0], links.log(f"torchrun-{port}-node1")
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)


def test_static_torchrun_ends_on_both_sides_of_a_cut(
    links: Sandbox, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = launch.torchrun(links, config, run, 29503)
    faults.wait_for_step(run, 3)
    links.link("node2", "down")
    seconds = wait_until("the end of all ranks", lambda: not ranks(), TIMEOUT_S + LEEWAY_S)
    wait_until("the end of the launchers", lambda: ended(both), LEEWAY_S)
    assert all(process.returncode != 0 for process in both)
    assert seconds > CUT_S
    for host, other in zip(launch.TWO, reversed(launch.TWO), strict=True):
        told = links.log(f"torchrun-29503-{host}")
        assert re.search(rf"rank \d \(pid \d+ on {other}\) died or did not answer", told)
        assert f"Timed out waiting {TIMEOUT_S}000ms" in told


def test_pdsh_lives_through_a_short_cut(
    links: Sandbox, ssh: None, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    launcher = launch.deepspeed(links, config, run, 29506)
    faults.wait_for_step(run, 3)
    links.link("node2", "down")
    time.sleep(CUT_S)
    links.link("node2", "up")
    wait_until("the end of the run", lambda: ended([launcher]), 90)
    assert launcher.returncode == 0
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)


def test_pdsh_trains_on_two_hosts_and_ends_when_one_is_cut_off(
    links: Sandbox, ssh: None, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    launcher = launch.deepspeed(links, config, run, 29504)
    faults.wait_for_step(run, jobs.EVERY + 2)
    links.link("node2", "down")
    wait_until("the end of all ranks", lambda: not ranks(), TIMEOUT_S + LEEWAY_S)
    told = links.log("deepspeed-29504")
    assert re.search(r"rank 1 \(pid \d+ on node2\) died or did not answer", told)
    wait_until("the end of the launcher", lambda: ended([launcher]), TIMEOUT_S + LEEWAY_S)
    assert launcher.returncode != 0
    assert not (run / "DONE.json").exists()
    links.link("node2", "up")
    again = launch.deepspeed(links, config, run, 29505)
    wait_until("the end of the run", lambda: ended([again]), 90)
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5), links.log(
        "deepspeed-29505"
    )
