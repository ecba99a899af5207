"""Options of the baselines and what they refuse; texts of few-shot prompting and of no persona;
planned memory.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from spt_ds.batch import Packed
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.data.encode import ContextStyle, encode_context
from spt_ds.data.shots import worked_examples
from spt_ds.data.sources import build_store
from spt_ds.data.store import ExampleStore
from spt_ds.errors import ConfigError, DataError, EngineError
from spt_ds.model.attention import PACKED
from spt_ds.model.backbone import Backbone
from spt_ds.model.baselines import build_base_trainables
from spt_ds.model.rows import target_states
from spt_ds.placement.choose import place_base
from spt_ds.placement.estimate import BaseShape, needs_of, trainable_bytes
from spt_ds.placement.memory import GIB, Memory
from tests.helpers.tiny import make_batch
from tests.helpers.tokenizers import byte_tokenizer

BYTES = byte_tokenizer()
BOS, EOS = 256, 257
NO_PROMPTS = {
    "prompts": {"count": 1, "tokens": 0},
    "losses": {"selection": 0, "fusion": 0, "contrastive": 0},
}


@pytest.mark.parametrize(
    ("recipe", "overrides", "parts"),
    [
        (
            "demo",
            ["prompts.tokens=0"],
            ["prompts.tokens is 0", "method.type: spt", "lora, full, none"],
        ),
        (
            "demo",
            ["method.type=lora", "prompts.position=before_reply"],
            [
                "method.type: lora has no soft prompts",
                "set prompts.count: 1 (got 4), prompts.tokens: 0 (got 8)",
                "prompts.position: before_text (got before_reply)",
                "losses.selection: 0 (got 1.0)",
                "losses.fusion: 0 (got 1.0)",
                "losses.contrastive: 0 (got 1.0)",
            ],
        ),
        (
            "baseline-lora",
            ["model.base_bits=4"],
            ["model.base_bits is 4", "set model.base_bits: 16 or 32"],
        ),
        (
            "baseline-full",
            ["model.base_bits=16"],
            ["model.base_bits is 16", "set model.base_bits: 32"],
        ),
        (
            "baseline-full",
            ["model.activation_checkpointing=reentrant"],
            ["activation_checkpointing: reentrant loses", "non_reentrant, off or auto"],
        ),
        (
            "baseline-lora",
            ["engine.placement=zero3"],
            ["engine.placement is zero3", "set engine.placement: replicate or auto"],
        ),
        (
            "baseline-full",
            ["engine.placement=zero3_offload"],
            ["engine.placement is zero3_offload", "set engine.placement: replicate or auto"],
        ),
        (
            "baseline-lora",
            ["data.few_shot=2"],
            [
                "data.few_shot is 2 and method.type lora",
                "set method.type: none, or data.few_shot: 0",
            ],
        ),
        ("baseline-lora", ["method.lora.rank=0"], ["method.lora.rank"]),
        ("baseline-lora", ["method.type=dora"], ["method.type", "'spt', 'lora', 'full' or 'none'"]),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "full", "none"])
def test_a_base_that_trains_is_copied_to_each_rank_or_refused(kind: str) -> None:
    shape = BaseShape.from_config(LlamaConfig().to_dict())
    config = Config.model_validate(
        {"method": {"type": kind}, "model": {"base_bits": 32}, **NO_PROMPTS}
    )
    found, why = place_base(config, needs_of(config, shape, 4), 4, Memory(200 * GIB, None))
    assert found == "replicate", why
    assert kind == "none" or f"method.type: {kind} trains weights in it" in why
    scarce = 20 * GIB  # a share fits, the whole of 25 GiB does not
    if kind == "none":
        assert place_base(config, needs_of(config, shape, 4), 4, Memory(scarce, None))[0] == "zero3"
        return
    with pytest.raises(EngineError) as caught:
        place_base(config, needs_of(config, shape, 4), 4, Memory(scarce, 1000 * GIB))
    for part in (
        "base 25.",
        f"method.type: {kind}",
        "train.micro_batch",
        "engine.placement: replicate",
    ):
        assert part in str(caught.value)


SMALL = {
    "opt": OPTConfig(
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        word_embed_proj_dim=128,
        vocab_size=100,
        max_position_embeddings=96,
        activation_function="relu",
    ),
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=96,
    ),
}
EVERY = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize(("kind", "bits"), [("full", 32), ("lora", 32), ("lora", 16)])
@pytest.mark.parametrize("name", SMALL)
def test_planned_memory_is_that_which_is_counted(name: str, kind: str, bits: int) -> None:
    """Adapters in every linear layer: the most there can be. Norms and biases of a whole base are
    left out.
    """
    method = {"type": kind, "lora": {"rank": 2, "targets": EVERY[name]}}
    config = Config.model_validate({"method": method, "model": {"base_bits": bits}, **NO_PROMPTS})
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    lm = AutoModelForCausalLM.from_config(SMALL[name], dtype=dtype, attn_implementation=PACKED)
    backbone = Backbone(lm, "sdpa")
    trainables = build_base_trainables(config, backbone, 0)
    shape = BaseShape.from_config(SMALL[name].to_dict())
    states = (12 if kind == "full" else 16) * sum(p.numel() for p in trainables.parameters())
    planned = trainable_bytes(config, shape)
    assert planned == states if kind == "lora" else 0.97 * states < planned <= states
    counted = kept_bytes(backbone, trainables.bank.weight)
    planned = shape.activation_bytes(2 * 64, bits, recompute=False, trained=True)
    assert 0.95 * counted <= planned <= 1.5 * counted
    frozen = shape.activation_bytes(2 * 64, bits, recompute=False)
    assert frozen < 0.9 * counted  # what SPT keeps would not do


def kept_bytes(backbone: Backbone, bank: torch.Tensor) -> int:
    """Bytes of activations that two rows of 64 tokens keep."""
    batch = make_batch([torch.arange(56) % 100] * 2, [torch.arange(9) % 100] * 2)
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is given twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (
            tensor.is_floating_point() or tensor.dtype == torch.bool
        ) and storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed = Packed.from_batch(batch, bank.shape[1], bank.device, suffix=False)
        every = bank[:, None].expand(-1, 2, -1, -1)
        target_states(backbone, packed, backbone.embed(packed.ids), every, None)
    return sum(storage.nbytes() for storage in held.values())


def write(path: Path, *dialogues: tuple[str, list[str]]) -> str:
    rows = [
        {
            "id": f"d{n}",
            "persona": [persona] if persona else [],
            "turns": turns,
            "first_speaker": "partner",
        }
        for n, (persona, turns) in enumerate(dialogues)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def store_of(source: str, folder: Path, max_tokens: int = 400, **style: Any) -> ExampleStore:
    return build_store(
        source,
        BYTES,
        max_tokens=max_tokens,
        cache_dir=str(folder / "cache"),
        style=ContextStyle(**style),
    )


TWO = [("i ski.", ["hi", "yes"]), ("i cook.", ["you?", "no"])]
SHOWN = {
    True: [
        b"given persona: i ski.; context: Q: hi R: yes",
        b"given persona: i cook.; context: Q: you? R: no",
    ],
    False: [b"context: Q: hi R: yes", b"context: Q: you? R: no"],
}


@pytest.mark.parametrize("persona", [True, False])
def test_few_shot_texts_of_a_known_case(tmp_path: Path, persona: bool) -> None:
    train = store_of(write(tmp_path / "train.jsonl", *TWO), tmp_path, persona=persona)
    orders = set()
    for seed in range(8):
        shots = worked_examples(train, BYTES, 2, 400, seed, ContextStyle(persona))
        assert shots == worked_examples(train, BYTES, 2, 400, seed, ContextStyle(persona))
        orders.add(shots)
    assert orders == {(*a, EOS, *b, EOS) for a, b in permutations(SHOWN[persona])}
    source = write(tmp_path / "test.jsonl", ("i run.", ["so?", "ok", "why"]))
    store = store_of(source, tmp_path, persona=persona, shots=shots)
    own = b"given persona: i run.; context: Q: so? R:" if persona else b"context: Q: so? R:"
    context, response = store.ids([0])
    assert context.tolist() == [BOS, *shots, *own]
    assert response.tolist() == [*b" ok", EOS]
    style = ContextStyle(persona, shots)
    assert (
        encode_context(("i run.",), ("so?",), BYTES, 400, style=style).context_ids
        == context.tolist()
    )


def test_what_is_shown_is_part_of_the_cache(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *TWO)
    kinds: list[dict[str, Any]] = [{}, {"persona": False}, {"shots": (1, 2)}, {"shots": (1, 3)}]
    stores = [store_of(source, tmp_path, **kind) for kind in kinds]
    assert len({store.data_hash for store in stores}) == 4
    assert store_of(source, tmp_path, persona=False).data_hash == stores[1].data_hash
    with_persona, without = (
        1 + len(b"given persona: i ski.; context: Q: hi R:"),
        1 + len(b"context: Q: hi R:"),
    )
    assert [len(store.ids([0])[0]) for store in stores] == [
        with_persona,
        without,
        with_persona + 2,
        with_persona + 2,
    ]


def test_no_persona_is_kept_for_the_reader_but_not_for_the_method(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *TWO)
    hidden, plain = store_of(source, tmp_path, persona=False), store_of(source, tmp_path)
    assert hidden[0]["persona"] == plain[0]["persona"] == ["i ski."]
    assert plain.texts([0, 1]) == [(["i ski."], ["hi"]), (["i cook."], ["you?"])]
    assert hidden.texts([0, 1]) == [([], ["hi"]), ([], ["you?"])]


def test_worked_examples_lose_their_oldest_turns_and_come_from_different_dialogues(
    tmp_path: Path,
) -> None:
    long = [f"turn number {n}" for n in range(8)]
    train = store_of(
        write(tmp_path / "train.jsonl", ("", long), ("", ["a", "b"]), ("", ["x" * 99, "y" * 99])),
        tmp_path,
    )
    for seed in range(6):
        shots = worked_examples(train, BYTES, 2, 200, seed, ContextStyle())
        parts = bytes(256 * (token == EOS) or token for token in shots if token != EOS)
        assert shots.count(EOS) == 2
        assert shots[-1] == EOS
        assert len(shots) <= 100
        assert (
            parts.count(b"context: Q: a R: b") == 1
        )  # the one other dialogue whose reply fits into 50 tokens
        assert b"turn number" in parts


def test_worked_examples_that_do_not_fit_are_named(tmp_path: Path) -> None:
    train = store_of(write(tmp_path / "train.jsonl", *TWO), tmp_path)
    with pytest.raises(DataError) as caught:
        worked_examples(train, BYTES, 3, 400, 0, ContextStyle())
    assert "2 dialogues have an example that fits into 66 tokens" in str(caught.value)
    assert "3 are needed; raise data.max_tokens or lower data.few_shot" in str(caught.value)
    source = write(tmp_path / "test.jsonl", ("i run.", ["so?", "ok"]))
    shots = worked_examples(train, BYTES, 2, 400, 0, ContextStyle())
    with pytest.raises(
        DataError, match=r"of it the worked examples of data.few_shot.*lower data.few_shot"
    ):
        store_of(source, tmp_path, max_tokens=100, shots=shots)


def test_a_frozen_base_has_nothing_to_train() -> None:
    backbone = Backbone(
        AutoModelForCausalLM.from_config(SMALL["opt"], attn_implementation=PACKED), "sdpa"
    )
    config = Config.model_validate({"method": {"type": "none"}, **NO_PROMPTS})
    trainables: nn.Module = build_base_trainables(config, backbone, 0)
    assert trainable_bytes(config, BaseShape.from_config(SMALL["opt"].to_dict())) == 0
    assert list(trainables.parameters()) == []
    assert not any(p.requires_grad for p in backbone.parameters())
