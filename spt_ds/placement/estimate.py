"""Bytes that a run needs on one rank, part by part, by arithmetic from sizes and options."""

from __future__ import annotations

from spt_ds.config.schema import Config
from spt_ds.placement.memory import GIB
from spt_ds.placement.shape import BaseShape
from spt_ds.placement.zero_plan import Kind

FIXED_BYTES = GIB  # process, kernels and communication buffers
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, as it stands in ds_configs/ too
RESPONSE_TOKENS = 64  # four times the mean reply of ConvAI2


def trainable_bytes(config: Config, shape: BaseShape) -> int:
    """Weights, gradients and two Adam moments of what trains beside the base, fp32.

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


def step_bytes(config: Config, shape: BaseShape, *, recompute: bool) -> int:
    """Most bytes that one micro-batch keeps for its backward pass.

    With `placement: suffix` a response is taken to be at most RESPONSE_TOKENS long.
    """
    c, bits = config, config.model.base_bits
    suffix = c.prompts.placement == "suffix"
    per_prompt = c.prompts.tokens + (
        min(RESPONSE_TOKENS, c.data.max_tokens) if suffix else c.data.max_tokens
    )
    tokens = c.train.micro_batch * (c.losses.train_top_m or c.prompts.count) * per_prompt
    kept = shape.activation_bytes(tokens, bits, recompute=recompute, trained=c.method.trains_base)
    if suffix:
        kept += shape.context_bytes(c.train.micro_batch * c.data.max_tokens, bits)
    return kept


def resident_bytes(shape: BaseShape, bits: int, kind: Kind, world_size: int) -> int:
    """Bytes of the base on one rank: its copy, or its share and what ZeRO-3 has gathered."""
    base = shape.base_bytes(bits)
    if kind == "replicate":
        return base
    gathered = min(base, LIVE_PARAMETERS * {32: 4, 16: 2}.get(bits, 1))
    return gathered + (base // world_size if kind == "zero3" else 0)
