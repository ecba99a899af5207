"""Errors that a user can cause: what is wrong, what was got, what is allowed, how to mend it.

The command line prints their text without a traceback and ends with exit code 2; anything else is a
fault of ours and keeps its traceback. Texts of a file, a base or a model reach a terminal only
through `printable`, and a message repeats a value only as `shown` (display.py).
"""

from __future__ import annotations

import errno

from spt_ds.display import printable, shortened

LINE_CHARACTERS, LINES = 2000, 60  # of a whole message: what no caller cut is cut here


class SptError(Exception):
    """Base of every error a user can cause."""

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        kept = [shortened(line, LINE_CHARACTERS) for line in lines[:LINES]]
        if len(lines) > LINES:
            kept.append(f"... and {len(lines) - LINES} more lines")
        return printable("\n".join(kept), keep="\n\t")


class ConfigError(SptError):
    """The YAML file, an override or the DeepSpeed JSON cannot be used; all problems are named."""


class DataError(SptError):
    """A dialogue file is missing, malformed or does not fit; `file:line` comes first."""


class ModelError(SptError):
    """A base model cannot be loaded or lacks what the method needs."""


class EngineError(SptError):
    """The process group, DeepSpeed or the machine cannot do what was asked."""


class CheckpointError(SptError):
    """A checkpoint is damaged, incomplete or belongs to another run."""


class NonFiniteError(SptError):
    """A loss or gradient is NaN or infinite: raised on every rank before the optimizer moves."""


# What a user gave cannot be used as a file, or the disk refuses it.
MENDABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def mendable(error: OSError) -> SptError | None:
    """The error of ours for an OSError that no reader or writer has met; None for a fault."""
    if error.errno not in MENDABLE or error.filename is None:
        return None
    name = str(error.filename)
    return SptError(f"{shortened(name)}: {error.strerror}; give another path, or mend this one")
