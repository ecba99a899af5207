"""Any number of ranks, any placement of the base, any split into micro-batches: the numbers of one
process.

Gradients are compared, and weights only loosely: Adam divides by a gradient's size and so amplifies
its rounding.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

from spt_ds import dist
from tests.distributed.conftest import Reference
from tests.distributed.scenes import (
    Outcome,
    Scene,
    Setup,
    gap,
    measure,
    open_engine,
    windows,
)
from tests.helpers.ranks import run_ranks

FP32, BF16 = 1e-6, 1e-5
SHIPPED = ("zero2", "zero3", "zero3_offload_cpu", "zeropp")
# (base, bits, placement of the prompts, activation checkpointing): every pair of values at least
# once.
CASES = [
    ("opt", 32, "prefix", "off"),
    ("opt", 32, "suffix", "reentrant"),
    ("opt", 16, "prefix", "non_reentrant"),
    ("llama", 32, "suffix", "off"),
    ("llama", 32, "prefix", "reentrant"),
    ("llama", 32, "suffix", "non_reentrant"),
    ("llama", 16, "prefix", "off"),
    ("llama", 16, "suffix", "reentrant"),
]
EVERY = [
    (arch, bits, placement, recompute)
    for arch in ("opt", "llama")
    for bits in (32, 16)
    for placement in ("prefix", "suffix")
    for recompute in ("off", "reentrant", "non_reentrant")
]


def setups(
    scene: Scene, ds: str | None, cases: list[tuple[str, int, str, str]], *more: str
) -> list[Setup]:
    path = None if ds is None else scene.ds(ds)
    return [
        Setup(
            path,
            scene.overrides(
                arch,
                f"model.base_bits={bits}",
                f"prompts.placement={placement}",
                f"model.activation_checkpointing='{recompute}'",
                *more,
            ),
        )
        for arch, bits, placement, recompute in cases
    ]


def assert_same(found: Outcome, expected: Outcome, limit: float) -> None:
    """Losses, gradients of every tensor, trained tensors and validation losses within `limit`,
    relative.
    """
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        for name, value in theirs.items():
            # The selection loss is made of differences between prompts' nll: it is known to the
            # precision of those.
            scale = theirs["nll"] if name == "selection" else max(abs(value), 1.0)
            assert abs(ours[name] - value) <= limit * scale, f"{name}: {ours[name]} and {value}"
    for ours_, theirs_ in zip(found.gradients, expected.gradients, strict=True):
        gaps = {name: gap(ours_[name], theirs_[name]) for name in theirs_}
        assert max(gaps.values()) <= limit, gaps
    gaps = {name: gap(found.trained[name], expected.trained[name]) for name in expected.trained}
    assert max(gaps.values()) <= 10 * limit, gaps
    for name, value in expected.valid.items():
        assert abs(found.valid[name] - value) <= 10 * limit * max(
            abs(value), expected.valid["nll"]
        ), f"valid {name}"


def assert_base_untouched(ranks: list[Outcome], expected: Outcome, sharded: bool) -> None:
    """Every rank holds the bytes it held before, all together those of the file; and really only a
    share of them.
    """
    for found in ranks:
        before, after = found.digests
        assert before == after
        assert found.base_differs == []
        if sharded:
            assert (
                found.local_bytes <= expected.local_bytes / len(ranks) + 64 * 40
            )  # 36 tensors, each padded
        else:
            assert found.local_bytes == expected.local_bytes


def check(
    scene: Scene,
    one_process: Reference,
    world: int,
    ds: str,
    cases: list[tuple[str, int, str, str]],
) -> None:
    asked = setups(scene, ds, cases)
    expected = one_process(asked)
    ranks = run_ranks(world, measure, asked, timeout_s=250)
    for number, (case, theirs) in enumerate(zip(cases, expected, strict=True)):
        of_case = [outcomes[number] for outcomes in ranks]
        assert_same(of_case[0], theirs, FP32 if case[1] == 32 else BF16)
        for other in of_case[1:]:  # to the last bit: else ranks would drift apart
            assert all(
                np.array_equal(other.trained[name], of_case[0].trained[name])
                for name in other.trained
            )
            assert other.losses == of_case[0].losses
        assert_base_untouched(of_case, theirs, sharded=ds != "zero2")


@pytest.mark.parametrize(
    ("world", "ds", "cases"),
    [
        (2, "zero2", CASES[:1]),
        (3, "zero2", CASES[6:7]),
        (2, "zero3", CASES),
        (3, "zero3", CASES[2:4]),
        (3, "zero3_offload_cpu", CASES[1::6]),
        (2, "zeropp", CASES[6:7]),
    ],
)
def test_ranks_equal_one_process(
    scene: Scene,
    one_process: Reference,
    world: int,
    ds: str,
    cases: list[tuple[str, int, str, str]],
) -> None:
    check(scene, one_process, world, ds, cases)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("ds", SHIPPED)
def test_every_combination_equals_one_process(
    scene: Scene, one_process: Reference, world: int, ds: str
) -> None:
    check(scene, one_process, world, ds, EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_a_second_copy_per_host_equals_one_process(scene: Scene, bits: int) -> None:
    """Two hosts of two ranks: each host holds the base once more."""
    file = Path(scene.ds("zero3"))
    tree = json.loads(file.read_text())
    tree["zero_optimization"]["zero_hpz_partition_size"] = 2
    asked_for = file.with_name("second_copy.json")
    asked_for.write_text(json.dumps(tree))
    asked = Setup(str(asked_for), scene.overrides("llama", f"model.base_bits={bits}"))
    (expected,) = run_ranks(1, first_gradient, Setup(None, asked.overrides))
    for found in run_ranks(4, first_gradient, asked):
        assert gap(found, expected) <= FP32


def test_two_hosts_share_a_second_copy_without_being_asked(scene: Scene) -> None:
    asked = Setup(scene.ds("zero3"), scene.overrides("llama", "model.base_bits=16"))
    (expected,) = run_ranks(1, first_gradient, Setup(None, asked.overrides))
    for found, ranks, timeout_s in run_ranks(4, on_two_hosts, asked):
        assert gap(found, expected) <= BF16
        assert ranks == 2
        # The group of a host's ranks is DeepSpeed's own, but waits as long as all do.
        assert timeout_s == 90


def on_two_hosts(world: dist.World, setup: Setup) -> tuple[np.ndarray, int, float]:
    """`first_gradient` where a host has two ranks; the ranks of the copy's group, its time-out."""
    from deepspeed.utils import groups

    two = replace(world, local_size=2, local_rank=world.rank % 2)
    row = first_gradient(two, setup)
    group = groups._get_zero_param_intra_parallel_group()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    return row, group.size(), timeout.total_seconds()


def first_gradient(world: dist.World, setup: Setup) -> np.ndarray:
    """All gradients of a first step as one row."""
    config, session, engine = open_engine(world, setup)
    engine.train_window(next(windows(config, session, world).windows(0)), 0, 2, (0.0, 0.0))
    row: np.ndarray = engine.gradients.numpy().copy()
    return row


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_products_in_fp8_are_alike_on_any_ranks(scene: Scene, placement: str) -> None:
    """Each row of tokens has its own scale: its companions change no bit of it."""
    options = ("model.base_bits=16", "model.base_matmul=fp8", f"prompts.placement={placement}")
    asked = Setup(None, scene.overrides("llama", *options))
    (expected,) = run_ranks(1, first_gradient, asked)
    for found in run_ranks(2, first_gradient, asked):
        assert gap(found, expected) <= BF16


@pytest.mark.parametrize("world", [2, 3])
def test_nvme_equals_one_process(
    scene: Scene,
    one_process: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
) -> None:
    skip_without_async_io()
    monkeypatch.setenv("SPT_NVME_PATH", str(tmp_path))
    cases = [("llama", 32, "prefix", "off"), ("opt", 16, "suffix", "reentrant")]
    asked = setups(scene, "zero3_offload_nvme", cases)
    expected = one_process(asked)
    ranks = run_ranks(world, measure, asked)
    for number, (case, theirs) in enumerate(zip(cases, expected, strict=True)):
        assert_same(ranks[0][number], theirs, FP32 if case[1] == 32 else BF16)
        assert ranks[0][number].base_differs == []


def skip_without_async_io() -> None:
    """NVMe offload needs an extension that takes minutes to compile: no test starts that."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/*.so")
    if not {"async_io", "pin_memory"} <= {path.stem for path in built}:
        pytest.skip("DeepSpeed's async_io is not built here; run `make async-io`")


def test_one_window_split_in_every_way(scene: Scene, one_process: Reference) -> None:
    """4 examples as 4, 2+2 or 1+1+1+1 micro-batches on 1, 2 or 4 ranks."""
    (whole,) = one_process([Setup(None, scene.overrides("llama", "train.micro_batch=4"), steps=1)])
    ds = scene.ds("zero3")
    for world, micro_batches in ((1, (1, 2)), (2, (1, 2)), (4, (1,))):
        sizes = [f"train.micro_batch={n}" for n in micro_batches]
        sizes.append("train.micro_batch_tokens=400")  # one process: 1 + 2 + 1 examples
        asked = [Setup(ds, scene.overrides("llama", size), steps=1) for size in sizes]
        for found in run_ranks(world, measure, asked)[0]:
            assert_same(found, whole, FP32)


@pytest.mark.parametrize("world", [2, 3])
def test_fillers_count_for_nothing(scene: Scene, one_process: Reference, world: int) -> None:
    """5 examples on 2 or 3 ranks, 7 in validation: the rows that complete a rank's share change no
    number.
    """
    asked = [
        Setup(
            scene.ds("zero3"), scene.overrides("opt", "train.global_batch=5", "train.micro_batch=2")
        )
    ]
    (expected,) = one_process(asked)
    ranks = [outcomes[0] for outcomes in run_ranks(world, measure, asked)]
    assert_same(ranks[0], expected, FP32)
    rows = [row for found in ranks for row in found.examples]
    assert Counter(row for row, weight in rows if weight == 1.0) == Counter(range(7))
    assert all(weight in (0.0, 1.0) for _, weight in rows)
    assert len(rows) == -(-7 // world) * world  # fillers there are
    assert len({len(found.examples) for found in ranks}) == 1


@pytest.mark.parametrize("ds", [None, "zero3"])
def test_random_weights_are_the_same_on_every_rank(scene: Scene, ds: str | None) -> None:
    """Which they are depends on the placement: a base for benchmarks, not for results."""
    asked = Setup(ds and scene.ds(ds), scene.overrides("opt", "model.random_init=true"))
    (expected,) = run_ranks(1, first_gradient, asked)
    assert np.linalg.norm(expected) > 0
    for found in run_ranks(2, first_gradient, asked):
        assert gap(found, expected) <= FP32


def test_the_comparison_sees_a_mean_of_means(scene: Scene, one_process: Reference) -> None:
    """The fault of many trainers: each rank divides by its own tokens. Far above the tolerance."""
    asked = Setup(scene.ds("zero3"), scene.overrides("llama"))
    (expected,) = one_process([asked])
    found = run_ranks(2, measure_mean_of_means, asked)[0]
    assert gap(found["bank.weight"], expected.gradients[0]["bank.weight"]) > 1e3 * FP32


def measure_mean_of_means(world: dist.World, setup: Setup) -> dict[str, np.ndarray]:
    """Gradients of a first step that is normalised rank by rank."""
    config, session, engine = open_engine(world, setup)
    window = next(windows(config, session, world).windows(0))
    own = sum(sum(batch.response_lens) for batch in window.micro)
    engine.train_window(replace(window, target_tokens=own * world.size), 0, 2, (0.0, 0.0))
    return {
        name: p.grad.numpy().copy()
        for name, p in engine.trainables.named_parameters()
        if p.grad is not None
    }


def test_what_trains_is_fp32_and_what_is_frozen_has_no_gradient(scene: Scene) -> None:
    asked = Setup(scene.ds("zero3"), scene.overrides("llama", "model.base_bits=16"))
    for rules in run_ranks(2, precision, asked):
        assert rules["parameters"] == rules["gradients"] == rules["moments"] == {str(torch.float32)}
        assert rules["reduced"] == str(torch.float32)
        assert rules["base"] == {str(torch.bfloat16)}
        assert rules["frozen"] == {(False, True)}  # (requires_grad, grad is None)
        assert rules["names"] == [
            "bank.weight",
            "retriever.context.weight",
            "retriever.context.bias",
            "retriever.prompt.weight",
            "retriever.prompt.bias",
        ]


def precision(world: dist.World, setup: Setup) -> dict[str, object]:
    """What one step leaves behind, by dtype."""
    config, session, engine = open_engine(world, setup)
    engine.train_window(next(windows(config, session, world).windows(0)), 0, 2, (0.0, 0.0))
    own = list(engine.trainables.parameters())
    moments = [
        value
        for state in engine.optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    assert len(moments) == 2 * len(own)
    return {
        "parameters": {str(p.dtype) for p in own},
        "gradients": {str(p.grad.dtype) for p in own if p.grad is not None},
        "moments": {str(value.dtype) for value in moments},
        "reduced": str(engine.buffer.dtype),
        "base": {str(p.dtype) for p in engine.backbone.parameters()},
        "frozen": {(p.requires_grad, p.grad is None) for p in engine.backbone.parameters()},
        "names": engine.names,
    }
