"""Bytes that a run needs on each rank: arithmetic from the sizes of the base and the options.

The formulas are compared with counted parameters and counted saved activations in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from spt_ds.config.method import SUFFIX_POSITIONS, TRAIN_THE_BASE
from spt_ds.config.model import QuantConfig
from spt_ds.config.schema import Config
from spt_ds.display import shown
from spt_ds.errors import ModelError
from spt_ds.placement.memory import GIB
from spt_ds.placement.zero_plan import Kind

FIXED_BYTES = GIB  # process, kernels and communication buffers
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, as it stands in ds_configs/ too
RESPONSE_TOKENS = 64  # four times the mean reply of ConvAI2
HEAD_COPIES = 3  # of a chunk's logits where the head itself trains (`model/head.py`)
DEFAULT_QUANT = QuantConfig()
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
                value = config.get(name)
                if value is None:
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ModelError(
                        f"the base's configuration: {name} is {shown(value)}, expected a whole"
                        " number from 1 on"
                    )
                return value
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

    def base_bytes(self, bits: int, quant: QuantConfig = DEFAULT_QUANT) -> int:
        """Bytes of the weights.

        Embeddings, head and `quant.skip_modules` stay at 16 bits when the layers have 4 or 8.
        """
        plain, weights = self.table_parameters, self.layers * self.layer_parameters
        if bits not in (4, 8):
            return (plain + weights) * bits // 8
        skipped = sum(map(self._weights_of, set(quant.skip_modules)))
        # A block has an fp32 scale; of 4 bits it may have 8 bits, and a scale for 256 of them.
        scale = 1 + 4 / 256 if bits == 4 and quant.double_quant else 4
        packed = (weights - skipped) * (bits / 8 + scale / quant.block_size)
        return int(packed) + 2 * (plain + skipped)

    def _weights_of(self, module: str) -> int:
        """Weights of the linear layers whose names end so: of one layer where a number is in it."""
        *path, name = module.split(".")
        sides = {
            **dict.fromkeys(("q_proj", "o_proj", "out_proj"), self.queries),
            **dict.fromkeys(("k_proj", "v_proj"), self.keys),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "fc1", "fc2"), self.ffn),
        }
        layers = 1 if any(part.isdecimal() for part in path) else self.layers
        return layers * self.hidden * sides.get(name, 0)

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
        layer = self._layer_numbers(bits, trained=trained)
        last_norm = self.hidden * 4
        if recompute:
            return tokens * (self.layers * self.hidden * size + layer + last_norm)
        return tokens * (self.layers * layer + last_norm)

    def _layer_numbers(self, bits: int, *, trained: bool) -> int:
        """Bytes that one layer keeps of a token."""
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
        return layer

    def slope_bytes(self, tokens: int, bits: int) -> int:
        """Most bytes of gradients that exist together on the way back through a layer.

        Rows are taken to be short, so that attention, which goes row by row, needs less.
        """
        size, gated = 4 if bits == 32 else 2, self.ffn_matrices == 3
        feed_forward = (2 * self.hidden + (3 if gated else 2) * self.ffn) * size
        # RMS norms, which go with gates, are made of single operations in fp32.
        norm = self.hidden * (5 * 4 + size) if gated else 0
        return tokens * max(feed_forward, norm)

    def head_bytes(self, rows: int, bits: int, chunk_mib: int, *, trained: bool = False) -> int:
        """Bytes of the logits of one chunk: fp32 numbers, and their slopes in a 16-bit base's."""
        copies = HEAD_COPIES if trained else 1 + (bits != 32)
        chunk = max(1, (chunk_mib << 20) // (copies * self.vocabulary * 4))
        number = 4 * HEAD_COPIES if trained else 4 + (bits != 32) * 2
        return min(rows, chunk) * self.vocabulary * number

    def context_bytes(self, tokens: int, bits: int) -> int:
        """Keys and values of `tokens` context tokens, which the branches of `suffix` placement
        read until the end of the backward pass."""
        return tokens * self.layers * 2 * self.keys * (4 if bits == 32 else 2)

    def reading_bytes(self, tokens: int, bits: int) -> int:
        """Most bytes that one layer needs at a time to read `tokens` context tokens, which keeps
        nothing for a backward pass.

        The tests count them: the estimate is at most a fifth above. It is reached in the
        feed-forward block: its input before and after the norm, and what is as wide as the block.
        """
        wide = 3 if self.ffn_matrices == 3 else 2
        numbers = 4 * self.hidden + wide * self.ffn
        return tokens * numbers * (4 if bits == 32 else 2)


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes of one rank's memory, part by part."""

    base: int
    """The base as a whole."""
    resident: dict[Kind, int]
    """What of it is on the rank's device, by where it lives."""
    share: int
    """One rank's shard of the base."""
    trainables: int
    """What trains, its gradients and Adam's moments."""
    activations: int
    """Most that one micro-batch keeps for its backward pass."""
    recomputed: int
    """The same where layers are recomputed."""


def needs_of(
    config: Config, shape: BaseShape, world_size: int, batch: MicroBatch | None = None
) -> Needs:
    """Work out what a run on `world_size` ranks needs; `batch`: its largest, if known."""
    model, kinds = config.model, get_args(Kind)
    base = shape.base_bytes(model.base_bits, model.quant)
    return Needs(
        base=base,
        resident={kind: resident_bytes(base, model.base_bits, kind, world_size) for kind in kinds},
        share=base // world_size,
        trainables=trainable_bytes(config, shape),
        activations=step_bytes(config, shape, recompute=False, batch=batch),
        recomputed=step_bytes(config, shape, recompute=True, batch=batch),
    )


def trainable_bytes(config: Config, shape: BaseShape) -> int:
    """Weights, gradients and two Adam moments of what trains, fp32.

    Of `method.type: full` the weights are the base's own; `lora` is counted as if every linear
    layer had an adapter.
    """
    kind = config.method.type
    if kind == "none":
        return 0
    if kind == "full":
        return 12 * shape.parameters
    if kind == "lora":
        # An adapter of rank r on a linear layer has r numbers for each input and each output.
        ends = (
            4 * shape.hidden
            + 2 * (shape.queries + shape.keys)
            + shape.ffn_matrices * (shape.hidden + shape.ffn)
        )
        return 16 * shape.layers * config.method.lora.rank * ends
    # The bank with its keys, and a linear layer with bias for each other side of the retriever.
    keys = config.retriever.keys == "learned"
    sides = 1 if keys or config.retriever.projections == "shared" else 2
    rows = config.prompts.count * (config.prompts.tokens + int(keys))
    return 16 * shape.embed * (rows + sides * (shape.embed + 1))


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of the largest micro-batch of a run."""

    examples: int
    context: int
    """Tokens of all of its contexts."""
    response: int
    """Tokens of all of its responses."""

    @classmethod
    def bound(cls, config: Config) -> MicroBatch:
        """The largest that the options allow, where nothing is known of the data.

        A response is taken to be at most RESPONSE_TOKENS long.
        """
        # One example may be longer than the budget, and is then read by itself.
        examples = 1 if config.train.micro_batch_tokens else config.train.micro_batch
        longest = config.data.max_tokens
        response = min(RESPONSE_TOKENS, longest)
        suffix = config.prompts.position in SUFFIX_POSITIONS
        context = longest if suffix else longest - response
        return cls(examples, examples * context, examples * response)


def step_bytes(
    config: Config, shape: BaseShape, *, recompute: bool, batch: MicroBatch | None = None
) -> int:
    """Most bytes that one micro-batch keeps for its backward pass, or needs to read its contexts.

    Of a micro-batch that is limited by tokens, and of which no more is known (`batch` None), all
    are taken to have a backward pass.
    """
    c, bits = config, config.model.base_bits
    suffix = c.prompts.position in SUFFIX_POSITIONS
    budget = 0 if batch else c.train.micro_batch_tokens
    batch = batch or MicroBatch.bound(config)
    prompts = c.losses.train_top_m or c.prompts.count
    row = batch.examples * c.prompts.tokens + batch.response + (0 if suffix else batch.context)
    tokens = max(prompts * row, budget)
    trained = c.method.type in TRAIN_THE_BASE
    kept = shape.activation_bytes(tokens, bits, recompute=recompute, trained=trained)
    # The head works when all is kept, and its logits are gone when the way back begins.
    targets = (c.prompts.count + 1) * max(batch.response, budget // prompts)
    whole = c.method.type == "full"
    head = shape.head_bytes(targets, bits, c.losses.head_chunk_mib, trained=whole)
    kept += max(head, shape.slope_bytes(tokens, bits))
    if suffix:
        contexts = max(batch.context, budget)
        # Contexts are read before the branches keep anything. Of long ones that takes more.
        kept = max(kept, shape.reading_bytes(contexts, bits)) + shape.context_bytes(contexts, bits)
    return kept


def resident_bytes(base: int, bits: int, kind: Kind, world_size: int) -> int:
    """Bytes of a base on one rank: its copy, or its share and what ZeRO-3 has gathered."""
    if kind == "replicate":
        return base
    # DeepSpeed counts elements. Those of a packed layer are bytes.
    gathered = min(base, LIVE_PARAMETERS * {32: 4, 16: 2}.get(bits, 1))
    return gathered + (base // world_size if kind == "zero3" else 0)
