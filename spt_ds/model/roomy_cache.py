"""A cache of keys and values with free places, in which rows and tokens come and go.

`DynamicCache` copies all that it holds for each token, for each row that joins and for each that
leaves. Here a token is written behind the last column, new rows are written below the last row, and
the last rows move into the places of those that left. Every layer keeps all its tokens, those of a
sliding window too; the window is in the attention mask. Legend: R rows, H heads, L columns, E head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MORE_COLUMNS = 64  # room for so many tokens more, whenever the room is used up


class RoomyLayer(DynamicLayer):
    """Keys and values [R, H, L, E] of one layer: a view of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[torch.Tensor] = []
        self._rows, self._begin, self._end = 0, 0, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin with room for the states [R, H, n, E] of the first tokens, and no more."""
        super().lazy_initialization(key_states, value_states)
        self._rows = key_states.shape[0]
        self._stores = [states[:, :, :0] for states in (key_states, value_states)]
        self._move(self._rows, 0, key_states.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states [R, H, n, E] of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self._end + tokens > self._stores[0].shape[2]:
            columns = self._end - self._begin
            self._move(self._rows, columns, tokens + MORE_COLUMNS)
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[: self._rows, :, self._end : self._end + tokens] = states
        self._end += tokens
        return self._show()

    def add_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows [n, H, l, E] below the others; the last columns of all stand together."""
        rows, columns = self._rows + keys.shape[0], max(keys.shape[2], self._end - self._begin)
        room, _, end, _ = self._stores[0].shape
        if rows > room or columns > self._end:
            # Twice the rows: places that are asked for one by one must not copy one by one.
            self._move(rows if rows <= room else 2 * rows, columns, end - self._end)
        self._begin = self._end - columns
        for store, states in zip(self._stores, (keys, values), strict=True):
            store[self._rows : rows, :, self._end - states.shape[2] : self._end] = states
        self._rows = rows
        self._show()

    def keep(self, order: Sequence[int], unused: int) -> None:
        """Row i becomes what row order[i] was, and `unused` columns at the left go."""
        self._begin += unused
        moved = [(place, row) for place, row in enumerate(order) if place != row]
        self._rows = len(order)
        if moved:
            to, of = (
                torch.tensor(numbers, device=self.device) for numbers in zip(*moved, strict=True)
            )
            for store in self._stores:
                live = store[:, :, self._begin : self._end]
                live[to] = live[of]
        self._show()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; there may be more rows than before, or fewer."""
        self._rows = len(beam_idx)
        self._stores = [store.index_select(0, beam_idx) for store in self._stores]
        self._show()

    def _move(self, rows: int, before: int, behind: int) -> None:
        """Into larger tensors, with so many columns up to the last one and behind it."""
        columns = min(before, self._end - self._begin)
        for number, store in enumerate(self._stores):
            # Zeros: what a row does not reach is masked, but a NaN would pass the mask.
            larger = store.new_zeros(rows, store.shape[1], before + behind, store.shape[3])
            live = store[: self._rows, :, self._end - columns : self._end]
            larger[: self._rows, :, before - columns : before] = live
            self._stores[number] = larger
        self._begin, self._end = before - columns, before
        self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (store[: self._rows, :, self._begin : self._end] for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values


class RoomyCache(DynamicCache):
    """The layers of one model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer

    @property
    def _roomy(self) -> list[RoomyLayer]:
        layers: list[Any] = self.layers
        return layers

    def add_rows(self, read: DynamicCache) -> None:
        """Add the rows of another cache below those that are there."""
        for layer, states in zip(self._roomy, layers_of(read), strict=True):
            layer.add_rows(*states)

    def keep(self, order: Sequence[int], unused: int) -> None:
        """See `RoomyLayer.keep`."""
        for layer in self._roomy:
            layer.keep(order, unused)


def layers_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [R, H, L, E] of each layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
