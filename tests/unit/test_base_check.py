"""The start-up check refuses every deliberate fault in every precision, and never for rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model import base_check
from spt_ds.model.attention import PACKED, Branches, Layout
from spt_ds.model.backbone import Backbone, build_backbone
from spt_ds.model.loading import load_base_config
from tests.helpers.real_base import real_base
from tests.helpers.tiny import (
    VOCABULARY,
    examples_of,
    random_batch,
    tiny_backbone,
    tiny_spt,
)
from tests.numerics.steps import counts_of

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GATED: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: list[PretrainedConfig] = [
    MistralConfig(**GATED, sliding_window=64),
    Qwen2Config(**GATED),
    Qwen3Config(**GATED, head_dim=8),
    Gemma3TextConfig(**GATED, head_dim=8),
    Phi3Config(**GATED),
    GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    GPTNeoXConfig(**SIZES, intermediate_size=24),
    Olmo2Config(**GATED),
    Starcoder2Config(**GATED),
    MixtralConfig(**GATED, num_local_experts=2),
]
MPT: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 4}
BLOOM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}
BITS = [32, 16, 8, 4]
Patch = pytest.MonkeyPatch


def check(backbone: Backbone, placement: str = "suffix") -> None:
    backbone(lambda base: base.check(suffix=placement == "suffix"))


def backbone_of(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, spread: float = 0.2
) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an expert that is nearly as good as another may be drawn
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(dtype))
    return Backbone(lm, "sdpa")


def patch_packed(
    backbone: Backbone, patch: Patch, change: Callable[[dict[str, Any]], object]
) -> None:
    """Let `change` alter the keywords of each packed call of the base, and no other call's."""
    inner = backbone.lm.base_model
    right = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "layout" in kwargs:
            change(kwargs)
        return right(*args, **kwargs)

    patch.setattr(inner, "forward", forward)


def patch_logits(
    backbone: Backbone, patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let the base's own forward change its logits behind the head."""
    right = backbone.lm.forward

    def forward(**kwargs: Any) -> Any:
        out = right(**kwargs)
        out.logits = change(out.logits)
        return out

    patch.setattr(backbone.lm, "forward", forward)


def scaled_embeddings(backbone: Backbone, patch: Patch) -> None:
    """A base that reads ids in another way than embeddings."""
    right = backbone.lm.forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return right(inputs_embeds=backbone.embed(input_ids) * 4, **kwargs)

    patch.setattr(backbone.lm, "forward", forward)


def capped_logits(backbone: Backbone, patch: Patch) -> None:
    patch_logits(backbone, patch, lambda logits: 30 * (logits / 30).tanh())


def logits_scaled_by_a_percent(backbone: Backbone, patch: Patch) -> None:
    patch_logits(backbone, patch, lambda logits: 1.01 * logits)


def lost_positions(backbone: Backbone, patch: Patch) -> None:
    """A base that counts from the first packed token to the last."""

    def change(kwargs: dict[str, Any]) -> None:
        kwargs["position_ids"] = torch.arange(kwargs["inputs_embeds"].shape[1])[None]

    patch_packed(backbone, patch, change)


def layout_not_handed_on(backbone: Backbone, patch: Patch) -> None:
    for module in backbone.lm.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            patch.setattr(module, "forward", without_layout(module))


def without_layout(module: nn.Module) -> Callable[..., Any]:
    right = module.forward

    def forward(*args: Any, layout: Any = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs)

    return forward


def join_rows(kwargs: dict[str, Any]) -> None:
    if type(kwargs["layout"]) is Layout:
        kwargs["layout"].lens = (sum(kwargs["layout"].lens),)


def rows_that_see_each_other(backbone: Backbone, patch: Patch) -> None:
    patch_packed(backbone, patch, join_rows)


def rows_that_see_each_other_in_16_bits(backbone: Backbone, patch: Patch) -> None:
    """A fault of the kernel that trains, which no comparison in fp32 can see."""

    def change(kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].dtype == torch.bfloat16:
            join_rows(kwargs)

    patch_packed(backbone, patch, change)


def branches_on_a_neighbours_context(backbone: Backbone, patch: Patch) -> None:
    def change(kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs["layout"], Branches):
            kwargs["layout"].context.lens = kwargs["layout"].context.lens[::-1]

    patch_packed(backbone, patch, change)


@dataclass(frozen=True)
class Fault:
    put_in: Callable[[Backbone, Patch], None]
    placement: str
    says: str


FAULTS = [
    Fault(scaled_embeddings, "prefix", "packed rows give other logits"),
    Fault(capped_logits, "prefix", "packed rows give other logits"),
    Fault(logits_scaled_by_a_percent, "prefix", r"other logits .* difference 0\.0099"),
    # Rotary positions count from token to token: rows are right wherever they start, branches not.
    Fault(lost_positions, "suffix", "give other logits"),
    Fault(layout_not_handed_on, "prefix", "does not hand keywords on"),
    Fault(rows_that_see_each_other, "prefix", "packed rows give other logits"),
    Fault(branches_on_a_neighbours_context, "suffix", "branches give other logits"),
]
ONLY_16 = Fault(
    rows_that_see_each_other_in_16_bits,
    "prefix",
    r"in torch.bfloat16 by sdpa attention give other logits than in fp32 .*base_bits: 32",
)


def refuse(backbone: Backbone, fault: Fault) -> None:
    """Assert that the check refuses the fault, and nothing before or after it."""
    with Patch.context() as patch:
        fault.put_in(backbone, patch)
        with pytest.raises(ModelError, match=fault.says):
            check(backbone, fault.placement)
    assert backbone.config._attn_implementation == PACKED


def faults_of(dtype: torch.dtype) -> list[Fault]:
    return [*FAULTS, *([ONLY_16] if dtype == torch.bfloat16 else [])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["opt", "opt_project", "llama"])
def test_every_fault_is_refused(arch: str, dtype: torch.dtype) -> None:
    backbone = tiny_backbone(arch, dtype)
    check(backbone)
    for fault in faults_of(dtype):
        refuse(backbone, fault)


@cache
def real(bits: int) -> Backbone:
    config = ModelConfig(base=real_base(), base_bits=bits)  # type: ignore[arg-type]
    return build_backbone(config, load_base_config(config), CPU, strict=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bits", BITS)
def test_a_real_base_is_accepted_and_every_fault_in_it_refused(bits: int) -> None:
    backbone = real(bits)
    check(backbone)
    for fault in faults_of(torch.float32 if bits == 32 else torch.bfloat16):
        refuse(backbone, fault)
    backbone.backend = "eager"
    check(backbone)
    backbone.backend = "sdpa"


def test_no_rounding_is_too_large() -> None:
    """A base whose own two kernels disagree in bf16 by more than any fixed tolerance allows."""
    config = LlamaConfig(**{**GATED, "num_hidden_layers": 48, "hidden_size": 64})
    backbone = backbone_of(config, torch.bfloat16, spread=0.5)
    ids = torch.arange(3, 11)[None]
    logits = []
    for kernel in ("eager", "sdpa"):
        backbone.lm.set_attn_implementation(kernel)
        logits.append(backbone.lm(input_ids=ids, use_cache=False).logits)
    backbone.lm.set_attn_implementation(PACKED)
    assert float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) > 0.1
    check(backbone)
    for fault in FAULTS:
        refuse(backbone, fault)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["opt", "opt_project", "llama", "gemma", "gemma2", "phi"])
def test_supported_bases_are_accepted(arch: str, dtype: torch.dtype, backend: str) -> None:
    backbone = tiny_backbone(arch, dtype, backend)
    check(backbone)
    assert backbone.config._attn_implementation == PACKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_families_that_have_been_run(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """`check` passes, and one reply's loss in both placements is that of the base's own forward."""
    backbone = backbone_of(config, dtype)
    check(backbone)
    if dtype != torch.float32:
        return
    batch = random_batch(((6, 3), (4, 2)))
    context, response = examples_of(batch)[0]
    for placement in ("prefix", "suffix"):
        spt = tiny_spt(backbone, count=2, dtype=torch.float32, prompts={"placement": placement})
        with torch.no_grad():
            ours = backbone(spt.micro_losses, batch, *counts_of(batch)).nll[1, 0]
            pieces = [spt.trainables.bank.weight[1], backbone.embed(context)]
            row = torch.cat(
                [*(pieces if placement == "prefix" else pieces[::-1]), backbone.embed(response)]
            )
            backbone.lm.set_attn_implementation("eager")
            logits = backbone.lm(inputs_embeds=row[None], use_cache=False).logits[
                0, len(row) - 4 : -1
            ]
            backbone.lm.set_attn_implementation(PACKED)
        own = torch.nn.functional.cross_entropy(logits, response)
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sees_capped_logits_however_small_the_logits_are(dtype: torch.dtype) -> None:
    """Gemma 2 at initialisation: its cap of 30 moves these logits by less than bf16 rounds."""
    backbone = tiny_backbone("gemma2", dtype, final_logit_softcapping=30.0)
    layout = Layout((5,), torch.arange(5), "sdpa")
    logits = backbone.lm(input_ids=torch.arange(5)[None], use_cache=False, layout=layout).logits
    assert float(logits.abs().max()) < 15
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM.*other logits"):
        check(backbone)


def test_sees_capped_attention() -> None:
    with pytest.raises(ModelError, match="uses softcap"):
        check(tiny_backbone("gemma2", torch.float32, attn_logit_softcapping=50.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**GATED, logit_scale=0.25),
        GraniteConfig(**GATED, logits_scaling=8.0),
        BloomConfig(**BLOOM),
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            eos_token_id=2,
            bos_token_id=1,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_sees_what_packed_rows_cannot_do(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Logits scaled behind the head (Cohere, Granite), no attention interface (Bloom), no attention
    (Mamba).
    """
    with pytest.raises(ModelError, match=r"other logits.*attention interface"):
        check(backbone_of(config, dtype))


def test_sees_not_a_number() -> None:
    backbone = tiny_backbone("llama", torch.float32)
    read = base_check._rows(backbone)[1][-1]
    with torch.no_grad():
        backbone.lm.get_input_embeddings().weight[read] = float("nan")
    with pytest.raises(ModelError, match="difference nan"):
        check(backbone)


def test_says_that_keywords_are_not_handed_on() -> None:
    config = StableLmConfig(**GATED)
    with pytest.raises(ModelError, match="StableLmAttention does not hand keywords on"):
        check(backbone_of(config))


def test_says_that_the_base_cannot_read_packed_rows() -> None:
    with pytest.raises(ModelError, match=r"MptForCausalLM cannot read packed rows .*OPT, Llama"):
        check(backbone_of(MptConfig(**MPT)))


def test_the_check_leaves_weights_and_precision_as_they_were() -> None:
    backbone = tiny_backbone("llama", torch.bfloat16)
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    torch.set_float32_matmul_precision("high")
    try:
        check(backbone)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    after = dict(backbone.named_parameters())
    assert all(
        p.dtype == torch.bfloat16 and torch.equal(p, after[name]) for name, p in before.items()
    )
