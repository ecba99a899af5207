"""What a template is: it makes token ids of persona and dialogue, with known spans. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spt_ds.data.dialogue import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Position = Literal["before_text", "system", "last_turn", "before_reply"]
PERSONA = "{persona}"  # in the instructions: where the persona's sentences go


@dataclass(frozen=True)
class TemplateStyle:
    """Which template, and what of it a run's configuration says (see `data` in the schema)."""

    source: str = "spt"  # `spt`, `chat`, or the text of a Jinja template
    instructions: str = ""
    variables: tuple[tuple[str, Any], ...] = ()  # names and values that the template may read
    position: Position = "before_text"  # where the soft prompt stands

    @property
    def marks_prompt(self) -> bool:
        """Whether the soft prompt stands inside the context."""
        return self.position in ("system", "last_turn")


SPT = TemplateStyle()


@dataclass(frozen=True)
class Context:
    """Ids of what precedes a reply."""

    ids: list[int]  # [C]
    prompt_at: int  # ids before the soft prompt


class Template(Protocol):
    """Makes ids of dialogues. A turn's speaker follows from its distance to the end: the last turn
    is the partner's.
    """

    ends: tuple[int, ...]
    """Tokens that end a reply; the first is the one that a reply is trained to end with."""
    closing: tuple[int, ...]
    """Ids that follow a finished reply where another text follows."""
    begins_with_bos: bool
    """Whether each context begins with the tokenizer's BOS token."""

    def learn(self, examples: Sequence[Example], persona: bool) -> None:
        """Tokenise what the coming examples need in one call."""

    def context(self, persona: tuple[str, ...], history: tuple[str, ...]) -> Context:
        """Ids of persona and turns, up to where the reply begins."""

    def response(self, persona: tuple[str, ...], history: tuple[str, ...], text: str) -> list[int]:
        """Ids of the reply to such a context, its end included."""

    def system(self, text: str) -> list[int]:
        """Ids of a text where the persona is, with the words before it, without BOS."""

    def droppable(self, turns: int) -> Sequence[int]:
        """Numbers of oldest turns, rising from 0 to `turns`, without which a dialogue is one."""


def make_template(tokenizer: PreTrainedTokenizerBase, style: TemplateStyle) -> Template:
    """Return the template of `style` over a tokenizer; ModelError where they do not fit."""
    from spt_ds.data.chat_template import ChatTemplate
    from spt_ds.data.spt_template import SptTemplate

    if style.source == "spt":
        return SptTemplate(tokenizer, style)
    return ChatTemplate(tokenizer, style)


def system_text(instructions: str, persona: Iterable[str]) -> str:
    """The text of the system message: instructions and persona, either of which may be empty."""
    text = " ".join(persona)
    if PERSONA in instructions:
        return instructions.replace(PERSONA, text).strip()
    return "\n\n".join(part for part in (instructions.strip(), text) if part)
