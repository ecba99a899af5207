"""Targets that are a person or a program: arguments of the library, and lines of a chat."""

from __future__ import annotations

import ast
import atexit
import functools
import io
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import spt_ds
from spt_ds import api, chat
from spt_ds.api import Bot
from spt_ds.errors import DataError
from tests.fuzz.inputs import documents, texts
from tests.fuzz.judge import Target
from tests.helpers.runs import make_run

ARGUMENTS = {"persona": ["i ski."], "history": ["hi", "hello", "and you?"], "prompt": 1}
OPTIONS = {
    "run": None,
    "checkpoint": "best",
    "generate__mode": "fixed:1",
    "generate__max_new_tokens": 2,
    "generate__do_sample": True,
    "generate__top_p": 0.5,
}
TALK = (
    b"hi\nhow are you?\n/retry\n/prompt 1\nyes\n/prompt auto\n/persona\ni ski.\n\nand now?\n"
    b"/save talk.jsonl\n/help\n/reset\nhello\n/quit\n"
)


@functools.cache
def _run() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fuzz-run-")
    atexit.register(folder.cleanup)
    return make_run(Path(folder.name)).path


@functools.cache
def _bot() -> Bot:
    return spt_ds.load(_run(), generate__max_new_tokens=4)


def _literal(content: bytes) -> dict[str, Any]:
    """Arguments of any kind that Python can write: texts, numbers, bytes, sets."""
    try:
        tree = ast.literal_eval(content.decode())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise DataError("no literal") from error
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def reply(content: bytes, folder: Path) -> None:
    arguments = _literal(content)
    given = [arguments.get("persona"), arguments.get("history")]
    whole = _bot().reply(*given, prompt=arguments.get("prompt"))  # type: ignore[arg-type]
    pieces = list(_bot().stream(*given, prompt=arguments.get("prompt")))  # type: ignore[arg-type]
    assert isinstance(whole.text, str)
    assert all(isinstance(piece, str) for piece in pieces)


def load(content: bytes, folder: Path) -> None:
    """Open a run with any options, as far as its configuration."""
    options = _literal(content)
    run = options.pop("run", None)
    checkpoint = options.pop("checkpoint", "best")
    opened = mock.patch.object(api, "open_trained", return_value=(None, None))
    with opened, mock.patch.object(api, "Bot"):
        spt_ds.load(_run() if run is None else run, checkpoint, **options)


def talk(content: bytes, folder: Path) -> int:
    """A whole conversation on the standard input; files are named in the working directory only."""
    lines = content.replace(b"/save /", b"/save ").replace(b"..", b"")
    stream = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
    opened = mock.patch.object(api, "open_bot", return_value=_bot())
    with opened, mock.patch("sys.stdin", stream):
        return chat.main([str(_run()), "--persona", __file__])


def _written(tree: Any) -> bytes:
    return repr(tree).encode("utf-8", "replace")


TARGETS = [
    Target("reply", documents(ARGUMENTS, dump=_written), reply, share=0.5),
    Target("load", documents(OPTIONS, dump=_written), load),
    Target("talk", texts(TALK), talk, share=0.3),
]
