"""The plan's head, gradients, quantised bytes and micro-batches against counted ones."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from spt_ds.config.model import ModelConfig
from spt_ds.config.schema import Config
from spt_ds.model.attention import PACKED, Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.head import FrozenHead
from spt_ds.model.quant import QuantLinear
from spt_ds.model.quant_load import load_quantized
from spt_ds.placement.estimate import BaseShape, MicroBatch, needs_of, step_bytes

LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "opt": OPTConfig(
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=128,
        vocab_size=100,
    ),
}
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def shape_of(name: str) -> BaseShape:
    return BaseShape.from_config(BASES[name].to_dict())


def held(seen: profile) -> np.ndarray:
    """Bytes that are alive after each allocation and each release that was seen."""
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = [event for event in events if event.name() == "[memory]"]
    return np.cumsum([event.nbytes() for event in sorted(moves, key=lambda e: e.start_ns())])


def watched() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


@pytest.mark.parametrize("rows", [200, 4000])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_head_needs_one_chunk_of_logits(bits: int, rows: int) -> None:
    """Fewer rows than a chunk, and many chunks."""
    shape = BaseShape.from_config({**BASES["llama"].to_dict(), "vocab_size": 8192})
    weight = torch.zeros(8192, 16, dtype=DTYPES[bits])
    hidden = torch.zeros(rows, 16, dtype=DTYPES[bits], requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    head = FrozenHead(weight, None)
    with watched() as seen:
        head(hidden, targets, chunk_mib=16)
    counted = held(seen).max()
    assert 0.9 * counted <= shape.head_bytes(rows, bits, 16) <= counted


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", BASES)
def test_the_way_back_needs_the_gradients_of_one_layer(name: str, bits: int) -> None:
    lens, tokens = (250,) * 24, 6000
    lm = AutoModelForCausalLM.from_config(
        BASES[name], dtype=DTYPES[bits], attn_implementation=PACKED
    )
    rows = torch.zeros(tokens, 128, dtype=DTYPES[bits], requires_grad=True)
    layout = Layout(lens, torch.arange(250).repeat(24), "sdpa")
    out = Backbone(lm, "sdpa").run(rows, layout)
    slope = torch.ones_like(out)
    with watched() as seen:
        out.backward(slope)
    counted = held(seen).max()
    assert 0.9 * counted <= shape_of(name).slope_bytes(tokens, bits) <= 1.25 * counted


@pytest.mark.parametrize(
    "quant",
    [
        {},
        {"block_size": 256},
        {"double_quant": True},
        {"skip_modules": ("lm_head", "down_proj", "self_attn.k_proj", "layers.0.mlp.up_proj")},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bytes_are_those_that_are_stored(bits: int, quant: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({"base_bits": bits, "random_init": True, "quant": quant})
    lm = load_quantized(config, LlamaConfig(**LLAMA), "", None)
    weights = {id(p): p for p in lm.parameters() if p.dim() == 2 or p.dtype == torch.uint8}
    counted = sum(p.numel() * p.element_size() for p in weights.values())
    assert any(isinstance(module, QuantLinear) for module in lm.modules())
    planned = shape_of("llama").base_bytes(bits, config.quant)
    assert planned == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("position", ["before_text", "before_reply"])
def test_known_micro_batches_go_before_the_options_bound(position: str) -> None:
    config = Config.model_validate({"prompts": {"position": position}, "data": {"max_tokens": 512}})
    bound, known = MicroBatch.bound(config), MicroBatch(4, 600, 60)
    assert bound.examples == config.train.micro_batch
    shape = shape_of("opt")
    needs = needs_of(config, shape, 1, known)
    assert needs.activations == step_bytes(config, shape, recompute=False, batch=known)
    assert needs.activations < needs_of(config, shape, 1).activations


def test_few_kernels_are_kept_unless_the_user_says_otherwise() -> None:
    code = (
        "import os\n"
        "from spt_ds.model.kernel_caches import bound_kernel_caches\n"
        "bound_kernel_caches()\n"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    given = {**os.environ, "LRU_CACHE_CAPACITY": "7"}
    given.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["64", "7"]
