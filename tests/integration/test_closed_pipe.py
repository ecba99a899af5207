"""A reader that leaves, as `head` does, costs no result and shows no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.predictions import lines, write

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {"loss": 7.0, "nll": 2.5, "nll_selected": 2.4}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with replies, enough for every command that reads one."""
    folder = tmp_path / "run"
    write(folder / "generate" / "predictions.jsonl", lines())
    (folder / "config.yaml").write_text("name: tiny\n")
    done = {"step": 3, "world_size": 1, "trained_parameters": 4, "valid_before": LOSSES}
    (folder / "DONE.json").write_text(json.dumps({**done, "valid_after": LOSSES}))
    return folder


def start(
    arguments: list[str], unbuffered: bool, both: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard output, with `both` also stderr, has no reader any more."""
    receive, send = os.pipe()
    os.close(receive)
    hidden = ("PYTHONUNBUFFERED", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    try:
        return subprocess.run(
            [sys.executable, "-m", "spt_ds.cli", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=send,
            stderr=send if both else subprocess.PIPE,
            text=True,
            timeout=200,
        )
    finally:
        os.close(send)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_results_are_written_although_nobody_reads(run: Path, unbuffered: bool) -> None:
    other, out = str(run.parent / "other"), str(run / "out")
    write(run.parent / "other" / "predictions.jsonl", lines())
    for arguments, written in (
        (["evaluate", str(run)], "generate/scores.json"),
        (["compare", str(run), "--baseline", other, "--out", out], "out/compare.json"),
        (["report", str(run), "--out", str(run / "report.html")], "report.html"),
    ):
        done = start(arguments, unbuffered)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert (run / written).is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["summary", "RUN"], 0),
        (["config", "--schema"], 0),
        (["slurm"], 0),
        (["--help"], 0),
        (["evaluate", "--help"], 0),
        (["evaluate", "RUN/nowhere"], 2),
    ],
)
def test_what_only_prints_ends_quietly(run: Path, arguments: list[str], code: int) -> None:
    words = [word.replace("RUN", str(run)) for word in arguments]
    done = start(words, unbuffered=False)
    assert done.returncode == code
    assert done.stderr.count("\n") == (code != 0)  # its own message alone
    assert start(words, unbuffered=True, both=True).returncode == code


def test_the_doctor_says_by_its_exit_code_what_nobody_read() -> None:
    done = start(["doctor", "--config", "demo", "--set=data.train=nowhere.txt"], unbuffered=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert start(["plan", "--config", "demo"], unbuffered=False).returncode == 0


def test_a_training_outlives_the_reader_of_its_log(tmp_path: Path) -> None:
    """`spt-ds train ... 2>&1 | head`: hours of work are worth more than a log."""
    short = {
        "train.max_steps": 1,
        "train.global_batch": 2,
        "data.max_train_examples": 4,
        "data.max_valid_examples": 2,
        "data.workers": 0,
        "data.cache_dir": tmp_path / "cache",
    }
    options = [f"--set={key}={value}" for key, value in short.items()]
    run = tmp_path / "run"
    done = start(["train", "--config", "demo", "--run-dir", str(run), *options], False, both=True)
    assert done.returncode == 0
    assert (run / "DONE.json").is_file()


def test_a_shell_with_pipefail_sees_success(run: Path) -> None:
    command = f"set -o pipefail; '{sys.executable}' -m spt_ds.cli evaluate '{run}' | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("metric")
    assert (run / "generate" / "scores.json").is_file()


def test_a_full_disk_behind_the_output_is_an_error_to_mend(run: Path) -> None:
    command = [sys.executable, "-m", "spt_ds.cli", "evaluate", str(run)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200
        )
        silent = subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=200)
    assert done.stderr == (
        "spt-ds evaluate: the standard output cannot be written (No space left on device)\n"
    )
    assert (done.returncode, silent.returncode) == (2, 2)
    assert (run / "generate" / "scores.json").is_file()
