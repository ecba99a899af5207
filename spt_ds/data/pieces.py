"""Token ids of pieces of text, each tokenised once. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST = 50_000  # pieces that are kept where nobody says which ones come next


class Pieces:
    """Ids of texts by the text, so that what neighbouring examples share is tokenised once."""

    def __init__(self, tokenize: Callable[[list[str]], list[list[int]]]) -> None:
        self._tokenize = tokenize
        self._ids: dict[str, list[int]] = {}

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenise the texts of the coming chunk in one call and forget those of the last one."""
        # Neighbours are turns of one dialogue: most pieces of a chunk's end are in the next one
        # too.
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if text not in self._ids]
        known = {text: ids for text, ids in self._ids.items() if text in wanted}
        self._ids = {**known, **dict(zip(missing, self._tokenize(missing), strict=True))}

    def __getitem__(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) >= _MOST:
                self._ids.clear()
            self._ids[text] = self._tokenize([text])[0]
        return self._ids[text]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text; "</s>" typed in a dialogue stays text and is no special token."""
    if not texts:
        return []
    rows = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return [list(row) for row in rows]
