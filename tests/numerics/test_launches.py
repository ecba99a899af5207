"""A layer dispatches a fixed number of operations, however many examples a micro-batch has."""

from __future__ import annotations

import pytest

from benchmarks.launches import (
    MOST_A_LAYER,
    attention_of_graph,
    fused,
    per_layer,
    per_layer_of_token,
)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_launches_do_not_grow_with_the_examples(placement: str) -> None:
    few, many = (per_layer("varlen", placement, examples) for examples in (2, 16))
    assert few == many <= MOST_A_LAYER


def test_the_count_sees_a_loop_over_rows() -> None:
    """Row by row, as on a CPU."""
    few, many = (per_layer("sdpa", "suffix", examples) for examples in (2, 4))
    assert few < many


def test_a_token_takes_as_many_for_any_number_of_replies() -> None:
    few, many = (per_layer_of_token(rows) for rows in (2, 16))
    assert few == many <= 50


@pytest.mark.slow
def test_a_compiled_layer_takes_less_than_half_of_them() -> None:
    few, many = (attention_of_graph(examples).total() for examples in (2, 16))
    assert few == many
    assert fused() + many < per_layer("varlen", "prefix", 2) / 2
