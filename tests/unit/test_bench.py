"""The benchmark's two sides compute the same losses and gradients, and its counts are those of the layers."""

from __future__ import annotations

import json

import pytest
import torch

from spt_ds.bench import command
from spt_ds.bench.naive import naive_loss
from spt_ds.bench.shapes import build, micro_batch
from spt_ds.config.load import load_config
from spt_ds.model.spt import Counts


@pytest.mark.parametrize("recompute", [True, False])
def test_naive_twin_has_our_losses_and_gradients(recompute: bool) -> None:
    config = load_config("demo", ["model.activation_checkpointing=off", "losses.contrastive=0", "prompts.count=3"])
    backbone, spt = build("tiny", config, torch.device("cpu"))
    batch = micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)
    ours = backbone(spt.micro_losses, batch, Counts(len(batch), len(batch.response_ids))).total
    parameters = list(spt.trainables.parameters())
    expected = torch.autograd.grad(ours, parameters)
    naive = naive_loss(backbone, spt, batch, 256, recompute=recompute)
    assert abs((naive - ours).item()) < 1e-5
    for mine, theirs in zip(expected, torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "suffix", "naive"])
def test_counted_tokens_are_those_the_layers_see(case: str) -> None:
    args = command._arguments(["--shape", "tiny", "--batch", "3", "--max-tokens", "256"])
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
            naive_loss(backbone, spt, batch, 256, recompute=False)
        else:
            backbone(spt.micro_losses, batch, Counts(3, 1))
    assert sum(seen) == command._tokens(case, batch.context_lens, batch.response_lens, 4, args)


def test_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--shape", "tiny", "--batch", "2", "--steps", "1", "--cases", "naive,suffix", "--threads", "1"]
    assert command.main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {result["case"] for result in report["results"]} == {"naive", "suffix"}
    assert report["ratios"]["suffix K=4: times less"] > 0
    assert report["results"][0]["real_share"] < 1.0 == report["results"][1]["real_share"]
