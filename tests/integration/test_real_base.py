"""The main job on a real base, from the recipe to replies, and what else a user does with one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

import spt_ds
from spt_ds import dist, quantize, summary
from spt_ds.config.load import load_config
from spt_ds.engine.trainer import train_run
from spt_ds.evaluate import command
from spt_ds.generate import BASE_ALONE, _generate
from spt_ds.run.command import EXIT_DONE
from spt_ds.run.folder import RunFolder
from tests.helpers.ranks import run_ranks
from tests.helpers.real_base import ROOT, real_base

RECIPE = "smollm2-135m"
ZERO3 = str(ROOT / "ds_configs" / "zero3.json")
STEPS = 12
FALL_NATS = 0.5  # at least so much does nll fall, a token
TIMEOUT_S = 1500
SHORT = ["data.workers=0", "data.max_valid_examples=8", "data.max_test_examples=3"]
SHORTER = [*SHORT, "train.max_steps=2", "train.global_batch=4", "data.max_tokens=96"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]


def train_resume_and_reply(world: dist.World, options: list[str], folder: str) -> list[int]:
    """Train under ZeRO-3, resume for one step more, and reply with and without the prompts."""
    run, codes = RunFolder(Path(folder)), []
    for steps in (STEPS, STEPS + 1):
        config = load_config(RECIPE, [*options, f"train.max_steps={steps}"])
        codes.append(train_run(config, run, ZERO3, world))
    _generate(config, run, run.replies, "best", ZERO3, world)
    alone = load_config(RECIPE, [*options, *BASE_ALONE])
    _generate(alone, run, run.replies_before, None, ZERO3, world)
    return codes


def train_alone(world: dist.World, recipe: str, options: list[str], folder: str) -> int:
    return train_run(load_config(recipe, options), RunFolder(Path(folder)), None, world)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [f"model.base={real_base()}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of the recipe on two ranks, shorter than it is shipped."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    asked = [*options, *SHORT]
    codes = run_ranks(2, train_resume_and_reply, asked, str(folder), timeout_s=TIMEOUT_S)
    assert codes == [[EXIT_DONE] * 2] * 2
    return RunFolder(folder)


def valid_nll(run: RunFolder) -> tuple[float, float]:
    """Before and after, nats a token, mean over the prompts."""
    done = json.loads(run.done.read_text(encoding="utf-8"))
    return done["valid_before"]["nll"], done["valid_after"]["nll"]


def test_nll_falls(run: RunFolder) -> None:
    before, after = valid_nll(run)
    assert before - after >= FALL_NATS


def test_replies_before_and_after_are_shown(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(run)]) == 0
    capsys.readouterr()
    assert summary.main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("reply before") == shown.count("reply after") == 3
    assert f"{STEPS + 1} on 2 rank(s)" in shown


def test_a_conversation(run: RunFolder) -> None:
    before = dict(os.environ)
    try:
        bot = spt_ds.load(str(run), data__workers=0)
        first = bot.reply(["i like to ski."], ["hi, what do you do in winter?"])
        assert first.tokens
        assert first.text.isprintable()
        assert bot.reply(["i like to ski."], ["hi.", first.text, "really?"]).tokens
    finally:
        dist.shutdown()
        os.environ.clear()
        os.environ.update(before)


def test_a_base_that_is_stored_in_4_bits(options: list[str], tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    assert quantize.main([real_base(), str(stored), "--bits", "4"]) == 0
    bits = [*options, *SHORTER, f"model.base={stored}", "model.base_bits=4"]
    assert run_ranks(1, train_alone, RECIPE, bits, str(tmp_path / "run"), timeout_s=TIMEOUT_S) == [
        EXIT_DONE
    ]
    assert valid_nll(RunFolder(tmp_path / "run"))[0] < math.log(49152) / 2


def test_lora(options: list[str], tmp_path: Path) -> None:
    asked = [*options, *SHORTER, "model.base_bits=16"]
    folder = str(tmp_path / "run")
    assert run_ranks(1, train_alone, "baseline-lora", asked, folder, timeout_s=TIMEOUT_S) == [
        EXIT_DONE
    ]
    before, after = valid_nll(RunFolder(Path(folder)))
    assert after < before
