"""Options of the optimizer, the length of a run, and what it leaves on the disk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spt_ds.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Tracker = Literal["auto", "tensorboard", "wandb", "mlflow", "trackio"]


class OptimConfig(Section):
    """AdamW on the bank and the retriever, all in fp32."""

    lr: PositiveFloat = 1e-3
    """Learning rate of the retriever, and of the prompts unless `prompts_lr` is given."""
    prompts_lr: PositiveFloat | None = None
    """Learning rate of the prompt bank."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to 0 at the last step, or constant."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""


class TrainConfig(Section):
    """Length and shape of the run."""

    max_steps: NonNegativeInt = 0
    """Optimizer steps; 0 takes them from `epochs`. With `method.type: none` there are none."""
    epochs: PositiveInt = 1
    """Passes over the training data when `max_steps` is 0."""
    global_batch: PositiveInt = 32
    """Examples per optimizer step over all ranks; the result does not depend on how they are split.
    """
    micro_batch: PositiveInt = 4
    """Examples per forward pass on one rank; each is read under all K prompts."""
    micro_batch_tokens: NonNegativeInt = 0
    """Tokens per forward pass on one rank, those of all K prompts and of shared contexts together;
    above 0 they decide instead of `micro_batch`. A longer example has a pass of its own.
    """
    eval_every_steps: NonNegativeInt = 0
    """Steps between validation losses; 0 evaluates before the first and after the last step only.
    """
    seed: NonNegativeInt = 0
    """Seed of initialisation and data order."""
    max_hours: NonNegativeFloat = 0.0
    """Wall-clock budget in hours; the run saves and stops when it is spent. 0 has no limit."""


class EngineConfig(Section):
    """Where the frozen base lives, and how long ranks wait for one another."""

    placement: Literal["auto", "replicate", "zero3", "zero3_offload"] = "auto"
    """A copy per rank, ZeRO-3 shards, or shards in host memory; auto decides from sizes and memory
    and says why. A DeepSpeed JSON, where one is given, decides instead."""
    collective_timeout_s: PositiveInt = 600
    """Seconds a rank waits in a collective before the run fails."""
    strict: bool = False
    """Make every fallback an error."""


class CheckpointConfig(Section):
    """Saving the trainable state."""

    every_steps: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept; the best one always is."""
    on_save_error: Literal["continue", "stop"] = "stop"
    """What a failed save (disk full) does to the run; the older checkpoints stay either way."""


class LogConfig(Section):
    """What the run writes beside its checkpoints."""

    every_steps: PositiveInt = 10
    """Steps between lines in metrics.jsonl and on the screen."""
    trackers: tuple[Tracker, ...] = ("auto",)
    """Who gets each line too, such as [auto, wandb]; each needs the extra of its name. `auto` is
    TensorBoard where it is installed, and nobody where it is not."""
