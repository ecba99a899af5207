"""Which examples a step reads, and which rank reads which: properties over all shapes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spt_ds.data.sampler import MicroSize, Slot, assign, total_steps, window_indices

shapes = st.tuples(
    st.integers(1, 40), st.integers(1, 50), st.integers(0, 3)
)  # examples, window, seed
deals = st.tuples(
    st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 9)
)


ZEROS = np.zeros(60, dtype=np.int64)


def flat(dealt: list[list[list[Slot]]]) -> list[Slot]:
    return [slot for rank in dealt for micro in rank for slot in micro]


@given(shapes)
def test_fault_12_every_example_exactly_once_per_epoch_and_every_window_full(
    shape: tuple[int, int, int],
) -> None:
    examples, window, seed = shape
    steps = total_steps(examples, window, epochs=3)
    windows = [window_indices(examples, window, seed, step) for step in range(steps)]
    assert all(len(indices) == window for indices in windows)
    stream = np.concatenate(windows)
    assert len(stream) - window < 3 * examples <= len(stream)
    for epoch in range(3):
        assert sorted(stream[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_order_is_fixed_over_versions_and_differs_by_epoch_and_seed() -> None:
    # Written down once: a change here would reorder the data of every run that is resumed.
    assert window_indices(10, 10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    orders = {tuple(window_indices(50, 50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_window_is_the_same_whatever_was_asked_before() -> None:
    late = window_indices(7, 4, 5, 100)
    for step in range(20):
        window_indices(7, 4, 5, step)
    assert window_indices(7, 4, 5, 100).tolist() == late.tolist()


@given(deals)
def test_fault_12_each_window_position_is_dealt_once_and_ranks_keep_step(
    deal: tuple[list[int], int, int],
) -> None:
    lengths, world, micro_batch = deal
    indices = np.arange(len(lengths)) + 100
    dealt = assign(indices, np.array(lengths), ZEROS[: len(lengths)], world, MicroSize(micro_batch))
    assert len(dealt) == world
    assert len({tuple(len(micro) for micro in rank) for rank in dealt}) == 1
    assert all(1 <= len(micro) <= micro_batch for micro in dealt[0])
    real = [slot for slot in flat(dealt) if slot.weight]
    assert sorted(slot.position for slot in real) == list(range(len(lengths)))
    assert all(slot.weight == 1.0 and slot.row == indices[slot.position] for slot in real)
    fillers = [slot for slot in flat(dealt) if not slot.weight]
    assert len(fillers) == -len(lengths) % world
    assert all(slot.position == -1 and lengths[slot.row - 100] == min(lengths) for slot in fillers)


@given(deals)
def test_ranks_have_like_token_counts_in_every_micro_step(deal: tuple[list[int], int, int]) -> None:
    """In a snake the sums of two ranks differ by at most the spread of that micro-step's rows."""
    lengths, world, micro_batch = deal
    micro = MicroSize(micro_batch)
    dealt = assign(np.arange(len(lengths)), np.array(lengths), ZEROS[: len(lengths)], world, micro)
    longest_after = 10**9
    for micros in zip(*dealt, strict=True):
        sums = [sum(lengths[slot.row] for slot in micro) for micro in micros]
        rows = [lengths[slot.row] for micro in micros for slot in micro]
        assert max(sums) - min(sums) <= max(rows) - min(rows)
        assert max(rows) <= longest_after  # longest first, like lengths together
        longest_after = min(rows)


def test_deal_of_a_known_case() -> None:
    lengths = np.array([10, 50, 20, 40, 30])
    dealt = assign(np.arange(5), lengths, ZEROS[:5], 2, MicroSize(2))
    rows = [[[(slot.row, slot.weight) for slot in micro] for micro in rank] for rank in dealt]
    assert rows == [[[(1, 1.0)], [(2, 1.0), (0, 1.0)]], [[(3, 1.0)], [(4, 1.0), (0, 0.0)]]]


@given(deals, st.integers(1, 4000), st.booleans())
def test_a_budget_of_tokens_is_kept_on_every_rank(
    deal: tuple[list[int], int, int], budget: int, suffix: bool
) -> None:
    """A micro-batch above it has one example; one more example would not have fitted."""
    lengths, world, replies = deal
    context, response = np.array(lengths), np.full(len(lengths), replies)
    micro = MicroSize(1, budget, prompts=4, virtual=2, suffix=suffix)
    costs = [
        4 * (2 + replies) + (length if suffix else 4 * length) for length in lengths
    ]  # by hand
    dealt = assign(np.arange(len(lengths)), context, response, world, micro)
    assert sorted(slot.position for slot in flat(dealt) if slot.weight) == list(range(len(lengths)))
    assert len({tuple(map(len, rank)) for rank in dealt}) == 1
    for rank in dealt:
        for slots in rank:
            assert len(slots) == 1 or sum(costs[slot.row] for slot in slots) <= budget
    for first, second in pairwise(zip(*dealt, strict=True)):
        dearest = [max(costs[slot.row] for slot in row) for row in zip(*first, strict=True)]
        following = max(costs[slots[0].row] for slots in second)
        assert sum(dearest) + following > budget


def test_tokens_decide_instead_of_examples() -> None:
    lengths, replies = np.array([10, 50, 20, 40, 30]), np.full(5, 5)
    micro = MicroSize(2, 2 * 95, prompts=2)
    dealt = assign(np.arange(5), lengths, replies, 1, micro)
    assert [[slot.row for slot in slots] for slots in dealt[0]] == [[1], [3, 4], [2, 0]]
