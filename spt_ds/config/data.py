"""Options of the dialogues and how they become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from spt_ds.config.section import NonNegativeInt, PositiveInt, Section

Value = bool | int | float | str


class DataConfig(Section):
    """Dialogues and how they become tokens."""

    train: str = "embedded:train"
    """File, `embedded:train`, or `hub:NAME[:CONFIG][:SPLIT]`."""
    valid: str = "embedded:valid"
    """The same for validation loss."""
    test: str = "embedded:test"
    """The same for generation and scores."""
    format: Literal["auto", "parlai", "spc_csv", "jsonl"] = "auto"
    """File format; auto looks at suffix and first line."""
    max_tokens: PositiveInt = 512
    """Longest context plus response in tokens, without virtual tokens; the oldest turns are dropped
    to fit.
    """
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
    """Use only the first n training examples; 0 uses all."""
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
