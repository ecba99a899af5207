"""Losses and gradients of a whole step equal those of the slow float64 twin, within one row of
tolerances per dtype.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_ds.batch import Batch
from tests.helpers.tiny import pick, random_batch
from tests.helpers.tolerances import Step, assert_steps_close
from tests.numerics.steps import Case, build, contrast_of, our_step, twin_of

LENS = (
    (5, 3),
    (9, 1),
    (1, 6),
    (7, 4),
)  # (context, response): a reply of EOS alone and a context of one token too
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
MODES = ("off", "non_reentrant", "reentrant")


def twin(case: Case) -> Step:
    """The twin neither knows backends nor checkpointing: one run serves them all."""
    return _twin(replace(case, backend="sdpa", checkpointing="off"))


@functools.cache
def _twin(case: Case) -> Step:
    batch = random_batch(LENS)
    return twin_of(case, build(case)[1], batch, contrast_of(batch, case.precise))


def ours(case: Case, batch: Batch) -> Step:
    backbone, spt = build(case)
    return our_step(backbone, spt, [batch], contrast_of(batch, case.precise))


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_step_equals_the_twin(
    arch: str, placement: str, dtype: torch.dtype, backend: str, checkpointing: str
) -> None:
    for count in (1, 2, 3, 4, 5):
        case = Case(arch, dtype, backend, checkpointing, placement, count)
        assert_steps_close(ours(case, random_batch(LENS)), twin(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt_project", "gemma", "phi"])
def test_other_architectures_equal_the_twin(arch: str, placement: str, dtype: torch.dtype) -> None:
    """Embedding size unlike hidden size; embeddings scaled inside the base; a head with bias."""
    case = Case(arch, dtype, placement=placement)
    assert_steps_close(ours(case, random_batch(LENS)), twin(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["opt", "phi"])
def test_a_normalised_fusion_equals_the_twin(arch: str, dtype: torch.dtype) -> None:
    """Phi's head has a bias, whose scale is 1 then."""
    case = Case(arch, dtype, fusion_weights="normalised")
    assert_steps_close(ours(case, random_batch(LENS)), twin(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", ["prompts", "learned"])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama", "phi"])
def test_a_mixture_equals_the_twin(
    arch: str, placement: str, keys: str, dtype: torch.dtype
) -> None:
    for count in (2, 3, 5):
        case = Case(arch, dtype, placement=placement, count=count, objective="mixture", keys=keys)
        assert_steps_close(ours(case, random_batch(LENS)), twin(case), dtype)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_a_mixture_in_micro_batches_equals_the_twin(placement: str) -> None:
    case = Case("llama", placement=placement, objective="mixture", keys="learned")
    backbone, spt = build(case)
    batch = random_batch(LENS)
    micro = [pick(batch, [2]), pick(batch, [0, 3]), pick(batch, [1])]
    ours = our_step(backbone, spt, micro)
    order = [2, 0, 3, 1]
    expected = twin_of(case, spt, pick(batch, order), None)
    assert_steps_close(ours, expected, case.dtype)


def test_learned_keys_in_the_paper_objective_equal_the_twin() -> None:
    case = Case("llama", keys="learned")
    assert_steps_close(ours(case, random_batch(LENS)), twin(case), case.dtype)


def test_a_mixture_of_one_prompt_is_its_nll() -> None:
    step = ours(Case("llama", count=1, objective="mixture"), random_batch(LENS))
    torch.testing.assert_close(step.values["mixture"], step.values["nll_loss"])
    alone = {"selection": 0.0, "fusion": 0.0, "contrastive": 0.0}
    backbone, spt = build(Case("llama", count=1), **alone)
    plain = our_step(backbone, spt, [random_batch(LENS)])
    torch.testing.assert_close(step.grads["bank.weight"], plain.grads["bank.weight"])


def test_virtual_tokens_of_any_number_equal_the_twin() -> None:
    for placement, tokens in itertools.product(["prefix", "suffix"], [1, 5]):
        case = Case("llama", placement=placement, tokens=tokens)
        batch = random_batch(LENS)
        backbone, spt = build(case)
        contrast = contrast_of(batch, case.precise)
        expected = twin_of(case, spt, batch, contrast)
        assert_steps_close(our_step(backbone, spt, [batch], contrast), expected, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_a_prompt_inside_the_context_equals_the_twin(
    arch: str, placement: str, dtype: torch.dtype
) -> None:
    """As in a system message, or before the words with which a template begins a reply."""
    for prompt_at in [(3, 5, 1, 2), (1, 9, 1, 6)]:
        case = Case(arch, dtype, placement=placement)
        batch = replace(random_batch(LENS), prompt_at=prompt_at)
        backbone, spt = build(case)
        contrast = contrast_of(batch, case.precise)
        expected = twin_of(case, spt, batch, contrast)
        assert_steps_close(our_step(backbone, spt, [batch], contrast), expected, dtype)


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    lens=lengths,
    placement=st.sampled_from(["prefix", "suffix"]),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_twin(
    lens: list[tuple[int, int]], placement: str, count: int, seed: int
) -> None:
    case = Case("llama", placement=placement, count=count)
    batch = random_batch(lens, seed=seed)
    backbone, spt = build(case)
    contrast = contrast_of(batch, case.precise)
    expected = twin_of(case, spt, batch, contrast)
    assert_steps_close(our_step(backbone, spt, [batch], contrast), expected, case.dtype)
