"""What a chat template writes around the texts of a dialogue, by the dialogue's shape. No torch.

The template is rendered with a sign in the place of each text, and the text is put there
afterwards. So no text can change what the template writes, and where each text begins and ends is
known: nothing is searched for. A frame depends on the number of turns alone, not on their texts.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from spt_ds.data.template import TemplateStyle
from spt_ds.errors import ModelError
from spt_ds.log import say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode promises that these never become characters.
_SIGN = re.compile("\ufdd0(\\d+)\ufdd1|(\ufdd2)")
_BOS_SIGN = "\ufdd3"
SYSTEM, REPLY = 0, 10**9  # numbers of their slots; the turns count from 1
# Some templates write today's date. Ids must be the same on the day of training and ever after.
DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
Message = dict[str, str]


@dataclass(frozen=True)
class Slot:
    """The place of one text."""

    number: int


@dataclass(frozen=True)
class Special:
    """A special token that the template writes."""

    token: str


class Prompt:
    """The place of the soft prompt."""


Part = str | Slot | Special | Prompt


@dataclass(frozen=True)
class Frame:
    """A template's own words around one shape of dialogue."""

    context: tuple[Part, ...]  # up to where the reply begins
    response: tuple[Part, ...]  # from there up to, and without, the token that ends the reply
    end: str  # that token
    after: tuple[Part, ...]  # what the template writes behind it
    padded: bool  # an empty turn of the partner had to open the dialogue


@dataclass(frozen=True)
class _Way:
    """How a dialogue becomes messages that the template takes."""

    folded: bool  # the system text stands at the head of the first turn
    padded: bool  # an empty turn of the partner opens the dialogue


class Frames:
    """The frames of one template over one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, style: TemplateStyle, specials: Sequence[str]
    ) -> None:
        """`specials` are the tokenizer's special tokens as they are written."""
        self._tokenizer = tokenizer
        self._style = style
        self._template = template_text(tokenizer, style)
        # A pattern takes the first alternative that fits: a token that begins another must come
        # after it.
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # On the instance: a cache on the method would keep every instance alive.
        self.frame = lru_cache(maxsize=4096)(self._frame)

    def begins_with_bos(self) -> bool:
        """Whether the template writes the BOS token first."""
        context, _ = self._rendered(True, 1, bos_token=_BOS_SIGN)[:2]
        return context.startswith(_BOS_SIGN)

    def _messages(self, system: str, turns: Sequence[str], way: _Way) -> list[Message]:
        """Return the messages of a dialogue whose last turn is the partner's."""
        turns = list(turns)
        roles = ["user" if (len(turns) - n) % 2 else "assistant" for n in range(len(turns))]
        if way.padded:
            turns, roles = ["", *turns], ["user", *roles]
        if system and way.folded:
            first = roles.index("user")
            turns[first] = "\n\n".join(filter(None, (system, turns[first])))
        given = [("system", system)] if system and not way.folded else []
        every = [*given, *zip(roles, turns, strict=True)]
        return [{"role": role, "content": content} for role, content in every]

    def own_ids(self, system: str, turns: Sequence[str]) -> list[int]:
        """Ids of a dialogue up to where the reply begins, as the tokenizer itself makes them."""
        way = self._rendered(bool(system), len(turns))[2]
        messages = self._messages(system, turns, way)
        ids: Any = self._apply(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)

    def _apply(self, messages: list[Message], **more: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, **{**dict(self._style.variables), **more}
        )

    def _frame(self, system: bool, turns: int) -> Frame:
        """`system`: whether there is a system text."""
        context, whole, way = self._rendered(system, turns)
        if not whole.startswith(context):
            say_once(
                "the template writes a finished reply otherwise than its beginning; a reply is"
                " trained directly behind the beginning, as it is generated"
            )
            reply = whole[whole.rindex(_sign(REPLY)) :]
        else:
            reply = whole[len(context) :]
        before, _, behind = reply.partition(_sign(REPLY))
        # The token that ends the turn is the first special one behind the reply. Where the template
        # writes none a reply ends with the tokenizer's EOS.
        end = self._special.search(behind)
        closing, after = (behind[: end.start()], behind[end.end() :]) if end else ("", "")
        return Frame(
            context=tuple(self._parts(context)),
            response=tuple(self._parts(before + _sign(REPLY) + closing)),
            end=end[0] if end else str(self._tokenizer.eos_token),
            after=tuple(self._parts(after)),
            padded=way.padded,
        )

    def _rendered(self, system: bool, turns: int, **more: Any) -> tuple[str, str, _Way]:
        """Context and whole dialogue, with signs for the texts, in the first way that works."""
        from jinja2 import TemplateError

        marked = self._style.position
        head = ("\ufdd2" if marked == "system" else "") + (_sign(SYSTEM) if system else "")
        texts = [_sign(number + 1) for number in range(turns)]
        if texts and marked == "last_turn":
            texts[-1] += "\ufdd2"
        wanted = {_sign(SYSTEM)} if system else set()
        wanted |= {_sign(number + 1) for number in range(turns)}
        wanted |= {"\ufdd2"} if self._style.marks_prompt else set()
        text, problem = {"tokenize": False, **more}, "it leaves a text out"
        for way in self._ways(bool(head), turns):
            messages = self._messages(head, texts, way)
            answer = {"role": "assistant", "content": _sign(REPLY)}
            if not messages:
                continue
            if way.padded and marked == "last_turn" and not turns:
                messages[-1]["content"] += "\ufdd2"
            try:
                context = self._apply(messages, add_generation_prompt=True, **text)
                whole = self._apply([*messages, answer], add_generation_prompt=False, **text)
            except TemplateError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            # A template may drop a system text or merge turns without an error. The missing sign
            # shows it.
            signs = {match[0] for match in _SIGN.finditer(context)}
            if wanted <= signs and whole.count(_sign(REPLY)) == 1:
                return context, whole, way
        raise ModelError(
            f"data.template: the template cannot write a dialogue of {turns} turn(s)"
            f"{' with a system text' if system else ''} ({problem}); it must write each message"
            " once and whole, the reply last"
        )

    def _ways(self, system: bool, turns: int) -> Iterator[_Way]:
        """The ways in order of preference: as given, with what the template lacks filled in."""
        padded = (False, True) if turns % 2 == 0 else (False,)
        if not turns and self._style.position == "last_turn":
            padded = (True,)
        for opening in padded:
            yield _Way(folded=False, padded=opening)
            if system and (turns or opening):
                yield _Way(folded=True, padded=opening)

    def _parts(self, text: str) -> Iterator[Part]:
        """The template's words, special tokens and places of a rendered text."""
        start = 0
        for match in _SIGN.finditer(text):
            yield from self._words(text[start : match.start()])
            yield Prompt() if match[2] else Slot(int(match[1]))
            start = match.end()
        yield from self._words(text[start:])

    def _words(self, text: str) -> Iterator[Part]:
        start = 0
        for match in self._special.finditer(text):
            if text[start : match.start()]:
                yield text[start : match.start()]
            yield Special(match[0])
            start = match.end()
        if text[start:]:
            yield text[start:]


def template_text(tokenizer: PreTrainedTokenizerBase, style: TemplateStyle) -> str:
    """The Jinja text of a chat template, with DATE where it would write today's."""
    text = style.source
    if text == "chat":
        if tokenizer.chat_template is None:
            raise ModelError(
                "data.template: chat needs a tokenizer with a chat template, and the base's has"
                " none; take an instruct base, data.template: spt, or a Jinja file"
            )
        text = str(tokenizer.get_chat_template())
    return _TODAY.sub(lambda match: repr(DATE.strftime(match[2])), text)


def _sign(number: int) -> str:
    return f"\ufdd0{number}\ufdd1"
