"""The comparison with the twin sees every deliberate fault in every dtype: no tolerance is wide
enough to hide one.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tiny import random_batch
from tests.helpers.tolerances import TOLERANCES, Step, assert_steps_close, gaps
from tests.numerics.faults import FAULTS, Fault
from tests.numerics.steps import Case
from tests.numerics.test_twin import LENS, ours, twin

EACH = [(fault, dtype) for fault in FAULTS for dtype in fault.dtypes]


def case_of(fault: Fault, dtype: torch.dtype) -> Case:
    return Case(**{"arch": "llama", **fault.where, "dtype": dtype})


@pytest.mark.parametrize(("fault", "dtype"), EACH, ids=[f"{f.name}-{d}" for f, d in EACH])
def test_the_comparison_sees(
    fault: Fault, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(fault, dtype)
    expected = twin(case)
    fault.break_it(monkeypatch)
    broken = ours(case, random_batch(LENS))
    with pytest.raises(
        AssertionError, match=r"grad|loss|nll|total|scores|selection|fusion|contrastive"
    ):
        assert_steps_close(broken, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_comparison_sees_a_difference_just_above_each_limit(dtype: torch.dtype) -> None:
    """The comparison itself: both columns, both sides of the limit, and NaN."""
    row = TOLERANCES[dtype]
    value, grad = (
        torch.tensor([3.0, 0.5], dtype=torch.float64),
        torch.tensor([2.0, -4.0], dtype=torch.float64),
    )
    twin_step = Step({"nll": value}, {"w": grad})
    assert_steps_close(
        Step({"nll": value * (1 + 0.9 * row.loss)}, {"w": grad * (1 + 0.9 * row.grad)}),
        twin_step,
        dtype,
    )
    wrong = [
        Step({"nll": value + torch.tensor([0.0, 1.1 * row.loss])}, {"w": grad}),
        Step({"nll": value}, {"w": grad * (1 + 1.1 * row.grad)}),
        Step({"nll": value * float("nan")}, {"w": grad}),
        Step({"nll": value}, {"w": grad * float("nan")}),
        Step({"nll": value[:1]}, {"w": grad}),
        Step({}, {"w": grad}),
    ]
    for step in wrong:
        with pytest.raises(AssertionError):
            assert_steps_close(step, twin_step, dtype)


def margin(fault: Fault, dtype: torch.dtype) -> float:
    """How many times its limit the fault's largest difference is; for the table in
    docs/numerics.md.
    """
    case, row = case_of(fault, dtype), TOLERANCES[dtype]
    with pytest.MonkeyPatch.context() as patch:
        expected = twin(case)
        fault.break_it(patch)
        found = gaps(ours(case, random_batch(LENS)), expected)
    return max(gap / {"loss": row.loss, "grad": row.grad}[kind] for gap, kind in found.values())
