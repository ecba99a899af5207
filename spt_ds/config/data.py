"""Options of the dialogues and how they become tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from spt_ds.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

Value = bool | int | float | str
Share = Annotated[float, Field(ge=0, le=1)]


Format = Literal["auto", "parlai", "jsonl", "csv", "spc_csv", "lamp", "personamem"]
SPC_COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
# What a record may hold, by the names that readers know; `data.columns` has them as keys.
FIELDS = (
    *("id", "dialogue_id", "turn", "persona", "history", "response", "turns", "first_speaker"),
    *("messages", "prompt", "completion", "choices", *SPC_COLUMNS),
)
_SPLIT = re.compile(r"split:(0?\.\d+)")


def _known(columns: dict[str, str]) -> dict[str, str]:
    if unknown := [name for name in columns if name not in FIELDS]:
        raise ValueError(f"{unknown[0]!r} is no field of an example; allowed are {list(FIELDS)}")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known)]


def _spelled(given: Any) -> Any:
    return str(given) if type(given) in (int, float) else given


# YAML reads the label 4 as a number.
Label = Annotated[str, BeforeValidator(_spelled)]


class Source(Section):
    """One of several sources."""

    path: Annotated[str, Field(min_length=1)]
    """File, `embedded:SPLIT`, or `hub:NAME[:CONFIG][:SPLIT]`."""
    weight: PositiveFloat | None = None
    """Its share of the training examples, relative to the other sources."""
    format: Format | None = None
    """Its file format; `data.format` where it is left out."""
    columns: Columns | None = None
    """Its columns; `data.columns` where they are left out."""


def _kind(value: Any) -> str:
    return "(one)" if isinstance(value, str) else "(several)"


# A tagged union: a fault inside a list names its place in the list, and no other kind's faults.
Sources = Annotated[
    Annotated[str, Tag("(one)")]
    | Annotated[tuple[Source, ...], Tag("(several)"), Field(min_length=1)],
    Discriminator(_kind),
]


def held_out(sources: str | tuple[Source, ...]) -> float:
    """The share of data.train that `split:SHARE` holds out; 0 for any other source."""
    match = _SPLIT.fullmatch(sources) if isinstance(sources, str) else None
    return float(match[1]) if match else 0.0


def names(sources: str | tuple[Source, ...]) -> str:
    """The sources as a message shows them."""
    return sources if isinstance(sources, str) else " + ".join(source.path for source in sources)


class PersonaDropoutConfig(Section):
    """Hides parts of the persona in training, anew each time that an example is read."""

    sentences: Share = 0.0
    """Share of the sentences that are hidden, each by itself."""
    whole: Share = 0.0
    """Share of the examples whose whole persona is hidden."""

    @property
    def active(self) -> bool:
        """Whether anything is hidden."""
        return bool(self.sentences or self.whole)


class DataConfig(Section):
    """Dialogues and how they become tokens."""

    train: Sources = "embedded:train"
    """File, `embedded:train`, `hub:NAME[:CONFIG][:SPLIT]`, or a list of sources, each with `path`
    and, if you like, `weight`, `format` and `columns`.
    """
    valid: Sources = "embedded:valid"
    """The same for validation loss; `split:0.1` holds a tenth of `train` out."""
    test: Sources = "embedded:test"
    """The same for generation and scores."""
    split_by: Literal["dialogue", "persona"] = "dialogue"
    """What `split:` keeps together: a dialogue, or all dialogues with one persona."""
    split_seed: NonNegativeInt = 0
    """Seed by which `split:` draws."""
    format: Format = "auto"
    """File format; auto looks at suffix and first line."""
    columns: Columns = Field(default_factory=dict)
    """Names of your keys or columns by ours, such as `persona: profile`, in JSONL, CSV and hub."""
    choices: tuple[Label, ...] = ()
    """The answers to choose among, such as the labels of a task, for test examples that list none
    of their own (see `generate.choices`).
    """
    max_tokens: PositiveInt = 512
    """Longest context plus response in tokens, without virtual tokens; the oldest turns are dropped
    to fit.
    """
    overflow: Literal["error", "truncate", "drop", "retrieve"] = "error"
    """What happens to an example whose persona, last turn and reply do not fit into max_tokens:
    stop, cut the persona's end, leave the example out, or keep the sentences of the persona that
    are nearest to the last turn by BM25 (extra `retrieve`).
    """
    persona_dropout: PersonaDropoutConfig = PersonaDropoutConfig()
    template: str = "spt"
    """How a dialogue becomes text: `spt`, the paper's; `chat`, the base's own chat template; or a
    Jinja file, whose text the run keeps. Both get messages: persona as system, partner as user,
    owner as assistant.
    """
    instructions: str = ""
    """Text of the system message, with a chat template. The persona follows it, or stands where it
    says {persona}.
    """
    template_variables: dict[str, Value] = Field(default_factory=dict)
    """What a chat template may read, such as `enable_thinking: false`."""
    persona: bool = True
    """Show the persona to the model; false leaves it out of every text, though not out of
    predictions.jsonl.
    """
    few_shot: NonNegativeInt = 0
    """Examples of the training data, drawn by train.seed, that stand before each context of
    validation and test (`method.type: none` only). They take up to half of max_tokens."""
    max_train_examples: NonNegativeInt = 0
    """Use only the first n training examples of each source; 0 uses all."""
    max_valid_examples: NonNegativeInt = 0
    """The same for validation."""
    max_test_examples: NonNegativeInt = 0
    """The same for generation."""
    cache_dir: str | None = None
    """Folder of tokenised data; default $SPT_CACHE, else ~/.cache/spt_ds."""
    workers: NonNegativeInt = 1
    """Data worker processes per rank; 0 prepares windows in the training process."""

    @field_validator("template")
    @classmethod
    def _text(cls, given: str) -> str:
        # The text itself is kept in the configuration: a run does not change with its file.
        if given in ("spt", "chat") or "{{" in given or "{%" in given:
            return given
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{given[:200]!r} is neither spt nor chat, and no Jinja file of that name can be"
                f" read ({why})"
            ) from error
        if "{{" not in text and "{%" not in text:
            raise ValueError(f"{given!r} holds no Jinja template: it has neither {{{{ nor {{%")
        return text

    @field_validator("choices")
    @classmethod
    def _several(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        given = tuple(choice.strip() for choice in given)
        if given and (len(set(given)) < max(2, len(given)) or not all(given)):
            raise ValueError(f"{list(given)}: give two answers or more, none blank and none twice")
        return given

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        if isinstance(self.train, str):
            weights: list[float | None] = []
            if self.train.startswith("split:"):
                raise ValueError(
                    "train is the source that split: divides; give a file, hub: or embedded:"
                )
        else:
            weights = [source.weight for source in self.train]
        if len({weight is None for weight in weights}) > 1:
            raise ValueError("train: give each source a weight, or none of them")
        for name in ("valid", "test"):
            given = getattr(self, name)
            if isinstance(given, str):
                if given.startswith("split:") and not held_out(given):
                    raise ValueError(f"{name} is {given!r}; write split: and a share, as split:0.1")
            elif any(source.weight is not None for source in given):
                raise ValueError(f"{name}: weight is for training; leave it out here")
        if held_out(self.valid) + held_out(self.test) >= 1:
            raise ValueError(f"valid: {self.valid} and test: {self.test} leave nothing to train on")
        if self.persona_dropout.active and not self.persona:
            raise ValueError(
                "persona_dropout hides parts of a persona, and persona: false all of it"
            )
        return self

    @model_validator(mode="after")
    def _chat(self) -> DataConfig:
        if self.template == "spt":
            for name in ("instructions", "template_variables"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} is {value!r}, and template: spt has no place for it; set template:"
                        " chat or a Jinja file, or leave it out"
                    )
        return self
