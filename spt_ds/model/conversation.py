"""What a conversation adds to decoding: a context that is read once, tokens as they come, a stop in
between.

In suffix placement the context stands before the prompt, so its keys and values hold whichever
prompt answers; from turn to turn a context only grows, because the last one ends where the reply
begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Event
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class ContextCache:
    """Keys and values of the context that was read last, [1, heads, tokens, head size] per layer,
    and its ids.
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
        """Lend the cache cut to what it shares with the context `ids`; when decoding is done, cut
        it to `ids`.

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


class StopOn(StoppingCriteria):
    """Ends decoding within a token after `event` was set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class Live:
    """One reply of a conversation."""

    context: ContextCache | None = None  # for one row in suffix placement, without beams or fusion
    streamer: BaseStreamer | None = None  # gets each token; not with beams
    stopped: Event = field(default_factory=Event)  # set by another thread to end the reply early
