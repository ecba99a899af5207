"""Compiled decoder layers: as many graphs for any rows, and the numbers of eager ones.

The fast tests trace and differentiate without making kernels; the slow ones make them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from spt_ds.errors import ModelError
from spt_ds.model import compiled, graph_attention
from spt_ds.model.backbone import Backbone
from spt_ds.model.compiled import check_compiled, compile_layers, decoder_layers, leave_eager
from tests.helpers.tiny import random_batch, tiny_backbone, tiny_spt
from tests.helpers.tolerances import assert_steps_close
from tests.numerics.steps import our_step

# With a graph for the backward pass and without; in suffix placement the contexts' too.
GRAPHS = {"prefix": 2, "suffix": 3}


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def compare(
    placement: str, arch: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Ten packings through eager and compiled layers; the check at the start makes all graphs."""
    eager, fast = (tiny_backbone(arch, dtype, **options) for _ in range(2))
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    spt = tiny_spt(eager, dtype=precise, prompts={"placement": placement})
    assert compile_layers(fast) == options.get("num_hidden_layers", 2)
    check_compiled(fast, suffix=placement == "suffix")
    assert graphs() == GRAPHS[placement]
    for n in range(10):
        lens = [(4 + n + row, 1 + (n * row) % 5) for row in range(1 + n % 4)]
        batch = random_batch(lens, seed=n)
        assert_steps_close(our_step(fast, spt, [batch]), our_step(eager, spt, [batch]), dtype)
        with torch.no_grad():
            fast(spt.micro_losses, batch, 1, 1)
    assert graphs() == GRAPHS[placement]


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_all_packings_and_layers_share_their_graphs(placement: str, layers: int) -> None:
    compare(placement, num_hidden_layers=layers)


@pytest.mark.parametrize(
    ("placement", "arch", "dtype", "options"),
    [
        ("prefix", "opt", torch.bfloat16, {"backend": "varlen"}),
        ("suffix", "gemma", torch.float64, {"backend": "varlen"}),
        ("suffix", "llama", torch.bfloat16, {"checkpointing": "non_reentrant"}),
    ],
)
def test_other_bases_kernels_and_dtypes(
    placement: str, arch: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    compare(placement, arch, dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_kernels_give_the_same_numbers(
    placement: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    compare(placement, dtype=dtype)


def ready(**options: Any) -> Backbone:
    backbone = tiny_backbone("llama", torch.float32, **options)
    compile_layers(backbone)
    return backbone


def test_the_check_sees_keys_of_another_layer() -> None:
    backbone = ready()
    for module in backbone.lm.modules():
        if hasattr(module, "layer_number"):
            module.layer_number = torch.tensor(0)
    with pytest.raises(ModelError, match="other numbers than the eager one"):
        check_compiled(backbone, suffix=True)


def test_the_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = graph_attention._heads_last
    monkeypatch.setattr(graph_attention, "_heads_last", lambda tensor: 0.9 * right(tensor))
    with pytest.raises(ModelError, match="other numbers than the eager one"):
        check_compiled(ready(), suffix=False)


@pytest.mark.slow
def test_the_check_sees_keys_that_are_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setattr(graph_attention, "_kept", lambda tensor: tensor)
    # As many keys as a token has numbers, so that another tensor fits into their place.
    backbone = ready(num_key_value_heads=4)
    with pytest.raises(ModelError, match="other numbers than the eager one"):
        check_compiled(backbone, suffix=True)


def test_a_layout_lives_as_long_as_its_graph() -> None:
    backbone = ready()
    spt = tiny_spt(backbone, dtype=torch.float32, prompts={"placement": "suffix"})
    batch = random_batch([(5, 3), (4, 2)])
    out = backbone(spt.micro_losses, batch, 2, 5)
    gc.collect()
    assert len(graph_attention._layouts) == 2  # the contexts and their branches
    out.total.backward()
    del out
    gc.collect()
    assert not graph_attention._layouts


def test_decoding_and_layers_that_are_left_make_no_graph() -> None:
    backbone, plain = ready(), tiny_backbone("llama", torch.float32)
    mask = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        found, right = (
            base.next_logits(mask, DynamicCache(), input_ids=mask + 3) for base in (backbone, plain)
        )
    assert torch.equal(found, right)
    leave_eager(backbone)
    assert len(decoder_layers(backbone.lm)) == 2
    spt = tiny_spt(backbone, dtype=torch.float32)
    our_step(backbone, spt, [random_batch([(5, 3)])])
    assert graphs() == 0


def test_the_names_of_the_weights_stay() -> None:
    plain = tiny_backbone("llama", torch.float32)
    assert ready().state_dict().keys() == plain.state_dict().keys()
