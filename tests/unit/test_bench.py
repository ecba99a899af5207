"""The benchmark's two sides compute the same losses and gradients, and its counts are those of the layers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from spt_ds.bench import command
from spt_ds.bench.naive import naive_loss
from spt_ds.bench.shapes import build, micro_batch
from spt_ds.bench.step import tokens_read
from spt_ds.config.load import load_config
from spt_ds.model.spt import Counts


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
def test_naive_twin_has_our_losses_and_gradients(checkpointing: str) -> None:
    config = load_config(
        "demo", [f"model.activation_checkpointing={checkpointing}", "losses.contrastive=0", "prompts.count=3"]
    )
    backbone, spt = build("tiny", config, torch.device("cpu"))
    batch = micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)
    ours = backbone(spt.micro_losses, batch, Counts(len(batch), len(batch.response_ids))).total
    parameters = list(spt.trainables.parameters())
    expected = torch.autograd.grad(ours, parameters)
    naive = naive_loss(backbone, spt, batch, 256)
    assert abs((naive - ours).item()) < 1e-5
    for mine, theirs in zip(expected, torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "suffix", "naive"])
def test_counted_tokens_are_those_the_layers_see(case: str) -> None:
    args = command._arguments(["step", "--shape", "tiny", "--batch", "3", "--max-tokens", "256"])
    placement = "suffix" if case == "suffix" else "prefix"
    overrides = [f"prompts.placement={placement}", "model.activation_checkpointing=off", "losses.contrastive=0"]
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
            backbone(spt.micro_losses, batch, Counts(3, 1))
    assert sum(seen) == tokens_read(case, batch.context_lens, batch.response_lens, 4, args)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert command.main([*argv, "--threads", "1", "--steps", "1"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_step_compares_losses_and_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "step", "--shape", "tiny", "--batch", "2", "--cases", "naive,prefix")
    assert [result["case"] for result in report["results"]] == ["naive", "prefix"]
    assert report["same"]["prefix K=4"] < 1e-5
    assert report["ratios"]["prefix K=4: times less"] > 0
    assert report["results"][0]["real_share"] < 1.0 == report["results"][1]["real_share"]


def test_decoding_costs_a_row_step_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "decode", "--shape", "tiny", "--batch", "12", "--prompts", "3", "--new-tokens", "4")
    naive, ours = report["results"]
    assert ours["row_steps"] == ours["examples_times_tokens"] == 48
    assert naive["row_steps"] == 3 * 48
    assert report["same"]["ours K=3"] is True


def test_head_keeps_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "head", "--prompts", "8", "--targets", "64", "--head-chunk-mib", "32")
    naive, ours = report["results"]
    assert report["same"]["ours K=8"] < 1e-4
    assert ours["peak_mib"] < 100 < naive["peak_mib"]


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["step", "--cases", "faster"]) == 2
    assert "no case 'faster'; step has naive, prefix, suffix" in capsys.readouterr().err
