"""Runs one input through one target and says what came of it.

An input may give a value or one of our own errors. Any other exception, more than SECONDS of
processor time, more than MEMORY, an exit code other than 0 and 2, or a control character on a
stream is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from transformers.utils import logging as transformers_logging

from spt_ds.display import printable
from spt_ds.errors import SptError
from spt_ds.log import get_logger
from tests.fuzz.inputs import Document

SECONDS = 20.0  # of the processor; the slowest good input takes less than one
MEMORY = 1 << 30  # bytes of address space beyond what the process has when the input begins
MESSAGE = 130_000  # characters: SptError keeps at most 60 lines of 2,000
CORPUS = Path(__file__).with_name("corpus")


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    `run` gets the input and an empty folder, which is also the working directory. It returns None,
    or the exit code of a command; it raises what the code under test raises.
    """

    name: str
    inputs: Document
    run: Callable[[bytes, Path], int | None]
    share: float = 1.0  # of the examples that a run draws: less for what is slow

    @property
    def corpus(self) -> list[Path]:
        """Inputs that are replayed in every run: each once broke this target, or shows its form."""
        folder = CORPUS / self.name
        return sorted(path for path in folder.iterdir()) if folder.is_dir() else []

    def keep(self, content: bytes) -> Path:
        """Write an input that broke this target into the corpus."""
        path = CORPUS / self.name / hashlib.sha256(content).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


class TooLong(Exception):
    """An input took more than SECONDS."""


def judge(target: Target, content: bytes) -> str:
    """Return `value` or the name of the error that an input gave; raise for a finding."""
    transformers_logging.disable_progress_bar()  # it returns to the beginning of its line
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    spoken = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")  # as a process has
    try:
        with _bounded(), _inside(folder), _heard(spoken):
            try:
                code = target.run(content, folder)
                outcome = {None: "value", 0: "value", 2: "exit code 2"}[code]
            except SptError as error:
                outcome = type(error).__name__
                spoken.write(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spoken.seek(0)
    said = spoken.read()
    assert "Traceback" not in said, said
    assert said == printable(said, keep="\n\t"), f"control characters: {said!r}"
    assert len(said) < MESSAGE, f"{len(said)} characters were printed"
    return outcome


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _heard(spoken: io.TextIOWrapper) -> Iterator[None]:
    """Collect what goes to the streams and to the log."""
    handler = get_logger().handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    before = handler.setStream(spoken)
    try:
        with contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            yield
    finally:
        handler.setStream(before)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Let the block take SECONDS of the processor and MEMORY, and no more."""
    late = []

    def stop(_: int, __: FrameType | None) -> None:
        late.append(True)
        raise TooLong(f"more than {SECONDS:.0f} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        * resource.getpagesize()
    )
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if late:  # whoever caught it was not to
        raise TooLong(f"more than {SECONDS:.0f} s")
