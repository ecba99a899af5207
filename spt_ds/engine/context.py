"""From persona and history as somebody gives them to the batch of one that is answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from spt_ds.batch import Batch
from spt_ds.data.encode import ContextStyle, Encoder
from spt_ds.display import holds_surrogate, shown
from spt_ds.errors import DataError


class Contexts:
    """Makes the context of a reply, as evaluation makes it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, style: ContextStyle
    ) -> None:
        """Worked examples of `style` are drawn already: once, not for every reply."""
        self._encoder = Encoder(tokenizer, max_tokens, style)

    def batch(
        self, persona: Sequence[str], history: Sequence[str], reserved: int, number: int
    ) -> tuple[Batch, int]:
        """The batch of one context, and how many of the oldest turns do not fit.

        Args: reserved, tokens of the window that the reply may take; number, by which its noise is
        keyed, where any is drawn. Raises DataError where persona and last turn do not fit.
        """
        encoded = self._encoder.context("dialogue", tuple(persona), tuple(history), reserved)
        if history and encoded.dropped_turns == len(history):
            raise DataError(
                f"the last turn does not fit: data.max_tokens is {self._encoder.max_tokens}, of"
                f" which generate.max_new_tokens keeps {reserved} for the reply; shorten the turn"
            )
        ids = encoded.context_ids
        batch = Batch(
            np.array(ids),
            np.zeros(0, dtype=np.int64),
            (len(ids),),
            (0,),
            (number,),
            (1.0,),
            (encoded.prompt_at,),
        )
        return batch, encoded.dropped_turns


def texts(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Check an argument that is to be a list of texts; raise DataError where it is none."""
    if isinstance(given, str):
        raise DataError(
            f"{name}: expected a list of texts, got one text {given[:40]!r}; put it into a list"
        )
    if not isinstance(given, Sequence):
        raise DataError(
            f"{name}: expected a list of texts, got {shown(given)}; give [] where there is none"
        )
    for place, text in enumerate(given):
        if not isinstance(text, str):
            raise DataError(f"{name}[{place}]: expected a text, got {shown(text)}")
        if holds_surrogate(text):
            raise DataError(
                f"{name}[{place}]: {shown(text)} holds half a surrogate pair, which is no"
                " character; decode its bytes as UTF-8"
            )
    return tuple(given)
