"""Errors that a user can cause. Each says what is wrong, what was got, what is allowed and how to
mend it.

The command line prints their text without a traceback and ends with exit code 2; anything else is a
fault of ours and keeps its traceback.
"""

from __future__ import annotations


class SptError(Exception):
    """Base of every error a user can cause."""


class ConfigError(SptError):
    """The YAML file, an override or the DeepSpeed JSON cannot be used; the text holds every problem
    found.
    """


class DataError(SptError):
    """A dialogue file is missing, malformed or does not fit; the text starts with `file:line` where
    there is one.
    """


class ModelError(SptError):
    """A base model cannot be loaded or lacks what the method needs."""


class EngineError(SptError):
    """The process group, DeepSpeed or the machine cannot do what was asked."""


class CheckpointError(SptError):
    """A checkpoint is damaged, incomplete or belongs to another run."""


class NonFiniteError(SptError):
    """A loss or gradient is NaN or infinite; raised on every rank together, before the optimizer
    moves.
    """
