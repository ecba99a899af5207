"""Faults of the public reference beside numbers and data: settings ignored, pickles, checkpoints
too large.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from spt_ds.config.load import load_config
from spt_ds.errors import ConfigError
from spt_ds.placement.ds_check import plan_of_file
from spt_ds.run import checkpoint
from tests.helpers.ds_files import sizes
from tests.helpers.tiny import tiny_backbone, tiny_spt

PACKAGE = Path(checkpoint.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({"float16": {"enabled": True}}, "float16"),
        ({"train_micro_batch_size_per_gpu ": 4}, "did you mean 'train_micro_batch_size_per_gpu'"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
        ),
    ],
)
def test_fault_11_deepspeed_keys_that_would_be_ignored_are_refused(
    tree: object, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        plan_of_file(str(path), load_config("demo"), sizes(), 2)
    assert part in str(caught.value)


def test_fault_14_nothing_is_pickled_or_unpickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names}
                # An error's name loads nothing: it says that torch refused to run what it read.
                if names != {"UnpicklingError"}:
                    names.add(getattr(node, "module", None) or "")
                assert not names & {"pickle", "dill", "cloudpickle", "shelve"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
            ):
                safe = [keyword for keyword in node.keywords if keyword.arg == "weights_only"]
                assert safe, f"{path}:{node.lineno}: a load that could run code"
                assert ast.unparse(safe[0].value) == "True"


def test_fault_15_a_checkpoint_holds_the_trainable_tensors_and_nothing_else(tmp_path: Path) -> None:
    spt = tiny_spt(tiny_backbone("opt"), count=3, tokens=2)
    tensors = {name: parameter.float() for name, parameter in spt.trainables.named_parameters()}
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(tensors, {}, {"step": 1}))
    assert set(checkpoint.load(path).trainables) == {
        "bank.weight",
        "retriever.context.weight",
        "retriever.context.bias",
        "retriever.prompt.weight",
        "retriever.prompt.bias",
    }
    exact = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert (
        exact <= (path / checkpoint.TRAINABLES).stat().st_size < exact + 2048
    )  # the header alone is more
