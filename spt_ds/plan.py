"""Memory arithmetic of a run, without torch and without a GPU: what fits where, and why.

Sizes come from the base's config.json alone. The formulas are compared with counted parameters and counted saved
activations in the tests. GiB is 2**30 bytes throughout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spt_ds.config.schema import Config
from spt_ds.errors import ModelError

GIB = 2**30
USABLE = 0.85  # share of a rank's memory that is planned with; the rest is for fragments, buffers and the runtime
FIXED_BYTES = GIB  # process, kernels and communication buffers

Placement = Literal["replicate", "zero3", "zero3_offload"]


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a causal LM that decide its memory."""

    hidden: int
    layers: int
    ffn: int
    ffn_matrices: int  # 3 with a gate (Llama), 2 without (OPT)
    kv_share: float  # key/value heads per query head
    vocabulary: int
    embeddings: int  # tables of vocabulary size: 1 when the head is tied

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseShape:
        """Read the sizes under the names `transformers` uses; raise ModelError naming the one that is missing."""

        def first(*names: str) -> int:
            for name in names:
                if config.get(name) is not None:
                    return int(config[name])
            raise ModelError(f"the base's configuration has none of {', '.join(names)}: its memory cannot be planned")

        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        return cls(
            hidden=hidden,
            layers=first("num_hidden_layers", "n_layer"),
            ffn=int(config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden),
            ffn_matrices=3 if config.get("intermediate_size") else 2,
            kv_share=int(config.get("num_key_value_heads") or heads) / heads,
            vocabulary=first("vocab_size"),
            embeddings=1 if config.get("tie_word_embeddings", True) else 2,
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.hidden * (2 + 2 * self.kv_share)
        return int(attention + self.ffn_matrices * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """All weights of the base, norms and biases (well under 1 %) left out."""
        return self.layers * self.layer_parameters + self.embeddings * self.vocabulary * self.hidden

    def base_bytes(self, bits: int) -> int:
        """Bytes of the weights; embeddings and head stay at 16 bits when the layers have 4 or 8."""
        table = self.embeddings * self.vocabulary * self.hidden * (4 if bits == 32 else 2)
        scales = 4 / 64 if bits in (4, 8) else 0.0  # an fp32 scale per block of 64
        return int(self.layers * self.layer_parameters * (bits / 8 + scales) + table)

    def activation_bytes(self, tokens: int, bits: int, *, recompute: bool) -> int:
        """Bytes kept for the backward pass of `tokens` packed tokens.

        Weights are frozen, so a linear layer keeps nothing: kept are the inputs of norms, q, k, v and the output of
        attention, and the inputs of the activation and of the gate's product. With recomputation one layer's worth,
        and each layer's input.
        """
        size = 4 if bits == 32 else 2
        norms = 2 * self.hidden * (size + 4)
        attention = self.hidden * (2 + 2 * self.kv_share) * size
        feed_forward = (3 if self.ffn_matrices == 3 else 1) * self.ffn * size
        layer = norms + attention + feed_forward
        if recompute:
            return int(tokens * (self.layers * self.hidden * size + layer))
        return int(tokens * self.layers * layer)


def trainable_bytes(config: Config, shape: BaseShape) -> int:
    """Weights, gradients and two Adam moments of bank and retriever, fp32."""
    sides = 1 if config.retriever.projections == "shared" else 2
    count = config.prompts.count * config.prompts.tokens * shape.hidden + sides * (shape.hidden**2 + shape.hidden)
    return 16 * count


def step_tokens(config: Config) -> int:
    """Most packed tokens that one micro-batch can put through the base."""
    c = config
    per_prompt = c.prompts.tokens + (c.data.max_tokens if c.prompts.placement == "prefix" else 64)
    return c.train.micro_batch * c.prompts.count * per_prompt


def memory_per_rank(device_bytes: int | None, local_size: int) -> int:
    """Bytes a rank can plan with: its GPU's memory, or its share of what the host has available."""
    if device_bytes is not None:
        return int(device_bytes * USABLE)
    page = os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass  # not Linux: the free pages are all that is known
    return int(available * USABLE / local_size)


def choose_placement(config: Config, shape: BaseShape, world_size: int, rank_bytes: int) -> tuple[Placement, str]:
    """Pick where the base lives for `engine.placement`, and say why in one line."""
    asked = config.engine.placement
    if asked != "auto":
        return asked, f"placement: {asked} (as configured)"
    bits = config.model.base_bits
    base = shape.base_bytes(bits)
    rest = FIXED_BYTES + trainable_bytes(config, shape)
    rest += shape.activation_bytes(step_tokens(config), bits, recompute=True)
    room = rank_bytes - rest
    sizes = f"base {base / GIB:.2f} GiB at {bits} bits, {max(room, 0) / GIB:.2f} GiB left for it on each rank"
    if base <= room:
        return "replicate", f"placement: replicate ({sizes}: sharding would only add communication)"
    layer = int(shape.layer_parameters * bits / 8)
    if world_size > 1 and base / world_size + 2 * layer <= room:
        return "zero3", f"placement: zero3 ({sizes}: a share of 1/{world_size} fits)"
    return "zero3_offload", f"placement: zero3_offload ({sizes}: not even a share of 1/{world_size} fits)"


def choose_checkpointing(
    config: Config, shape: BaseShape, placement: Placement, world_size: int, rank_bytes: int
) -> tuple[str, str]:
    """Pick `off`, `non_reentrant` or `reentrant` for `model.activation_checkpointing`, and say why in one line."""
    asked = config.model.activation_checkpointing
    if asked != "auto":
        return asked, f"activation checkpointing: {asked} (as configured)"
    bits = config.model.base_bits
    share = {"replicate": 1.0, "zero3": 1.0 / world_size, "zero3_offload": 0.0}[placement]
    room = rank_bytes - FIXED_BYTES - trainable_bytes(config, shape) - int(shape.base_bytes(bits) * share)
    kept = shape.activation_bytes(step_tokens(config), bits, recompute=False)
    used = "off" if kept <= room else "non_reentrant"
    verdict = "fit" if used == "off" else "do not fit"
    return used, (
        f"activation checkpointing: {used} ({kept / GIB:.2f} GiB of activations at most {verdict} "
        f"into {max(room, 0) / GIB:.2f} GiB)"
    )
