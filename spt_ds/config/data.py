"""Options of the dialogues and how they become tokens."""

from __future__ import annotations

from typing import Literal

from spt_ds.config.section import NonNegativeInt, PositiveInt, Section


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
