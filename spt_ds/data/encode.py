"""Text to token ids: a template, its spans, truncation by whole turns. No torch."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from spt_ds.data.dialogue import Example
from spt_ds.data.overflow import Cutter, Overflow
from spt_ds.data.template import SPT, Context, TemplateStyle, make_template
from spt_ds.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_VERSION = 1  # part of every cache key: raise it when the same text is to give other ids
_CHUNK = 512  # examples whose texts go to the tokenizer in one call
_LETTERS = 16  # characters a token of the window: what is longer is not tokenised ahead


@dataclass(frozen=True)
class ContextStyle:
    """What the model is shown beside the dialogue itself, and in which template."""

    persona: bool = True  # False leaves it out
    shots: tuple[int, ...] = ()  # ids of worked examples, which stand between BOS and each context
    template: TemplateStyle = SPT
    overflow: Overflow = "error"


PLAIN = ContextStyle()


@dataclass(frozen=True)
class Encoded:
    """Ids of one example: C context tokens, up to where the reply begins, and R response tokens."""

    context_ids: list[int]  # [C]
    response_ids: list[int]  # [R], the end last; empty when only a context was asked for
    dropped_turns: int  # oldest turns left out to fit
    prompt_at: int = 0  # context tokens before the soft prompt
    persona: tuple[str, ...] = ()  # what was left of it, if it is shown at all
    cut: bool = False  # whether persona or last turn were cut to fit
    choice_ids: tuple[list[int], ...] = ()  # of each answer to choose among, as `response_ids`


class TooLong(DataError):
    """Persona, last turn and reply do not fit into the window."""


def encode_context(
    persona: Sequence[str],
    history: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    reserved: int = 0,
    style: ContextStyle = PLAIN,
) -> Encoded:
    """Encode what precedes a reply that is to be generated, as training would encode it.

    `reserved` tokens of the window are left for the reply.
    """
    return Encoder(tokenizer, max_tokens, style).context(
        "dialogue", tuple(persona), tuple(history), reserved
    )


def encode_many(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    style: ContextStyle = PLAIN,
    reserved: int | None = None,
) -> Iterator[tuple[Example, Encoded]]:
    """Encode a stream in order.

    Texts that neighbours share (the turns of a dialogue) are tokenised once. A context leaves room
    for its response or, where replies are to be generated, for `reserved` tokens: how much of a
    context is read must then not depend on the response, which nobody knows.
    """
    return Encoder(tokenizer, max_tokens, style).stream(examples, reserved)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 (hex) of everything in the tokenizer that ids depend on."""
    # Only a fast tokenizer can print its rules; of others class and vocabulary are compared.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    parts = [type(tokenizer).__name__, rules, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Encoder:
    """Template and window of one stream."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, style: ContextStyle = PLAIN
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, but a reply ends with one; set its eos_token"
            )
        self.max_tokens = max_tokens
        self.left_out = 0  # examples that `stream` dropped
        self._style = style
        self.template = make_template(tokenizer, style.template)
        self._cutter = Cutter(
            tokenizer,
            lambda persona, history: len(self.template.context(persona, history).ids),
            retrieve=style.overflow == "retrieve",
        )

    def stream(
        self, examples: Iterable[Example], reserved: int | None = None
    ) -> Iterator[tuple[Example, Encoded]]:
        """Encode a stream as `encode_many` does; `data.overflow: drop` leaves examples out."""
        stream = iter(examples)
        while chunk := list(islice(stream, _CHUNK)):
            self.learn(chunk)
            for example in chunk:
                try:
                    encoded = self.example(example, reserved)
                except TooLong:
                    if self._style.overflow != "drop":
                        raise
                    self.left_out += 1
                    continue
                yield example, encoded

    def learn(self, examples: Sequence[Example]) -> None:
        """Tokenise the texts of the coming chunk and forget those of the last one."""
        if self._style.overflow != "error":
            most = _LETTERS * self.max_tokens
            examples = [e for e in examples if sum(map(len, (*e.persona, *e.history))) < most]
        self.template.learn(examples, self._style.persona)

    def example(self, example: Example, reserved: int | None = None) -> Encoded:
        """Encode context and response; the context leaves room for it, or `reserved` tokens."""
        persona = self._shown(example.persona)
        response = self.template.response(persona, example.history, example.response)
        room = len(response) if reserved is None else reserved
        context = self.context(example.id, example.persona, example.history, room)
        kept = context.persona if self._style.persona else example.persona
        # Training reads the reply alone.
        choices = example.choices if reserved is not None else ()
        of_choices = tuple(
            self.template.response(persona, example.history, choice) for choice in choices
        )
        return replace(context, response_ids=response, persona=kept, choice_ids=of_choices)

    def context(
        self, name: str, persona: tuple[str, ...], history: tuple[str, ...], reserved: int
    ) -> Encoded:
        """Encode a context that leaves `reserved` tokens; its oldest turns are dropped to fit."""
        persona = self._shown(persona)
        room = self.max_tokens - reserved - len(self._style.shots)
        cut = False
        if self._style.overflow != "error":
            cut = self._cutter.overflows(persona, history, room)
            if cut and self._style.overflow == "drop":
                raise TooLong(
                    f"{name}: persona, last turn and response take more than {self.max_tokens}"
                    " tokens; shorten them, raise data.max_tokens, or set data.overflow to truncate"
                    " or retrieve"
                )
            if cut:
                persona, history = self._cutter.cut(persona, history, room)

        def without(dropped: int) -> Context:
            return self.template.context(persona, history[dropped:])

        context, dropped = without(0), 0
        if len(context.ids) > room:
            # Each turn less is shorter, so the fewest are found by halving.
            choices = self.template.droppable(len(history))
            best = bisect_left(choices, True, key=lambda dropped: len(without(dropped).ids) <= room)
            dropped = choices[min(best, len(choices) - 1)]
            context = without(dropped)
        if len(context.ids) > room:
            raise self._too_long(name, len(context.ids) + len(self._style.shots), reserved)
        # Worked examples follow BOS, so that there is one BOS and a text begins as in training.
        start = int(self.template.begins_with_bos)
        ids = [*context.ids[:start], *self._style.shots, *context.ids[start:]]
        at = context.prompt_at + (len(self._style.shots) if context.prompt_at > start else 0)
        return Encoded(ids, [], dropped, at, persona, cut)

    def _shown(self, persona: tuple[str, ...]) -> tuple[str, ...]:
        return persona if self._style.persona else ()

    def _too_long(self, name: str, context: int, reserved: int) -> TooLong:
        shots = len(self._style.shots)
        worked = f", {shots} of it the worked examples of data.few_shot" if shots else ""
        return TooLong(
            f"{name}: persona and response take {context + reserved} tokens (context"
            f" {context}{worked}, response {reserved}), allowed are"
            f" {self.max_tokens}; they are not cut: raise"
            f" data.max_tokens{', lower data.few_shot' if shots else ''}, shorten the example, or"
            " set data.overflow to truncate, drop or retrieve"
        )
