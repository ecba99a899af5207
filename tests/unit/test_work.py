"""Sizes of well-known bases, and the work of a step against operations that are counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.placement.choose import Placement
from spt_ds.placement.ds_check import plan_of_kind
from spt_ds.placement.estimate import BaseShape
from spt_ds.placement.known_bases import KNOWN_BASES
from spt_ds.placement.work import Lengths, work_of
from tests.helpers.tiny import random_batch
from tests.numerics.steps import Case, build

# Billions of weights, as their authors and the hub count them.
PUBLISHED = {
    "facebook/opt-125m": 0.125,
    "facebook/opt-350m": 0.331,
    "facebook/opt-1.3b": 1.316,
    "facebook/opt-2.7b": 2.652,
    "facebook/opt-6.7b": 6.658,
    "facebook/opt-13b": 12.853,
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Llama-2-70b-hf": 68.977,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "meta-llama/Llama-3.1-8B-Instruct": 8.030,
    "meta-llama/Llama-3.1-70B-Instruct": 70.554,
    "meta-llama/Llama-3.3-70B-Instruct": 70.554,
    "meta-llama/Llama-3.1-405B-Instruct": 405.854,
    "meta-llama/Llama-3.2-1B-Instruct": 1.236,
    "meta-llama/Llama-3.2-3B-Instruct": 3.213,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.544,
    "Qwen/Qwen2.5-7B-Instruct": 7.616,
    "Qwen/Qwen3-8B": 8.191,
    "google/gemma-3-1b-it": 1.000,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
}


@pytest.mark.parametrize("name", KNOWN_BASES)
def test_a_known_base_has_its_published_size(name: str) -> None:
    shape = BaseShape.from_config(KNOWN_BASES[name])
    assert shape.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.014)


def placement_of(
    config: Config, recompute: str, kind: str = "replicate", ranks: int = 1
) -> Placement:
    zero = plan_of_kind(kind, config, ranks)  # type: ignore[arg-type]
    return Placement(zero, recompute, ())  # type: ignore[arg-type]


def matrix_flops(case: Case, lens: tuple[tuple[int, int], ...]) -> float:
    """Operations of all matrix products of a micro-batch but those of attention."""
    backbone, spt = build(case, contrastive=0)
    batch = random_batch(lens)
    with FlopCounterMode(display=False) as counter:
        out = backbone(spt.micro_losses, batch, len(batch), len(batch.response_ids))
        out.total.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_the_operations_of_a_step_are_counted(
    arch: str, placement: str, checkpointing: str
) -> None:
    lens = ((60, 12), (60, 12), (60, 12))
    case = Case(arch, torch.float32, placement=placement, checkpointing=checkpointing)
    backbone, spt = build(case)
    config = spt.config.model_copy(
        update={"train": spt.config.train.model_copy(update={"global_batch": len(lens)})}
    )
    shape = BaseShape.from_config(backbone.config.to_dict())
    placed = placement_of(config, checkpointing)
    # The last token of a reply is in no row, and the last target needs no row of its own.
    work = work_of(config, shape, placed, Lengths(60, 11), 1)
    counted = matrix_flops(case, lens)
    assert work.flops == pytest.approx(counted, rel=0.1)


def test_shards_are_gathered_for_each_use() -> None:
    shape = BaseShape.from_config(KNOWN_BASES["meta-llama/Llama-2-7b-hf"])
    options = ["train.global_batch=32", "train.micro_batch=4", "model.base_bits=16"]
    config = load_config("llama-2-7b", options)
    placed = placement_of(config, "off", "zero3", 4)
    work = work_of(config, shape, placed, Lengths(143, 14), 4)
    # Two micro-batches on each rank, forward and backward, three quarters of the base from others.
    assert work.gathered_bytes == pytest.approx(2 * 2 * 0.75 * shape.base_bytes(16))
    placed.zero.engine_config["zero_optimization"]["zero_hpz_partition_size"] = 2
    within = work_of(config, shape, placed, Lengths(143, 14), 4)
    assert within.gathered_bytes == pytest.approx(work.gathered_bytes * 0.5 / 0.75)
    replicated = work_of(config, shape, placement_of(config, "off"), Lengths(143, 14), 4)
    assert replicated.gathered_bytes == 0
    assert replicated.flops == work.flops
