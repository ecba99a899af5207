"""The base as one compiled function: the Llama architecture without the parts that training skips.

transformers' LlamaForCausalLM computes the same logits from the same weights (a test compares
them). This one has no cache, no masks but the causal one and few, wide matrix products, which
makes a training step on a CPU about three times as fast.

Shape letters: B rows, T tokens of a row, H hidden size, N heads, K key/value heads, D head size,
F width of the feed-forward part, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    max_position: int

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight; q/k/v and gate/up are one matrix each."""
        inner, key_value = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes |= {
                f"{layer}.norm_attention": (self.hidden,),
                f"{layer}.qkv": (inner + 2 * key_value, self.hidden),
                f"{layer}.out": (self.hidden, inner),
                f"{layer}.norm_mlp": (self.hidden,),
                f"{layer}.gate_up": (2 * self.intermediate, self.hidden),
                f"{layer}.down": (self.hidden, self.intermediate),
            }
        return {**shapes, "norm": (self.hidden,)}

    def config(self) -> LlamaConfig:
        """Return the configuration that transformers reads."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            max_position_embeddings=self.max_position,
            rms_norm_eps=_EPS,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


def initial_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Return fp32 weights: ones for norms, else normal; what is added to the stream is smaller."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shape.weights().items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        scale = (2 * shape.layers) ** -0.5 if name.endswith(("out", "down")) else 1.0
        weights[name] = torch.randn(size, generator=generator) * 0.02 * scale
    return weights


def to_llama(weights: Mapping[str, Tensor], shape: Shape) -> LlamaForCausalLM:
    """Return transformers' model in fp32 with these weights."""
    state = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    inner, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    for layer in range(shape.layers):
        query, key, value = weights[f"{layer}.qkv"].split([inner, key_value, key_value])
        gate, up = weights[f"{layer}.gate_up"].chunk(2)
        named = {
            "input_layernorm": weights[f"{layer}.norm_attention"],
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": weights[f"{layer}.out"],
            "post_attention_layernorm": weights[f"{layer}.norm_mlp"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": weights[f"{layer}.down"],
        }
        state |= {f"model.layers.{layer}.{name}.weight": value for name, value in named.items()}
    model = LlamaForCausalLM(shape.config()).float()
    model.load_state_dict(
        {
            **{name: value.clone().float() for name, value in state.items()},
            "lm_head.weight": weights["embed"].clone().float(),
        }
    )
    return model


def logits(weights: Mapping[str, Tensor], ids: Tensor, shape: Shape) -> Tensor:
    """Return the logits [B * T, V] of `ids` [B, T], in the dtype of the weights."""
    dtype = weights["embed"].dtype
    rows, length = ids.shape
    rotation = _rotation(length, shape.head_size, dtype)
    future = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    stream = functional.embedding(ids, weights["embed"])  # [B, T, H]
    for layer in range(shape.layers):
        normed = _norm(stream, weights[f"{layer}.norm_attention"])
        qkv = functional.linear(normed, weights[f"{layer}.qkv"])
        mixed = _attention(qkv, shape, rotation, future)
        stream = stream + functional.linear(mixed, weights[f"{layer}.out"])
        normed = _norm(stream, weights[f"{layer}.norm_mlp"])
        gate, up = functional.linear(normed, weights[f"{layer}.gate_up"]).chunk(2, -1)
        stream = stream + functional.linear(functional.silu(gate) * up, weights[f"{layer}.down"])
    normed = _norm(stream, weights["norm"]).view(rows * length, shape.hidden)
    return functional.linear(normed, weights["embed"])


def weighted_loss(
    weights: Mapping[str, Tensor], rows: Tensor, importance: Tensor, shape: Shape
) -> Tensor:
    """Return the cross entropies (nats) of each next token of `rows` [B, T + 1] times `importance`
    [B, T], summed.
    """
    scores = logits(weights, rows[:, :-1], shape).float()
    nats = functional.cross_entropy(scores, rows[:, 1:].flatten(), reduction="none")
    return (nats * importance.flatten()).sum()


def _attention(
    qkv: Tensor, shape: Shape, rotation: tuple[Tensor, Tensor], future: Tensor
) -> Tensor:
    """Causal attention over [B, T, (N + 2 K) D]; [B, T, N D]."""
    rows, length, _ = qkv.shape
    heads, kv_heads = shape.heads, shape.kv_heads
    split = qkv.view(rows, length, heads + 2 * kv_heads, shape.head_size).transpose(1, 2)
    query, key, value = split.split([heads, kv_heads, kv_heads], 1)
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    if heads != kv_heads:
        key = key.repeat_interleave(heads // kv_heads, 1)
        value = value.repeat_interleave(heads // kv_heads, 1)
    # Written out: for rows of a few hundred tokens the compiled matrix products are faster on a
    # CPU than the fused kernel, forward and above all backward.
    scores = (query @ key.transpose(-1, -2)) * shape.head_size**-0.5 + future
    mixed = torch.softmax(scores.float(), -1).to(qkv.dtype) @ value
    return mixed.transpose(1, 2).reshape(rows, length, heads * shape.head_size)


def _norm(stream: Tensor, weight: Tensor) -> Tensor:
    wide = stream.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
    return wide.to(stream.dtype) * weight


def _rotation(length: int, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D] of rotary position embeddings."""
    inverse = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    left, right = heads.chunk(2, -1)
    return heads * cos + torch.cat([-right, left], -1) * sin
