"""The library's front door: `spt_ds.load(run).reply(persona, history)`.

One process, one reply at a time.
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

from spt_ds import dist
from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.display import shown
from spt_ds.engine.context import Contexts, texts
from spt_ds.engine.generator import decode_batch
from spt_ds.engine.reply_text import ReplyText
from spt_ds.engine.session import Session, context_style, open_trained
from spt_ds.errors import ConfigError, DataError, EngineError
from spt_ds.model.conversation import ContextCache, ReplyHooks, WholeWords
from spt_ds.run.folder import RunFolder
from spt_ds.run.hub import OF_A_STRANGER, fetched, is_hub_id


@dataclass(frozen=True)
class Reply:
    """What a bot said."""

    text: str  #: cleaned as the scores clean it
    prompt: int | None  #: the prompt that answered; None when all were fused
    scores: tuple[float, ...]  #: [K] of the retriever
    tokens: tuple[int, ...]  #: as generated, end of sequence included
    dropped_turns: int  #: oldest turns that did not fit into data.max_tokens


def load(run: str | Path, checkpoint: str | int = "best", **overrides: Any) -> Bot:
    """Open a trained run for replies.

    Args: run, its folder, or `org/name` at the hub where there is no folder `org`; checkpoint,
    best, last or the number of a step; overrides, options with two underscores for the point:
    `generate__max_new_tokens=64`. Raises SptError where run, checkpoint or an option cannot be
    used.
    """
    if not isinstance(run, (str, os.PathLike)):
        raise ConfigError(f"run: expected the path of a run folder, got {shown(run)}")
    if not isinstance(checkpoint, (str, int)) or isinstance(checkpoint, bool):
        raise ConfigError(
            f"checkpoint: expected best, last or the number of a step, got {shown(checkpoint)}"
        )
    options = []
    for key, value in overrides.items():
        try:
            options.append(f"{key.replace('__', '.')}={json.dumps(value, default=os.fspath)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{key}: {shown(value)} is no value of an option; give a text, a number, true or"
                " false, or a list"
            ) from error
    which = checkpoint if isinstance(checkpoint, str) else shown(checkpoint)
    return open_bot(Path(run), which, options)


def open_bot(run: Path, checkpoint: str, overrides: Sequence[str]) -> Bot:
    """Open a run as `load` does, with overrides as on the command line: `key.path=value`."""
    return Bot(open_run(run, checkpoint, overrides))


def open_run(run: Path, checkpoint: str, overrides: Sequence[str]) -> Session:
    """Open a run in this one process, for replies to whoever talks to it; see `open_bot`."""
    size = dist.launch_variables(os.environ)["WORLD_SIZE"]
    if size != 1:
        raise EngineError(
            f"a conversation takes one process, this is one of {size}; start it without a launcher"
        )
    if is_hub_id(str(run)):
        run, overrides = fetched(str(run)), [*OF_A_STRANGER, *overrides]
    folder = RunFolder(run)
    # os.path answers False to a name that no file can have; pathlib raises.
    if not os.path.isfile(folder.config):
        raise ConfigError(
            f"{run}: no {folder.config.name} in it; give the folder of a run that was trained"
        )
    overrides = [*overrides, "generate.perplexity=false"]  # a conversation has no reference reply
    config = folder.load_config(overrides)
    world = dist.init(config.engine.collective_timeout_s)
    atexit.register(dist.shutdown)  # NCCL complains of a group that is left open
    return open_trained(config, folder, checkpoint, None, world)[0]


class Bot:
    """A trained run that answers.

    In suffix placement it keeps what it has read of a dialogue from call to call.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        window, style = session.config.data.max_tokens, context_style(session)
        self._contexts = Contexts(session.tokenizer, window, style)
        self._text = ReplyText.of(session)
        self._context = ContextCache()
        # each reply has noise of its own, where sampling or generate.mode draws any
        self._replies = 0
        # The dialogue up to the last reply: turns bear no names, so that this bot's own words at
        # the end of a history would be taken for the partner's.
        self._answered: tuple[str, ...] = ()

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
        """Yield a reply in pieces of whole words; the generator returns what `reply` would.

        Joined, the pieces are `Reply.text`. Closing the generator ends decoding after the token at
        hand. With beams and with `generate.mode: rank` all of the text comes at once.
        """
        streamer = WholeWords(self._session.tokenizer)
        hooks = ReplyHooks(streamer=streamer)

        def work() -> Reply:
            try:
                return self._answer(persona, history, prompt, hooks)
            finally:
                # also when decoding failed or has no stream: the loop below waits for an end
                streamer.end()

        shown = 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                for spoken in streamer:
                    text = self._text.so_far(spoken)
                    if len(text) > shown:
                        yield text[shown:]
                        shown = len(text)
            finally:
                # Before the pool is left, which waits for its thread: a closed generator must not
                # wait for the whole reply.
                hooks.stopped.set()
            reply = future.result()
        if rest := reply.text[shown:]:
            yield rest
        return reply

    def _answer(
        self,
        persona: Sequence[str],
        history: Sequence[str],
        prompt: int | None,
        hooks: ReplyHooks | None,
    ) -> Reply:
        options = self._options(prompt)
        persona, history = texts("persona", persona), texts("history", history)
        if history and history == self._answered:
            raise DataError(
                f"history: ends with this bot's own reply {shown(history[-1])}; add the partner's"
                " next turn, which is to be answered"
            )
        batch, dropped = self._batch(persona, history, options)
        alone = not options.reads_every_prompt and options.num_beams == 1
        stream = hooks or ReplyHooks()
        hooks = ReplyHooks(
            context=self._context if self._session.spt.suffix and alone else None,
            streamer=stream.streamer if options.num_beams == 1 and options.mode != "rank" else None,
            stopped=stream.stopped,
        )
        out = decode_batch(self._session, batch, options, hooks)
        text = self._text.of_tokens(out.tokens[0])[1]
        scores = tuple(float(score) for score in out.scores[:, 0])
        self._answered = (*history, text) if history else ()
        return Reply(text, out.chosen[0], scores, tuple(out.tokens[0]), dropped)

    def _options(self, prompt: int | None) -> GenerateConfig:
        options = self._session.config.generate
        if prompt is None:
            return options
        if not isinstance(prompt, int) or isinstance(prompt, bool):
            raise ConfigError(
                f"prompt {shown(prompt)}: expected a whole number; give 0 to {self.prompts - 1},"
                " or None for what generate.mode says"
            )
        if not 0 <= prompt < self.prompts:
            raise ConfigError(
                f"prompt {shown(prompt)}: the bank has {self.prompts}; give 0 to {self.prompts - 1}"
            )
        return options.model_copy(update={"mode": f"fixed:{prompt}"})

    def _batch(
        self, persona: Sequence[str], history: Sequence[str], options: GenerateConfig
    ) -> tuple[Batch, int]:
        self._replies += 1
        return self._contexts.batch(persona, history, options.max_new_tokens, self._replies)
