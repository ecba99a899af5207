"""Ids of text between special tokens, as if all of it were tokenised at once. No torch.

A tokenizer first splits a text at its special tokens, so each stretch between two of them has ids
of its own, and stretches that examples share are tokenised once. Special tokens that somebody typed
are to stay text: the tokenizer is told to split special tokens, and those of a template are written
as stand-ins, ordinary added tokens that it does not split. A stand-in strips the blanks around it
as its original does.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from spt_ds.data.pieces import Pieces, plain_ids

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase


class Item(NamedTuple):
    """A stretch of text, or a special token."""

    text: str
    special: bool


PROMPT = Item("", True)  # the soft prompt: it splits text as a special token does, and has no id


class Stretches:
    """Tokenises items with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = _special_tokens(tokenizer)
        # Nobody can type a stand-in: it has a part that is drawn when the process starts. The parts
        # around it never become characters.
        secret = secrets.token_hex(8)
        self._stand_in = {
            token: f"\ufdd4{secret}-{number}\ufdd5" for number, token in enumerate([*added, ""])
        }
        ids: Any = tokenizer.convert_tokens_to_ids(list(added))
        self._id_of = dict(zip(added, ids, strict=True))
        # A copy, because the stand-ins must not get into the tokenizer that the run decodes with.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.add_tokens(
            [_ordinary(self._stand_in[token], original) for token, original in added.items()]
            + [_ordinary(self._stand_in[""], None)]
        )
        self._pieces = Pieces(lambda texts: plain_ids(self._tokenizer, texts))

    @property
    def specials(self) -> list[str]:
        """The tokenizer's special tokens, as they are written."""
        return list(self._id_of)

    def id_of(self, token: str) -> int:
        """Return the id of a special token."""
        return self._id_of[token]

    def learn(self, rows: Iterable[Sequence[Item]]) -> None:
        """Tokenise the stretches of the coming rows in one call, and forget those of the last."""
        self._pieces.learn(
            self._between(items, place)
            for items in rows
            for place, item in enumerate(items)
            if not item.special
        )

    def ids(self, items: Sequence[Item]) -> tuple[list[int], int]:
        """Return the ids of a row of items, and how many stand before the soft prompt (else 0)."""
        ids: list[int] = []
        prompt_at = 0
        for place, item in enumerate(items):
            if item == PROMPT:
                prompt_at = len(ids)
            elif item.special:
                ids.append(self._id_of[item.text])
            else:
                found = self._pieces[self._between(items, place)]
                ids += found[place > 0 : len(found) - (place < len(items) - 1)]
        return ids, prompt_at

    def _between(self, items: Sequence[Item], place: int) -> str:
        """The stretch at `place` between the stand-ins of its neighbours, which give an id each."""
        before = self._stand_in[items[place - 1].text] if place else ""
        after = self._stand_in[items[place + 1].text] if place < len(items) - 1 else ""
        return f"{before}{items[place].text}{after}"


def joined(items: Iterable[Item]) -> list[Item]:
    """Make one stretch of neighbours that are text; what is empty is left out."""
    row: list[Item] = []
    for item in items:
        if not item.special and row and not row[-1].special:
            row[-1] = Item(row[-1].text + item.text, False)
        elif item.special or item.text:
            row.append(item)
    return row


def last_stretch(items: Sequence[Item]) -> list[Item]:
    """The end of a row, from its last special token on."""
    start = max((place for place, item in enumerate(items) if item.special), default=0)
    return list(items[start:])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, AddedToken | None]:
    """The special tokens of a tokenizer, with what it knows of how they are split off."""
    added = {
        token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    return {**dict.fromkeys(tokenizer.all_special_tokens), **added}


def _ordinary(text: str, original: AddedToken | None) -> AddedToken:
    """An added token that is not special and splits text as `original` does."""
    from transformers import AddedToken

    names = ("lstrip", "rstrip", "normalized", "single_word")
    as_original = {name: getattr(original, name) for name in names if original is not None}
    return AddedToken(text, special=False, **{"normalized": False, **as_original})
