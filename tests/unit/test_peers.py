"""A rank's pulse: who is named as lost, and who is left in peace. The store is a dictionary here;
`tests/distributed/test_silent_rank.py` has processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from spt_ds import peers
from spt_ds.peers import DONE, Pulse

LIMIT_S = 0.4


class Shared:
    """A store that answers unless it is told not to."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.answers = True

    def set(self, key: str, value: str) -> None:
        self.told[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        while not self.answers:
            time.sleep(0.01)
        return [self.told[key].encode() for key in keys]


class Rank:
    """One rank of a run, whose count of collectives the test sets."""

    def __init__(self, store: Shared, number: int, size: int) -> None:
        self.count = 0
        self.says: list[str] = []
        self.spoke = threading.Event()
        self.pulse = Pulse(store, number, size, LIMIT_S, lambda: self.count, self._give_up)

    def _give_up(self, words: str) -> None:
        self.says.append(words)
        self.spoke.set()
        self.pulse._ended.set()  # where a real one ends the process


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rank]]:
    monkeypatch.setattr(peers, "_processes", [(f"host{n}", 10 + n) for n in range(3)])
    monkeypatch.setattr(peers, "_ended_here", lambda: None)  # these hosts have no processes
    store = Shared()
    run = [Rank(store, number, 3) for number in range(3)]
    yield run
    store.answers = True
    for rank in run:
        rank.pulse._ended.set()


def test_a_rank_that_is_behind_is_named_by_those_that_wait(ranks: list[Rank]) -> None:
    ranks[0].count = ranks[2].count = 7
    ranks[1].count = 6
    assert ranks[0].spoke.wait(20)
    assert ranks[2].spoke.wait(20)
    assert ranks[0].says == [
        "rank 1 (pid 11 on host1) did not answer within engine.collective_timeout_s: its process"
        " runs, so it hangs or needs longer"
    ]
    assert ranks[1].says == []  # it waits for nobody


def test_a_rank_without_a_pulse_is_named_however_far_it_came(ranks: list[Rank]) -> None:
    ranks[1].pulse._ended.set()
    assert ranks[0].spoke.wait(20)
    assert ranks[0].says[0].startswith("rank 1 (pid 11 on host1) died or did not answer within")


def test_a_store_that_does_not_answer_is_that_of_the_first_rank(ranks: list[Rank]) -> None:
    store = ranks[1].pulse.store
    assert isinstance(store, Shared)
    store.answers = False
    assert ranks[1].spoke.wait(20)
    assert ranks[1].says[0].startswith("rank 0 (pid 10 on host0) died or did not answer within")


def test_ranks_that_work_alone_for_long_are_left_in_peace(ranks: list[Rank]) -> None:
    """All are as far: each reads its base, or the first writes while the others are through."""
    ranks[2].pulse.end()
    assert ranks[2].pulse.store.multi_get(["pulse/2"]) == [DONE.encode()]
    time.sleep(LIMIT_S + 2.5)
    assert [rank.says for rank in ranks] == [[], [], []]


def test_a_rank_that_comes_on_is_left_in_peace(ranks: list[Rank]) -> None:
    for count in range(1, 30):
        time.sleep(0.1)
        ranks[0].count = ranks[2].count = count  # slower than none, one ahead of rank 1
        ranks[1].count = count - 1
    assert [rank.says for rank in ranks] == [[], [], []]


def test_who_has_an_exception_has_the_last_word(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_pulse", ranks[0].pulse)
    ranks[1].pulse._ended.set()
    told = peers.explain_loss(RuntimeError("Timed out waiting 400ms for recv operation"))
    assert told is not None
    assert told.startswith("rank 1 (pid 11 on host1) died or did not answer within")
    time.sleep(LIMIT_S + 2.5)
    assert ranks[0].says == []
