"""4-bit and 8-bit layers: bytes, arithmetic, how a base gets them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from spt_ds import quantize
from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model import quant, quant_check, quant_write
from spt_ds.model.backbone import Backbone, load_lm
from spt_ds.model.loading import load_base_config
from spt_ds.model.quant import Packing, QuantLinear, dequantise, linear
from spt_ds.model.quant_load import load_quantized
from tests.helpers.tiny import random_batch, tiny_lm, tiny_spt

CPU = torch.device("cpu")
PACKINGS = [
    Packing(book, block, double)
    for book, block, double in [
        ("nf4", 64, False),
        ("nf4", 128, True),
        ("nf4", 512, False),
        ("fp4", 64, False),
        ("fp4", 256, True),
        ("int8", 64, False),
        ("int8", 256, False),
    ]
]
# Largest relative error of normal weights in the 2-norm, and the smallest: a smaller one would be
# another format.
ERRORS = {"nf4": (0.085, 0.106), "fp4": (0.115, 0.145), "int8": (0.008, 0.012)}


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def layer_of(
    shape: tuple[int, int], packing: Packing, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    packed, _ = quant.quantise(weight_of(shape), packing, CPU)
    values = torch.linspace(-1, 1, shape[0], dtype=dtype)
    return QuantLinear(
        shape, packing, packed, torch.nn.Parameter(values, requires_grad=False) if bias else None
    )


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
# bitsandbytes' own call for such shapes is wrong where rows are not whole blocks: (16, 16), (64,
# 96), (128, 320).
@pytest.mark.parametrize(
    "shape", [(128, 512), (16, 16), (64, 96), (128, 320), (33, 31), (7, 9), (1, 1)], ids=str
)
def test_dequantised_weights_are_code_book_times_scale(
    shape: tuple[int, int], packing: Packing
) -> None:
    packed, _ = quant.quantise(weight_of(shape), packing, CPU)
    for dtype in (torch.float32, torch.bfloat16):
        expected = quant_check.reference(packed, shape, packing, dtype)
        got = dequantise(packed, shape, packing, dtype)
        assert got.shape == shape
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-8)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_error_of_weights_is_that_of_the_format_and_is_the_one_reported(packing: Packing) -> None:
    weight = weight_of((256, 512))
    before = weight.clone()
    packed, reported = quant.quantise(weight, packing, CPU)
    assert torch.equal(weight, before)
    got = dequantise(packed, (256, 512), packing, torch.float32)
    error = float((got - weight).norm() / weight.norm())
    low, high = ERRORS[packing.book]
    assert low < error < high
    assert error == pytest.approx(reported, rel=1e-4)
    assert len(packed) == sum(packing.sizes(weight.numel()))
    assert len(packed) % 4 == 0


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes, but for results of `expected`."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            size = out.untyped_storage().nbytes()
            self.bytes = max(self.bytes, size if size != self.expected else 0)
        return out


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_layer_is_quantised_in_small_pieces(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are kept between pieces that are freed, and the C library does not give the holes of
    large ones back.
    """
    weight = weight_of((1024, 2048), torch.bfloat16)

    def largest() -> int:
        with Largest(sum(packing.sizes(weight.numel()))) as mode:
            quant.fingerprint(quant.quantise(weight, packing, CPU)[0])
        return mode.bytes

    assert largest() <= 2**19
    monkeypatch.setattr(quant, "CHUNK", {"cpu": 2**20})  # the deliberate fault
    assert largest() > 2**19


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_bytes_do_not_depend_on_the_chunks_or_the_dtype_of_storage(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of((96, 100), torch.bfloat16)
    whole, _ = quant.quantise(weight, packing, CPU)
    monkeypatch.setitem(quant.CHUNK, "cpu", 4096)
    assert torch.equal(quant.quantise(weight, packing, CPU)[0], whole)
    assert torch.equal(quant.quantise(weight.float(), packing, CPU)[0], whole)
    assert quant.fingerprint(whole) != quant.fingerprint(whole.flip(0))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_bytes_may_start_anywhere_in_a_gathered_buffer(offset: int) -> None:
    packing = Packing("nf4", 64, True)
    packed, _ = quant.quantise(weight_of((64, 96)), packing, CPU)
    inside = torch.cat([packed.new_zeros(offset), packed])[offset:]
    expected = dequantise(packed, (64, 96), packing, torch.float32)
    assert torch.equal(dequantise(inside, (64, 96), packing, torch.float32), expected)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_to_the_input(packing: Packing, bias: bool) -> None:
    layer = layer_of((6, 10), packing, bias, torch.float64)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    plain = x @ layer.dequantised(torch.float64).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), plain, rtol=1e-12, atol=1e-12)


def test_nothing_is_saved_between_forward_and_backward() -> None:
    layer = layer_of((32, 64), Packing("nf4", 64, False))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(4, 64, requires_grad=True)
        layer(x).sum().backward()
    assert saved == []
    assert x.grad is not None


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Store a tiny base and configure a run on it."""

    def make(
        arch: str = "llama",
        bits: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        sizes: dict[str, int] | None = None,
        **quant: Any,
    ) -> ModelConfig:
        folder = tmp_path / "base"
        tiny_lm(arch, dtype, **(sizes or {})).save_pretrained(folder)
        return ModelConfig.model_validate({"base": str(folder), "base_bits": bits, "quant": quant})

    return make


def load(config: ModelConfig) -> Any:
    return load_lm(config, load_base_config(config))


def quantised(lm: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in lm.named_modules() if isinstance(module, QuantLinear)}


def fingerprints(lm: Any) -> dict[str, int]:
    return {name: layer.fingerprint for name, layer in quantised(lm).items()}


def losses_and_gradients(lm: Any) -> list[torch.Tensor]:
    backbone = Backbone(lm, "sdpa")
    spt = tiny_spt(backbone, dtype=torch.float32)
    out = spt.micro_losses(backbone, random_batch([(5, 3), (7, 2)]), 2, 5)
    out.total.backward()
    return [out.parts, *(p.grad for p in spt.trainables.parameters() if p.grad is not None)]


def with_plain_layers(lm: Any, weights: dict[str, torch.Tensor]) -> Any:
    """`lm` with every quantised layer replaced by `nn.Linear` of the given weight."""
    for name, layer in quantised(lm).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = weights[name]
        if layer.bias is not None:
            plain.bias = layer.bias
        lm.set_submodule(name, plain)
    return lm


@pytest.mark.parametrize(
    ("arch", "bits"), [("opt", 4), ("opt", 8), ("opt_project", 8), ("llama", 4), ("llama", 8)]
)
def test_losses_and_gradients_are_those_of_the_dequantised_weights(
    arch: str, bits: int, base: Callable[..., ModelConfig]
) -> None:
    config = base(arch, bits, torch.float32)

    def fresh() -> Any:
        return load_quantized(config, load_base_config(config), config.base, None, torch.float32)

    got = losses_and_gradients(fresh())
    weights = {name: layer.dequantised(torch.float32) for name, layer in quantised(fresh()).items()}
    expected = losses_and_gradients(with_plain_layers(fresh(), weights))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # The same comparison sees one layer whose weights are those before quantisation.
    name = next(iter(weights))
    weights[name] = load_file(Path(config.base) / "model.safetensors")[f"{name}.weight"]
    other = losses_and_gradients(with_plain_layers(fresh(), weights))
    assert not all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, other, strict=True)
    )


def test_all_linear_layers_but_head_and_skipped_ones_are_quantised(
    base: Callable[..., ModelConfig],
) -> None:
    lm = load(base("llama", skip_modules=["down_proj", "q_proj"]))
    kinds = {name.rsplit(".")[-1] for name in quantised(lm)}
    assert kinds == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert type(lm.lm_head) is torch.nn.Linear
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16, torch.uint8}


def test_a_skipped_name_that_no_layer_has_is_refused(base: Callable[..., ModelConfig]) -> None:
    with pytest.raises(
        ModelError, match=r"skip_modules: 'q_pro' is no linear layer .* did you mean 'q_proj'"
    ):
        load(base("llama", skip_modules=["lm_head", "q_pro"]))
    lm = load(
        base("opt", skip_modules=["lm_head", "0.fc1"])
    )  # a tied head; a layer by the end of its name
    assert not any(name.endswith(".0.fc1") for name in quantised(lm))
    assert any(name.endswith(".1.fc1") for name in quantised(lm))


def test_embeddings_norms_biases_and_generation_settings_are_those_of_the_base(
    base: Callable[..., ModelConfig],
) -> None:
    config = base("opt", 4)
    lm, full = load(config), load(config.model_copy(update={"base_bits": 16}))
    plain = dict(full.named_parameters())
    kept = {name: p for name, p in lm.named_parameters() if not name.endswith("packed")}
    assert len(kept) == len(plain) - len(quantised(lm))
    assert all(torch.equal(p, plain[name]) for name, p in kept.items())
    assert lm.lm_head.weight is lm.get_input_embeddings().weight
    assert lm.generation_config.to_dict() == full.generation_config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(lm.buffers(), full.buffers(), strict=True))


@pytest.mark.parametrize("layout", ["sharded", "bin", "bare", "stored"])
def test_every_layout_of_a_checkpoint_gives_the_same_bytes(
    layout: str, base: Callable[..., ModelConfig]
) -> None:
    config = base("opt", 4)
    folder = Path(config.base)
    expected = fingerprints(load(config))
    weights = load_file(folder / "model.safetensors")
    if layout == "stored":
        stored = folder.parent / "stored"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quant_write, "FILE_BYTES", 2000)
            patch.setattr(quant_write, "load_tokenizer", lambda config: FakeTokenizer())
            quant_write.write_quantised(config, stored)
        assert len(list(stored.glob("*.safetensors"))) > 1
        config = config.model_copy(update={"base": str(stored)})
        assert sum(file.stat().st_size for file in stored.glob("*.safetensors")) < 20_000
    else:
        (folder / "model.safetensors").unlink()
    if layout == "sharded":
        tiny_lm("opt", torch.bfloat16).save_pretrained(folder, max_shard_size=2000)
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif layout == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        config = config.model_copy(update={"allow_pickle": True})
    elif layout == "bare":  # as OPT's own files: saved from the model without its head
        bare = {key.removeprefix("model."): value for key, value in weights.items()}
        save_file(bare, folder / "model.safetensors")
    lm = load(config)
    assert fingerprints(lm) == expected
    Backbone(lm, "sdpa", check_quantised=True).check()


class FakeTokenizer:
    """A tiny base has none."""

    def save_pretrained(self, folder: Path) -> None:
        assert folder.is_dir()


def test_quantize_command_stores_the_embedded_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stored"
    assert quantize.main(["embedded", str(out), "--bits", "8", "--block-size", "256"]) == 0
    settings = {"base": "embedded", "base_bits": 8, "quant": {"block_size": 256}}
    direct = load(ModelConfig.model_validate(settings))
    assert fingerprints(
        load(ModelConfig.model_validate({**settings, "base": str(out)}))
    ) == fingerprints(direct)
    assert (out / "tokenizer.json").exists()
    assert quantize.main(["embedded", str(out)]) == 2
    assert "is already there" in capsys.readouterr().err
    assert quantize.main(["embedded", str(tmp_path / "new"), "--block-size", "65"]) == 2
    assert "quant.block_size" in capsys.readouterr().err
    for bits in (4, 16):  # `type: int8` and the like, which the schema refuses, are no advice
        with pytest.raises(ModelError, match=r"set model\.base_bits: 8 \(the config has"):
            load(ModelConfig.model_validate({**settings, "base": str(out), "base_bits": bits}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def configure(folder: Path, **settings: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **settings}))


def test_unusable_checkpoints_are_refused_with_the_reason(base: Callable[..., ModelConfig]) -> None:
    config = base("opt", 4)
    folder = Path(config.base)
    whole = (folder / "model.safetensors").read_bytes()
    fc1 = "model.decoder.layers.0.fc1.weight"
    rewrite(folder, lambda weights: weights.pop(fc1))
    with pytest.raises(
        ModelError,
        match=f"1 weights of OPTForCausalLM are not in the checkpoint, the first is {fc1}",
    ):
        load(config)
    rewrite(folder, lambda weights: weights.update({fc1: torch.zeros(3, 3)}))
    with pytest.raises(
        ModelError, match=r"fc1.weight has shape \[3, 3\], its config.json asks for \[24, 16\]"
    ):
        load(config)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(61, 16)}))
    with pytest.raises(
        ModelError, match=r"ties .* hold different values for them; set tie_word_embeddings: false"
    ):
        load(config)
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match=r"no weights can be loaded"):
        load(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor an index"):
        load(config)
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for bits in (4, 16):
        with pytest.raises(
            ModelError, match=r"already quantised \(bitsandbytes\).*Take the 16-bit checkpoint"
        ):
            load(config.model_copy(update={"base_bits": bits}))


@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_what_bitsandbytes_stored_is_refused_with_the_reason(
    width: str, base: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config = base("llama", 4)
    theirs = BitsAndBytesConfig(**{width: True})
    lm = AutoModelForCausalLM.from_pretrained(
        config.base, quantization_config=theirs, dtype=torch.bfloat16
    )
    lm.save_pretrained(tmp_path / "theirs")
    reason = (
        r"theirs: its weights are already quantised \(bitsandbytes\); under ZeRO-3 .* Take the"
        r" 16-bit checkpoint"
    )
    for bits in (4, 8, 16, 32):
        found = config.model_copy(update={"base": str(tmp_path / "theirs"), "base_bits": bits})
        with pytest.raises(ModelError, match=reason):
            load(found)
    with pytest.raises(ModelError, match=reason):
        quant_write.write_quantised(found.model_copy(update={"base_bits": 4}), tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


def test_architectures_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    experts = MixtralConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    MixtralForCausalLM(experts).save_pretrained(tmp_path / "experts")
    with pytest.raises(ModelError, match=r"must be merged or split .* set model.base_bits: 16"):
        load(ModelConfig(base=str(tmp_path / "experts"), base_bits=4))
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no plain linear layer to quantise"):
        load(ModelConfig(base=str(tmp_path / "gpt2"), base_bits=4))


@pytest.mark.parametrize("bits", [4, 8])
def test_self_check_passes_and_finds_each_fault(
    bits: int, base: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone(load(base("opt", bits)), "sdpa", check_quantised=True)
    backbone.check()
    name = "model.decoder.layers.1.fc2"
    layer = quantised(backbone.lm)[name]
    true = layer.dequantised
    layer.dequantised = lambda dtype: true(dtype) * 1.05  # type: ignore[method-assign]
    with pytest.raises(
        ModelError, match=rf"{name}: a dequantised weight is .* units .* \(1 of 12 layers"
    ):
        backbone.check()
    del layer.dequantised
    layer.packed.data[0] ^= 1
    with pytest.raises(ModelError, match=f"{name}: its bytes are not those that were loaded"):
        backbone.check()
    layer.packed.data[0] ^= 1
    with monkeypatch.context() as patch:
        patch.setattr(quant, "linear", lambda x, weight, bias: 1.05 * linear(x, weight, bias))
        with pytest.raises(ModelError, match=r"its output is 0\.05 of its norm off.*12 of 12"):
            backbone.check()
    with monkeypatch.context() as patch:
        patch.setattr(quant, "linear", lambda x, weight, bias: linear(x, weight, None))
        with pytest.raises(ModelError, match=r"its output is .* of its norm off"):
            backbone.check()
    backbone.check()
    assert all("forward" not in vars(layer) for layer in quantised(backbone.lm).values())


@pytest.mark.parametrize("bits", [4, 8])
def test_self_check_takes_no_rounding_for_a_fault(
    bits: int, base: Callable[..., ModelConfig]
) -> None:
    """A layer of zeros, weights far from 1, rows that are no whole blocks, 24 layers in bf16."""
    wide = {"num_hidden_layers": 24, "hidden_size": 72, "intermediate_size": 40, "head_dim": 18}
    config = base("llama", bits, sizes=wide)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.o_proj.weight"].zero_()
        weights["model.layers.1.mlp.up_proj.weight"].mul_(1e-6)
        weights["model.layers.2.mlp.down_proj.weight"].mul_(1e4)

    rewrite(Path(config.base), change)
    Backbone(load(config), "sdpa", check_quantised=True).check(suffix=True)
