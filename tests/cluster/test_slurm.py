"""The job scripts on a real Slurm: the loss of every run equals that of one undisturbed process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import jobs
from tests.cluster.sandbox import HOSTS
from tests.cluster.slurm import Slurm, job_log

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.mark.parametrize("nodes", [2, 3])
def test_trains_over_nodes_as_one_process_does(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float, nodes: int
) -> None:
    run = tmp_path / "run"
    slurm.wait_for(slurm.train(config, run, nodes=nodes))
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    logs = {path.stem for path in (run / "logs").glob("node*.log")}
    assert logs == set(list(HOSTS)[:nodes])
    assert f"{nodes} ranks" in job_log(run)
