"""Rows that join and leave a running batch give what each gives alone, on random bases."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from spt_ds.config.generation import GenerateConfig
from spt_ds.model import running
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.logits import constraints, sampling
from spt_ds.model.roomy_cache import MORE_COLUMNS, layers_of
from spt_ds.model.running import Row, RunningRows
from tests.helpers.tiny import EOS, tiny_backbone

LENGTHS = (3, 71, 9, 30, 1, 80, 14)  # gemma2's window is 64 tokens
LIMITS = (12, 5, 9, 1, 12, 7, 3)


def beginnings(backbone: Backbone) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    size, dtype = backbone.embed_size, backbone.lm.dtype
    return [
        0.3 * torch.randn(length, size, generator=generator, dtype=torch.float64).to(dtype)
        for length in LENGTHS
    ]


def rows_of(backbone: Backbone, ends: tuple[int, ...] = (EOS,)) -> list[Row]:
    endings = Endings(ends, 1)
    starts = beginnings(backbone)
    return [Row(start, endings, limit) for start, limit in zip(starts, LIMITS, strict=True)]


def alone(backbone: Backbone, row: Row) -> list[int]:
    """What transformers' own generate gives for this row by itself."""
    settings = GenerationConfig(
        max_new_tokens=row.max_new_tokens, eos_token_id=list(row.endings.ids), pad_token_id=1
    )
    start = row.beginning[None]
    mask = torch.ones(start.shape[:2], dtype=torch.long)
    out = backbone.generate(inputs_embeds=start, attention_mask=mask, generation_config=settings)
    tokens: list[int] = out[0].tolist()
    return tokens


@torch.no_grad()
def run_together(backbone: Backbone, rows: list[Row]) -> RunningRows:
    """Two rows first, another at every second step; finished ones leave at once."""
    batch, waiting = RunningRows(), list(rows)
    batch.join(backbone, [waiting.pop(0), waiting.pop(0)])
    for turn in range(200):
        batch.keep(lambda row: not row.done)
        if batch.rows:
            batch.step(backbone)
        if waiting and turn % 2:
            batch.join(backbone, [waiting.pop(0)])
        if not waiting and not batch.rows:
            return batch
    raise AssertionError("rows never end")


@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("arch", ["opt", "opt_project", "llama", "gemma2", "phi"])
def test_rows_that_come_and_go_give_what_each_gives_alone(
    arch: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "READ_TOGETHER", together)
    # PyTorch has NaN in fp64 where a window holds padding alone.
    backbone = tiny_backbone(arch, torch.float32 if arch == "gemma2" else torch.float64)
    rows = rows_of(backbone)
    run_together(backbone, rows)
    for row in rows:
        assert row.tokens == alone(backbone, row)
    assert len({tuple(row.tokens) for row in rows}) > 4  # no two rows could be mixed up unseen


def test_ends_and_texts_end_one_row_only() -> None:
    backbone = tiny_backbone("llama")
    free = rows_of(backbone, ends=())
    run_together(backbone, free)
    end = free[0].tokens[4]
    rows = rows_of(backbone, ends=(end,))
    for row in rows:
        row.endings = Endings((end,), 1, said=lambda tokens: len(tokens) >= 8)
    run_together(backbone, rows)
    for row, whole in zip(rows, free, strict=True):
        assert row.tokens == row.endings.cut(whole.tokens)
        assert row.ended == (end in whole.tokens or len(whole.tokens) >= 8)


def test_columns_go_with_the_row_that_reached_them() -> None:
    backbone = tiny_backbone("llama")
    rows = rows_of(backbone)[:3]
    batch = RunningRows()
    with torch.no_grad():
        batch.join(backbone, rows)
        assert batch._mask.shape == (3, 71)
        batch.keep(lambda row: row is not rows[1])
    assert batch._mask.shape == (2, 9)
    assert batch._cache is not None
    assert batch._cache.get_seq_length() == 9
    with torch.no_grad():
        batch.step(backbone)
    keys = layers_of(batch._cache)[0][0]
    # The memory of the rows that left is free as soon as a token needs room.
    most = 2 * keys[0].numel() // keys.shape[2] * (9 + 1 + MORE_COLUMNS)
    assert keys.untyped_storage().nbytes() <= most * keys.element_size()
    batch.keep(lambda row: False)
    assert batch._cache is None


def test_a_reply_is_not_shorter_than_its_row_asks() -> None:
    backbone = tiny_backbone("llama")
    free = rows_of(backbone, ends=())
    run_together(backbone, free)
    ends = (free[0].tokens[1], free[2].tokens[0])
    rows, apart = rows_of(backbone, ends), rows_of(backbone, ends)
    options = GenerateConfig(min_new_tokens=4)
    for row, one in zip(rows, apart, strict=True):
        row.min_new_tokens = 4
        one.processors = constraints(options, ends, torch.device("cpu"))
    run_together(backbone, rows)
    run_together(backbone, apart)
    assert [row.tokens for row in rows] == [row.tokens for row in apart]
    assert [row.tokens for row in rows] != [
        row.endings.cut(whole.tokens) for row, whole in zip(rows, free, strict=True)
    ]


def test_penalties_and_noise_are_a_row_s_own() -> None:
    backbone = tiny_backbone("llama")
    options = GenerateConfig(
        do_sample=True, temperature=1.3, top_k=20, repetition_penalty=1.4, min_new_tokens=4
    )
    device = torch.device("cpu")

    def fresh() -> list[Row]:
        rows = rows_of(backbone)
        for number, row in enumerate(rows):
            row.processors = [
                *constraints(options, (EOS,), device),
                *sampling(options, [(number,)], seed=3),
            ]
        return rows

    together, apart = fresh(), fresh()
    run_together(backbone, together)
    for row, one in zip(together, apart, strict=True):
        with torch.no_grad():
            batch = RunningRows()
            batch.join(backbone, [one])
            while not one.done:
                batch.step(backbone)
        assert row.tokens == one.tokens
    greedy = rows_of(backbone)
    run_together(backbone, greedy)
    assert [row.tokens for row in together] != [row.tokens for row in greedy]


def test_a_mask_that_forgets_the_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    real = Backbone.next_logits

    def fault(self: Backbone, mask: torch.Tensor, cache: object, **given: torch.Tensor) -> object:
        return real(self, torch.ones_like(mask), cache, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Backbone, "next_logits", fault)
    rows = rows_of(backbone)
    run_together(backbone, rows)
    assert any(row.tokens != alone(backbone, row) for row in rows)
