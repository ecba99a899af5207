"""The GPU kernels against the float64 twin. Head sizes here are 8, the smallest that the fused
kernels take.
"""

from __future__ import annotations

import pytest
import torch

from spt_ds.model.attention import choose_backend
from tests.helpers.tiny import random_batch
from tests.helpers.tolerances import assert_steps_close
from tests.numerics.steps import Case, build, contrast_of, our_step
from tests.numerics.test_twin import LENS, twin

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "varlen", "flash"])
@pytest.mark.parametrize("arch", ["opt", "gemma"])
def test_step_equals_the_twin_on_the_gpu(arch: str, backend: str, placement: str) -> None:
    case = Case(arch, torch.bfloat16, backend, placement=placement)
    if choose_backend(backend, GPU, case.dtype, strict=False) != backend:
        pytest.skip(f"{backend} is not installed")
    backbone, spt = build(case)
    backbone.to(GPU)
    spt.trainables.to(GPU)
    batch = random_batch(LENS)
    step = our_step(backbone, spt, [batch], contrast_of(batch, case.precise))
    assert_steps_close(step, twin(case), case.dtype)
