"""Reads a DeepSpeed JSON strictly: a key given twice or a number that JSON has not is an error."""

from __future__ import annotations

import json
from typing import Any

from spt_ds.errors import ConfigError
from spt_ds.shipped import ds_config_path


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Return the sections of a DeepSpeed file, given by its path or by the name of a shipped one.

    Raises ConfigError, with `file:line` where JSON is at fault.
    """
    try:
        text = ds_config_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the DeepSpeed file: {error.strerror}; give a JSON file, or the"
            " name of a shipped one, such as zero3"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON (column {error.colno}): {error.msg}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected an object of sections, got {type(tree).__name__}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"given twice in one object: {', '.join(map(repr, twice))}; keep one of them"
        )
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON and no setting takes it; give a number")
