"""spt_ds: distributed training toolkit for Selective Prompt Tuning.

Public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spt_ds.api import load
    from spt_ds.config.schema import Config
    from spt_ds.errors import SptError

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "spt_ds.config.schema",
    "SptError": "spt_ds.errors",
    "load": "spt_ds.api",
}
__all__ = ["Config", "SptError", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'spt_ds' has no attribute {name!r}")
