"""One sandbox, one Slurm and one undisturbed run for all cluster tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import jobs
from tests.cluster.faults import Cost
from tests.cluster.sandbox import Sandbox, inside, missing
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    if why := missing():
        pytest.skip(why)
    if not inside():
        pytest.skip("they run in namespaces of their own: use `make test-cluster`")
    with tempfile.TemporaryDirectory(prefix="spt-cluster-") as folder:
        sandbox = Sandbox(Path(folder))
        yield sandbox
        sandbox.stop()


@pytest.fixture(scope="session")
def slurm(sandbox: Sandbox) -> Iterator[Slurm]:
    cluster = Slurm(sandbox)
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def config(sandbox: Sandbox) -> Path:
    """The YAML file of the tiny training."""
    return jobs.make_job(sandbox.folder)


@pytest.fixture(scope="session")
def undisturbed(config: Path) -> Path:
    """The run of one process to which nothing happened."""
    run = config.parent / "undisturbed"
    jobs.train_here(config, run)
    return run


@pytest.fixture(scope="session")
def expected_loss(undisturbed: Path) -> float:
    """Final validation loss of the undisturbed run."""
    return jobs.final_loss(undisturbed)


_costs: list[Cost] = []


@pytest.fixture
def costs() -> list[Cost]:
    """What the faults cost; printed as a table at the end."""
    return _costs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _costs:
        terminalreporter.section("what the faults cost")
        terminalreporter.line(
            "| fault | seconds to notice | seconds to be training again | steps repeated |"
        )
        terminalreporter.line("|---|---|---|---|")
        for cost in _costs:
            terminalreporter.line(cost.row())
