"""Entry point of the main job: `spt-ds train`, or `--module spt_ds.train` of a launcher.

Exit codes: 0 done, 75 stopped on request with a checkpoint, 2 an error the user can mend, 1 a
fault.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from spt_ds.config.schema import Config
from spt_ds.run.command import add_deepspeed, add_overrides, large_imports
from spt_ds.run.folder import RunFolder
from spt_ds.run.job import exit_with, join, run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="spt-ds train", description="Train prompt bank and retriever on a frozen base."
    )
    parser.add_argument("--config", required=True, help="YAML file or name of a shipped recipe")
    add_overrides(parser, "override one option, such as losses.tau_gold=0.5; may be given often")
    parser.add_argument("--run-dir", type=Path, help="run folder; default runs/NAME")
    add_deepspeed(parser)
    args = parser.parse_args(argv)

    def work(config: Config, folder: RunFolder) -> int:
        with large_imports():
            from spt_ds import dist
            from spt_ds.engine.trainer import train_run

        world = join(config, folder)
        code = train_run(config, folder, args.deepspeed_config, world, started_s)
        dist.shutdown()
        return code

    return run_job(args.config, args.overrides, args.run_dir, work)


if __name__ == "__main__":
    exit_with(main())
