"""What ZeRO-3 moves and what a sharded base keeps, counted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spt_ds import dist
from spt_ds.engine import zero
from spt_ds.errors import EngineError
from spt_ds.placement.zero_plan import ZeroPlan
from tests.distributed.scenes import ROOT, Scene, Setup, open_engine, windows
from tests.helpers.ranks import run_ranks


def counted(
    world: dist.World, folder: str, prompts: list[int], widths: Sequence[int] = (16,)
) -> list[dict[str, Any]]:
    """The rows of benchmarks/communication.py."""
    spec = importlib.util.spec_from_file_location(
        "communication", ROOT / "benchmarks" / "communication.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows: list[dict[str, Any]] = module.measure(folder, prompts, widths)
    return rows


def test_one_pass_gathers_as_often_for_any_number_of_prompts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
    )
    LlamaForCausalLM(base).save_pretrained(tmp_path)
    rows = run_ranks(2, counted, str(tmp_path), [4, 8])[0]
    by = {(row["way"], row["checkpointing"], row["K"]): row for row in rows}
    for recompute in ("off", "non_reentrant"):
        one, more = by["one pass", recompute, 4], by["one pass", recompute, 8]
        assert (one["bytes"], one["calls"]) == (more["bytes"], more["calls"])
        assert (
            one["bytes"] >= 2 * 0.9 * one["base_bytes"]
        )  # forward and backward: really nothing stays
        for prompts, least in ((4, 3.5), (8, 6.9)):
            assert (
                by["K passes", recompute, prompts]["bytes"]
                >= least * by["one pass", recompute, prompts]["bytes"]
            )


def kept(world: dist.World, setup: Setup) -> int:
    """Bytes that one micro-batch keeps for its backward pass, weights apart."""
    config, session, engine = open_engine(world, setup)
    batch = next(windows(config, session, world).windows(0)).micro[0]
    own = {id(p) for p in (*session.backbone.parameters(), *engine.trainables.parameters())}
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and tensor.is_floating_point():
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        session.backbone(session.spt.micro_losses, batch, 1, 1)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_a_sharded_base_keeps_what_a_whole_one_keeps(scene: Scene, arch: str) -> None:
    """No linear layer's input (as DeepSpeed's own linear keeps it), and no gathered weight."""
    options = scene.overrides(arch, "train.global_batch=1")
    (whole,) = run_ranks(1, kept, Setup(None, options))
    (sharded,) = run_ranks(1, kept, Setup(scene.ds("zero3"), options))
    assert sharded <= whole


def test_a_stale_build_lock_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    zero.check_build_locks()  # nothing is built
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(zero, "STALE_LOCK_S", 1.5)
    with pytest.raises(
        EngineError, match=r"async_io/lock: a build lock is .* old; a killed build left it"
    ):
        zero.check_build_locks()  # waits while it is young


def test_a_build_in_progress_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(zero.time, "sleep", lambda seconds: lock.unlink())  # type: ignore[attr-defined]
    zero.check_build_locks()
    assert not lock.exists()


def locked_on_one(world: dist.World, folder: str) -> str:
    """The second rank's host has the lock of a killed build; its fellow must not wait for it."""
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{folder}/{world.rank}"
    plan = ZeroPlan(3, "nvme", {})
    try:
        zero.Sharding(plan, world.device).before_load()
    except EngineError as error:
        return str(error)
    return ""


def test_a_stale_build_lock_on_one_host_ends_all(tmp_path: Path) -> None:
    lock = tmp_path / "1" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    first, second = run_ranks(2, locked_on_one, str(tmp_path))
    assert first == second
    assert "a killed build left it" in first
