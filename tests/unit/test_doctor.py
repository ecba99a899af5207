"""Every finding of the doctor on machines that have the fault, and its exit status."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spt_ds import doctor
from spt_ds.engine import backends
from spt_ds.model.attention import Branches
from spt_ds.model.quant import QuantLinear
from tests.helpers.ranks import free_port, run_ranks


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_backends", lambda: iter(()))  # seconds in another process
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str], level: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(level)]


def test_a_healthy_machine_has_no_failure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert lines(capsys, "FAIL") == []


def test_the_lock_of_a_killed_build_is_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new"):
        (home / name).mkdir()
        (home / name / "lock").touch()
    os.utime(home / "old" / "lock", (0, 0))
    assert doctor.main([]) == 2
    (failure,) = lines(capsys, "FAIL")
    assert str(home / "old" / "lock") in failure


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [(0, 1, "world size 1 on a host with 4 GPUs"), (4, 5, "local rank 4 has no GPU")],
)
def test_ranks_that_do_not_fit_the_gpus(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    size: int,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    for name, value in {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
    }.items():
        monkeypatch.setenv(name, str(value))
    doctor.main([])
    assert expected in capsys.readouterr().out


def test_a_full_disk_is_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    assert doctor.main([]) == 0
    assert len(lines(capsys, "warn")) == 2


def test_a_rank_with_a_fault_of_its_own_says_so_and_does_not_wait_for_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no_such_package"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--distributed"]) == 2
    (failure,) = lines(capsys, "FAIL")
    assert f"rank 1 on {socket.gethostname()}: no_such_package cannot be imported" in failure


def test_what_a_job_reads_is_looked_at(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--config", "demo", "--deepspeed_config", "ds_configs/zero3.json"]) == 0
    assert [line.split(":")[0] for line in lines(capsys, "ok")][-5:] == [
        "ok   base",
        "ok   data.train",
        "ok   data.valid",
        "ok   data.test",
        "ok   DeepSpeed file",
    ]
    assert doctor.main(["--config", "demo", "--set", f"data.test={home}/none.jsonl"]) == 2
    assert f"{home}/none.jsonl" in lines(capsys, "FAIL")[0]
    assert doctor.main(["--config", "demo", "--set", f"model.base={home}/base"]) == 2
    assert f"{home}/base" in lines(capsys, "FAIL")[0]


def test_a_rank_that_meets_nobody_says_where_it_waited(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--distributed", "--timeout", "2"]) == 2
    (failure,) = lines(capsys, "FAIL")
    assert (
        f"rank 1 on {socket.gethostname()}: not all of 2 ranks met at 127.0.0.1:{port} within 2 s"
        in failure
    )


def _measure(world: object) -> float:
    from spt_ds import dist

    return doctor._bandwidth(dist)


def test_the_bandwidth_is_that_of_an_all_reduce() -> None:
    assert all(0.01 < gib_s < 1000 for gib_s in run_ranks(2, _measure))


def test_what_differs_between_ranks_is_listed_by_rank() -> None:
    facts = [
        {"host": f"n{rank}", "torch": version} for rank, version in enumerate(["2.9", "2.9", "2.8"])
    ]
    found = doctor._same("torch", facts)
    assert found.level == "FAIL"
    assert "2.9: rank 0 on n0, rank 1 on n1; 2.8: rank 2 on n2" in found.text
    assert doctor._same("torch", facts[:2]).level == "ok"


def test_clocks_that_differ_are_a_warning() -> None:
    assert doctor._clocks([5.0, 5.5, 6.0]).level == "ok"
    assert doctor._clocks([5.0, 95.0]).line().startswith("warn clocks differ by 90 s")


def test_each_backend_is_tried_by_one_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    found = lines(capsys, "ok")
    assert sum("not usable here" in line for line in found) == 2  # flash and varlen on a CPU
    tried = [line for line in found if "from plain PyTorch" in line]
    assert [line.removeprefix("ok   ").partition(":")[0] for line in tried] == [
        "attention sdpa",
        "attention eager",
        "weights of 8 bits",
        "weights of 4 bits",
        "DeepSpeed ZeRO-3",
    ]


def faults(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that fail, tried in this process but for DeepSpeed."""
    monkeypatch.setattr(backends, "_sharded", lambda device: 0.0)
    return [trial.name for trial in backends.trials(torch.device("cpu")) if not trial.works]


def test_a_backend_that_is_wrong_or_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(monkeypatch) == []
    right = Branches.attend_row
    with monkeypatch.context() as patch:
        patch.setattr(Branches, "attend_row", lambda self, *args: 1.1 * right(self, *args))
        assert faults(patch) == ["attention sdpa", "attention eager"]
    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "dequantised", lambda self, dtype: torch.zeros(96, 128))
        assert faults(patch) == ["weights of 8 bits", "weights of 4 bits"]
    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "forward", lambda self, x: x @ x.new_full((128, 96), math.nan))
        assert faults(patch) == ["weights of 8 bits", "weights of 4 bits"]

    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr("spt_ds.model.quant.quantise", broken)
    monkeypatch.setattr(backends, "_sharded", lambda device: 0.0)
    notes = [trial.note for trial in backends.trials(torch.device("cpu")) if not trial.works]
    assert notes == ["RuntimeError: no kernel image is available for execution on the device"] * 2


def test_a_trial_that_ends_its_process_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"name": "attention sdpa", "works": true, "note": "fine"}'
    code = f"import os; print({said!r}, flush=True); os.kill(os.getpid(), 11)"
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: run([sys.executable, "-c", code], **kwargs)
    )
    found = [finding.line() for finding in doctor._backends()]
    assert found[0] == "ok   attention sdpa: fine"
    assert found[1] == "FAIL the trial of the next backend ended with -11: no message"
