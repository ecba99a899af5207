"""Entry point of generation: `deepspeed --module spt_ds.generate RUN` or `spt-ds generate RUN`.

Writes `predictions.jsonl`, one line per example in the order of the data, each exactly once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spt_ds.config.schema import Config
from spt_ds.display import shown
from spt_ds.errors import CheckpointError, SptError
from spt_ds.train import exit_with, join, run_job

if TYPE_CHECKING:
    from spt_ds.dist import World
    from spt_ds.engine.session import Session


def main(argv: Sequence[str] | None = None) -> int:
    """Generate replies with a trained run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds generate", description="Generate replies for evaluation."
    )
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the number of a step")
    parser.add_argument(
        "--out", type=Path, help="folder for predictions.jsonl; default RUN/generate"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override an option, such as data.test=FILE or generate.mode=fuse",
    )
    parser.add_argument(
        "--ppl",
        action="append_const",
        const="generate.perplexity=true",
        dest="overrides",
        help="measure the perplexity of the reference replies too",
    )
    parser.add_argument(
        "--deepspeed_config", metavar="JSON", help="DeepSpeed file; decides where the base lives"
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    args = parser.parse_args(argv)
    args.config, args.run_dir = str(args.run / "config.yaml"), args.run

    def work(config: Config, run_dir: Path) -> int:
        from spt_ds import dist

        world = join(config, run_dir)
        _generate(
            config,
            run_dir,
            args.out or run_dir / "generate",
            args.checkpoint,
            args.deepspeed_config,
            world,
        )
        dist.shutdown()
        return 0

    return run_job(args, work)


def _generate(
    config: Config, run_dir: Path, out: Path, which: str, deepspeed_config: str | None, world: World
) -> None:
    from spt_ds.engine import checkpoint
    from spt_ds.engine.generator import Generator
    from spt_ds.engine.session import open_split
    from spt_ds.log import get_logger

    session, path = open_run(config, run_dir, which, deepspeed_config, world)
    store = open_split(session, "test")
    marker = (path / checkpoint.MARKER).read_text(encoding="utf-8")
    try:
        final = Generator(
            session, store, out, identity(config, marker, store.data_hash), path.name
        ).run()
    finally:
        session.sharding.close()
    get_logger().info(f"{len(store)} replies of {path.name} in {final}")


def identity(config: Config, marker: str, data_hash: str) -> str:
    """All that replies depend on; those that another start left unfinished are only taken over
    where it is the same.
    """
    sections = config.model_dump(
        mode="json", include={"model", "method", "prompts", "retriever", "losses", "generate"}
    )
    return json.dumps([marker, data_hash, sections, config.train.seed])


def open_run(
    config: Config, run_dir: Path, which: str, deepspeed_config: str | None, world: World
) -> tuple[Session, Path]:
    """Open a run with the tensors of one of its checkpoints; return that one's folder too."""
    from spt_ds import dist
    from spt_ds.engine import checkpoint
    from spt_ds.engine.session import open_session

    path = dist.agreed(lambda: find_checkpoint(run_dir, which))
    session = open_session(config, deepspeed_config, world)
    saved = dist.agreed(lambda: checkpoint.load(path))
    checkpoint.restore_trainables(session.spt.trainables, saved.trainables, path)
    return session, path


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The folder of a run's `best`, `last` or numbered checkpoint; raise CheckpointError when there
    is none.
    """
    from spt_ds.engine import checkpoint, run_folder
    from spt_ds.log import get_logger

    folder = run_dir / run_folder.CHECKPOINTS
    if which.isdecimal() and len(which) < 13:
        path = folder / f"step-{int(which):08d}"
        if not path.is_dir():
            there = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
            raise CheckpointError(f"{path}: no such checkpoint; there are: {there}")
        return path
    if which not in ("best", "last"):
        raise SptError(f"--checkpoint {shown(which)}: give best, last or the number of a step")
    newest = checkpoint.load_newest(folder)
    if newest is None:
        raise CheckpointError(
            f"{folder}: no good checkpoint; train first, or give another run folder"
        )
    path, saved = newest
    best = saved.state["run"]["best_step"]
    if which == "last" or best is None:
        return path
    found = folder / f"step-{best:08d}"
    if found.is_dir():
        return found
    get_logger().warning(
        f"{found}: the best checkpoint is missing; taking the last one, {path.name}, in its place"
    )
    return path


if __name__ == "__main__":
    exit_with(main())
