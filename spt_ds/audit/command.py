"""`spt-ds audit RUN`: does the retriever earn its keep on this data?

Reads held-out examples under every prompt of the bank and compares what the retriever selects with
one prompt for all, with chance, with the best prompt of each reply, with gates that are fitted
afterwards and with other runs. Writes RUN/audit.json and prints a verdict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from spt_ds.config.data import held_out, names
from spt_ds.config.schema import Config
from spt_ds.errors import DataError
from spt_ds.files import write_whole
from spt_ds.run.command import add_deepspeed, add_overrides
from spt_ds.run.folder import RunFolder
from spt_ds.run.job import exit_with, join, run_job

if TYPE_CHECKING:
    from spt_ds.audit.measured import Measured
    from spt_ds.dist import World

# What runs that are compared must share: they are all measured on the examples of the audited one.
SHARED = (
    *("test", "format", "columns", "max_tokens", "overflow", "max_test_examples", "persona"),
    *("cache_dir", "split_by", "split_seed"),
)
DIVIDED = ("train", "valid")  # what they share too where the test is a part of the training data


def main(argv: Sequence[str] | None = None) -> int:
    """Audit a run; return the exit code."""
    args = _parser().parse_args(argv)

    def work(config: Config, folder: RunFolder) -> int:
        from spt_ds import dist

        world = join(config, folder)
        _audit(config, folder, args, world)
        dist.shutdown()
        return 0

    # The reference replies are read whole, so their length counts.
    overrides = [*args.overrides, "generate.perplexity=true", "generate.mode=select"]
    return run_job(str(RunFolder(args.run).config), overrides, args.run, work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-ds audit", description="Does the retriever earn its keep on this data?"
    )
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the number of a step")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs to compare with, such as one prompt at equal steps or at equal compute",
    )
    parser.add_argument(
        "--replies",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="replies of other systems to the same examples; those of RUN are compared with them",
    )
    parser.add_argument(
        "--kinds", type=Path, metavar="FILE", help="the kind of each example, one a line"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default RUN/audit.json")
    add_overrides(parser, "override an option, such as data.test=FILE")
    add_deepspeed(parser)
    return parser


def _audit(config: Config, folder: RunFolder, args: argparse.Namespace, world: World) -> None:
    from spt_ds import dist
    from spt_ds.audit import gate, judge, prompts, replies, text, verdict

    measured, checkpoint = _measure(config, folder, args.checkpoint, args, world)
    others = {}
    for path in args.against:
        other = RunFolder(path)
        keys = (*SHARED, *DIVIDED) if held_out(config.data.test) else SHARED
        shared = {key: getattr(config.data, key) for key in keys}
        own = other.load_config(["generate.perplexity=true", "generate.mode=select"])
        own = own.model_copy(update={"data": own.data.model_copy(update=shared)})
        found, _ = _measure(own, other, args.checkpoint, args, world)
        dist.agreed(lambda: _check_same(measured, found, path))  # noqa: B023 (called at once)
        others[_row_of(path, args.against)] = found.of(found.selected)

    def write() -> None:
        kinds = _kinds(args.kinds, measured) if args.kinds else []
        audit = judge.judge(measured, gate.post_hoc_gates(measured), others, kinds)
        told, bank = verdict.verdict(audit), prompts.describe(measured)
        controls = replies.controls(folder.path, args.replies) if args.replies else []
        content = {
            "checkpoint": checkpoint,
            "verdict": asdict(told),
            **audit.to_json(),
            "bank": [asdict(prompt) for prompt in bank],
            "replies": [asdict(control) for control in controls],
        }
        path = args.out or folder.audit
        try:
            write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        print("\n".join(text.lines(told, audit, bank, controls)))
        print(f"written: {path}")

    dist.agreed(lambda: write() if world.rank == 0 else None)


def _measure(
    config: Config, folder: RunFolder, which: str, args: argparse.Namespace, world: World
) -> tuple[Measured, str]:
    """What a run does on its test examples, and the name of its checkpoint."""
    from spt_ds import dist
    from spt_ds.audit.measure import measure
    from spt_ds.engine.session import open_split, open_trained

    session, path = open_trained(config, folder, which, args.deepspeed_config, world)
    try:
        measured = measure(session, open_split(session, "test"))
    finally:
        session.sharding.close()
    dist.agreed(lambda: _check_units(measured, config))
    return measured, path.name


def _check_units(measured: Measured, config: Config) -> None:
    if measured.units.max() < 1:
        raise DataError(
            f"data.test ({names(config.data.test)}): all examples are of one dialogue; an audit"
            " compares dialogues and needs two or more"
        )


def _row_of(path: Path, paths: Sequence[Path]) -> str:
    """The name of a run's row: its folder's, or the whole path where two folders have one name."""
    return path.name if [other.name for other in paths].count(path.name) == 1 else str(path)


def _check_same(measured: Measured, other: Measured, path: Path) -> None:
    if measured.texts != other.texts or (measured.tokens != other.tokens).any():
        raise DataError(
            f"{path}: reads other examples than the audited run, or has another tokenizer; runs"
            " are compared on the same base and the same data.test"
        )


def _kinds(path: Path, measured: Measured) -> list[str]:
    try:
        kinds = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give one kind a line") from error
    if len(kinds) < len(measured.texts):
        raise DataError(
            f"{path}: {len(kinds)} lines for {len(measured.texts)} examples; give the kind of each"
            " example of data.test, one a line"
        )
    # A limit on the examples (data.max_test_examples) takes the first ones.
    return kinds[: len(measured.texts)]


if __name__ == "__main__":
    exit_with(main())
