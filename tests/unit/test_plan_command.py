"""`spt-ds plan`: the decision of a run, made without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from spt_ds import plan_command
from spt_ds.cli import main
from spt_ds.placement import memory
from spt_ds.placement.memory import GIB, USABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run on a 70B base of which there is nothing but its config.json."""
    LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    return [
        "plan",
        "--config",
        "demo",
        "--set",
        f"model.base={tmp_path}",
        "--set",
        "model.base_bits=16",
    ]


@pytest.mark.parametrize(
    ("machine", "placement"),
    [
        (["--ranks", "8", "--memory-gib", "80", "--host-gib", "100"], "zero3 "),
        (["--ranks", "2", "--memory-gib", "40", "--host-gib", "100"], "zero3_offload "),
        (["--ranks", "1", "--memory-gib", "192", "--host-gib", "1"], "replicate "),
    ],
)
def test_it_prints_terms_and_decision(
    machine: list[str], placement: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *machine]) == 0
    out = capsys.readouterr().out
    assert f"placement: {placement}(base 128.48 GiB at 16 bits" in out
    assert f"{float(machine[3]) * USABLE:9.2f} GiB" in out.splitlines()[0]
    assert any(line.startswith("base, whole") and "128.48 GiB" in line for line in out.splitlines())
    assert "activation checkpointing: " in out


def test_where_nothing_fits_it_exits_2_with_the_terms(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--memory-gib", "8", "--host-gib", "64"]) == 2
    found = capsys.readouterr()
    assert "base, whole" in found.out
    assert "spt-ds plan: engine.placement: auto finds no place for the base" in found.err


def test_a_deepspeed_file_decides(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "ds_configs" / "zero3.json")
    assert main([*arguments, "--memory-gib", "8", "--ranks", "2", "--deepspeed_config", file]) == 0
    assert f"placement: zero3 ({file})" in capsys.readouterr().out


def test_without_a_gpu_the_host_is_the_memory(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for module in (memory, plan_command):
        monkeypatch.setattr(module, "host_memory_per_rank", lambda ranks: 400 * GIB // ranks)
    assert main([*arguments, "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "placement: replicate" in out
    assert "host memory next to it" not in out
    assert main([*arguments, "--host-gib", "5"]) == 2
    assert main([*arguments, "--ranks", "0"]) == 2
    assert "--ranks 0: give a number above 0" in capsys.readouterr().err
