"""Encoded examples on disk: a memory-mapped Arrow table, cached by what it depends on.

n examples in a store. Nothing of size n is held in memory but two int32 arrays of lengths.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import (
    Encoded,
)
from spt_ds.data.mixture import Mixture
from spt_ds.data.sampler import window_indices
from spt_ds.errors import DataError
from spt_ds.json_input import read_json

TABLE, META = "examples.arrow", "store.json"
ROWS = 1000  # of one record batch: the least that Arrow reads a row from
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "dialogue_id": pa.string(),
        "turn": pa.int32(),
        "persona": pa.list_(pa.string()),
        "history": pa.list_(pa.string()),
        "response": pa.string(),
        "choices": pa.list_(pa.string()),
        "context_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "choice_ids": pa.list_(pa.list_(pa.int32())),
        "context_len": pa.int32(),
        "response_len": pa.int32(),
        "choice_len": pa.int32(),
        "dropped_turns": pa.int32(),
        "prompt_at": pa.int32(),
        "cut": pa.bool_(),
    }
)


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows with the columns of `SCHEMA` as they come; return how many there were."""
    count, coming = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        while some := list(islice(coming, ROWS)):
            stream.write_batch(pa.RecordBatch.from_pylist(some, schema=SCHEMA))
            count += len(some)
    return count


class Lengths(NamedTuple):
    """Tokens of each example, int32 [n] each."""

    context: np.ndarray
    response: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Context plus response, int32 [n]."""
        return self.context + self.response


class ExampleStore:
    """A built store, read-only: `store[i]` is row i with the columns of `SCHEMA`."""

    def __init__(self, path: Path) -> None:
        """Open the folder `path`; DataError when it is not a whole store."""
        try:
            meta = read_json(path / META)
            batches = _mapped(path / TABLE)
            self.data_hash: str = meta["key"]
            self.source: str = meta["source"]
            self.persona_shown: bool = meta["persona"]
            self.left_out = int(meta["left_out"])  # examples that data.overflow dropped
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable store of examples ({error}); remove the folder and run"
                " again"
            ) from error
        self.path = path
        self._mixture: Mixture | None = None
        self._starts = np.zeros(0, dtype=np.int64)  # first rows of several sources
        self._open([path / TABLE], batches)

    @classmethod
    def joined(
        cls, stores: Sequence[ExampleStore], weights: Sequence[float], name: str
    ) -> ExampleStore:
        """Several stores as one, end to end; without `weights` all examples come equally often.

        `name` is the option that has the sources, for errors.
        """
        if len(stores) == 1:
            return stores[0]
        whole = copy.copy(stores[0])
        whole._open(
            [file for store in stores for file in store._files],
            [batch for store in stores for batch in store._batches],
        )
        sizes = [len(store) for store in stores]
        whole._starts = np.cumsum([0, *sizes[:-1]])
        whole.source = " + ".join(store.source for store in stores)
        whole.left_out = sum(store.left_out for store in stores)
        hashed = json.dumps([[store.data_hash for store in stores], list(weights)])
        whole.data_hash = hashlib.sha256(hashed.encode()).hexdigest()
        if weights:
            whole._mixture = Mixture.weighted(sizes, weights, name)
        return whole

    def _open(self, files: list[Path], batches: list[pa.RecordBatch]) -> None:
        self._files, self._batches = files, batches
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        table = pa.Table.from_batches(batches, SCHEMA)
        self.lengths = Lengths(
            *(table.column(name).to_numpy() for name in ("context_len", "response_len"))
        )
        self.prompt_at = table.column("prompt_at").to_numpy()  # context tokens before the prompt
        dropped = table.column("dropped_turns").to_numpy()
        self.truncated = int((dropped > 0).sum())  # examples that lost turns
        self.choice_len = table.column("choice_len").to_numpy()  # of each example's longest answer
        self.cut = int(np.asarray(table.column("cut")).sum())  # whose persona or last turn was cut

    def __getstate__(self) -> dict[str, Any]:
        # A process that is spawned maps the files itself: pickled, a store would carry its texts.
        return {key: value for key, value in vars(self).items() if key != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._batches = [batch for file in self._files for batch in _mapped(file)]

    def _rows(self, indices: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Some columns of the given examples, in their order."""
        if not len(indices):
            return SCHEMA.empty_table().select(columns)
        taken = []
        for index, number in zip(indices, self._ends.searchsorted(indices, "right"), strict=True):
            batch = self._batches[number]
            offset = int(index) - int(self._ends[number]) + batch.num_rows
            # Slices of the mapped file: Arrow's own `take` would first join all batches in memory.
            taken.append(batch.select(columns).slice(offset, 1))
        return pa.Table.from_batches(taken)

    def window(self, global_batch: int, seed: int, step: int) -> np.ndarray:
        """Rows of the training window `step` (from 0), int64 [G]."""
        if self._mixture is not None:
            return self._mixture.window(global_batch, seed, step)
        return window_indices(len(self), global_batch, seed, step)

    def __len__(self) -> int:
        return len(self.prompt_at)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)}")
        row: dict[str, Any] = self._rows([index], SCHEMA.names).to_pylist()[0]
        if len(self._starts):
            # Files of two folders may be called the same, and ids begin with the file's name.
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            row |= {key: f"{number}/{row[key]}" for key in ("id", "dialogue_id")}
        return row

    def ids(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return context and response ids of the given examples, end to end in two int64 arrays."""
        # Flattened by Arrow: no list of Python numbers is made.
        rows = self._rows(indices, ("context_ids", "response_ids"))
        context, response = (
            column.combine_chunks().flatten().to_numpy().astype(np.int64) for column in rows.columns
        )
        return context, response

    @property
    def most_choices(self) -> int:
        """Answers of the example that has the most to choose among."""
        counts = (np.diff(batch.column("choices").offsets.to_numpy()) for batch in self._batches)
        return int(max(chain.from_iterable(counts), default=0))

    def example(self, index: int) -> Example:
        """Return the texts of an example."""
        row = self[index]
        texts = tuple(row["persona"]), tuple(row["history"]), row["response"], tuple(row["choices"])
        return Example(row["id"], row["dialogue_id"], row["turn"], *texts)

    def encoded(self, index: int) -> Encoded:
        """Return the ids of an example."""
        context, response = self.ids([index])
        return Encoded(context.tolist(), response.tolist(), 0, int(self.prompt_at[index]))

    def texts(self, indices: Sequence[int]) -> list[tuple[list[str], list[str]]]:
        """Return (persona, history) of each given example as the model is shown them."""
        rows = self._rows(indices, ("persona", "history")).to_pydict()
        personas = rows["persona"] if self.persona_shown else [[] for _ in indices]
        return list(zip(personas, rows["history"], strict=True))


def _mapped(path: Path) -> list[pa.RecordBatch]:
    """The batches of a table in memory that the system fills from the file where it is read."""
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
        # An older store may hold the schema of `datasets` beside the columns.
        return [batch.replace_schema_metadata(None) for batch in stream]
