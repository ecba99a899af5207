"""Writes DeepSpeed files for tests, reads them back as plans or problems, and fixes what the
machine answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.placement import ds_machine
from spt_ds.placement.ds_check import plan_of_file
from spt_ds.placement.ds_machine import Hosts
from spt_ds.placement.estimate import BaseShape
from spt_ds.placement.zero_plan import ZeroPlan


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where async_io builds and no CUDA device is: the answers differ from one machine to
    the next.
    """
    monkeypatch.setattr(ds_machine, "_async_io_builds", lambda: True)
    monkeypatch.setattr(ds_machine, "_cuda", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SPT_NVME_PATH", raising=False)


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def sizes(hidden: int = 8, vocab: int = 100, inner: int = 32) -> BaseShape:
    """A base of one layer and one head."""
    tree = {"hidden_size": hidden, "vocab_size": vocab, "intermediate_size": inner}
    return BaseShape.from_config({**tree, "num_hidden_layers": 1, "num_attention_heads": 1})


def load(
    tmp_path: Path,
    tree: Any,
    cfg: Config | None = None,
    world: int = 2,
    shape: BaseShape | None = None,
    hosts: Hosts | None = None,
) -> ZeroPlan:
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return plan_of_file(str(path), cfg or Config(), shape or sizes(), world, hosts)


def problems(
    tmp_path: Path,
    tree: Any,
    cfg: Config | None = None,
    world: int = 2,
    shape: BaseShape | None = None,
) -> list[str]:
    """The problems of a file, one text each."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tree, cfg, world, shape)
    head, *lines = str(caught.value).split("\n")
    assert head == f"{tmp_path / 'ds.json'}: {len(lines)} problem(s) in the DeepSpeed configuration"
    return [line.strip() for line in lines]


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}
