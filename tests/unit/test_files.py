"""Files and folders appear whole or not at all, also where the disk fails or processes race."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds import files


def full_disk() -> Iterator[str]:
    yield "new"
    raise OSError(28, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "DONE.json"
    files.write_whole(target, "old")
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(target, full_disk())
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    files.write_whole(target, ["ne", "w"])
    assert target.read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> None:
        with files.new_folder(tmp_path / "out") as part:
            (part / "a").write_text("".join(full_disk()))

    with pytest.raises(OSError, match="No space left"):
        broken()
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / "deep" / "out") as part:
        (part / "a").write_text("whole")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "whole"


def test_the_first_of_two_folders_stays(tmp_path: Path) -> None:
    def second() -> None:
        with files.new_folder(tmp_path / "out") as part:
            (part / "a").write_text("second")
            with files.new_folder(tmp_path / "out") as other:
                (other / "a").write_text("first")

    with pytest.raises(OSError, match="not empty"):
        second()
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_locks_come_with_their_age(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    os.utime(tmp_path / "b" / "lock", (0, 0))
    (first, young), (second, old) = files.build_locks(tmp_path)
    assert (first, second) == (tmp_path / "a" / "lock", tmp_path / "b" / "lock")
    assert 0 <= young < files.STALE_LOCK_S < old


def test_what_is_appended_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for content, size, kept in (
        (b"abcdef\n", 3, None),
        (b"ab\n", 100, b"ab\n"),
        (b"cdefgh\n", 5, b"ab\n"),
        (b"ij\n", 100, b"ab\nij\n"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            files.append_whole(path, content)
        except OSError:
            assert size < 10
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (path.read_bytes() if path.exists() else None) == kept
