"""The library's front door: `spt_ds.load(run).reply(persona, history)`. One process, one reply at a
time.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextIteratorStreamer

from spt_ds import dist
from spt_ds.batch import Batch
from spt_ds.config.schema import GenerateConfig
from spt_ds.data.encode import encode_context
from spt_ds.engine.generator import decode_batch, reply_text
from spt_ds.engine.session import Session, open_trained, shown_to
from spt_ds.errors import ConfigError, DataError, EngineError
from spt_ds.evaluate.scores import clean
from spt_ds.model.conversation import ContextCache, Live
from spt_ds.run.folder import RunFolder


@dataclass(frozen=True)
class Reply:
    """What a bot said."""

    text: str  # cleaned as the scores clean it
    prompt: int | None  # the prompt that answered; None when all were fused
    scores: tuple[float, ...]  # [K] of the retriever
    tokens: tuple[int, ...]  # as generated, end of sequence included
    dropped_turns: int  # oldest turns that did not fit into data.max_tokens


def load(run: str | Path, checkpoint: str | int = "best", **overrides: Any) -> Bot:
    """Open a trained run for replies.

    Args: run, its folder; checkpoint, best, last or the number of a step; overrides, options with
    two underscores for the point: `generate__max_new_tokens=64`. Raises SptError where run,
    checkpoint or an option cannot be used.
    """
    options = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return open_bot(Path(run), str(checkpoint), options)


def open_bot(run: Path, checkpoint: str, overrides: Sequence[str]) -> Bot:
    """Open a run as `load` does; overrides are written as those of the command line,
    `key.path=value`.
    """
    size = dist.launch_variables(os.environ)["WORLD_SIZE"]
    if size != 1:
        raise EngineError(
            f"a conversation takes one process, this is one of {size}; start it without a launcher"
        )
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(
            f"{run}: no {folder.config.name} in it; give the folder of a run that was trained"
        )
    overrides = [*overrides, "generate.perplexity=false"]  # a conversation has no reference reply
    config = folder.load_config(overrides)
    world = dist.init(config.engine.collective_timeout_s)
    atexit.register(dist.shutdown)  # NCCL complains of a group that is left open
    return Bot(open_trained(config, folder, checkpoint, None, world)[0])


class Bot:
    """A trained run that answers. In suffix placement what it has read of a dialogue is kept from
    call to call.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._shown = shown_to(session)  # worked examples are drawn once, not for every reply
        self._context = ContextCache()
        # each reply has noise of its own, where sampling or generate.mode draws any
        self._replies = 0

    @property
    def prompts(self) -> int:
        """K, the size of the prompt bank."""
        return self._session.config.prompts.count

    def reply(
        self, persona: Sequence[str], history: Sequence[str], *, prompt: int | None = None
    ) -> Reply:
        """Answer the last turn of a dialogue.

        Args: persona, sentences, none are allowed; history, turns of partner and bot in
        alternation, oldest first, the partner's last; prompt, the one to answer with instead of
        what generate.mode says. Raises DataError when persona and last turn do not fit into
        data.max_tokens.
        """
        return self._answer(persona, history, prompt, None)

    def stream(
        self, persona: Sequence[str], history: Sequence[str], *, prompt: int | None = None
    ) -> Generator[str, None, Reply]:
        """Yield the text of a reply in pieces, whole words each; the generator returns what `reply`
        would.

        Joined, the pieces are `Reply.text`. Closing the generator ends decoding after the token at
        hand. With beams all of the text comes at once.
        """
        streamer = _FirstRow(self._session.tokenizer, skip_special_tokens=True)
        live = Live(streamer=streamer)

        def work() -> Reply:
            try:
                return self._answer(persona, history, prompt, live)
            finally:
                # also when decoding failed or has no stream: the loop below waits for an end
                streamer.end()

        spoken, shown = "", 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                for piece in streamer:
                    spoken += piece
                    text = clean(spoken).strip()
                    if len(text) > shown:
                        yield text[shown:]
                        shown = len(text)
            finally:
                live.stopped.set()
            reply = future.result()
        if rest := reply.text[shown:]:
            yield rest
        return reply

    def _answer(
        self, persona: Sequence[str], history: Sequence[str], prompt: int | None, live: Live | None
    ) -> Reply:
        options = self._options(prompt)
        batch, dropped = self._batch(persona, history, options)
        alone = options.mode != "fuse" and options.num_beams == 1
        suffix = self._session.config.prompts.placement == "suffix"
        stream = live or Live()
        live = Live(
            context=self._context if suffix and alone else None,
            streamer=stream.streamer if options.num_beams == 1 else None,
            stopped=stream.stopped,
        )
        out = decode_batch(self._session, batch, options, live)
        text = reply_text(self._session, out.tokens[0])[1]
        scores = tuple(float(score) for score in out.scores[:, 0])
        return Reply(text, out.chosen[0], scores, tuple(out.tokens[0]), dropped)

    def _options(self, prompt: int | None) -> GenerateConfig:
        options = self._session.config.generate
        if prompt is None:
            return options
        if not 0 <= prompt < self.prompts:
            raise ConfigError(
                f"prompt {prompt}: the bank has {self.prompts}; give 0 to {self.prompts - 1}"
            )
        return options.model_copy(update={"mode": f"fixed:{prompt}"})

    def _batch(
        self, persona: Sequence[str], history: Sequence[str], options: GenerateConfig
    ) -> tuple[Batch, int]:
        for name, given in (("persona", persona), ("history", history)):
            if isinstance(given, str):
                raise DataError(
                    f"{name}: expected a list of texts, got one text {given[:40]!r}; put it into a"
                    " list"
                )
        window = self._session.config.data.max_tokens
        encoded = encode_context(
            persona,
            history,
            self._session.tokenizer,
            window,
            reserved=options.max_new_tokens,
            shown=self._shown,
        )
        if history and encoded.dropped_turns == len(history):
            raise DataError(
                f"the last turn does not fit: data.max_tokens is {window}, of which"
                f" generate.max_new_tokens keeps {options.max_new_tokens} for the reply; shorten"
                " the turn"
            )
        ids = encoded.context_ids
        self._replies += 1
        batch = Batch(
            torch.tensor(ids),
            torch.zeros(0, dtype=torch.long),
            (len(ids),),
            (0,),
            (self._replies,),
            (1.0,),
        )
        return batch, encoded.dropped_turns


class _FirstRow(TextIteratorStreamer):
    """Streams the first row: fusion decodes K rows, which hold the same tokens."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value.flatten()[:1])
