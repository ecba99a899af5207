"""`spt-ds quantize`: what it leaves on disk, and what it never touches."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from spt_ds import files, quantize
from spt_ds.model import quant_write


def test_a_place_that_cannot_be_written_is_an_error_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quantize.main(["embedded", "/proc/quantised"]) == 2
    text = capsys.readouterr().err
    assert text.startswith(
        "spt-ds quantize: /proc/quantised: the quantised base cannot be written: "
    )
    assert "make room there" in text


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(quant_write, "save_file", full)
    assert quantize.main(["embedded", str(tmp_path / "q")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_stay_and_all_is_on_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "q.part" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work", encoding="utf-8")
    synced: list[str] = []
    sync = files.sync

    def note(path: Path) -> None:
        assert (tmp_path / "q").exists() == (path == tmp_path)
        synced.append(path.name)
        sync(path)

    monkeypatch.setattr(files, "sync", note)
    assert quantize.main(["embedded", str(tmp_path / "q")]) == 0
    assert mine.read_text(encoding="utf-8") == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.part"]
    assert {path.name for path in (tmp_path / "q").rglob("*")} < set(synced)
    assert synced[-1] == tmp_path.name
    assert (tmp_path / "q").stat().st_mode & 0o777 == mine.parent.stat().st_mode & 0o777
