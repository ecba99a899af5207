"""Writes DeepSpeed files for tests, reads them back as plans or problems, and fixes what the
machine answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.schema import Config
from spt_ds.engine import ds_config
from spt_ds.engine.ds_config import DsPlan, load_ds_config
from spt_ds.errors import ConfigError


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where async_io builds and no CUDA device is: the answers differ from one machine to
    the next.
    """
    monkeypatch.setattr(ds_config, "_async_io_builds", lambda: True)
    monkeypatch.setattr(ds_config, "_cuda", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SPT_NVME_PATH", raising=False)


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def base_folder(path: Path, hidden: int = 8, vocab: int = 100, inner: int = 32) -> str:
    """A folder with the config.json of a base: enough for the checks of sizes."""
    tree = {"hidden_size": hidden, "vocab_size": vocab, "intermediate_size": inner}
    (path / "config.json").write_text(json.dumps(tree))
    return str(path)


def load(tmp_path: Path, tree: Any, cfg: Config | None = None, world: int = 2) -> DsPlan:
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return load_ds_config(str(path), cfg or Config(), world)


def problems(tmp_path: Path, tree: Any, cfg: Config | None = None, world: int = 2) -> list[str]:
    """The problems of a file, one text each."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tree, cfg, world)
    head, *lines = str(caught.value).split("\n")
    assert head == f"{tmp_path / 'ds.json'}: {len(lines)} problem(s) in the DeepSpeed configuration"
    return [line.strip() for line in lines]


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}
