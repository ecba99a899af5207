"""Where decoder layers are compiled, where they are not and why, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.engine import compiling
from spt_ds.engine.compiling import WORTH_STEPS, compile_base
from spt_ds.engine.trainer import open_trainer
from spt_ds.errors import ConfigError, ModelError
from spt_ds.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
NO_PROMPTS = [
    *("prompts.count=1", "prompts.tokens=0", "losses.selection=0", "losses.fusion=0"),
    "losses.contrastive=0",
]
LORA = ["method.type=lora", "model.base_bits=32", *NO_PROMPTS]
FULL = ["method.type=full", "model.base_bits=32", *NO_PROMPTS]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["model.base_bits=4"], "compile is on, and base_bits is 4, .*; set compile: auto, or"),
        (["model.base_bits=8"], "compile is on, and base_bits is 8"),
        (["model.base_bits=16", "model.base_matmul=fp8"], "compile is on, and base_matmul is fp8"),
        (LORA, "method.type: lora trains weights of the base, and model.compile is on"),
        (FULL, "method.type: full trains weights of the base, and model.compile is on"),
    ],
)
def test_what_does_not_go_together_is_named(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("demo", [*options, "model.compile=on"])
    load_config("demo", options)  # auto leaves such a base eager


def test_a_sharded_base_is_refused(tmp_path: Path) -> None:
    config, file = load_config("demo", ["model.compile=on"]), ROOT / "ds_configs" / "zero3.json"
    with (
        pytest.raises(ConfigError, match="needs the whole base on each rank, and this run shards"),
        open_trainer(config, RunFolder(tmp_path / "run"), str(file), dist.init(60)),
    ):
        pass
    assert not (tmp_path / "run").exists()


def session(config: Config, device: str = "cuda:0", sharded: bool = False) -> Any:
    """As much of a session as the decision reads."""
    return SimpleNamespace(
        config=config,
        world=SimpleNamespace(device=torch.device(device)),
        sharding=SimpleNamespace(on=sharded),
        backbone=lambda function: None,
    )


@pytest.mark.parametrize(
    ("options", "found", "told"),
    [
        ([], {}, ""),
        ([], {"device": "cpu"}, "they pay on a GPU"),
        ([], {"sharded": True}, "the base is sharded"),
        (["model.base_bits=4"], {}, "base_bits is 4, whose layers are not compiled"),
        (["model.base_bits=16", "model.base_matmul=fp8"], {}, "base_matmul is fp8"),
        (LORA, {}, "method.type: lora trains weights of the base"),
    ],
)
def test_auto_compiles_where_it_pays(
    options: list[str], found: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    why_not = compiling._why_not(session(load_config("demo", options), **found), WORTH_STEPS)
    assert why_not.startswith(told)
    assert bool(why_not) == bool(told)


def test_auto_leaves_short_runs_and_old_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = session(load_config("demo"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "a run of 199 steps, they pay from 200 on" in compiling._why_not(opened, 199)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or more" in compiling._why_not(opened, 1000)


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_nothing_is_tried_where_nothing_is_compiled(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_problem", lambda opened: pytest.fail("tried"))
    compile_base(session(load_config("demo", [f"model.compile={asked}"]), "cpu"), 1000)


def test_auto_survives_a_failure_even_where_fallbacks_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "_why_not", lambda opened, steps: "")
    monkeypatch.setattr(compiling, "_problem", lambda opened: "no compiler")
    compile_base(session(load_config("demo", ["engine.strict=true"])), 1000)
    strict = load_config("demo", ["engine.strict=true", "model.compile=on"])
    with pytest.raises(ModelError, match=r"asked for model\.compile: on, using off: no compiler"):
        compile_base(session(strict), 1000)
