"""A micro-batch asks the device for no number: the host runs ahead, and waits once a step
(engine.train_window).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from spt_ds.batch import Batch
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.spt import Spt
from tests.helpers.tiny import random_batch
from tests.numerics.steps import Case, build, contrast_of, counts_of, our_step
from tests.numerics.test_twin import LENS

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def without_numbers(case: Case, **options: int) -> None:
    """Forward and backward pass on tensors that have shapes and no values: whoever reads a value
    gets an error.
    """
    backbone, spt = build(case, **options)
    batch = random_batch(LENS)
    contrast = contrast_of(batch, case.precise)
    assert contrast is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = backbone(spt.micro_losses, batch, *counts_of(batch))
        loss, _ = spt.contrastive(out.pooled, out.scores[None], contrast, 0)
        trained = list(spt.trainables.parameters())
        grads = torch.autograd.grad(out.total + loss, trained)
    assert [grad.shape for grad in grads] == [parameter.shape for parameter in trained]


@pytest.mark.parametrize("top_m", [0, 1])
@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_no_value_is_read(
    arch: str, backend: str, placement: str, checkpointing: str, top_m: int
) -> None:
    case = Case(arch, torch.float32, backend, placement=placement, checkpointing=checkpointing)
    without_numbers(case, train_top_m=top_m)


class Reads(TorchDispatchMode):
    """Names of the operations that gave the host a number: transformers keeps its own from tensors
    without values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama", "gemma", "phi"])
def test_the_base_reads_no_value(arch: str, placement: str) -> None:
    backbone, spt = build(Case(arch, torch.float32, placement=placement))
    batch = random_batch(LENS)
    with Reads() as reads:
        backbone(spt.micro_losses, batch, *counts_of(batch)).total.backward()
    assert reads.seen == []
    with reads:
        torch.ones(1).item()
    assert len(reads.seen) == 1


@pytest.mark.parametrize(
    "reading",
    [
        lambda nll: nll.sum().item(),
        lambda nll: torch.repeat_interleave(nll[0], torch.ones(nll.shape[1]).long()),
    ],
)
def test_the_test_sees_who_reads(
    reading: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = losses.selection
    monkeypatch.setattr(
        losses, "selection", lambda nll, *more: (reading(nll.detach()), right(nll, *more))[1]
    )
    with pytest.raises(WAITS):
        without_numbers(Case("opt", torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_a_gpu_is_not_waited_for(arch: str, placement: str) -> None:
    case = Case(arch, torch.bfloat16, placement=placement)
    backbone, spt = build(case)
    backbone.to("cuda")
    spt.trainables.to("cuda")
    batch = random_batch(LENS)
    step(backbone, spt, batch, case)  # the first step also takes memory, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(backbone, spt, batch, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(backbone: Backbone, spt: Spt, batch: Batch, case: Case) -> None:
    our_step(backbone, spt, [batch], contrast_of(batch, case.precise))
