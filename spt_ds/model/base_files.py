"""The files of a base, looked at before transformers reads them: plain data of a plausible size.

A base may come from anyone. What is refused here never gets as far as a parser that runs code, a
module list of a billion layers or a path outside the base's folder. Nothing here builds a model or
takes memory for a weight.
"""

from __future__ import annotations

import difflib
import os
import re
import struct
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from spt_ds.display import shortened, shown
from spt_ds.errors import ModelError
from spt_ds.json_input import read_json
from spt_ds.log import say_once

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# Keys by which a config.json would have transformers load another file than those checked here.
REDIRECTS = ("transformers_weights", "fusion_config", "distributed_config")
# Sizes that cannot be left out, by their names in the families that have been run, and the largest
# that is plausible: twenty times that of the largest model there is.
_COUNTS = {
    re.compile(r"^(num_hidden_layers|num_layers|n_layers?)$"): 4096,
    re.compile(r"^(num_attention_heads|num_key_value_heads|n_heads?)$"): 1 << 16,
    re.compile(r"^(hidden_size|d_model|n_embd|intermediate_size|ffn_dim|head_dim)$"): 1 << 22,
    re.compile(r"^vocab_size$"): 1 << 26,
    re.compile(r"^(num_experts|num_local_experts|n_routed_experts)$"): 1 << 14,
    re.compile(r"^(max_position_embeddings|n_positions)$"): 1 << 30,
}
_STATE_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors$")
MAX_SIZE = 1 << 34  # of any other whole number in config.json

Shapes = dict[str, tuple[int, ...]]


def base_path(name: str) -> str:
    """Return the folder or hub id of `model.base`; `embedded` is the base that is shipped."""
    if name == "embedded":
        return str(resources.files("spt_ds") / "assets" / "base")
    # A hub id has one slash at most, as in `org/name`.
    looks_local = name.startswith((".", os.sep)) or name.count("/") > 1
    if os.sep in name and looks_local and not os.path.exists(name):
        raise ModelError(
            f"model.base: no folder {name}; give a folder with config.json and weights, or a hub id"
        )
    return name


def check_settings(path: str, revision: str | None, *, needed: bool = True) -> None:
    """Raise ModelError for a config.json that is not to be loaded, or is `needed` and missing."""
    settings = _read_settings(path, revision, CONFIG)
    if settings is None:
        if not needed:
            return
        raise ModelError(
            f"model.base: no configuration can be read from {path}: it has no {CONFIG}"
        )
    _check_type(path, settings)
    redirects = [key for key in REDIRECTS if settings.get(key) is not None]
    if redirects:
        raise ModelError(
            f"model.base: {CONFIG} of {path} has {redirects[0]}, which names files outside a base's"
            " own; remove the key and store the weights as model.safetensors"
        )
    # transformers would follow it to the base that the adapter names, which was not checked.
    if _file(path, revision, "adapter_config.json") is not None:
        raise ModelError(
            f"model.base: {path} holds an adapter (adapter_config.json), not a base; merge it into"
            " its base and give the result"
        )
    _check_sizes(path, settings)


def check_tokenizer_settings(path: str, revision: str | None) -> None:
    """Raise ModelError for a tokenizer's settings that are no JSON object or name a file elsewhere.

    transformers passes them on as arguments, some of which are names of files to be read.
    """
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        settings = _read_settings(path, revision, name)
        if settings is None:
            continue
        if "auto_map" in settings:
            _tell_own_code(path, name)
        for key, value in _leaves(settings):
            if isinstance(value, str) and os.path.isfile(value):
                raise ModelError(
                    f"model.base: {name} of {path}: {shown(key)} names the file {shown(value)};"
                    " a base's settings name no files: remove the key"
                )
        longest = settings.get("model_max_length")
        if isinstance(longest, bool) or not isinstance(longest, (int, float, type(None))):
            raise ModelError(
                f"model.base: {name} of {path}: model_max_length is {shown(longest)}; it must be a"
                " number of tokens, or left out"
            )


def _tell_own_code(path: str, name: str) -> None:
    say_once(f"{path}: {name} names Python code of its own (auto_map); it is not run")


def _read_settings(path: str, revision: str | None, name: str) -> dict[str, Any] | None:
    file = _file(path, revision, name)
    if file is None:
        return None
    try:
        settings = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: no configuration can be read from {path}: {name} is damaged ({error})"
        ) from error
    if not isinstance(settings, dict):
        raise ModelError(
            f"model.base: no configuration can be read from {path}: {name} holds a"
            f" {type(settings).__name__}, expected a JSON object"
        )
    return settings


def _file(path: str, revision: str | None, name: str) -> Path | None:
    """A file of a folder or hub id, downloaded if need be; None where it has none."""
    try:
        file = cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.base: no configuration can be read from {path}: {reason}"
        ) from error
    return None if file is None else Path(file)


def _check_type(path: str, settings: dict[str, Any]) -> None:
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if "auto_map" in settings:
            _tell_own_code(path, CONFIG)
        return
    near = difflib.get_close_matches(str(kind)[:100], list(CONFIG_MAPPING), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if "auto_map" in settings:
        hint = "; it brings Python code of its own (auto_map), which is never run"
    raise ModelError(
        f"model.base: no configuration can be read from {path}: model_type {shown(kind)} is none"
        f" that the installed transformers knows{hint}"
    )


def _check_sizes(path: str, settings: dict[str, Any]) -> None:
    for key, value in _leaves(settings):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        name = key.rpartition(".")[2]
        most = next((most for names, most in _COUNTS.items() if names.match(name)), None)
        least = -MAX_SIZE if most is None else 1
        if not least <= value <= (most or MAX_SIZE):
            raise ModelError(
                f"model.base: {CONFIG} of {path}: {shortened(key)} is {shown(value)}, expected a"
                f" whole number from {least} to {most or MAX_SIZE}"
            )


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree that is neither an object nor a list."""
    todo: list[tuple[str, Any]] = list(tree.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            todo += [(key, inner) for inner in value]
        else:
            yield key, value


def weight_files(path: str, revision: str | None, *, pickled: bool) -> list[str]:
    """Paths of the weight files of a folder or hub id, downloaded if need be.

    Only safetensors files, which hold nothing but numbers; others where `pickled` ones may be read.
    Raises ModelError for a base without any and for an index that names files elsewhere.
    """
    if os.path.isdir(path) and any(map(_STATE_SHARD.match, os.listdir(path))):
        # transformers would take these, and a pickle beside them, before any other file.
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: it holds shards of a training state"
            " (shard-...); store the weights as model.safetensors"
        )
    # In this order, so that a pickle is read only where a base has no safetensors file.
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if pickled:
        names += [WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    for name in names:
        file = _file(path, revision, name)
        if file is None:
            continue
        if name not in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            return [str(file)]
        shards = _index(path, file, name.removesuffix(".index.json").rpartition(".")[2])
        return [_shard(path, revision, shard) for shard in shards]
    problem = f"it has neither {SAFE_WEIGHTS_NAME} nor an index of several such files"
    if pickled:
        problem = f"it has neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, nor an index of several"
    elif any(_file(path, revision, name) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        problem = (
            f"it has only pickled weights ({WEIGHTS_NAME}); convert them to safetensors, or set"
            " model.allow_pickle: true for a base that you trust"
        )
    raise ModelError(f"model.base: no weights can be loaded from {path}: {problem}")


def _shard(path: str, revision: str | None, name: str) -> str:
    file = _file(path, revision, name)
    if file is None:
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: its index names {shown(name)},"
            " which is not there"
        )
    return str(file)


def _index(path: str, file: Path, suffix: str) -> list[str]:
    """The files that an index names, each of which must lie in the base's folder."""
    try:
        tree = read_json(file)
        dict(tree["metadata"])  # transformers reads it
        names = sorted(set(dict(tree["weight_map"]).values()))
        wrong = [
            name
            for name in names
            if PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
            or "\\" in name
            or not name.endswith(f".{suffix}")
        ]
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: {file.name} is damaged"
            f" ({shown(error)})"
        ) from error
    if wrong:
        raise ModelError(
            f"model.base: {file.name} of {path} names {shown(wrong[0])}; its files are .{suffix}"
            " files inside the folder"
        )
    return names


def stored_shapes(path: str, files: list[str]) -> Shapes:
    """Name and shape of each tensor in the weight files; ModelError for a damaged file.

    Only headers are read: of a safetensors file its first bytes, of a pickled one its structure.
    """
    shapes: Shapes = {}
    for file in files:
        try:
            shapes |= _shapes(file)
        except (OSError, SafetensorError, ValueError, *_PICKLE_FAULTS) as error:
            reason = str(error).strip().partition("\n")[0]
            if isinstance(error, UnpicklingError):
                reason = "a pickle of something else than tensors; it was not run"
            raise ModelError(
                f"model.base: no weights can be loaded from {path}: {Path(file).name} is damaged"
                f" ({reason})"
            ) from error
    return shapes


# What `torch.load` raises over bytes that are no checkpoint.
_PICKLE_FAULTS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    struct.error,
)


def _shapes(file: str) -> Shapes:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as handle:
            keys = list(handle.keys())
            return {key: tuple(handle.get_slice(key).get_shape()) for key in keys}
    # On the meta device a tensor has a shape and no numbers, however large it is.
    tensors = torch.load(file, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
