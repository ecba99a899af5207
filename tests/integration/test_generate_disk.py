"""Replies on a disk that fills up or lies: one message, nothing half-written, nothing lost."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

import spt_ds
from spt_ds import dist
from spt_ds.engine.generator import Generator
from spt_ds.engine.session import Session, open_split
from spt_ds.errors import ConfigError, EngineError
from spt_ds.run.folder import ReplyFolder
from spt_ds.run.lock import only_start
from tests.helpers.runs import make_run


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    before = dict(os.environ)
    yield spt_ds.load(make_run(tmp_path_factory.mktemp("runs")).path)._session
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def whole(session: Session, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an undisturbed generation writes."""
    return generate(session, tmp_path_factory.mktemp("whole"))


def generate(session: Session, out: Path) -> bytes:
    store = open_split(session, "test")
    return Generator(session, store, ReplyFolder(out), "test", "step-7").run().read_bytes()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(session: Session, out: Path, size: int) -> None:
    with (
        largest_file(size),
        pytest.raises(EngineError, match=r"cannot be written .*resumes after the replies"),
    ):
        generate(session, out)


def test_a_full_disk_leaves_whole_replies_only_and_the_next_start_goes_on(
    session: Session, whole: bytes, tmp_path: Path
) -> None:
    fill(session, tmp_path, 2 * len(whole) // 3)
    (part,) = tmp_path.glob(".parts-*/rank-0.jsonl")
    kept = part.read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < len(kept) < len(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [part.parent.name]
    assert generate(session, tmp_path) == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    session: Session, whole: bytes, tmp_path: Path
) -> None:
    fill(session, tmp_path, 10)
    assert not list(tmp_path.iterdir())
    assert generate(session, tmp_path) == whole


def test_a_disk_that_is_full_at_the_end_leaves_no_half_file(
    session: Session, whole: bytes, tmp_path: Path
) -> None:
    """The predictions fit, their record does not."""
    fill(session, tmp_path, len(whole) + 9 * whole.count(b"\n"))
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".writing")]
    assert generate(session, tmp_path) == whole


@pytest.mark.parametrize("place", [0, 5, 300, -2])
@pytest.mark.parametrize("byte", [b"\xff", b"x", b"\n", b"\x00"])
def test_a_broken_byte_in_a_part_file_costs_its_reply_alone(
    session: Session, whole: bytes, tmp_path: Path, place: int, byte: bytes
) -> None:
    fill(session, tmp_path, 2 * len(whole) // 3)
    (part,) = tmp_path.glob(".parts-*/rank-0.jsonl")
    content = bytearray(part.read_bytes())
    content[place : place + 1 or None] = byte
    part.write_bytes(content)
    assert generate(session, tmp_path) == whole


def test_two_generations_in_one_folder(session: Session, whole: bytes, tmp_path: Path) -> None:
    with (
        only_start(tmp_path, "wait"),
        pytest.raises(ConfigError, match=r"another start works .*give another --out"),
    ):
        generate(session, tmp_path)
    assert generate(session, tmp_path) == whole


def test_a_record_that_cannot_be_read_is_made_anew(
    session: Session, whole: bytes, tmp_path: Path
) -> None:
    generate(session, tmp_path)
    for content in ("[" * 5000, "9" * 5000, "[]", "\udcff"):
        ReplyFolder(tmp_path).record.write_bytes(content.encode("utf-8", "surrogateescape"))
        assert generate(session, tmp_path) == whole
