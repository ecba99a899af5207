"""A quantised base sharded by ZeRO-3 trains on the same numbers as one process, and what moves are
its bytes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spt_ds import dist
from spt_ds.config.model import ModelConfig
from spt_ds.config.schema import Config
from spt_ds.engine.zero import Sharding, local_bytes
from spt_ds.errors import ModelError
from spt_ds.model.backbone import Backbone, load_lm
from spt_ds.model.loading import load_base_config
from spt_ds.model.quant import QuantLinear
from spt_ds.placement.ds_check import plan_of_file, plan_of_kind
from spt_ds.placement.estimate import BaseShape
from tests.distributed.test_communication import counted
from tests.distributed.test_equal import skip_without_async_io
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import random_batch, tiny_lm, tiny_spt

SIZES = {  # wide beside the vocabulary of 61: embeddings and norms are 2 % of the weights
    "opt": {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256, "num_hidden_layers": 3},
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3},
}
NOTHING_RESIDENT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}
WIDE = {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 1024, "num_hidden_layers": 1}
NVME_FILE = str(Path(__file__).parents[2] / "ds_configs" / "zero3_offload_nvme.json")
Case = tuple[
    str, int, str, dict[str, Any]
]  # architecture, bits, activation checkpointing, quant section
CASES: list[Case] = [
    ("opt", 4, "off", {"double_quant": True}),
    ("opt", 8, "off", {}),
    ("llama", 4, "off", {}),
    ("llama", 8, "off", {"block_size": 256}),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two tiny bases with bf16 weights."""
    out = {}
    for arch in ("opt", "llama"):
        folder = tmp_path_factory.mktemp(arch)
        tiny_lm(arch, torch.bfloat16, **SIZES[arch]).save_pretrained(folder)
        out[arch] = str(folder)
    return out


def open_base(
    world: dist.World,
    folder: str,
    bits: int,
    placement: str,
    checkpointing: str = "off",
    **quant: Any,
) -> tuple[Any, Sharding]:
    """Load `folder` as a run does; returns the root module and what keeps its shards alive."""
    config = ModelConfig.model_validate({"base": folder, "base_bits": bits, "quant": quant})
    if placement == "nvme":
        shape = BaseShape.from_config(load_base_config(config).to_dict())
        plan = plan_of_file(NVME_FILE, Config(model=config), shape, world.size)
    else:
        plan = plan_of_kind(placement, Config(), world.size)  # type: ignore[arg-type]
    if plan.stage == 3:
        zero = {**plan.engine_config["zero_optimization"], **NOTHING_RESIDENT}
        plan = replace(plan, engine_config={**plan.engine_config, "zero_optimization": zero})
    sharding = Sharding(plan, world.device)
    sharding.before_load()
    lm = load_lm(config, load_base_config(config), sharding.shard_function())
    backbone = Backbone(lm, "sdpa", check_quantised=bits < 16)
    backbone.checkpoint_activations(checkpointing)
    return sharding.wrap(backbone), sharding


def train(root: Any) -> tuple[list[float], list[list[float]], list[int]]:
    """Two accumulated backward passes, evaluation and generation between them: losses, gradients,
    tokens.
    """
    spt = tiny_spt(root, dtype=torch.float32)
    batch = random_batch([(5, 3), (7, 2)])
    first = root(spt.micro_losses, batch, 2, 5)
    first.total.backward()
    with torch.no_grad():
        between = root(spt.micro_losses, batch, 2, 5)
        prompt = torch.arange(3, 9)[None]
        tokens = root(
            lambda base: base.generate(
                inputs_embeds=base.embed(prompt),
                max_new_tokens=2,
                do_sample=False,
                synced_gpus=dist_on(root),
            )
        )
    second = root(spt.micro_losses, random_batch([(4, 4), (6, 3)], seed=5), 2, 7)
    second.total.backward()
    losses = [out.total.item() for out in (first, between, second)]
    grads = [p.grad.flatten().tolist() for p in spt.trainables.parameters() if p.grad is not None]
    return losses, grads, tokens[0].tolist()


def dist_on(root: Any) -> bool:
    """Whether the weights of `root` are sharded."""
    return any(hasattr(p, "ds_tensor") for p in root.parameters())


def run_cases(
    world: dist.World, bases: dict[str, str], placement: str, cases: list[Case]
) -> list[Any]:
    """Train each case on this rank."""
    out = []
    for arch, bits, checkpointing, quant in cases:
        root, _ = open_base(world, bases[arch], bits, placement, checkpointing, **quant)
        root(lambda base: base.check())
        out.append(train(root))
    return out


@pytest.fixture(scope="module")
def alone(bases: dict[str, str]) -> list[Any]:
    """What the unsharded single process gets for `CASES`."""
    return run_ranks(1, run_cases, bases, "replicate", CASES)[0]


def assert_same(got: list[Any], expected: list[Any]) -> None:
    for (losses, grads, tokens), (their_losses, their_grads, their_tokens) in zip(
        got, expected, strict=True
    ):
        assert losses == their_losses
        assert tokens == their_tokens
        assert grads == their_grads
        assert all(any(grad) for grad in grads)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_gradients_and_tokens_equal_one_process_bit_for_bit(
    ranks: int, bases: dict[str, str], alone: list[Any]
) -> None:
    for result in run_ranks(ranks, run_cases, bases, "zero3", CASES):
        assert_same(result, alone)


def test_the_same_with_recomputed_activations_and_shards_in_host_memory(
    bases: dict[str, str], alone: list[Any]
) -> None:
    cases = [
        (arch, bits, mode, quant)
        for (arch, bits, _, quant), mode in zip(
            CASES, ["non_reentrant", "reentrant"] * 2, strict=True
        )
    ]
    for result in run_ranks(2, run_cases, bases, "zero3_offload", cases):
        assert_same(result, alone)


def swapped(world: dist.World, folder: str, cases: list[Case]) -> list[Any]:
    """Train each case with the shards on a disk; return the layers on the disk, and the results."""
    out = []
    for _, bits, checkpointing, quant in cases:
        root, sharding = open_base(world, folder, bits, "nvme", checkpointing, **quant)
        root(lambda base: base.check())
        on_disk = [
            name
            for name, module in root.lm.named_modules()
            if isinstance(module, QuantLinear) and module.packed.ds_tensor.final_location == "nvme"  # type: ignore[attr-defined]
        ]
        out.append((on_disk, train(root)))
        sharding.close()
    return out


def test_shards_on_a_disk_come_back_as_the_bytes_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: dict[str, str]
) -> None:
    skip_without_async_io()
    monkeypatch.setenv("SPT_NVME_PATH", str(tmp_path))
    folder = str(tmp_path / "wide")
    tiny_lm("opt", torch.bfloat16, **WIDE).save_pretrained(folder)
    cases: list[Case] = [("opt", 4, "off", {"double_quant": True}), ("opt", 8, "non_reentrant", {})]
    alone = run_ranks(1, run_cases, {"opt": folder}, "replicate", cases)[0]
    for result in run_ranks(2, swapped, folder, cases):
        for on_disk, _ in result:
            assert {"model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"} <= set(on_disk)
        assert_same([got for _, got in result], alone)


def test_k_prompts_folded_over_nf4_gather_ten_times_less_than_k_passes_over_bf16(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=256,
    )
    LlamaForCausalLM(base).save_pretrained(tmp_path)
    rows = run_ranks(2, counted, str(tmp_path), [4], [16, 4])[0]
    by = {(row["bits"], row["way"], row["checkpointing"]): row["bytes"] for row in rows}
    for recompute in ("off", "non_reentrant"):
        assert by[16, "K passes", recompute] >= 10 * by[4, "one pass", recompute]


def bytes_of_a_step(
    world: dist.World, bases: dict[str, str]
) -> dict[tuple[str, int], tuple[int, int]]:
    """Per architecture and bits: bytes of weights that this rank owns, and bytes it gathers in one
    training pass.
    """
    from deepspeed.runtime.zero import partition_parameters

    gather, counted = partition_parameters._dist_allgather_fn, [0]

    def counting(shard: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        counted[0] += whole.numel() * whole.element_size()
        return gather(shard, whole, group)

    partition_parameters._dist_allgather_fn = counting
    out = {}
    for arch, bits in itertools.product(bases, (16, 8, 4)):
        root, _ = open_base(world, bases[arch], bits, "zero3")
        spt = tiny_spt(root, dtype=torch.float32)
        counted[0] = 0
        root(spt.micro_losses, random_batch([(5, 3), (7, 2)]), 2, 5).total.backward()
        out[arch, bits] = local_bytes(root), counted[0]
    return out


def test_a_rank_owns_and_gathers_the_packed_bytes(bases: dict[str, str]) -> None:
    for sizes, arch in itertools.product(run_ranks(2, bytes_of_a_step, bases), bases):
        (owned, gathered), (owned_8, gathered_8), (owned_4, gathered_4) = (
            sizes[arch, bits] for bits in (16, 8, 4)
        )
        assert owned_4 <= 0.32 * owned
        assert owned_8 <= 0.55 * owned
        assert 3 * gathered_4 <= gathered
        assert gathered_8 <= 0.55 * gathered


def damage(world: dist.World, folder: str) -> str:
    """Flip one bit of one layer's shard on the last rank; the text with which the check refuses, on
    each rank.
    """
    root, _ = open_base(world, folder, 4, "zero3")
    root(lambda base: base.check())
    layers = {name: m for name, m in root.lm.named_modules() if isinstance(m, QuantLinear)}
    if world.rank == world.size - 1:
        layers["model.layers.1.mlp.up_proj"].packed.ds_tensor[5] ^= 1  # type: ignore[attr-defined]
    try:
        root(lambda base: base.check())
    except ModelError as error:
        return str(error)
    return "nothing found"


def test_self_check_names_the_layer_whose_shard_is_damaged(bases: dict[str, str]) -> None:
    for text in run_ranks(2, damage, bases["llama"]):
        assert (
            "model.layers.1.mlp.up_proj: its bytes are not those that were loaded (1 of 21 layers"
            in text
        )


def random_bytes(world: dist.World, folder: str, seed: int) -> list[int]:
    """Fingerprints of a random base, drawn on a rank whose own random numbers differ."""
    torch.manual_seed(seed + world.rank)
    sharding = Sharding(plan_of_kind("zero3", Config(), world.size), world.device)
    sharding.before_load()
    config = ModelConfig(base=folder, base_bits=8, random_init=True)
    lm = load_lm(config, load_base_config(config), sharding.shard_function())
    root = sharding.wrap(Backbone(lm, "sdpa", check_quantised=True))
    root(lambda base: base.check())
    return [m.fingerprint for m in lm.modules() if isinstance(m, QuantLinear)]


def test_random_weights_are_the_same_on_every_rank_and_unlike_from_layer_to_layer(
    bases: dict[str, str],
) -> None:
    first, second = run_ranks(2, random_bytes, bases["opt"], 1)
    assert first == second
    assert len(set(first)) == len(first) > 0


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_base_while_it_is_loaded(tmp_path: Path) -> None:
    """A base of 850 MB: the limit (share + one layer + 200 MiB) is below the whole of it, at 4 bits
    as at 16.
    """
    script = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
    command = [sys.executable, str(script), "--layers", "32", "--bits", "4", "16", "--ranks", "2"]
    found = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=540
    )
    result = json.loads(found.stdout.splitlines()[-1])
    base_mib = result["base_mb"] * 1e6 / 2**20
    whole = {4: 0.31 * base_mib, 16: base_mib}  # at 4 bits embeddings and head keep 16
    assert [row["bits"] for row in result["rows"]] == list(whole)
    for row in result["rows"]:
        assert row["share_mib"] == pytest.approx(whole[row["bits"]] / 2, rel=0.03), row
        assert row["limit_mib"] < base_mib, "the limit must be one that a whole base fails"
        assert row["growth_mib"] <= row["limit_mib"], row
    assert found.returncode == 0, found.stderr
