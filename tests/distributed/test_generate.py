"""Generation on any number of ranks, replicated or sharded: one file, byte for byte, also after a
`kill -9`.

The time-outs of these tests are the point of some of them: ranks with other numbers or lengths of
examples, or with none at all, used to wait for each other for ever when the base was sharded.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.engine.generator import Generator
from spt_ds.engine.session import Session, open_split
from spt_ds.model.decode import Decoded
from spt_ds.run.folder import ReplyFolder
from tests.distributed.scenes import CONFIG, Scene, placed_session, write_dialogues
from tests.helpers.ranks import run_ranks

EXAMPLES = 11
PATIENCE_S = 60  # a hang ends here with every rank's traceback
RANKED = [  # in suffix placement, so that contexts are read apart
    "prompts.position=before_reply",
    "generate.mode=rank",
    "generate.do_sample=true",
    "generate.samples=2",
]
Job = tuple[str, list[str], str | None]  # name of the output folder, options, DeepSpeed file


@pytest.fixture(scope="module")
def options(scene: Scene) -> list[str]:
    write_dialogues(scene.folder / "test.jsonl", EXAMPLES, seed=3)
    more = ("generate.max_new_tokens=8", "generate.batch_size=2", "generate.perplexity=true")
    return [f"data.test={scene.folder / 'test.jsonl'}", *more]


def generate(world: dist.World, jobs: list[Job], out: Path, end: int | None = None) -> list[int]:
    """Generate each job's file; return how many examples this rank decoded in each. `end` replaces
    the end token.
    """
    counts = []
    for name, overrides, ds in jobs:
        config = load_config(CONFIG, overrides)
        session = placed_session(config, ds, world)
        if end is not None:
            session = replace(session, ends=(end,))
        generator = Counting(session, out / name)
        generator.run()
        session.sharding.close()
        counts.append(generator.decoded)
    return counts


class Counting(Generator):
    """Counts what is decoded; with `die_after` kills this process, without a word, after so many
    batches.
    """

    def __init__(self, session: Session, out: Path, die_after: int | None = None) -> None:
        super().__init__(session, open_split(session, "test"), ReplyFolder(out), "test", "step-1")
        self.decoded = 0
        self.batches = 0
        self.die_after = die_after

    def _lines(self, rows: list[int], decoded: Decoded) -> Iterator[dict[str, Any]]:
        self.decoded += len(rows)
        self.batches += 1
        for number, line in enumerate(super()._lines(rows, decoded)):
            if self.batches - 1 == self.die_after and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a batch
            yield line


def generate_and_die(
    world: dist.World, overrides: list[str], ds: str | None, out: Path, victim: int, batches: int
) -> None:
    """Rank `victim` is killed after `batches` of its batches, in the middle of the next."""
    session = placed_session(load_config(CONFIG, overrides), ds, world)
    Counting(session, out, die_after=batches if world.rank == victim else None).run()


def read(folder: Path) -> list[dict[str, Any]]:
    assert sorted(path.name for path in folder.iterdir()) == ["generate.json", "predictions.jsonl"]
    return [
        json.loads(line)
        for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def ways(scene: Scene, arch: str, name: str, options: list[str]) -> list[Job]:
    overrides = scene.overrides(arch, *options)
    return [
        (f"{name}-replicated", overrides, None),
        (f"{name}-sharded", overrides, scene.ds("zero3")),
    ]


def test_any_ranks_replicated_or_sharded_write_the_same_bytes(
    scene: Scene, options: list[str], tmp_path: Path
) -> None:
    jobs = [
        *ways(scene, "opt", "greedy", options),
        *ways(
            scene,
            "llama",
            "sampled",
            [*options, "prompts.position=before_reply", "generate.do_sample=true"],
        ),
        *ways(
            scene,
            "opt",
            "beams",
            [*options, "generate.num_beams=3", "generate.repetition_penalty=1.3"],
        ),
        *ways(
            scene, "llama", "fused", [*options, "generate.mode=fuse", "generate.perplexity=false"]
        ),
        *ways(scene, "llama", "ranked", [*options, *RANKED]),
    ]
    for size in (1, 2, 3):
        decoded = run_ranks(size, generate, jobs, tmp_path / str(size), timeout_s=240)
        assert [sum(counts) for counts in zip(*decoded, strict=True)] == [EXAMPLES] * len(jobs)
    for name in ("greedy", "sampled", "beams", "fused", "ranked"):
        files = [
            (tmp_path / str(size) / f"{name}-{way}" / "predictions.jsonl").read_bytes()
            for size in (1, 2, 3)
            for way in ("replicated", "sharded")
        ]
        assert all(content == files[0] for content in files)
        lines = read(tmp_path / "3" / f"{name}-sharded")
        assert [line["index"] for line in lines] == list(range(EXAMPLES))
        assert len({line["reply"] for line in lines}) > EXAMPLES // 2, "the replies must differ"


def test_any_ranks_choose_with_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    """Examples have unlike numbers of answers, so that ranks with a sharded base would part."""
    rows = [
        {"id": f"d{n}", "prompt": "tea " * (1 + n % 4), "completion": "no", "choices": choices}
        for n, choices in enumerate([["yes", "no"], ["no", "so", "a long answer", "sea"]] * 4)
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [f"data.test={path}", "generate.batch_size=1", "generate.choices=mean"]
    jobs = [
        *ways(scene, "opt", "prefix", options),
        *ways(scene, "llama", "suffix", [*options, "prompts.position=before_reply"]),
    ]
    for size in (1, 2):
        run_ranks(size, generate, jobs, tmp_path / str(size), timeout_s=PATIENCE_S)
    for name in ("prefix", "suffix"):
        files = [
            (tmp_path / str(size) / f"{name}-{way}" / "predictions.jsonl").read_bytes()
            for size in (1, 2)
            for way in ("replicated", "sharded")
        ]
        assert all(content == files[0] for content in files)
        for line in read(tmp_path / "2" / f"{name}-sharded"):
            means = [a / b for a, b in zip(line["choice_nll"], line["choice_tokens"], strict=True)]
            assert line["reply"] == line["choices"][means.index(min(means))]
            place = line["choices"].index("no")
            assert line["nll_sum"] == line["choice_nll"][place]
    more = [f"data.test={scene.folder / 'valid.jsonl'}", "generate.choices=mean"]
    none: Job = ("none", scene.overrides("opt", *more), None)
    with pytest.raises(AssertionError, match="lists no answers to choose among"):
        run_ranks(1, generate, [none], tmp_path, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("ds", [None, "zero3"])
@pytest.mark.parametrize(
    ("examples", "batch_size", "shares"),
    [
        (5, 1, [2, 2, 1]),  # unlike numbers
        (2, 1, [1, 1, 0]),  # one rank with none
        (3, 4, [3, 0, 0]),  # two ranks with none
        (4, "auto", [4, 0, 0]),
    ],
)
def test_ranks_with_fewer_examples_or_none_do_not_hang(
    scene: Scene,
    options: list[str],
    tmp_path: Path,
    ds: str | None,
    examples: int,
    batch_size: int | str,
    shares: list[int],
) -> None:
    more = [f"data.max_test_examples={examples}", f"generate.batch_size={batch_size}"]
    job: Job = ("out", scene.overrides("llama", *options, *more), ds and scene.ds(ds))
    decoded = run_ranks(3, generate, [job], tmp_path, timeout_s=PATIENCE_S)
    assert [counts[0] for counts in decoded] == shares
    assert [line["index"] for line in read(tmp_path / "out")] == list(range(examples))


def test_replies_that_end_early_on_one_rank_do_not_hang_the_others(
    scene: Scene, options: list[str], tmp_path: Path
) -> None:
    """The end token is one that some replies hold early and others not at all, so that ranks end at
    unlike steps.
    """
    overrides = scene.overrides("opt", *options, "generate.batch_size=1", "generate.do_sample=true")
    whole: Job = ("whole", overrides, None)
    (tokens,) = run_ranks(1, tokens_of, whole, tmp_path)
    seen = [set(row) for row in tokens]
    end = max(
        set().union(*seen), key=lambda token: min(sum(token in row for row in seen), EXAMPLES // 2)
    )
    lengths = [row.index(end) + 1 if end in row else len(row) for row in tokens]
    assert len(set(lengths)) > 2, "the case must have replies of several lengths"
    jobs: list[Job] = [("sharded", overrides, scene.ds("zero3"))]
    run_ranks(3, generate, jobs, tmp_path, end, timeout_s=PATIENCE_S)
    run_ranks(1, generate, [("alone", overrides, None)], tmp_path, end, timeout_s=PATIENCE_S)
    assert [line["new_tokens"] for line in read(tmp_path / "sharded")] == lengths
    assert (tmp_path / "sharded" / "predictions.jsonl").read_bytes() == (
        tmp_path / "alone" / "predictions.jsonl"
    ).read_bytes()


def tokens_of(world: dist.World, job: Job, out: Path) -> list[list[int]]:
    """The tokens of every reply, in the order of the data."""
    found: dict[int, list[int]] = {}

    class Keeping(Counting):
        def _lines(self, rows: list[int], decoded: Decoded) -> Iterator[dict[str, Any]]:
            found.update(zip(rows, decoded.tokens, strict=True))
            return super()._lines(rows, decoded)

    Keeping(placed_session(load_config(CONFIG, job[1]), job[2], world), out / job[0]).run()
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("ds", [None, "zero3"])
def test_killed_and_resumed_gives_the_same_bytes(
    scene: Scene, options: list[str], tmp_path: Path, ds: str | None
) -> None:
    """Killed on two ranks, again on three, finished on one; a line cut in two is written anew."""
    overrides = scene.overrides("llama", *options)
    path = ds and scene.ds(ds)
    run_ranks(1, generate, [("whole", overrides, None)], tmp_path, timeout_s=PATIENCE_S)
    out = tmp_path / "out"
    left = []
    for size, victim, batches in ((2, 1, 1), (3, 0, 0)):
        with pytest.raises(AssertionError, match="generate_and_die failed"):
            run_ranks(
                size, generate_and_die, overrides, path, out, victim, batches, timeout_s=PATIENCE_S
            )
        (parts,) = out.glob(".parts-*")
        done = [
            json.loads(line.partition(" ")[2])["index"]  # behind its checksum
            for part in parts.iterdir()
            for line in part.read_text().splitlines()
        ]
        assert len(done) == len(set(done))
        left.append(EXAMPLES - len(done))
        with (parts / "rank-0.jsonl").open("a", encoding="utf-8") as part:
            part.write('{"index": 0, "id": "d')  # what a kill between two blocks of a write leaves
    assert EXAMPLES > left[0] >= left[1] > 0
    assert not (out / "predictions.jsonl").exists()
    (decoded,) = run_ranks(1, generate, [("out", overrides, path)], tmp_path, timeout_s=PATIENCE_S)
    assert decoded == [left[1]], "what was written is not decoded again"
    assert (out / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()
    assert len(read(out)) == EXAMPLES
    record = json.loads((out / "generate.json").read_text(encoding="utf-8"))
    assert (record["checkpoint"], record["config"]["generate"]["max_new_tokens"]) == ("step-1", 8)
    again: Job = ("out", overrides, path)
    assert run_ranks(2, generate, [again], tmp_path, timeout_s=PATIENCE_S) == [
        [0],
        [0],
    ], "it was done"
    (out / "predictions.jsonl").write_text("of another command")
    assert (
        sum(counts[0] for counts in run_ranks(2, generate, [again], tmp_path, timeout_s=PATIENCE_S))
        == EXAMPLES
    )
    assert (out / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()
