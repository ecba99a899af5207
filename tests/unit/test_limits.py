"""What a file or an argument may ask for: sizes, counts and names."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spt_ds import chat, cli, summary
from spt_ds.config import load
from spt_ds.config.load import load_config
from spt_ds.data.readers import read
from spt_ds.errors import MENDABLE, ConfigError, DataError, mendable
from spt_ds.run import predictions
from spt_ds.run.predictions import read_predictions
from spt_ds.sweep.cells import load_cells


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "/a", "", "x" * 201, "a\nb"])
def test_a_name_is_a_folder_below_another(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"name: {name!r}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="name"):
        load_config(str(path))
    path.write_text(f"name: {name!r}\nconfigs: [demo]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="name"):
        load_cells(path)


@pytest.mark.parametrize("name", ["a", ".a", "a..b", "1.5", "x" * 200])
def test_any_other_name_is_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"name: {name!r}\n", encoding="utf-8")
    assert load_config(str(path)).name == name


def test_a_sweep_of_very_many_cells_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    axes = ("train.seed", "train.max_steps", "prompts.tokens", "data.max_tokens")
    grid = "".join(f"  {axis}: {list(range(1, 1001))}\n" for axis in axes)
    path.write_text(f"name: s\nconfigs: [demo]\ngrid:\n{grid}", encoding="utf-8")
    with pytest.raises(ConfigError, match="the grid makes 1000000000000 cells, allowed are 10000"):
        load_cells(path)


def test_a_long_value_makes_a_name_that_a_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = f"name: s\nconfigs: [demo]\ngrid: {{data.cache_dir: [{'x' * 5000}]}}\n"
    path.write_text(text, encoding="utf-8")
    _, (cell,) = load_cells(path)
    assert len(cell.folder.name) < 120


def test_files_of_any_size_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"# " + b"x" * 2000)
    monkeypatch.setattr(load, "MAX_FILE_BYTES", 1 << 10)
    monkeypatch.setattr(chat, "MAX_PERSONA_BYTES", 1 << 10)
    monkeypatch.setattr(predictions, "MAX_LINE_BYTES", 1 << 10)
    with pytest.raises(ConfigError, match="larger than 0 MiB"):
        load_config(str(path))
    with pytest.raises(DataError, match="larger than 0 MiB"):
        chat.read_persona(path)
    with pytest.raises(DataError, match=r"x\.yaml:1: the line is longer than 0 MiB"):
        read_predictions(path)


def test_code_of_a_data_set_does_not_run(tmp_path: Path) -> None:
    """A script of this name was run by `datasets` before version 4."""
    folder = tmp_path / "talks"
    folder.mkdir()
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'RAN')!r}).touch()\n"
    (folder / "talks.py").write_text(code, encoding="utf-8")
    with pytest.raises(DataError, match="cannot load it"):
        list(read(f"hub:{folder}"))
    (folder / "train.jsonl").write_text(
        '{"persona": [], "history": ["hi"], "response": "x"}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match="cannot load it"):
        list(read(f"hub:{folder}"))
    assert not (tmp_path / "RAN").exists()


def test_a_device_without_end_is_no_persona() -> None:
    with pytest.raises(DataError, match="larger than 1 MiB"):
        chat.read_persona(Path("/dev/zero"))


@pytest.mark.parametrize("number", sorted(MENDABLE))
def test_what_the_disk_refuses_is_an_error_that_the_user_can_mend(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some\x1bfile")

    monkeypatch.setattr(summary, "summary_rows", refuse)
    assert summary.main(["run"]) == 2
    told = capsys.readouterr().err
    assert (
        told
        == f"spt-ds summary: some\\x1bfile: {os.strerror(number)}; give another path, or"
        + (" mend this one\n")
    )


def test_another_fault_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mendable(OSError(errno.EIO, "x", "file")) is None
    assert mendable(OSError(errno.ENOSPC, "x")) is None
    monkeypatch.setattr(summary, "summary_rows", lambda run: os.stat("/no/such/file"))
    with pytest.raises(FileNotFoundError):
        summary.main(["run"])


@pytest.mark.parametrize("command", ["summary", "evaluate", "report"])
def test_a_path_that_no_file_system_takes(command: str) -> None:
    assert cli.main([command, "x" * 5000]) == 2


def test_a_run_folder_that_no_file_system_takes() -> None:
    command = [sys.executable, "-m", "spt_ds.train", "--config", "demo", "--run-dir", "x" * 5000]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "File name too long" in done.stderr
