"""How much a training step computes and sends: arithmetic from the sizes of base, data and options.

Legend: N weights that a token passes through, K prompts, P virtual tokens, C context and R response
tokens of an example, D embedding size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from spt_ds.config.method import SUFFIX_POSITIONS, TRAIN_THE_BASE
from spt_ds.config.schema import Config
from spt_ds.placement.choose import Placement
from spt_ds.placement.ds_check import accumulation_steps
from spt_ds.placement.estimate import BaseShape, trainable_bytes


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of an example."""

    context: float
    response: float


@dataclass(frozen=True)
class Work:
    """What one optimizer step takes, over all ranks together unless it says otherwise."""

    rows_tokens: int
    """Packed tokens with a backward pass: every prompt's rows."""
    context_tokens: int
    """Tokens that are read once without a gradient, in suffix placement."""
    flops: float
    """Products and sums of the matrices."""
    gathered_bytes: float
    """What each rank receives of other ranks' shards."""
    reduced_bytes: float
    """What each rank sends and receives to add the gradients up."""


def work_of(
    config: Config, shape: BaseShape, placement: Placement, lengths: Lengths, ranks: int
) -> Work:
    """The work of one step of `config` on `ranks` ranks."""
    suffix = config.prompts.position in SUFFIX_POSITIONS
    prompts, examples = config.prompts.count, config.train.global_batch
    row = config.prompts.tokens + lengths.response + (0 if suffix else lengths.context)
    rows, contexts = examples * prompts * row, examples * lengths.context if suffix else 0.0
    # A product takes two operations a weight, and a frozen base has two passes of them: forward and
    # the gradient of the inputs. Recomputation makes the first one again; weights that train have a
    # third.
    passes = 2 + (placement.recompute != "off") + (config.method.type in TRAIN_THE_BASE)
    layers = shape.layers * shape.layer_parameters / _experts(shape)
    # One row of targets more, the fused one. The head's gradient is made in its forward pass.
    targets = examples * (prompts + 1) * lengths.response
    head = shape.vocabulary * shape.embed
    flops = 2 * layers * (rows * passes + contexts) + 4 * head * targets
    micro_steps: float = accumulation_steps(config, ranks)
    if budget := config.train.micro_batch_tokens:
        micro_steps = max(1.0, (rows + (contexts or 0)) / ranks / budget)
    gathered = 0.0
    if placement.zero.stage == 3:
        uses = 2 + suffix  # forward and backward of the rows, and the contexts before them
        # A second copy is gathered within the ranks that share it.
        group = placement.zero.copy_ranks or ranks
        share = (group - 1) / group
        base = shape.base_bytes(config.model.base_bits, config.model.quant)
        gathered = base * uses * micro_steps * share
    # A ring sends and receives each gradient twice, but for the rank's own part. Weights, gradients
    # and two moments are four equal parts of what trains.
    reduced = 2 * trainable_bytes(config, shape) / 4 * (ranks - 1) / ranks
    return Work(round(rows), round(contexts), flops, gathered, reduced)


def _experts(shape: BaseShape) -> float:
    """By how much a token passes through fewer weights than a layer of experts has: two of them."""
    if shape.experts == 1:
        return 1.0
    feed_forward = shape.hidden * shape.ffn_matrices * shape.ffn
    used = shape.layer_parameters - (shape.experts - min(2, shape.experts)) * feed_forward
    return shape.layer_parameters / used
