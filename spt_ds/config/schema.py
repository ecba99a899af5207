"""The schema of the YAML file: its sections, and the checks across them. No torch is imported.

Unknown keys are refused and every field says its unit. Field docstrings become the descriptions
of `spt-ds config --schema`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from spt_ds.config.data import DataConfig
from spt_ds.config.generation import GenerateConfig
from spt_ds.config.method import (
    TRAIN_THE_BASE,
    LossConfig,
    MethodConfig,
    PromptsConfig,
    ReferenceConfig,
    RetrieverConfig,
)
from spt_ds.config.model import ModelConfig
from spt_ds.config.section import FolderName, Section
from spt_ds.config.training import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)


class Config(Section):
    """One run."""

    name: FolderName = "run"
    """Name of the run; the run folder starts with it."""
    init: Annotated[str, Field(pattern=r"^(run:.+)?$")] = ""
    """`run:FOLDER` begins with bank and retriever of the best checkpoint of another run."""
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    prompts: PromptsConfig = PromptsConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    losses: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    generate: GenerateConfig = GenerateConfig()

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.losses.train_top_m > self.prompts.count:
            raise ValueError(
                f"losses.train_top_m is {self.losses.train_top_m}, the bank has prompts.count ="
                f" {self.prompts.count}; give 0 (all) to prompts.count"
            )
        if self.init and self.prompts.warm_start_steps:
            raise ValueError(
                f"init is {self.init}, and prompts.warm_start_steps begins with one prompt for all;"
                " leave one of them out"
            )
        if self.reference.unit_normal_prompts and self.prompts.init != "vocab":
            raise ValueError(
                f"prompts.init is {self.prompts.init}, but reference.unit_normal_prompts draws the"
                " prompts from N(0, 1); leave one of them out"
            )
        kind, _, number = self.generate.mode.partition(":")
        if kind == "fixed" and int(number) >= self.prompts.count:
            raise ValueError(
                f"generate.mode is {self.generate.mode}, prompts run from 0 to"
                f" {self.prompts.count - 1}"
            )
        if self.data.template == "spt" and self.prompts.position in ("system", "last_turn"):
            raise ValueError(
                f"prompts.position is {self.prompts.position}, a place in a chat template, and"
                " data.template is spt; set data.template: chat, or prompts.position:"
                " before_text or before_reply"
            )
        return self

    @model_validator(mode="after")
    def _method(self) -> Config:
        kind = self.method.type
        if self.data.few_shot and kind != "none":
            raise ValueError(
                f"data.few_shot is {self.data.few_shot} and method.type {kind}: worked examples"
                " replace training; set method.type: none, or data.few_shot: 0"
            )
        if kind == "spt":
            if not self.prompts.tokens:
                raise ValueError(
                    "prompts.tokens is 0, but method.type: spt trains soft prompts; give 1 or more,"
                    " or another method.type (lora, full, none)"
                )
            return self
        needed: dict[str, tuple[object, object]] = {
            "prompts.count": (self.prompts.count, 1),
            "prompts.tokens": (self.prompts.tokens, 0),
            "prompts.position": (self.prompts.position, "before_text"),
            "prompts.warm_start_steps": (self.prompts.warm_start_steps, 0),
            "losses.selection": (self.losses.selection, 0),
            "losses.fusion": (self.losses.fusion, 0),
            "losses.contrastive": (self.losses.contrastive, 0),
        }
        wrong = [f"{key}: {want} (got {got})" for key, (got, want) in needed.items() if got != want]
        if wrong:
            raise ValueError(
                f"method.type: {kind} has no soft prompts to choose from; set {', '.join(wrong)}"
            )
        if kind in TRAIN_THE_BASE:
            self._trainable_base(kind)
        return self

    def _trainable_base(self, kind: str) -> None:
        # What trains is always fp32. Adapters are so over a base of 16 bits too, a whole base only
        # at 32.
        allowed = {"lora": (16, 32), "full": (32,)}[kind]
        if self.model.base_bits not in allowed:
            raise ValueError(
                f"method.type: {kind} trains weights of the base, and model.base_bits is"
                f" {self.model.base_bits}; set model.base_bits: {' or '.join(map(str, allowed))}"
            )
        if self.model.activation_checkpointing == "reentrant":
            raise ValueError(
                f"method.type: {kind} trains weights inside the layers, which"
                " model.activation_checkpointing: reentrant loses; set it to non_reentrant, off or"
                " auto"
            )
        if self.model.base_matmul != "base_bits":
            raise ValueError(
                f"method.type: {kind} trains weights of the base, and model.base_matmul is"
                f" {self.model.base_matmul}, which is for frozen ones; leave it out"
            )
        if self.model.compile == "on":
            raise ValueError(
                f"method.type: {kind} trains weights of the base, and model.compile is on, which is"
                " for frozen ones; set it to auto or off"
            )
        if self.engine.placement not in ("auto", "replicate"):
            raise ValueError(
                f"method.type: {kind} trains weights of the base, which needs all of it on each"
                f" rank, and engine.placement is {self.engine.placement}; set engine.placement:"
                " replicate or auto"
            )
