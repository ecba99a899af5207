"""A command that loads PyTorch says so first: it shows itself within a second."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ends the process where PyTorch or transformers begins to load.
STOPS = """
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "deepspeed"):
            os._exit(77)
sys.meta_path.insert(0, Stop())
from spt_ds.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [
        "train --config demo",
        "generate tests/data/run_0_1_0/run",
        "chat tests/data/run_0_1_0/run",
        "quantize embedded out",
        "doctor",
        "bench step",
        "sweep benchmarks/fusion.yaml --out OUT",
    ],
)
def test_a_start_shows_itself_before_anything_large_is_loaded(command: str, tmp_path: Path) -> None:
    words = command.replace("OUT", str(tmp_path)).split()
    hidden = ("SPT_LOG_LEVEL", "RANK")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", STOPS, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 77, done.stderr
    assert done.stderr.endswith("INFO loading PyTorch and transformers\n")
    # Seconds of the processor: those of the clock depend on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
