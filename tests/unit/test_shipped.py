"""DeepSpeed files by name, and the Slurm scripts copied to where jobs are submitted."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from spt_ds import cli, shipped
from spt_ds.config.load import load_config
from spt_ds.errors import ConfigError
from spt_ds.placement.ds_check import plan_of_file
from spt_ds.run.folder import RunFolder
from tests.helpers.ds_files import sizes

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_deepspeed_file_by_its_name(name: str) -> None:
    assert (
        shipped.ds_config_path(name).read_bytes()
        == (ROOT / "ds_configs" / f"{name}.json").read_bytes()
    )


def test_the_plan_and_the_run_folder_take_a_name(tmp_path: Path) -> None:
    config = load_config("demo")
    assert plan_of_file("zero3", config, sizes(), 2).stage == 3
    RunFolder(tmp_path / "run").prepare(config, "zero3")
    copied = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert copied == json.loads((ROOT / "ds_configs" / "zero3.json").read_text())


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").write_text("{}")
    assert shipped.ds_config_path("zero3") == Path("zero3")


@pytest.mark.parametrize(
    ("name", "hint"), [("zero33", "did you mean 'zero3'"), ("x", "give a JSON file or a name")]
)
def test_an_unknown_name_is_refused_with_the_names(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        plan_of_file(name, load_config("demo"), sizes(), 1)
    assert all(known in str(caught.value) for known in NAMES)


def test_an_installation_without_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "spt_ds")
    with pytest.raises(ConfigError, match="ds_configs/ is not there; install spt-ds again"):
        shipped.ds_config_path("zero3")


def test_slurm_scripts_are_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm", "--copy", str(tmp_path / "jobs")]) == 0
    assert "sbatch" in capsys.readouterr().out
    made = tmp_path / "jobs" / "slurm"
    for script in (ROOT / "slurm").iterdir():
        if script.name == "site.env":
            continue  # the checkout's own
        copied = made / script.name
        assert copied.read_bytes() == script.read_bytes()
        assert stat.S_IMODE(copied.stat().st_mode) == stat.S_IMODE(script.stat().st_mode)
    assert os.access(made / "train.sbatch", os.X_OK)
    assert f"\nSPT_PYTHON={sys.executable}\n" in (made / "site.env").read_text()
    (made / "site.env").write_text("mine")
    assert cli.main(["slurm", "--copy", str(tmp_path / "jobs")]) == 2
    assert f"{made}: exists and is not overwritten" in capsys.readouterr().err
    assert (made / "site.env").read_text() == "mine"


def test_slurm_scripts_where_nothing_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["slurm", "--copy", str(tmp_path / "file")]) == 2
    assert "name another FOLDER" in capsys.readouterr().err


def test_slurm_scripts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm"]) == 0
    listed = capsys.readouterr().out.split()
    assert str(ROOT / "slurm" / "train.sbatch") in listed
