"""A run at the hub: its files are fetched into the hub's cache, where they are a run folder.

huggingface_hub is imported when something is to be fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from spt_ds.errors import ConfigError
from spt_ds.log import get_logger

# `org/name` or `name`, as the hub spells them.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# All that a run folder of somebody else may bring: tensors and plain text, nothing that runs.
FETCHED = ("*.safetensors", "*.json", "*.yaml", "*.md")
# What a configuration of somebody else does not decide.
OF_A_STRANGER = ("model.allow_pickle=false", "data.cache_dir=null")


def is_hub_id(name: str) -> bool:
    """Whether `org/name` is a run at the hub: a path that begins with a folder here is none."""
    org, slash, _ = name.partition("/")
    # `runs/NAME` is where training writes: a run that is not there is a mistake, no name to send.
    return bool(slash and HUB_ID.fullmatch(name)) and org != "runs" and not os.path.exists(org)


def fetched(name: str) -> Path:
    """Return the folder of the run `org/name`, downloaded if need be.

    Raises ConfigError where the hub has no such run, refuses it, or cannot be reached and the cache
    has no copy.
    """
    from huggingface_hub import snapshot_download

    get_logger().info(f"{name}: no folder here; looking at the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    # Beside its own errors the hub's client raises those of its HTTP library, which changed once.
    except Exception as error:
        raise ConfigError(
            f"{name}: there is no folder of this name, and the hub gave no run ({_reason(error)});"
            " give the folder of a run or the id of a public one, or log in with `hf auth login`"
        ) from error


def _reason(error: Exception) -> str:
    for cause in (error, error.__cause__):
        answer = getattr(getattr(cause, "response", None), "status_code", None)
        if answer is not None:
            return f"it answered {answer}"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "HF_HUB_OFFLINE is 1, and no copy was fetched before"
    return f"it cannot be reached, and no copy was fetched before: {type(error).__name__}"
