"""Batches of replies: as many as asked for, or as fit, counted against what decoding takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from spt_ds.config.schema import Config
from spt_ds.dist import World
from spt_ds.engine import reply_batches
from spt_ds.engine.reply_batches import MOST_ROWS, fitting, plan_batches, row_bytes
from spt_ds.engine.session import Session
from spt_ds.model.attention import PACKED
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode import decode
from spt_ds.placement.estimate import BaseShape
from tests.helpers.tiny import make_batch, tiny_spt

ROWS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 6


def base(name: str, positions: int, vocabulary: int) -> PretrainedConfig:
    common: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }
    if name == "opt":
        return OPTConfig(ffn_dim=512, word_embed_proj_dim=128, **common)
    return LlamaConfig(intermediate_size=344, num_key_value_heads=2, **common)


def test_batches_are_of_like_length_and_hold_each_example_once() -> None:
    lengths = np.array([5, 9, 5, 2, 9, 7])
    assert plan_batches(lengths, lambda _: 4) == [[1, 4, 5, 0], [2, 3]]
    assert plan_batches(lengths, lambda longest: 18 // longest) == [[1, 4], [5, 0], [2, 3]]
    assert plan_batches(lengths[:0], lambda _: 4) == []


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("context", "vocabulary"), [(60, 100), (400, 100), (60, 9000)])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_row_takes_what_is_counted(
    name: str, bits: int, context: int, vocabulary: int, sampled: bool
) -> None:
    config = base(name, context + 64, vocabulary)
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    backbone = Backbone(lm, "sdpa")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": sampled}
    run = Config.model_validate(
        {
            "model": {"base_bits": bits},
            "prompts": {"tokens": PROMPT_TOKENS},
            "generate": options,
        }
    )
    spt = tiny_spt(backbone, count=4, tokens=PROMPT_TOKENS, dtype=torch.float32)
    batch = make_batch([torch.arange(context) % 100] * ROWS, [torch.arange(4)] * ROWS)
    endings = Endings((99,), 99)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        backbone(decode, spt, batch, run.generate, endings, False)
    moves = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(moves, key=lambda e: e.start_ns())])
    counted = ROWS * row_bytes(run, BaseShape.from_config(config.to_dict()), context)
    # What sampling would take is always counted.
    most = 1.5 if sampled or vocabulary == 100 else 2.1
    assert 0.97 * held.max() <= counted <= most * held.max()


def session(batch_size: int | str, **generate: Any) -> Session:
    config = Config.model_validate({"generate": {"batch_size": batch_size, **generate}})
    shape = BaseShape.from_config(base("llama", 512, 1000).to_dict())
    made = SimpleNamespace(
        config=config,
        world=World(0, 1, 0, 1, torch.device("cpu")),
        base=SimpleNamespace(shape=shape),
        sharding=SimpleNamespace(on=False),
    )
    return cast(Session, made)


def test_a_number_is_taken_as_it_is() -> None:
    assert fitting(session(5), rows_per_example=4)(10_000) == 5


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = session("auto")
    row = row_bytes(asked.config, asked.base.shape, 200)
    budget = 1 << (40 * row).bit_length()  # between 40 and 80 rows
    monkeypatch.setattr(reply_batches, "host_memory_per_rank", lambda _: budget + budget // 3)
    assert fitting(asked, 1)(200) == budget // row
    assert fitting(asked, 4)(200) == budget // row // 4
    assert fitting(asked, 1)(1) == MOST_ROWS
    assert fitting(asked, 1)(10**6) == 1  # it may fit all the same
