"""A micro-batch and a configuration pass through few files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.stays import batch_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_a_micro_batch_stays_in_few_files(placement: str) -> None:
    """At 0.1.0 it made 28 stays in prefix placement and 36 in suffix placement."""
    trace = batch_trace(placement).summary()
    assert trace["stays"] <= 14
    assert trace["stays"] == trace["rooms"] + trace["returns"]


def test_a_configuration_passes_few_files_on_its_way_to_an_open_session() -> None:
    """At 0.1.0 it made 22 stays, and 21 with a DeepSpeed file that shards the base."""
    command = [sys.executable, "benchmarks/stays.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    stays = {name: row["stays"] for name, row in json.loads(done.stdout.splitlines()[-1]).items()}
    assert stays["opener"] <= 15
    assert stays["opener, zero3.json"] <= 15
