"""benchmarks/gpu.py and benchmarks/quality_bits.py, small, on whatever device is at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_ds.config.load import load_config
from spt_ds.costs.random_bases import build
from spt_ds.model.quant import QuantLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(name: str, *options: str, **variables: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the lines of JSON."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=os.environ | variables,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, [json.loads(line) for line in lines]


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_are_drawn_and_quantised_layer_by_layer(bits: int) -> None:
    backbone, _ = build(
        "tiny", load_config("demo", [f"model.base_bits={bits}"]), torch.device("cpu")
    )
    layers = [module for module in backbone.lm.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 2 * 7
    assert {layer.packing.bits for layer in layers} == {bits}
    backbone.check_quantised = True
    backbone.check()


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a dozen processes, one after another
def test_every_row_is_right_or_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    small = ("--steps", "1", "--max-tokens", "128", "--budget-s", "1200")
    code, rows = run("gpu", "--out", str(file), *small)
    assert code == 0
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    by_name = {row["row"]: row for row in rows}
    assert list(by_name)[:4] == ["ceilings", "attention", "heads", "quantised"]
    assert by_name["ceilings"]["launches_per_s"] > 0
    steps = [row for row in rows if "tokens_per_cost" in row]
    assert len(steps) >= 6
    assert all(row["tokens_per_cost"] > 0 and row["planned_mib"] > 0 for row in steps)
    compiled = by_name["compiled tiny x2"]
    assert compiled["cost_prefix"] > 0
    assert compiled["loss"] == pytest.approx(compiled["loss_prefix"], rel=1e-2)


BARE = """
import sys
from importlib.machinery import PathFinder


class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {"deepspeed", "bitsandbytes", "datasets"}:
            return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_without_their_packages_are_skipped_and_the_others_run(tmp_path: Path) -> None:
    """An image of a GPU machine may lack DeepSpeed and bitsandbytes."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, rows = run("gpu", "--steps", "1", "--max-tokens", "128", PYTHONPATH=path)
    assert code == 0
    skipped = {row["row"] for row in rows if "skipped" in row}
    assert {"quantised", "runs"} <= skipped
    passed = {row["row"] for row in rows if row.get("passed")}
    assert {"ceilings", "attention", "heads", "prefix tiny x2", "decode tiny x2"} <= passed


def test_a_spent_budget_is_no_success() -> None:
    code, rows = run("gpu", "--budget-s", "0")
    assert code == 1
    assert all(row["error"] == "not run: the time is spent" for row in rows)


def test_a_row_that_fails_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module_of("gpu")
    broken = gpu.Row("broken", 60, ("-c", "raise SystemExit('no such kernel')"))
    sound = gpu.Row("sound", 60, ("-c", "print('{\"passed\": true}')"))
    monkeypatch.setattr(gpu, "rows", lambda args: iter([broken, sound]))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **how: said.append(text))
    assert gpu.main() == 1
    first, second = (json.loads(text.rpartition("\n")[2]) for text in said)
    assert first["error"] == "no such kernel"
    assert second["passed"]


def test_checks_see_a_wrong_kernel_and_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module_of("gpu_checks")
    plain = QuantLinear.dequantised
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "DEVICE", torch.device("cpu"))
        patch.setattr(gpu.Backbone, "check", lambda backbone: None)
        calls: list[int] = []

        def off_once(layer: QuantLinear, dtype: torch.dtype) -> torch.Tensor:
            calls.append(1)
            return plain(layer, dtype) * (1.05 if len(calls) == 1 else 1.0)

        patch.setattr(QuantLinear, "dequantised", off_once)
        assert not gpu.check_quantised()["passed"]
    with monkeypatch.context() as patch:
        attend = torch.nn.functional.scaled_dot_product_attention

        def sees_the_future(*args: Any, **kwargs: Any) -> torch.Tensor:
            return attend(*args, **{**kwargs, "is_causal": False})

        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sees_the_future)
        assert not gpu.check_attention()["passed"]


def test_quality_is_judged_seed_by_seed() -> None:
    quality = module_of("quality_bits")
    rows = [
        {"bits": bits, "seed": seed, "loss": loss, "nll_selected": 3.0}
        for seed, bits, loss in [(0, 16, 5.0), (0, 4, 5.09), (1, 16, 6.0), (1, 4, 5.9)]
    ]
    assert quality.judge(rows)
    assert rows[1]["loss_distance"] == pytest.approx(0.018)
    rows[3]["loss"] = 5.87  # better than 16 bits by more than the limit is not the same either
    assert not quality.judge(rows)
    rows[3] |= {"loss": 6.0, "nll_selected": 3.07}
    assert not quality.judge(rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quality_runs_every_width() -> None:
    small = [
        "train.max_steps=1",
        "train.global_batch=2",
        "data.max_train_examples=8",
        "data.max_valid_examples=4",
    ]
    code, (report,) = run(
        "quality_bits", "--seeds", "3", *[word for one in small for word in ("--set", one)]
    )
    assert [row["bits"] for row in report["rows"]] == [16, 8, 4]
    assert all(row["loss_before"] > 0 and row["steps"] == 1 for row in report["rows"])
    assert code == (0 if report["passed"] else 1)
