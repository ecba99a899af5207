"""Checkpoints of the public reference as runs: the golden case's scores, choices and tokens."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import golden
from spt_ds import dist
from spt_ds.export import import_command
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder

FOLDER = Path(__file__).parents[1] / "data" / "golden_opt_tiny_k3"
K, P, D = 3, 2, 16
YAML = """
model:
  model_type: selective_pt
  model_name: "{base}"
  load_bit: 32
  peft_type: prompt_tuning
  K: 3
  peft_config:
    num_virtual_tokens: 2
  normalizer: linear
  normalizer_on: ['prompt', 'lm']
training:
  learning_rate: 1e-5
  batch_size: 32
  mode: causal
  only_longest: False
  contrastive: true
  ensemble: true
  selective_loss_weight: 0.4
  contrastive_metric: bleu
  contrastive_threshold: 20.0
  contrastive_weight: 0.3
dataset:
  train: data_file/train.txt
  valid: data_file/valid.txt
  max_context_turns: -1
  max_token_length: 96
"""


def states() -> dict[str, Any]:
    """What DeepSpeed writes of the reference's model: views into one buffer, and frozen aliases."""
    weights = {name: torch.from_numpy(a) for name, a in np.load(FOLDER / "spt_weights.npz").items()}
    trained = {
        **{
            f"models.{k}.prompt_encoder.default.embedding.weight": weights["prompts"][k]
            for k in range(K)
        },
        "prompt_normalizer.weight": weights["W"],
        "prompt_normalizer.bias": weights["b"],
    }
    flat = torch.cat([tensor.flatten() for tensor in trained.values()])
    pieces = flat.split([tensor.numel() for tensor in trained.values()])
    module = {
        name: piece.view(tensor.shape)
        for (name, tensor), piece in zip(trained.items(), pieces, strict=True)
    }
    frozen = {f"models.{k}.word_embeddings.weight": torch.ones(4, D) for k in range(K)}
    shapes = [{name: tensor.shape for name, tensor in trained.items()}]
    return {"module": {**frozen, **module}, "param_shapes": shapes, "global_steps": 1}


def written(folder: Path, contents: Any, text: str = YAML) -> tuple[Path, Path]:
    """A checkpoint folder of the reference and its YAML."""
    best = folder / "ds_ckpt" / "best"
    best.mkdir(parents=True)
    torch.save(contents, best / "mp_rank_00_model_states.pt")
    yaml = folder / "settings.yml"
    yaml.write_text(text.format(base="some/base"))
    return folder, yaml


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("base") / "base"
    golden.write_base(FOLDER, out)
    yield out
    dist.shutdown()


def imported(source: Path, yaml: Path, out: Path, *more: str) -> int:
    return import_command.main(["reference", str(source), str(out), "--config", str(yaml), *more])


def test_the_golden_case_comes_out(base: Path, tmp_path: Path) -> None:
    source, yaml = written(tmp_path / "source", states())
    out = tmp_path / "out"
    assert imported(source, yaml, out, "--base", str(base)) == 0
    assert golden.infer(FOLDER, out) <= 1e-6


def test_the_golden_case_sees_other_prompts(base: Path, tmp_path: Path) -> None:
    other = states()
    first, second = (f"models.{k}.prompt_encoder.default.embedding.weight" for k in (0, 1))
    module = other["module"]
    module[first], module[second] = module[second], module[first]
    source, yaml = written(tmp_path / "source", other)
    assert imported(source, yaml, tmp_path / "out", "--base", str(base)) == 0
    with pytest.raises(SystemExit, match="prompts"):
        golden.infer(FOLDER, tmp_path / "out")


def test_the_settings_are_those_of_the_yaml(tmp_path: Path) -> None:
    source, yaml = written(tmp_path / "source", states())
    file = source / "ds_ckpt" / "best" / "mp_rank_00_model_states.pt"
    for number, place in enumerate((source, file.parent, file)):
        out = tmp_path / f"out-{number}"
        assert imported(place, yaml, out, "--set", "reference.padded_pool=false") == 0
        config = RunFolder(out).load_config()
        assert (config.model.base, config.model.base_bits) == ("some/base", 32)
        assert not config.model.allow_pickle
        losses = config.losses
        assert (losses.selection, losses.fusion, losses.contrastive) == (0.4, 1.0, 0.3)
        assert (losses.bleu_threshold, config.optim.lr) == (20.0, 1e-5)
        assert (config.data.train, config.data.test) == (
            "data_file/train.txt",
            "data_file/valid.txt",
        )
        assert config.data.max_tokens == config.reference.pool_length_tokens == 96
        assert (config.reference.jumping_activation, config.reference.padded_pool) == (True, False)
        held = checkpoint.load(checkpoint.find(out / "checkpoints", "best")).trainables
        weights = np.load(FOLDER / "spt_weights.npz")
        assert np.array_equal(held["bank.weight"].numpy(), weights["prompts"])
        assert np.array_equal(held["retriever.context.weight"].numpy(), weights["W"])
        assert np.array_equal(held["retriever.context.bias"].numpy(), weights["b"])
        # The three files of a checkpoint hold these numbers alone, no buffer and no frozen alias.
        assert sum(tensor.numel() for tensor in held.values()) == K * P * D + D * D + D


class Runs:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def without(name: str) -> Any:
    def change(contents: dict[str, Any]) -> Any:
        del contents["module"][name]
        return contents

    return change


def replaced(name: str, value: Any) -> Any:
    def change(contents: dict[str, Any]) -> Any:
        contents["module"][name] = value
        return contents

    return change


PROMPT_1 = "models.1.prompt_encoder.default.embedding.weight"
W = "prompt_normalizer.weight"
CONTENTS = {
    "a list": (lambda contents: [1], "without 'module'"),
    "module a list": (lambda contents: {"module": [1]}, "without 'module'"),
    "no prompt": (without(PROMPT_1), "holds the prompts [0, 2]"),
    "one prompt more": (replaced(PROMPT_1.replace("1", "3"), torch.ones(P, D)), "[0, 1, 2, 3]"),
    "no retriever": (without(W), f"{W} is missing"),
    "another P": (replaced(PROMPT_1, torch.ones(P + 1, D)), "(3, 16)"),
    "another D": (replaced(W, torch.ones(D, D + 1)), "(16, 17)"),
    "a number": (replaced(PROMPT_1, 3), "is 'int'"),
    "a point": (replaced(PROMPT_1.replace("1", "0"), torch.tensor(1.0)), "()"),
    "whole numbers": (replaced(W, torch.ones(D, D, dtype=torch.int64)), "int64"),
    "not finite": (replaced(W, torch.full((D, D), torch.inf)), "finite"),
    "sparse": (replaced(W, torch.eye(D).to_sparse()), W),
    "repeated": (replaced(W, torch.ones(1).expand(D, D)), W),
}


def refused(
    source: Path, yaml: Path, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert imported(source, yaml, tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1], lines
    assert lines[-1].startswith("spt-ds import: ") or "problem(s)" in "".join(lines)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fault", CONTENTS)
def test_another_checkpoint_is_one_clear_error(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = CONTENTS[fault]
    source, yaml = written(tmp_path / "source", change(states()))
    refused(source, yaml, told, tmp_path, capsys)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    source, yaml = written(tmp_path / "source", {"module": {}, "code": Runs(mark)})
    if how == "pickle":
        file = source / "ds_ckpt" / "best" / "mp_rank_00_model_states.pt"
        file.write_bytes(pickle.dumps(Runs(mark)))
    refused(source, yaml, "it was not run", tmp_path, capsys)
    assert not mark.exists()


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_cut_checkpoint_is_one_clear_error(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, yaml = written(tmp_path / "source", states())
    file = source / "ds_ckpt" / "best" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:size])
    refused(source, yaml, "no checkpoint of tensors", tmp_path, capsys)
    shutil.rmtree(source / "ds_ckpt")
    refused(source, yaml, "no mp_rank_00_model_states.pt in it", tmp_path, capsys)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("peft_type: prompt_tuning", "peft_type: prefix_tuning", "model.peft_type"),
        ("normalizer_on: ['prompt', 'lm']", "normalizer_on: ['prompt']", "on both sides"),
        ("load_bit: 32", "load_bit: 8", "model.load_bit"),
        ("mode: causal", "mode: normal", "training.mode"),
        ("mode: causal", "mode: causal\n  all_tunable: true", "training.all_tunable"),
        ("K: 3", "K: 4", "model.K: 4"),
        ("num_virtual_tokens: 2", "num_virtual_tokens: 1", "num_virtual_tokens: 1"),
        ("K: 3", "K: 3\n  score_activation: relu", "model.score_activation"),
        ("K: 3", "K: 3\n  retriever: {retriever_type: transformer_encoder}", "model.retriever"),
        ("model:", "model: [", "not valid YAML"),
    ],
)
def test_another_method_is_refused(
    old: str, new: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, yaml = written(tmp_path / "source", states())
    yaml.write_text(YAML.replace(old, new).replace("{base}", "some/base"))
    refused(source, yaml, told, tmp_path, capsys)


def test_training_that_has_no_counterpart_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = YAML.replace("mode: causal", "mode: causal\n  adding_noise: 0.1")
    source, yaml = written(tmp_path / "source", states(), text)
    assert imported(source, yaml, tmp_path / "out") == 0
    assert "without a counterpart in config.yaml: adding_noise" in caplog.text
