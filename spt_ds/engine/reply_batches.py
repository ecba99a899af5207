"""Which examples are decoded together: a fixed number of them, or as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from spt_ds import dist
from spt_ds.config.schema import Config
from spt_ds.engine.session import Session
from spt_ds.log import get_logger
from spt_ds.model.roomy_cache import MORE_COLUMNS
from spt_ds.placement.estimate import BaseShape, resident_bytes
from spt_ds.placement.memory import GIB, USABLE, host_memory_per_rank

MOST_ROWS = 256  # replies that grow at a time
LOGIT_BYTES = 32  # of a row for each token of the vocabulary: logits, and the noise of sampling

Fits = Callable[[int], int]
"""Examples that can be decoded together where the longest context has so many tokens."""


def plan_batches(lengths: np.ndarray, fits: Fits) -> list[list[int]]:
    """Cut the examples, longest first, into batches of like length, whatever the number of ranks.

    `lengths` are the tokens of the contexts.
    """
    # Stable: examples of one length keep their order, and batches are the same everywhere.
    order = np.argsort(-lengths.astype(np.int64), kind="stable").tolist()
    batches, start = [], 0
    while start < len(order):
        # Rows are padded to the longest, which comes first.
        end = start + fits(int(lengths[order[start]]))
        batches.append(order[start:end])
        start = end
    return batches


def fitting(session: Session, rows_per_example: int) -> Fits:
    """What `generate.batch_size` says, the same on all ranks; `auto` looks at their memory now."""
    size = session.config.generate.batch_size
    if size != "auto":
        return lambda _: size
    free = min(dist.gather_json(_free_bytes(session)))
    # A power of two: mostly the same batches, and so the same rounding, though a little less is
    # free.
    budget = 1 << max(free.bit_length() - 1, 0)
    get_logger().info(f"generate.batch_size: auto: batches of {budget / GIB:.2f} GiB at most")

    def fits(longest: int) -> int:
        rows = min(MOST_ROWS, budget // row_bytes(session.config, session.base.shape, longest))
        return max(1, rows // rows_per_example)

    return fits


def row_bytes(config: Config, shape: BaseShape, longest: int) -> int:
    """Most bytes that one row takes whose context has `longest` tokens.

    Counted are keys and values with what a layer needs to read the context, or the room that they
    grow into where that is more, embeddings, the mask, and the logits of one token with what
    sampling makes of them. The tests compare the sum with what decoding takes.
    """
    bits = config.model.base_bits
    begun = longest + config.prompts.tokens
    tokens = begun + config.generate.max_new_tokens
    room = begun - (-config.generate.max_new_tokens // MORE_COLUMNS) * MORE_COLUMNS
    reading = shape.context_bytes(tokens, bits) + shape.reading_bytes(tokens, bits)
    return (
        max(reading, shape.context_bytes(room, bits))
        + tokens * (shape.hidden * (4 if bits == 32 else 2) + tokens)
        + shape.vocabulary * LOGIT_BYTES
    )


def _free_bytes(session: Session) -> int:
    """What this rank can still take, with the layers that ZeRO-3 gathers set aside."""
    device = session.world.device
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = int((torch.cuda.mem_get_info(device)[0] + held) * USABLE)
    else:
        free = host_memory_per_rank(session.world.local_size)
    model = session.config.model
    base = session.base.shape.base_bytes(model.base_bits, model.quant)
    gathered = resident_bytes(base, model.base_bits, "zero3_offload", session.world.size)
    return max(0, free - (gathered if session.sharding.on else 0))
