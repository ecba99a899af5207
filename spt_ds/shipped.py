"""The DeepSpeed files and Slurm scripts that come with the package, wherever it was installed."""

from __future__ import annotations

import difflib
from pathlib import Path

from spt_ds.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the folder `ds_configs` or `slurm`.

    A wheel carries them inside the package (setup.py copies them); in a checkout, and so in an
    editable installation, they stand beside it.
    """
    for path in (_PACKAGE / "_shipped" / name, _PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise ConfigError(
        f"{_PACKAGE}: {name}/ is not there; install spt-ds again, or use its checkout"
    )


def ds_config_path(source: str) -> Path:
    """Return the DeepSpeed file that `source` is the path of, or the name of, as `zero3`.

    Raises ConfigError where a word is neither. A path is returned as it is, also when there is no
    such file.
    """
    path = Path(source)
    if path.suffix or path.name != source or path.exists():
        return path
    shipped = {file.stem: file for file in sorted(folder("ds_configs").glob("*.json"))}
    if source not in shipped:
        near = difflib.get_close_matches(source, shipped, 1)
        hint = f"did you mean {near[0]!r}?" if near else "give a JSON file or a name"
        raise ConfigError(
            f"--deepspeed_config {source}: no file and no shipped DeepSpeed file is called so;"
            f" {hint} (shipped: {', '.join(shipped)})"
        )
    return shipped[source]
