"""Skips tests marked `gpu` where there is none, keeps DeepSpeed's patch within its test, and notes
every skipped test in the file that SPT_SKIPS names: see tests/skips.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    path = os.environ.get("SPT_SKIPS")
    # An expected failure is reported as skipped too. pytest-xdist's workers tell its controller.
    if not path or not report.skipped or hasattr(report, "wasxfail"):
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    with Path(path).open("a", encoding="utf-8") as file:
        test = report.nodeid.partition("[")[0]
        file.write(json.dumps({"test": test, "reason": reason.removeprefix("Skipped: ")}) + "\n")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # most tests of the command line need none

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _linear_of_pytorch() -> Iterator[None]:
    """DeepSpeed replaces `functional.linear` for good by one that keeps every layer's input, so a
    later test of the same process would count other bytes.
    """
    functional = getattr(sys.modules.get("torch.nn"), "functional", None)
    linear = functional and functional.linear
    yield
    if functional:
        functional.linear = linear


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)
