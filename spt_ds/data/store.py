"""Encoded examples on disk: a memory-mapped Arrow table, cached by what it depends on.

n examples in a store. Nothing of size n is held in memory but two int32 arrays of lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import (
    PLAIN,
    TEMPLATE_VERSION,
    ContextStyle,
    Encoded,
    encode_many,
    fingerprint,
)
from spt_ds.data.frames import template_text
from spt_ds.data.readers import Format, digest, read
from spt_ds.data.template import TemplateStyle
from spt_ds.errors import DataError
from spt_ds.files import new_folder
from spt_ds.json_input import read_json
from spt_ds.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TABLE, _META = "examples.arrow", "store.json"
_LAYOUT_VERSION = 5  # part of every cache key: raise it when columns or readers change
_FEATURES = Features(
    {
        "id": Value("string"),
        "dialogue_id": Value("string"),
        "turn": Value("int32"),
        "persona": List(Value("string")),
        "history": List(Value("string")),
        "response": Value("string"),
        "context_ids": List(Value("int32")),
        "response_ids": List(Value("int32")),
        "context_len": Value("int32"),
        "response_len": Value("int32"),
        "dropped_turns": Value("int32"),
        "prompt_at": Value("int32"),
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
    """A built store, read-only: `store[i]` is row i with the columns of `_FEATURES`."""

    def __init__(self, path: Path) -> None:
        """Open the folder `path`; DataError when it is not a whole store."""
        try:
            meta = read_json(path / _META)
            self._data = Dataset.from_file(str(path / _TABLE))
            self.data_hash: str = meta["key"]
            self.source: str = meta["source"]
            self.persona_shown: bool = meta["persona"]
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable store of examples ({error}); remove the folder and run"
                " again"
            ) from error
        self.path = path
        table = self._data.data
        self.lengths = Lengths(
            *(table.column(name).to_numpy() for name in ("context_len", "response_len"))
        )
        self.prompt_at = table.column("prompt_at").to_numpy()  # context tokens before the prompt
        dropped = table.column("dropped_turns").to_numpy()
        self.truncated = int((dropped > 0).sum())  # examples that lost turns
        self._ids = self._data.select_columns(["context_ids", "response_ids"]).with_format("arrow")
        self._texts = self._data.select_columns(["persona", "history"])

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._data[int(index)])

    def ids(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return context and response ids of the given examples, end to end in two int64 arrays."""
        # Flattened by Arrow: no list of Python numbers is made.
        rows = self._ids[list(indices)]
        flat = [
            rows.column(name).combine_chunks().flatten().to_numpy()
            for name in ("context_ids", "response_ids")
        ]
        return flat[0].astype(np.int64), flat[1].astype(np.int64)

    def texts(self, indices: Sequence[int]) -> list[tuple[list[str], list[str]]]:
        """Return (persona, history) of each given example as the model is shown them."""
        rows = self._texts[list(indices)]
        personas = rows["persona"] if self.persona_shown else [[] for _ in indices]
        return list(zip(personas, rows["history"], strict=True))


def build_store(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    format: Format = "auto",
    max_examples: int = 0,
    cache_dir: str | None = None,
    style: ContextStyle = PLAIN,
    reserved: int | None = None,
) -> ExampleStore:
    """Encode `source` (see `readers`), or open the store that an earlier run made of it.

    `max_examples` 0 takes all; `style` is what the model sees beside the dialogue; `reserved` is
    what a context leaves for a reply that is to be generated, None: room for the example's own.
    Several processes may build at once: each writes its own folder, the first to finish renames it
    into place, the others use that one. DataError from the readers, the encoder or the disk.
    """
    # All that the table's contents depend on: its hash is the name of the folder.
    parts = {
        "source_name": source.rpartition("/")[2],  # ids of examples carry it
        "source_sha256": digest(source),
        "format": format,
        "max_examples": max_examples,
        "tokenizer_sha256": fingerprint(tokenizer),
        "max_tokens": max_tokens,
        "persona": style.persona,
        "shots": style.shots,
        "reserved": reserved,
        "template": [TEMPLATE_VERSION, *_style_parts(style.template, tokenizer)],
        "layout": _LAYOUT_VERSION,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_root(cache_dir) / "examples" / key[:32]
    if not (path / _META).exists():
        started = time.monotonic()
        examples = islice(read(source, format), max_examples or None)
        try:
            pairs = encode_many(examples, tokenizer, max_tokens, style, reserved)
            _write(path, pairs, {"key": key, "source": source, **parts})
        except OSError as error:
            if not (path / _META).exists():  # else another process was first, with the same data
                raise DataError(
                    f"{path.parent}: cannot write the tokenised data ({error}); set data.cache_dir"
                ) from error
        seconds = time.monotonic() - started
        get_logger().info(f"tokenised {source} into {path} in {seconds:.1f} s")
    store = ExampleStore(path)
    if store.truncated:
        get_logger().info(
            f"{source}: {store.truncated} of {len(store)} examples lost their oldest turns to fit"
            f" data.max_tokens {max_tokens}"
        )
    return store


def _style_parts(style: TemplateStyle, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What of a template the ids depend on."""
    text = style.source if style.source == "spt" else template_text(tokenizer, style)
    return [text, style.instructions, style.variables, style.position]


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of caches: `cache_dir`, else $SPT_CACHE, else ~/.cache/spt_ds."""
    return Path(cache_dir or os.environ.get("SPT_CACHE") or "~/.cache/spt_ds").expanduser()


def _write(path: Path, pairs: Iterator[tuple[Example, Encoded]], meta: dict[str, Any]) -> None:
    """Write the table and, last, its description into the new folder `path`."""
    with new_folder(path) as folder:
        with ArrowWriter(path=str(folder / _TABLE), features=_FEATURES) as writer:
            for example, encoded in pairs:
                context, response = len(encoded.context_ids), len(encoded.response_ids)
                writer.write(
                    {
                        **vars(example),
                        **vars(encoded),
                        "context_len": context,
                        "response_len": response,
                    }
                )
            writer.finalize()
        (folder / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
