"""Virtual environments that tests make beside the one they run in."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = ROOT / "constraints.in"


def call(*command: object, cwd: Path = ROOT) -> None:
    """Run a command; raise CalledProcessError where it fails."""
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with the locked torch, or take the one that is there.

    Returns its interpreter.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    # By pip: uv does not look into the folders of wheels that pip's settings may name. Elsewhere
    # than in the clone, where it takes the metadata of a build for a package without its needs.
    call(python, "-m", "pip", "install", "--quiet", "torch", "--constraint", TORCH, cwd=folder)
    return python


def install_into(python: Path, *arguments: object) -> None:
    """`pip install` by uv, which takes seconds where pip takes minutes."""
    call(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *arguments)
