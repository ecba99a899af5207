"""`spt-ds slurm`: the job scripts, copied to where jobs are submitted."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from spt_ds.errors import ConfigError
from spt_ds.run.command import run_command
from spt_ds.shipped import folder

EXAMPLE = "site.env.example"
PYTHON_LINE = "#SPT_PYTHON=/shared/me/spt/.venv/bin/python"


def main(argv: Sequence[str] | None = None) -> int:
    """List or copy the job scripts; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds slurm",
        description="The Slurm job scripts: list them, or copy them to where you submit jobs.",
    )
    parser.add_argument(
        "--copy",
        type=Path,
        metavar="FOLDER",
        help="make FOLDER/slurm with the scripts and a site.env; run sbatch in FOLDER then",
    )
    return run_command(parser, argv, _slurm)


def _slurm(args: argparse.Namespace) -> None:
    if args.copy is None:
        print("\n".join(str(path) for path in sorted(folder("slurm").iterdir())))
        return
    made = copy(args.copy)
    print(f"{made}: edit site.env in it, then run in {made.parent}:")
    print("  sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/train.sbatch \\")
    print("      --config opt-125m --deepspeed_config zero3 --run-dir runs/first")


def copy(into: Path) -> Path:
    """Copy the scripts to `into`/slurm, where they look for one another; return that folder.

    Its site.env names this interpreter. Raises ConfigError where it exists or cannot be written.
    """
    source, made = folder("slurm"), into.expanduser() / "slurm"
    try:
        into.expanduser().mkdir(parents=True, exist_ok=True)
        # copy2, the default, keeps the executable bits.
        shutil.copytree(source, made, ignore=shutil.ignore_patterns("site.env"))
        example = (made / EXAMPLE).read_text(encoding="utf-8")
        own = example.replace(PYTHON_LINE, f"SPT_PYTHON={shlex.quote(sys.executable)}")
        (made / "site.env").write_text(own, encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(
            f"{error.filename}: exists and is not overwritten; remove it or name another FOLDER"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{made}: cannot be written ({error.strerror}); name another FOLDER"
        ) from error
    return made
