"""What the package ships: demo dialogues and the small base."""

from __future__ import annotations

import json
import random
from itertools import combinations, islice
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import spt_ds
from benchmarks.embedded_base.dialogues import SPLITS, sentence_key
from benchmarks.embedded_base.measure import persona_gap
from spt_ds.data.readers import read
from tests.helpers.tokenizers import encode

ASSETS = Path(spt_ds.__file__).parent / "assets"
BASE = ASSETS / "base"


@pytest.fixture(scope="module")
def dialogues() -> dict[str, list[dict]]:
    files = {
        name: (ASSETS / "dialogues" / f"{name}.jsonl").read_text(encoding="utf-8")
        for name in SPLITS
    }
    return {
        name: [json.loads(line) for line in text.rstrip("\n").split("\n")]
        for name, text in files.items()
    }


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        BASE, local_files_only=True, dtype=torch.float32
    ).eval()


def test_dialogues_have_the_documented_form(dialogues: dict[str, list[dict]]) -> None:
    assert {name: len(part) for name, part in dialogues.items()} == {
        "train": 240,
        "valid": 30,
        "test": 30,
    }
    for record in (record for part in dialogues.values() for record in part):
        assert list(record) == ["id", "persona", "turns", "first_speaker"]
        assert record["first_speaker"] in ("partner", "self")
        assert 6 <= len(record["turns"]) <= 40
        texts = [*record["persona"], *record["turns"]]
        assert len(record["persona"]) >= 4
        assert all(text and text == " ".join(text.split()) and "[" not in text for text in texts)
    ids = [record["id"] for part in dialogues.values() for record in part]
    assert len(set(ids)) == len(ids)


def test_both_users_are_shown(dialogues: dict[str, list[dict]]) -> None:
    for part in dialogues.values():
        opens = sum(record["first_speaker"] == "self" for record in part)
        assert 0.3 * len(part) < opens < 0.7 * len(part)


def test_no_persona_sentence_is_on_two_sides(dialogues: dict[str, list[dict]]) -> None:
    people = {
        name: {sentence_key(s) for record in part for s in record["persona"]}
        for name, part in dialogues.items()
    }
    for one, other in combinations(SPLITS, 2):
        assert not people[one] & people[other]


def test_sources_and_licences_are_named() -> None:
    dialogues = (ASSETS / "dialogues" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(
        part in dialogues
        for part in ("Synthetic-Persona-Chat", "Google", "CC BY 4.0", "What was changed")
    )
    card = (BASE / "README.md").read_text(encoding="utf-8")
    for part in (
        "CC BY 4.0",
        "CC BY-SA 4.0",
        "BSD-3-Clause",
        "CDLA-Sharing-1.0",
        "Synthetic-Persona-Chat",
        "Taskmaster-4",
    ):
        assert part in card


def test_model_card_gives_the_figures_of_these_weights() -> None:
    card = (BASE / "README.md").read_text(encoding="utf-8")
    report = json.loads((BASE / "pretraining.json").read_text(encoding="utf-8"))
    for key in ("steps", "tokens", "parameters"):
        assert f"{report[key]:,}" in card
    for kind in ("persona", "general"):
        for unit in ("token", "word"):
            assert f"{report[f'held_out_{kind}'][f'perplexity_per_{unit}']:.1f}" in card
    replies = report["valid_replies"]
    for key in ("nats_own_persona", "nats_other_persona", "gap", "gap_low", "gap_high"):
        assert f"{replies[key]:.3f}" in card
    assert f"{100 * report['greedy_replies']['share_ended']:.0f} %" in card


def test_base_reads_its_persona_and_ends_its_replies() -> None:
    report = json.loads((BASE / "pretraining.json").read_text(encoding="utf-8"))
    assert report["valid_replies"]["gap"] >= 0.05
    assert report["valid_replies"]["gap_low"] > 0
    assert report["greedy_replies"]["share_ended"] >= 0.9


def test_figures_of_the_persona_are_those_of_the_shipped_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    report = json.loads((BASE / "pretraining.json").read_text(encoding="utf-8"))
    measured = persona_gap(model, tokenizer, read("embedded:valid"))
    assert measured["gap"] == pytest.approx(report["valid_replies"]["gap"], abs=1e-3)


def test_base_is_small() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 25e6
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in ASSETS.rglob("*"))


def test_config_and_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert model.config.model_type == "llama"
    assert 2e6 < sum(weight.numel() for weight in model.parameters()) < 12e6
    assert json.loads((BASE / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 1024
    text = "given persona: I like cats.; context: Q: ¿Qué tal? 🙂 it's  me R:"
    ids = tokenizer(text)["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


def nats_per_token(model: PreTrainedModel, context: list[int], response: list[int]) -> torch.Tensor:
    """Return the cross entropies [R] of `response` after `context`."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none")


def test_base_knows_dialogue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replies of the valid split cost far less than uniform (8.3 nats) and than a wrong order."""
    examples = list(islice(read("embedded:valid"), 0, None, 24))
    assert len(examples) > 10
    encoded = [encode(example, tokenizer, 256) for example in examples]
    rng = random.Random(0)
    right, shuffled = [], []
    for one in encoded:
        right.append(nats_per_token(model, one.context_ids, one.response_ids))
        jumbled = (
            rng.sample(one.context_ids, len(one.context_ids)),
            rng.sample(one.response_ids, len(one.response_ids)),
        )
        shuffled.append(nats_per_token(model, *jumbled))
    mean, control = float(torch.cat(right).mean()), float(torch.cat(shuffled).mean())
    assert mean < 4.0
    assert mean < control - 2.0
