"""Answers from a base that is here: one thread decodes, and the rows of all callers share it.

Requests come from the event loop and wait in a queue. Before each token step the thread takes in as
many as there are places, and lets go of rows that are done, late or no longer wanted. What cannot
share a step (beams, fusion, rank) is decoded by itself between two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Condition, Event, Thread

import torch

from spt_ds.batch import Batch
from spt_ds.engine.context import Contexts
from spt_ds.engine.generator import decode_batch
from spt_ds.engine.reply_text import ReplyText
from spt_ds.engine.session import Session, context_style
from spt_ds.errors import SptError
from spt_ds.log import get_logger
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import ReplyHooks, whole_words
from spt_ds.model.decode import choose_prompts
from spt_ds.model.logits import constraints, sampling
from spt_ds.model.running import Row, RunningRows
from spt_ds.serve.answers import (
    Answer,
    Chosen,
    Item,
    Meters,
    busy,
    failed,
    stopping,
    too_late,
)
from spt_ds.serve.ask import Ask, Refused, Rules

READ_AT_ONCE = 8192  # tokens of beginnings between two steps: those who wait for a step wait for it


@dataclass(frozen=True)
class Limits:
    """What one server does at once."""

    rows: int  # replies that grow together
    queue: int  # requests that wait
    seconds: float  # of one request


@dataclass(eq=False)
class _Job:
    """A request that was admitted. The thread writes it, the event loop reads it."""

    ask: Ask
    batch: Batch
    dropped: int
    text: ReplyText
    number: int
    deadline: float
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: Event = field(default_factory=Event)  # its caller went away
    chosen: Chosen | None = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    done: bool = False
    failure: Exception | None = None

    @property
    def alone(self) -> bool:
        """Whether its rows cannot share a step with those of others."""
        return self.ask.options.reads_every_prompt or self.ask.options.num_beams > 1

    async def news(self) -> None:
        """Wait until there are more tokens; raise what ended the reply early."""
        await self.changed.wait()
        self.changed.clear()
        if self.failure:
            raise self.failure

    def answer(self) -> Answer:
        """What is known at the end."""
        assert self.chosen is not None
        finish = "stop" if self.ended else "length"
        text = self.text.of_tokens(self.tokens)[1]
        counts = (len(self.batch.context_ids), len(self.tokens))
        return Answer(text, self.chosen.prompt, self.chosen.scores, *counts, finish, self.dropped)


class _Until(Event):
    """Is set when another event is, or when a time has come."""

    def __init__(self, other: Event, deadline: float) -> None:
        super().__init__()
        self._other, self._deadline = other, deadline

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._other.is_set() or time.monotonic() > self._deadline


class Batcher:
    """See `Answers`."""

    def __init__(self, session: Session, rules: Rules, limits: Limits, meters: Meters) -> None:
        self.rules = rules
        self._session, self._limits, self._meters = session, limits, meters
        window, style = session.config.data.max_tokens, context_style(session)
        self._contexts = Contexts(session.tokenizer, window, style)
        self._form = ReplyText.of(session)
        # One thread: a tokenizer's cache of pieces is no shared thing.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._news = Condition()
        self._waiting: deque[_Job] = deque()
        self._running: dict[Row, _Job] = {}
        self._rows = RunningRows()
        self._admitted, self._closed = 0, False
        self._mean_seconds = 1.0  # of the last replies, for Retry-After
        self._thread = Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        """Begin, inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """End what still runs."""
        with self._news:
            self._closed = True
            self._news.notify()
        await asyncio.to_thread(self._thread.join)
        self._encoding.shutdown()

    async def answer(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """See `Answers`."""
        began = time.monotonic()
        job = await self._admit(ask)
        try:
            await job.news()
            assert job.chosen is not None
            yield job.chosen
            spoken = 0
            while not job.done:
                await job.news()
                if ask.stream:
                    text = job.text.so_far(whole_words(self._decoded(job.tokens)))
                    if len(text) > spoken:
                        yield text[spoken:]
                        spoken = len(text)
            if job.failure:  # it came while a piece was on its way
                raise job.failure
            answer = job.answer()
            if ask.stream and answer.text[spoken:]:
                yield answer.text[spoken:]
            yield answer
            self._mean_seconds += 0.1 * (time.monotonic() - began - self._mean_seconds)
        finally:
            job.stopped.set()
            with self._news:
                if job in self._waiting:
                    self._waiting.remove(job)
                self._count()

    def _decoded(self, tokens: list[int]) -> str:
        # A copy: the thread adds to the list.
        return str(self._session.tokenizer.decode(list(tokens), skip_special_tokens=True))

    async def _admit(self, ask: Ask) -> _Job:
        """Tokenise a request and put it into the queue; raise Refused."""
        deadline = time.monotonic() + self._limits.seconds
        self._refuse_if_full()
        self._admitted += 1
        number = self._admitted
        reserved = ask.options.max_new_tokens
        encode = partial(self._contexts.batch, ask.persona, ask.history, reserved, number)
        try:
            batch, dropped = await self._loop.run_in_executor(self._encoding, encode)
        except SptError as error:
            raise Refused(str(error), param="messages", code="context_length_exceeded") from error
        text = replace(self._form, stop=ask.options.stop)
        with self._news:
            self._refuse_if_full()
            job = _Job(ask, batch, dropped, text, number, deadline)
            self._waiting.append(job)
            self._count()
            self._news.notify()
        return job

    def _refuse_if_full(self) -> None:
        waiting = len(self._waiting)
        if waiting >= self._limits.queue:
            rounds = 1 + waiting / self._limits.rows
            raise busy(waiting, max(1, round(rounds * self._mean_seconds)))

    def _count(self) -> None:
        self._meters.waiting.set(len(self._waiting))
        self._meters.running.set(len(self._running))

    # Everything below runs in the thread.

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._running or self._waiting)
                if self._closed:
                    break
                taken = self._take()
            known = [*self._running.values(), *taken]
            try:
                with torch.no_grad():
                    changed = self._session.backbone(self._turn, taken)
            except Exception:  # out of memory, or a fault of ours: the server lives on
                get_logger().exception("decoding failed; the replies under way are given up")
                self._give_up(known, failed())
                changed = known
                self._rows, self._running = RunningRows(), {}
            self._count()
            self._tell(changed)
        self._tell(self._give_up([*self._running.values(), *self._waiting], stopping()))

    def _take(self) -> list[_Job]:
        """Those who get a place now: they are read together, so their number is bounded."""
        taken: list[_Job] = []
        longest, now = 0, time.monotonic()
        while self._waiting and len(self._running) + len(taken) < self._limits.rows:
            job = self._waiting[0]
            longest = max(longest, len(job.batch.context_ids))
            if taken and (longest * (len(taken) + 1) > READ_AT_ONCE or job.alone):
                break
            taken.append(self._waiting.popleft())
            if job.alone:
                break
        late = [job for job in self._waiting if job.deadline < now]
        for job in late:
            self._waiting.remove(job)
        return taken + late

    def _turn(self, backbone: Backbone, taken: Sequence[_Job]) -> list[_Job]:
        """Let go of rows, take in new ones, and give each its next token; return whose changed."""
        now = time.monotonic()
        left = [job for job in (*self._running.values(), *taken) if job.stopped.is_set()]
        late = [job for job in (*self._running.values(), *taken) if job.deadline < now]
        changed = self._give_up(late, too_late(self._limits.seconds))
        gone = {*left, *late}
        self._running = {row: job for row, job in self._running.items() if job not in gone}
        self._rows.keep(self._running.__contains__)
        if self._running:
            self._rows.step(backbone)
            self._meters.steps.inc()
        fresh = [job for job in taken if job not in gone]
        rows: dict[Row, _Job] = {}
        for job in fresh:
            try:
                if job.alone:
                    self._decode_alone(job)
                else:
                    rows[self._row(backbone, job)] = job
            except SptError as error:
                self._give_up([job], Refused(str(error)))
        if rows:
            self._rows.join(backbone, list(rows))
            self._running |= rows
        for row, job in list(self._running.items()):
            if row.done:
                self._finished(job, row.ended)
                del self._running[row]
            if job.done or job.ask.stream:
                changed.append(job)
        self._rows.keep(self._running.__contains__)  # a server without work holds no memory
        return [*changed, *fresh]

    def _row(self, backbone: Backbone, job: _Job) -> Row:
        """Choose the prompt and lay out context and prompt, as `decode` does for one example."""
        spt, options, batch = self._session.spt, job.ask.options, job.batch
        # One context at a time: the scores are those of Bot.reply to the last bit.
        text, _, scores = spt.score(backbone, spt.pack(batch))
        prompt = choose_prompts(options.mode, scores, self._keys(job), spt.config.train.seed)[0]
        job.chosen = Chosen(prompt, tuple(scores[:, 0].tolist()))
        head = batch.before_prompt(spt.suffix)[0]
        virtual = spt.trainables.bank.weight[prompt].to(text.dtype)
        endings = job.text.endings
        others = options.model_copy(update={"min_new_tokens": 0})  # that one is the row's own
        processors = [
            *constraints(others, endings.ids, text.device),
            *sampling(options, [self._keys(job)], spt.config.train.seed),
        ]
        beginning = torch.cat([text[:head], virtual, text[head:]])
        lengths = options.max_new_tokens, options.min_new_tokens
        return Row(beginning, endings, *lengths, processors, job.tokens)

    def _keys(self, job: _Job) -> tuple[int, ...]:
        return (job.number if job.ask.seed is None else job.ask.seed,)

    def _decode_alone(self, job: _Job) -> None:
        session = replace(
            self._session,
            config=self._session.config.model_copy(update={"generate": job.ask.options}),
        )
        batch = replace(job.batch, indices=self._keys(job))
        hooks = ReplyHooks(stopped=_Until(job.stopped, job.deadline))
        out = decode_batch(session, batch, job.ask.options, hooks)
        if time.monotonic() > job.deadline:
            self._give_up([job], too_late(self._limits.seconds))
            return
        job.tokens = out.tokens[0]
        job.chosen = Chosen(out.chosen[0], tuple(out.scores[:, 0].tolist()))
        self._finished(job, job.text.endings.reached(job.tokens))

    def _finished(self, job: _Job, ended: bool) -> None:
        assert job.chosen is not None
        # `done` last: the event loop may look at any time.
        job.ended, job.done = ended, True
        prompt = "all" if job.chosen.prompt is None else str(job.chosen.prompt)
        self._meters.replies.labels(prompt).inc()
        self._meters.tokens.inc(len(job.tokens))

    def _give_up(self, jobs: Sequence[_Job], why: Refused) -> list[_Job]:
        given_up = [job for job in jobs if not job.done]
        for job in given_up:
            job.failure, job.done = why, True
        return given_up

    def _tell(self, jobs: Sequence[_Job]) -> None:
        """Wake those who wait for these: one call of the event loop for all of them."""

        def wake() -> None:
            for job in jobs:
                job.changed.set()

        if jobs:
            self._loop.call_soon_threadsafe(wake)
