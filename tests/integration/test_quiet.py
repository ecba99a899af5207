"""No deprecation of a library reaches a user: the commands as users start them, default filters.

pytest's own filters (pyproject.toml) hide such texts from every other test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WARNING = re.compile(r"\b[A-Z]\w*Warning\b|deprecat", re.IGNORECASE)
SHORT = {
    "prompts.position": "before_reply",  # keeps the cache of a conversation from turn to turn
    "model.activation_checkpointing": "non_reentrant",
    "train.max_steps": 1,
    "train.global_batch": 4,
    "data.max_train_examples": 8,
    "data.max_valid_examples": 4,
    "data.max_test_examples": 4,
    "data.workers": 0,
    "generate.max_new_tokens": 4,
}


def spt_ds(*arguments: str, said: str = "") -> str:
    """Run a command; return what it wrote to stderr."""
    hidden = ("PYTHONWARNINGS", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [sys.executable, "-m", "spt_ds.cli", *arguments],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        input=said,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("placement", [[], ["--deepspeed_config", "ds_configs/zero3.json"]])
def test_no_warning_of_a_library_is_shown(placement: list[str], tmp_path: Path) -> None:
    options = [f"--set={key}={value}" for key, value in SHORT.items()]
    options.append(f"--set=data.cache_dir={tmp_path / 'cache'}")
    run = str(tmp_path / "run")
    (tmp_path / "persona.txt").write_text("i like dogs.\n")
    told = {
        "train": spt_ds("train", "--config", "demo", "--run-dir", run, *options, *placement),
        "generate": spt_ds("generate", run),
        "chat": spt_ds(
            "chat", run, "--persona", str(tmp_path / "persona.txt"), said="hi\nand you?\n/quit\n"
        ),
    }
    for command, text in told.items():
        lines = [line for line in text.splitlines() if WARNING.search(line)]
        assert not lines, f"{command}: {lines}"


def test_the_pattern_sees_a_warning() -> None:
    code = "import warnings; warnings.warn('old name', FutureWarning)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert WARNING.search(done.stderr)
