"""Generates replies over ranks, in batches that do not depend on the number of ranks.

Each example is decoded once. Batches are cut from the examples sorted by length, before they are
dealt to ranks: a batch holds the same rows on one rank or on eight, so its numbers, rounding
included, are the same and so is the file. Finished batches stay in part files; a killed run resumes
from them. `generate.json` beside the predictions tells how they were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spt_ds import dist
from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.data.loader import make_batch
from spt_ds.data.store import ExampleStore
from spt_ds.engine.choosing import chosen_lines, line_head
from spt_ds.engine.reply_batches import fitting, plan_batches
from spt_ds.engine.reply_text import ReplyText
from spt_ds.engine.session import Session
from spt_ds.errors import DataError, EngineError
from spt_ds.files import append_whole, sha256, write_whole
from spt_ds.json_input import load_json, read_json
from spt_ds.log import ErrorStream, get_logger
from spt_ds.model.conversation import ReplyHooks
from spt_ds.model.decode import Decoded, decode
from spt_ds.run.folder import ReplyFolder
from spt_ds.run.lock import only_start


def decode_batch(
    session: Session, batch: Batch, options: GenerateConfig, hooks: ReplyHooks | None = None
) -> Decoded:
    """Decode one micro-batch; with a sharded base all ranks must come along."""
    form, sharded = ReplyText.of(session), session.sharding.on
    with torch.no_grad():
        out: Decoded = session.backbone(
            decode, session.spt, batch, options, form.endings, sharded, hooks, form.best_of
        )
    return out


class Generator:
    """Writes `predictions.jsonl` into `out` for one store under one set of options."""

    def __init__(
        self,
        session: Session,
        store: ExampleStore,
        out: ReplyFolder,
        identity: str,
        checkpoint: str,
    ) -> None:
        """`identity` is all that the replies depend on: trained tensors, data, options.

        Replies of another identity are not taken over. `checkpoint` names the tensors for the
        reader.
        """
        self.session = session
        self.store = store
        self.out = out
        self.checkpoint = checkpoint
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self.parts = out.path / f".parts-{self.identity[:16]}"
        self.own_part = self.parts / f"rank-{session.world.rank}.jsonl"

    def run(self) -> Path:
        """Generate what is missing, merge on rank 0, and return the path of the predictions."""
        leads, final = self.session.world.rank == 0, self.out.predictions
        if dist.broadcast_json(leads and self._is_done(final)):
            get_logger().info(f"{final} holds these replies already")
            return final
        with ExitStack() as held:
            mend = "wait until it ends, or give another --out"
            dist.agreed(
                lambda: held.enter_context(only_start(self.out.path, mend)) if leads else None
            )
            self._generate()
            dist.agreed(lambda: self._merge(final) if leads else None)
        return final

    def _generate(self) -> None:
        """Write what no part file holds yet into those of the ranks."""
        world = self.session.world
        dist.agreed(self._make_parts)
        done = set(dist.broadcast_json(sorted(self._finished()) if world.rank == 0 else None))
        answers = self.session.config.generate.choices != "none"
        rows_per_example = self._most_choices if answers else self._rows_per_example
        fits = fitting(self.session, rows_per_example)
        batches = plan_batches(self.store.lengths.context, fits)
        # A batch with one missing reply is decoded as a whole: with other companions its rows would
        # be rounded in another way.
        todo = [rows for rows in batches if not done.issuperset(rows)]
        rounds = -(-len(todo) // world.size)
        stream = ErrorStream()
        bar = tqdm(
            total=len(self.store),
            initial=len(done),
            unit="reply",
            desc="generate",
            file=stream,
            disable=world.rank != 0,
            mininterval=0.5 if stream.isatty() else 20.0,
        )
        # With a sharded base every rank must take part in every round: one without work repeats a
        # batch, and all of them learn of a full disk. Without, the rank that meets it ends alone.
        together = dist.agreed if self.session.sharding.on else _alone
        for turn in range(rounds):
            number = turn * world.size + world.rank
            rows = todo[min(number, len(todo) - 1)]
            found = self._answered(rows)
            lines = found if number < len(todo) else ()
            together(lambda: self._append(lines))  # noqa: B023 (called at once)
            bar.update(sum(len(rows) for rows in todo[turn * world.size : (turn + 1) * world.size]))
        bar.close()
        dist.barrier()

    def _make_parts(self) -> None:
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            # Each rank mends the file that it appends to. Files of ranks that this start does not
            # have are read only.
            _drop_cut_line(self.own_part)
        except OSError as error:
            raise self._refused(self.parts, error) from error

    def _append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add all lines to this rank's part file, or none; EngineError where the disk refuses."""
        content = b"".join(map(_part_line, lines))
        try:
            append_whole(self.own_part, content)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.parts.rmdir()  # unless replies are in it
            raise self._refused(self.own_part, error) from error

    @property
    def _rows_per_example(self) -> int:
        """How many replies are decoded for each one that is kept."""
        config = self.session.config
        prompts = config.prompts.count if config.generate.reads_every_prompt else 1
        return prompts * config.generate.samples * config.generate.num_beams

    def _refused(self, path: Path, error: OSError) -> EngineError:
        return EngineError(
            f"{path}: cannot be written ({error.strerror or error}); free space, or give another"
            " --out. The same command resumes after the replies that are there"
        )

    def _answered(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        """The lines of these examples; what the model has to do for them is done at once."""
        if self.session.config.generate.choices != "none":
            return iter(chosen_lines(self.session, self.store, rows, self._most_choices))
        return self._lines(rows, self._decode(rows))

    @cached_property
    def _most_choices(self) -> int:
        return self.store.most_choices

    def _decode(self, rows: list[int]) -> Decoded:
        return decode_batch(
            self.session, make_batch(self.store, rows), self.session.config.generate
        )

    def _lines(self, rows: list[int], decoded: Decoded) -> Iterator[dict[str, Any]]:
        scores = decoded.scores.T.float().cpu().tolist()
        replies = ReplyText.of(self.session)
        for place, index in enumerate(rows):
            row, tokens = self.store[index], decoded.tokens[place]
            raw, reply = replies.of_tokens(tokens)
            line = {**line_head(index, row), "raw": raw, "reply": reply}
            if replies.rule != "spt":
                line["clean"] = replies.rule  # for the scores, which cut `raw` again
            line |= {
                "prompt": decoded.chosen[place],
                "scores": [round(score, 6) for score in scores[place]],
            }
            line |= {"new_tokens": len(tokens), "context_tokens": row["context_len"]}
            if decoded.nll is not None:
                line |= {
                    "nll_sum": float(decoded.nll[place]) * row["response_len"],
                    "nll_tokens": row["response_len"],
                }
            yield line

    def _finished(self) -> set[int]:
        return {line["index"] for line in self._read_parts()}

    def _read_parts(self) -> Iterator[dict[str, Any]]:
        return read_parts(self.parts, len(self.store))

    def _is_done(self, final: Path) -> bool:
        try:
            record = read_json(self.out.record)
            # The digest too: a predictions file that somebody edited is made again.
            return [record["identity"], record["predictions_sha256"]] == [
                self.identity,
                sha256(final),
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _merge(self, final: Path) -> None:
        # By index, because a batch that was decoded again may be in the files of two ranks.
        lines = {line["index"]: line for line in self._read_parts()}
        missing = len(self.store) - len(lines)
        if missing:
            raise DataError(
                f"{self.parts}: {missing} of {len(self.store)} replies are missing; run the command"
                " again"
            )
        try:
            write_whole(
                final,
                (
                    json.dumps(lines[index], ensure_ascii=False) + "\n"
                    for index in range(len(self.store))
                ),
            )
            record = {
                "identity": self.identity,
                "predictions_sha256": sha256(final),
                "checkpoint": self.checkpoint,
                "rows_per_example": self._rows_per_example,
            }
            # The record is written last: its digest vouches for the file before it.
            config = self.session.config.model_dump(mode="json")
            write_whole(self.out.record, json.dumps({**record, "config": config}, indent=1) + "\n")
        except OSError as error:
            raise self._refused(final, error) from error
        shutil.rmtree(self.parts, ignore_errors=True)


def _alone(work: Callable[[], None]) -> None:
    work()


def _part_line(line: dict[str, Any]) -> bytes:
    """A line of a part file: the checksum of what follows it, a blank, JSON."""
    text = json.dumps(line, ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_parts(folder: Path, examples: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a generation's part files, each of one of so many examples.

    What a kill cut or a disk damaged is left out and made again.
    """
    for path in sorted(folder.glob("rank-*.jsonl")):
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                line = _parsed(content, examples)
                if line is None and content.endswith(b"\n"):
                    get_logger().warning(
                        f"{path}:{number}: the line is damaged; its reply is made again"
                    )
                if line is not None:
                    yield line


def _parsed(content: bytes, examples: int) -> dict[str, Any] | None:
    """The line that `_part_line` gave; None where it is not that."""
    checksum, _, text = content.removesuffix(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    # Anyone can compute the checksum.
    with contextlib.suppress(ValueError, LookupError, TypeError):
        line: dict[str, Any] = load_json(text)
        if line["index"] in range(examples):
            return line
    return None


def _drop_cut_line(path: Path) -> None:
    """Cut what a kill left behind the last whole line: the next line would be appended to it."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
