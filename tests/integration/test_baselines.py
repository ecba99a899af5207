"""Every baseline from training to the tables; replies of trained weights against transformers' own
generate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spt_ds
from spt_ds import dist
from spt_ds.config.load import load_config, recipe_names
from spt_ds.data.encode import encode_context
from spt_ds.engine.session import open_split
from spt_ds.engine.trainer import train_run
from spt_ds.evaluate import command, compare_command
from spt_ds.generate import _generate
from spt_ds.run import checkpoint
from spt_ds.run.command import EXIT_DONE
from spt_ds.run.folder import RunFolder
from spt_ds.summary import summary_rows
from tests.distributed.scenes import CONFIG, Scene, make_scene
from tests.distributed.test_baselines import FULL, LORA
from tests.helpers.ranks import run_ranks

BASELINES = [name for name in recipe_names() if name.startswith("baseline-")]
UNTRAINED = {"baseline-zero-shot", "baseline-few-shot"}
NEW_TOKENS = 12


def train_and_generate(world: dist.World, jobs: list[tuple[str, list[str], Path]]) -> list[int]:
    """Train each (configuration, options, run folder) and generate from its best checkpoint."""
    codes = []
    for source, overrides, folder in jobs:
        config = load_config(source, overrides)
        run = RunFolder(folder)
        codes.append(train_run(config, run, None, world))
        _generate(config, run, run.replies, "best", None, world)
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each recipe, as it is shipped but for its length."""
    folder = tmp_path_factory.mktemp("recipes")
    short = [
        "train.max_steps=2",
        "train.global_batch=4",
        "data.max_train_examples=40",
        "data.max_valid_examples=4",
        "data.max_test_examples=3",
        "data.workers=0",
        "generate.max_new_tokens=8",
        f"data.cache_dir={folder / 'cache'}",
    ]
    found = {name: folder / name for name in BASELINES}
    jobs = [(name, short, run) for name, run in found.items()]
    (codes,) = run_ranks(1, train_and_generate, jobs, timeout_s=400)
    assert codes == [EXIT_DONE] * len(jobs)
    for run in found.values():
        assert command.main([str(run)]) == 0
    return found


def test_each_recipe_trains_what_it_says(runs: dict[str, Path]) -> None:
    base, size = 2_524_928, 256
    retriever = 2 * (size * size + size)
    queries, values = 4 * 32, 2 * 32  # heads and their size
    adapters = 3 * 8 * (size + queries + size + values)  # layers, rank, ends of both projections
    expected = {
        "baseline-full": base,
        "baseline-lora": adapters,
        "baseline-zero-shot": 0,
        "baseline-few-shot": 0,
        "baseline-pt": 8 * size + retriever,
        "baseline-pt-same-size": 32 * size + retriever,
        "baseline-no-persona": 32 * size + retriever,
    }
    found = {name: json.loads((run / "DONE.json").read_text()) for name, run in runs.items()}
    assert {name: done["trained_parameters"] for name, done in found.items()} == expected
    assert {name: done["step"] for name, done in found.items()} == {
        name: 0 if name in UNTRAINED else 2 for name in BASELINES
    }
    for name, run in runs.items():
        path = run / "checkpoints" / f"step-{found[name]['step']:08d}"
        saved = checkpoint.load(path)
        assert sum(tensor.numel() for tensor in saved.trainables.values()) == expected[name]
        assert bool(saved.optimizer) == (name not in UNTRAINED)
        assert dict(summary_rows(run))["trained parameters"] == f"{expected[name]:,}"


def test_all_answer_the_same_examples(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = {
        name: [
            json.loads(line)
            for line in (run / "generate" / "predictions.jsonl").read_text().splitlines()
        ]
        for name, run in runs.items()
    }
    keys = ("id", "persona", "history", "reference")
    asked = {name: [[line[key] for key in keys] for line in found] for name, found in lines.items()}
    assert all(found == asked["baseline-pt"] and len(found) == 3 for found in asked.values())
    tokens = {name: [line["context_tokens"] for line in found] for name, found in lines.items()}
    worked = {
        few - zero
        for few, zero in zip(tokens["baseline-few-shot"], tokens["baseline-zero-shot"], strict=True)
    }
    assert len(worked) == 1  # the same examples before each context
    assert 0 < worked.pop() <= 256
    assert all(
        a < b
        for a, b in zip(tokens["baseline-no-persona"], tokens["baseline-zero-shot"], strict=True)
    )
    others = [str(run) for run in runs.values()]
    assert (
        compare_command.main(
            [*others, "--baseline", str(runs["baseline-zero-shot"]), "--out", str(tmp_path)]
        )
        == 0
    )
    table = json.loads((tmp_path / "compare.json").read_text())
    assert {row["name"] for row in table["recipes"]} == set(BASELINES)


def test_the_base_alone_replies_as_the_zero_shot_baseline_does(runs: dict[str, Path]) -> None:
    run = runs["baseline-pt"]
    command_line = [sys.executable, "-m", "spt_ds.generate", str(run), "--base-alone"]
    subprocess.run(command_line, check=True, timeout=200)
    alone, zero_shot = (
        [json.loads(line)["raw"] for line in path.read_text().splitlines()]
        for path in (
            run / "before" / "predictions.jsonl",
            runs["baseline-zero-shot"] / "generate" / "predictions.jsonl",
        )
    )
    assert alone == zero_shot
    # So short a training may leave the words of a greedy reply as they were; the record tells.
    made_by = [
        json.loads((run / name / "generate.json").read_text())["checkpoint"]
        for name in ("before", "generate")
    ]
    assert made_by[0] == "the base"
    assert made_by[1].startswith("step-")


@pytest.mark.parametrize("name", ["baseline-few-shot", "baseline-no-persona"])
def test_a_conversation_is_shown_what_evaluation_is(runs: dict[str, Path], name: str) -> None:
    before = dict(os.environ)
    try:
        bot = spt_ds.load(runs[name], data__workers=0)
        store = open_split(bot._session, "test")
        row = store[1]
        batch, dropped = bot._batch(row["persona"], row["history"], bot._session.config.generate)
        assert (batch.context_ids.tolist(), dropped) == (store.ids([1])[0].tolist(), 0)
        assert bot.reply(row["persona"], row["history"]).tokens
    finally:
        dist.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_replies_are_those_of_the_merged_model(
    scene: Scene, tmp_path: Path, arch: str, kind: str
) -> None:
    more = [
        "train.max_steps=4",
        f"data.test={scene.folder / 'valid.jsonl'}",
        f"generate.max_new_tokens={NEW_TOKENS}",
        f"optim.lr={0.05 if kind == 'lora' else 0.01}",
        "generate.batch_size=4",
    ]
    overrides = scene.overrides(arch, *(LORA if kind == "lora" else FULL), *more)
    run = tmp_path / "run"
    assert run_ranks(1, train_and_generate, [(CONFIG, overrides, run)], timeout_s=200) == [
        [EXIT_DONE]
    ]
    found = [
        json.loads(line)
        for line in (run / "generate" / "predictions.jsonl").read_text().splitlines()
    ]
    ours = [(line["raw"], line["new_tokens"]) for line in found]
    saved = checkpoint.load(run / "checkpoints" / "step-00000004").trainables
    assert replies(scene.folder / arch, merged(saved), found) == ours
    plain = replies(scene.folder / arch, {}, found)
    assert (
        sum(a != b for a, b in zip(plain, ours, strict=True)) > len(ours) / 2
    )  # training changed what it says


def merged(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the weights of the plain base become: replaced, or with `alpha / rank * B A` added."""
    pairs = {name.partition(".lora_")[0] for name in saved if ".lora_" in name}
    if not pairs:
        return saved
    return {
        f"{p}.weight": (
            16 / 3 * saved[f"{p}.lora_B.default.weight"] @ saved[f"{p}.lora_A.default.weight"]
        )
        for p in pairs
    }


def replies(
    base: Path, changes: dict[str, torch.Tensor], lines: list[dict[str, Any]]
) -> list[tuple[str, int]]:
    """Greedy replies of the base with its weights changed, each example alone, from token ids."""
    lm: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name in changes and len(changes) == len(list(lm.named_parameters())):
                parameter.copy_(changes[name])
            elif name in changes:
                parameter.add_(changes[name])
    out = []
    for line in lines:
        ids = encode_context(line["persona"], line["history"], tokenizer, 120).context_ids
        tokens = lm.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[0, len(ids) :].tolist()
        out.append((tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)))
    return out
