"""Text to token ids: the method's template, its spans, truncation by whole turns. No torch.

    given persona: {sentences}; context: Q: {turn} R: {turn} ... Q: {turn} R: {response}<eos>

with BOS first where the tokenizer has one, and without `given persona: ...; ` where there is no
persona (template of the public SPT reference, arXiv 2406.18187). Q: is the partner, R: the
persona's owner. The context ends with the last "R:"; the response is everything after it, EOS
included, and nothing else is ever a target.

Every piece of text is tokenised once, as the continuation of "R:", and the ids of "R:" are taken
off again. Byte-level and SentencePiece tokenizers both split words at blanks, so the pieces equal
the ids of the whole text; and a context has the same ids whether a response follows or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from spt_ds.data.dialogue import Example
from spt_ds.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_VERSION = 1  # part of every cache key: raise it when the same text is to give other ids
_ANCHOR = "R:"
_CHUNK = 512  # examples whose texts go to the tokenizer in one call


@dataclass(frozen=True)
class ContextStyle:
    """What the model is shown beside the dialogue itself."""

    persona: bool = True  # False leaves it out
    shots: tuple[int, ...] = ()  # ids of worked examples, which stand between BOS and each context


PLAIN = ContextStyle()


@dataclass(frozen=True)
class Encoded:
    """Ids of one example: C context tokens, BOS to the last "R:", and R response tokens."""

    context_ids: list[int]  # [C]
    response_ids: list[int]  # [R], EOS last; empty when only a context was asked for
    dropped_turns: int  # oldest turns left out to fit


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
    stream = iter(examples)
    encoder = Encoder(tokenizer, max_tokens, style)
    while chunk := list(islice(stream, _CHUNK)):
        encoder.learn(text for example in chunk for text in _pieces(example))
        for example in chunk:
            yield example, encoder.example(example, reserved)


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
    """Tokenizer and window of one stream, with the ids of the pieces that its last chunk used."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, style: ContextStyle = PLAIN
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, but a reply ends with one; set its eos_token"
            )
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._style = style
        self._anchor = self._tokenize([_ANCHOR])[0]
        self._ids: dict[str, list[int]] = {}
        self._bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._eos = int(tokenizer.eos_token_id)
        self._partner, self._owner = self._after_anchor([" Q:", " R:"])

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenise the pieces of the coming chunk and forget those of the last one."""
        # Neighbours are turns of one dialogue: most pieces of a chunk's end are in the next one
        # too.
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if text not in self._ids]
        known = {text: ids for text, ids in self._ids.items() if text in wanted}
        self._ids = {**known, **dict(zip(missing, self._after_anchor(missing), strict=True))}

    def example(self, example: Example, reserved: int | None = None) -> Encoded:
        """Encode context and response; the context leaves room for it, or `reserved` tokens."""
        response = [*self._piece(" " + example.response.strip()), self._eos]
        room = len(response) if reserved is None else reserved
        context = self.context(example.id, example.persona, example.history, room)
        return Encoded(context.context_ids, response, context.dropped_turns)

    def context(
        self, name: str, persona: tuple[str, ...], history: tuple[str, ...], reserved: int
    ) -> Encoded:
        """Encode a context that leaves `reserved` tokens; its oldest turns are dropped to fit."""
        # Worked examples follow BOS, so that there is one BOS and a text begins as in training.
        head = [*self._bos, *self._style.shots, *self._head(persona if self._style.persona else ())]
        # The last turn is the partner's, so a turn's speaker follows from its distance to the end.
        turns = [
            [
                *(self._partner if (len(history) - number) % 2 else self._owner),
                *self._piece(" " + text.strip()),
            ]
            for number, text in enumerate(history)
        ]
        fixed = len(head) + len(self._owner) + reserved
        if fixed > self._max_tokens:
            shots = len(self._style.shots)
            worked = f", {shots} of it the worked examples of data.few_shot" if shots else ""
            raise DataError(
                f"{name}: persona and response take {fixed} tokens (context"
                f" {fixed - reserved}{worked}, response {reserved}), allowed are"
                f" {self._max_tokens}; they are never cut: raise"
                f" data.max_tokens{', lower data.few_shot' if shots else ''} or shorten the example"
            )
        total = fixed + sum(map(len, turns))
        dropped = 0
        while total > self._max_tokens:
            total -= len(turns[dropped])
            dropped += 1
        kept = [token for turn in turns[dropped:] for token in turn]
        return Encoded([*head, *kept, *self._owner], [], dropped)

    def _head(self, persona: tuple[str, ...]) -> list[int]:
        """Ids of the text's beginning, which follows nothing and is tokenised as it is."""
        text = _head_text(persona)
        if text not in self._ids:
            self._ids[text] = self._tokenize([text])[0]
        return self._ids[text]

    def _piece(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._after_anchor([text])[0]
        return self._ids[text]

    def _after_anchor(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, which begins with a blank, where it follows "R:"."""
        # A tokenizer may treat the beginning of a text in its own way (SentencePiece puts a blank
        # before it). No piece is a beginning here, so each is tokenised behind an anchor.
        rows = self._tokenize([_ANCHOR + text for text in texts])
        size = len(self._anchor)
        for text, row in zip(texts, rows, strict=True):
            if row[:size] != self._anchor:
                raise ModelError(
                    f"the tokenizer joins {_ANCHOR!r} with what follows it in"
                    f" {_ANCHOR + text[:40]!r}; contexts would differ between training and"
                    " generation: use a tokenizer that splits at blanks"
                )
        return [row[size:] for row in rows]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; "</s>" typed in a dialogue stays text and is no special token."""
        if not texts:
            return []
        rows = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return [list(row) for row in rows]


def _head_text(persona: tuple[str, ...]) -> str:
    return f"given persona: {' '.join(persona)}; context:" if persona else "context:"


def _pieces(example: Example) -> Iterator[str]:
    for text in (*example.history, example.response):
        yield " " + text.strip()
