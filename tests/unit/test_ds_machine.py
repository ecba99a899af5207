"""DeepSpeed files: what depends on the machine. Disk, compiler, CUDA, ranks per host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.schema import Config
from spt_ds.placement import ds_machine
from spt_ds.placement.choose import choose_placement
from spt_ds.placement.ds_check import plan_of_kind
from spt_ds.placement.ds_machine import Hosts
from spt_ds.placement.estimate import FIXED_BYTES, BaseShape, needs_of
from spt_ds.placement.known_bases import KNOWN_BASES
from spt_ds.placement.memory import Memory
from tests.helpers.ds_files import config, load, plain_machine, problems, sizes, zero

__all__ = ["plain_machine"]  # a fixture
pytestmark = pytest.mark.usefixtures("plain_machine")

# --- NVMe


def nvme(path: Path | str = "auto", **keys: Any) -> dict[str, Any]:
    return zero(offload_param={"device": "nvme", "nvme_path": str(path), **keys})


def test_nvme_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    plan = load(tmp_path, nvme(tmp_path))
    folder = Path(plan.engine_config["zero_optimization"]["offload_param"]["nvme_path"])
    assert folder.parent == tmp_path
    assert not folder.exists()
    (folder / "zero_stage_3").mkdir(parents=True)
    plan.remove_swap_files()
    assert not folder.exists()
    assert tmp_path.exists()
    plan_of_kind("zero3", Config(), 2).remove_swap_files()


def test_nvme_auto_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPT_NVME_PATH", str(tmp_path))
    folder = load(tmp_path, nvme()).engine_config["zero_optimization"]["offload_param"]["nvme_path"]
    assert Path(folder).parent == tmp_path


def test_nvme_path_must_exist(tmp_path: Path) -> None:
    where = "zero_optimization.offload_param.nvme_path"
    assert problems(tmp_path, zero(offload_param={"device": "nvme"})) == [
        f'{where}: missing; give a folder on a local disk, or "auto"'
    ]
    assert problems(tmp_path, nvme(tmp_path / "gone")) == [
        f"{where}: {tmp_path / 'gone'} is no such folder; create it on every host, or name another"
    ]


def test_nvme_path_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
    assert problems(tmp_path, nvme(tmp_path)) == [
        f"zero_optimization.offload_param.nvme_path: {tmp_path} is not writable; create it on every"
        " host, or name another"
    ]


def test_nvme_needs_async_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_machine, "_async_io_builds", lambda: False)
    assert problems(tmp_path, nvme(tmp_path)) == [
        "zero_optimization.offload_param.device: nvme needs DeepSpeed's async_io, which does not"
        " build here: `apt-get install libaio-dev` (libaio-devel with dnf), and a C compiler"
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_nvme_takes_packed_weights(tmp_path: Path, bits: int) -> None:
    plan = load(tmp_path, nvme(tmp_path), config(model={"base_bits": bits}))
    assert plan.offload == "nvme"
    assert plan.engine_config["bf16"] == {
        "enabled": True
    }  # the dtype of the disk buffers, whose name packed bytes bear


def test_nvme_buffer_fits_the_largest_shard(tmp_path: Path) -> None:
    shape = sizes(hidden=8, vocab=101, inner=32)  # the table: 808 elements
    plan = load(tmp_path, nvme(tmp_path, buffer_size="auto"), world=3, shape=shape)
    assert plan.engine_config["zero_optimization"]["offload_param"]["buffer_size"] == 270
    assert problems(tmp_path, nvme(tmp_path, buffer_size=269), world=3, shape=shape) == [
        "zero_optimization.offload_param.buffer_size: 269 elements are too few: the largest"
        ' parameter takes 270 on each of 3 ranks; give at least that, or "auto"'
    ]


def test_nvme_releases_parameters_at_once(tmp_path: Path) -> None:
    assert (
        load(tmp_path, nvme(tmp_path)).engine_config["zero_optimization"][
            "stage3_max_reuse_distance"
        ]
        == 0
    )
    tree = nvme(tmp_path)
    tree["zero_optimization"]["stage3_max_reuse_distance"] = 5e8
    assert problems(tmp_path, tree) == [
        "zero_optimization.stage3_max_reuse_distance: 500000000 keeps parameters gathered, and each"
        ' holds a disk buffer, until DeepSpeed runs out of them; set it to 0 or "auto"'
    ]


# --- ZeRO++


@pytest.mark.parametrize("asked", [{}, {"zero_hpz_partition_size": "auto"}])
@pytest.mark.parametrize(
    ("local", "world", "bits", "room", "ranks"),
    [
        (2, 4, 16, 5, 2),
        (8, 64, 16, 5, 8),
        (4, 4, 16, 5, 0),  # one host, or hosts that differ
        (1, 4, 16, 5, 0),  # a whole copy on each rank is no sharding
        (2, 4, 32, 5, 0),
        (2, 4, 4, 5, 0),
        (2, 4, 16, 4, 0),  # does not fit
    ],
)
def test_a_second_copy_per_host_is_made_where_it_saves_gathers_and_fits(
    tmp_path: Path,
    asked: dict[str, str],
    local: int,
    world: int,
    bits: int,
    room: int,
    ranks: int,
) -> None:
    cfg = config(model={"base_bits": bits})
    plan = load(tmp_path, zero(**asked), cfg, world=world, hosts=Hosts(local, 5, room))
    assert plan.copy_ranks == ranks
    assert plan.engine_config["zero_optimization"].get("zero_hpz_partition_size", 0) == ranks
    said = [note for note in plan.notes if "zero_hpz_partition_size" in note]
    # A run to which it cannot apply hears of it only where the file names it.
    assert len(said) == bool(asked or 1 < local < world)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_base_that_is_offloaded_gets_no_second_copy(tmp_path: Path, device: str) -> None:
    tree = nvme(tmp_path)
    tree["zero_optimization"]["offload_param"] |= {"device": device}
    assert load(tmp_path, tree, world=4, hosts=Hosts(2, 5, 5)).copy_ranks == 0


def test_a_second_copy_is_in_the_plan_and_makes_no_layer_recompute(tmp_path: Path) -> None:
    """Llama-2-7B on two hosts of two GPUs: 3.1 GiB of shares, 6.3 GiB of the second copy."""
    shape = BaseShape.from_config(KNOWN_BASES["meta-llama/Llama-2-7b-hf"])
    asked = config(engine={"placement": "zero3"})
    needs = needs_of(asked, shape, 4)
    copy = needs.base // 2
    least = FIXED_BYTES + needs.trainables + needs.resident["zero3"] + needs.activations
    for spare, ranks in ((copy, 2), (copy - 1, 0)):
        memory = Memory(least + spare, None)
        found = choose_placement(asked, shape, None, 4, memory, host_ranks=2)
        assert found.zero.copy_ranks == ranks
        assert found.recompute == "off"
    # A file that names the ranks is obeyed, and its copy takes room from the activations.
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(zero(zero_hpz_partition_size=2)))
    found = choose_placement(asked, shape, str(file), 4, Memory(least, None), host_ranks=2)
    assert (found.zero.copy_ranks, found.recompute) == (2, "non_reentrant")


def test_hpz_and_nvme_exclude_each_other(tmp_path: Path) -> None:
    tree = nvme(tmp_path)
    tree["zero_optimization"]["zero_hpz_partition_size"] = 2
    assert problems(tmp_path, tree, world=4) == [
        "zero_optimization.zero_hpz_partition_size: DeepSpeed cannot keep the second copy on a"
        " disk; set it to 1, or offload_param.device to cpu"
    ]


@pytest.mark.parametrize(
    ("bits", "cuda", "on"),
    [(16, True, True), (16, False, False), (4, True, False), (32, True, False)],
)
def test_quantised_gather_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, cuda: bool, on: bool
) -> None:
    monkeypatch.setattr(ds_machine, "_cuda", lambda: cuda)
    plan = load(tmp_path, zero(zero_quantized_weights="auto"), config(model={"base_bits": bits}))
    assert plan.engine_config["zero_optimization"]["zero_quantized_weights"] is on
    assert ("is off" in plan.notes[0]) is not on
