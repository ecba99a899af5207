"""The sizes of a base that decide its memory, from its config.json alone.

The formulas are compared with counted parameters and counted saved activations in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spt_ds.errors import ModelError

# Models whose feed-forward has no gate although it is sized by `intermediate_size`.
UNGATED = {"phi", "gpt_neox", "starcoder2", "nemotron"}


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a causal LM that decide its memory."""

    hidden: int
    embed: int  # size of an embedding; OPT-350m's differs from its hidden size
    layers: int
    ffn: int
    ffn_matrices: int  # 3 with a gate (Llama), 2 without (OPT)
    experts: int  # feed-forward blocks of a layer; 1 but for mixtures of experts
    queries: int  # heads times their size
    keys: int  # key/value heads times their size
    vocabulary: int
    embeddings: int  # tables of vocabulary size: 1 when the head is tied
    masked_relu: bool  # keeps a byte where other activations keep a number (`model/activations.py`)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseShape:
        """Read the sizes under the names of `transformers`; ModelError names what is missing."""

        def first(*names: str) -> int:
            for name in names:
                if config.get(name) is not None:
                    return int(config[name])
            raise ModelError(
                f"the base's configuration has none of {', '.join(names)}: its memory cannot be"
                " planned"
            )

        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        head = int(config.get("head_dim") or hidden // heads)
        gated = (
            config.get("intermediate_size") is not None and config.get("model_type") not in UNGATED
        )
        return cls(
            hidden=hidden,
            embed=int(config.get("word_embed_proj_dim") or hidden),
            layers=first("num_hidden_layers", "n_layer"),
            ffn=int(config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden),
            ffn_matrices=3 if gated else 2,
            experts=int(config.get("num_local_experts") or config.get("num_experts") or 1),
            queries=heads * head,
            keys=int(config.get("num_key_value_heads") or heads) * head,
            vocabulary=first("vocab_size"),
            embeddings=1 if config.get("tie_word_embeddings", True) else 2,
            masked_relu=config.get("model_type") == "opt"
            and config.get("activation_function") == "relu",
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        return self.hidden * (
            2 * self.queries + 2 * self.keys + self.experts * self.ffn_matrices * self.ffn
        )

    @property
    def parameters(self) -> int:
        """All weights of the base but norms, biases and learned positions.

        These are 1.3 % of OPT-125m and less of larger bases.
        """
        return self.layers * self.layer_parameters + self.table_parameters

    @property
    def table_parameters(self) -> int:
        """Embeddings and head, and the projections of a base whose layers differ in size."""
        between = 2 * self.embed * self.hidden if self.embed != self.hidden else 0
        return self.embeddings * self.vocabulary * self.embed + between

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest matrix: the embedding table or a feed-forward layer."""
        return max(self.vocabulary * self.embed, self.hidden * self.ffn)

    def base_bytes(self, bits: int) -> int:
        """Bytes of the weights; embeddings and head stay at 16 bits when the layers have 4 or 8."""
        table = self.table_parameters * (4 if bits == 32 else 2)
        scales = 4 / 64 if bits in (4, 8) else 0.0  # an fp32 scale per block of 64
        return int(self.layers * self.layer_parameters * (bits / 8 + scales) + table)

    def activation_bytes(
        self, tokens: int, bits: int, *, recompute: bool, trained: bool = False
    ) -> int:
        """Bytes kept for the backward pass of `tokens` packed tokens.

        The tests count them: the estimate is at most a quarter above.

        Where weights are frozen a linear layer keeps nothing: kept are the inputs of norms (those
        of gated models compute in fp32), q, k, v and, by variable-length kernels, the output of
        attention, and the inputs of the activation and of the gate's product. With recomputation
        one layer's worth, and each layer's input. Weights that train (`trained`) add the inputs of
        linear layers; adapters on 16-bit layers cast them to fp32, each for itself, of which this
        is the most there can be.
        """
        size = 4 if bits == 32 else 2
        gated = self.ffn_matrices == 3
        norms = 2 * self.hidden * (4 if gated else size)
        attention = 2 * (self.queries + self.keys) * size
        feed_forward = self.ffn if self.masked_relu else (3 if gated else 1) * self.ffn * size
        layer = norms + attention + feed_forward
        if trained:
            layer += 4 * (2 * self.hidden + self.ffn)
            if gated:
                # RMS norms, which go with gates, keep what their weight multiplies.
                layer += 4 * 2 * self.hidden
            if bits != 32:
                layer += 4 * (3 * self.hidden + self.queries)
        last_norm = self.hidden * 4
        if recompute:
            return tokens * (self.layers * self.hidden * size + layer + last_norm)
        return tokens * (self.layers * layer + last_norm)

    def context_bytes(self, tokens: int, bits: int) -> int:
        """Keys and values of `tokens` context tokens, which the branches of `suffix` placement
        read until the end of the backward pass."""
        return tokens * self.layers * 2 * self.keys * (4 if bits == 32 else 2)
