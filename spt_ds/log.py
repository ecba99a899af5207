"""One logger for the package: the first rank speaks, the others only from WARNING on.

Fallbacks go through `fallback`: said once, with what was asked, what is used and why; an error
under `strict`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from spt_ds.display import printable
from spt_ds.errors import SptError

_LOGGER = logging.getLogger("spt_ds")
_said: set[str] = set()


class _Printable(logging.Formatter):
    """What a file or a model put into a message reaches the terminal as text alone."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def get_logger() -> logging.Logger:
    """Return the package's logger, set up on first use from RANK and SPT_LOG_LEVEL."""
    if not _LOGGER.handlers:
        rank = os.environ.get("RANK", "0")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            _Printable(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s", "%H:%M:%S")
        )
        _LOGGER.addHandler(handler)
        _LOGGER.propagate = False
        default = "INFO" if rank == "0" else "WARNING"
        _LOGGER.setLevel(os.environ.get("SPT_LOG_LEVEL", default).upper())
    return _LOGGER


def show(text: str, end: str = "\n") -> None:
    """Print to the standard output what a file, a model or a user wrote, as text alone."""
    print(printable(text, keep="\n\t"), end=end, flush=True)


def accept_any_text() -> None:
    """Let the process's streams take every byte and character, and obey none.

    What a terminal or a pipe sends and is not UTF-8 arrives as lone surrogates, which the reader
    must refuse; what the terminal's encoding lacks is printed as its escape. What steers a terminal
    is printed as its escape too, whoever prints it: also libraries quote the files that they read.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    # A progress bar returns to the beginning of its line.
    for stream, keep in ((sys.stdout, "\n\t"), (sys.stderr, "\n\t\r")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if not isinstance(stream.write, _Harmless):
                # The stream itself: logging handlers and progress bars hold it already.
                stream.write = _Harmless(stream.write, keep)  # type: ignore[method-assign]


class _Harmless:
    """The `write` of a stream, with what steers a terminal as escapes but for `keep`."""

    def __init__(self, write: Callable[[str], int], keep: str) -> None:
        self.write = write
        self.keep = keep

    def __call__(self, text: str) -> int:
        self.write(printable(text, self.keep))
        return len(text)


class ErrorStream:
    """The standard error stream for a progress bar: where it cannot be written, as a log on a disk
    that is full, the bar is lost and the run goes on.
    """

    def write(self, text: str) -> int:
        """Write `text` if that is possible."""
        with contextlib.suppress(OSError, ValueError):  # full or broken, or closed
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return sys.stderr.isatty()

    def fileno(self) -> int:
        """The stream's own, by which tqdm asks for the width of the terminal."""
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:
        """The stream's own, by which tqdm chooses its bar's characters."""
        return sys.stderr.encoding or "ascii"


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log `message` the first time it is given in this process."""
    if message not in _said:
        _said.add(message)
        get_logger().log(level, message)


def fallback(
    asked: str, used: str, why: str, *, strict: bool, error: type[SptError] = SptError
) -> None:
    """Say once that `used` replaces `asked` and why; raise `error` instead when `strict`."""
    message = f"asked for {asked}, using {used}: {why}"
    if strict:
        raise error(
            f"{message} (strict: true forbids the fallback; set strict: false to accept it)"
        )
    say_once(message, logging.WARNING)


def prepare_streams() -> None:
    """Let no character and no reader that left be worth a traceback to a command.

    What nobody reads any more is dropped, so that a command finishes its work and ends with the
    exit code that it earned.
    """
    accept_any_text()  # also the streams that handlers of libraries hold already
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)
    accept_any_text()


def flush_output() -> None:
    """Write out what was printed. Raises SptError where it cannot be, as on a full disk."""
    sys.stdout.flush()


def say_loading() -> None:
    """Say that libraries are loaded which take seconds, so that a start shows itself at once."""
    if "torch" not in sys.modules:
        get_logger().info("loading PyTorch and transformers")


class _Output(io.FileIO):
    """Standard output or standard error stream: a terminal, a file, or a pipe to a reader."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._refused = False

    def write(self, data: Any) -> int:
        """Write `data`, or drop it where the reader has left, as `head` does.

        Raises SptError, once, where the standard output is refused for another reason. There is no
        place to tell it where the error stream is: a run goes on without its log.
        """
        if self._refused:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            # What is left in a buffer would be refused again at the end.
            self._refused = True
            if isinstance(error, BrokenPipeError) or self.fileno() != 1:
                return len(data)
            raise SptError(f"the standard output cannot be written ({error.strerror})") from error


def _outliving(stream: Any) -> Any:
    if stream is None:  # the process was started without one
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    inner = getattr(stream.buffer, "raw", stream.buffer)
    # Tests and notebooks put streams of their own here: their descriptor is another, or none.
    if type(inner) is not io.FileIO or inner.fileno() not in (1, 2):
        return stream
    stream.flush()
    output = _Output(inner.fileno())
    return io.TextIOWrapper(
        output if inner is stream.buffer else io.BufferedWriter(output),
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
