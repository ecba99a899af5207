"""Names the ranks that are gone, and ends a process that would wait for them without a word.

A rank that waits inside NCCL gets no exception. Past the time-out NCCL ends the process, and leaves
neither a message nor a traceback. So each rank has a pulse in threads of its own. It writes how
many collectives the rank has entered into the store through which the ranks met. A rank that comes
no further looks there for others that are silent or behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

# What gloo and NCCL say in the survivors of a dead or silent rank.
_LOSS_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "remote process exited",
    "NCCL communicator was aborted",
)
TICKS = 20  # of a pulse within a time-out, at least
LONGEST_TICK_S = 5.0
DONE = "done"
_LIMIT = "engine.collective_timeout_s"
_processes: list[tuple[str, int]] = []  # (host, process id) of each rank
_pulse: Pulse | None = None


class Store(Protocol):
    """What is used of a store of `torch.distributed`."""

    def set(self, key: str, value: str, /) -> None:
        """Write; returns at once, also where nobody listens."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read; may wait without end where nobody answers."""


class Pulse:
    """Tells the other ranks that this one lives and how far it has come, and looks after them.

    `entered` counts the collectives that this rank has entered. Where the count stays the same for
    more than `limit_s` seconds, and another rank is silent or has a lower count, `give_up` gets the
    words for it and ends the process.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        limit_s: float,
        entered: Callable[[], int],
        give_up: Callable[[str], None],
    ) -> None:
        self.store = store
        self.rank = rank
        self.keys = [f"pulse/{number}" for number in range(size)]
        self.limit_s = limit_s
        self.tick_s = min(limit_s / TICKS, LONGEST_TICK_S)
        self.entered = entered
        self.give_up = give_up
        self.last_word = threading.Lock()
        """Held for good by whoever explains the end: the main thread or this pulse."""
        self._ended = threading.Event()
        self._tell(f"0 {entered()}")
        # Two threads: who looks waits for answers, and must not seem silent meanwhile.
        for work in (self._beat, self._look):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def end(self) -> None:
        """Leave in peace: the others are not to miss this rank."""
        self._ended.set()
        self._tell(DONE)
        give_up_s = time.monotonic() + 1.0
        # The store may be in the first process, and the others would write to nobody.
        while self.rank == 0 and time.monotonic() < give_up_s:
            if set(self._read() or [DONE]) == {DONE}:
                break
            time.sleep(0.02)

    def lost(self) -> tuple[list[int], bool]:
        """The ranks that this one waits for, and whether they live.

        Silent ones come first, then those with the lowest count; none where nobody is behind.
        """
        before = self._read()
        if before is None:
            return [0], False
        time.sleep(max(2 * self.tick_s, 1.0))
        after = self._read() or before
        others = [n for n in range(len(after)) if n != self.rank and after[n] != DONE]
        silent = [n for n in others if after[n] == before[n]]
        # Without a second answer, as where the first process has just ended, all would seem silent.
        if silent and after is not before:
            return silent, False
        counts = {n: int(after[n].split()[1]) for n in others}
        least = min(counts.values(), default=0)
        if least >= self.entered():
            return [], True
        return [n for n in others if counts[n] == least], True

    def _beat(self) -> None:
        for tick in itertools.count(1):
            if self._ended.wait(self.tick_s) or not self._tell(f"{tick} {self.entered()}"):
                return

    def _look(self) -> None:
        count, since_s = -1, 0.0
        while not self._ended.wait(self.tick_s):
            if self.entered() != count:
                count, since_s = self.entered(), time.monotonic()
            elif time.monotonic() - since_s > self.limit_s:
                ranks, alive = self.lost()
                if not ranks or self.entered() != count:
                    continue
                words = _ended_here() or _words(ranks, alive)
                with self.last_word:
                    if not self._ended.is_set():
                        self.give_up(words)

    def _tell(self, text: str) -> bool:
        # The first host may be down, which is for `_look` to find.
        with contextlib.suppress(RuntimeError):
            self.store.set(self.keys[self.rank], text)
            return True
        return False

    def _read(self) -> list[str] | None:
        """What each rank has told last; None where the store does not answer."""
        told: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                told.extend(self.store.multi_get(self.keys))

        # By a thread of its own, as nothing else can leave a store that does not answer.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(max(self.tick_s, 1.0))
        return [text.decode() for text in told] or None


def know(processes: Sequence[tuple[str, int]]) -> None:
    """Remember the host and the process id of each rank."""
    _processes[:] = processes


def start(*args: Any) -> None:
    """Start this rank's pulse, with the arguments of `Pulse`; one is enough for a process."""
    global _pulse
    _pulse = _pulse or Pulse(*args)


def leave() -> None:
    """End this rank's pulse, so that the others do not miss it."""
    global _pulse
    if _pulse is not None:
        _pulse.end()
    _pulse = None


def say_and_end(lost: str) -> NoReturn:
    """Give up where there is no run folder that could keep more."""
    print(f"\nspt-ds failed: {lost}", file=sys.stderr, flush=True)
    os._exit(1)


def explain_loss(error: BaseException) -> str | None:
    """Say which rank is gone; None when `error` is not that of a collective without a peer."""
    text = str(error)
    alone = _pulse is None and len(_processes) < 2  # and what timed out was not a rank
    if alone or not any(sign in text for sign in _LOSS_SIGNS):
        return None
    if _pulse is not None:
        _pulse.last_word.acquire()
    ended = _ended_here()
    if ended is None and _pulse is not None and "imed out" in text:
        ranks, alive = _pulse.lost()
        if ranks:
            return _words(ranks, alive)
    return ended or _somewhere()


def _ended_here() -> str | None:
    """Name the ranks of this host whose processes are gone."""
    host = socket.gethostname()
    gone: list[int] = []
    # A killed process closes its connections before it is gone.
    give_up_s = time.monotonic() + 1.0
    while not gone and time.monotonic() < give_up_s:
        gone = [
            rank
            for rank, (where, pid) in enumerate(_processes)
            if where == host and not _alive(pid)
        ]
        time.sleep(0.02)
    if not gone:
        return None
    return (
        f"{_named(gone)} ended in the middle of a step: killed (out of memory?), or its own message"
        " is printed above"
    )


def _words(ranks: Sequence[int], alive: bool) -> str:
    if alive:
        return (
            f"{_named(ranks)} did not answer within {_LIMIT}: its process runs, so it hangs or"
            " needs longer"
        )
    return (
        f"{_named(ranks)} died or did not answer within {_LIMIT}: its process is stopped or gone,"
        " its host is down, or the network is cut"
    )


def _named(ranks: Sequence[int]) -> str:
    return " and ".join(map(_name, ranks))


def _name(rank: int) -> str:
    if rank >= len(_processes):  # it hung before the ranks had told one another where they are
        return f"rank {rank}"
    host, pid = _processes[rank]
    return f"rank {rank} (pid {pid} on {host})"


def _somewhere() -> str:
    host = socket.gethostname()
    elsewhere = sorted({where for where, _ in _processes} - {host})
    suspects = f"a rank on {', '.join(elsewhere)}" if elsewhere else "a rank"
    return (
        f"{suspects} died or did not answer within {_LIMIT} (every rank on {host} is alive): it"
        " hangs, or the network is cut"
    )


def _alive(pid: int) -> bool:
    """Whether a process of this host runs; one that nobody has buried yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            # The name of a program is in brackets and may itself hold blanks and brackets.
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")  # not Linux: nothing is known
