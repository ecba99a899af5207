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
from spt_ds.run.command import add_deepspeed, add_overrides, large_imports
from spt_ds.run.folder import ReplyFolder, RunFolder
from spt_ds.run.job import exit_with, join, run_job

if TYPE_CHECKING:
    from spt_ds.dist import World

# Overrides under which nothing is trained: the base reads persona and dialogue, and replies.
BASE_ALONE = (
    "method.type=none",
    "prompts.count=1",
    "prompts.tokens=0",
    "prompts.position=before_text",
    "prompts.init=vocab",
    "prompts.init_texts=[]",
    "prompts.warm_start_steps=0",
    "losses.objective=paper",
    "losses.temperature=1",
    "losses.balance=0",
    "losses.train_top_m=0",
    "losses.selection=0",
    "losses.fusion=0",
    "losses.contrastive=0",
    "generate.mode=select",
)


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
    add_overrides(parser, "override an option, such as data.test=FILE or generate.mode=fuse")
    parser.add_argument(
        "--ppl",
        action="append_const",
        const="generate.perplexity=true",
        dest="overrides",
        help="measure the perplexity of the reference replies too",
    )
    parser.add_argument(
        "--base-alone",
        action="store_true",
        help="let the frozen base reply without a prompt, as before the training; default of"
        " --out: RUN/before",
    )
    add_deepspeed(parser)
    args = parser.parse_args(argv)
    if args.base_alone:
        args.overrides = [*args.overrides, *BASE_ALONE]

    def work(config: Config, folder: RunFolder) -> int:
        with large_imports():
            import spt_ds.engine.generator  # noqa: F401 (what `_generate` takes names from)
            from spt_ds import dist

        world = join(config, folder)
        out = folder.replies_before if args.base_alone else folder.replies
        if args.out:
            out = ReplyFolder(args.out)
        which = None if args.base_alone else args.checkpoint
        _generate(config, folder, out, which, args.deepspeed_config, world)
        dist.shutdown()
        return 0

    return run_job(str(RunFolder(args.run).config), args.overrides, args.run, work)


def _generate(
    config: Config,
    folder: RunFolder,
    out: ReplyFolder,
    which: str | None,
    deepspeed_config: str | None,
    world: World,
) -> None:
    """Generate with checkpoint `which`; None: with the base alone."""
    from spt_ds.engine.generator import Generator
    from spt_ds.engine.session import open_split, open_trained, open_untrained
    from spt_ds.log import get_logger
    from spt_ds.run import checkpoint

    if which is None:
        session, name, marker = open_untrained(config, deepspeed_config, world), "the base", ""
    else:
        session, path = open_trained(config, folder, which, deepspeed_config, world)
        name, marker = path.name, (path / checkpoint.MARKER).read_text(encoding="utf-8")
    store = open_split(session, "test")
    try:
        final = Generator(
            session, store, out, identity(config, marker, store.data_hash), name
        ).run()
    finally:
        session.sharding.close()
    get_logger().info(f"{len(store)} replies of {name} in {final}")


def identity(config: Config, marker: str, data_hash: str) -> str:
    """All that replies depend on: only where it is the same are replies of another start kept."""
    # Not `engine`, `data` and the like: where the base lives changes no reply, and data has its own
    # hash.
    sections = config.model_dump(
        mode="json",
        include={"model", "method", "prompts", "retriever", "losses", "reference", "generate"},
    )
    return json.dumps([marker, data_hash, sections, config.train.seed])


if __name__ == "__main__":
    exit_with(main())
