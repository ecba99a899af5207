"""A real sweep on a tiny base: stopped in a training, gone on with, one cell broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.jobs import ENVIRONMENT, EVERY, STEPS, make_job

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spt_ds.cli", "sweep", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.timeout(300)
def test_stopped_and_gone_on_with(tmp_path: Path) -> None:
    config, out = make_job(tmp_path), tmp_path / "out"
    file = tmp_path / "sweep.yaml"
    broken = f"{{config: {config}, name: broken, set: {{model.base: {tmp_path}/none}}}}"
    file.write_text(
        f"name: s\nconfigs: [{config}, {broken}]\ngrid: {{train.seed: [0, 1]}}\n"
        "set: {generate.perplexity: true, data.max_valid_examples: 4}\n"
    )
    arguments = [str(file), "--out", str(out), "--jobs", "2"]
    sweep = start(*arguments)
    saved = out / "tiny.seed-0" / "checkpoints" / f"step-{EVERY:08d}"
    end = time.monotonic() + 120
    while not saved.exists() and sweep.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    sweep.send_signal(signal.SIGTERM)
    told, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 75, told + errors
    assert not (out / "tiny.seed-0" / "DONE.json").exists()
    assert "tiny.seed-0: stopped" in (out / "table.md").read_text()

    sweep = start(*arguments)
    told, errors = sweep.communicate(timeout=240)
    assert sweep.returncode == 1, told + errors
    log = (out / "tiny.seed-0" / "logs" / "sweep.log").read_text()
    assert "resuming from" in log
    for seed in (0, 1):
        done = json.loads((out / f"tiny.seed-{seed}" / "DONE.json").read_text())
        assert done["step"] == STEPS
        assert f"broken.seed-{seed}: failed in training" in errors
    table = json.loads((out / "table.json").read_text())
    (row,) = table["recipes"]
    assert (row["name"], [run["seed"] for run in row["runs"]]) == ("tiny", [0, 1])
    assert row["mean"]["ppl_token"] > 1
    assert sorted(table["failed"]) == ["broken.seed-0", "broken.seed-1"]
    assert all(str(tmp_path / "none") in why for why in table["failed"].values())

    before = {
        path: path.stat().st_mtime_ns for path in (out / "tiny.seed-0").rglob("*") if path.is_file()
    }
    sweep = start(*arguments, "--task", "0")
    told, errors = sweep.communicate(timeout=60)
    assert (sweep.returncode, told) == (0, "tiny.seed-0: finished before\n"), errors
    assert {path: path.stat().st_mtime_ns for path in before} == before
