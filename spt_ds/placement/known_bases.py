"""Sizes of well-known bases, so that a run on one is planned without network and without PyTorch.

They are those of the config.json that each base is published with, under its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _opt(hidden: int, layers: int, heads: int, embed: int | None = None) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": hidden,
        "word_embed_proj_dim": embed or hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "tie_word_embeddings": True,
    }


def _gated(
    kind: str,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    vocabulary: int,
    *,
    tied: bool = False,
    head_size: int | None = None,
) -> dict[str, Any]:
    """`heads` are those of queries and of keys and values."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_size or hidden // heads[0],
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


_LLAMA_3_8B = _gated("llama", 4096, 32, (32, 8), 14336, 128256)
_LLAMA_3_70B = _gated("llama", 8192, 80, (64, 8), 28672, 128256)
_LLAMA_3_405B = _gated("llama", 16384, 126, (128, 8), 53248, 128256)

KNOWN_BASES: Mapping[str, Mapping[str, Any]] = {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, embed=512),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "meta-llama/Llama-2-7b-hf": _gated("llama", 4096, 32, (32, 32), 11008, 32000),
    "meta-llama/Llama-2-13b-hf": _gated("llama", 5120, 40, (40, 40), 13824, 32000),
    "meta-llama/Llama-2-70b-hf": _gated("llama", 8192, 80, (64, 8), 28672, 32000),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3_70B,
    "meta-llama/Llama-3.1-405B-Instruct": _LLAMA_3_405B,
    "meta-llama/Llama-3.2-1B-Instruct": _gated(
        "llama", 2048, 16, (32, 8), 8192, 128256, tied=True, head_size=64
    ),
    "meta-llama/Llama-3.2-3B-Instruct": _gated(
        "llama", 3072, 28, (24, 8), 8192, 128256, tied=True, head_size=128
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": _gated("qwen2", 1536, 28, (12, 2), 8960, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _gated("qwen2", 3584, 28, (28, 4), 18944, 152064),
    "Qwen/Qwen3-8B": _gated("qwen3", 4096, 36, (32, 8), 12288, 151936, head_size=128),
    "google/gemma-3-1b-it": _gated(
        "gemma3_text", 1152, 26, (4, 1), 6912, 262144, tied=True, head_size=256
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _gated("llama", 576, 30, (9, 3), 1536, 49152, tied=True),
}
