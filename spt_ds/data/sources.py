"""Opens what `data.train`, `data.valid` and `data.test` name: one source, several, or a part.

What was tokenised once is kept, under a name that is a hash of all that the ids depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_ds.config.data import DataConfig, Format, Source, held_out
from spt_ds.data.dialogue import Example
from spt_ds.data.encode import (
    PLAIN,
    TEMPLATE_VERSION,
    ContextStyle,
    Encoded,
    Encoder,
    fingerprint,
)
from spt_ds.data.frames import template_text
from spt_ds.data.readers import NO_COLUMNS, Part, Split, digest, read
from spt_ds.data.store import META, TABLE, ExampleStore, write_table
from spt_ds.data.template import TemplateStyle
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.files import new_folder
from spt_ds.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAYOUT_VERSION = 7  # part of every cache key: raise it when columns or readers change


def open_sources(
    data: DataConfig,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    style: ContextStyle,
    reserved: int | None,
) -> ExampleStore:
    """Read and tokenise one split; see `build_store`."""
    sources, part = sources_of(data, split)
    stores = [
        build_store(
            source.path,
            tokenizer,
            max_tokens=data.max_tokens,
            format=source.format or data.format,
            columns=data.columns if source.columns is None else source.columns,
            part=part,
            max_examples=getattr(data, f"max_{split}_examples"),
            cache_dir=data.cache_dir,
            style=style,
            reserved=reserved,
            choices=data.choices if split == "test" else (),
        )
        for source in sources
    ]
    weights = [source.weight for source in sources if source.weight is not None]
    return ExampleStore.joined(stores, weights if split == "train" else (), f"data.{split}")


def sources_of(data: DataConfig, split: Split) -> tuple[tuple[Source, ...], Part | None]:
    """The sources of a split, and the part of them that it takes (None: all)."""
    given = getattr(data, split)
    valid, test = held_out(data.valid), held_out(data.test)
    part = None
    if valid + test and (split == "train" or held_out(given)):
        part, given = Part(split, valid, test, data.split_by, data.split_seed), data.train
    return (Source(path=given),) if isinstance(given, str) else given, part


def digests(data: DataConfig, split: Split) -> str:
    """The hashes of a split's sources, shortened."""
    sources = sources_of(data, split)[0]
    return " ".join(digest(each.path, each.format or data.format)[:16] for each in sources)


def build_store(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    format: Format = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    part: Part | None = None,
    max_examples: int = 0,
    cache_dir: str | None = None,
    style: ContextStyle = PLAIN,
    reserved: int | None = None,
    choices: tuple[str, ...] = (),
) -> ExampleStore:
    """Encode `source` (see `readers`), or open the store that an earlier run made of it.

    `part` takes a part of it (None: all), and `max_examples` the first of those (0: all); `style`
    is what the model sees beside the dialogue; `reserved` is what a context leaves for a reply that
    is to be generated, None: room for the example's own; `choices` are the answers to choose among
    of examples that list none. Several processes may build at once: each writes its own folder, the
    first to finish renames it into place, the others use that one. DataError from the readers, the
    encoder or the disk.
    """
    # All that the table's contents depend on: its hash is the name of the folder.
    parts = {
        "source_name": source.rpartition("/")[2],  # ids of examples carry it
        "source_sha256": digest(source, format),
        "format": format,
        "columns": dict(columns),
        "part": part and asdict(part),
        "max_examples": max_examples,
        "tokenizer_sha256": fingerprint(tokenizer),
        "max_tokens": max_tokens,
        "overflow": style.overflow,
        "persona": style.persona,
        "shots": style.shots,
        "reserved": reserved,
        "choices": choices,
        "template": [TEMPLATE_VERSION, *_style_parts(style.template, tokenizer)],
        "layout": _LAYOUT_VERSION,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_root(cache_dir) / "examples" / key[:32]
    # The description is written last, so where it is there the table is whole.
    if not (path / META).exists():
        started = time.monotonic()
        encoder = Encoder(tokenizer, max_tokens, style)
        every = part.of(source, format, columns) if part else read(source, format, columns)
        wanted = islice(_with_choices(every, choices, source), max_examples or None)
        try:
            _write(path, encoder, wanted, reserved, {"key": key, "source": source, **parts})
        except OSError as error:
            # Else another process was first, with the same data.
            if not (path / META).exists():
                raise _unwritable(path, error) from error
        seconds = time.monotonic() - started
        get_logger().info(f"tokenised {source} into {path} in {seconds:.1f} s")
    store = ExampleStore(path)
    _tell_what_was_cut(store, max_tokens, style)
    return store


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path.parent}: cannot write the tokenised data ({error}); set data.cache_dir"
    )


def _with_choices(
    examples: Iterable[Example], choices: tuple[str, ...], source: str
) -> Iterator[Example]:
    """Give the task's answers to examples that list none."""
    for example in examples:
        if not choices or example.choices:
            yield example
            continue
        if example.response not in choices:
            raise DataError(
                f"{source}: the answer of example {example.id} is {shown(example.response)}, which"
                f" is none of data.choices {shown(list(choices))}; add it there, or correct it"
            )
        yield replace(example, choices=choices)


def _tell_what_was_cut(store: ExampleStore, max_tokens: int, style: ContextStyle) -> None:
    total = len(store) + store.left_out
    fate = {
        "lost their oldest turns": store.truncated,
        f"had persona or last turn cut (data.overflow: {style.overflow})": store.cut,
        "were left out (data.overflow: drop)": store.left_out,
    }
    for words, count in fate.items():
        if count:
            get_logger().info(
                f"{store.source}: {count} of {total} examples {words} to fit data.max_tokens"
                f" {max_tokens}"
            )


def _style_parts(style: TemplateStyle, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What of a template the ids depend on."""
    text = style.source if style.source == "spt" else template_text(tokenizer, style)
    return [text, style.instructions, style.variables, style.position]


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of caches: `cache_dir`, else $SPT_CACHE, else ~/.cache/spt_ds."""
    return Path(cache_dir or os.environ.get("SPT_CACHE") or "~/.cache/spt_ds").expanduser()


def _write(
    path: Path,
    encoder: Encoder,
    examples: Iterable[Example],
    reserved: int | None,
    meta: dict[str, Any],
) -> None:
    """Write the table and, last, its description into the new folder `path`."""
    with new_folder(path) as folder:
        encoded = encoder.stream(examples, reserved)
        if not write_table(folder / TABLE, (_row(*each) for each in encoded)):
            raise DataError(
                f"{meta['source']}: none of its {encoder.left_out} examples fits into"
                f" data.max_tokens {encoder.max_tokens}; raise it, or set data.overflow to"
                " truncate or retrieve"
            )
        meta = {**meta, "left_out": encoder.left_out}
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _row(example: Example, encoded: Encoded) -> dict[str, Any]:
    # A persona that was cut is kept as the model is shown it: whole it may have megabytes, and all
    # the examples of its dialogue would.
    return {
        **vars(example),
        **vars(encoded),
        "context_len": len(encoded.context_ids),
        "response_len": len(encoded.response_ids),
        "choice_len": max(map(len, encoded.choice_ids), default=0),
    }
