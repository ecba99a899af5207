"""Runs as PEFT folders and back: PEFT's own logits, every bit of a prompt, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spt_ds
from spt_ds import dist
from spt_ds.api import Bot
from spt_ds.batch import Batch
from spt_ds.export import command, import_command
from spt_ds.model.base_files import base_path
from spt_ds.model.rows import target_states
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from tests.helpers.runs import make_run

LIMIT = 1e-5
PROMPTS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    yield make_run(tmp_path_factory.mktemp("export"), "llama", PROMPTS)
    dist.shutdown()


def our_logits(bot: Bot, ids: list[int], prompt: int) -> torch.Tensor:
    """Logits [n, V] of the tokens from the second on, under one prompt."""
    session = bot._session
    spt, text = session.spt, np.array(ids)
    batch = Batch(text[:1], text[1:], (1,), (len(ids) - 1,), (0,), (1.0,))

    def read(backbone: Any) -> torch.Tensor:
        packed = spt.pack(batch)
        bank = spt.trainables.bank.weight[prompt : prompt + 1, None]
        hidden = target_states(backbone, packed, backbone.embed(packed.ids), bank, None)
        return hidden[0] @ backbone.lm.get_output_embeddings().weight.T

    with torch.no_grad():
        logits: torch.Tensor = session.backbone(read)
    return logits


def peft_logits(base: str, adapter: Path, ids: list[int]) -> torch.Tensor:
    """The same by PEFT, which loads the base and the folder itself."""
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(lm, adapter).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    logits: torch.Tensor = out.logits[0, model.peft_config["default"].num_virtual_tokens :]
    return logits[:-1]


def largest_gap(run: RunFolder, out: Path, base: str, ids: list[int]) -> float:
    bot = spt_ds.load(run.path)
    gaps = [
        (our_logits(bot, ids, k) - peft_logits(base, out / f"prompt-{k}", ids)).abs().max()
        for k in range(bot.prompts)
    ]
    return float(max(gaps))


def text_of(bot: Bot) -> list[int]:
    reply = bot._session.tokenizer(" i ski too.", add_special_tokens=False)["input_ids"]
    context = bot._contexts.batch(("i ski.",), ("hi there",), reserved=0, number=1)[0].context_ids
    return [*context.tolist(), *reply]


@pytest.mark.parametrize("arch", ["llama", "opt", "opt_project", "gemma2"])
def test_peft_gives_our_logits(arch: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, arch, PROMPTS)
    out = tmp_path / "peft"
    assert command.main(["peft", str(run), str(out)]) == 0
    ids = text_of(spt_ds.load(run.path))
    assert largest_gap(run, out, str(tmp_path / "base"), ids) <= LIMIT
    # The limit sees a prompt that is another one.
    shutil.copy(out / "prompt-1" / "adapter_model.safetensors", out / "prompt-0")
    assert largest_gap(run, out, str(tmp_path / "base"), ids) > 100 * LIMIT


def test_peft_gives_our_logits_over_the_embedded_base(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    size = 256
    bank = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    tensors = {f"retriever.{side}.weight": torch.eye(size) for side in ("context", "prompt")}
    tensors |= {f"retriever.{side}.bias": torch.zeros(size) for side in ("context", "prompt")}
    run.path.mkdir()
    run.config.write_text("model: {base_bits: 32}\nprompts: {count: 2, tokens: 3}\n")
    state = {"step": 1, "run": {"best_step": 1}}
    checkpoint.save(
        run.checkpoints, checkpoint.Checkpoint({"bank.weight": bank, **tensors}, {}, state)
    )
    assert command.main(["peft", str(run), str(tmp_path / "peft")]) == 0
    ids = text_of(spt_ds.load(run.path))
    assert largest_gap(run, tmp_path / "peft", base_path("embedded"), ids) <= LIMIT


def test_a_prompt_comes_back_with_every_bit(run: RunFolder, tmp_path: Path) -> None:
    base = str(run.path.parent / "base")
    assert command.main(["peft", str(run), str(tmp_path / "peft")]) == 0
    bank = checkpoint.load(checkpoint.find(run.checkpoints, "best")).trainables["bank.weight"]
    for k in range(PROMPTS):
        source, back = tmp_path / "peft" / f"prompt-{k}", tmp_path / f"back-{k}"
        assert import_command.main(["peft", str(source), str(back), "--base", base]) == 0
        held = checkpoint.load(checkpoint.find(back / "checkpoints", "best")).trainables
        assert torch.equal(held["bank.weight"], bank[k : k + 1])
        again = tmp_path / f"again-{k}"
        assert command.main(["peft", str(back), str(again)]) == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (again / "prompt-0" / name).read_bytes() == (source / name).read_bytes()


def test_an_imported_prompt_answers_as_it_did(run: RunFolder, tmp_path: Path) -> None:
    base = str(run.path.parent / "base")
    options = ["model.base_bits=32", "data.max_tokens=120", "generate.max_new_tokens=6"]
    overrides = [word for option in options for word in ("--set", option)]
    assert command.main(["peft", str(run), str(tmp_path / "peft")]) == 0
    source = str(tmp_path / "peft" / "prompt-2")
    given = ["peft", source, str(tmp_path / "back"), "--base", base, *overrides]
    assert import_command.main(given) == 0
    told = spt_ds.load(run.path).reply(["i ski."], ["hi there"], prompt=2)
    assert spt_ds.load(tmp_path / "back").reply(["i ski."], ["hi there"]).tokens == told.tokens


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("prompts.position=before_reply", "PEFT puts virtual tokens before all"),
        ("generate.mode=fuse", "answers with all prompts together"),
        ("generate.mode=rank", "answers with all prompts together"),
    ],
)
def test_what_peft_cannot_express_is_refused(
    run: RunFolder, option: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main(["peft", str(run), str(out), "--set", option]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in told
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_another_size_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["peft", str(run), str(tmp_path / "out"), "--set", "model.base=embedded"]
    assert command.main(given) == 2
    assert "16 numbers a token, and the embeddings of embedded 256" in capsys.readouterr().err


def test_a_baseline_without_prompts_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spt_ds.generate import BASE_ALONE

    alone = [word for option in BASE_ALONE for word in ("--set", option)]
    assert command.main(["peft", str(run), str(tmp_path / "out"), *alone]) == 2
    assert "trains no soft prompts" in capsys.readouterr().err


def test_what_is_there_is_not_touched(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert command.main(["peft", str(run), str(tmp_path / "out")]) == 2
    assert "is already there" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def setting(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def only_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def tensors(**given: torch.Tensor) -> Any:
    return lambda folder: save_file(given, folder / "adapter_model.safetensors")


FAULTS = {
    "no JSON": (no_json, "cannot be read"),
    "no object": (a_list, "the file is []"),
    "no config": (no_config, "No such file"),
    "lora": (setting("peft_type", "LORA"), "only PROMPT_TUNING"),
    "prefix tuning": (setting("peft_type", "PREFIX_TUNING"), "only PROMPT_TUNING"),
    "encoder": (setting("task_type", "SEQ_2_SEQ_LM"), "only causal LMs"),
    "two modules": (setting("num_transformer_submodules", 2), "num_transformer_submodules"),
    "no tokens": (setting("num_virtual_tokens", 0), "num_virtual_tokens is 0"),
    "a size of 2^30": (setting("token_dim", 1 << 30), "token_dim is 1073741824"),
    "other size": (setting("num_virtual_tokens", 3), "of shape (3, 16)"),
    "only pickled": (only_pickled, "pickled weights"),
    "cut": (cut, "cannot be read"),
    "other key": (tensors(prompts=torch.zeros(2, 16)), "expected prompt_embeddings"),
    "a second key": (
        tensors(prompt_embeddings=torch.zeros(2, 16), more=torch.zeros(1)),
        "alone",
    ),
    "not finite": (tensors(prompt_embeddings=torch.full((2, 16), torch.nan)), "not finite"),
    "whole numbers": (tensors(prompt_embeddings=torch.ones(2, 16).int()), "floating-point"),
}


@pytest.fixture(scope="module")
def adapter(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "peft"
    assert command.main(["peft", str(run), str(out)]) == 0
    return out / "prompt-0"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_read_is_one_clear_error(
    fault: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(adapter, source)
    damage, told = FAULTS[fault]
    damage(source)
    assert import_command.main(["peft", str(source), str(out), "--base", "some/base"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1], lines
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_wrong_option_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    given = ["peft", str(adapter), str(tmp_path / "out"), "--base", "some/base"]
    assert import_command.main([*given, "--set", "prompts.cuont=2"]) == 2
    assert import_command.main(given[:3]) == 2  # no base is named
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_read(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    held = load_file(source / "adapter_model.safetensors")["prompt_embeddings"]
    tensors(prompt_embeddings=held.bfloat16())(source)
    out = tmp_path / "out"
    assert import_command.main(["peft", str(source), str(out), "--base", "some/base"]) == 0
    read = checkpoint.load(checkpoint.find(out / "checkpoints", "best")).trainables["bank.weight"]
    assert torch.equal(read[0], held.bfloat16().float())
