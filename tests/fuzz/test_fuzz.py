"""Whatever others wrote gives a value or one of our own errors: no traceback, hang or flood.

`make test` draws the same inputs each time, for about a minute, and replays the corpus. The slow
test draws new ones for SPT_FUZZ_MINUTES (60). What breaks a target is written into the corpus.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds import dist
from spt_ds.errors import DataError
from tests.fuzz import judge as judging
from tests.fuzz.drawing import Drawn, Finding, draw, replay
from tests.fuzz.inputs import texts, unpack
from tests.fuzz.judge import CORPUS, Target, TooLong, judge
from tests.fuzz.targets import TARGETS

EXAMPLES = 60  # of a target with share 1
ROUND = 200  # examples of a target before the slow test goes to the next


@pytest.fixture(scope="module", autouse=True)
def _own_process_group() -> Iterator[None]:
    """Opening a bot starts a process group and sets its variables."""
    before = dict(os.environ)
    yield
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_inputs_as_ever(name: str) -> None:
    drawn = draw(TARGETS[name], max(4, round(EXAMPLES * TARGETS[name].share)))
    assert drawn.inputs


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    """One input of each target is good: what is drawn lies near it, and behind the first check."""
    assert replay(TARGETS[name]).outcomes["value"]


def test_the_corpus_names_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_new_inputs_for_an_hour() -> None:
    until = time.monotonic() + 60 * float(os.environ.get("SPT_FUZZ_MINUTES", "60"))
    number, total = int(time.time()), 0
    while time.monotonic() < until:
        for target in TARGETS.values():
            if time.monotonic() < until:
                total += draw(target, max(4, round(ROUND * target.share)), number).inputs
        number += 1
    print(f"{total} inputs, the last seed is {number}")


# What the judge sees ------------------------------------------------------------------------------


def _target(kind: str) -> Target:
    def run(content: bytes, folder: Path) -> int | None:
        if content != b"x":
            return None
        if kind == "error":
            raise DataError("no")
        if kind == "traceback":
            raise RecursionError
        if kind == "swallowed hang":
            try:
                while True:
                    pass
            except TooLong as error:
                raise DataError("no") from error
        if kind == "memory":
            bytearray(judging.MEMORY + (64 << 20))
        if kind == "control":
            print("\x1b[2J")
        return 1 if kind == "code" else 0

    return Target(f"itself-{kind.replace(' ', '-')}", texts(b"x"), run)


def test_a_value_and_our_own_error_are_no_finding() -> None:
    assert [judge(_target(kind), b"x") for kind in ("value", "error")] == ["value", "DataError"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("traceback", RecursionError),
        ("swallowed hang", TooLong),
        ("memory", MemoryError),
        ("control", AssertionError),
        ("code", KeyError),
    ],
)
def test_the_judge_sees_a_finding(
    kind: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(judging, "SECONDS", 0.2)
    monkeypatch.setattr(judging, "CORPUS", tmp_path)
    with pytest.raises(error):
        judge(_target(kind), b"x")
    with pytest.raises(Finding) as caught:
        draw(_target(kind), 50)
    assert isinstance(caught.value.__cause__, error)
    (kept,) = _target(kind).corpus
    assert kept.read_bytes() == b"x"
    with pytest.raises(Finding):
        replay(_target(kind))


def test_a_packed_folder_is_unpacked() -> None:
    content = b"=== a\n1\n\n=== b/c\n=== no\n2\n=== d\n(absent)\n"
    good = {"a": b"0", "b/c": b"0", "d": b"0", "e": b"0"}
    assert unpack(content, good) == {"a": b"1\n", "b/c": b"", "e": b"0"}


def test_drawn_inputs_are_counted() -> None:
    drawn = draw(_target("error"), 40)
    assert isinstance(drawn, Drawn)
    assert drawn.inputs == 40
    assert set(drawn.outcomes) == {"value", "DataError"}
