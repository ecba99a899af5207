"""What a run is recorded with: versions, the state of the code, hardware, and a few variables."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import spt_ds

# What of the environment is recorded is an allow-list, so that no secret gets into a run folder.
RECORDED = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
    "WORLD_SIZE",
)


def environment() -> dict[str, Any]:
    """Versions, code state, hardware and the allow-listed variables."""
    packages = ("torch", "deepspeed", "transformers", "bitsandbytes", "datasets", "tokenizers")
    return {
        "spt_ds": spt_ds.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": {"host": platform.node(), "cpus": os.cpu_count(), "system": platform.platform()},
        "variables": {name: os.environ[name] for name in RECORDED if name in os.environ},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """The git commit, with `-dirty` where files changed, or `unknown` outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()
