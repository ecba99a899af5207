"""Loading the frozen base, its kernels, and the text of every error a user can cause there."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.llama import modeling_llama

from spt_ds.batch import Packed
from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.log import get_logger
from spt_ds.model import attention
from spt_ds.model.attention import PACKED, Layout, choose_backend
from spt_ds.model.backbone import Backbone, build_backbone
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.model.rows import target_states
from tests.helpers.tiny import (
    VOCABULARY,
    random_batch,
    tiny_backbone,
    tiny_config,
    tiny_lm,
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
}
BLOOM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}
MPT: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 4}


def check(backbone: Backbone) -> None:
    backbone(lambda base: base.check())


def backbone_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Backbone:
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return Backbone(lm, "sdpa")


def saved(config: PretrainedConfig, folder: Path) -> str:
    """A folder with the configuration and nothing else."""
    config.save_pretrained(folder)
    return str(folder)


def build(folder: str, **settings: Any) -> Backbone:
    settings = {"base_bits": 32, "random_init": True, **settings}
    config = ModelConfig(base=folder, **settings)
    return build_backbone(config, load_base_config(config), CPU, strict=False)


class TestSlidingWindow:
    CONFIG = MistralConfig(**GATED, sliding_window=12)

    @pytest.mark.parametrize("placement", ["prefix", "suffix"])
    def test_a_row_longer_than_the_window_is_refused(self, placement: str) -> None:
        """In suffix placement a row is a context and one of its branches: 2 + 8 + 3 - 1 = 12 fit,
        13 do not.
        """
        backbone = backbone_of(self.CONFIG)
        spt = tiny_spt(backbone, count=6, dtype=torch.float32, prompts={"placement": placement})
        fits = random_batch(((8, 3), (2, 2)))
        backbone(spt.micro_losses, fits, *counts_of(fits))
        longer = random_batch(((9, 3), (2, 2)))
        with pytest.raises(
            ModelError, match=r"rows of 13 tokens exceed.*window of 12; lower data\.max_tokens"
        ):
            backbone(spt.micro_losses, longer, *counts_of(longer))


class TestLoading:
    def test_random_init_freezes_everything(self, tmp_path: Path) -> None:
        backbone = build(saved(tiny_config("opt", dropout=0.2), tmp_path))
        check(backbone)
        assert not any(p.requires_grad for p in backbone.parameters())
        assert not backbone.lm.training
        assert backbone.lm.config.pad_token_id == 1

    @pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16)])
    def test_weights_are_read_in_the_dtype_of_base_bits(
        self, bits: int, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        source = tiny_lm("llama", torch.float32)
        source.save_pretrained(tmp_path)
        backbone = build(str(tmp_path), base_bits=bits, random_init=False)
        for name, weight in backbone.lm.state_dict().items():
            assert torch.equal(weight, source.state_dict()[name].to(dtype)), name

    def test_no_rate_of_dropout_is_left(self, tmp_path: Path) -> None:
        """`eval()` is not enough: a layer that recomputes activations has its training flag set."""
        rates = {
            "dropout": 0.2,
            "attention_dropout": 0.2,
            "layerdrop": 0.2,
            "activation_dropout": 0.2,
        }
        backbone = build(saved(tiny_config("opt", **rates), tmp_path))
        left = [
            name
            for m in backbone.lm.modules()
            for name, value in vars(m).items()
            if "drop" in name and value
        ]
        assert left == []

    def test_a_head_that_is_not_linear_is_refused(self) -> None:
        lm = tiny_lm("opt", torch.float32)
        lm.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(16, VOCABULARY)))
        with pytest.raises(
            ModelError, match="head of OPTForCausalLM is Sequential; a plain linear head"
        ):
            Backbone(lm, "sdpa")

    def test_an_attention_class_from_a_list_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A made-up class: release by release transformers moves its last models to the interface.
        classes = {"eager": torch.nn.Identity, "sdpa": torch.nn.Identity}

        def pick(config: PretrainedConfig, layer_idx: int) -> torch.nn.Module:
            return classes[config._attn_implementation]()

        monkeypatch.setattr(modeling_llama, "LlamaAttention", pick)
        with pytest.raises(
            ModelError, match=r"llama picks its attention from a list of its own.*OPT, Llama"
        ):
            build(saved(tiny_config("llama"), tmp_path))

    def test_an_encoder_decoder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no weights can be loaded.*T5Config"):
            build(saved(T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1), tmp_path))

    @pytest.mark.parametrize("name", ["/nowhere/base", "./nowhere", "a/b/c"])
    def test_a_missing_folder(self, name: str) -> None:
        with pytest.raises(
            ModelError, match=rf"no folder {name}; give a folder with config.json and weights"
        ):
            build(name)

    def test_a_folder_without_a_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no configuration can be read from"):
            build(str(tmp_path))

    def test_a_configuration_of_an_unknown_type(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
        with pytest.raises(ModelError, match=r"no configuration can be read from .*no_such_model"):
            build(str(tmp_path))

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        folder = saved(tiny_config("llama"), tmp_path)
        with pytest.raises(
            ModelError, match=rf"no weights can be loaded from {folder}: .*safetensors"
        ):
            build(folder, random_init=False)

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        folder = saved(tiny_config("llama"), tmp_path)
        with pytest.raises(ModelError, match=f"no tokenizer can be read from {folder}"):
            load_tokenizer(ModelConfig(base=folder))

    @pytest.mark.parametrize("eos", [None, "</s>"])
    def test_a_tokenizer_needs_an_end_of_sequence_token(
        self, eos: str | None, tmp_path: Path
    ) -> None:
        words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos).save_pretrained(tmp_path)
        config = ModelConfig(base=str(tmp_path))
        if eos is None:
            with pytest.raises(ModelError, match="no end-of-sequence token; replies could not end"):
                load_tokenizer(config)
        else:
            tokenizer = load_tokenizer(config)
            assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1)


class TestBackend:
    def test_cpu_uses_sdpa(self) -> None:
        assert choose_backend("auto", CPU, torch.bfloat16, strict=True) == "sdpa"
        assert choose_backend("sdpa", CPU, torch.float32, strict=True) == "sdpa"
        assert choose_backend("eager", CPU, torch.float32, strict=True) == "eager"

    @pytest.mark.parametrize(
        ("asked", "need"), [("flash", "flash-attn package"), ("varlen", "a CUDA device")]
    )
    def test_a_kernel_that_cannot_run_here(
        self, asked: str, need: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(
            ModelError, match=rf"model\.attention: {asked}, using sdpa: .*{need}.*strict"
        ):
            choose_backend(asked, CPU, torch.float32, strict=True)
        logger = get_logger()
        logger.addHandler(caplog.handler)
        try:
            assert choose_backend(asked, CPU, torch.float32, strict=False) == "sdpa"
        finally:
            logger.removeHandler(caplog.handler)
        said = [
            record for record in caplog.records if f"model.attention: {asked}" in record.message
        ]
        assert [record.levelno for record in said] == [logging.WARNING]


class TestFlashPackages:
    """Two distributions share the name flash_attn; neither is installed here, so modules stand in
    for them.
    """

    @pytest.mark.parametrize(
        ("installed", "card", "package"),
        [
            ({"flash_attn": True}, (8, 0), "flash-attn 2"),
            ({"flash_attn": True, "flash_attn.cute": True}, (9, 0), "flash-attn 4"),
            (
                {"flash_attn": True, "flash_attn.cute": True},
                (8, 0),
                "flash-attn 2",
            ),  # 4 is made for later cards
            (
                {"flash_attn": False, "flash_attn.cute": True},
                (10, 0),
                "flash-attn 4",
            ),  # flash_attn: a namespace
            ({"flash_attn": False, "flash_attn.cute": True}, (8, 0), None),
            ({"flash_attn": True, "flash_attn.cute": True}, (12, 0), "flash-attn 2"),
            ({"flash_attn": True, "flash_attn.cute": True}, (7, 5), None),
            ({}, (9, 0), None),
        ],
    )
    def test_which_one_is_used(
        self,
        installed: dict[str, bool],
        card: tuple[int, int],
        package: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        called: list[str] = []

        def function(name: str) -> Callable[..., Any]:
            def attend(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                called.append(name)
                return (
                    (q, None) if name.endswith("cute") else q
                )  # version 4 returns the log-sum-exp beside its output

            return attend

        for name, has_function in installed.items():
            module: Any = types.ModuleType(name)
            if has_function:
                module.flash_attn_varlen_func = function(name)
            monkeypatch.setitem(sys.modules, name, module)
        for name in {"flash_attn", "flash_attn.cute"} - set(installed):
            monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
        attention._flash_package.cache_clear()
        try:
            chosen = choose_backend("flash", torch.device("cuda"), torch.bfloat16, strict=False)
            assert attention._flash_package() == package
            assert chosen == ("flash" if package else "sdpa")
            if package:
                layout = Layout((2, 1), torch.tensor([0, 1, 0]), "flash")
                q = torch.zeros(1, 2, 3, 4)
                assert layout.attend(0, q, q, q, 1.0).shape == (1, 3, 2, 4)
                assert called == ["flash_attn.cute" if package == "flash-attn 4" else "flash_attn"]
        finally:
            attention._flash_package.cache_clear()


def test_suffix_without_recorded_keys_is_refused() -> None:
    """A base whose attention layers all claim index 0, or none: the branches find no keys of their
    context.
    """
    backbone = tiny_backbone("llama")
    spt = tiny_spt(backbone, prompts={"placement": "suffix"})
    batch = random_batch(((4, 2),))
    right = backbone.run

    def forgets(embeddings: torch.Tensor, layout: Layout) -> torch.Tensor:
        out = right(embeddings, layout)
        layout.recorded = {}
        return out

    backbone.run = forgets  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"layer 0 kept no keys of the context.*before_text"):
        backbone(spt.micro_losses, batch, *counts_of(batch))


def test_states_keep_the_precision_of_the_base() -> None:
    """Prompts are fp32 whatever the base; they are rounded to it once, on the way in."""
    backbone = tiny_backbone("llama", torch.bfloat16)
    batch = random_batch(((4, 2),))
    prompts = torch.randn(2, 1, 3, 16, requires_grad=True)
    packed = Packed.from_batch(batch, 3, torch.device("cpu"), suffix=False)
    states = backbone(target_states, packed, backbone.embed(packed.ids), prompts, None)
    assert states.dtype == torch.bfloat16
    states.float().sum().backward()
    assert prompts.grad is not None
    assert prompts.grad.dtype == torch.float32
