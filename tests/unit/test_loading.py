"""Bases of others: none of their code runs, each damaged one is one message before memory goes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model.backbone import build_backbone
from spt_ds.model.loading import load_base_config, load_tokenizer
from tests.helpers.tiny import tiny_lm
from tests.helpers.tokenizers import byte_tokenizer

CPU = torch.device("cpu")
CODE = """
import pathlib
pathlib.Path(__file__).with_name("RAN").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "{kind}"

class Model(LlamaForCausalLM):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass
"""
MAP = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": [None, "own.Words"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_lm("llama", torch.float32, vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def settings(base: Path, **overrides: Any) -> ModelConfig:
    return ModelConfig.model_validate({"base": str(base), "base_bits": 32, **overrides})


def configure(base: Path, name: str = "config.json", **changes: Any) -> None:
    tree = json.loads((base / name).read_text(encoding="utf-8"))
    (base / name).write_text(json.dumps({**tree, **changes}), encoding="utf-8")


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def load(config: ModelConfig) -> Any:
    load_tokenizer(config)
    return build_backbone(config, load_base_config(config), CPU, strict=False)


def refused(config: ModelConfig) -> str:
    with pytest.raises(ModelError) as caught:
        load(config)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def own_code(base: Path, kind: str, words: str) -> None:
    (base / "own.py").write_text(CODE.replace("{kind}", kind), encoding="utf-8")
    configure(base, model_type=kind, auto_map=MAP)
    configure(base, "tokenizer_config.json", auto_map=MAP, tokenizer_class=words)


def test_the_base_itself_loads(base: Path) -> None:
    for bits in (32, 16, 8):
        load(settings(base, base_bits=bits))


def test_code_of_a_base_never_runs_and_nobody_is_asked(base: Path) -> None:
    """As a user does it, with a terminal that would say yes to every question."""
    own_code(base, "own-kind", "Words")
    code = (
        "import sys; from spt_ds.config.model import ModelConfig;"
        "from spt_ds.model.loading import load_base_config, load_tokenizer;"
        "from spt_ds.errors import ModelError\n"
        f"config = ModelConfig(base={str(base)!r})\n"
        "for read in (load_base_config, load_tokenizer):\n"
        "    try: read(config)\n"
        "    except ModelError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="yes\n" * 100,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_MODULES_CACHE": str(base / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert not list(base.rglob("RAN"))
    assert not (base / "modules").exists()
    assert "model_type 'own-kind' is none" in done.stdout
    assert "brings Python code of its own (auto_map), which is never run" in done.stdout
    assert "?" not in done.stdout


def test_a_known_type_is_loaded_without_the_code_it_brings(base: Path) -> None:
    own_code(base, "llama", "PreTrainedTokenizerFast")
    load(settings(base))
    assert not list(base.rglob("RAN"))


def test_custom_generation_code_is_not_run(base: Path) -> None:
    folder = base / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(CODE.replace("{kind}", "x"), encoding="utf-8")
    load(settings(base))
    assert not list(base.rglob("RAN"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers"),
        ({"pad_token_id": 10**200}, "pad_token_id is a number of"),
        ({"num_hidden_layers": 4096}, "describes more than 1210 modules, and its weights are 21"),
        ({"num_hidden_layers": 3}, "not in the checkpoint, the first are model.layers.2."),
        ({"num_hidden_layers": 1}, "tensors of the checkpoint are not part of LlamaForCausalLM"),
        ({"intermediate_size": 1 << 22}, "its config.json asks for [16, 4194304]"),
        ({"vocab_size": 1 << 26}, "its config.json asks for [67108864, 16]"),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads"),
        ({"rope_parameters": []}, "model.base:"),
        ({"hidden_act": "no-such"}, "describes no model that can be built"),
        ({"model_type": None}, "model_type None is none"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is none"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "t5"}, "model.base:"),
        ({"transformers_weights": "../x.safetensors"}, "has transformers_weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
        ({"quantization_config": []}, "model.base:"),
        ({"quantization_config": "x"}, "model.base:"),
        ({"spt_quantization": "x"}, "spt_quantization in its config.json is 'x'"),
        ({"dtype": "no-such"}, "model.base:"),
        ({"tie_word_embeddings": "x" * 100_000}, "model.base:"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_its_weights(
    base: Path, changes: dict[str, Any], words: str
) -> None:
    configure(base, **changes)
    assert words in refused(settings(base))
    assert refused(settings(base, base_bits=4))


def test_memory_is_not_taken_for_what_config_json_alone_sizes(base: Path) -> None:
    """The mask of GPTBigCode is no weight: its size is the square of the positions."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 258}
    tree = {"model_type": "gpt_bigcode", **sizes, "n_positions": 1 << 20}
    (base / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    for bits in (32, 4):
        assert "asks for 1024 GiB apart from the weights" in refused(settings(base, base_bits=bits))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "init_inputs"])
def test_settings_name_no_file(base: Path, tmp_path: Path, name: str, key: str) -> None:
    """transformers would read the vocabulary from there."""
    (base / name).touch()
    tree = json.loads((base / name).read_text(encoding="utf-8") or "{}")
    other = tmp_path / "elsewhere.json"
    value: Any = [str(other)] if key == "init_inputs" else str(other)
    (base / name).write_text(json.dumps({**tree, key: value}), encoding="utf-8")
    shutil.copy(base / "tokenizer.json", other)
    assert f"{name} of {base}: {key!r} names the file {str(other)!r}" in refused(settings(base))
    other.unlink()  # as in settings that were saved on another machine
    if key != "init_inputs" and name == "tokenizer_config.json":
        load_tokenizer(settings(base))


@pytest.mark.parametrize("value", ["512", True, [512], {}])
def test_a_tokenizers_limit_is_a_number(base: Path, value: Any) -> None:
    configure(base, "tokenizer_config.json", model_max_length=value)
    assert "model_max_length is" in refused(settings(base))


def test_memory_is_not_taken_for_what_the_weights_do_not_hold(base: Path) -> None:
    """Within the limits of a configuration: 4 M wide layers of which the files hold nothing."""
    configure(base, intermediate_size=1 << 22, num_hidden_layers=400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(settings(base))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"5",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\x00" * 99,
    ],
    ids=lambda content: content[:6].decode("latin-1"),
)
def test_a_damaged_file_of_the_base(base: Path, name: str, content: bytes) -> None:
    (base / name).write_bytes(content)
    assert "model.base: no " in refused(settings(base))


def test_a_damaged_generation_config(base: Path) -> None:
    (base / "generation_config.json").write_bytes(b"[]")
    assert "generation_config.json" in refused(settings(base))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("damage", ["cut", "empty", "header", "huge header", "text", "missing"])
def test_damaged_weights(base: Path, damage: str, bits: int) -> None:
    path = base / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-100],
            "empty": b"",
            "header": whole[:8] + b"[" * (len(whole) - 8),
            "huge header": (2**60).to_bytes(8, "little") + whole[8:],
            "text": b"hello",
            "missing": whole,
        }[damage]
    )
    if damage == "missing":
        path.unlink()
    assert "no weights can be loaded from" in refused(settings(base, base_bits=bits))


def test_weights_that_are_missing_or_too_many_are_named(base: Path) -> None:
    rewrite(base, lambda weights: weights.pop("model.norm.weight"))
    text = refused(settings(base))
    assert "1 weights of LlamaForCausalLM are not in the checkpoint, the first is" in text
    assert "model.norm.weight" in text
    rewrite(base, lambda weights: weights.update({"model.norm.weight": torch.ones(16)}))
    rewrite(base, lambda weights: weights.update({f"head.{n}": torch.ones(1) for n in range(9)}))
    text = refused(settings(base))
    assert "9 tensors of the checkpoint are not part of LlamaForCausalLM" in text
    assert "are head.0, head.1, head.2, head.3, head.4 and 4 more" in text
    assert "9 tensors" in refused(settings(base, base_bits=4))


class Trap:
    """What unpickling it does, a test would see."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("bits", [32, 4])
def test_pickled_weights_need_leave(base: Path, bits: int) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    assert "model.allow_pickle: true" in refused(settings(base, base_bits=bits))
    load(settings(base, base_bits=bits, allow_pickle=True))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("format", ["zip", "legacy", "plain", "text"])
def test_pickled_weights_run_nothing_even_with_leave(base: Path, bits: int, format: str) -> None:
    trap, path = Trap(base / "RAN"), base / "pytorch_model.bin"
    (base / "model.safetensors").unlink()
    if format == "plain":
        path.write_bytes(pickle.dumps(trap))
    elif format == "text":
        path.write_bytes(b"hello")
    else:
        torch.save({"a": trap}, path, _use_new_zipfile_serialization=format == "zip")
    refused(settings(base, base_bits=bits, allow_pickle=True))
    assert not (base / "RAN").exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/../../x.safetensors", "x.bin", 5]
)
@pytest.mark.parametrize("bits", [32, 4])
def test_an_index_names_no_file_elsewhere(base: Path, name: Any, bits: int) -> None:
    keys = list(load_file(base / "model.safetensors"))
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    text = refused(settings(base, base_bits=bits))
    assert "inside the folder" in text or "index.json is damaged" in text


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"a": "gone.safetensors"}}]
)
def test_a_damaged_index(base: Path, index: Any) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "no weights can be loaded from" in refused(settings(base))


def test_a_folder_with_an_adapter_is_no_base(base: Path) -> None:
    content = {"base_model_name_or_path": str(base.parent), "peft_type": "LORA"}
    (base / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert "holds an adapter" in refused(settings(base))


def test_a_folder_that_is_a_training_state_is_no_base(base: Path) -> None:
    """transformers would take its shards, and the pickle beside them, before model.safetensors."""
    (base / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"x")
    (base / ".metadata").write_bytes(pickle.dumps(Trap(base / "RAN")))
    assert refused(settings(base))
    assert not (base / "RAN").exists()


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a\0b", "./" + "a" * 5000, "\ud800", "../no/such", ""]
)
def test_a_name_that_no_base_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (load_base_config, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            read(ModelConfig(base=name))
        assert len(str(caught.value)) < 12_000
