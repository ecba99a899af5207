"""The `reference` recipe meets the numbers measured from the public reference, and only with all
its options on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import golden
from spt_ds.model.reference import PaddedPool, functions_of
from spt_ds.model.retriever import softplus_scores
from spt_ds.model.spt import Spt

FOLDER = Path(__file__).parents[1] / "data" / "golden_opt_tiny_k3"


def within(worst: dict[str, float], dtype: torch.dtype) -> bool:
    loss, gradient = golden.LIMITS[dtype]
    return max(worst["loss"], worst["score"]) <= loss and worst["gradient"] <= gradient


def test_the_limits_are_those_promised() -> None:
    assert {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-12)} == golden.LIMITS


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", golden.LIMITS, ids=str)
def test_golden(dtype: torch.dtype, backend: str) -> None:
    worst = golden.compare(FOLDER, dtype, backend)
    assert within(worst, dtype), worst
    assert worst["activation"] <= 1e-15


def test_golden_compares_every_loss_and_gradient() -> None:
    computed = golden.compute(*golden.load_case(FOLDER, torch.float64))
    names = {"nll", "kl", "fusion", "ctr", "total"}
    expected = {f"loss_{name}" for name in names} | {
        f"g_{p}_{name}" for name in names for p in ("prompt", "W", "b")
    }
    assert set(computed) == expected | {"nll_per_prompt", "sim_scores"}
    assert all(float(computed[f"g_prompt_{name}"].abs().max()) > 1e-6 for name in names)


def option(section: str, **values: Any) -> Callable[[Spt], Spt]:
    """Change options of the resolved recipe."""

    def change(spt: Spt) -> Spt:
        changed = getattr(spt.config, section).model_copy(update=values)
        config = spt.config.model_copy(update={section: changed})
        pool = spt.functions.pool
        assert isinstance(pool, PaddedPool)
        return Spt(config, spt.trainables, functions_of(config.reference, pool.pad_id))

    return change


def activation(spt: Spt) -> Spt:
    spt.trainables.retriever.activation = softplus_scores  # type: ignore[assignment]
    return spt


def projections(spt: Spt) -> Spt:
    """Two projections, even when both start from the reference's weights: the gradient is then
    split.
    """
    retriever: Any = spt.trainables.retriever
    shared = retriever.context
    apart = torch.nn.Linear(shared.in_features, shared.out_features).to(shared.weight.dtype)
    apart.load_state_dict(shared.state_dict())
    retriever.prompt = apart
    return spt


def pad_row(spt: Spt) -> Spt:
    return Spt(spt.config, spt.trainables, functions_of(spt.config.reference, pad_id=2))


SWITCHES = {
    "reference.jumping_activation": activation,
    "retriever.projections": projections,
    "reference.padded_pool": option("reference", padded_pool=False),
    "reference.pool_length_tokens": option("reference", pool_length_tokens=512),
    "losses.selection": option("losses", selection=1.0),
    "losses.fusion": option("losses", fusion=0.5),
    "losses.contrastive": option("losses", contrastive=1.0),
    "losses.tau_gold": option("losses", tau_gold=0.9),
    "losses.tau_sim": option("losses", tau_sim=0.9),
    "prompts.position": option("prompts", position="before_reply"),
    "pad row": pad_row,
}


@pytest.mark.parametrize("dtype", golden.LIMITS, ids=str)
@pytest.mark.parametrize("name", SWITCHES)
def test_golden_sees_each_option_switched_off(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = golden.load_case

    def switched(*args: Any) -> Any:
        backbone, spt, *case = right(*args)
        return backbone, SWITCHES[name](spt), *case

    monkeypatch.setattr(golden, "load_case", switched)
    assert not within(golden.compare(FOLDER, dtype), dtype)


def test_golden_cannot_tell_the_masks_apart() -> None:
    """No target of the case has a loss of exactly 0, so `mask` is tested in
    test_reference_faults.py instead.
    """
    backbone, spt, batch, arrays = golden.load_case(FOLDER, torch.float64)
    plain = option("reference", nonzero_mask=False)(spt)
    out = golden.compute(backbone, plain, batch, arrays)
    assert abs(float(out["loss_total"]) - float(arrays["loss_total64"])) < 1e-12


def test_golden_fails_loudly_on_weights_that_do_not_fit(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = dict(np.load(FOLDER / "opt_weights.npz"))
    weights.pop(next(name for name in weights if "fc1" in name))
    np.savez(tmp_path / "opt_weights.npz", **weights)
    with pytest.raises(SystemExit, match="do not fit"):
        golden.load_case(tmp_path, torch.float64)
