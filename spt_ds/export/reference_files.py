"""A checkpoint of the public SPT reference as a run folder of ours.

Its trainer writes DeepSpeed's `mp_rank_00_model_states.pt`, which PyTorch reads without running
code, and pickles its settings beside it, which are not read: the YAML is asked for instead. What
else is in the file are aliases of the frozen base. Legend: K prompts, P virtual tokens, D embedding
size.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, field_validator

from spt_ds.config.load import load_config, load_yaml
from spt_ds.config.schema import Config
from spt_ds.display import shown
from spt_ds.errors import CheckpointError
from spt_ds.export.run_files import write_new, write_run
from spt_ds.log import get_logger

STATES = "mp_rank_00_model_states.pt"
PLACES = ("", "best", "ds_ckpt/best")  # of that file, below what a user names
PROMPT = re.compile(r"models\.(\d{1,4})\.prompt_encoder\.default\.embedding\.weight")
RETRIEVER = {"weight": "prompt_normalizer.weight", "bias": "prompt_normalizer.bias"}
# Of its training alone: the tensors mean the same, the recorded objective differs.
UNLIKE_OURS = (
    *("adding_noise", "annealing_nll", "disable_nll", "only_nll", "selective_loss"),
    *("skip_retrieval", "warmup_steps"),
)


class _PeftSection(BaseModel):
    num_virtual_tokens: PositiveInt


class _ModelSection(BaseModel):
    model_name: str = Field(min_length=1)
    model_type: Literal["selective_pt"]
    load_bit: Literal[16, 32, "bf16"]
    peft_type: Literal["prompt_tuning"]
    K: PositiveInt
    peft_config: _PeftSection
    normalizer: Literal["linear"]
    normalizer_on: list[Literal["prompt", "lm"]]
    score_activation: Literal["softplus"] = "softplus"
    retriever: None = None

    @field_validator("normalizer_on")
    @classmethod
    def _both(cls, given: list[str]) -> list[str]:
        if set(given) != {"prompt", "lm"}:
            raise ValueError(f"got {given}; only a retriever on both sides is known: [prompt, lm]")
        return given


class _TrainingSection(BaseModel, extra="allow"):
    mode: Literal["causal"]
    task_type: Literal["generate_response"] = "generate_response"
    learning_rate: PositiveFloat = 1e-5
    selective_loss_weight: float = 1.0
    contrastive: bool = False
    contrastive_weight: float = 1.0
    contrastive_threshold: float = 0.0
    ensemble: bool = False
    tau_gold: PositiveFloat = 1.0
    tau_sim: PositiveFloat = 1.0
    all_tunable: Literal[False] = False


class _DatasetSection(BaseModel):
    train: str = ""
    valid: str = ""
    max_token_length: PositiveInt = 512
    max_context_turns: int = -1


class Settings(BaseModel):
    """The reference's YAML: what of it has a meaning here. Other keys are left alone."""

    model: _ModelSection
    training: _TrainingSection
    dataset: _DatasetSection = _DatasetSection()


def import_reference(
    source: Path, yaml: Path, out: Path, base: str | None, overrides: Sequence[str]
) -> Config:
    """Make the run folder `out` of the checkpoint in `source` and its YAML.

    `base` replaces the YAML's model_name. Returns the run's configuration. Raises ConfigError for a
    YAML of another method, CheckpointError for tensors that are not those it describes.
    """
    settings = load_yaml(yaml, Settings)
    path = _states(source)
    tensors = _trained(path, _module(path), settings.model)
    config = load_config("reference", [*_options(settings, base), *overrides])
    unlike = [name for name in UNLIKE_OURS if (settings.training.model_extra or {}).get(name)]
    if settings.dataset.max_context_turns != -1:
        unlike.append("max_context_turns")
    if unlike:
        get_logger().warning(
            f"{yaml}: part of that training without a counterpart in config.yaml:"
            f" {', '.join(unlike)}"
        )
    write_new(out, lambda part: write_run(part, config, tensors, 0, None))
    return config


def _options(settings: Settings, base: str | None) -> list[str]:
    """The settings as overrides of the recipe `reference`."""
    model, training, data = settings.model, settings.training, settings.dataset
    options: dict[str, Any] = {
        "name": "imported",
        "model.base_bits": 32 if model.load_bit == 32 else 16,
        # A checkpoint of somebody else does not decide whether pickles are read.
        "model.allow_pickle": False,
        "prompts.count": model.K,
        "prompts.tokens": model.peft_config.num_virtual_tokens,
        "losses.selection": training.selective_loss_weight,
        "losses.fusion": 1.0 if training.ensemble else 0.0,
        "losses.contrastive": training.contrastive_weight if training.contrastive else 0.0,
        "losses.bleu_threshold": training.contrastive_threshold,
        "losses.tau_gold": training.tau_gold,
        "losses.tau_sim": training.tau_sim,
        "reference.pool_length_tokens": data.max_token_length,
        "data.max_tokens": data.max_token_length,
        "optim.lr": training.learning_rate,
    }
    texts = {"model.base": base or model.model_name, "data.train": data.train}
    texts |= {"data.valid": data.valid, "data.test": data.valid}
    options |= {key: text for key, text in texts.items() if text}
    return [f"{key}={json.dumps(value)}" for key, value in options.items()]


def _states(source: Path) -> Path:
    if source.is_file():
        return source
    for place in PLACES:
        if (path := source / place / STATES).is_file():
            return path
    raise CheckpointError(
        f"{source}: no {STATES} in it, nor in {' or '.join(PLACES[1:])}; give the folder that the"
        " reference's trainer wrote, or that file"
    )


def _module(path: Path) -> Mapping[str, Any]:
    """The tensors of the file by name; nothing but tensors and plain data is built."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused in the end
            states = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # over bytes that are no checkpoint, a dozen unrelated classes
        raise CheckpointError(
            f"{path}: no checkpoint of tensors and plain data ({type(error).__name__}); it was not"
            f" run. Give the {STATES} of the reference's trainer"
        ) from error
    module = states.get("module") if isinstance(states, dict) else None
    if not isinstance(module, dict):
        raise CheckpointError(
            f"{path}: holds {shown(type(states).__name__)} without 'module'; give the {STATES} of"
            " the reference's trainer"
        )
    return module


def _trained(
    path: Path, module: Mapping[str, Any], settings: _ModelSection
) -> dict[str, torch.Tensor]:
    """What trains here: bank [K, P, D] and the retriever's one Linear, in fp32."""
    count, tokens = settings.K, settings.peft_config.num_virtual_tokens
    found = {int(match[1]): name for name in module if (match := PROMPT.fullmatch(str(name)))}
    if sorted(found) != list(range(count)):
        raise CheckpointError(
            f"{path}: holds the prompts {shown(sorted(found))}, the YAML has model.K: {count}; give"
            " the YAML of this checkpoint"
        )
    size = (tuple(getattr(module[found[0]], "shape", ())) or (0,))[-1]
    shapes: dict[str, tuple[int, ...]] = {found[k]: (tokens, size) for k in range(count)}
    shapes |= {RETRIEVER["weight"]: (size, size), RETRIEVER["bias"]: (size,)}
    wrong = [
        f"{name} is {_described(module.get(name))}, expected {shape}"
        for name, shape in shapes.items()
        if not _fits(module.get(name), shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {'; '.join(wrong)} of finite floating-point numbers, as the YAML has"
            f" num_virtual_tokens: {tokens}"
        )
    # Views into one buffer of the whole: a copy of each holds its own numbers alone.
    plain = {name: module[name].detach().float().clone() for name in shapes}
    return {
        "bank.weight": torch.stack([plain[found[k]] for k in range(count)]),
        "retriever.context.weight": plain[RETRIEVER["weight"]],
        "retriever.context.bias": plain[RETRIEVER["bias"]],
    }


def _fits(value: object, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and tuple(value.shape) == shape
        and value.is_floating_point()
        and value.layout == torch.strided
        # A view can repeat one number to any size: there are as many as its file holds.
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        and bool(torch.isfinite(value).all())
    )


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return "missing" if value is None else shown(type(value).__name__)
