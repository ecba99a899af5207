"""A micro-batch passes through few files: half as many stays as at 0.1.0."""

from __future__ import annotations

import pytest

from benchmarks.stays import batch_trace


@pytest.mark.parametrize(("placement", "before"), [("prefix", 28), ("suffix", 36)])
def test_a_micro_batch_stays_in_few_files(placement: str, before: int) -> None:
    trace = batch_trace(placement).summary()
    assert trace["stays"] <= before // 2
    assert trace["stays"] == trace["rooms"] + trace["returns"]
