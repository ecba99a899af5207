"""Which weight of a model each tensor of a checkpoint is, by transformers' own table of renamings.

A base whose files lack a weight that its config.json describes, or hold one that it does not, is a
different model: transformers fills in random numbers, or drops what it was given, and lists it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from spt_ds.errors import ModelError
from spt_ds.model.base_files import Shapes

LISTED = 5  # names in a message
# Buffers that old checkpoints stored.
HARMLESS_EXTRA = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def model_names(lm: Any, keys: Iterable[str], path: str) -> dict[str, tuple[str, bool]]:
    """Map each stored key to the model's name and whether tensors must be merged or split for it.

    Raises ModelError for keys that are no part of the model; harmless buffers are left out.
    """
    expected = lm.state_dict()
    conversions = get_model_conversion_mapping(lm)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names, extra = {}, []
    for key in keys:
        name, converter = rename_source_key(
            key, renamings, converters, lm.base_model_prefix, expected
        )
        # A renaming meant for older files may also fit a key that has the model's own name already.
        if name not in expected and key in expected:
            name, converter = key, None
        if name in expected:
            names[key] = name, converter is not None
        else:
            extra.append(key)
    harmless = [*HARMLESS_EXTRA, *(lm._keys_to_ignore_on_load_unexpected or ())]
    extra = [key for key in extra if not any(re.search(pattern, key) for pattern in harmless)]
    if extra:
        raise ModelError(
            f"{path}: {len(extra)} tensors of the checkpoint are not part of {type(lm).__name__} as"
            f" its config.json describes it, the first {_listed(extra)}; configuration and weights"
            " belong to different models"
        )
    return names


def aliases(lm: Any) -> list[list[str]]:
    """The names of each parameter: tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def refuse_missing(lm: Any, missing: list[str], path: str) -> None:
    """Raise ModelError where weights of the model are not in its files."""
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights of {type(lm).__name__} are not in the checkpoint, the"
            f" first {_listed(missing)}; the files belong to another model, or a part of them is"
            " missing"
        )


def refuse_shape(path: str, key: str, got: Iterable[int], expected: Iterable[int]) -> None:
    """Raise ModelError where a tensor has another shape than its model asks for."""
    if list(got) != list(expected):
        raise ModelError(
            f"{path}: {key} has shape {list(got)}, its config.json asks for {list(expected)};"
            " configuration and weights belong to different models"
        )


def check_shapes(lm: Any, stored: Shapes, path: str) -> None:
    """Raise ModelError unless `stored` holds what `lm` needs, and nothing more.

    `lm` may be on the meta device. Tensors that transformers merges on loading, as the experts of
    some models, are looked for and not measured.
    """
    names = model_names(lm, stored, path)
    by_name = {name: key for key, (name, merged) in names.items() if not merged}
    merged = {name for name, merged in names.values() if merged}
    expected = lm.state_dict()
    ignored = lm._keys_to_ignore_on_load_missing or ()
    missing = []
    # Tied weights are stored once, under any of their names.
    for alias in aliases(lm):
        held = [name for name in alias if name in by_name or name in merged]
        if not held and not any(re.search(pattern, alias[0]) for pattern in ignored):
            missing.append(alias[0])
    refuse_missing(lm, missing, path)
    for name, key in by_name.items():
        refuse_shape(path, key, stored[key], expected[name].shape)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ("are " if len(names) > 1 else "is ") + ", ".join(names[:LISTED]) + rest
