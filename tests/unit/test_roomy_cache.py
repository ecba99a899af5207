"""The cache with room holds what one that copies everything would, and copies little."""

from __future__ import annotations

import random

import pytest
import torch

from spt_ds.model.roomy_cache import MORE_COLUMNS, RoomyCache, layers_of
from spt_ds.model.running import _refilled

HEADS, SIZE, LAYERS = 2, 3, 2


def states(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, columns, SIZE)


def read(rows: int, columns: int) -> RoomyCache:
    """What reading so many beginnings gives."""
    cache = RoomyCache()
    for layer in range(LAYERS):
        cache.update(states(rows, columns), states(rows, columns), layer)
    return cache


class Twin:
    """Every row apart: a list of [H, l, E] for each layer, keys and values."""

    def __init__(self) -> None:
        self.rows: list[list[torch.Tensor]] = []

    def add(self, cache: RoomyCache) -> None:
        tensors = [t for states in layers_of(cache) for t in states]
        self.rows += [[t[row] for t in tensors] for row in range(len(tensors[0]))]

    def token(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        new = [t for layer in layers for t in layer]
        self.rows = [
            [torch.cat([t, more[number]], dim=1) for t, more in zip(row, new, strict=True)]
            for number, row in enumerate(self.rows)
        ]

    def check(self, cache: RoomyCache) -> None:
        shown = [t for states in layers_of(cache) for t in states]
        for number, row in enumerate(self.rows):
            for own, t in zip(row, shown, strict=True):
                assert torch.equal(t[number, :, t.shape[2] - own.shape[1] :], own)
        assert all(torch.isfinite(t).all() for t in shown)
        longest = max(row[0].shape[1] for row in self.rows)
        assert {t.shape[2] for t in shown} == {longest}
        assert {len(t) for t in shown} == {len(self.rows)}


@pytest.mark.parametrize("seed", range(6))
def test_rows_and_tokens_come_and_go(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    cache, twin = read(3, 5), Twin()
    twin.add(cache)
    for _ in range(300):
        count = len(twin.rows)
        act = draw.choice(("token", "token", "token", "join", "leave", "reorder"))
        if act == "token":
            new = [(states(count, 1), states(count, 1)) for _ in range(LAYERS)]
            for layer, (keys, values) in enumerate(new):
                cache.update(keys, values, layer)
            twin.token(new)
        elif act == "join" and count < 9:
            joined = read(draw.randint(1, 3), draw.choice((1, 8, 90)))
            cache.add_rows(joined)
            twin.add(joined)
        elif act == "leave" and count > 2:
            kept = sorted(draw.sample(range(count), draw.randint(1, count - 1)))
            order = _refilled(kept)
            longest = max(row[0].shape[1] for row in twin.rows)
            twin.rows = [twin.rows[number] for number in order]
            cache.keep(order, longest - max(row[0].shape[1] for row in twin.rows))
        elif act == "reorder":
            longest_first = sorted(range(count), key=lambda row: -len(twin.rows[row][0][0]))
            order = [longest_first[0], *draw.choices(range(count), k=min(count, 5))]
            twin.rows = [twin.rows[number] for number in order]
            cache.reorder_cache(torch.LongTensor(order))
        twin.check(cache)


def test_a_token_copies_nothing_that_is_there() -> None:
    cache = read(4, 10)
    places = set()
    for _ in range(3 * MORE_COLUMNS):
        cache.update(states(4, 1), states(4, 1), 0)
        places.add(layers_of(cache)[0][0].data_ptr())
    assert len(places) == 3  # new tensors once for each MORE_COLUMNS tokens


def test_room_that_is_no_longer_needed_is_given_back() -> None:
    cache = read(64, 300)
    cache.keep([0], unused=290)
    for _ in range(MORE_COLUMNS + 1):
        cache.update(states(1, 1), states(1, 1), 0)
    bytes_held = layers_of(cache)[0][0].untyped_storage().nbytes()
    assert bytes_held < 4 * HEADS * SIZE * (10 + 3 * MORE_COLUMNS)


@pytest.mark.parametrize(
    ("kept", "order"),
    [((0, 1, 2), [0, 1, 2]), ((0, 3), [0, 3]), ((2, 5, 6), [5, 6, 2]), ((4,), [4]), ((), [])],
)
def test_the_last_rows_take_the_places_of_those_that_left(
    kept: tuple[int, ...], order: list[int]
) -> None:
    assert _refilled(kept) == order
