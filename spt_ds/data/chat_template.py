"""A chat template, the base's own or a Jinja file: persona as system message, partner as user.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spt_ds.data.dialogue import Example
from spt_ds.data.frames import REPLY, SYSTEM, Frame, Frames, Part, Slot, Special
from spt_ds.data.stretches import PROMPT, Item, Stretches, joined, last_stretch
from spt_ds.data.template import Context, TemplateStyle, system_text
from spt_ds.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = ("hi", "hello there", "what do you do?")  # of the dialogues that a template is tried on


class ChatTemplate:
    """See `Template`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: TemplateStyle) -> None:
        """Raises ModelError where the template cannot be followed piece by piece."""
        self._style = style
        self._stretches = Stretches(tokenizer)
        specials = self._stretches.specials
        self._frames = Frames(tokenizer, style, specials)
        # Checked without the place of the prompt: what the tokenizer renders by itself has none.
        _check(Frames(tokenizer, replace(style, position="before_text"), specials), self._stretches)
        self.begins_with_bos = self._frames.begins_with_bos()
        frame = self._frames.frame(True, 1)
        ends = [self._stretches.id_of(frame.end), int(tokenizer.eos_token_id)]
        self.ends = tuple(dict.fromkeys(ends))
        ended = [Item(frame.end, True), *_items(frame.after, {})]
        self.closing = tuple(self._stretches.ids(ended)[0][1:])

    def learn(self, examples: Sequence[Example], persona: bool) -> None:
        """Tokenise what the coming examples need in one call."""
        self._stretches.learn(
            items
            for example in examples
            for items in self._rows(example, example.persona if persona else ())
        )

    def context(self, persona: tuple[str, ...], history: tuple[str, ...]) -> Context:
        """Ids of persona and turns, up to where the reply begins."""
        frame, texts = self._framed(persona, history)
        ids, prompt_at = self._stretches.ids(_items(frame.context, texts))
        places = {"before_text": 0, "before_reply": len(ids)}
        return Context(ids, places.get(self._style.position, prompt_at))

    def response(self, persona: tuple[str, ...], history: tuple[str, ...], text: str) -> list[int]:
        """Ids of the reply and of the token that ends its turn."""
        frame, texts = self._framed(persona, history)
        last, reply = _around_reply(frame, texts, text)
        before, _ = self._stretches.ids(last)
        whole, _ = self._stretches.ids(joined([*last, *reply]))
        # A tokenizer may join the template's last word with the reply's first. A base that
        # generates is shown them apart, so they are apart in training too.
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._stretches.ids([PROMPT, *reply])[0]

    def system(self, text: str) -> list[int]:
        """Ids of a text where the persona is, with the words before it, without BOS."""
        parts = self._frames.frame(True, 1).context
        end = next(n for n, part in enumerate(parts, start=1) if part == Slot(SYSTEM))
        ids, _ = self._stretches.ids(_items(parts[:end], {SYSTEM: text.strip()}))
        return ids[int(self.begins_with_bos) :]

    def droppable(self, turns: int) -> Sequence[int]:
        """Numbers of turns after which the partner opens, where the template insists on that."""
        strict = self._frames.frame(True, 2).padded
        return [n for n in range(turns + 1) if n in (0, turns) or not strict or (turns - n) % 2]

    def _framed(
        self, persona: tuple[str, ...], history: tuple[str, ...]
    ) -> tuple[Frame, dict[int, str]]:
        system = system_text(self._style.instructions, persona)
        texts = {SYSTEM: system, **{n: text.strip() for n, text in enumerate(history, start=1)}}
        return self._frames.frame(bool(system), len(history)), texts

    def _rows(self, example: Example, persona: tuple[str, ...]) -> Iterator[list[Item]]:
        """Everything that `context` and `response` have tokenised."""
        frame, texts = self._framed(persona, example.history)
        last, reply = _around_reply(frame, texts, example.response)
        yield from (_items(frame.context, texts), last, joined([*last, *reply]))


def _items(parts: Sequence[Part], texts: dict[int, str]) -> list[Item]:
    """Put the texts into a frame."""
    items = []
    for part in parts:
        if isinstance(part, Slot):
            items.append(Item(texts[part.number], False))
        elif isinstance(part, Special):
            items.append(Item(part.token, True))
        else:
            items.append(Item(part, False) if isinstance(part, str) else PROMPT)
    return joined(items)


def _around_reply(frame: Frame, texts: dict[int, str], reply: str) -> tuple[list[Item], list[Item]]:
    """The end of the context, from its last special token on, and the reply with its end."""
    items = _items(frame.response, {**texts, REPLY: reply.strip()})
    return last_stretch(_items(frame.context, texts)), [*items, Item(frame.end, True)]


def _check(frames: Frames, stretches: Stretches) -> None:
    """Raise ModelError unless contexts have the ids that the tokenizer gives the whole text."""
    for persona in ("i ski. i teach music.", ""):
        for count in range(1, len(_TURNS) + 1):
            turns = _TURNS[-count:]
            texts = {SYSTEM: persona, **dict(enumerate(turns, start=1))}
            frame = frames.frame(bool(persona), count)
            ours = stretches.ids(_items(frame.context, texts))[0]
            own = frames.own_ids(persona, turns)
            if ours != own:
                place = next(
                    (n for n, (a, b) in enumerate(zip(ours, own, strict=False)) if a != b),
                    min(len(ours), len(own)),
                )
                raise ModelError(
                    f"data.template: token {place} of a dialogue of {count} turn(s) is not the one"
                    " that apply_chat_template gives; the template changes the texts of the"
                    " messages, which it must write as they are"
                )
