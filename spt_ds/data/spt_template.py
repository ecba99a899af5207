"""The method's own template. No torch.

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

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spt_ds.data.dialogue import Example
from spt_ds.data.pieces import Pieces, plain_ids
from spt_ds.data.template import Context, TemplateStyle
from spt_ds.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "R:"


class SptTemplate:
    """See `Template`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: TemplateStyle) -> None:
        self._tokenizer = tokenizer
        self._at_end = style.position == "before_reply"
        self._anchor = plain_ids(tokenizer, [_ANCHOR])[0]
        self._pieces = Pieces(self._after_anchor)
        # The text's beginning follows nothing and is tokenised as it is.
        self._heads = Pieces(lambda texts: plain_ids(tokenizer, texts))
        self._bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self.ends: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        self.closing: tuple[int, ...] = ()
        self.begins_with_bos = bool(self._bos)
        self._partner, self._owner = self._after_anchor([" Q:", " R:"])

    def learn(self, examples: Sequence[Example], persona: bool) -> None:
        """Tokenise what the coming examples need in one call."""
        self._pieces.learn(
            _piece(text) for example in examples for text in (*example.history, example.response)
        )
        self._heads.learn(_head(example.persona if persona else ()) for example in examples)

    def context(self, persona: tuple[str, ...], history: tuple[str, ...]) -> Context:
        """Ids of persona and turns, up to the last "R:"."""
        ids = [*self._bos, *self._heads[_head(persona)]]
        for number, text in enumerate(history):
            ids += self._partner if (len(history) - number) % 2 else self._owner
            ids += self._pieces[_piece(text)]
        ids += self._owner
        return Context(ids, len(ids) if self._at_end else 0)

    def response(self, persona: tuple[str, ...], history: tuple[str, ...], text: str) -> list[int]:
        """Ids of the reply, and EOS."""
        return [*self._pieces[_piece(text)], self.ends[0]]

    def system(self, text: str) -> list[int]:
        """Ids of a text where the persona is, with the words before it, without BOS."""
        return self._heads[f"given persona: {text.strip()}"]

    def droppable(self, turns: int) -> Sequence[int]:
        """Any number of turns: a dialogue may begin with either speaker."""
        return range(turns + 1)

    def _after_anchor(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, which begins with a blank, where it follows "R:"."""
        # A tokenizer may treat the beginning of a text in its own way (SentencePiece puts a blank
        # before it). No piece is a beginning here, so each is tokenised behind an anchor.
        rows = plain_ids(self._tokenizer, [_ANCHOR + text for text in texts])
        size = len(self._anchor)
        for text, row in zip(texts, rows, strict=True):
            if row[:size] != self._anchor:
                raise ModelError(
                    f"the tokenizer joins {_ANCHOR!r} with what follows it in"
                    f" {_ANCHOR + text[:40]!r}; contexts would differ between training and"
                    " generation: use a tokenizer that splits at blanks"
                )
        return [row[size:] for row in rows]


def _head(persona: tuple[str, ...]) -> str:
    return f"given persona: {' '.join(persona)}; context:" if persona else "context:"


def _piece(text: str) -> str:
    return " " + text.strip()
