"""`losses.train_top_m`: the value is that of all K prompts, the gradient goes through the m best of
each example.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.tiny import random_batch
from tests.helpers.tolerances import Step, assert_steps_close, gaps
from tests.numerics.steps import Case, build, contrast_of, counts_of, our_step, twin_of

LENS = ((5, 3), (9, 1), (1, 6), (7, 4))
COUNT = 4
CASES = [
    Case(arch, placement=p, count=COUNT)
    for arch, p in itertools.product(["opt", "llama"], ["prefix", "suffix"])
]
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{c.arch}-{c.placement}" for c in CASES])


def step(case: Case, best: int) -> Step:
    backbone, spt = build(case, train_top_m=best)
    batch = random_batch(LENS)
    return our_step(backbone, spt, [batch], contrast_of(batch, case.precise))


def best_prompts(full: Step, best: int) -> list[list[int]]:
    """The m prompts of lowest nll of each example, by sorting."""
    columns = full.values["nll"].T.tolist()
    return [sorted(range(COUNT), key=lambda k: column[k])[:best] for column in columns]


def twin(case: Case, trained: list[list[int]]) -> Step:
    batch = random_batch(LENS)
    return twin_of(case, build(case)[1], batch, contrast_of(batch, case.precise), trained)


@each_case
@pytest.mark.parametrize("best", [1, 2, 3])
def test_values_are_those_of_all_prompts_and_gradients_those_of_the_best(
    case: Case, best: int
) -> None:
    full = step(case, 0)
    trained = best_prompts(full, best)
    assert (
        len({tuple(one) for one in trained}) > 1
    )  # examples choose differently: a choice per batch would fail
    ours = step(case, best)
    assert_steps_close(Step(ours.values, {}), Step(full.values, {}), case.dtype)
    assert_steps_close(ours, twin(case, trained), case.dtype)


@each_case
def test_the_comparison_sees_another_choice(case: Case) -> None:
    """The fault: training the worst prompt of each example instead of the best."""
    columns = step(case, 0).values["nll"].T.tolist()
    worst = [[max(range(COUNT), key=lambda k: column[k])] for column in columns]
    with pytest.raises(AssertionError, match=r"grad bank\.weight"):
        assert_steps_close(step(case, 1), twin(case, worst), case.dtype)


@each_case
def test_all_prompts_chosen_is_the_full_step(case: Case) -> None:
    full, every = step(case, 0), step(case, COUNT)
    assert max(gap for gap, _ in gaps(every, full).values()) == 0.0


def test_a_mixture_trains_the_best_too() -> None:
    case = Case("llama", placement="suffix", count=COUNT, objective="mixture")
    ours = step(case, 2)
    assert_steps_close(Step(ours.values, {}), Step(step(case, 0).values, {}), case.dtype)
    assert_steps_close(ours, twin(case, best_prompts(ours, 2)), case.dtype)


def test_gradients_of_a_part_differ_from_those_of_the_whole() -> None:
    """m = 1 is not secretly m = K."""
    case = CASES[0]
    with pytest.raises(AssertionError, match=r"grad bank\.weight"):
        assert_steps_close(step(case, 1), step(case, 0), case.dtype)


def test_evaluation_reads_each_prompt_once() -> None:
    """Without gradient there is nothing to select: the second pass over the base is left out."""
    backbone, spt = build(CASES[0], train_top_m=1)
    batch, calls = random_batch(LENS), []
    backbone.lm.base_model.register_forward_pre_hook(
        lambda *args: calls.append(torch.is_grad_enabled())
    )
    our_step(backbone, spt, [batch])
    assert calls == [False, True]
    calls.clear()
    with torch.no_grad():
        backbone(spt.score, spt.pack(batch))
        backbone(spt.micro_losses, batch, *counts_of(batch))
    assert calls == [False]
