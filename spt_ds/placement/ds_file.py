"""Reads a DeepSpeed JSON strictly: a key given twice or a number that JSON has not is an error."""

from __future__ import annotations

import json
from typing import Any

from spt_ds.errors import ConfigError
from spt_ds.json_input import load_json
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
        tree = load_json(text, finite=True)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON (column {error.colno}): {error.msg}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected an object of sections, got {type(tree).__name__}")
    return tree
