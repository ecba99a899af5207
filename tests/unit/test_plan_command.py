"""`spt-ds plan`: the decision of a run, made without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from spt_ds.cli import main
from spt_ds.config.load import recipe_names
from spt_ds.placement import memory
from spt_ds.placement.memory import GIB, USABLE
from spt_ds.plan import base as plan_base

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
    assert f"{float(machine[3]) * USABLE:9.2f} GiB" in out.splitlines()[1]
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
    monkeypatch.setattr(plan_base, "_gpu_bytes", lambda: None)
    for module in (memory, plan_base):
        monkeypatch.setattr(module, "host_memory_per_rank", lambda ranks: 400 * GIB // ranks)
    assert main([*arguments, "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "placement: replicate" in out
    assert "host memory next to it" not in out
    assert main([*arguments, "--host-gib", "5"]) == 2
    assert main([*arguments, "--ranks", "0"]) == 2
    assert "--ranks 0: give a whole number from 1 to" in capsys.readouterr().err


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments, "--memory-gib", "80", "--host-gib", "100"]) == 0
    return capsys.readouterr().out


def test_it_says_what_fits_and_how_many_ranks_are_needed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.split() for line in plan(capsys, *arguments[1:], "--ranks", "2").splitlines()]
    table = {" ".join(row[:3]): row[3:] for row in rows if row[:1] in (["prefix,"], ["suffix,"])}
    # 64.2 GiB are half of the base in 16 bits: with what is gathered more than 68 GiB.
    assert len(table["prefix, 16 bits"]) == 1
    assert len(table["prefix, 4 bits"]) == 3
    lines = plan(capsys, *arguments[1:], "--ranks", "?").splitlines()
    needed = next(line.split()[3:] for line in lines if line.startswith("prefix, 16 bits"))
    assert needed == ["4", "2"]  # shards on the device, shards on the host


def test_a_known_micro_batch_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """Where all layers' activations do not fit at the options' bound, real lengths may fit."""
    options = ["--config", "llama-2-7b", "--set", "train.micro_batch=16"]
    bound = plan(capsys, *options)
    assert "activation checkpointing: non_reentrant" in bound
    known = plan(capsys, *options, "--largest", "16,2288,224")
    assert "activation checkpointing: off" in known


def test_time_and_cost_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "llama-2-7b", "--ranks", "4", "--examples", "32000"]
    out = plan(capsys, *options)
    assert "time: give --tflops of a rank, or --seconds-per-step as measured" in out
    out = plan(capsys, *options, "--seconds-per-step", "3.6", "--price", "2")
    assert "time of the run: 1,000 steps, 1.00 h, 8.00 at --price" in out
    out = plan(capsys, *options, "--tflops", "400")
    teraflop = float(next(x for x in out.splitlines() if x.startswith("a step: ")).split()[-2])
    assert f"time of a step: {teraflop / 1600:.3g} s (computing alone)" in out


@pytest.mark.parametrize(
    ("ranks", "start"),
    [
        ("1", "spt-ds train --config llama-2-7b"),
        ("8", "deepspeed --num_gpus 8 --module spt_ds.train --config llama-2-7b"),
        ("16", "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sbatch"),
    ],
)
def test_the_command_to_start_with(
    ranks: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"start with: {start}" in plan(capsys, "--config", "llama-2-7b", "--ranks", ranks)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--ranks", "many"],
        ["--ranks", "100000"],
        ["--tokens", "143"],
        ["--tokens", "0,5"],
        ["--largest", "4,700"],
        ["--largest", "4,700,x"],
        ["--price", "-1"],
    ],
)
def test_wrong_numbers_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "demo", *wrong]) == 2
    assert f"spt-ds plan: {wrong[0]} {wrong[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("[]", "expected a JSON object"),
        ("{", "damaged"),
        ('{"hidden_size": -1, "tie_word_embeddings": true}', "hidden_size is -1, expected"),
    ],
)
def test_a_damaged_configuration_is_refused(
    file: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(file)
    assert main(["plan", "--config", "demo", "--set", f"model.base={tmp_path}"]) == 2
    assert reason in capsys.readouterr().err


def test_a_recipe_is_planned_offline_and_without_torch() -> None:
    """No PyTorch is imported and no socket made, for every shipped recipe."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from spt_ds.cli import main\n"
        "assert main(['plan', '--config', sys.argv[1], '--memory-gib', '80']) in (0, 2)\n"
        "assert 'torch' not in sys.modules"
    )
    for recipe in recipe_names():
        if recipe == "reference":  # its base is a placeholder
            continue
        done = subprocess.run(
            [sys.executable, "-c", code, recipe], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{recipe}: {done.stderr}"
