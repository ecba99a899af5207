"""A rank that dies or falls silent ends the run within seconds, with one readable message: what a
user sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.scenes import CONFIG, ROOT, Scene
from tests.helpers.ranks import free_port

TIMEOUT_S = 8  # of a collective
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"],
}


def launch(scene: Scene, folder: Path, launcher: str, how: str) -> tuple[str, float]:
    """Train with rank 1 failing in its third step; return what stderr got and the seconds from the
    fault to the end.
    """
    options = scene.overrides(
        "llama", "train.max_steps=5", f"engine.collective_timeout_s={TIMEOUT_S}"
    )
    command = [
        *LAUNCHERS[launcher],
        "--master_port",
        str(free_port()),
        str(ROOT / "tests" / "distributed" / "dying.py"),
        "--config",
        CONFIG,
        "--deepspeed_config",
        scene.ds("zero3"),
        "--run-dir",
        str(folder / "run"),
        *[word for option in options for word in ("--set", option)],
    ]
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SPT_TEST_FAULT": f"1:3:{how}",
        "SPT_TEST_DIED": str(folder / "died"),
    }
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, timeout=200, check=False
    )
    ended = time.time()
    assert done.returncode != 0
    return done.stderr, ended - (folder / "died").stat().st_mtime


def assert_one_message(stderr: str) -> str:
    """Return the only message of ours; no traceback of ours is on the screen."""
    messages = re.findall(r"^spt-ds \[rank \d+\] (.*)$", stderr, flags=re.MULTILINE)
    assert len(messages) == 1, stderr
    assert "spt_ds/engine" not in stderr
    message: str = messages[0]
    return message


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        ("deepspeed", "kill"),
        pytest.param("deepspeed", "exit", marks=pytest.mark.slow),
        pytest.param("torchrun", "kill", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_others(
    scene: Scene, tmp_path: Path, launcher: str, how: str
) -> None:
    stderr, seconds = launch(scene, tmp_path, launcher, how)
    message = assert_one_message(stderr)
    assert re.search(r"^failed: rank 1 \(pid \d+ on .*\) ended in the middle of a step", message)
    assert "resumes from the newest checkpoint" in stderr
    assert seconds < 20
    assert "Traceback" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_fault_of_one_rank_is_its_own_message(
    scene: Scene, tmp_path: Path, launcher: str
) -> None:
    stderr, seconds = launch(scene, tmp_path, launcher, "raise")
    assert assert_one_message(stderr) == "failed: RuntimeError: a fault of this rank alone"
    assert seconds < 20
    assert "a fault of this rank alone" in (tmp_path / "run" / "errors" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_a_silent_rank_is_given_up_after_the_timeout(scene: Scene, tmp_path: Path) -> None:
    stderr, seconds = launch(scene, tmp_path, "deepspeed", "hang")
    assert "did not answer within engine.collective_timeout_s" in assert_one_message(stderr)
    assert (
        seconds < TIMEOUT_S + 30 + 15
    )  # the launchers give a rank 30 s between SIGTERM and SIGKILL
