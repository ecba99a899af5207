"""Initial values of the prompt bank, and that every rank draws the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spt_ds.config.schema import Config
from spt_ds.model.prompt_bank import PromptBank, initial_prompts
from spt_ds.model.reference import functions_of, unit_normal_prompts
from spt_ds.model.spt import Trainables, build_trainables
from tests.helpers.tiny import VOCABULARY, tiny_backbone

SHAPE = (3, 4, 8)
TABLE = torch.randn(VOCABULARY, SHAPE[2], generator=torch.Generator().manual_seed(0)) * 0.37


def draw(init: str, texts: list[list[int]] | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if init == "unit_normal":
        return unit_normal_prompts(SHAPE, generator)
    return initial_prompts(
        init, SHAPE, lambda ids: TABLE[ids].bfloat16(), VOCABULARY, texts or [], generator
    )


@pytest.mark.parametrize("init", ["vocab", "text", "template", "normal", "unit_normal"])
def test_prompts_are_fp32_and_a_function_of_the_seed(init: str) -> None:
    texts = [[5, 6], [7], [8]]
    first = draw(init, texts)
    assert (first.shape, first.dtype) == (SHAPE, torch.float32)
    assert torch.equal(first, draw(init, texts))
    assert torch.equal(first, draw(init, texts, seed=1)) == (init in ("text", "template"))
    assert PromptBank(first).count == 3
    assert PromptBank(first).tokens == 4


def test_vocab_copies_rows_of_the_table() -> None:
    rows = draw("vocab").flatten(0, 1)
    table = TABLE.bfloat16().float()
    found = [int((table == row).all(dim=1).nonzero()[0]) for row in rows]
    assert len(set(found)) > 6  # not one row over and over


def test_text_repeats_and_cuts_the_given_tokens() -> None:
    table = TABLE.bfloat16().float()
    out = draw("text", [[5], [6, 7, 8], [9, 10, 11, 12, 13]])
    ids = torch.tensor([[5, 5, 5, 5], [6, 7, 8, 6], [9, 10, 11, 12]])
    assert torch.equal(out, table[ids])


def test_one_text_serves_every_prompt() -> None:
    out = draw("text", [[5, 6]])
    assert torch.equal(out, out[:1].expand(3, -1, -1))


def test_normal_has_the_spread_of_the_table_and_reference_that_of_one() -> None:
    shape = (4, 64, SHAPE[2])
    generator = torch.Generator().manual_seed(0)
    normal = initial_prompts("normal", shape, lambda ids: TABLE[ids], VOCABULARY, [], generator)
    unit = unit_normal_prompts(shape, torch.Generator().manual_seed(0))
    for out, spread in ((normal, float(TABLE.std())), (unit, 1.0)):
        assert abs(float(out.std()) / spread - 1) < 0.05
        assert abs(float(out.mean())) < 0.1 * spread


def test_the_reference_draws_the_bank_with_its_seed() -> None:
    bank = make(3, reference={"unit_normal_prompts": True}).bank.weight
    drawn = unit_normal_prompts((2, 3, 12), torch.Generator().manual_seed(3))
    assert torch.equal(bank, drawn)


def make(seed: int, **sections: dict[str, Any]) -> Trainables:
    backbone = tiny_backbone("opt_project", torch.bfloat16)
    config = Config.model_validate({"prompts": {"count": 2, "tokens": 3}, **sections})
    functions = functions_of(config.reference, pad_id=1)
    out = backbone(lambda base: build_trainables(config, base, functions, [], seed))
    assert isinstance(out, Trainables)
    return out


def test_trainables_are_fp32_over_a_bf16_base_and_the_same_for_the_same_seed() -> None:
    one, same, other = make(3), make(3), make(4)
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert one.bank.weight.shape == (2, 3, 12)  # the embedding size, not the hidden size of 16
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.state_dict()[name]), name
        assert not torch.equal(parameter, other.state_dict()[name]), name
    assert set(one.state_dict()) == {
        "bank.weight",
        "retriever.context.weight",
        "retriever.context.bias",
        "retriever.prompt.weight",
        "retriever.prompt.bias",
    }
