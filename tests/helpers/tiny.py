"""Tiny frozen bases with random weights, random micro-batches and the method on top of them.

The weights are drawn wide enough that attention, positions and every layer matter: with the small
default ranges a broken mask moves a loss by less than a rounding error. Legend: D embedding size, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
)

from spt_ds.batch import Batch, Contrast
from spt_ds.config.legacy import upgrade
from spt_ds.config.schema import Config
from spt_ds.model.attention import PACKED
from spt_ds.model.backbone import Backbone
from spt_ds.model.prompt_bank import PromptBank
from spt_ds.model.reference import functions_of
from spt_ds.model.retriever import Retriever
from spt_ds.model.spt import Spt, Trainables

VOCABULARY = 61
EOS = 2
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 96,
}
# GELU, not OPT's ReLU: signs that bf16 rounding flips at its kink would need a tolerance that sees
# nothing. The golden case has ReLU.
_OPT = {
    **_COMMON,
    "activation_function": "gelu",
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "pad_token_id": 1,
}
_GATED = {
    **_COMMON,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "eos_token_id": EOS,
}
_GEMMA = {**_GATED, "num_key_value_heads": 1, "head_dim": 8}
_GEMMA2 = {
    **_GEMMA,
    "sliding_window": 64,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def tiny_config(arch: str, **overrides: Any) -> PretrainedConfig:
    """Configuration of one tiny base. `opt_project` has D 12 but hidden size 16, `phi` a head with
    bias.
    """
    makers: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "opt": (OPTConfig, _OPT),
        "opt_project": (OPTConfig, {**_OPT, "word_embed_proj_dim": 12}),
        "llama": (LlamaConfig, {**_GATED, "num_key_value_heads": 2}),
        "gemma": (GemmaConfig, _GEMMA),
        "gemma2": (Gemma2Config, _GEMMA2),
        "phi": (PhiConfig, {**_GATED, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    }
    kind, settings = makers[arch]
    merged = {**settings, **overrides}
    return kind(**merged)


def tiny_lm(arch: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """A tiny causal LM with random weights: those of `dtype` are the fp32 ones rounded once."""
    lm = AutoModelForCausalLM.from_config(
        tiny_config(arch, **overrides), attn_implementation=PACKED
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                spread = 0.3 if "embed" in name else 1.0 / math.sqrt(parameter.shape[1])
                parameter.copy_(spread * noise)
            else:
                parameter.add_(
                    0.3 * noise
                )  # biases stand around 0, norm weights around 1 (Gemma's: 0)
    lm.to(dtype).eval()
    if dtype == torch.float64:
        make_precise(lm)
    return lm


class _PreciseNorm(nn.Module):
    """RMS norm in the precision of its input: that of `transformers` computes in fp32 even for
    fp64.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def make_precise(lm: nn.Module) -> None:
    """Replace every RMS norm of `lm`, whose weights are fp64, by one that computes in fp64."""
    for module in list(lm.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                old: Any = child
                offset = 1.0 if kind.startswith("Gemma") else 0.0
                eps = old.eps if hasattr(old, "eps") else old.variance_epsilon
                setattr(module, name, _PreciseNorm(old.weight.detach() + offset, eps))


def tiny_backbone(
    arch: str,
    dtype: torch.dtype = torch.float64,
    backend: str = "sdpa",
    checkpointing: str = "off",
    seed: int = 0,
    **overrides: Any,
) -> Backbone:
    """The tiny base as the method uses it."""
    backbone = Backbone(tiny_lm(arch, dtype, seed, **overrides), backend)
    backbone.checkpoint_activations(checkpointing)
    return backbone


def tiny_config_of_run(**sections: dict[str, Any]) -> Config:
    """A run's configuration: loss weights and temperatures all differ, so that no two can be mixed
    up unseen.
    """
    losses = {"selection": 1.7, "fusion": 1.3, "contrastive": 0.9, "tau_gold": 0.6, "tau_sim": 1.25}
    given = {name: dict(section) for name, section in sections.items()}
    given["losses"] = {**losses, **given.get("losses", {})}
    upgrade(given, overwrite=False)  # tests speak of `placement`
    return Config.model_validate(given)


def tiny_spt(
    backbone: Backbone,
    count: int = 3,
    tokens: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    **sections: dict[str, Any],
) -> Spt:
    """The method over `backbone` with a random bank and retriever in `dtype`."""
    prompts = {"count": count, "tokens": tokens, **sections.pop("prompts", {})}
    config = tiny_config_of_run(prompts=prompts, **sections)
    generator = torch.Generator().manual_seed(seed)
    bank = PromptBank(0.5 * torch.randn(count, tokens, backbone.embed_size, generator=generator))
    functions = functions_of(config.reference, pad_id=1)
    retriever = Retriever(
        backbone.embed_size,
        shared=config.retriever.projections == "shared",
        keys=count if config.retriever.keys == "learned" else 0,
        activation=functions.activation,
        generator=generator,
    )
    return Spt(config, Trainables(bank, retriever).to(dtype), functions)


def make_batch(
    contexts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
) -> Batch:
    """A micro-batch of the given token rows."""
    return Batch(
        torch.cat(list(contexts)).numpy(),
        torch.cat(list(responses)).numpy(),
        tuple(len(c) for c in contexts),
        tuple(len(r) for r in responses),
        tuple(range(len(contexts))),
        tuple(weights) if weights is not None else (1.0,) * len(contexts),
    )


def random_batch(
    lens: Sequence[tuple[int, int]], seed: int = 2, vocabulary: int = VOCABULARY
) -> Batch:
    """Random tokens, (context, response) lengths as given; every response ends with EOS as real
    ones do.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = [torch.randint(3, vocabulary, (c,), generator=generator) for c, _ in lens]
    responses = [torch.randint(3, vocabulary, (r,), generator=generator) for _, r in lens]
    for response in responses:
        response[-1] = EOS
    return make_batch(contexts, responses)


def examples_of(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (context, response) token rows of a micro-batch."""
    contexts = torch.from_numpy(batch.context_ids).split(batch.context_lens)
    responses = torch.from_numpy(batch.response_ids).split(batch.response_lens)
    return list(zip(contexts, responses, strict=True))


def pick(batch: Batch, rows: Sequence[int]) -> Batch:
    """The given examples of a micro-batch, in the given order, with their weights."""
    every = examples_of(batch)
    return make_batch(
        [every[b][0] for b in rows],
        [every[b][1] for b in rows],
        weights=[batch.weights[b] for b in rows],
    )


def all_pairs(size: int, dtype: torch.dtype = torch.float64) -> Contrast:
    """Every pair of `size` examples of rank 0, one in three similar: unequal numbers, so that a
    swap of signs shows.
    """
    pairs = torch.combinations(torch.arange(size))
    targets = torch.where(torch.arange(len(pairs)) % 3 == 0, 1.0, -1.0).to(dtype)
    owner = tuple((0, b) for b in range(size))
    return Contrast(owner, pairs.numpy(), targets.numpy(), len(pairs))
