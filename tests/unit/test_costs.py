"""The benchmark's two sides compute the same losses and gradients, and its counts are those of the
layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.costs import command
from spt_ds.costs.meters import Clock, ForwardMeter
from spt_ds.costs.naive_step import naive_loss
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.costs.side_by_side import measure_more, measure_objectives
from spt_ds.costs.step import Reads
from spt_ds.model.attention import PACKED, Layout
from spt_ds.model.backbone import Backbone
from spt_ds.placement.estimate import BaseShape
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
def test_naive_twin_has_our_losses_and_gradients(checkpointing: str) -> None:
    config = load_config(
        "demo",
        [
            f"model.activation_checkpointing={checkpointing}",
            "losses.contrastive=0",
            "prompts.count=3",
        ],
    )
    backbone, spt = build("tiny", config, torch.device("cpu"))
    batch = micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)
    ours = backbone(spt.micro_losses, batch, len(batch), len(batch.response_ids)).total
    parameters = list(spt.trainables.parameters())
    expected = torch.autograd.grad(ours, parameters)
    naive = naive_loss(backbone, spt, batch, 256)
    assert abs((naive - ours).item()) < 1e-5
    for mine, theirs in zip(expected, torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "suffix", "naive"])
def test_counted_tokens_are_those_the_layers_see(case: str) -> None:
    words = ["step", "--shape", "tiny", "--batch", "3", "--max-tokens", "256"]
    args = command._parser().parse_args(words)
    placement = "suffix" if case == "suffix" else "prefix"
    overrides = [
        f"prompts.placement={placement}",
        "model.activation_checkpointing=off",
        "losses.contrastive=0",
    ]
    backbone, spt = build("tiny", load_config("demo", overrides), torch.device("cpu"))
    batch = micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)
    seen = []
    backbone.lm.base_model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, out: seen.append(out.shape[0] * out.shape[1])
    )
    with torch.no_grad():
        if case == "naive":
            naive_loss(backbone, spt, batch, 256)
        else:
            backbone(spt.micro_losses, batch, 3, 1)
    assert sum(seen) == Reads(case, batch, 4, args).positions


@pytest.mark.parametrize("case", ["naive", "prefix"])
def test_forward_passes_of_opt_are_seen(case: str) -> None:
    lm = AutoModelForCausalLM.from_config(tiny_config("opt"), attn_implementation=PACKED)
    meter = ForwardMeter(lm.base_model, Clock(torch.device("cpu")))
    ids = torch.zeros(1, 3, dtype=torch.long)
    if case == "naive":
        lm.set_attn_implementation("sdpa")
        lm(input_ids=ids)
    else:
        Backbone(lm, "sdpa").run(torch.zeros(3, 16), Layout((3,), torch.arange(3), "sdpa"))
    assert meter.take() > 0
    assert meter.take() == 0


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert command.main([*argv, "--threads", "1", "--steps", "1"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_step_compares_losses_and_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "step", "--shape", "tiny", "--batch", "2", "--cases", "naive,prefix")
    assert [result["case"] for result in report["results"]] == ["naive", "prefix"]
    assert report["same"]["prefix K=4"]["loss"] < 1e-6
    assert (
        report["same"]["prefix K=4"]["gradient"] < 1e-4
    )  # of which the twin's rounding is the greater part
    assert report["ratios"]["prefix K=4: times less"] > 0
    assert report["results"][0]["real_share"] < 1.0 == report["results"][1]["real_share"]


def test_decoding_costs_a_row_step_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(
        capsys, "decode", "--shape", "tiny", "--batch", "12", "--prompts", "3", "--new-tokens", "4"
    )
    naive, ours = report["results"]
    assert ours["row_steps"] == ours["examples_times_tokens"] == 48
    assert naive["row_steps"] == 3 * 48
    assert report["same"]["ours K=3"] is True


def test_head_keeps_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "head", "--prompts", "8", "--targets", "64", "--head-chunk-mib", "32")
    naive, ours = report["results"]
    assert all(gap < 1e-5 for gap in report["same"]["ours K=8"].values())
    assert ours["peak_mib"] < 100 < naive["peak_mib"]


@pytest.mark.parametrize("subject", command.SUBJECTS)
def test_a_subject_has_a_function(subject: str) -> None:
    module, function = command._subject(command._parser().parse_args([subject]))
    assert module.CASES
    assert callable(getattr(module, function))


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["step", "--cases", "faster"]) == 2
    assert "no case 'faster'; step has naive, prefix, suffix" in capsys.readouterr().err


def test_a_step_is_told_apart_into_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(
        capsys, "step", "--shape", "tiny", "--batch", "2", "--cases", "suffix,precise,prefix"
    )
    assert set(report["same"]) == {"prefix K=4 to float64"}
    assert all(gap < 3e-5 for gap in report["same"]["prefix K=4 to float64"].values())
    for result in report["results"]:
        assert set(result["parts"]) == {"forward", "losses", "backward", "optimizer"}
        assert all(cost > 0 for cost in result["parts"].values())
        assert sum(result["parts"].values()) == pytest.approx(
            result["cost"], rel=1e-6
        )  # one step: medians add up
        assert 0 < result["share_of_matmul"] < 1
        assert result["real_share"] == 1.0
    suffix, _, prefix = report["results"]
    assert suffix["tflop"] < prefix["tflop"]


@pytest.mark.parametrize("case", ["base", "data"])
def test_loading(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "load", "--shape", "tiny", "--cases", case, "--examples", "20")
    assert report["results"][0]["per_cost"] > 0


def test_flops_by_hand() -> None:
    """4 for each weight of a layer and position, 2 where no gradient flows, 4 for each weight and
    row of the head.
    """
    args = command._parser().parse_args(["step", "--tokens", "2", "--max-tokens", "10"])
    batch = Batch(np.arange(7), np.arange(3), (7,), (3,), (0,), (1.0,))
    shape = BaseShape(
        experts=1,
        hidden=4,
        embed=4,
        layers=2,
        ffn=5,
        ffn_matrices=2,
        queries=4,
        keys=4,
        vocabulary=11,
        embeddings=1,
        masked_relu=False,
    )
    layers = 2 * (4 * 4 * 4 + 2 * 4 * 5)
    assert (
        Reads("prefix", batch, 3, args).flops(shape)
        == 4 * layers * 3 * (2 + 7 + 2) + 4 * 44 * (3 + 1) * 3
    )
    assert (
        Reads("suffix", batch, 3, args).flops(shape)
        == 2 * layers * 7 + 4 * layers * 3 * (2 + 2) + 4 * 44 * 12
    )
    assert Reads("naive", batch, 3, args).flops(shape) == 4 * (layers + 44) * 3 * (2 + 10)


TINY = command._parser().parse_args(["more", "--shape", "tiny", "--batch", "2", "--steps", "1"])


@pytest.fixture
def flops_for_seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock that counts operations: a busy machine does not change what they are."""
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(Clock, "now", lambda clock: float(counter.get_total_flops()))
        yield


@pytest.mark.usefixtures("flops_for_seconds")
def test_one_prompt_more_costs_more() -> None:
    result = measure_more("prefix", 1, TINY)
    assert result["share_of_one_more"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.usefixtures("flops_for_seconds")
def test_objectives_are_measured_with_the_papers() -> None:
    shares = measure_objectives("suffix", 4, TINY)["share_of_paper"]
    assert shares["paper"] == 1.0
    assert shares["mixture"] == pytest.approx(1.0, abs=0.05)
    assert 0.0 < shares["warm start"] < 0.8  # one prompt is read in place of four
