"""What is told where a CPU emulates bf16, and where it does not."""

from __future__ import annotations

import logging
import platform

import pytest
import torch

from spt_ds import doctor, log
from spt_ds.config.model import ModelConfig
from spt_ds.model.backbone import build_backbone
from spt_ds.model.bf16 import bf16_advice, bf16_units
from spt_ds.model.loading import load_base_config


def cpu(monkeypatch: pytest.MonkeyPatch, machine: str, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "expected"),
    [
        ("x86_64", False, False, False),
        ("AMD64", False, False, False),
        ("x86_64", True, False, True),
        ("x86_64", False, True, True),
        ("aarch64", False, False, None),
        ("arm64", False, False, None),
    ],
)
def test_which_cpus_multiply_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    avx512_bf16: bool,
    amx: bool,
    expected: bool | None,
) -> None:
    cpu(monkeypatch, machine, avx512_bf16, amx)
    assert bf16_units() is expected
    assert (bf16_advice(16) is not None) == (expected is False)
    assert (bf16_advice(4) is not None) == (expected is False)  # it computes in bf16 too
    assert bf16_advice(32) is None


@pytest.mark.parametrize(("bits", "units", "told"), [(16, False, 1), (16, True, 0), (32, False, 0)])
def test_a_start_on_a_cpu_without_units_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    units: bool,
    told: int,
) -> None:
    cpu(monkeypatch, "x86_64", units, False)
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(log.get_logger(), "propagate", True)
    config = ModelConfig(base="embedded", base_bits=bits)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            build_backbone(config, load_base_config(config), torch.device("cpu"), strict=False)
    # By identity: where a test before has left a handler there, a record is caught twice.
    records = {id(record): record.getMessage() for record in caplog.records}.values()
    lines = [message for message in records if "emulates" in message]
    assert len(lines) == told
    assert all(line.endswith("as long as with model.base_bits: 32") for line in lines)


@pytest.mark.parametrize(("units", "level"), [(False, "warn"), (True, "ok")])
def test_the_doctor_tells_it_too(monkeypatch: pytest.MonkeyPatch, units: bool, level: str) -> None:
    cpu(monkeypatch, "x86_64", False, units)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores, bf16 = doctor._cpu(2)
    assert bf16.level == level
    assert "bf16" in bf16.text
    assert "2 ranks share them" in cores.text
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS=3" in next(doctor._cpu(2)).text
