"""The memory arithmetic against counted parameters and counted saved activations, and the choices
made from it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from spt_ds.config.schema import Config
from spt_ds.errors import EngineError, ModelError
from spt_ds.model.attention import PACKED, Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.rows import read_context, target_states
from spt_ds.placement.choose import choose_checkpointing, place_base
from spt_ds.placement.estimate import (
    FIXED_BYTES,
    BaseShape,
    needs_of,
    step_bytes,
    trainable_bytes,
)
from spt_ds.placement.memory import (
    GIB,
    USABLE,
    Memory,
    host_memory_per_rank,
    memory_per_rank,
)
from tests.helpers.tiny import make_batch, tiny_spt


def opt(hidden: int, layers: int, heads: int, embed: int | None = None) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=embed or hidden,
    )


def llama(
    hidden: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int, **more: Any
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocabulary,
        **more,
    )


BASES: dict[str, PretrainedConfig] = {
    "opt-125m": opt(768, 12, 12),
    "opt-350m": opt(1024, 24, 16, embed=512),
    "opt-6.7b": opt(4096, 32, 32),
    "llama-2-7b": llama(4096, 32, 32, 32, 11008, 32000),
    "llama-2-70b": llama(8192, 80, 64, 8, 28672, 32000),
    "llama-3-8b": llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3.2-1b": llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True),
    "qwen2-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "gemma2-2b": Gemma2Config(),
    "gpt2": GPT2Config(),
    "gpt-neox": GPTNeoXConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8
    ),
    "phi": PhiConfig(),
    "mixtral-8x7b": MixtralConfig(),
}


def shape_of(name: str) -> BaseShape:
    return BaseShape.from_config(BASES[name].to_dict())


@pytest.mark.parametrize("name", BASES)
def test_parameters_are_those_that_are_counted(name: str) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(BASES[name])
    counted = sum(parameter.numel() for parameter in lm.parameters())
    assert (
        0.985 * counted <= shape_of(name).parameters <= counted
    )  # norms, biases and positions are left out
    assert shape_of(name).base_bytes(32) == 4 * shape_of(name).parameters
    assert shape_of(name).base_bytes(16) == 2 * shape_of(name).parameters


def test_a_quantised_base_keeps_its_tables() -> None:
    shape = shape_of("llama-2-7b")
    tables, layers = 2 * 32000 * 4096 * 2, 32 * shape.layer_parameters
    assert shape.base_bytes(8) == tables + layers + layers // 16
    assert shape.base_bytes(4) == tables + layers // 2 + layers // 16


def test_a_configuration_without_sizes_is_named() -> None:
    with pytest.raises(ModelError, match="none of num_hidden_layers, n_layer"):
        BaseShape.from_config({"hidden_size": 8, "num_attention_heads": 2})


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


def kept_bytes(name: str, dtype: torch.dtype, recompute: str, placement: str) -> tuple[int, int]:
    """Bytes of activations that one micro-batch keeps, and packed tokens that carry a gradient: 2
    rows, K 4, P 8.
    """
    lm = AutoModelForCausalLM.from_config(SMALL[name], dtype=dtype, attn_implementation=PACKED)
    backbone = Backbone(lm, "sdpa")
    backbone.checkpoint_activations(recompute)
    spt = tiny_spt(
        backbone, count=4, tokens=8, dtype=torch.float32, prompts={"placement": placement}
    )
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
        every = spt.trainables.bank.weight[:, None].expand(-1, 2, -1, -1)
        packed = spt.pack(batch)
        text = backbone.embed(packed.ids)
        read = read_context(backbone, packed, text)
        target_states(backbone, packed, text, every, read)
    tokens = (
        2 * 4 * (8 + 8 + (56 if placement == "prefix" else 0))
    )  # a response's last token is never read
    return sum(storage.nbytes() for storage in held.values()), tokens


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_those_that_are_kept(name: str, bits: int) -> None:
    shape = BaseShape.from_config(SMALL[name].to_dict())
    counted, tokens = kept_bytes(
        name, torch.bfloat16 if bits == 16 else torch.float32, "off", "prefix"
    )
    assert 0.97 * counted <= shape.activation_bytes(tokens, bits, recompute=False) <= 1.25 * counted


@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", SMALL)
def test_recomputed_activations_are_inputs_of_layers_and_one_layer(name: str, mode: str) -> None:
    """What the forward pass keeps, and one layer's worth that the backward pass makes again."""
    shape = BaseShape.from_config(SMALL[name].to_dict())
    inputs, tokens = kept_bytes(name, torch.float32, mode, "prefix")
    everything, _ = kept_bytes(name, torch.float32, "off", "prefix")
    counted = inputs + everything / shape.layers
    assert 0.95 * counted <= shape.activation_bytes(tokens, 32, recompute=True) <= 1.2 * counted


@pytest.mark.parametrize("name", SMALL)
def test_branches_keep_what_rows_of_their_own_keep(name: str) -> None:
    """Attention to a shared context keeps nothing of the context in its layers."""
    shape = BaseShape.from_config(SMALL[name].to_dict())
    counted, tokens = kept_bytes(name, torch.float32, "off", "suffix")
    assert 0.97 * counted <= shape.activation_bytes(tokens, 32, recompute=False) <= 1.25 * counted


@pytest.mark.parametrize("name", SMALL)
def test_a_shared_context_costs_its_keys_and_values(name: str) -> None:
    backbone = Backbone(
        AutoModelForCausalLM.from_config(SMALL[name], attn_implementation=PACKED), "sdpa"
    )
    positions = torch.cat([torch.arange(40), torch.arange(16)])
    context = Layout((40, 16), positions, "sdpa", record=True)
    backbone.run(torch.zeros(56, 128), context)
    counted = sum(t.untyped_storage().nbytes() for pair in context.recorded.values() for t in pair)
    assert BaseShape.from_config(SMALL[name].to_dict()).context_bytes(56, 32) == counted


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", SMALL)
def test_reading_a_context_costs_one_layer_at_a_time(name: str, bits: int) -> None:
    tokens, dtype = 2000, torch.bfloat16 if bits == 16 else torch.float32
    config = copy.deepcopy(SMALL[name])
    config.max_position_embeddings = tokens + 8
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    backbone = Backbone(lm, "sdpa")
    context = Layout((tokens,), torch.arange(tokens), "sdpa", record=True)
    text = torch.zeros(tokens, 128, dtype=dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        backbone.run(text, context)
    moves = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(moves, key=lambda e: e.start_ns())])
    counted = held.max() - held[-1]  # what is left are keys and values, and the states
    shape = BaseShape.from_config(config.to_dict())
    assert 0.97 * counted <= shape.reading_bytes(tokens, bits) <= 1.2 * counted


def run(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("name", "bits", "ranks", "gib", "placement"),
    [
        ("opt-125m", 16, 2, 24, "replicate"),
        ("llama-2-7b", 16, 8, 68, "replicate"),  # an 80 GB card: sharding would only cost
        ("llama-2-7b", 16, 4, 14, "zero3"),
        ("llama-2-7b", 16, 1, 12, "zero3_offload"),  # nobody to share with
        ("llama-2-70b", 16, 8, 68, "zero3"),
        ("llama-2-70b", 16, 2, 40, "zero3_offload"),
        ("llama-2-70b", 4, 1, 68, "replicate"),
    ],
)
def test_placement_follows_from_sizes(
    name: str, bits: int, ranks: int, gib: int, placement: str
) -> None:
    config = run(model={"base_bits": bits})
    found, why = place_base(
        config, needs_of(config, shape_of(name), ranks), ranks, Memory(gib * GIB, 100 * GIB)
    )
    assert found == placement, why
    assert why.startswith(f"placement: {placement} (base ")
    assert "GiB" in why


def test_a_configured_placement_is_kept() -> None:
    config = run(engine={"placement": "zero3"})
    found, why = place_base(
        config, needs_of(config, shape_of("gpt2"), 2), 2, Memory(80 * GIB, None)
    )
    assert (found, why) == ("zero3", "placement: zero3 (as configured)")


def test_recomputation_follows_from_sizes() -> None:
    small, large = run(train={"micro_batch": 1}), run(train={"micro_batch": 32})
    shape = shape_of("llama-2-7b")
    used, why = choose_checkpointing(small, needs_of(small, shape, 1), "replicate", 68 * GIB)
    assert used == "off", why
    used, why = choose_checkpointing(large, needs_of(large, shape, 1), "replicate", 68 * GIB)
    assert used == "non_reentrant", why
    assert "do not fit" in why
    asked = run(model={"activation_checkpointing": "reentrant"})
    assert choose_checkpointing(asked, needs_of(asked, shape, 2), "zero3", GIB)[0] == "reentrant"


@pytest.mark.parametrize("position", ["before_text", "before_reply"])
def test_a_budget_of_tokens_bounds_the_activations(position: str) -> None:
    shape = shape_of("llama-2-7b")

    def kept(budget: int) -> int:
        train = {"micro_batch": 64, "micro_batch_tokens": budget}
        return step_bytes(run(train=train, prompts={"position": position}), shape, recompute=False)

    assert kept(1) < kept(8192) < kept(16384) < kept(0)
    # In the limit it is proportional to the budget.
    assert kept(200_000) / kept(100_000) == pytest.approx(2, rel=1e-6)


def test_a_long_context_needs_what_one_layer_needs_to_read_it() -> None:
    shape = BaseShape.from_config(BASES["llama-3.2-1b"].to_dict())

    def needed(window: int) -> int:
        sections: dict[str, Any] = {
            "prompts": {"position": "before_reply"},
            "data": {"max_tokens": window},
        }
        return step_bytes(run(**sections), shape, recompute=True) - shape.context_bytes(
            4 * window, run(**sections).model.base_bits
        )

    assert needed(256) == needed(512), "the branches keep more"
    assert needed(32_768) == 2 * needed(16_384) > 2 * needed(512)


def test_shared_contexts_need_less_than_rows_of_their_own() -> None:
    shape = shape_of("llama-2-7b")
    prefix, suffix = (run(prompts={"position": at}) for at in ("before_text", "before_reply"))
    for recompute in (False, True):
        ours = step_bytes(suffix, shape, recompute=recompute)
        assert ours < step_bytes(prefix, shape, recompute=recompute) / 2


@pytest.mark.parametrize("retriever", [{}, {"projections": "shared"}, {"keys": "learned"}], ids=str)
def test_trainables_are_counted_with_gradient_and_moments(retriever: dict[str, str]) -> None:
    """Four copies in fp32: weights, gradients, two moments."""
    from spt_ds.model.spt import Trainables

    lm = AutoModelForCausalLM.from_config(SMALL["opt"], attn_implementation=PACKED)
    backbone = Backbone(lm, "sdpa")
    spt = tiny_spt(backbone, count=4, tokens=8, dtype=torch.float32, retriever=retriever)
    assert isinstance(spt.trainables, Trainables)
    counted = sum(p.numel() * 16 for p in spt.trainables.parameters())
    assert trainable_bytes(spt.config, BaseShape.from_config(SMALL["opt"].to_dict())) == counted


def test_memory_of_a_rank() -> None:
    assert memory_per_rank(100 * GIB, 8) == int(85 * GIB)
    assert 0 < memory_per_rank(None, 2) < memory_per_rank(None, 1)


@pytest.mark.parametrize(
    ("ranks", "gib", "host_gib", "reason"),
    [
        (1, 8, 64, "the host has 64.00 GiB"),  # the share is 128 GiB
        (1, 8, None, "without a GPU, host offload takes the same memory"),
        (2, 2, 500, "what is gathered at one time 1.86 GiB"),  # more than the GPU has left
    ],
)
def test_a_base_that_fits_nowhere_is_refused(
    ranks: int, gib: int, host_gib: int | None, reason: str
) -> None:
    host = None if host_gib is None else host_gib * GIB
    with pytest.raises(EngineError) as caught:
        place_base(
            run(), needs_of(run(), shape_of("llama-2-70b"), ranks), ranks, Memory(gib * GIB, host)
        )
    for part in (
        reason,
        "base 128.",
        "model.base_bits: 4 or 8",
        "ds_configs/zero3_offload_nvme.json",
    ):
        assert part in str(caught.value)


def test_offload_takes_the_host_share_and_no_more() -> None:
    shape = shape_of("llama-2-70b")
    share, needs = shape.base_bytes(16) // 2, needs_of(run(), shape, 2)
    found, why = place_base(run(), needs, 2, Memory(40 * GIB, share + FIXED_BYTES))
    assert found == "zero3_offload"
    assert f"the share, {share / GIB:.2f} GiB, goes to the host" in why
    with pytest.raises(EngineError):
        place_base(run(), needs, 2, Memory(40 * GIB, share + FIXED_BYTES - 1))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


MEMINFO = f"MemTotal: {200 * 2**20} kB\nMemAvailable: {100 * 2**20} kB\n"


def test_cgroups_limit_the_memory_of_a_host(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/slurm/job_7"
    version_2 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
        f"{job}/step_0/memory.max": "max\n",
        f"{job}/memory.max": f"{40 * GIB}\n",
        f"{job}/memory.current": f"{30 * GIB}\n",
        f"{job}/memory.stat": (
            f"anon {20 * GIB}\nfile {10 * GIB}\ninactive_file {6 * GIB}\nactive_file {4 * GIB}\n"
        ),
    }
    assert host_memory_per_rank(2, write(tmp_path / "2", version_2)) == int(20 * GIB * USABLE / 2)
    job = "sys/fs/cgroup/memory/slurm/job_7"
    version_1 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{50 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
        f"{job}/memory.limit_in_bytes": f"{16 * GIB}\n",
        f"{job}/memory.usage_in_bytes": f"{6 * GIB}\n",
        f"{job}/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n",
    }
    assert host_memory_per_rank(1, write(tmp_path / "1", version_1)) == int(12 * GIB * USABLE)
    alone = write(tmp_path / "0", {"proc/meminfo": MEMINFO})
    assert host_memory_per_rank(1, alone) == int(100 * GIB * USABLE)
