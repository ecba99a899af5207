"""Worked examples for few-shot prompting: training examples as training would read them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from spt_ds.data.encode import ContextStyle, Encoder
from spt_ds.data.store import ExampleStore
from spt_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.5  # of the window that all worked examples may take together


def worked_examples(
    train: ExampleStore,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_tokens: int,
    seed: int,
    style: ContextStyle,
) -> tuple[int, ...]:
    """Return the ids of `count` examples of as many dialogues, drawn by `seed`.

    They are context and reply of each in `style`, one after the other. Each may take an equal part
    of SHARE of `max_tokens`: its oldest turns are dropped to fit, and one whose persona and reply
    alone do not fit is passed over. DataError when fewer than `count` fit.
    """
    room = int(max_tokens * SHARE) // count
    ids: list[int] = []
    taken: set[str] = set()
    encoder = Encoder(tokenizer, room, replace(style, overflow="error"))
    # BOS comes once at the very beginning, not before each example.
    bos = int(encoder.template.begins_with_bos)
    # Each is encoded with the BOS that is cut off below, so that token gets room of its own.
    encoder.max_tokens += bos
    # One example of a dialogue: two would show the same persona and mostly the same turns.
    for index in random.Random(seed).sample(range(len(train)), len(train)):
        example = train.example(index)
        if example.dialogue_id in taken:
            continue
        try:
            encoded = encoder.example(example)
        except DataError:  # too long even without its turns
            continue
        ids += encoded.context_ids[bos:] + encoded.response_ids + [*encoder.template.closing]
        taken.add(example.dialogue_id)
        if len(taken) == count:
            return tuple(ids)
    raise DataError(
        f"data.few_shot: of {train.source} {len(taken)} dialogues have an example that fits into"
        f" {room} tokens (half of data.max_tokens: {max_tokens}, over {count}), {count} are needed;"
        " raise data.max_tokens or lower data.few_shot"
    )
