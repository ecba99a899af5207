"""LoRA and full fine-tuning: losses and gradients against plain autograd through transformers' own
forward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from spt_ds.batch import Batch
from spt_ds.config.method import ReferenceConfig
from spt_ds.config.schema import Config
from spt_ds.errors import ModelError
from spt_ds.model import head as head_module
from spt_ds.model.backbone import Backbone
from spt_ds.model.baselines import BaseTrainables, build_base_trainables
from spt_ds.model.head import FrozenHead
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt
from tests.helpers.tiny import VOCABULARY, examples_of, random_batch, tiny_backbone, tiny_lm
from tests.helpers.tolerances import TOLERANCES, Step, assert_steps_close, gaps

LENS = [(7, 4), (3, 6), (11, 2)]
PLAIN = functions_of(ReferenceConfig(), pad_id=1)
RANK, ALPHA = 3, 5.0
TARGETS = {
    "opt": ["q_proj", "fc2"],
    "opt_project": ["project_in", "v_proj"],
    "llama": ["q_proj", "down_proj"],
}


def config_of(kind: str, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "model": {"base_bits": 32, **sections.pop("model", {})},
            "method": {
                "type": kind,
                "lora": {"rank": RANK, "alpha": ALPHA, **sections.pop("lora", {})},
            },
            "prompts": {"count": 1, "tokens": 0},
            "losses": {"selection": 0, "fusion": 0, "contrastive": 0},
            **sections,
        }
    )


def build(kind: str, backbone: Backbone, targets: list[str], dtype: torch.dtype) -> Spt:
    """A baseline over `backbone`; adapters in `dtype`, none of them zero, so that each has a
    gradient.
    """
    config = config_of(kind, lora={"targets": targets})
    trainables = build_base_trainables(config, backbone, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in trainables.named_parameters():
        if "lora_" in name:
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return Spt(config, trainables, PLAIN)


def ours(backbone: Backbone, spt: Spt, batch: Batch) -> Step:
    out = backbone(spt.micro_losses, batch, len(batch), sum(batch.response_lens))
    out.total.backward()
    grads = {name: parameter.grad for name, parameter in spt.trainables.named_parameters()}
    return Step(
        {"total": out.total.detach(), "nll": out.nll},
        {n: g for n, g in grads.items() if g is not None},
    )


def twin(arch: str, spt: Spt, batch: Batch, dtype: torch.dtype, **overrides: Any) -> Step:
    """Each example for itself through the base's own forward, adapters added to its weights by
    hand.
    """
    lm = tiny_lm(arch, dtype, **overrides)
    lm.set_attn_implementation("sdpa")
    trained = {
        name: p.detach().clone().requires_grad_() for name, p in spt.trainables.named_parameters()
    }
    weights = dict(trained)
    if any("lora_" in name for name in trained):
        pairs = {name.partition(".lora_")[0] for name in trained}
        added = {
            p: trained[f"{p}.lora_B.default.weight"] @ trained[f"{p}.lora_A.default.weight"]
            for p in pairs
        }
        weights = {
            f"{p}.weight": lm.get_submodule(p).weight.detach() + ALPHA / RANK * a
            for p, a in added.items()
        }
    sums, means = [], []
    for context, response in examples_of(batch):
        ids = torch.cat([context, response])[None]
        logits = functional_call(lm, weights, (), {"input_ids": ids}).logits[
            0, len(context) - 1 : -1
        ]
        losses = F.cross_entropy(logits, response, reduction="none")
        sums.append(losses.sum())
        means.append(losses.mean().detach())
    total = torch.stack(sums).sum() / sum(batch.response_lens)
    total.backward()
    grads = {name: p.grad for name, p in trained.items()}
    return Step(
        {"total": total.detach(), "nll": torch.stack(means)[None]},
        {n: g for n, g in grads.items() if g is not None},
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
@pytest.mark.parametrize("arch", list(TARGETS))
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_are_those_of_plain_autograd(
    kind: str, arch: str, checkpointing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        head_module, "MIB", VOCABULARY * 8
    )  # 14 to 28 rows a chunk of the head: several chunks
    backbone = tiny_backbone(arch, dtype, checkpointing=checkpointing)
    spt = build(kind, backbone, TARGETS[arch], dtype)
    batch = random_batch(LENS)
    found, expected = ours(backbone, spt, batch), twin(arch, spt, batch, dtype)
    names = [name for name, _ in spt.trainables.named_parameters()]
    assert list(found.grads) == names
    if kind == "full":
        assert names == [name for name, _ in tiny_lm(arch).named_parameters()]
    else:
        assert len(names) == {"opt": 8, "llama": 8, "opt_project": 6}[arch]
    # A key bias shifts all scores of a query alike: its gradient is rounding, and has no relative
    # error.
    drop = {name for name in names if name.endswith("k_proj.bias")}
    keep = [
        Step(s.values, {n: g for n, g in s.grads.items() if n not in drop})
        for s in (found, expected)
    ]
    assert_steps_close(keep[0], keep[1], dtype)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_through_relu(kind: str) -> None:
    """What OPT's own activation keeps for the backward pass is enough for the weights around it."""
    relu: dict[str, Any] = {"activation_function": "relu"}
    backbone = tiny_backbone("opt", **relu)
    spt, batch = build(kind, backbone, ["fc1", "fc2"], torch.float64), random_batch(LENS)
    found, expected = ours(backbone, spt, batch), twin("opt", spt, batch, torch.float64, **relu)
    bound = TOLERANCES[torch.float64].grad
    wide = {
        name: gap
        for name, (gap, _) in gaps(found, expected).items()
        if not name.endswith("k_proj.bias")
    }
    assert max(wide.values()) <= bound, wide


@pytest.mark.parametrize("arch", ["opt", "llama", "phi"])
def test_full_trains_every_parameter_once(arch: str) -> None:
    backbone = tiny_backbone(arch, torch.float32)
    trainables = build_base_trainables(config_of("full"), backbone, seed=0)
    assert {id(p) for p in trainables.parameters()} == {id(p) for p in backbone.parameters()}
    assert len(list(trainables.parameters())) == len({id(p) for p in trainables.parameters()})


def test_a_head_that_keeps_its_gradient_to_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen head's shortcut on a head that trains: the tied table loses half its gradient."""

    def frozen(
        self: FrozenHead, hidden: Any, targets: Any, scale: Any, rows: int, precise: torch.dtype
    ) -> Any:
        return head_module._HeadLoss.apply(
            hidden, targets, self.weight, self.bias, scale, rows, precise
        )

    monkeypatch.setattr(FrozenHead, "_trained", frozen)
    assert_seen("full", "model.decoder.embed_tokens.weight")


def test_a_table_that_is_looked_up_without_gradient_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Backbone.__init__

    def broken(self: Backbone, *args: Any) -> None:
        right(self, *args)
        table = self.embed
        self.embed = lambda ids: table(ids).detach()

    monkeypatch.setattr(Backbone, "__init__", broken)
    assert_seen("full", "model.decoder.embed_tokens.weight")


def assert_seen(kind: str, name: str) -> None:
    backbone = tiny_backbone("opt")
    spt = build(kind, backbone, ["q_proj"], torch.float64)
    batch = random_batch(LENS)
    gap, _ = gaps(ours(backbone, spt, batch), twin("opt", spt, batch, torch.float64))[
        f"grad {name}"
    ]
    assert gap > 1e-2


def test_adapters_of_a_bf16_base_stay_fp32() -> None:
    batch = random_batch(LENS)
    steps = []
    for dtype in (torch.bfloat16, torch.float32):
        backbone = tiny_backbone("llama", dtype)
        spt = build("lora", backbone, TARGETS["llama"], torch.float32)
        steps.append(ours(backbone, spt, batch))
        assert all(grad.dtype == torch.float32 for grad in steps[-1].grads.values())
        assert all(p.dtype == dtype for n, p in backbone.named_parameters() if "lora_" not in n)
    row = TOLERANCES[torch.bfloat16]
    limits = {"loss": row.loss, "grad": row.grad}
    assert all(gap <= limits[kind] for gap, kind in gaps(*steps).values()), gaps(*steps)


@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_fresh_adapters_change_nothing_and_are_the_same_for_a_seed(arch: str) -> None:
    batch = random_batch(LENS)
    plain = tiny_backbone(arch, torch.float32)
    base = Spt(config_of("none"), build_base_trainables(config_of("none"), plain, 0), PLAIN)
    expected = plain(base.micro_losses, batch, 1, 1)
    drawn: list[list[torch.Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))  # peft's own draws come from here; ours do not
        backbone = tiny_backbone(arch, torch.float32)
        spt = Spt(
            config_of("lora"), build_base_trainables(config_of("lora"), backbone, seed), PLAIN
        )
        assert torch.equal(backbone(spt.micro_losses, batch, 1, 1).nll, expected.nll)
        drawn.append(
            [p.detach().clone() for n, p in spt.trainables.named_parameters() if "lora_A" in n]
        )
    assert len(drawn[0]) == 4  # peft's choice: query and value projections of two layers
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    spread = torch.cat([a.flatten() for a in drawn[0]])
    assert 0.9 * 16**-0.5 < float(spread.abs().max()) <= 16**-0.5


def test_nothing_trains() -> None:
    backbone = tiny_backbone("llama", torch.float32)
    trainables = build_base_trainables(config_of("none"), backbone, 0)
    assert isinstance(trainables, BaseTrainables)
    assert list(trainables.named_parameters()) == list(trainables.parameters()) == []
    scores = trainables.retriever(trainables.bank.weight, torch.randn(3, 16))
    assert torch.equal(scores, torch.ones(1, 3))


@pytest.mark.parametrize("targets", [["q_prj"], ["lm_head"], ["embed_tokens"]])
def test_targets_that_do_not_fit_are_named(targets: list[str]) -> None:
    backbone = tiny_backbone("llama", torch.float32)
    with pytest.raises(ModelError) as caught:
        build_base_trainables(config_of("lora", lora={"targets": targets}), backbone, 0)
    text = str(caught.value)
    assert text.startswith("method.lora.targets: ")
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="install the extra `baselines`"):
        build_base_trainables(config_of("lora"), tiny_backbone("opt", torch.float32), 0)
