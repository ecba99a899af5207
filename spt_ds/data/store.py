"""Encoded examples on disk: a memory-mapped Arrow table, cached by what it depends on.

n examples in a store. Nothing of size n is held in memory but two int32 arrays of lengths.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import (
    Encoded,
)
from spt_ds.data.mixture import Mixture
from spt_ds.data.sampler import window_indices
from spt_ds.errors import DataError
from spt_ds.json_input import read_json

TABLE, META = "examples.arrow", "store.json"
FEATURES = Features(
    {
        "id": Value("string"),
        "dialogue_id": Value("string"),
        "turn": Value("int32"),
        "persona": List(Value("string")),
        "history": List(Value("string")),
        "response": Value("string"),
        "choices": List(Value("string")),
        "context_ids": List(Value("int32")),
        "response_ids": List(Value("int32")),
        "choice_ids": List(List(Value("int32"))),
        "context_len": Value("int32"),
        "response_len": Value("int32"),
        "choice_len": Value("int32"),
        "dropped_turns": Value("int32"),
        "prompt_at": Value("int32"),
        "cut": Value("bool"),
    }
)


class Lengths(NamedTuple):
    """Tokens of each example, int32 [n] each."""

    context: np.ndarray
    response: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Context plus response, int32 [n]."""
        return self.context + self.response


class ExampleStore:
    """A built store, read-only: `store[i]` is row i with the columns of `FEATURES`."""

    def __init__(self, path: Path) -> None:
        """Open the folder `path`; DataError when it is not a whole store."""
        try:
            meta = read_json(path / META)
            data = Dataset.from_file(str(path / TABLE))
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
        self._open(data)

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
        whole._open(concatenate_datasets([store._data for store in stores]))
        sizes = [len(store) for store in stores]
        whole._starts = np.cumsum([0, *sizes[:-1]])
        whole.source = " + ".join(store.source for store in stores)
        whole.left_out = sum(store.left_out for store in stores)
        hashed = json.dumps([[store.data_hash for store in stores], list(weights)])
        whole.data_hash = hashlib.sha256(hashed.encode()).hexdigest()
        if weights:
            whole._mixture = Mixture.weighted(sizes, weights, name)
        return whole

    def _open(self, data: Dataset) -> None:
        self._data = data
        table = data.data
        self.lengths = Lengths(
            *(table.column(name).to_numpy() for name in ("context_len", "response_len"))
        )
        self.prompt_at = table.column("prompt_at").to_numpy()  # context tokens before the prompt
        dropped = table.column("dropped_turns").to_numpy()
        self.truncated = int((dropped > 0).sum())  # examples that lost turns
        self.choice_len = table.column("choice_len").to_numpy()  # of each example's longest answer
        self.cut = int(np.asarray(table.column("cut")).sum())  # whose persona or last turn was cut
        # Only these columns: a row of the whole table would bring its texts along for every batch.
        self._ids = data.select_columns(["context_ids", "response_ids"]).with_format("arrow")
        self._texts = data.select_columns(["persona", "history"])

    def window(self, global_batch: int, seed: int, step: int) -> np.ndarray:
        """Rows of the training window `step` (from 0), int64 [G]."""
        if self._mixture is not None:
            return self._mixture.window(global_batch, seed, step)
        return window_indices(len(self), global_batch, seed, step)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self._data[int(index)])
        if len(self._starts):
            # Files of two folders may be called the same, and ids begin with the file's name.
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            row |= {key: f"{number}/{row[key]}" for key in ("id", "dialogue_id")}
        return row

    def ids(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return context and response ids of the given examples, end to end in two int64 arrays."""
        # Flattened by Arrow: no list of Python numbers is made.
        rows = self._ids[list(indices)]
        flat = [
            rows.column(name).combine_chunks().flatten().to_numpy()
            for name in ("context_ids", "response_ids")
        ]
        return flat[0].astype(np.int64), flat[1].astype(np.int64)

    @property
    def most_choices(self) -> int:
        """Answers of the example that has the most to choose among."""
        return max(map(len, self._data["choices"]), default=0)

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
        rows = self._texts[list(indices)]
        personas = rows["persona"] if self.persona_shown else [[] for _ in indices]
        return list(zip(personas, rows["history"], strict=True))
