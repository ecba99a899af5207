"""The folder of the real language model that slow tests run on: SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "runs" / "real-base" / "smollm2-135m"
VARIABLE = "SPT_REAL_BASE"  # names a folder that is there already
DOWNLOAD_S = 900


def real_base() -> str:
    """Return the folder, made at the first call; skip the test where its weights cannot be had."""
    given = os.environ.get(VARIABLE)
    if given:
        assert (Path(given) / "config.json").exists(), f"{VARIABLE}: no base in {given}"
        return given
    reason = _reason_against()
    if reason:
        pytest.skip(f"no real base: {reason}")
    return str(DEFAULT)


@cache
def _reason_against() -> str:
    """Make the default folder; the reason why it cannot be had, or nothing."""
    command = [sys.executable, str(ROOT / "benchmarks" / "real_base.py"), str(DEFAULT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S)
    if done.returncode == 2:
        return done.stderr.strip().splitlines()[-1]
    assert done.returncode == 0, done.stderr
    return ""
