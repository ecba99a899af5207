"""What a conversation adds to decoding: a context read once, words as they come, an early stop.

In suffix placement the context stands before the prompt, so its keys and values hold whichever
prompt answers; from turn to turn a context only grows, because the last one ends where the reply
begins.
"""

from __future__ import annotations

import inspect
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# What may still grow with the next token. Chinese, Japanese and Korean signs stand without spaces:
# each of them ends a word.
_UNFINISHED = re.compile(r"[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]*\Z")


class ContextCache:
    """The context that was read last: its ids, and its keys and values in each layer.

    Keys and values are [1, heads, tokens, head size].
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # Without the base's configuration every layer keeps all its tokens, those of a sliding
        # window too: only then can the tokens of a reply be taken off again. The window is in the
        # attention mask.
        self._cache = DynamicCache()
        self._ids: list[int] = []

    @contextmanager
    def reading(self, ids: list[int]) -> Iterator[DynamicCache]:
        """Lend the cache cut to what it shares with `ids`; cut it to `ids` after decoding.

        Decoding leaves prompt and reply behind the context. When it fails, layers of unlike length
        may be left, so everything is forgotten.
        """
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids, strict=False))
        )
        cache = self._cache
        _cut(cache, shared)
        self._forget()
        yield cache
        _cut(cache, len(ids))
        self._cache, self._ids = cache, ids


def _cut(cache: DynamicCache, tokens: int) -> None:
    surplus = int(cache.get_seq_length()) - tokens
    if surplus > 0:
        cache.crop(-surplus)


def cache_argument(lm: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return `cache` under the name that `lm.generate` hands on to its forward."""
    # transformers 5.24 renamed the argument, and warns of the old name for some releases more.
    known = inspect.signature(lm.prepare_inputs_for_generation).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def whole_words(text: str) -> str:
    """A text that still grows, without its last word, to which the next token may add."""
    return _UNFINISHED.sub("", text)


class WholeWords(BaseStreamer):
    """Iterates over the text of a reply while it grows, each time ending behind a whole word.

    transformers' own streamers cut words differently from release to release. `put` is called by
    the thread that decodes, the iteration belongs to another one. The last word does not come: only
    the finished reply tells that it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._texts: SimpleQueue[str | None] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        """Take the next token, [rows]."""
        # The first call brings the ids of the context, of which a row of embeddings has none.
        # Fusion decodes K rows, which hold the same tokens.
        self._tokens += value.flatten()[:1].tolist()
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        self._texts.put(whole_words(text))

    def end(self) -> None:
        """End the iteration."""
        self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts.get, None)


@dataclass(frozen=True)
class Endings:
    """What ends a reply."""

    ids: tuple[int, ...]  # tokens
    pad_id: int  # fills a row whose reply has ended
    said: Callable[[list[int]], bool] | None = None  # whether new tokens hold a text that ends one

    def reached(self, tokens: list[int]) -> bool:
        """Whether the last of the tokens ends the reply, or they hold a text that does."""
        last = tokens[-1:] and tokens[-1] in self.ids
        return bool(last) or (self.said is not None and self.said(tokens))

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the reply, or with which it holds such a text."""
        last = next((place for place, token in enumerate(tokens) if token in self.ids), None)
        tokens = tokens if last is None else tokens[: last + 1]
        if self.said is not None and self.said(tokens):
            said = self.said
            more = bisect_left(range(len(tokens)), True, key=lambda n: said(tokens[: n + 1]))
            tokens = tokens[: more + 1]
        return tokens


class StopAtText(StoppingCriteria):
    """Ends each row whose new tokens hold a text that ends a reply."""

    def __init__(self, said: Callable[[list[int]], bool]) -> None:
        self.said = said

    def __call__(
        self, input_ids: torch.Tensor, logits: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """input_ids [rows, new tokens] -> whether each row is done, [rows]."""
        done = [self.said(row) for row in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)


class StopOn(StoppingCriteria):
    """Ends decoding within a token after `event` was set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(
        self, input_ids: torch.Tensor, logits: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """input_ids [rows, tokens] -> whether each row is done, [rows]."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class ReplyHooks:
    """What a conversation adds to the decoding of one reply."""

    context: ContextCache | None = None  # for one row in suffix placement, without beams or fusion
    streamer: BaseStreamer | None = None  # gets each token; not with beams
    stopped: Event = field(default_factory=Event)  # set by another thread to end the reply early
