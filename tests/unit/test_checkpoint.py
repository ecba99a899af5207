"""A checkpoint is whole or it is none: damage is named, older ones stay, a full disk harms nothing,
no code runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spt_ds.errors import CheckpointError
from spt_ds.run import checkpoint
from spt_ds.run.checkpoint import MARKER, OPTIMIZER, STATE, TRAINABLES, Checkpoint
from spt_ds.run.folder import RunFolder

FILES = (TRAINABLES, OPTIMIZER, STATE, MARKER)


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "bank.weight": torch.randn(3, 2, 5, generator=generator),
        "retriever.bias": torch.randn(5, generator=generator),
    }
    moments = {f"{name}.exp_avg": tensor * 2 for name, tensor in tensors.items()}
    moments |= {f"{name}.step": torch.tensor(float(step)) for name in tensors}
    return Checkpoint(
        tensors, moments, {"step": step, "run": {"best_nll": 1.5}, "config": "name: x"}
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    def equal(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
        return x.keys() == y.keys() and all(
            x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x
        )

    return (
        equal(a.trainables, b.trainables) and equal(a.optimizer, b.optimizer) and a.state == b.state
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = make(7)
    path = checkpoint.save(tmp_path, saved)
    assert path == tmp_path / "step-00000007"
    assert same(checkpoint.load(path), saved)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert [folder.name for folder in tmp_path.iterdir()] == [path.name]


def test_only_what_trains_is_in_it(tmp_path: Path) -> None:
    """A view of a large tensor takes its own bytes, not those of the tensor it looks into."""
    large = torch.zeros(1_000_000)
    path = checkpoint.save(
        tmp_path, Checkpoint({"a": large[:10], "b": large[5:15]}, {}, {"step": 1})
    )
    assert (path / TRAINABLES).stat().st_size < 1000
    assert checkpoint.load(path).trainables.keys() == {"a", "b"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_an_older_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    old, new = checkpoint.save(tmp_path, make(1)), checkpoint.save(tmp_path, make(2))
    damage(new / name)
    with pytest.raises(CheckpointError, match=r"damaged|incomplete") as error:
        checkpoint.load(new)
    assert str(new) in str(error.value)
    if not (name == MARKER and damage in (truncate, flip, empty)):
        assert name in str(error.value)
    with caplog.at_level(logging.WARNING), listened(caplog):
        found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == old
    assert same(found[1], make(1))
    assert str(new) in caplog.text
    assert "trying an older checkpoint" in caplog.text


class listened:
    """Lets caplog hear the package's logger, which does not propagate."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.handler = caplog.handler

    def __enter__(self) -> None:
        from spt_ds.log import get_logger

        get_logger().addHandler(self.handler)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("spt_ds").removeHandler(self.handler)


def test_every_flipped_bit_of_the_marker_is_seen_or_harmless(tmp_path: Path) -> None:
    saved = make(1)
    path = checkpoint.save(tmp_path, saved)
    good = (path / MARKER).read_bytes()
    for place in range(len(good)):
        data = bytearray(good)
        data[place] ^= 1 << (place % 7)
        (path / MARKER).write_bytes(bytes(data))
        with contextlib.suppress(CheckpointError):
            assert same(checkpoint.load(path), saved)


def test_nothing_good_gives_nothing(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "missing") is None
    path = checkpoint.save(tmp_path, make(1))
    (path / MARKER).unlink()
    assert checkpoint.load_newest(tmp_path) is None


def test_a_half_written_folder_is_never_looked_at(tmp_path: Path) -> None:
    """As a kill during a save leaves it, and the next save of that step takes its place."""
    whole = checkpoint.save(tmp_path, make(1))
    half = tmp_path / ".step-00000002.writing"
    half.mkdir()
    (half / TRAINABLES).write_bytes(b"half")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == whole
    checkpoint.save(tmp_path, make(2))
    assert not half.exists()
    assert checkpoint.load(tmp_path / "step-00000002").state["step"] == 2


def test_a_whole_checkpoint_is_never_replaced_and_a_damaged_one_is(tmp_path: Path) -> None:
    """Replacing one of the same step left a moment without it: a kill then lost the newest state of
    a run.
    """
    first = make(1)
    path = checkpoint.save(tmp_path, first)
    again = Checkpoint({"other": torch.ones(2)}, {}, {"step": 1})
    assert same(checkpoint.load(checkpoint.save(tmp_path, again)), first)
    (path / checkpoint.STATE).write_text("{}", encoding="utf-8")
    assert same(checkpoint.load(checkpoint.save(tmp_path, again)), again)


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [
        (1, None, [6]),
        (2, None, [5, 6]),
        (2, 2, [2, 5, 6]),
        (2, 6, [5, 6]),
        (9, 1, [1, 2, 3, 4, 5, 6]),
        (1, 9, [6]),
    ],
)
def test_prune_keeps_the_last_and_the_best(
    tmp_path: Path, keep_last: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, make(step))
    checkpoint.prune(tmp_path, keep_last, best, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_prune_counts_only_whole_ones(tmp_path: Path) -> None:
    """A damaged newest one does not push out the last good one."""
    for step in (1, 2):
        checkpoint.save(tmp_path, make(step))
    (tmp_path / "step-00000002" / MARKER).unlink()
    checkpoint.prune(tmp_path, 1, None, 2)
    assert checkpoint.load(tmp_path / "step-00000001").state["step"] == 1


def test_damaged_newer_ones_push_out_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a resume from step 2, steps 3 and 4 with a flipped byte counted as the newest: step 2
    was removed.
    """
    for step in range(1, 5):
        checkpoint.save(tmp_path, make(step))
    for step in (3, 4):
        flip(tmp_path / f"step-{step:08d}" / TRAINABLES)
    checkpoint.prune(tmp_path, 1, None, 2)
    assert checkpoint.load(tmp_path / "step-00000002").state["step"] == 2
    with caplog.at_level(logging.WARNING), listened(caplog):
        checkpoint.set_aside(tmp_path, 2)
        checkpoint.set_aside(tmp_path, 2)  # nothing is left to say
    assert [record.message.count("step-0000000") for record in caplog.records] == [2]
    names = ["damaged-step-00000003", "damaged-step-00000004", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_missing_best_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = make(3)
    saved.state["run"]["best_step"] = 2
    last = checkpoint.save(tmp_path / "checkpoints", saved)
    with caplog.at_level(logging.WARNING), listened(caplog):
        assert checkpoint.find(RunFolder(tmp_path).checkpoints, "last") == last
        assert not caplog.records
        assert checkpoint.find(RunFolder(tmp_path).checkpoints, "best") == last
    assert (
        "step-00000002: the best checkpoint is missing; using the last one, step-00000003"
        in caplog.text
    )


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    """The n-th flush to disk fails: four files, the folder, its parent."""
    old = make(1)
    checkpoint.save(tmp_path, old)
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(tmp_path, make(2))
    assert os.strerror(number) in str(error.value)
    assert "Earlier checkpoints are intact" in str(error.value)
    assert checkpoint.load(tmp_path / "step-00000001").state == old.state
    assert not list(tmp_path.glob(".*"))
    if call == 6:  # renamed already: whole, only not known to be on the disk
        assert same(checkpoint.load(tmp_path / "step-00000002"), make(2))
    else:
        assert not (tmp_path / "step-00000002").exists()
    monkeypatch.undo()
    checkpoint.save(tmp_path, make(2))
    assert checkpoint.load(tmp_path / "step-00000002").state["step"] == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    old = Checkpoint({"a": torch.ones(100_000)}, {}, {"step": 1})  # 0.4 MB
    checkpoint.save(small_disk, old)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(small_disk, Checkpoint({"a": torch.ones(200_000)}, {}, {"step": 2}))
    found = checkpoint.load_newest(small_disk)
    assert found is not None
    assert same(found[1], old)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    checkpoint.save(
        small_disk, Checkpoint({"a": torch.ones(100_000)}, {}, {"step": 2})
    )  # room again


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make(1)
    path = checkpoint.save(tmp_path, saved)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert same(checkpoint.load(path), saved)
    monkeypatch.undo()


def test_a_forged_pickle_is_refused(tmp_path: Path) -> None:
    """With the right sha256 and all: the reader of tensors knows no code."""
    path = checkpoint.save(tmp_path, make(1))
    target = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (target,))

    (path / TRAINABLES).write_bytes(pickle.dumps(Bomb()))
    marker = json.loads((path / MARKER).read_text())
    marker["sha256"][TRAINABLES] = hashlib.sha256((path / TRAINABLES).read_bytes()).hexdigest()
    (path / MARKER).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="not written by spt_ds"):
        checkpoint.load(path)
    assert not target.exists()


def test_another_format_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(1))
    marker = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps({**marker, "format": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this version reads 1"):
        checkpoint.load(path)


def test_tensors_of_another_run_change_nothing() -> None:
    module = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    wrong = {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore_trainables(module, wrong, Path("here"))
    for text in ("here:", "missing bias", "unknown extra", "weight is (3, 3), the run has (2, 3)"):
        assert text in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_restored_optimizer_takes_the_same_next_step() -> None:
    def fresh() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = nn.Linear(4, 3)
        groups: list[dict[str, Any]] = [{"params": [module.weight]}, {"params": [module.bias]}]
        return module, torch.optim.AdamW(groups, lr=0.1)

    def step(module: nn.Linear, optimizer: torch.optim.AdamW, number: int) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + number)
        optimizer.step()

    names = ["weight", "bias"]
    first, optimizer = fresh()
    assert checkpoint.optimizer_tensors(optimizer, names) == {}
    for number in range(3):
        step(first, optimizer, number)
    moments = {k: v.clone() for k, v in checkpoint.optimizer_tensors(optimizer, names).items()}
    assert set(moments) == {f"{n}.{k}" for n in names for k in ("step", "exp_avg", "exp_avg_sq")}
    second, restored = fresh()
    checkpoint.restore_trainables(
        second, {n: p.detach() for n, p in first.named_parameters()}, Path("x")
    )
    checkpoint.restore_optimizer(restored, names, moments, Path("x"))
    for number in range(3, 5):
        step(first, optimizer, number)
        step(second, restored, number)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def resign(path: Path, **files: bytes) -> None:
    """Change files of a checkpoint and write its marker anew, as whoever gives it away can."""
    marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    for name, data in files.items():
        name = {"state": STATE, "trainables": TRAINABLES, "optimizer": OPTIMIZER}[name]
        (path / name).write_bytes(data)
        marker["sha256"][name] = hashlib.sha256(data).hexdigest()
    (path / MARKER).write_text(json.dumps(marker), encoding="utf-8")


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "5",
        '{"step": 2, "run": []}',
        '{"step": "2", "run": {}}',
        '{"step": 3, "run": {}}',
        '{"step": true, "run": {}}',
        '{"step": 2, "run": {"best_step": "../../x"}}',
        '{"step": 2, "run": {"best_step": -1}}',
        '{"step": 2, "run": {"best_step": ' + "9" * 5000 + "}}",
        "[" * 5000,
        "\xff",
    ],
    ids=lambda state: state[:44],
)
def test_a_state_that_is_signed_anew_is_read_with_care(state: str, tmp_path: Path) -> None:
    older, newer = (checkpoint.save(tmp_path, make(step)) for step in (1, 2))
    resign(newer, state=state.encode("latin-1"))
    with pytest.raises(CheckpointError, match="not written by spt_ds"):
        checkpoint.load(newer)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == older
    assert checkpoint.find(tmp_path, "best") == older


@pytest.mark.parametrize(
    "marker",
    [
        '{"format": 1, "step": ' + "9" * 5000 + "}",
        "[" * 5000,
        '{"format": 1, "sha256": []}',
        '{"format": 1, "sha256": 5}',
        '{"format": [[[[[]]]]], "sha256": {}}',
        "5",
    ],
    ids=lambda marker: marker[:30],
)
def test_a_marker_of_any_kind_hides_no_older_checkpoint(marker: str, tmp_path: Path) -> None:
    older, newer = (checkpoint.save(tmp_path, make(step)) for step in (1, 2))
    (newer / MARKER).write_text(marker, encoding="utf-8")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == older


@pytest.mark.parametrize(
    "change",
    [
        lambda moments: moments.update({"weight.exp_avg": torch.zeros(1, 2)}),
        lambda moments: moments.update({"weight.step": torch.zeros(3)}),
        lambda moments: moments.update({"weight.max_exp_avg_sq": torch.zeros(3, 4)}),
        lambda moments: moments.update({"other.step": torch.zeros(())}),
        lambda moments: moments.pop("bias.exp_avg"),
    ],
)
def test_moments_of_another_run_are_refused(change: Any) -> None:
    module = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(4)).sum().backward()
    optimizer.step()
    names = ["weight", "bias"]
    moments = checkpoint.optimizer_tensors(optimizer, names)
    change(moments)
    fresh = torch.optim.AdamW(module.parameters())
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore_optimizer(fresh, names, moments, Path("x"))
    assert not fresh.state
