"""Generates replies over ranks: each example once, in batches that are the same whatever the number
of ranks.

Batches are cut from the examples sorted by length, before they are dealt to ranks: a batch holds
the same rows on one rank or on eight, so its numbers, rounding included, are the same and so is the
file. Finished batches stay in part files; a killed run goes on from them. `generate.json` beside
the predictions tells how they were made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spt_ds import dist
from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.data.loader import make_batch
from spt_ds.data.store import ExampleStore
from spt_ds.engine.session import Session
from spt_ds.errors import DataError
from spt_ds.evaluate.text_metrics import clean
from spt_ds.files import sha256, write_whole
from spt_ds.log import get_logger
from spt_ds.model.conversation import ReplyHooks
from spt_ds.model.decode import Decoded, decode
from spt_ds.run.folder import ReplyFolder


def plan_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut the examples, longest first, into batches of like length; independent of the number of
    ranks.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decode_batch(
    session: Session, batch: Batch, options: GenerateConfig, hooks: ReplyHooks | None = None
) -> Decoded:
    """Decode one micro-batch; with a sharded base all ranks must come along."""
    special = session.tokenizer.eos_token_id, session.tokenizer.pad_token_id
    with torch.no_grad():
        out: Decoded = session.root(
            decode, session.spt, batch, options, special, session.sharding.on, hooks
        )
    return out


def reply_text(session: Session, tokens: list[int]) -> tuple[str, str]:
    """The text of a reply as it was generated, and as the scores clean it."""
    raw = str(session.tokenizer.decode(tokens, skip_special_tokens=True))
    return raw, clean(raw).strip()


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
        """`identity` is all that the replies depend on (trained tensors, data, options): what
        another one left is not taken over. `checkpoint` names the tensors for the reader.
        """
        self.session = session
        self.store = store
        self.out = out
        self.checkpoint = checkpoint
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self.parts = out.path / f".parts-{self.identity[:16]}"

    def run(self) -> Path:
        """Generate what is missing, merge on rank 0, and return the path of the predictions."""
        world, final = self.session.world, self.out.predictions
        if dist.broadcast_json(world.rank == 0 and self._is_done(final)):
            get_logger().info(f"{final} holds these replies already")
            return final
        dist.agreed(lambda: self.parts.mkdir(parents=True, exist_ok=True))
        done = set(dist.broadcast_json(sorted(self._finished()) if world.rank == 0 else None))
        batches = plan_batches(self.store.lengths.context, self.session.config.generate.batch_size)
        todo = [rows for rows in batches if not done.issuperset(rows)]
        rounds = -(-len(todo) // world.size)
        bar = tqdm(
            total=len(self.store),
            initial=len(done),
            unit="reply",
            desc="generate",
            file=sys.stderr,
            disable=world.rank != 0,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )
        own = self.parts / f"rank-{world.rank}.jsonl"
        _drop_cut_line(own)
        with own.open("a", encoding="utf-8") as part:
            for turn in range(rounds):
                number = turn * world.size + world.rank
                # With a sharded base every rank must take part in every round: one without work
                # repeats a batch.
                rows = todo[min(number, len(todo) - 1)]
                decoded = self._decode(rows)
                if number < len(todo):
                    part.writelines(
                        json.dumps(line, ensure_ascii=False) + "\n"
                        for line in self._lines(rows, decoded)
                    )
                    part.flush()
                bar.update(
                    sum(len(rows) for rows in todo[turn * world.size : (turn + 1) * world.size])
                )
        bar.close()
        dist.barrier()
        dist.agreed(lambda: self._merge(final) if world.rank == 0 else None)
        return final

    def _decode(self, rows: list[int]) -> Decoded:
        return decode_batch(
            self.session, make_batch(self.store, rows), self.session.config.generate
        )

    def _lines(self, rows: list[int], decoded: Decoded) -> Iterator[dict[str, Any]]:
        scores = decoded.scores.T.float().cpu().tolist()
        for place, index in enumerate(rows):
            row, tokens = self.store[index], decoded.tokens[place]
            raw, reply = reply_text(self.session, tokens)
            line = {key: row[key] for key in ("id", "dialogue_id", "turn", "persona", "history")}
            line = {
                "index": index,
                **line,
                "reference": row["response"],
                "raw": raw,
                "reply": reply,
            }
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
        for path in sorted(self.parts.glob("rank-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for text in file:
                    if text.endswith("\n"):  # a line without its end was cut by a kill
                        yield json.loads(text)

    def _is_done(self, final: Path) -> bool:
        try:
            record = json.loads(self.out.record.read_text(encoding="utf-8"))
            return [record["identity"], record["predictions_sha256"]] == [
                self.identity,
                sha256(final),
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _merge(self, final: Path) -> None:
        lines = {line["index"]: line for line in self._read_parts()}
        missing = len(self.store) - len(lines)
        if missing:
            raise DataError(
                f"{self.parts}: {missing} of {len(self.store)} replies are missing; run the command"
                " again"
            )
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
        }
        config = self.session.config.model_dump(mode="json")
        write_whole(self.out.record, json.dumps({**record, "config": config}, indent=1) + "\n")
        shutil.rmtree(self.parts)


def _drop_cut_line(path: Path) -> None:
    """Cut what a kill left behind the last whole line: the next line would be appended to it."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
