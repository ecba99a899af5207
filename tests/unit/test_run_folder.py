"""The run folder: what may change between a run and its continuation, and what is written about a
run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_ds.config.load import key_paths, load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.run import folder as run_folder
from spt_ds.run.folder import RunFolder


def config(**sections: dict[str, object]) -> Config:
    return Config.model_validate({"name": "x", **sections})


def test_nothing_changed_is_no_difference() -> None:
    assert run_folder.differences(config(), config()) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "base", "facebook/opt-125m"),
        ("model", "base_bits", 32),
        ("prompts", "count", 8),
        ("losses", "tau_gold", 0.5),
        ("data", "train", "other.jsonl"),
        ("data", "max_tokens", 64),
        ("optim", "lr", 0.5),
        ("train", "global_batch", 8),
        ("train", "seed", 1),
        ("retriever", "projections", "shared"),
    ],
)
def test_what_moves_numbers_may_not_change(
    tmp_path: Path, section: str, key: str, value: object
) -> None:
    RunFolder(tmp_path).prepare(config(), None)
    RunFolder(tmp_path).metrics.write_text("{}\n")
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path).prepare(config(**{section: {key: value}}), None)
    old = getattr(getattr(config(), section), key)
    assert f"{section}.{key}: {old!r} -> {value!r}" in str(error.value)
    assert "choose another --run-dir" in str(error.value)
    assert load_config(str(tmp_path / "config.yaml")) == config()  # the first run's stays


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("engine", "placement", "zero3"),
        ("checkpoint", "keep_last", 7),
        ("log", "every_steps", 3),
        ("generate", "max_new_tokens", 5),
        ("train", "max_steps", 1000),
        ("train", "micro_batch", 1),
        ("train", "max_hours", 2.0),
        ("data", "workers", 0),
        ("model", "activation_checkpointing", "reentrant"),
        ("model", "attention", "eager"),
        ("model", "compile", "off"),
    ],
)
def test_what_moves_no_number_may_change(
    tmp_path: Path, section: str, key: str, value: object
) -> None:
    RunFolder(tmp_path).prepare(config(), None)
    RunFolder(tmp_path).metrics.write_text("{}\n")
    changed = config(**{section: {key: value}})
    RunFolder(tmp_path).prepare(changed, None)
    assert load_config(str(tmp_path / "config.yaml")) == changed


def test_a_refused_start_claims_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).prepare(config(data={"train": "misspelt"}), None)
    RunFolder(tmp_path).prepare(config(), None)
    assert load_config(str(tmp_path / "config.yaml")) == config()
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        RunFolder(tmp_path).prepare(config(data={"train": "misspelt"}), None)


@pytest.mark.parametrize(
    ("before", "now", "done"),
    [
        ({"max_steps": 4}, {"max_steps": 4}, True),
        ({"max_steps": 4}, {"max_steps": 3}, True),
        ({"max_steps": 4}, {"max_steps": 5}, False),
        ({"max_steps": 4}, {"max_steps": 4, "micro_batch": 1}, True),
        ({"max_steps": 4}, {"epochs": 2}, False),
        ({"epochs": 2}, {"epochs": 3}, False),
        ({"epochs": 2}, {"epochs": 1}, True),
        ({"epochs": 2}, {"max_steps": 9}, False),
    ],
)
def test_a_longer_run_is_not_done(
    tmp_path: Path, before: dict[str, object], now: dict[str, object], done: bool
) -> None:
    RunFolder(tmp_path).prepare(config(train=before), None)
    assert not RunFolder(tmp_path).is_done(config(train=before))
    RunFolder(tmp_path).done.write_text('{"step": 4}')
    assert RunFolder(tmp_path).is_done(config(train=now)) == done
    RunFolder(tmp_path).prepare(config(train=now), None)
    assert not RunFolder(tmp_path).done.exists()  # out of the way of a run that goes on


def test_another_configuration_is_refused_before_a_run_is_called_done(tmp_path: Path) -> None:
    RunFolder(tmp_path).prepare(config(), None)
    RunFolder(tmp_path).done.write_text('{"step": 4}')
    with pytest.raises(ConfigError, match=r"train\.seed: 0 -> 1"):
        RunFolder(tmp_path).is_done(config(train={"seed": 1}))


def test_every_free_option_exists() -> None:
    known = set(key_paths(Config))
    assert {path.partition(".")[0] for path in known} >= run_folder.FREE_SECTIONS
    assert known >= run_folder.FREE_OPTIONS


def test_all_differences_come_together() -> None:
    found = run_folder.differences(config(), config(optim={"lr": 0.5}, train={"seed": 3}))
    assert found == ["optim.lr: 0.001 -> 0.5", "train.seed: 0 -> 3"]


def test_the_folder_tells_of_the_run_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    ds = tmp_path / "ds.json"
    ds.write_text("{}")
    RunFolder(tmp_path / "run").prepare(config(), str(ds))
    written = {path.name: path for path in (tmp_path / "run").iterdir()}
    assert set(written) == {"config.yaml", "environment.json", "deepspeed.json", "checkpoints"}
    environment = json.loads(written["environment.json"].read_text())
    assert environment["variables"]["SLURM_JOB_ID"] == "17"
    assert environment["packages"].keys() >= {"torch", "deepspeed", "transformers"}
    assert environment["commit"]
    assert "hunter2" not in "".join(path.read_text() for path in written.values() if path.is_file())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"file/run: cannot be written .*choose another --run-dir"
    ):
        RunFolder(tmp_path / "file" / "run").prepare(config(), None)
