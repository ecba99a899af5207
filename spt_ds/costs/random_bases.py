"""Bases of real shape with random weights, and micro-batches of real lengths.

With them costs are measured without downloads.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from spt_ds.batch import Batch
from spt_ds.config.model import ModelConfig
from spt_ds.config.schema import Config
from spt_ds.data.encode import encode_many
from spt_ds.data.readers import read
from spt_ds.model.attention import choose_backend
from spt_ds.model.backbone import Backbone, base_dtype
from spt_ds.model.compiled import compile_layers
from spt_ds.model.fp8 import multiply_in_fp8
from spt_ds.model.loading import load_tokenizer, new_lm
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, build_trainables


def _opt(hidden: int, layers: int, heads: int) -> PretrainedConfig:
    return OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
        vocab_size=50272,
        max_position_embeddings=2048,
        dropout=0.0,
    )


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int = 32000
) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


SAMPLE = 4000  # examples of the data set whose lengths are looked at

SHAPES = {
    "tiny": lambda: _llama(64, 2, 4, 2, 128, 1000),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "llama-7b": lambda: _llama(4096, 32, 32, 32, 11008),
    "llama-70b": lambda: _llama(8192, 80, 64, 8, 28672),
}


def build(
    shape: str | PretrainedConfig, config: Config, device: torch.device
) -> tuple[Backbone, Spt]:
    """A backbone of random weights, of a shape in `SHAPES` or your own, and the method on it.

    With `config.model.base_bits` 4 or 8 each layer is drawn and quantised before the next, so that
    the whole base never exists in 16 bits.
    """
    torch.manual_seed(0)
    dtype = base_dtype(config.model.base_bits)
    name, base = (shape, SHAPES[shape]()) if isinstance(shape, str) else ("random", shape)
    if config.model.base_bits in (4, 8):
        from spt_ds.model.quant_load import load_quantized

        drawn = config.model.model_copy(update={"random_init": True})
        lm: Any = load_quantized(drawn, base, name, None, dtype)
        lm.to(device)  # the weights are there already, the buffers are not
    else:
        with device:
            lm = new_lm(base, dtype)
    backend = choose_backend(config.model.attention, device, dtype, strict=False)
    backbone = Backbone(lm, backend)
    if config.model.base_matmul == "fp8":
        multiply_in_fp8(lm, device)
    backbone.checkpoint_activations(config.model.activation_checkpointing)
    if config.model.compile == "on":
        compile_layers(backbone)
    functions = functions_of(config.reference, pad_id=0)
    trainables = build_trainables(config, backbone, functions, [], seed=0)
    return backbone, Spt(config, trainables, functions)


def micro_batch(source: str, tokenizer: str, size: int, vocabulary: int, max_tokens: int) -> Batch:
    """A micro-batch whose lengths stand for those of a real data set.

    Its examples lie at evenly spaced quantiles of length.
    """
    loaded = load_tokenizer(ModelConfig(base=tokenizer))
    dialogues = islice(read(source, "auto"), SAMPLE)
    encoded = [example for _, example in encode_many(dialogues, loaded, max_tokens)]
    encoded.sort(key=lambda example: len(example.context_ids) + len(example.response_ids))
    chosen = [encoded[(2 * row + 1) * len(encoded) // (2 * size)] for row in range(size)]
    # The tokenizer may know more ids than the base: a cost does not depend on which token it is.
    contexts = [np.array(example.context_ids) % vocabulary for example in chosen]
    responses = [np.array(example.response_ids) % vocabulary for example in chosen]
    return Batch(
        np.concatenate(contexts),
        np.concatenate(responses),
        tuple(len(ids) for ids in contexts),
        tuple(len(ids) for ids in responses),
        tuple(range(size)),
        (1.0,) * size,
    )
